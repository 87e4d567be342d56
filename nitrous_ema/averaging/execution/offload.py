"""Averages parameters of an accelerator in host memory: no memory of the device is used, but what an update permutes.

An update's parameters are copied out in their own types, batch by batch, to one of two sets of pinned host memory, on
the side stream of their device; the thread of the host's lane averages each batch as soon as it has come. The optimizer
waits, on the device, for the copies; nobody waits for the averaging, unless it takes longer than the steps between two
updates: then update() waits for one of the sets.

a set      owner              may                                       leaves by
FREE       nobody             -                                         advance()  -> COPYING
COPYING    the source's lane  be written by copies from the device      a mark for each batch
COPIED     the host's lane    wait for the mark of a batch, then read   all batches averaged -> FREE

O1  A batch is averaged after its copy has finished.          test_batch_is_averaged_after_it_has_come
O2  A set is filled again after it was averaged, or given up  test_set_is_not_filled_while_it_is_averaged
    by a lane that had failed.                                test_failed_lane_gives_its_set_back
O3  The optimizer waits for the copies only.                  test_optimizer_does_not_wait_for_the_averaging
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
from nitrous_ema.averaging.execution.host_memory import check_host_memory, pinned_or_pageable
from nitrous_ema.averaging.execution.interfaces import Lane, Mark
from nitrous_ema.averaging.kernels.foreach_step import AveragingStep

_NUM_SETS = 2
_LARGEST_PIECE_BYTES = 1 << 28


@dataclass(slots=True, eq=False)
class _Set:
    """Host memory of one update."""

    blocks: list[Tensor]  # uint8, one per batch
    marks: list[Mark]  # one per batch: recorded after its copy
    kept: list[Any] = field(default_factory=list)  # what the step makes of the blocks


class Offload:
    """The averaging of one step's tensors in host memory.

    Args:
        step: Its averages are in host memory.
        source: The lane of the device where the parameters are.
        host: The lane that averages.

    Raises:
        NitrousError: There is no host memory for the copies.
    """

    def __init__(self, step: AveragingStep, source: Lane, host: Lane) -> None:
        self._step = step
        self._source = source
        self._host = host
        self._free: queue.SimpleQueue[_Set] = queue.SimpleQueue()
        self.num_held_up = 0
        """How often the averaging was not done with either set."""
        for blocks in _allocate([step.stash_bytes(batch) for batch in range(len(step.batches))]):
            self._free.put(_Set(blocks, [source.mark() for _ in blocks]))

    def advance(self, sources: Any, weights: Sequence[float]) -> None:
        """Copy the parameters of one update out and average them; blocks while both sets are taken."""
        self.num_held_up += self._free.empty()
        held = self._free.get()
        give_back = partial(self._free.put, held)
        self._source.enqueue_write(partial(_copy_out, self._step, sources, held), abandon=give_back)
        self._host.enqueue_write(
            partial(_average, self._step, held, weights, give_back), reads_parameters=False, abandon=give_back
        )


def _copy_out(step: AveragingStep, sources: Any, held: _Set) -> None:
    held.kept = []
    for batch, (block, mark) in enumerate(zip(held.blocks, held.marks, strict=True)):
        held.kept.append(step.stash(sources, batch, block))
        mark.record()


def _average(step: AveragingStep, held: _Set, weights: Sequence[float], give_back: Callable[[], None]) -> None:
    for kept, mark in zip(held.kept, held.marks, strict=True):
        mark.wait()
        step.run_stashed(kept, weights)
    give_back()


def _allocate(sizes: Sequence[int]) -> list[list[Tensor]]:
    """Blocks of these sizes, in bytes, for every set; pinned, or pageable (and told) if that fails."""
    pieces, places = _pack(sizes)
    needed = f"the {_NUM_SETS} copies of the parameters of offload='host', of {format_bytes(sum(pieces))} each"
    remedy = "Keep the averages on the device (offload=None)."
    check_host_memory(_NUM_SETS * sum(pieces), needed, remedy)

    def make(pin: bool) -> list[list[Tensor]]:
        return [[_piece(size, pin=pin) for size in pieces] for _ in range(_NUM_SETS)]

    memory = pinned_or_pageable(make, needed, remedy)
    return [
        [of_set[piece][begin : begin + size] for (piece, begin), size in zip(places, sizes, strict=True)]
        for of_set in memory
    ]


def _pack(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Pieces to allocate, and in which of them, and where, each block lies; all of it in bytes.

    Pinned memory comes in powers of two. Blocks one after the other in pieces of such sizes, the largest that is not
    more than what is left, waste less than one block per piece.
    """
    left, room, begin = sum(sizes), 0, 0
    pieces: list[int] = []
    places: list[tuple[int, int]] = []
    for size in sizes:
        if size > room - begin:
            room = max(min(_floor(left), _LARGEST_PIECE_BYTES), _ceiling(size))
            pieces.append(room)
            begin = 0
        places.append((len(pieces) - 1, begin))
        begin += size
        left -= size
    return pieces, places


def _floor(size: int) -> int:
    """The largest power of two that is not greater."""
    return 1 << max(size.bit_length() - 1, 0)


def _ceiling(size: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()


def _piece(num_bytes: int, *, pin: bool) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pin)
