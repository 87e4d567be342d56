"""The simplest lane, and the sinks of snapshots that have nothing in flight: they run on the calling thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nitrous_ema.averaging.execution.device_to_host import ChunkCopier
from nitrous_ema.averaging.execution.interfaces import Lane, Mark, PendingSnapshot, Work
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.errors import SnapshotWriteError
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.stats import WriteStats


class InlineLane:
    """Runs all work immediately, on the caller's own stream, so that the caller's order is the lane's order."""

    def enqueue_write(self, work: Work, *, reads_parameters: bool = True, abandon: Work | None = None) -> None:
        """Run the work now."""
        attempt(work, abandon)

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        """Run the work now."""
        attempt(work, abandon)

    def stash(self, work: Work) -> None:
        """Run the work now."""
        work()

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return new memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def order_deferred(self) -> None:
        """Do nothing: this lane runs all work where the caller is."""

    def order_writer(self) -> None:
        """Do nothing: no work of this lane is ever pending."""

    def order_reader(self) -> None:
        """Do nothing: no work of this lane is ever pending."""

    def is_capturing(self) -> bool:
        """Return False: a synchronous EMA that is called during a capture is meant to become part of the graph."""
        return False

    def mark(self) -> Mark:
        """Return a mark that is always reached."""
        return ReachedMark()

    def take_error(self) -> None:
        """Return None: ``enqueue_write`` raises by itself."""

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Do nothing: no work of this lane is ever pending."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Do nothing: this lane has no resources."""


def attempt(work: Work, abandon: Work | None) -> None:
    """Run work; if it raises, call ``abandon`` and raise the same error."""
    try:
        work()
    except BaseException:
        if abandon is not None:
            abandon()
        raise


class ReachedMark:
    """The mark of a lane whose queue runs in order, and needs no further ordering."""

    def record(self) -> None:
        """Do nothing."""

    def wait_on_device(self) -> None:
        """Do nothing."""

    def wait_on_host(self) -> None:
        """Do nothing."""

    def is_reached(self) -> bool:
        """Return True."""
        return True


class _NothingInFlight:
    """The methods of a sink that has done everything when ``take_snapshot`` returns."""

    def resize(self, layout: Layout) -> None:
        """Do nothing: no memory is held between snapshots."""

    def has_lost(self, step: int) -> bool:
        """Return False: ``take_snapshot`` raises by itself."""
        return False

    def readbacks_in_flight(self, device: torch.device) -> None:
        """Return None: all copies have finished."""

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Do nothing: no snapshot is ever pending."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Do nothing: the sink has no threads."""


class SilentSnapshotSink(_NothingInFlight):
    """Writes nothing, on a rank whose averages another rank writes. The same steps count as taken.

    Args:
        check_writer: Raises an error if the other rank has no EMA.
    """

    def __init__(self, check_writer: Callable[[], None]) -> None:
        self._check_writer = check_writer
        self._num_taken = 0

    def take_snapshot(self, pending: PendingSnapshot, lane: Callable[[torch.device], Lane]) -> bool:
        """Return True. At the second snapshot the other rank, which may be slower, should have an EMA as well."""
        self._num_taken += 1
        if self._num_taken == 2:
            self._check_writer()
        return True

    def stats(self) -> WriteStats:
        """Return counters of no snapshot."""
        return WriteStats()

    def raise_failures(self) -> None:
        """Do nothing: nothing is written."""


class InlineSnapshotSink(_NothingInFlight):
    """Writes each snapshot before it returns, through one page of pageable memory.

    Args:
        retaining_writer: Writes the snapshot, and drops the snapshots that ``keep=`` does not retain.

    Raises:
        SnapshotWriteError: From ``take_snapshot``; the averages are untouched.
    """

    def __init__(self, retaining_writer: RetainingWriter) -> None:
        self._retaining_writer = retaining_writer
        self._ledger = retaining_writer.ledger

    def take_snapshot(self, pending: PendingSnapshot, lane: Callable[[torch.device], Lane]) -> bool:
        """Write the snapshot now. Returns True."""

        def chunks() -> Iterator[memoryview]:
            layout = pending.flat_buffers.layout
            copiers = [ChunkCopier(device, layout) for device in pending.flat_buffers.devices]
            with neutral_modes():
                page = torch.empty(layout.chunk_bytes, dtype=torch.uint8, device="cpu")
            for span in layout.chunks:
                # Not around the yield: after a failed write this generator is never resumed, and the caller's thread
                # would be left in the neutral modes.
                with neutral_modes():
                    for copier in copiers:
                        copier.copy(pending.flat_buffers, span, page, non_blocking=False)
                yield page.numpy().data[: span.end - span.begin]

        try:
            self._retaining_writer.write(pending.flat_buffers.layout, pending.stamp, chunks)
        except SnapshotWriteError as failure:
            self._ledger.add(failed=1, last_error=str(failure))
            raise
        self._retaining_writer.note_skipped(pending.stamp.step, int(pending.flat_buffers.num_skipped))
        return True

    def stats(self) -> WriteStats:
        """Return the counters; no snapshot is ever pending."""
        return self._ledger.read()

    def raise_failures(self) -> None:
        """Warn of files that could not be dropped; a failed write was raised by ``take_snapshot``."""
        self._retaining_writer.report_failures()
