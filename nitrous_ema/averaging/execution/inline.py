"""The simplest lane and sink: everything runs at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nitrous_ema.averaging.execution.device_to_host import ChunkCopier
from nitrous_ema.averaging.execution.interfaces import Lane, Mark, PendingSnapshot, Work, neutral_modes
from nitrous_ema.errors import SnapshotWriteError
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.stats import WriteStats


class InlineLane:
    """Runs everything at once, on the caller's own stream: order is the caller's."""

    def enqueue_write(self, work: Work, *, reads_parameters: bool = True, abandon: Work | None = None) -> None:
        """Do it now."""
        attempt(work, abandon)

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        """Do it now."""
        attempt(work, abandon)

    def stash(self, work: Work) -> None:
        """Do it now."""
        work()

    def order_writer(self) -> None:
        """Nothing is ever behind the caller."""

    def order_reader(self) -> None:
        """Nothing is ever behind the caller."""

    def is_capturing(self) -> bool:
        """What is recorded here was called here, by one who knows."""
        return False

    def mark(self) -> Mark:
        """A mark that is always reached."""
        return ReachedMark()

    def take_error(self) -> None:
        """``run`` raises by itself."""

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Nothing is ever queued."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Nothing to end."""


def attempt(work: Work, abandon: Work | None) -> None:
    """Do work now; ``abandon``, and raise, if it raises."""
    try:
        work()
    except BaseException:
        if abandon is not None:
            abandon()
        raise


class ReachedMark:
    """The mark of a lane whose queue order already is all the order there is to keep."""

    def record(self) -> None:
        """Nothing to record."""

    def wait_on_device(self) -> None:
        """Nothing to wait for."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def is_reached(self) -> bool:
        """Always."""
        return True


class InlineSnapshotSink:
    """Writes each snapshot before it returns, through one page of pageable memory.

    Args:
        writer: Writes it, and drops others.

    Raises:
        SnapshotWriteError: From ``take``; the averages are untouched.
    """

    def __init__(self, writer: RetainingWriter) -> None:
        self._writer = writer
        self._ledger = writer.ledger

    def take_snapshot(self, pending: PendingSnapshot, lane: Callable[[torch.device], Lane]) -> bool:
        """Write it."""

        def chunks() -> Iterator[memoryview]:
            layout = pending.flat_buffers.layout
            copiers = [ChunkCopier(device, layout) for device in pending.flat_buffers.devices]
            with neutral_modes():
                page = torch.empty(layout.chunk_bytes, dtype=torch.uint8, device="cpu")
            for span in layout.chunks:
                # Not around the yield: after a failed write nobody would leave the modes again.
                with neutral_modes():
                    for copier in copiers:
                        copier.copy(pending.flat_buffers, span, page, non_blocking=False)
                yield page.numpy().data[: span.end - span.begin]

        try:
            self._writer.write(pending.flat_buffers.layout, pending.stamp, chunks)
        except SnapshotWriteError as failure:
            self._ledger.add(failed=1, last_error=str(failure))
            raise
        return True

    def has_lost(self, step: int) -> bool:
        """``take`` raises by itself."""
        return False

    def copies_in_flight(self, device: torch.device) -> None:
        """Nothing is in flight when ``take`` has returned."""

    def stats(self) -> WriteStats:
        """Nothing is ever pending."""
        return self._ledger.read()

    def raise_failures(self) -> None:
        """``take`` raises by itself; what could not be dropped is a warning."""
        self._writer.warn_of_failures()

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Nothing is pending."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Nothing to end."""
