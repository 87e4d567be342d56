"""Snapshots of which each rank wrote a part, seen as the one file that a single process would have written.

Each rank's file has one box of every tensor. Equal boxes in several files are replicas, of which the lowest rank's
counts; the different boxes must make each tensor whole.

A listing reads the header of the first file only. The others are read when the averages are, and disagreement between
files is an error then: a snapshot whose ranks counted different training times must not be passed over in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.snapshots.boxes import Box, tiling, whole_box
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.header import Header, Lineage
from nitrous_ema.snapshots.layout import Layout, TensorRecord
from nitrous_ema.snapshots.names import exclusion_hint
from nitrous_ema.snapshots.nonfinite import NonFiniteAverage, nonfinite_averages
from nitrous_ema.snapshots.pieces import Part, Pieces, ShardedSource, pieces_of
from nitrous_ema.snapshots.reading import FileSource, OpenFiles, Source, file_sections
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.validation import FolderInspector

_COMPARED_BYTES = 1 << 20


class ShardedSnapshotView:
    """A committed snapshot of several ranks, as one process would have written it; see ``SnapshotView``.

    Args:
        snapshot: The snapshot, with the header of its first file.
        files: The file system.
    """

    def __init__(self, snapshot: Snapshot, *, files: FileSystem | None = None) -> None:
        layout = snapshot.layout.whole
        self._snapshot = snapshot
        self._files = files or FileSystem()
        self._layout = layout
        self.step = snapshot.step
        self.t: float = snapshot.t
        self.t_first: float | None = snapshot.stamp.t_first
        self.run = snapshot.run
        self.lineage: Lineage = snapshot.stamp.lineage
        self.path = snapshot.path
        self.records: Sequence[TensorRecord] = layout.records
        self.average_spans: Sequence[tuple[int, int]] = layout.average_spans
        self.gammas: Sequence[float] = layout.gammas
        self.copied_spans: Mapping[str, tuple[int, int]] = layout.copied_places

    @functools.cached_property
    def averages(self) -> Sequence[Source]:
        """One source per profile.

        Raises:
            SnapshotMismatch: The files contradict each other, or do not make every tensor whole.
            SnapshotUnreadable: The header of a file is wrong.
        """
        return list(map(self._source, range(len(self.gammas))))

    @functools.cached_property
    def copied(self) -> Source | None:
        """The copied tensors back to back; errors as for ``averages``."""
        return self._source(len(self.gammas)) if self._layout.copied else None

    @functools.cached_property
    def nonfinite(self) -> Sequence[NonFiniteAverage | None]:
        """Per profile: what the file of the lowest rank records that has values which are not finite, or None."""
        found = [nonfinite_averages(header) for header in self._headers]
        return [
            next((each for each in of_profile if each is not None), None) for of_profile in zip(*found, strict=True)
        ]

    @functools.cached_property
    def _headers(self) -> tuple[Header, ...]:
        inspector, first = FolderInspector(self._files), self._snapshot.headers[0]
        headers = (first, *(inspector.read_header(path) for path in self._snapshot.paths[1:]))
        for rank, other in enumerate(headers):
            for name, found, expected in (
                ("tensors, profiles or stored type", other.layout.sha256, first.layout.sha256),
                ("t", other.stamp.t, first.stamp.t),
                ("t_first", other.stamp.t_first, first.stamp.t_first),
                ("lineage", other.stamp.lineage, first.stamp.lineage),
            ):
                if found != expected:
                    raise self._mismatch(
                        f"the files of ranks 0 and {rank} differ in {name}: {brief(str(expected))} and "
                        f"{brief(str(found))}. All ranks must call update() equally often, with the same arguments"
                    )
        return headers

    @functools.cached_property
    def _pieces(self) -> tuple[Pieces, Pieces]:
        try:
            return _pieces(_Sharding(self._headers))
        except ValueError as error:
            raise self._mismatch(str(error)) from error

    @functools.cached_property
    def _sections(self) -> list[list[FileSource]]:
        return list(map(file_sections, self._snapshot.paths, self._headers))

    def _source(self, section: int) -> ShardedSource:
        is_average = section < len(self.gammas)
        begin, end = self._layout.sections[section]
        return ShardedSource(
            files=[sections[section] for sections in self._sections],
            pieces=self._pieces[0 if is_average else 1],
            num_bytes=end - begin,
            dtype=self._layout.checkpoint_dtype if is_average else "U8",
        )

    def _mismatch(self, what: str) -> SnapshotMismatch:
        folder = self.path.parent
        return SnapshotMismatch(f"{folder}: {what}. {exclusion_hint(self.step)}", path=folder, step=self.step)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file has its part of a tensor."""

    box: Box
    begin: int
    """Position in a section of an average, or in the section of copied tensors, in bytes."""
    num_bytes: int


