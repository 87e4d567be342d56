"""Averages back from a snapshot folder (``restore()``), and the word to whoever forgot to resume from it.

A file is read twice by the readers of synthesis: once to check every chunk, then to write what it holds.

R1  Nothing is touched before the snapshot was found to     test_snapshot_that_does_not_fit_is_refused_untouched
    fit, and all of it to be what was written.              test_damage_is_found_before_anything_is_touched
R2  If the second read fails, some averages have been       test_damage_between_the_reads_refuses_the_averages
    written: all are refused until something is loaded.
R3  Looking for other runs fails for nobody, and changes    test_folder_that_cannot_be_read_is_logged_only
    nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nitrous_ema._base.dtypes import AVERAGE_DTYPES
from nitrous_ema._base.torch_dtypes import TORCH_DTYPES
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.averaging.schedule import Schedule, Time
from nitrous_ema.errors import SnapshotMismatch, SnapshotNotFound
from nitrous_ema.snapshots.header import Stamp
from nitrous_ema.snapshots.layout import Layout, TensorRecord
from nitrous_ema.snapshots.readable_snapshot import StoredSnapshotView, stored_snapshot_view
from nitrous_ema.snapshots.reading import OpenFiles, Source
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore

_BUFFER_BYTES = 16 << 20  # a multiple of every element's size
_MOST_NAMED = 5

_log = logging.getLogger(__name__)


def restore(engine: AveragingEngine, snapshot: Snapshot) -> str | None:
    """Set averages, copied tensors, clock and lineage to those of a snapshot.

    Args:
        engine: Nothing may be queued or swapped (``prepare_loading``).
        snapshot: A committed one.

    Returns:
        What there is to warn of: that averages were rounded when they were stored.

    Raises:
        SnapshotMismatch: It has other profiles, or does not fit the model; names the first tensors that differ.
        SnapshotDamaged: A chunk's checksum is wrong. If only the second read found that, averages are refused.
    """
    view = stored_snapshot_view(snapshot)
    _check_profiles(engine, snapshot)
    _check_tensors(engine.flat_buffers.layout, snapshot)
    parts = list(_parts(engine.flat_buffers, view))
    with OpenFiles(part.source.path for part in parts) as files:
        for part in parts:
            part.check(files)
        try:
            for part in parts:
                part.write(files)
        except BaseException as error:  # also Ctrl-C: averages of two times are nobody's
            engine.fail("restore()", error)
            raise
    engine.schedule.load(_clock(snapshot.stamp, engine.schedule))
    engine.run_lineage.continue_from(snapshot.stamp.lineage, snapshot.step)
    engine.loaded()
    return _rounding_warning(snapshot)


def warn_about_other_runs(store: SnapshotStore, run: str) -> str | None:
    """What to tell whoever begins ``run`` in a folder where others have snapshots; None if there is nothing to tell."""
    try:
        newest = store.get()
    except SnapshotNotFound:
        return None
    except Exception:  # a damaged file or a failing disk: no reason to end a training that has just begun
        _log.warning("%s cannot be searched for runs to resume", store.root, exc_info=True)
        return None
    if newest.run == run:
        return None
    return (
        f"This run, {run}, begins anew in {store.root}, where run {newest.run} has snapshots up to step {newest.step}. "
        "To continue that one instead, call ema.load_state_dict(...) with your saved state, or ema.restore(), before "
        "the first update(). The two are kept apart: readers take the history of the newest run only (others with run=)"
        ", which is this one as soon as it has a snapshot."
    )


# ---- does it fit


def _check_profiles(engine: AveragingEngine, snapshot: Snapshot) -> None:
    found, expected = snapshot.layout, engine.flat_buffers.layout
    same = len(found.gammas) == len(expected.gammas) and all(
        abs(one - other) <= 1e-9 for one, other in zip(found.gammas, expected.gammas, strict=True)
    )
    if not same:
        raise SnapshotMismatch(
            f"{snapshot.paths[0]} holds the profiles sigma_rels={_listed(found.sigma_rels)} (gammas "
            f"{_listed(found.gammas)}) but this EMA tracks sigma_rels={_listed(expected.sigma_rels)} (gammas "
            f"{_listed(expected.gammas)}); nothing was changed. Construct it with the profiles of the snapshot.",
            path=snapshot.paths[0],
        )


def _check_tensors(layout: Layout, snapshot: Snapshot) -> None:
    """Tensors are compared by canonical name; those that are skipped on both sides, or not there, do not count."""
    found = {record.name: record for record in snapshot.layout.records}
    expected = {record.name: record for record in layout.records}
    differences = [
        f"{name!r}: {difference}"
        for name in dict.fromkeys([*expected, *found])
        if (difference := _difference(found.get(name), expected.get(name))) is not None
    ]
    if differences:
        more = len(differences) - _MOST_NAMED
        raise SnapshotMismatch(
            f"{snapshot.paths[0]} does not fit the model; nothing was changed. {'; '.join(differences[:_MOST_NAMED])}"
            f"{f'; and {more} more' if more > 0 else ''}. Restore with the architecture, and with the names to copy or "
            "to ignore, that the snapshot was taken with.",
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
    """Copied tensors are bytes of one type; an average may be widened, but never cast down or made complex."""
    if role == "copied":
        return found == expected
    return (found == "C64") == (expected == "C64") and not (found == "F64" and expected != "F64")


def _listed(numbers: tuple[float, ...]) -> str:
    return f"({', '.join(f'{number:.6g}' for number in numbers)})"


# ---- reading and writing


@dataclass(frozen=True, slots=True)
class _Move:
    """A range of one section that goes to one place; in the section's own elements."""

    begin: int
    end: int
    place: int


