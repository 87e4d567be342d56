"""The interfaces between averaging, staging and writing, and their simplest implementations, which run at once.

``PostHocEMA`` and ``AsyncPostHocEMA`` are one machine (``averager.py``). What differs stands behind two interfaces:

- a ``Lane`` runs averaging work of one device in order: inline here, on a side stream or a worker thread in ``async_``;
- a ``Sink`` takes the averages of this moment as a snapshot: written at once here, staged and written in the background
  there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nitrous_ema.arena import Arena
from nitrous_ema.errors import SnapshotWriteError
from nitrous_ema.keeping import Keeper
from nitrous_ema.snapshots.format import Stamp
from nitrous_ema.stats import Stats
from nitrous_ema.tracked import TORCH_DTYPES

Work = Callable[[], None]


class Mark(Protocol):
    """A point in a lane's work. Recorded again and again; means nothing before the first time."""

    def record(self) -> None:
        """Place it after everything that was queued where the caller's work runs now."""

    def order(self) -> None:
        """What is queued from here where the caller's work runs comes after it."""

    def wait(self) -> None:
        """Block this thread until it is reached."""


class Lane(Protocol):
    """An ordered queue of averaging work on one device. Called by the training thread."""

    def run(self, work: Work) -> None:
        """Queue work that reads parameters and writes averages, after all that the caller has queued so far."""

    def copy_out(self, work: Work, abandon: Work) -> None:
        """Queue work that reads the averages as they are after the last ``run``; ``abandon`` if it cannot be run."""

    def order_caller(self) -> None:
        """What the caller does next with parameters or averages comes after every ``run`` so far."""

    def mark(self) -> Mark:
        """A new mark for work on this lane."""

    def take_error(self) -> BaseException | None:
        """What queued work raised since the last call; nothing more is run until it was taken."""

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Block until all queued work is done. Raises TimeoutError."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Drain and end. Raises TimeoutError."""


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A snapshot to be taken of the averages as they are after all queued work."""

    arena: Arena
    stamp: Stamp


class Sink(Protocol):
    """Where snapshots go."""

    def take(self, pending: Pending, lane: Callable[[torch.device], Lane]) -> bool:
        """Take a snapshot, now or in the background; False if it is skipped. May block while there is no room."""

    def has_lost(self, step: int) -> bool:
        """Whether a snapshot of this step was taken and could not be written."""

    def writes_order(self, device: torch.device) -> Callable[[int, int], None] | None:
        """What a lane must call before it writes averages that lie at ``[begin, end)`` of the file's data, in bytes.

        None if no snapshot copy is reading averages on this device.
        """

    def stats(self) -> Stats:
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


class InlineLane:
    """Runs everything at once, on the caller's own stream: order is the caller's."""

    def run(self, work: Work) -> None:
        """Do it now."""
        work()

    def copy_out(self, work: Work, abandon: Work) -> None:
        """Do it now."""
        try:
            work()
        except BaseException:
            abandon()
            raise

    def order_caller(self) -> None:
        """Nothing is ever behind the caller."""

    def mark(self) -> Mark:
        """A mark that is always reached."""
        return ReachedMark()

    def take_error(self) -> None:
        """``run`` raises by itself."""

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Nothing is ever queued."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Nothing to end."""


class ReachedMark:
    """The mark of a lane whose queue order already is all the order there is to keep."""

    def record(self) -> None:
        """Nothing to record."""

    def order(self) -> None:
        """Nothing to wait for."""

    def wait(self) -> None:
        """Nothing to wait for."""


class InlineSink:
    """Writes each snapshot before it returns, through one page of pageable memory.

    Args:
        keeper: Writes it, and drops others.

    Raises:
        SnapshotWriteError: From ``take``; the averages are untouched.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._ledger = keeper.ledger

    def take(self, pending: Pending, lane: Callable[[torch.device], Lane]) -> bool:
        """Write it."""

        def chunks() -> Iterator[memoryview]:
            layout = pending.arena.layout
            with neutral_modes():
                page = torch.empty(layout.chunk_bytes, dtype=torch.uint8, device="cpu")
            for index, (begin, end) in enumerate(layout.chunks):
                # Not around the yield: after a failed write nobody would leave the modes again.
                with neutral_modes():
                    stage_chunk(pending.arena, index, page, non_blocking=False)
                yield page.numpy().data[: end - begin]

        try:
            self._keeper.write(pending.arena.layout, pending.stamp, chunks)
        except SnapshotWriteError as failure:
            self._ledger.add(failed=1, last_error=str(failure))
            raise
        return True

    def has_lost(self, step: int) -> bool:
        """``take`` raises by itself."""
        return False

    def writes_order(self, device: torch.device) -> None:
        """Nothing is in flight when ``take`` has returned."""

    def stats(self) -> Stats:
        """Nothing is ever pending."""
        return self._ledger.read()

    def raise_failures(self) -> None:
        """``take`` raises by itself; what could not be dropped is a warning."""
        self._keeper.warn_of_failures()

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Nothing is pending."""

    def close(self, timeout_seconds: float | None = None) -> None:
        """Nothing to end."""


def stage_chunk(
    arena: Arena, index: int, page: Tensor, *, non_blocking: bool, device: torch.device | None = None
) -> None:
    """Copy one chunk of the file's data to host memory.

    Args:
        arena: The averages; read on the current stream.
        index: Which of the layout's chunks.
        page: uint8 on the CPU, at least as large as the chunk.
        non_blocking: Return before the bytes are there (from an accelerator, into pinned memory).
        device: Only what is on this device; default everything.
    """
    layout = arena.layout
    chunk = layout.chunks[index]
    profile_bytes = layout.sections[0].end
    if chunk.begin >= profile_bytes * len(layout.gammas):
        _stage_copied(arena, chunk.begin, chunk.end, page, non_blocking, device)
        return
    dtype = TORCH_DTYPES[layout.checkpoint_dtype]
    profile, offset = divmod(chunk.begin, profile_bytes)
    begin = offset // dtype.itemsize
    elements = page[: chunk.end - chunk.begin].view(dtype)
    for first, piece in arena.pieces(profile, begin, begin + elements.numel(), device):
        if piece.device.type != "cpu":
            piece = piece.to(dtype)  # on the device: half the bytes to move, and a copy between types would block
        elements[first : first + piece.numel()].copy_(piece, non_blocking=non_blocking)


def _stage_copied(
    arena: Arena, begin: int, end: int, page: Tensor, non_blocking: bool, device: torch.device | None
) -> None:
    start = arena.layout.sections[-1].begin + arena.layout.padding_bytes
    if begin < start:
        page[: start - begin].zero_()
    shift = max(start - begin, 0)
    for first, piece in arena.copied_pieces(max(begin - start, 0), end - start, device):
        page[shift + first : shift + first + piece.numel()].copy_(piece, non_blocking=non_blocking)


@contextmanager
def neutral_modes() -> Iterator[None]:
    """Whatever the caller has switched on, tensors made here are ordinary and need no gradients.

    Autocast touches none of the operations used; default device and dtype are always given explicitly.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
