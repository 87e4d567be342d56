"""Averages tensors while snapshot copies still read their averages, without making the trainer wait for the copies.

Copying all averages to the host takes as long as a training step, or several. An update that falls into that time is
cut into batches, each of which is averaged when the copies of its own range are over. Nothing on the lane waits for a
copy: the host asks, whenever it comes by, which copies are over, and queues what is free. When the trainer is about to
write parameters that are still to be read, these are copied to scratch in their own types, where the trainer is, which
takes a fraction of the time of averaging them.

a batch of an update   its parameters are          leaves by
LIVE                   where the model has them    its copies are over: averaged; secure() -> KEPT
KEPT                   in scratch                  its copies are over: averaged

N1  A batch is averaged after the copies of its range, and the      test_batch_waits_for_the_copy_of_its_range_only
    other batches do not wait for them.
N2  The updates of a batch are averaged in their order.             test_updates_of_a_batch_keep_their_order
N3  Parameters are averaged as they were at their update, whoever   test_parameters_are_kept_before_they_are_written
    writes them later.
N4  Only who asks for the averages, or the end of the scratch,      test_nothing_on_the_lane_waits_for_a_copy
    makes the lane itself wait for copies. Until that wait is       test_what_comes_after_a_forced_wait_is_kept_too
    over nothing else is queued behind it, where it would hold up
    the optimizer as well.
N5  Scratch is written again only after it was read, as far as      test_scratch_is_not_written_while_it_is_read
    the host knows.
N6  Scratch stays within its limit; past it the trainer waits for   test_trainer_waits_where_scratch_is_used_up
    the copy, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nitrous_ema.averaging.execution.interfaces import Lane, Mark, ReadbacksInFlight
from nitrous_ema.averaging.kernels.foreach_step import AveragingStep
from nitrous_ema.snapshots.layout import Span


@dataclass(frozen=True, slots=True, eq=False)
class PlacedStep:
    """A step, and where the averages of its batches lie in a snapshot's data."""

    step: AveragingStep
    spans: Sequence[Sequence[Span]]
    """Per batch."""


@dataclass(slots=True, eq=False)
class StashBlock:
    """Scratch of one batch."""

    memory: Tensor  # uint8
    read: Mark  # recorded after the last averaging that reads it
    is_taken: bool = True


class StashPool:
    """Device memory for parameters that wait to be averaged; allocated when first needed, then held.

    Args:
        device: Where.
        limit_bytes: The most that is ever held.
    """

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self._device = device
        self.limit_bytes = limit_bytes
        self._blocks: list[StashBlock] = []

    @property
    def num_bytes(self) -> int:
        """What is held."""
        return sum(block.memory.numel() for block in self._blocks)

    def take(self, num_bytes: int, make_mark: Callable[[], Mark]) -> StashBlock | None:
        """A block of at least so many bytes; None if there is none within the limit, or no memory."""
        free = [block for block in self._blocks if not block.is_taken and block.memory.numel() >= num_bytes]
        block = next((block for block in sorted(free, key=_size) if block.read.is_reached()), None)
        if block is None:
            if self.num_bytes + num_bytes > self.limit_bytes:
                return None
            try:
                memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:
                return None
            block = StashBlock(memory, make_mark())
            self._blocks.append(block)
        block.is_taken = True
        return block


@dataclass(slots=True, eq=False)
class _LateUpdate:
    """An update, and which of its batches are still to be averaged."""

    placed: PlacedStep
    sources: Any
    weights: Sequence[float]
    live: set[int]
    kept: dict[int, tuple[Any, StashBlock]] = field(default_factory=dict)

    def batches(self) -> list[int]:
        return sorted([*self.live, *self.kept])