class _Sharding:
    """The headers of a snapshot's files, equal to those of other snapshots whose ranks have the same parts."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self.layouts = [header.layout for header in headers]
        self.offsets = [header.stamp.offsets for header in headers]
        self._key = ([layout.header_json for layout in self.layouts], self.offsets)
        self._hash = hash((self.layouts[0].sha256, len(headers), tuple(self.offsets[-1] or ())))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sharding) and self._key == other._key


# All snapshots of a run are divided in the same way. Two, for a run that was resumed on another number of ranks.
@functools.lru_cache(maxsize=2)
def _pieces(sharding: _Sharding) -> tuple[Pieces, Pieces]:
    """Return the pieces of an average's section and of the section of copied tensors.

    Raises:
        ValueError: The parts of a tensor do not make it whole; names the tensor, the element and the files.
    """
    whole = sharding.layouts[0].whole
    places = list(map(_places, sharding.layouts, sharding.offsets))
    item_bytes = DTYPE_BYTES[whole.checkpoint_dtype]
    averaged = (
        (record, span.begin * item_bytes, item_bytes)
        for record, span in zip(whole.averaged, whole.average_spans, strict=True)
    )
    copied = (
        (record, begin, (end - begin) // max(1, record.stored_elements))
        for record, (begin, end) in zip(whole.copied, whole.copied_places.values(), strict=True)
    )

    def described(
        tensors: Iterator[tuple[TensorRecord, int, int]],
    ) -> Iterator[tuple[int, tuple[int, ...], int, list[Part]]]:
        for record, begin, item_bytes in tensors:
            found = [each[record.name] for each in places]
            try:
                used = tiling(record.stored_shape, [each.box for each in found])
            except ValueError as error:
                raise ValueError(
                    f"the {len(found)} files do not make {record.name!r} of shape {record.shape} whole: {error}; "
                    f"parts: {_parts_text([each.box for each in found])}"
                ) from error
            parts = [Part(found[file].box, file, found[file].begin) for file in used]
            yield begin, record.stored_shape, item_bytes, parts

    return pieces_of(list(described(averaged))), pieces_of(list(described(copied)))


def _places(layout: Layout, offsets: Sequence[tuple[int, ...]] | None) -> dict[str, _Place]:
    """Return where a file has its part of each tensor, by name."""
    remaining = iter(offsets or ())
    boxes: dict[str, Box] = {}
    for record in layout.records:
        # A complex number is a pair along a last dimension, which is never divided.
        tail = (0,) * (len(record.stored_shape) - len(record.shape))
        box = whole_box(record.stored_shape)
        boxes[record.name] = box if record.part is None else Box((*next(remaining), *tail), record.stored_shape)
    item_bytes = DTYPE_BYTES[layout.checkpoint_dtype]
    found = {
        record.name: _Place(boxes[record.name], begin * item_bytes, (end - begin) * item_bytes)
        for record, (begin, end) in zip(layout.averaged, layout.average_spans, strict=True)
    }
    for name, (begin, end) in layout.copied_places.items():
        found[name] = _Place(boxes[name], begin, end - begin)
    return found


def _parts_text(boxes: Sequence[Box]) -> str:
    some = [f"rank {rank} has {box.shape} from {box.offset}" for rank, box in enumerate(boxes[:4])]
    return ", ".join([*some, *(["..."] if len(boxes) > 4 else [])])


def compare_replicas(snapshot: Snapshot, files: FileSystem) -> Iterator[tuple[Path, str]]:
    """Yield where the files of a snapshot contradict each other: the path of one of them, and what was found.

    Tensors that several files hold whole, or the same part of, must be equal bit for bit.
    """
    view = ShardedSnapshotView(snapshot, files=files)
    try:
        yield from _differences(view, snapshot, files)
    except SnapshotMismatch as error:
        yield error.path, str(error)


def _differences(view: ShardedSnapshotView, snapshot: Snapshot, files: FileSystem) -> Iterator[tuple[Path, str]]:
    view.averages  # noqa: B018 - raises an error unless the parts make all tensors whole
    places = [_places(header.layout, header.stamp.offsets) for header in view._headers]
    with OpenFiles(snapshot.paths, files=files) as opened:
        for record in view.records:
            if record.role == "skipped":
                continue
            groups: dict[Box, list[int]] = {}
            for rank, of_rank in enumerate(places):
                if of_rank[record.name].num_bytes:
                    groups.setdefault(of_rank[record.name].box, []).append(rank)
            sections = range(len(view.gammas)) if record.role == "averaged" else [len(view.gammas)]
            for (first, *others), section in ((group, each) for group in groups.values() for each in sections):
                for rank in others:
                    pair = [(view._sections[each][section], places[each][record.name]) for each in (first, rank)]
                    if not _are_equal(opened, *pair):
                        what = f"profile {section}" if record.role == "averaged" else "the copied values"
                        yield (
                            snapshot.paths[rank],
                            f"{snapshot.paths[rank]}: {what} of {record.name!r} differ from those in the file of rank "
                            f"{first}, although both hold the same part. Ranks that hold replicas have trained "
                            "different weights: look for gradients that were not reduced over all of them.",
                        )
                        break


def _are_equal(files: OpenFiles, one: tuple[FileSource, _Place], other: tuple[FileSource, _Place]) -> bool:
    buffers = bytearray(_COMPARED_BYTES), bytearray(_COMPARED_BYTES)
    for begin in range(0, one[1].num_bytes, _COMPARED_BYTES):
        views = []
        for (source, place), buffer in zip((one, other), buffers, strict=True):
            piece = memoryview(buffer)[: place.num_bytes - begin]
            count = files.read_into(source.path, source.begin + place.begin + begin, piece)
            views.append(piece[:count])
        if views[0] != views[1]:
            return False
    return True
