"""Restore averages, copied tensors, counters and lineage from a snapshot.

A restore must not leave averages of two steps behind, yet a snapshot may be larger than the memory that is free beside
the averages. The file is therefore read twice, in pieces, by the same readers as in synthesis: first to check every
chunk, then to write its contents into the averages.

RESTORE-1  Nothing is changed before the snapshot was found to   test_snapshot_that_does_not_fit_is_refused_untouched
    fit the model and every checksum was right.                  test_damage_is_found_before_anything_is_touched
RESTORE-2  If the second read fails, some averages have been     test_damage_between_the_reads_refuses_the_averages
    written: all are refused until something is loaded.
RESTORE-3  The search for other runs (``resumable_run.py``)      test_folder_that_cannot_be_read_is_logged_only
    never raises, and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nitrous_ema._base.dtypes import STORED_DTYPES
from nitrous_ema._base.torch_dtypes import TORCH_DTYPES
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.averaging.schedule import Schedule, Time
from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.snapshots.header import Stamp
from nitrous_ema.snapshots.layout import TensorRecord
from nitrous_ema.snapshots.nonfinite import nonfinite_text
from nitrous_ema.snapshots.readable_snapshot import SnapshotView, stored_snapshot_view
from nitrous_ema.snapshots.reading import OpenFiles, Source
from nitrous_ema.snapshots.snapshot import Snapshot

_BUFFER_BYTES = 16 << 20  # a multiple of every element's size
_MAX_NAMED = 5

_log = logging.getLogger(__name__)


def restore(engine: AveragingEngine, snapshot: Snapshot) -> Sequence[str]:
    """Set averages, copied tensors, counters and lineage to those of a snapshot.

    Args:
        engine: Its queued work is done and no averages are swapped into the model (``prepare_loading``).
        snapshot: A committed snapshot.

    Returns:
        Warnings: the averages were rounded when they were stored, or have values that are not finite.

    Raises:
        SnapshotMismatch: It has other profiles, or does not fit the model; names the first tensors that differ.
        SnapshotDamaged: A chunk's checksum is wrong. If only the second read finds the damage, averages are refused.
    """
    view = stored_snapshot_view(snapshot)
    _check_profiles(engine, snapshot)
    _check_tensors(engine.flat_buffers, snapshot)
    sections = list(_sections(engine.flat_buffers, view))
    with OpenFiles(section.source.path for section in sections) as files:
        for section in sections:
            section.check(files)
        engine.resize(resized_shapes(engine.flat_buffers, snapshot.records))
        try:
            for section in _sections(engine.flat_buffers, view):
                section.write(files)
        except BaseException as error:  # also Ctrl-C: some averages are restored and some are not
            engine.mark_invalid("restore()", error)
            raise
    engine.schedule.load(_counters(snapshot.stamp, engine.schedule))
    engine.continue_run(snapshot.stamp.lineage, snapshot.step)
    engine.mark_valid()
    return [*_rounding_warnings(snapshot), *_nonfinite_warnings(snapshot)]


# ---- whether the snapshot fits the model


def _check_profiles(engine: AveragingEngine, snapshot: Snapshot) -> None:
    found, expected = snapshot.layout, engine.flat_buffers.layout
    same = len(found.gammas) == len(expected.gammas) and all(
        abs(one - other) <= 1e-9 for one, other in zip(found.gammas, expected.gammas, strict=True)
    )
    if not same:
        raise SnapshotMismatch(
            f"{snapshot.paths[0]} holds the profiles sigma_rels={_listed(found.sigma_rels)} (gammas "
            f"{_listed(found.gammas)}) but this EMA tracks sigma_rels={_listed(expected.sigma_rels)} (gammas "
            f"{_listed(expected.gammas)}); nothing was changed. Construct the EMA with the profiles of the snapshot.",
            path=snapshot.paths[0],
        )


def resized_shapes(flat_buffers: FlatBuffers, records: Iterable[TensorRecord]) -> dict[str, torch.Size]:
    """Return the shapes in a snapshot of the tensors that may change their shape, where they have another one here."""
    found = {record.name: torch.Size(record.shape) for record in records if record.role == "copied"}
    resizable = [tensor for tensor in flat_buffers.copied if tensor.may_resize]
    return {each.name: found[each.name] for each in resizable if found.get(each.name, each.shape) != each.shape}


def _check_tensors(flat_buffers: FlatBuffers, snapshot: Snapshot) -> None:
    """Compare all tensors by canonical name. A tensor that one side skips may be skipped or absent on the other."""
    found = {record.name: record for record in snapshot.layout.records}
    resized = resized_shapes(flat_buffers, snapshot.records)
    expected = {
        record.name: replace(record, shape=tuple(resized.get(record.name, record.shape)))
        for record in flat_buffers.layout.records
    }
    differences = [
        f"{name!r}: {difference}"
        for name in dict.fromkeys([*expected, *found])
        if (difference := _difference(found.get(name), expected.get(name))) is not None
    ]
    if differences:
        more = len(differences) - _MAX_NAMED
        raise SnapshotMismatch(
            f"{snapshot.paths[0]} does not fit the model; nothing was changed. {'; '.join(differences[:_MAX_NAMED])}"
            f"{f'; and {more} more' if more > 0 else ''}. Restore with the architecture and the filters (ignore_names, "
            "...) that the snapshot was taken with.",
            path=snapshot.paths[0],
        )


def _difference(found: TensorRecord | None, expected: TensorRecord | None) -> str | None:
    found_role = "skipped" if found is None else found.role
    expected_role = "skipped" if expected is None else expected.role
    if found_role == expected_role == "skipped":
        return None
    if found is None:
        return "missing in the snapshot"
    if expected is None:
        return "unexpected, the model has no such tensor"
    if found_role != expected_role:
        return f"found {found_role}, expected {expected_role}"
    if found.shape != expected.shape:
        return f"found shape {found.shape}, expected {expected.shape}"
    if not _can_hold(found.dtype, expected.dtype, found_role):
        return f"found {found.dtype}, expected {expected.dtype}"
    return None


def _can_hold(found: str, expected: str, role: str) -> bool:
    """Return whether values of a file's type can be restored.

    A copied tensor is restored byte by byte, so its type must be the same. An average may be widened, but never cast
    down, and neither made complex nor real.
    """
    if role == "copied":
        return found == expected
    return (found == "C64") == (expected == "C64") and not (found == "F64" and expected != "F64")


def _listed(numbers: tuple[float, ...]) -> str:
    return f"({', '.join(f'{number:.6g}' for number in numbers)})"


# ---- reading and writing


@dataclass(frozen=True, slots=True)
class _Move:
    """A range of one section and its destination, counted in elements of the section's type."""

    begin: int
    end: int
    place: int


