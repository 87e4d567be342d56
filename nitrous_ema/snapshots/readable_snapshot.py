"""Snapshots as synthesis reads them: tensors, profiles and flat sources, whatever the format on disk.

``SnapshotView`` is the interface: ``StoredSnapshotView`` implements it for snapshots of one rank,
``ShardedSnapshotView`` (in ``sharded``) for those of several ranks, and ``LegacySnapshot`` (in ``legacy.folder``) for
files of nitrous-ema 0.0.1 and ema-pytorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from nitrous_ema._base.arguments import pluralize
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.layout import TensorRecord
from nitrous_ema.snapshots.nonfinite import NonFiniteAverage, nonfinite_averages
from nitrous_ema.snapshots.reading import Source, file_sections
from nitrous_ema.snapshots.sharded import ShardedSnapshotView
from nitrous_ema.snapshots.snapshot import Snapshot

_Signature = list[tuple[str, tuple[int, ...], bool]]  # name, shape, and whether the tensor is complex


class SnapshotView(Protocol):
    """The averages of the weights at one training time, with everything that synthesis needs to sum them."""

    @property
    def step(self) -> int:
        """Number of update() calls."""

    @property
    def t(self) -> float:
        """Training time."""

    @property
    def t_first(self) -> float | None:
        """Training time of the run's first update; None where the files do not record it."""

    @property
    def run(self) -> str:
        """Id of the run that wrote the snapshot."""

    @property
    def lineage(self) -> Lineage:
        """Ancestors of this run, and the run itself."""

    @property
    def path(self) -> Path:
        """First file of the snapshot."""

    @property
    def records(self) -> Sequence[TensorRecord]:
        """The model's tensors, in file order."""

    @property
    def average_spans(self) -> Sequence[tuple[int, int]]:
        """For each averaged record: its (begin, end) in a profile's flat space, in elements."""

    @property
    def gammas(self) -> Sequence[float]:
        """Exponents of the tracked profiles."""

    @property
    def averages(self) -> Sequence[Source]:
        """One source per profile."""

    @property
    def nonfinite(self) -> Sequence[NonFiniteAverage | None]:
        """Per profile: what the snapshot records of values that are not finite, or None."""

    @property
    def copied(self) -> Source | None:
        """The copied tensors back to back, as bytes; None if the model has no copied tensors."""

    @property
    def copied_spans(self) -> Mapping[str, tuple[int, int]]:
        """For each copied tensor, by name: its (begin, end) in ``copied``, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredSnapshotView:
    """A committed snapshot of this version. Its fields are described in ``SnapshotView``."""

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
    nonfinite: Sequence[NonFiniteAverage | None]
    copied: Source | None
    copied_spans: Mapping[str, tuple[int, int]]


def stored_snapshot_view(snapshot: Snapshot) -> StoredSnapshotView | ShardedSnapshotView:
    """Return the view of a committed snapshot, whether one rank or several wrote it."""
    if snapshot.stamp.world_size != 1:
        return ShardedSnapshotView(snapshot)
    layout = snapshot.layout
    sources = file_sections(snapshot.path, snapshot.headers[0])
    profiles = len(layout.gammas)
    return StoredSnapshotView(
        step=snapshot.step,
        t=snapshot.t,
        t_first=snapshot.stamp.t_first,
        run=snapshot.run,
        lineage=snapshot.stamp.lineage,
        path=snapshot.path,
        records=layout.records,
        average_spans=layout.average_spans,
        gammas=layout.gammas,
        averages=sources[:profiles],
        nonfinite=nonfinite_averages(snapshot.headers[0]),
        copied=sources[profiles] if len(sources) > profiles else None,
        copied_spans=layout.copied_places,
    )


class _Listed(Protocol):
    @property
    def step(self) -> int: ...

    @property
    def records(self) -> Sequence[TensorRecord]: ...


_Snapshot = TypeVar("_Snapshot", bound=_Listed)


def with_same_tensors(target: _Listed, snapshots: Sequence[_Snapshot]) -> tuple[list[_Snapshot], str | None]:
    """Return the snapshots whose averaged tensors are the target's, and a note on the others, or None.

    Only averages of the same tensors can be summed. A run may have snapshots of other tensors, since training may go on
    with a longer vocabulary; averages at the target contain the earlier weights all the same, as far as they fit.
    """
    expected = _signature(target)
    # Snapshots of a run share one list of records (headers are decoded through a cache), which is compared once.
    difference: dict[int, str | None] = {id(target.records): None}
    for snapshot in snapshots:
        if id(snapshot.records) not in difference:
            found = _signature(snapshot)
            difference[id(snapshot.records)] = None if found == expected else _first_difference(found, expected)
    same = [snapshot for snapshot in snapshots if difference[id(snapshot.records)] is None]
    others = [snapshot for snapshot in snapshots if difference[id(snapshot.records)] is not None]
    if not others:
        return same, None
    last = others[-1]
    return same, (
        f"Left out {pluralize(len(others), 'snapshot')} with other tensors than step {target.step}. In the last one, "
        f"of step {last.step}, {difference[id(last.records)]}."
    )


def _signature(snapshot: _Listed) -> _Signature:
    """Return name, shape and complexity of each averaged tensor, in file order: only equal signatures can be summed."""
    averaged = [record for record in snapshot.records if record.role == "averaged"]
    return [(record.name, record.shape, record.dtype == "C64") for record in averaged]


def _first_difference(found: _Signature, expected: _Signature) -> str:
    shapes = {name: shape for name, shape, _ in expected}
    for name, shape, _ in found:
        if name not in shapes:
            return f"{name!r} is averaged as well"
        if shapes[name] != shape:
            return f"{name!r} is {shape} instead of {shapes[name]}"
    missing = [name for name in shapes if name not in {name for name, _, _ in found}]
    return f"{missing[0]!r} is not averaged" if missing else "the order or the types of the tensors differ"
