"""Averaging while a snapshot's readback still reads the averages, without making the trainer wait for the readback.

A readback of all averages to the host takes as long as a training step, or several. An update in that time must not
write averages that are still to be copied, and training must not wait for the copies. The update is therefore cut into
batches, and each batch is averaged when the readbacks of its own range have finished. Nothing on the lane waits for a
readback: the host polls, at each update and each optimizer step, which readbacks have finished, and queues the batches
that they blocked. When the trainer is about to write parameters that are still to be read, the parameters are stashed:
copied on the trainer's own stream, in their own types, which takes a fraction of the time of averaging them.

a batch of an update   its parameters are          leaves by
LIVE                   where the model has them    readbacks finished: averaged; stash_live() -> STASHED
STASHED                in a block of the pool      readbacks finished: averaged

DEFER-1  A batch is averaged after the readbacks of its range, and   test_batch_waits_for_the_copy_of_its_range_only
    the other batches do not wait for them.
DEFER-2  The updates of a batch are averaged in their order.         test_updates_of_a_batch_keep_their_order
DEFER-3  Parameters are averaged as they were at their update,       test_parameters_are_stashed_before_they_are_written
    also if they are written before they are averaged.
DEFER-4  The lane itself waits for readbacks only when a caller      test_nothing_on_the_lane_waits_for_a_copy
    asks for the averages, or when the pool is used up. Until that   test_updates_after_a_forced_wait_are_stashed_too
    wait is over nothing else is queued behind it, where it would
    hold up the optimizer as well.
DEFER-5  A block is written again only after it was read: as far     test_stash_is_not_written_while_it_is_read
    as the host knows, or behind a wait on the device.               test_last_block_is_used_again_behind_a_wait
DEFER-6  The pool stays within its limit; beyond it the trainer      test_trainer_waits_where_the_stash_is_used_up
    waits for the readback, and nothing is lost. Memory that the     test_refused_memory_is_asked_for_once
    device did not have is not asked for again.
DEFER-7  A batch is averaged once, wherever Ctrl-C strikes a hook:   test_interrupt_averages_nothing_twice
    it leaves the table in the same work that averages it. Where     test_interrupt_inside_the_averaging_is_known
    that work was interrupted itself, the averages are refused.
DEFER-8  Where no readback has finished since the last call, a call  test_hook_with_nothing_to_do_costs_one_query
    visits no batch: optimizers may step once per parameter.

Longer than 300 lines: what may be queued, stashed or forced is one table of states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nitrous_ema.averaging.execution.finite_updates import UpdateFlag, allowed, check, count_skipped
from nitrous_ema.averaging.execution.interfaces import Lane, Mark, ReadbacksInFlight
from nitrous_ema.averaging.kernels.finite import all_finite
from nitrous_ema.averaging.kernels.foreach_step import AveragingStep
from nitrous_ema.snapshots.layout import Span

_FLAGS_BYTES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class PlacedStep:
    """A step, and the place of its batches in a snapshot's data."""

    step: AveragingStep
    spans: Sequence[Sequence[Span]]
    """Per batch, the ranges of the file's data that the readbacks copy from it."""


@dataclass(slots=True, eq=False)
class StashBlock:
    """Memory for the stashed parameters of one batch."""

    memory: Tensor  # uint8
    read: Mark  # recorded after the last averaging that reads it
    is_taken: bool = True  # holds parameters that are still to be averaged


class StashPool:
    """Device memory for stashed parameters; allocated when first needed, then held for as long as the pool lives.

    Args:
        lane: Allocates the memory.
        device: Where the memory is.
        limit_bytes: The most that is ever held.
    """

    def __init__(self, lane: Lane, device: torch.device, limit_bytes: int) -> None:
        self._lane = lane
        self.device = device
        self.limit_bytes = limit_bytes
        self._blocks: list[StashBlock] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return sum(block.memory.numel() for block in self._blocks)

    def take(self, num_bytes: int, *, may_wait: bool) -> StashBlock | None:
        """Return a block of at least ``num_bytes``; None if the limit or the device's memory does not allow it.

        Args:
            num_bytes: The bytes.
            may_wait: Whether the current stream may be made to wait until a block was read.
        """
        free = [block for block in self._blocks if not block.is_taken and block.memory.numel() >= num_bytes]
        free.sort(key=_size)
        # A block whose last read is still queued is passed over while there are others. To wait for that read holds up
        # the trainer's stream, on which the block is written, until the lane has averaged from it.
        block = next((block for block in free if block.read.is_reached()), None) or self._allocate(num_bytes)
        if block is None and free and may_wait:
            block = free[0]
            block.read.wait_on_device()
        if block is not None:
            block.is_taken = True
        return block

    def _allocate(self, num_bytes: int) -> StashBlock | None:
        if self.num_bytes + num_bytes > self.limit_bytes:
            return None
        try:
            memory = self._lane.allocate(num_bytes, self.device)
        except torch.OutOfMemoryError:
            # Not an error: the trainer waits for the readback instead, as where the limit is reached. Each refusal
            # empties the cache of torch's allocator, so the pool never asks for more again.
            self.limit_bytes = self.num_bytes
            return None
        self._blocks.append(StashBlock(memory, self._lane.mark()))
        return self._blocks[-1]