class DeferredUpdates:
    """What is averaged on one device. Called by one thread at a time.

    Args:
        lane: Of the device.
        copies: The snapshot copies that may be reading averages there now; None if there are none.
        scratch: For parameters.
    """

    def __init__(self, lane: Lane, copies: Callable[[], ReadbacksInFlight | None], scratch: StashPool) -> None:
        self._lane = lane
        self._copies = copies
        self.scratch = scratch
        self._late: list[_LateUpdate] = []  # the oldest first
        self._forced: Mark | None = None  # recorded after work that waits for copies
        self.num_held_up = 0
        """How often the scratch did not suffice."""

    @property
    def is_late(self) -> bool:
        """Whether anything is still to be averaged."""
        return bool(self._late)

    def advance(self, placed: PlacedStep, sources: Any, weights: Sequence[float]) -> None:
        """Average the parameters of one update as soon as the averages may be written."""
        copies = self._copies()
        if copies is None and not self._late:
            self._lane.enqueue_write(partial(placed.step.run, sources, weights))
            return
        self._late.append(_LateUpdate(placed, sources, weights, set(range(len(placed.step.batches)))))
        self._average_what_is_free(copies)

    def stash_live(self) -> None:
        """Parameters are about to be written by the caller: keep what is still to be read of them."""
        copies = self._copies()
        self._average_what_is_free(copies)
        if self._is_live():
            self._lane.stash(self._keep)
        if self._is_live():
            self.num_held_up += 1
            self._force(copies)

    def flush(self) -> None:
        """Queue everything; the lane waits for the copies that are in the way, and the optimizer does not."""
        self.stash_live()
        if self._late:
            self._force(self._copies())

    def _average_what_is_free(self, copies: ReadbacksInFlight | None) -> None:
        if self._forced is not None and not self._forced.is_reached():
            return
        blocked: set[tuple[PlacedStep, int]] = set()
        for late in self._late:
            free = []
            for batch in late.batches():
                key = late.placed, batch
                if key in blocked or not _are_over(copies, late.placed.spans[batch]):
                    blocked.add(key)
                else:
                    free.append(batch)
            live = [batch for batch in free if batch in late.live]
            if live:
                self._lane.enqueue_write(partial(late.placed.step.run, late.sources, late.weights, live))
                late.live.difference_update(live)
            kept = [late.kept.pop(batch) for batch in free if batch in late.kept]
            if kept:
                self._lane.enqueue_write(
                    partial(_run_stashed, late.placed.step, kept, late.weights), reads_parameters=False
                )
        self._late = [late for late in self._late if late.live or late.kept]

    def _is_live(self) -> bool:
        return any(late.live for late in self._late)

    def _keep(self) -> None:
        """Keep all parameters that the scratch suffices for."""
        for late in self._late:
            for batch in sorted(late.live):
                block = self.scratch.take(late.placed.step.stash_bytes(batch), self._lane.mark)
                if block is None:
                    return
                late.kept[batch] = late.placed.step.stash(late.sources, batch, block.memory), block
                late.live.discard(batch)

    def _force(self, copies: ReadbacksInFlight | None) -> None:
        late, self._late = self._late, []
        self._forced = self._forced or self._lane.mark()
        for each in late:
            work = partial(_run_after_copies, each, copies, self._forced)
            self._lane.enqueue_write(work, reads_parameters=bool(each.live))


def _are_over(copies: ReadbacksInFlight | None, spans: Sequence[Span]) -> bool:
    return copies is None or all(copies.are_over(span.begin, span.end) for span in spans)


def _run_stashed(step: AveragingStep, kept: Sequence[tuple[Any, StashBlock]], weights: Sequence[float]) -> None:
    for parameters, block in kept:
        step.run_stashed(parameters, weights)
        block.read.record()
        block.is_taken = False


def _run_after_copies(late: _LateUpdate, copies: ReadbacksInFlight | None, done: Mark) -> None:
    for batch in late.batches():
        for span in late.placed.spans[batch]:
            if copies is not None:
                copies.wait_on_device(span.begin, span.end)
        if batch in late.live:
            late.placed.step.run(late.sources, late.weights, [batch])
        else:
            _run_stashed(late.placed.step, [late.kept[batch]], late.weights)
    done.record()


def _size(block: StashBlock) -> int:
    return block.memory.numel()
