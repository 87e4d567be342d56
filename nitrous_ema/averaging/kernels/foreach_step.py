"""One averaging step over a group of averages: every profile moves towards the parameters, which are read once.

A group is processed in *batches*: pieces of its flat memory. On the CPU a batch is small enough that the second profile
finds the parameters in cache; on accelerators it is large enough that the time of launches is negligible. A batch is
also the unit that waits for a snapshot copy of the same range. And it bounds the scratch for parameters that cannot be
read directly, so that no full-size copy of the parameters is ever made.

Two kinds of parameters are copied to scratch first, in *runs* of neighbours: those of another type than the average
(foreach lerp takes one type), and on the CPU small ones. The CPU's foreach lerp is a loop over tensors; one ``cat`` and
one lerp per run of small tensors take a sixth of its time (measured, 1000 tensors of 1000 elements).

On the CPU, all profiles move by one lerp per run where their buffers allow it. That halves the calls and reads the
parameters once (``test_foreach_step.py``: ``test_profiles_that_move_together_get_the_bits_of_a_lerp_each``).

The arithmetic of an element depends on its own average, its parameter and the weight only. The cut into batches and
runs changes no bit (``test_foreach_step.py``: ``test_batch_size_does_not_change_a_bit``).

Longer than 300 lines because the interface of a step stands with its implementation for every device.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from nitrous_ema.averaging.kernels.copied_step import aligned, copy_each, is_refused, on_device
from nitrous_ema.averaging.kernels.flat_buffers import Group, memory_order

_BATCH_ELEMENTS_CPU = 1 << 20  # 2^18 takes 5 to 15 % longer, 2^16 20 %; larger batches are not faster
_BATCH_ELEMENTS_ACCELERATOR = 1 << 23
_SMALL_ELEMENTS_CPU = 1 << 14  # gathered with its neighbours; limits of 2^12 to 2^18 were equally fast
_GATHERED_AT_LEAST = 4  # fewer neighbours are averaged one by one: a ``cat`` takes as long as two small lerps


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """The part of one tensor that lies in one batch."""

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
    """Whether the parameters are read in place; otherwise they are copied to scratch."""
    is_small: bool
    """Whether the run has small tensors, which one ``cat`` gathers."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    begin: int
    """First element, relative to the group."""
    end: int
    pieces: list[_Piece]
    runs: list[_Run]
    averages: list[list[Tensor]]
    """Per profile, one 1-d view per run."""
    together: list[Tensor]
    """One [profiles, elements] view per run; empty where the group has no such view."""


@dataclass(frozen=True, slots=True, eq=False)
class _ForeachStash:
    """Stashed parameters of a batch."""

    batch: int
    flat: list[Tensor]
    """One 1-d tensor per piece."""


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """The memory of the parameters that one update reads, per batch and piece."""

    tensors: Sequence[Tensor]
    """The tensors themselves: a reference that holds their memory until the update has run."""
    flat: list[list[Tensor | None]]
    """1-d views; None where a tensor has another memory order than its average, and is permuted when it is read."""


class AveragingStep(Protocol):
    """One averaging step of one group, in batches; see ``ForeachStep``."""

    @property
    def batches(self) -> Sequence[tuple[int, int]]:
        """First and last element of each batch, relative to the group, in order."""

    def sources(self, tensors: Sequence[Tensor]) -> Any:
        """Return the memory of the parameters that one update reads, and hold it.

        Args:
            tensors: One per tensor of the group, with the shape and type that was tracked. The same objects mean the
                same memory. The storage of a parameter may be replaced, so pass an alias of it.
        """

    def run(
        self,
        sources: Any,
        weights: Sequence[float],
        batches: Sequence[int] | None = None,
        allowed: Tensor | None = None,
    ) -> None:
        """Move averages towards parameters, on the current stream.

        Args:
            sources: What ``sources`` returned for this update.
            weights: Weight of the parameters per profile, in (0, 1]; at 1 they are copied.
            batches: Indices of the batches; None for all.
            allowed: Bool, on the group's device; where it is False, every bit of the averages stays. None: True.
        """

    def stash_bytes(self, batch: int) -> int:
        """Return the bytes of scratch that ``stash`` needs for a batch."""

    def stash(self, sources: Any, batch: int, scratch: Tensor) -> Any:
        """Copy the parameters of a batch, in their own types, on the current stream.

        Args:
            sources: What ``sources`` returned for this update.
            batch: Index of the batch.
            scratch: uint8, at least ``stash_bytes``, aligned to 16 bytes; on the group's device, or pinned host memory
                if the group is in host memory.
        """

    def run_stashed(self, stashed: Any, weights: Sequence[float], allowed: Tensor | None = None) -> None:
        """Move averages towards stashed parameters, with the same bits as ``run`` would give."""


