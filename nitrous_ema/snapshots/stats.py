"""The counts of one writer's snapshots: written, failed, dropped, and the time that this took."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteStats:
    """The counts of snapshots at one moment."""

    snapshots: int = 0
    """Snapshots that were written to disk."""
    pending: int = 0
    """Snapshots that were taken and are not on disk yet."""
    skipped: int = 0
    """Snapshots not taken because every slot was busy (``on_full="skip"``)."""
    failed: int = 0
    """Snapshots that could not be written."""
    nonfinite: int = 0
    """Snapshots that were written with values that are not finite."""
    updates_skipped: int = 0
    """Updates that were skipped (``on_nonfinite="skip"``) before the newest snapshot on disk was taken."""
    dropped: int = 0
    """Snapshots that ``keep=`` has dropped, also those of earlier runs that this one continued."""
    bytes_written: int = 0
    """Bytes of all snapshots that were written."""
    bytes_freed: int = 0
    """Bytes that removing dropped snapshots has freed. The last ones are removed when the next snapshot is written."""
    seconds_waited: float = 0.0
    """Seconds that checkpoint() made its caller wait for a free slot."""
    seconds_writing: float = 0.0
    """Seconds that writers spent on these snapshots, from the first byte to the acknowledgement."""
    last_error: str | None = None
    """Message of the last failure."""

    @property
    def write_bandwidth(self) -> float:
        """Bytes per second of one writer; 0 before the first snapshot."""
        return self.bytes_written / self.seconds_writing if self.seconds_writing else 0.0


class Ledger:
    """Adds up the counts of several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = WriteStats()  # guarded by _lock

    def add(self, *, last_error: str | None = None, **counts: float) -> None:
        """Add to fields of ``WriteStats``, by name."""
        with self._lock:
            added = {name: getattr(self._stats, name) + count for name, count in counts.items()}
            self._stats = replace(self._stats, **added, last_error=last_error or self._stats.last_error)

    def raise_to(self, **counts: float) -> None:
        """Raise fields of ``WriteStats`` to these counts, by name; higher counts stay."""
        with self._lock:
            raised = {name: max(getattr(self._stats, name), count) for name, count in counts.items()}
            self._stats = replace(self._stats, **raised)

    def read(self) -> WriteStats:
        """Return the counts so far."""
        with self._lock:
            return self._stats
