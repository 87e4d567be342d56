"""The interfaces between averaging, staging and writing, together on one page.

``PostHocEMA`` and ``AsyncPostHocEMA`` share one engine (``averaging/engine.py``). They differ behind two interfaces:

- A ``Lane`` runs averaging work of one device in order. ``inline.py`` has a lane that runs it immediately;
  ``async_/lanes.py`` has lanes that run it on a side stream or on a worker thread.
- A ``SnapshotSink`` takes a snapshot of the averages. ``inline.py`` has a sink that writes it immediately;
  ``async_/background_writer.py`` has a sink that stages the snapshot and writes it in the background.

"Queued before" and "queued after" always refer to the place where the caller's work runs: the current stream of the
lane's device, or the calling thread where averages are in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.snapshots.header import Stamp
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.stats import WriteStats

Work = Callable[[], None]


class Mark(Protocol):
    """A point in a lane's work, which is recorded again and again. Before the first record it has no meaning."""

    def record(self) -> None:
        """Place the mark after everything that the caller has queued so far."""

    def wait_on_device(self) -> None:
        """Order the caller's next queued work after the mark; the host does not wait."""

    def wait_on_host(self) -> None:
        """Block this thread until the mark is reached."""

    def is_reached(self) -> bool:
        """Return whether the host knows that the mark is reached; never blocks. True for a mark never recorded."""


class Lane(Protocol):
    """An ordered queue of averaging work on one device.

    The training thread calls it, and so do threads that step optimizers; never two threads at the same time.
    """

    def enqueue_write(self, work: Work, *, reads_parameters: bool = True, abandon: Work | None = None) -> None:
        """Queue work that writes averages, after everything that the caller has queued so far.

        Args:
            work: The work.
            reads_parameters: Whether the work reads parameters, or copies of them that the caller made. False if it
                reads nothing but memory of the lane's own: then no writer of parameters has to wait for it.
            abandon: Called if the work cannot be run.
        """

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        """Queue work that reads the averages as the last ``enqueue_write`` leaves them.

        Args:
            work: The work.
            abandon: Called if the work cannot be run.
        """

    def stash(self, work: Work) -> None:
        """Run work that copies parameters, where the caller is.

        Later ``enqueue_write`` and ``order_writer`` calls are ordered after it.
        """

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return new memory on the lane's device for ``stash``: uint8, of the lane's own, none of the caller's."""

    def order_deferred(self) -> None:
        """Order work and stashes that are queued later after everything that the caller has queued so far.

        The caller may be elsewhere then, and need not be ordered after what it has queued here.
        """

    def order_writer(self) -> None:
        """Order the caller's next use of the parameters after all work queued so far that reads them."""

    def order_reader(self) -> None:
        """Order the caller's next use of the averages between every ``enqueue_write`` so far and the next one."""

    def is_capturing(self) -> bool:
        """Return whether the caller's work is now being captured into a graph, to be replayed later."""

    def mark(self) -> Mark:
        """Return a new mark for work on this lane."""

    def take_error(self) -> BaseException | None:
        """Return what queued work raised since the last call; the lane runs nothing more until the error is taken."""

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Block until all queued work is done. Raises TimeoutError."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Drain the lane and end it. Raises TimeoutError."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingSnapshot:
    """A snapshot to be taken of the averages as all work queued so far leaves them."""

    flat_buffers: FlatBuffers
    stamp: Stamp


class ReadbacksInFlight(Protocol):
    """Device-to-host copies of snapshots that may still be reading averages of one device."""

    @property
    def num_finished(self) -> int:
        """How many of them the host knows to have finished. While it stays, so does every ``have_finished``."""

    def wait_on_device(self, begin: int, end: int) -> None:
        """Order the work queued next on the current stream after the readbacks of ``[begin, end)``.

        Args:
            begin, end: Bytes of the file's data.
        """

    def have_finished(self, begin: int, end: int) -> bool:
        """Return whether the host knows that the readbacks of ``[begin, end)`` have finished; never blocks.

        Args:
            begin, end: Bytes of the file's data.
        """


class SnapshotSink(Protocol):
    """Where snapshots are written to."""

    def take_snapshot(self, pending: PendingSnapshot, lane: Callable[[torch.device], Lane]) -> bool:
        """Take a snapshot, now or in the background; return False if it is skipped. May block until memory is free.

        Args:
            pending: The snapshot.
            lane: Returns the lane of a device.
        """

    def resize(self, layout: Layout) -> None:
        """Prepare for snapshots of another layout, whose copied tensors have other shapes. None may be in flight."""

    def has_lost(self, step: int) -> bool:
        """Return whether a snapshot of this step was taken and could not be written."""

    def readbacks_in_flight(self, device: torch.device) -> ReadbacksInFlight | None:
        """Return the readbacks that may still be reading averages on a device; None if there are no such readbacks."""

    def stats(self) -> WriteStats:
        """Return counters of the snapshots so far; updates are not counted here."""

    def raise_failures(self) -> None:
        """Raise a write that failed in the background, and warn of files that could not be dropped, each once.

        Raises:
            SnapshotWriteError: The write.
        """

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Block until every snapshot that was taken is written or has failed. Raises TimeoutError."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Flush the sink and end it. Raises TimeoutError."""
