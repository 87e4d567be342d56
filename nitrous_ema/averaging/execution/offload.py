"""Averaging in host memory of parameters that are on an accelerator (``offload="host"``).

The averages use no device memory: an update copies the parameters to the host, batch by batch, in their own types, and
a host thread averages each batch as soon as it has arrived. Two sets of pinned buffers take turns, so that the next
update can be copied out while the last one is averaged. The copies run on the side stream of the parameters' device.
The optimizer waits, on the device, for the copies alone. Nothing waits for the averaging, unless it takes longer than
the steps between two updates: then update() waits for one of the two sets. The device's memory is used only where an
update has to permute a parameter.

a set      owner              may                                       leaves by
FREE       no thread          -                                         enqueue_update()   -> COPYING
COPYING    the source's lane  be written by copies from the device      a mark for each batch
COPIED     the host's lane    wait for the mark of a batch, then read   all batches averaged -> FREE

OFFLOAD-1  A batch is averaged after its copy has finished.      test_batch_is_averaged_after_it_has_come
OFFLOAD-2  A set is filled again only after it was averaged, or  test_set_is_not_filled_while_it_is_averaged
    released by a lane that had failed.                          test_failed_lane_gives_its_set_back
OFFLOAD-3  The optimizer waits for the copies only.              test_optimizer_does_not_wait_for_the_averaging
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nitrous_ema._base.arguments import format_bytes
from nitrous_ema.averaging.execution.finite_updates import UpdateFlag, allowed, count_skipped
from nitrous_ema.averaging.execution.host_memory import check_host_memory, pinned_or_pageable
from nitrous_ema.averaging.execution.interfaces import Lane, Mark
from nitrous_ema.averaging.kernels.foreach_step import AveragingStep

_NUM_SETS = 2
_FLAG_BYTES = 1
_LARGEST_PIECE_BYTES = 1 << 28


@dataclass(slots=True, eq=False)
class _BufferSet:
    """Host memory for the parameters of one update."""

    blocks: list[Tensor]  # uint8, one per batch
    marks: list[Mark]  # one per batch; recorded after the copy into its block
    allowed: Tensor  # the update's flag, copied before its first batch
    stashed: list[Any] = field(default_factory=list)  # one per batch: what the step's stash() returned for its block


class Offload:
    """The averaging of one step's tensors in host memory.

    Args:
        step: A step whose averages are in host memory.
        source: The lane of the device where the parameters are.
        host: The lane that averages.

    Raises:
        NitrousError: There is not enough host memory for the copies.
    """

    def __init__(self, step: AveragingStep, source: Lane, host: Lane) -> None:
        self._step = step
        self._source = source
        self._host = host
        self._free: queue.SimpleQueue[_BufferSet] = queue.SimpleQueue()
        self.num_held_up = 0
        """How often an update had to wait, because both sets were in use."""
        sizes = [step.stash_bytes(batch) for batch in range(len(step.batches))]
        for *blocks, flag in _allocate([*sizes, _FLAG_BYTES]):
            self._free.put(_BufferSet(blocks, [source.mark() for _ in blocks], flag.view(torch.bool)[0]))

    def enqueue_update(
        self,
        sources: Any,
        weights: Sequence[float],
        flag: UpdateFlag | None = None,
        num_skipped: Tensor | None = None,
    ) -> None:
        """Copy the parameters of one update to the host and average them there; block while both sets are in use.

        Args:
            sources: What the step's ``sources`` returned for this update.
            weights: Weight of the parameters, per profile.
            flag: Whether the update is applied; computed by the source's lane. None: it is.
            num_skipped: Counts skipped updates; None if another step of the same update does.
        """
        self.num_held_up += self._free.empty()
        buffers = self._free.get()
        # Either lane may abandon its work. The set is then free again: otherwise the next update would wait for ever.
        release = partial(self._free.put, buffers)
        self._source.enqueue_write(partial(_copy_to_host, self._step, sources, buffers, flag), abandon=release)
        # The host's lane reads the set and no parameters, so no optimizer has to wait for it.
        self._host.enqueue_write(
            partial(_average, self._step, buffers, weights, flag is not None, num_skipped, release),
            reads_parameters=False,
            abandon=release,
        )


def _copy_to_host(step: AveragingStep, sources: Any, buffers: _BufferSet, flag: UpdateFlag | None) -> None:
    buffers.stashed = []
    value = allowed(flag)
    if value is not None:
        buffers.allowed.copy_(value, non_blocking=True)
    for batch, (block, mark) in enumerate(zip(buffers.blocks, buffers.marks, strict=True)):
        buffers.stashed.append(step.stash(sources, batch, block))
        mark.record()


def _average(
    step: AveragingStep,
    buffers: _BufferSet,
    weights: Sequence[float],
    may_skip: bool,
    num_skipped: Tensor | None,
    release: Callable[[], None],
) -> None:
    for stashed, mark in zip(buffers.stashed, buffers.marks, strict=True):
        # On the host: this runs on a thread of the CPU's lane, and the averaging is CPU code.
        mark.wait_on_host()
        step.run_stashed(stashed, weights, buffers.allowed if may_skip else None)
    if num_skipped is not None and buffers.marks:
        count_skipped(buffers.allowed, num_skipped)
    release()


def _allocate(sizes: Sequence[int]) -> list[list[Tensor]]:
    """Return blocks of these sizes, in bytes, for every set: pinned, or pageable with a warning if pinning fails."""
    pieces, places = _pack(sizes)
    purpose = f"the {_NUM_SETS} copies of the parameters of offload='host', of {format_bytes(sum(pieces))} each"
    remedy = "Keep the averages on the device (offload=None)."
    check_host_memory(_NUM_SETS * sum(pieces), purpose, remedy)

    def make(pin: bool) -> list[list[Tensor]]:
        return [[_piece(size, pin=pin) for size in pieces] for _ in range(_NUM_SETS)]

    memory = pinned_or_pageable(make, purpose, remedy)
    return [
        [of_set[piece][begin : begin + size] for (piece, begin), size in zip(places, sizes, strict=True)]
        for of_set in memory
    ]


def _pack(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the sizes of the pieces to allocate, and for each block its piece and its first byte there.

    torch's allocator of pinned memory rounds sizes up to powers of two. Blocks are therefore packed one after the other
    into pieces of such sizes, each the largest that does not exceed what remains: less than one block per piece is
    wasted.
    """
    remaining, piece_bytes, begin = sum(sizes), 0, 0
    pieces: list[int] = []
    places: list[tuple[int, int]] = []
    for size in sizes:
        if size > piece_bytes - begin:
            piece_bytes = max(min(_floor(remaining), _LARGEST_PIECE_BYTES), _ceiling(size))
            pieces.append(piece_bytes)
            begin = 0
        places.append((len(pieces) - 1, begin))
        begin += size
        remaining -= size
    return pieces, places


def _floor(size: int) -> int:
    """Return the largest power of two that is not greater than ``size``."""
    return 1 << max(size.bit_length() - 1, 0)


def _ceiling(size: int) -> int:
    """Return the smallest power of two that is not less than ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def _piece(num_bytes: int, *, pin: bool) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pin)