@dataclass(slots=True, eq=False)
class _DeferredUpdate:
    """An update, and the batches of it that are still to be averaged."""

    placed: PlacedStep
    sources: Any
    weights: Sequence[float]
    flag: UpdateFlag | None
    # Per batch, in order: None while its parameters are in the model (LIVE); then what the step's stash() returned, and
    # the block (STASHED). One table, so that Ctrl-C never finds a batch in both states, nor in none.
    batches: dict[int, tuple[Any, StashBlock] | None]

    def live(self, among: Iterable[int]) -> list[int]:
        return [batch for batch in among if self.batches[batch] is None]


class DeferredUpdates:
    """The updates of one device, of which some batches may be deferred. Called by one thread at a time.

    Args:
        lane: The lane of the device.
        readbacks_in_flight: Returns the readbacks that may be reading averages there now; None if there are no such
            readbacks.
        stash_pool: Memory for stashed parameters.
    """

    def __init__(
        self, lane: Lane, readbacks_in_flight: Callable[[], ReadbacksInFlight | None], stash_pool: StashPool
    ) -> None:
        self._lane = lane
        self._readbacks_in_flight = readbacks_in_flight
        self.stash_pool = stash_pool
        self._flag_pool = StashPool(lane, stash_pool.device, _FLAGS_BYTES)
        self._deferred: list[_DeferredUpdate] = []  # the oldest first
        self._has_live = False  # whether parameters of any batch may still be in the model
        self._num_finished: int | None = None  # readbacks at the last visit of all batches; None: visit them again
        self._is_averaging = False  # also after an error in the averaging
        self._forced: Mark | None = None  # recorded after the last work that makes the lane wait for readbacks
        self.num_held_up = 0
        """How often the pool did not suffice, so that the trainer had to wait."""

    @property
    def has_deferred(self) -> bool:
        """Whether any batch is still to be averaged."""
        return bool(self._deferred)

    def take_interrupted(self) -> bool:
        """Return whether a batch was left half averaged since the last call, so that the averages are invalid."""
        was_averaging, self._is_averaging = self._is_averaging, False
        return was_averaging

    def enqueue_check(self, tensors: Sequence[Tensor], num_skipped: Tensor) -> UpdateFlag:
        """Queue the check whether an update is skipped, before its batches; return its flag.

        Args:
            tensors: All tensors that the update averages.
            num_skipped: Counts skipped updates.
        """
        flag = UpdateFlag()
        # Behind a forced wait the optimizer would wait for the readbacks, too (DEFER-4). The caller's stream computes
        # the flag then, and the lane takes it over.
        block = self._flag_pool.take(1, may_wait=False) if self._is_forced() else None
        if block is None:
            self._lane.enqueue_write(partial(check, flag, tensors, num_skipped))
        else:
            self._lane.stash(partial(_check_into, block, tensors))
            self._lane.enqueue_write(partial(_take_over, flag, block, num_skipped), reads_parameters=False)
        return flag

    def enqueue_update(
        self, placed: PlacedStep, sources: Any, weights: Sequence[float], flag: UpdateFlag | None = None
    ) -> None:
        """Queue the averaging of one update: now where no readback blocks it, otherwise batch by batch later.

        Args:
            placed: The step.
            sources: What the step's ``sources`` returned for this update.
            weights: Weight of the parameters, per profile.
            flag: What ``enqueue_check`` returned for this update; None if it is never skipped.
        """
        readbacks = self._readbacks_in_flight()
        if readbacks is None and not self._deferred:
            self._lane.enqueue_write(partial(_run, placed.step, sources, weights, None, flag))
            return
        # Also where no readback is in flight any more: updates that are deferred come first (DEFER-2).
        self._lane.order_deferred()
        self._deferred.append(_DeferredUpdate(placed, sources, weights, flag, dict.fromkeys(range(len(placed.spans)))))
        self._has_live, self._num_finished = True, None
        self._enqueue_unblocked(readbacks)

    def stash_live(self) -> None:
        """Stash the parameters that are still to be read, because the caller is about to write them."""
        readbacks = self._readbacks_in_flight()
        # First, because a batch that can be averaged now need not be stashed.
        self._enqueue_unblocked(readbacks)
        if self._has_live and any(deferred.live(deferred.batches) for deferred in self._deferred):
            self._lane.stash(self._stash_batches)
            if any(deferred.live(deferred.batches) for deferred in self._deferred):  # the pool did not suffice
                self.num_held_up += 1
                self._force(readbacks)
        self._has_live = False

    def flush(self) -> None:
        """Queue everything that is deferred; the lane waits for the readbacks in its way, the optimizer does not."""
        # Stashed first, so that the optimizer need not wait: work queued behind the readbacks then reads no live
        # parameters.
        self.stash_live()
        if self._deferred:
            self._force(self._readbacks_in_flight())

    def _enqueue_unblocked(self, readbacks: ReadbacksInFlight | None) -> None:
        """Queue every deferred batch whose readbacks have finished."""
        if self._is_forced():
            # The lane is waiting for readbacks. Reads of live parameters queued behind that wait would make the
            # optimizer wait for the readbacks too (DEFER-4).
            return
        num_finished = None if readbacks is None else readbacks.num_finished
        if num_finished is not None and num_finished == self._num_finished:
            return  # DEFER-8
        blocked: set[tuple[PlacedStep, int]] = set()
        for deferred in self._deferred:
            free = []
            for batch in deferred.batches:
                key = deferred.placed, batch
                # A batch of a later update must not overtake an earlier one, even if the readbacks finish between the
                # two polls: once blocked, a batch is blocked for all later updates of this pass.
                if key in blocked or not _have_finished(readbacks, deferred.placed.spans[batch]):
                    blocked.add(key)
                else:
                    free.append(batch)
            live = deferred.live(free)
            stashed = [batch for batch in free if deferred.batches[batch] is not None]
            if live:
                self._lane.enqueue_write(partial(self._average, deferred, live))
            if stashed:
                # Reads the pool only, so no optimizer has to wait for it.
                self._lane.enqueue_write(partial(self._average, deferred, stashed), reads_parameters=False)
        self._deferred = [deferred for deferred in self._deferred if deferred.batches]
        self._num_finished = num_finished

    def _is_forced(self) -> bool:
        """Return whether the lane may still be waiting for readbacks."""
        return self._forced is not None and not self._forced.is_reached()

    def _average(self, update: _DeferredUpdate, batches: Sequence[int]) -> None:
        """Average batches, all live or all stashed, on the lane; they leave the table (DEFER-7)."""
        self._is_averaging = True
        stashed = [update.batches.pop(batch) for batch in batches]
        step, weights, flag = update.placed.step, update.weights, update.flag
        if stashed[0] is None:
            _run(step, update.sources, weights, batches, flag)
        else:
            _run_stashed(step, [each for each in stashed if each is not None], weights, flag)
        self._is_averaging = False

    def _stash_batches(self) -> None:
        """Copy live batches into the pool, the oldest update first, until the pool is used up."""
        # Behind a forced wait the last read of a block waits for readbacks, and the optimizer would wait with it.
        may_wait = not self._is_forced()
        for deferred in self._deferred:
            step = deferred.placed.step
            for batch in deferred.live(deferred.batches):
                block = self.stash_pool.take(step.stash_bytes(batch), may_wait=may_wait)
                if block is None:
                    return
                deferred.batches[batch] = step.stash(deferred.sources, batch, block.memory), block

    def _force(self, readbacks: ReadbacksInFlight | None) -> None:
        """Queue every deferred update, preceded by waits, on the device, for the readbacks of its ranges."""
        self._forced = self._forced or self._lane.mark()
        for update in self._deferred:
            work = partial(self._average_after_readbacks, update, readbacks, self._forced)
            self._lane.enqueue_write(work, reads_parameters=bool(update.live(update.batches)))
        self._deferred = []

    def _average_after_readbacks(
        self, update: _DeferredUpdate, readbacks: ReadbacksInFlight | None, done: Mark
    ) -> None:
        for batch in list(update.batches):
            for span in update.placed.spans[batch]:
                if readbacks is not None:
                    readbacks.wait_on_device(span.begin, span.end)
            self._average(update, [batch])
        done.record()


