"""Committed snapshots of our own format, as synthesis sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nitrous_ema.errors import SnapshotError
from nitrous_ema.snapshots.format import Layout, Lineage, TensorRecord
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.synthesis.sources import FileSource, Source


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredMoment:
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


def stored_moment(snapshot: Snapshot) -> StoredMoment:
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
    return StoredMoment(
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