@dataclass(frozen=True, slots=True, eq=False)
class _Section:
    """One section of the file, and its destinations."""

    source: Source
    dtype: torch.dtype
    moves: list[_Move]
    fill: Callable[[int, Tensor], None]

    def check(self, files: OpenFiles) -> None:
        """Read the whole section, which checks its chunks."""
        everything = _Move(0, self.source.num_bytes // self.dtype.itemsize, 0)
        for _ in self._pieces(files, [everything]):
            pass

    def write(self, files: OpenFiles) -> None:
        """Read the section again, and write it to its destinations."""
        for place, piece in self._pieces(files, self.moves):
            self.fill(place, piece)

    def _pieces(self, files: OpenFiles, moves: list[_Move]) -> Iterator[tuple[int, Tensor]]:
        """Yield (place, elements) pairs. All elements share one buffer, so each pair is valid until the next."""
        item_bytes = self.dtype.itemsize
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(self.source.num_bytes, item_bytes))))
        reader, position = self.source.reader(files), 0
        for move in moves:
            if position < move.begin:  # padding
                reader.read_into(buffer[: (move.begin - position) * item_bytes])
            for begin in range(move.begin, move.end, len(buffer) // item_bytes):
                count = min(len(buffer) // item_bytes, move.end - begin)
                reader.read_into(buffer[: count * item_bytes])
                yield move.place + begin - move.begin, torch.frombuffer(buffer, dtype=self.dtype, count=count)
            position = move.end


def _sections(flat_buffers: FlatBuffers, view: SnapshotView) -> Iterator[_Section]:
    averaged = [record.name for record in view.records if record.role == "averaged"]
    found = dict(zip(averaged, view.average_spans, strict=True))
    places = zip(flat_buffers.layout.averaged, flat_buffers.layout.average_spans, strict=True)
    moves = _moves(found, {record.name: span.begin for record, span in places})
    for profile, source in enumerate(view.averages):
        yield _Section(source, TORCH_DTYPES[source.dtype], moves, partial(flat_buffers.fill, profile))
    if view.copied is not None:
        spans = flat_buffers.layout.copied_spans
        places = zip(flat_buffers.layout.copied, spans, strict=True)
        begins = {record.name: span.begin - spans[0].begin for record, span in places}
        yield _Section(view.copied, torch.uint8, _moves(view.copied_spans, begins), flat_buffers.fill_copied)


def _moves(found: Mapping[str, tuple[int, int]], places: Mapping[str, int]) -> list[_Move]:
    """Return the moves in the file's order; ranges that are adjacent in the file and here are merged into one."""
    moves: list[_Move] = []
    for name, (begin, end) in sorted(found.items(), key=lambda item: item[1]):
        place = places[name]
        if moves and moves[-1].end == begin and moves[-1].place + begin - moves[-1].begin == place:
            moves[-1] = _Move(moves[-1].begin, end, moves[-1].place)
        elif begin < end:
            moves.append(_Move(begin, end, place))
    return moves


# ---- counters and rounding


def _counters(stamp: Stamp, schedule: Schedule) -> dict[str, Time]:
    """Return the argument of ``Schedule.load``.

    The number of applied updates is not in the file, and nothing depends on it. The training time of the snapshot is
    not in the file either, only the time of the last applied update. With the exact correction the two are equal,
    because the averages are brought up to date before a snapshot, except for frozen averages. The other corrections
    count calls. With the exact correction and whole numbers as times, each call counts at least 1: ``now``
    is at least ``step``.
    """
    counts_calls = schedule.correction != "exact" or isinstance(stamp.t, int)
    now = max(stamp.t, stamp.step) if counts_calls else stamp.t
    return {"step": stamp.step, "now": now, "t": stamp.t, "t_first": stamp.t_first}


def _rounding_warnings(snapshot: Snapshot) -> list[str]:
    stored = snapshot.layout.checkpoint_dtype
    averaged_in = "float64" if any(record.dtype == "F64" for record in snapshot.layout.averaged) else "float32"
    if stored == "F64" or (stored == "F32" and averaged_in == "float32"):
        return []
    dtype = STORED_DTYPES[stored]
    return [
        f"The averages of step {snapshot.step} were {averaged_in} but are stored as {dtype.name} (checkpoint_dtype). "
        f"The restored averages are rounded by up to {dtype.half_unit:.1e} of each value, and training continues from "
        "them. A state_dict() has the exact averages."
    ]


def _nonfinite_warnings(snapshot: Snapshot) -> list[str]:
    if snapshot.is_finite:
        return []
    return [
        f"The restored averages of step {snapshot.step} have values that are not finite (inf or nan; "
        f"{nonfinite_text(snapshot)}), and no update makes them finite again. Restore a snapshot of an earlier step."
    ]
