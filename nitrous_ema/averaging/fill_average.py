"""Put a synthesized average into the buffers of a frozen engine, tensor by tensor, by name.

The snapshots may be those of an earlier process, whose model had other types and whose EMA had other filters. So a
tensor may have another place in the snapshots, another type, or another role: averaged there and copied here, or copied
there and averaged here. Ranges of equal role are written block by block as the synthesis makes them. Only tensors that
change their role or type are collected in memory first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nitrous_ema._base.torch_dtypes import TORCH_DTYPES
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.averaging.model.tracking import TrackedTensor
from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.snapshots.layout import Role, TensorRecord
from nitrous_ema.synthesis import Plan, stream, stream_copied

_MAX_NAMED = 5


def check_records(flat_buffers: FlatBuffers, records: tuple[TensorRecord, ...], path: Path) -> None:
    """Check that a snapshot has the tensors of the model. A tensor that one of the two skips may lack in the other.

    Args:
        flat_buffers: The buffers of the engine.
        records: The tensors of the snapshot.
        path: The snapshot.

    Raises:
        SnapshotMismatch: A tensor is missing, unexpected, of another shape or of another kind of numbers.
    """
    problems = list(_problems(flat_buffers, records))
    if problems:
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise SnapshotMismatch(
            f"{path} does not fit the model; {'; '.join(problems[:_MAX_NAMED])}{more}. Construct the EMA with the "
            "architecture that was trained, or with the checkpoint_folder of this model.",
            path=path,
        )


def _problems(flat_buffers: FlatBuffers, records: tuple[TensorRecord, ...]) -> Iterator[str]:
    by_key, skipped = _by_key(records), {key for each in records if each.role == "skipped" for key in each.keys}
    for tensor in (*flat_buffers.averaged, *flat_buffers.copied):
        record = by_key.get(tensor.name)
        if record is None:
            if tensor.persistent and tensor.name not in skipped:
                yield f"{tensor.name!r} is missing in the snapshot"
        elif record.shape != tuple(tensor.shape):
            yield f"{tensor.name!r} is {record.shape} in the snapshot and {tuple(tensor.shape)} in the model"
        elif _kind(TORCH_DTYPES[record.dtype]) != _kind(tensor.dtype):
            yield f"{tensor.name!r} is {record.dtype} in the snapshot and {tensor.dtype} in the model"
    in_model = {key for tensor in flat_buffers.tracked for key in tensor.keys}
    for record in records:
        if record.role != "skipped" and record.persistent and in_model.isdisjoint(record.keys):
            yield f"{record.name!r} is missing in the model"


def copy_missing(flat_buffers: FlatBuffers, records: tuple[TensorRecord, ...]) -> None:
    """Copy the online values of the tensors that a snapshot does not have: it skips them, or no state contains them."""
    by_key = _by_key(records)
    for tensor, value in (*flat_buffers.averages(0), *flat_buffers.copies()):
        if tensor.name not in by_key:
            value.copy_(tensor.live().detach())


def fill_average(flat_buffers: FlatBuffers, plan: Plan) -> None:
    """Synthesize the one average of a plan into the first profile, and copy the target's copied tensors.

    Args:
        flat_buffers: The buffers of a frozen engine, which the target fits (``check_records``).
        plan: The average.
    """
    values = {each.name: value for each, value in (*flat_buffers.averages(0), *flat_buffers.copies())}
    moves, by_key = _Moves(flat_buffers, plan), _by_key(tuple(plan.target.records))
    for tensor in (*flat_buffers.averaged, *flat_buffers.copied):
        if (record := by_key.get(tensor.name)) is not None:
            moves.add(tensor, record, values[tensor.name])
    stream(
        plan,
        lambda begin, block: _take(moves.averaged, begin, torch.from_numpy(block[0])),
        on_calling_thread=True,  # torch's current stream and its modes are thread-local
    )
    stream_copied(plan, lambda begin, piece: _take(moves.copied, begin, torch.frombuffer(piece, dtype=torch.uint8)))
    for finish in moves.collected:
        finish()


@dataclass(frozen=True, slots=True)
class _Move:
    """A range of a section of the snapshots, in elements or bytes, and the function that writes it."""

    begin: int
    end: int
    place: int
    """First argument of ``write`` for the beginning of the range."""
    write: Callable[[int, Tensor], object]


class _Moves:
    """The moves of all tensors, by the section of the snapshots that they read.

    Args:
        flat_buffers: The destination.
        plan: The average.
    """

    def __init__(self, flat_buffers: FlatBuffers, plan: Plan) -> None:
        layout, target = flat_buffers.layout, plan.target
        averaged = [record.name for record in target.records if record.role == "averaged"]
        self._sources = {**dict(zip(averaged, target.average_spans, strict=True)), **target.copied_spans}
        copied_begin = layout.copied_spans[0].begin if layout.copied else 0
        self._places = {each.name: span.begin for each, span in zip(layout.averaged, layout.average_spans, strict=True)}
        self._places |= {
            each.name: span.begin - copied_begin for each, span in zip(layout.copied, layout.copied_spans, strict=True)
        }
        self._fills: dict[Role, Callable[[int, Tensor], object]] = {
            "averaged": partial(flat_buffers.fill, 0),
            "copied": flat_buffers.fill_copied,
        }
        self.averaged: list[_Move] = []
        self.copied: list[_Move] = []
        self.collected: list[Callable[[], object]] = []
        """Called when everything was read: each writes one collected tensor."""

    def add(self, tensor: TrackedTensor, record: TensorRecord, value: Tensor) -> None:
        """Add a tensor.

        Args:
            tensor: The tensor here.
            record: The tensor in the snapshots.
            value: Its average or its copied value here.
        """
        moves = self.averaged if record.role == "averaged" else self.copied
        begin, end = self._sources[record.name]
        if record.role == tensor.role and (record.role == "averaged" or TORCH_DTYPES[record.dtype] == tensor.dtype):
            move = _Move(begin, end, self._places[tensor.name], self._fills[record.role])
            last = moves[-1] if moves else None
            # Neighbors in both become one move: one call for a whole block instead of one for each tensor.
            is_next = last is not None and last.write is move.write and last.end == begin
            if last and is_next and last.place + begin - last.begin == move.place:
                moves[-1] = replace(last, end=end)
            else:
                moves.append(move)
            return
        collected = torch.empty(end - begin, dtype=torch.float64 if record.role == "averaged" else torch.uint8)
        moves.append(_Move(begin, end, 0, lambda at, piece: collected[at : at + len(piece)].copy_(piece)))
        self.collected.append(lambda: value.copy_(_plain(collected, record)))


def _take(moves: list[_Move], begin: int, values: Tensor) -> None:
    """Write the parts of a block that begins at ``begin``."""
    end = begin + len(values)
    for move in moves:
        low, high = max(begin, move.begin), min(end, move.end)
        if low < high:
            move.write(move.place + low - move.begin, values[low - begin : high - begin])


def _plain(collected: Tensor, record: TensorRecord) -> Tensor:
    """Return the numbers of a collected tensor in its shape."""
    if record.role == "copied":
        return collected.view(TORCH_DTYPES[record.dtype]).view(record.shape)
    if record.dtype == "C64":
        return torch.view_as_complex(collected.view(*record.shape, 2))
    return collected.view(record.shape)


def _by_key(records: tuple[TensorRecord, ...]) -> dict[str, TensorRecord]:
    return {key: record for record in records if record.role != "skipped" for key in record.keys}


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex
