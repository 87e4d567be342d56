"""One averaging step over a group of averages: every profile moves towards the parameters, from one read of them.

A group is walked in *batches*: pieces of its flat memory small enough that the second profile finds the parameters in
cache (CPU), and large enough that launches do not count (accelerators). A batch is also the unit that waits for a
snapshot copy of the same range (``before_batch``), and bounds the scratch through which parameters go that cannot be
read directly, so that no full-size copy of them is ever made.

Through scratch go, in *runs* of neighbours, parameters of another type than the average (foreach lerp takes one type)
and, on the CPU, small ones: its foreach lerp is a loop over tensors, and one ``cat`` and one lerp per run of small
tensors take a sixth of the time (measured, 1000 tensors of 1000 elements).

The arithmetic of an element depends on nothing but its own average, its parameter and the weight: however the work is
cut, the bits are the same (``test_step.py``: ``test_batch_size_does_not_change_a_bit``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from nitrous_ema.arena import Group, memory_order

_BATCH_ELEMENTS_CPU = 1 << 20  # 2^18 takes 5 to 15 % longer, 2^16 20 %; larger ones nothing less
_BATCH_ELEMENTS_ACCELERATOR = 1 << 23
_SMALL_ELEMENTS_CPU = 1 << 14  # gathered with its neighbours; limits of 2^12 to 2^18 were equally fast


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A part of one tensor that lies in one batch."""

    tensor: int
    begin: int
    """First element, relative to the tensor."""
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Neighbouring pieces of a batch that are averaged as one range."""

    first: int
    """First piece."""
    last: int
    begin: int
    """First element, relative to the batch."""
    end: int
    is_direct: bool
    """Read where it is; otherwise through scratch."""
    is_small: bool
    """Of small tensors, which are gathered by one ``cat``."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    begin: int
    """First element, relative to the group."""
    end: int
    pieces: list[_Piece]
    runs: list[_Run]
    averages: list[list[Tensor]]
    """Per profile, one 1-d view per run."""


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """Where the parameters of one update are, as flat memory per batch and piece."""

    tensors: Sequence[Tensor]
    """The tensors themselves: kept until the update that reads them has run."""
    flat: list[list[Tensor | None]]
    """None where a tensor has another memory order than its average and must be permuted when it is read."""


