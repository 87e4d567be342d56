"""Committed snapshots of our own format, as synthesis sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nitrous_ema.errors import SnapshotError, SnapshotMismatch
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.layout import Layout, TensorRecord
from nitrous_ema.snapshots.reading import FileSource, Source
from nitrous_ema.snapshots.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredSnapshotView:
    """A committed snapshot of our own format, as synthesis sees it."""

    step: int
    t: float
    t_first: float | None
    run: str
    lineage: Lineage
    path: Path
    records: Sequence[TensorRecord]
    average_spans: Sequence[tuple[int, int]]
    gammas: Sequence[float]
    averages: Sequence[Source]
    copied: Source | None
    copied_spans: Mapping[str, tuple[int, int]]


def stored_snapshot_view(snapshot: Snapshot) -> StoredSnapshotView:
    """Describe a committed snapshot to the planner.

    Raises:
        SnapshotError: It was written by several ranks, each its own part; that cannot be read yet.
    """
    if snapshot.stamp.world_size != 1:
        raise SnapshotError(
            f"{snapshot.paths[0].parent}: written by {snapshot.stamp.world_size} ranks, each its part of the model; "
            "this version synthesizes snapshots written by one rank only.",
            path=snapshot.paths[0].parent,
        )
    layout = snapshot.layout
    sources = _sources(snapshot)
    profiles = len(layout.gammas)
    return StoredSnapshotView(
        step=snapshot.step,
        t=snapshot.t,
        t_first=snapshot.stamp.t_first,
        run=snapshot.run,
        lineage=snapshot.stamp.lineage,
        path=snapshot.paths[0],
        records=layout.records,
        average_spans=layout.average_spans,
        gammas=layout.gammas,
        averages=sources[:profiles],
        copied=sources[profiles] if len(sources) > profiles else None,
        copied_spans=_copied_spans(layout),
    )


def _sources(snapshot: Snapshot) -> list[Source]:
    """One per section of the file: the profiles, then the copied tensors if there are any."""
    layout, checksums = snapshot.layout, snapshot.headers[0].crc32
    sources: list[Source] = []
    first_chunk = 0
    for section, (begin, end) in enumerate(layout.sections):
        num_chunks = -(-(end - begin) // layout.chunk_bytes)
        source = FileSource(
            path=snapshot.paths[0],
            begin=snapshot.data_begin + begin,
            num_bytes=end - begin,
            dtype=layout.checkpoint_dtype if section < len(layout.gammas) else "U8",
            chunk_bytes=layout.chunk_bytes,
            crc32=tuple(checksums[first_chunk : first_chunk + num_chunks]),
            first_chunk=first_chunk,
        )
        sources.append(source)
        first_chunk += num_chunks
    return sources


def _copied_spans(layout: Layout) -> dict[str, tuple[int, int]]:
    """Per copied tensor its bytes, counted from the start of their section."""
    section_begin = layout.sections[-1].begin
    return {
        record.name: (begin - section_begin, end - section_begin)
        for record, (begin, end) in zip(layout.copied, layout.copied_spans, strict=True)
    }


class SnapshotView(Protocol):
    """A snapshot, as far as synthesis needs to know it: the weights' averages at one time of training."""

    @property
    def step(self) -> int:
        """Number of update() calls."""

    @property
    def t(self) -> float:
        """Training time."""

    @property
    def t_first(self) -> float | None:
        """Training time of the run's first update; None where nobody wrote it down."""

    @property
    def run(self) -> str:
        """Id of the run that wrote it."""

    @property
    def lineage(self) -> Lineage:
        """That run's ancestors and itself."""

    @property
    def path(self) -> Path:
        """Its first file."""

    @property
    def records(self) -> Sequence[TensorRecord]:
        """The model's tensors, in file order."""

    @property
    def average_spans(self) -> Sequence[tuple[int, int]]:
        """Per averaged record its (begin, end) in a profile's flat space, in elements."""

    @property
    def gammas(self) -> Sequence[float]:
        """The tracked profiles."""

    @property
    def averages(self) -> Sequence[Source]:
        """One source per profile."""

    @property
    def copied(self) -> Source | None:
        """The copied tensors back to back, as bytes."""

    @property
    def copied_spans(self) -> Mapping[str, tuple[int, int]]:
        """Where each copied tensor lies in ``copied``, in bytes, by name."""


def check_same_tensors(target: SnapshotView, moments: Sequence[SnapshotView]) -> None:
    """Raise SnapshotMismatch for the first snapshot whose averaged tensors are not the target's, by name and shape."""
    expected = _tensors(target)
    checked: set[int] = {id(target.records)}
    for moment in moments:
        if id(moment.records) in checked:
            continue
        checked.add(id(moment.records))
        found = _tensors(moment)
        if found != expected:
            raise SnapshotMismatch(
                f"{moment.path} and {target.path} hold different tensors: {_first_difference(found, expected)}. "
                f"Leave step {moment.step} out (exclude), or take a target of the same architecture.",
                path=moment.path,
            )


def _tensors(moment: SnapshotView) -> list[tuple[str, tuple[int, ...], bool]]:
    """What must agree for averages to be added up: names and shapes in file order, and which are complex."""
    averaged = [record for record in moment.records if record.role == "averaged"]
    return [(record.name, record.shape, record.dtype == "C64") for record in averaged]


def _first_difference(
    found: list[tuple[str, tuple[int, ...], bool]], expected: list[tuple[str, tuple[int, ...], bool]]
) -> str:
    shapes = {name: shape for name, shape, _ in expected}
    for name, shape, _ in found:
        if name not in shapes:
            return f"{name!r} is averaged in the first only"
        if shapes[name] != shape:
            return f"{name!r} is {shape} in the first and {shapes[name]} in the second"
    missing = [name for name in shapes if name not in {name for name, _, _ in found}]
    return f"{missing[0]!r} is averaged in the second only" if missing else "their order or types differ"
