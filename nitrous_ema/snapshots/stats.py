"""What an EMA has done so far, in numbers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """A record of one moment."""

    updates: int = 0
    """Updates that were applied, since the first one of the run."""
    snapshots: int = 0
    """Snapshots that were written to disk."""
    pending: int = 0
    """Snapshots that are on their way."""
    skipped: int = 0
    """Snapshots not taken because every slot was busy (``on_full="skip"``)."""
    failed: int = 0
    """Snapshots that could not be written."""
    dropped: int = 0
    """Snapshots that ``keep=`` has dropped, also those of earlier runs that this one continued."""
    bytes_written: int = 0
    """Bytes of all snapshots that were written."""
    bytes_freed: int = 0
    """Bytes that removing dropped snapshots has freed; those dropped last stay until the next one is written."""
    seconds_waited: float = 0.0
    """Time that checkpoint() made its caller wait for a free slot."""
    seconds_writing: float = 0.0
    """Time that writers spent on these snapshots, from the first byte to the acknowledgement."""
    scratch_bytes: int = 0
    """Device memory held for parameters that the trainer wrote while a snapshot copy still read their averages."""
    held_up: int = 0
    """How often the trainer had to wait for a snapshot copy, since that scratch had reached its limit."""
    last_error: str | None = None
    """What the last failure said."""

    @property
    def write_bandwidth(self) -> float:
        """Bytes per second of one writer; 0 before the first snapshot."""
        return self.bytes_written / self.seconds_writing if self.seconds_writing else 0.0


class Ledger:
    """Counts from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = Stats()  # guarded by _lock

    def add(self, *, last_error: str | None = None, **counts: float) -> None:
        """Add to fields of ``Stats``, by name."""
        with self._lock:
            added = {name: getattr(self._stats, name) + count for name, count in counts.items()}
            self._stats = replace(self._stats, **added, last_error=last_error or self._stats.last_error)

    def read(self) -> Stats:
        """The counts of now."""
        with self._lock:
            return self._stats