class ForeachStep:
    """The averaging step of one group, by foreach calls on any device.

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
        self.batches = [(batch.begin, batch.end) for batch in self._batches]
        self._scratch: Tensor | None = None  # allocated when a parameter of another type is first met
        self._before: Tensor | None = None  # allocated when an update that may be skipped is first met
        self._resolved: list[Tensor | None] = [None] * len(group.tensors)
        self._flat: list[list[Tensor | None]] = [[None] * len(batch.pieces) for batch in self._batches]

    def sources(self, tensors: Sequence[Tensor]) -> Sources:
        """Return flat views of this group's parameters, made anew only for tensors that were replaced.

        Args:
            tensors: See ``AveragingStep``; on the group's device, or on any device if they are only stashed.
        """
        if not are_same(tensors, self._resolved):
            flat = [list(batch) for batch in self._flat]  # a copy: queued work still reads the old lists
            for index, (tensor, before) in enumerate(zip(tensors, self._resolved, strict=True)):
                if tensor is not before:
                    self._resolve(index, tensor, flat)
            self._flat, self._resolved = flat, [*tensors]
        return Sources(tensors, self._flat)

    def run(
        self,
        sources: Sources,
        weights: Sequence[float],
        batches: Sequence[int] | None = None,
        allowed: Tensor | None = None,
    ) -> None:
        """Move averages towards parameters; see ``AveragingStep``."""
        if is_refused(allowed):
            return
        permuted: dict[int, Tensor] = {}
        column = self._column(weights)
        for index in range(len(self._batches)) if batches is None else batches:
            self._average(self._batches[index], self._read(sources, index, permuted), weights, column, allowed)

    def stash_bytes(self, batch: int) -> int:
        """See ``AveragingStep``."""
        return sum(aligned(self._piece_bytes(piece)) for piece in self._batches[batch].pieces)

    def stash(self, sources: Sources, batch: int, scratch: Tensor) -> _ForeachStash:
        """Copy the parameters of a batch; see ``AveragingStep``."""
        views, begin = [], 0
        for piece in self._batches[batch].pieces:
            end = begin + self._piece_bytes(piece)
            views.append(scratch[begin:end].view(_real(self._group.tensors[piece.tensor].tracked.dtype)))
            begin += aligned(end - begin)
        for view, flat in zip(views, self._read(sources, batch, {}), strict=True):
            view.copy_(flat, non_blocking=True)
        return _ForeachStash(batch, views)

    def run_stashed(self, stashed: _ForeachStash, weights: Sequence[float], allowed: Tensor | None = None) -> None:
        """Move averages towards stashed parameters; see ``AveragingStep``."""
        if not is_refused(allowed):
            self._average(self._batches[stashed.batch], stashed.flat, weights, self._column(weights), allowed)

    def _read(self, sources: Sources, batch: int, permuted: dict[int, Tensor]) -> list[Tensor]:
        """Return the parameters of a batch as flat memory, in the order of the averages."""
        return [
            flat if flat is not None else self._permuted(sources, piece, permuted)
            for flat, piece in zip(sources.flat[batch], self._batches[batch].pieces, strict=True)
        ]

    def _column(self, weights: Sequence[float]) -> Tensor | None:
        """Return the weights for one lerp of all profiles; None where each profile needs a lerp of its own."""
        together = self._group.together
        # At weight 1 the parameters are copied. A lerp of weight 1 would make nan of averages that are nan or inf.
        if together is None or len(weights) == 1 or 1.0 in weights:
            return None
        return torch.tensor(weights, dtype=self._group.dtype, device="cpu")[:, None]

    def _average(
        self,
        batch: _Batch,
        flat: list[Tensor],
        weights: Sequence[float],
        column: Tensor | None,
        allowed: Tensor | None,
    ) -> None:
        read = [self._readable(run, flat[run.first : run.last]) for run in batch.runs]
        if column is not None:
            for together, parameters in zip(batch.together, read, strict=True):
                together.lerp_(parameters, column)
            return
        selected = on_device(allowed)
        for flat_average, averages, weight in zip(self._group.flats, batch.averages, weights, strict=True):
            present = flat_average[batch.begin : batch.end]
            before = present if selected is None else self._copied(present)
            if weight == 1.0:
                torch._foreach_copy_(averages, read)
            else:
                torch._foreach_lerp_(averages, read, weight)
            if selected is not None:
                # Selected, because a weight of 0 would make NaN of parameters that are not finite.
                torch.where(selected, present, before, out=present)

    def _copied(self, present: Tensor) -> Tensor:
        if self._before is None:
            self._before = torch.empty(
                max(batch.end - batch.begin for batch in self._batches), dtype=present.dtype, device=present.device
            )
        return self._before[: present.numel()].copy_(present)

    def _piece_bytes(self, piece: _Piece) -> int:
        return (piece.end - piece.begin) * _real(self._group.tensors[piece.tensor].tracked.dtype).itemsize

    def _resolve(self, index: int, tensor: Tensor, flat: list[list[Tensor | None]]) -> None:
        like = self._group.tensors[index]
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        view = memory_order(tensor, like) if real.stride() == like.strides else None
        for b, p, piece in self._places[index]:
            flat[b][p] = None if view is None else view[piece.begin : piece.end]

    def _permuted(self, sources: Sources, piece: _Piece, done: dict[int, Tensor]) -> Tensor:
        if piece.tensor not in done:
            done.clear()  # at most one permuted copy exists at a time
            done[piece.tensor] = memory_order(sources.tensors[piece.tensor], self._group.tensors[piece.tensor])
        return done[piece.tensor][piece.begin : piece.end]

    def _readable(self, run: _Run, read: list[Tensor]) -> Tensor:
        """Return the parameters of a run as one range of the average's type."""
        if run.is_direct:
            return read[0]
        if self._scratch is None:
            size = max(batch.end - batch.begin for batch in self._batches)
            self._scratch = torch.empty(size, dtype=self._group.dtype, device=self._group.device)
        scratch = self._scratch[run.begin : run.end]
        if run.is_small and read[0].dtype == scratch.dtype:
            return torch.cat(read, out=scratch)
        if run.is_small:
            return scratch.copy_(torch.cat(read))  # cat(out=) into another type casts element by element
        copy_each(torch.split(scratch, [tensor.numel() for tensor in read]), read)
        return scratch

    def _cut(self) -> list[_Batch]:
        size, numel = self._batch_elements, self._group.numel
        batches = [_Batch(begin, min(begin + size, numel), [], [], [], []) for begin in range(0, numel, size)]
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
            if self._group.together is not None:
                batch.together.extend(torch.split(self._group.together[:, batch.begin : batch.end], sizes, dim=1))
        return batches

    def _runs(self, pieces: Sequence[_Piece]) -> list[_Run]:
        on_cpu = self._group.device.type == "cpu"

        def kind(numbered: tuple[int, _Piece]) -> tuple[bool, bool, torch.dtype, int]:
            """Return the key that groups neighbours into a run; a tensor that is read in place is its own run."""
            number, piece = numbered
            dtype = self._group.tensors[piece.tensor].tracked.dtype
            is_small = on_cpu and piece.end - piece.begin <= _SMALL_ELEMENTS_CPU
            is_direct = not is_small and _real(dtype) == self._group.dtype
            return is_direct, is_small, dtype, number if is_direct else -1

        runs, begin = [], 0
        for (is_direct, is_small, dtype, _), numbered in groupby(enumerate(pieces), kind):
            members = list(numbered)
            is_alone = is_small and len(members) < _GATHERED_AT_LEAST and _real(dtype) == self._group.dtype
            for part in [[member] for member in members] if is_alone else [members]:
                end = begin + sum(piece.end - piece.begin for _, piece in part)
                runs.append(
                    _Run(part[0][0], part[-1][0] + 1, begin, end, is_direct or is_alone, is_small and not is_alone)
                )
                begin = end
        return runs


def are_same(tensors: Sequence[Tensor], others: Sequence[Tensor | None]) -> bool:
    """Return whether the tensors are the very same objects, in the same order."""
    return len(tensors) == len(others) and all(map(operator.is_, tensors, others))


def _real(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a tensor's elements as they are averaged: complex numbers are pairs of float32."""
    return torch.float32 if dtype.is_complex else dtype