@dataclass(frozen=True, slots=True, eq=False)
class _Section:
    """One section of the file, and where it goes."""

    source: Source
    dtype: torch.dtype
    moves: list[_Move]
    fill: Callable[[int, Tensor], None]

    def check(self, files: OpenFiles) -> None:
        """Read all of it."""
        everything = _Move(0, self.source.num_bytes // self.dtype.itemsize, 0)
        for _ in self._pieces(files, [everything]):
            pass

    def write(self, files: OpenFiles) -> None:
        """Read all of it again, and put it where it belongs."""
        for place, piece in self._pieces(files, self.moves):
            self.fill(place, piece)

    def _pieces(self, files: OpenFiles, moves: list[_Move]) -> Iterator[tuple[int, Tensor]]:
        """(place, elements); the memory is used again for the next one."""
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


def _parts(flat_buffers: FlatBuffers, view: StoredSnapshotView) -> Iterator[_Section]:
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
    """In the file's order; neighbours there that are neighbours here make one."""
    moves: list[_Move] = []
    for name, (begin, end) in sorted(found.items(), key=lambda item: item[1]):
        place = places[name]
        if moves and moves[-1].end == begin and moves[-1].place + begin - moves[-1].begin == place:
            moves[-1] = _Move(moves[-1].begin, end, moves[-1].place)
        elif begin < end:
            moves.append(_Move(begin, end, place))
    return moves


# ---- what else a snapshot says


def _clock(stamp: Stamp, schedule: Schedule) -> dict[str, Time]:
    """What ``Schedule.load`` is given; how many updates were applied is not in the file, and matters to nothing.

    The time of the snapshot itself is not in the file either, only that of the last applied update. The exact
    correction brings averages up to now before a snapshot, so there they are one, unless averages are frozen; the
    others count calls, and so does the exact one at least where time is kept in whole numbers.
    """
    counts_calls = schedule.correction != "exact" or isinstance(stamp.t, int)
    now = max(stamp.t, stamp.step) if counts_calls else stamp.t
    return {"step": stamp.step, "now": now, "t": stamp.t, "t_first": stamp.t_first}


def _rounding_warning(snapshot: Snapshot) -> str | None:
    stored = snapshot.layout.checkpoint_dtype
    kept = "float64" if any(record.dtype == "F64" for record in snapshot.layout.averaged) else "float32"
    if stored == "F64" or (stored == "F32" and kept == "float32"):
        return None
    dtype = AVERAGE_DTYPES[stored]
    return (
        f"The averages of step {snapshot.step} were kept in {kept} but stored as {dtype.name} (checkpoint_dtype): they come "
        f"back rounded, by up to {dtype.half_unit:.1e} of each value, and training goes on from there. A state_dict() has all of "
        "their digits."
    )