class GroupStep:
    """The averaging step of one group.

    Args:
        group: Its buffers must not be replaced while this object is used.
        batch_elements: Elements of one profile per batch; by default chosen by device.
    """

    def __init__(self, group: Group, batch_elements: int | None = None) -> None:
        self._group = group
        on_cpu = group.device.type == "cpu"
        self._batch_elements = batch_elements or (_BATCH_ELEMENTS_CPU if on_cpu else _BATCH_ELEMENTS_ACCELERATOR)
        self._batches = self._cut()
        self._places: list[list[tuple[int, int, _Piece]]] = [[] for _ in group.tensors]
        for b, batch in enumerate(self._batches):
            for p, piece in enumerate(batch.pieces):
                self._places[piece.tensor].append((b, p, piece))
        self._scratch: Tensor | None = None  # allocated when a parameter of another type is first met
        self._resolved: list[tuple[int, tuple[int, ...]] | None] = [None] * len(group.tensors)
        self._flat: list[list[Tensor | None]] = [[None] * len(batch.pieces) for batch in self._batches]

    def sources(self, tensors: Sequence[Tensor]) -> Sources:
        """Flat views on the parameters of this group, made anew only for storages that were replaced.

        Args:
            tensors: One per tensor of the group, on its device, with the shape and type that was tracked.
        """
        places = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
        if places != self._resolved:
            flat = [list(batch) for batch in self._flat]  # work that is queued keeps reading the old lists
            for index, (place, before) in enumerate(zip(places, self._resolved, strict=True)):
                if place != before:
                    self._resolve(index, tensors[index], flat)
            self._flat, self._resolved = flat, [*places]
        return Sources(tensors, self._flat)

    def run(
        self, sources: Sources, weights: Sequence[float], before_batch: Callable[[int, int], None] | None = None
    ) -> None:
        """Move every average towards its parameter.

        Args:
            sources: What ``sources`` returned for this update.
            weights: Weight of the parameters per profile, in (0, 1]; at 1 they are copied.
            before_batch: Called with the first and last element (of the group) of each batch before it is written.
        """
        permuted: dict[int, Tensor] = {}
        for batch, flats in zip(self._batches, sources.flat, strict=True):
            if before_batch is not None:
                before_batch(batch.begin, batch.end)
            read = [
                flat if flat is not None else self._permuted(sources, piece, permuted)
                for flat, piece in zip(flats, batch.pieces, strict=True)
            ]
            read = [self._readable(run, read[run.first : run.last]) for run in batch.runs]
            for averages, weight in zip(batch.averages, weights, strict=True):
                if weight == 1.0:
                    torch._foreach_copy_(averages, read)
                else:
                    torch._foreach_lerp_(averages, read, weight)

    def _resolve(self, index: int, tensor: Tensor, flat: list[list[Tensor | None]]) -> None:
        like = self._group.tensors[index]
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        view = memory_order(tensor, like) if real.stride() == like.strides else None
        for b, p, piece in self._places[index]:
            flat[b][p] = None if view is None else view[piece.begin : piece.end]

    def _permuted(self, sources: Sources, piece: _Piece, done: dict[int, Tensor]) -> Tensor:
        if piece.tensor not in done:
            done.clear()  # one temporary at a time
            done[piece.tensor] = memory_order(sources.tensors[piece.tensor], self._group.tensors[piece.tensor])
        return done[piece.tensor][piece.begin : piece.end]

    def _readable(self, run: _Run, read: list[Tensor]) -> Tensor:
        """The parameters of a run as one range of the average's type."""
        if run.is_direct:
            return read[0]
        if self._scratch is None:
            size = max(batch.end - batch.begin for batch in self._batches)
            self._scratch = torch.empty(size, dtype=self._group.dtype, device=self._group.device)
        scratch = self._scratch[run.begin : run.end]
        if run.is_small and read[0].dtype == scratch.dtype:
            return torch.cat(read, out=scratch)
        if run.is_small:
            return scratch.copy_(torch.cat(read))  # cat into another type would cast element by element
        torch._foreach_copy_(list(torch.split(scratch, [tensor.numel() for tensor in read])), read)
        return scratch

    def _cut(self) -> list[_Batch]:
        size, numel = self._batch_elements, self._group.numel
        batches = [_Batch(begin, min(begin + size, numel), [], [], []) for begin in range(0, numel, size)]
        for index, tensor in enumerate(self._group.tensors):
            begin = tensor.begin
            while begin < tensor.end:
                batch = batches[begin // size]
                end = min(tensor.end, batch.end)
                batch.pieces.append(_Piece(index, begin - tensor.begin, end - tensor.begin))
                begin = end
        for batch in batches:
            batch.runs.extend(self._runs(batch.pieces))
            sizes = [run.end - run.begin for run in batch.runs]
            batch.averages.extend(list(torch.split(flat[batch.begin : batch.end], sizes)) for flat in self._group.flats)
        return batches

    def _runs(self, pieces: Sequence[_Piece]) -> list[_Run]:
        on_cpu = self._group.device.type == "cpu"

        def kind(numbered: tuple[int, _Piece]) -> tuple[bool, bool, torch.dtype, int]:
            """Neighbours of one kind are one run; what is read directly is a run of its own."""
            number, piece = numbered
            dtype = self._group.tensors[piece.tensor].tracked.dtype
            is_small = on_cpu and piece.end - piece.begin <= _SMALL_ELEMENTS_CPU
            real = torch.float32 if dtype.is_complex else dtype
            is_direct = not is_small and real == self._group.dtype
            return is_direct, is_small, dtype, number if is_direct else -1

        runs, begin = [], 0
        for (is_direct, is_small, _, _), numbered in groupby(enumerate(pieces), kind):
            members = list(numbered)
            end = begin + sum(piece.end - piece.begin for _, piece in members)
            runs.append(_Run(members[0][0], members[-1][0] + 1, begin, end, is_direct, is_small))
            begin = end
        return runs