def _have_finished(readbacks: ReadbacksInFlight | None, spans: Sequence[Span]) -> bool:
    return readbacks is None or all(readbacks.have_finished(span.begin, span.end) for span in spans)


def _check_into(block: StashBlock, tensors: Sequence[Tensor]) -> None:
    block.memory.view(torch.bool).copy_(all_finite(tensors))


def _take_over(flag: UpdateFlag, block: StashBlock, num_skipped: Tensor) -> None:
    # A copy, because the block is free for another flag before the batches of this update have run.
    flag.value = block.memory.view(torch.bool).clone()[0]
    count_skipped(flag.value, num_skipped)
    block.read.record()
    block.is_taken = False


def _run(
    step: AveragingStep, sources: Any, weights: Sequence[float], batches: Sequence[int] | None, flag: UpdateFlag | None
) -> None:
    step.run(sources, weights, batches, allowed(flag))


def _run_stashed(
    step: AveragingStep,
    stashed: Sequence[tuple[Any, StashBlock]],
    weights: Sequence[float],
    flag: UpdateFlag | None,
) -> None:
    for parameters, block in stashed:
        step.run_stashed(parameters, weights, allowed(flag))
        # Recorded before the block is free. Until then the mark is that of an earlier read, and take() would find the
        # block unused while it is being read.
        block.read.record()
        block.is_taken = False


def _size(block: StashBlock) -> int:
    return block.memory.numel()
