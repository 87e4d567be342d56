"""The interfaces between averaging, staging and writing, and their simplest implementations, which run at once.

``PostHocEMA`` and ``AsyncPostHocEMA`` are one machine (``engine.py``). What differs stands behind two interfaces:

- a ``Lane`` runs averaging work of one device in order: inline here, on a side stream or a worker thread in ``async_``;
- a ``SnapshotSink`` takes the averages of this moment as a snapshot: written at once here, staged and written in the background
  there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.snapshots.header import Stamp
from nitrous_ema.snapshots.stats import WriteStats

Work = Callable[[], None]


class Mark(Protocol):
    """A point in a lane's work. Recorded again and again; means nothing before the first time."""

    def record(self) -> None:
        """Place it after everything that was queued where the caller's work runs now."""

    def wait_on_device(self) -> None:
        """What is queued from here where the caller's work runs comes after it."""

    def wait(self) -> None:
        """Block this thread until it is reached."""

    def is_reached(self) -> bool:
        """Whether it is, as far as the host knows now; never blocks. Of one never recorded: True."""


class Lane(Protocol):
    """An ordered queue of averaging work on one device.

    Called by the training thread, and by threads that step optimizers; never by two at once.
    """

    def enqueue_write(self, work: Work, *, reads_parameters: bool = True, abandon: Work | None = None) -> None:
        """Queue work that writes averages, after all that the caller has queued so far.

        Args:
            work: To be run.
            reads_parameters: It reads parameters, or copies of them that the caller made; False if all that it reads
                is the lane's own.
            abandon: Called if it cannot be run.
        """

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        """Queue work that reads the averages as they are after the last ``run``; ``abandon`` if it cannot be run."""

    def stash(self, work: Work) -> None:
        """Do work that copies parameters, where the caller is; later ``run`` and ``order_writer`` come after it."""

    def order_writer(self) -> None:
        """What the caller does next with parameters comes after every ``run`` so far that reads them."""

    def order_reader(self) -> None:
        """What the caller does next with averages comes after every ``run`` so far."""

    def is_capturing(self) -> bool:
        """Whether what the caller does now is recorded, to be replayed later, instead of done."""

    def mark(self) -> Mark:
        """A new mark for work on this lane."""

    def take_error(self) -> BaseException | None:
        """What queued work raised since the last call; nothing more is run until it was taken."""

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Block until all queued work is done. Raises TimeoutError."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Drain and end. Raises TimeoutError."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingSnapshot:
    """A snapshot to be taken of the averages as they are after all queued work."""

    flat_buffers: FlatBuffers
    stamp: Stamp


class ReadbacksInFlight(Protocol):
    """Snapshot copies that may still be reading averages of one device."""

    def wait_on_device(self, begin: int, end: int) -> None:
        """What is queued from here on the current stream comes after those that read ``[begin, end)``.

        Args:
            begin, end: Bytes of the file's data.
        """

    def are_over(self, begin: int, end: int) -> bool:
        """Whether those have finished, as far as the host knows now; never blocks."""


class SnapshotSink(Protocol):
    """Where snapshots go."""

    def take_snapshot(self, pending: PendingSnapshot, lane: Callable[[torch.device], Lane]) -> bool:
        """Take a snapshot, now or in the background; False if it is skipped. May block while there is no room."""

    def has_lost(self, step: int) -> bool:
        """Whether a snapshot of this step was taken and could not be written."""

    def copies_in_flight(self, device: torch.device) -> ReadbacksInFlight | None:
        """The snapshot copies that may still be reading averages on a device; None if there are none."""

    def stats(self) -> WriteStats:
        """What became of the snapshots so far; updates are not counted here."""

    def raise_failures(self) -> None:
        """Raise a write that failed in the background, and warn of what could not be dropped, each once.

        Raises:
            SnapshotWriteError: The write.
        """

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Block until every taken snapshot is written or failed. Raises TimeoutError."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Flush and end. Raises TimeoutError."""


class BackgroundThread(threading.Thread):
    """A thread of a lane or a sink. A daemon: whoever ends the EMA, or the interpreter, drains it first."""

    def __init__(self, work: Work, name: str) -> None:
        super().__init__(target=work, name=f"nitrous-ema-{name}", daemon=True)


@contextmanager
def neutral_modes() -> Iterator[None]:
    """Whatever the caller has switched on, tensors made here are ordinary and need no gradients.

    Autocast touches none of the operations used; default device and dtype are always given explicitly.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
