"""What to read, and with which weights, for the averages that are wanted."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from nitrous_ema._base.arguments import check_sequence
from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.posthoc import SynthesisReport, synthesis_report
from nitrous_ema.posthoc.coverage import condition
from nitrous_ema.profile import gamma_to_sigma_rel, sigma_rel_to_gamma
from nitrous_ema.snapshots.readable_snapshot import SnapshotView, check_same_tensors, stored_snapshot_view
from nitrous_ema.snapshots.reading import Source
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.snapshot_selection import DEFAULT_TOLERANCE, ColumnSelection, choose_columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """One profile of one snapshot, that is read."""

    step: int
    """Its snapshot's step."""
    t: float
    """Its snapshot's training time."""
    gamma: float
    """Exponent of its profile."""
    source: Source
    """Its numbers on disk."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """Averages to synthesize at one step, and the columns that give them."""

    target: SnapshotView
    """The snapshot at whose step the averages end; it gives the copied tensors."""
    sigma_rels: tuple[float, ...]
    """The averages' lengths, as fractions of the training time."""
    gammas: tuple[float, ...]
    """The same lengths as exponents."""
    columns: tuple[Column, ...]
    """What is read, ascending in time; columns that no output needs are left out."""
    weights: NDArray[np.float64]
    """Shape [columns, outputs]."""
    report: SynthesisReport
    """How close the averages come to what was asked, and how much they amplify the rounding of what is read."""
    steps: tuple[int, ...]
    """Steps of the snapshots that are read, ascending."""
    lower_bound: int
    """No fewer of the candidates give all averages within the tolerance; 1 where snapshots differ in their profiles."""
    candidates: int
    """Snapshots that were chosen from."""
    tolerance: float
    """What the squared error of each average may exceed that from all snapshots by, as its root."""
    profile_error_of_all: NDArray[np.float64]
    """Relative profile error of each output with all snapshots."""
    least_error_l2: NDArray[np.float64]
    """``weight_l2`` with the weights of least error: above the report's where tolerance was spent on rounding."""
    excluded: tuple[int, ...] = ()
    """Steps left out on request."""
    trainer: Mapping[str, str | int | float] = field(default_factory=dict)
    """The process that wrote the newest snapshot: ``host``, ``pid``, ``started`` (seconds since 1970)."""

    @property
    def elements(self) -> int:
        """Numbers in one average."""
        return self.target.average_spans[-1][1]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all columns and of the target's copied tensors."""
        copied = self.target.copied
        return sum(column.source.num_bytes for column in self.columns) + (copied.num_bytes if copied else 0)

    def condition(self) -> float:
        """How nearly the columns' profiles depend on each other; NaN for more than 1024 (``posthoc.coverage``)."""
        return condition([column.t for column in self.columns], [column.gamma for column in self.columns])

    def only(self, indices: Sequence[int]) -> Plan:
        """The same plan for some of its averages: what is read stays."""
        chosen = list(indices)
        per_output = {each.name: getattr(self.report, each.name) for each in fields(self.report)}
        per_output = {name: values[chosen] for name, values in per_output.items() if name != "warnings"}
        return replace(
            self,
            sigma_rels=tuple(self.sigma_rels[index] for index in chosen),
            gammas=tuple(self.gammas[index] for index in chosen),
            weights=np.ascontiguousarray(self.weights[:, chosen]),
            report=replace(self.report, **per_output),
            profile_error_of_all=self.profile_error_of_all[chosen],
            least_error_l2=self.least_error_l2[chosen],
        )


def plan_synthesis(
    snapshots: Sequence[SnapshotView],
    *,
    target: SnapshotView,
    gammas: Sequence[float] | None = None,
    sigma_rels: Sequence[float] | None = None,
    excluded: Collection[int] = (),
    tolerance: float = DEFAULT_TOLERANCE,
) -> Plan:
    """Choose the columns and solve for the weights of averages that end at the target's step.

    The snapshots up to the target's training time are candidates. Of these the fewest are read that give all averages
    together within the tolerance, with weights that sum to 1; columns that get weight 0 in every output (all but one,
    where the length wanted is itself tracked) are not read. What tolerance is left buys less rounding, where weights
    would amplify it (``choose_columns`` says how).

    Args:
        snapshots: Committed snapshots of one lineage, ascending in time; the target among them.
        target: The snapshot at whose step the averages end.
        gammas: Exponents of the averages wanted, or
        sigma_rels: their lengths as fractions of the training time, in (0, 12 ** -0.5). Exactly one of the two.
        excluded: Steps that were left out of ``snapshots`` on request, to be told with the result.
        tolerance: Relative profile error that may be added to that from all snapshots, >= 0; the two add as their
            squares do. 0 reads all snapshots.

    Raises:
        ValueError: Both or neither of gammas and sigma_rels, or one outside its domain; or a negative tolerance.
        TypeError: A single length, or text, where a sequence belongs.
        SnapshotMismatch: Two of the snapshots, that are needed together, hold different tensors.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Algorithm 3.
    """
    lengths = lengths_of(gammas, sigma_rels)
    if not target.average_spans:
        raise SnapshotMismatch(f"{target.path} holds no averaged tensor; there is nothing to sum.", path=target.path)
    candidates = [moment for moment in snapshots if moment.t <= target.t and moment.gammas]
    choice = choose_columns(
        [moment.t for moment in candidates],
        [moment.gammas for moment in candidates],
        target.t,
        [gamma for _, gamma in lengths],
        tolerance=tolerance,
    )
    chosen = [(candidates[place], profile) for place, profile in choice.places]
    check_same_tensors(target, [moment for moment, _ in chosen])
    return Plan(
        target=target,
        sigma_rels=tuple(sigma_rel for sigma_rel, _ in lengths),
        gammas=tuple(gamma for _, gamma in lengths),
        columns=tuple(_column(moment, profile) for moment, profile in chosen),
        weights=choice.weights,
        report=_report(choice, chosen, target, lengths),
        steps=tuple(dict.fromkeys(moment.step for moment, _ in chosen)),
        lower_bound=choice.selection.lower_bound,
        candidates=choice.selection.candidates,
        tolerance=float(tolerance),
        profile_error_of_all=choice.selection.profile_error_of_all,
        least_error_l2=choice.least_error_l2,
        excluded=tuple(sorted(excluded)),
    )


def plan_from_store(
    store: SnapshotStore | str | os.PathLike[str],
    *,
    gammas: Sequence[float] | None = None,
    sigma_rels: Sequence[float] | None = None,
    step: int | None = None,
    run: str | None = None,
    exclude: Collection[int] = (),
    tolerance: float = DEFAULT_TOLERANCE,
) -> Plan:
    """Plan the averages that end at a committed snapshot of a snapshot folder.

    Args:
        store: The folder, or a store opened on it.
        gammas: Exponents of the averages wanted, or
        sigma_rels: their lengths, as in plan_synthesis().
        step: The target: a step with a committed snapshot; by default the newest one.
        run: The run whose lineage is read; by default the newest.
        exclude: Steps to leave out, damaged ones for example.
        tolerance: As in plan_synthesis().

    Raises:
        ValueError, TypeError: As plan_synthesis(); also where the target step is excluded.
        SnapshotNotFound: There is no such snapshot or run; names the nearest steps.
        SnapshotDamaged: A snapshot that is not excluded has a wrong size or header.
        SnapshotMismatch: As plan_synthesis().
    """
    if step is not None and step in exclude:
        raise ValueError(f"step {step} is the target and is excluded; ask for another step, or do not exclude it.")
    lengths_of(gammas, sigma_rels)  # a wrong length is told before a folder of thousands of snapshots is listed
    if not isinstance(store, SnapshotStore):
        store = SnapshotStore(store)
    snapshots = store.snapshots(run, exclude=exclude)
    target = next((each for each in reversed(snapshots) if step in (None, each.step)), None)
    if target is None:
        store.get(step, run, exclude=exclude)  # raises, naming what there is; if not, it was committed a moment ago
        return plan_from_store(
            store, gammas=gammas, sigma_rels=sigma_rels, step=step, run=run, exclude=exclude, tolerance=tolerance
        )
    return plan_at(target, snapshots, gammas=gammas, sigma_rels=sigma_rels, excluded=exclude, tolerance=tolerance)


def plan_at(
    target: Snapshot,
    snapshots: Sequence[Snapshot],
    *,
    gammas: Sequence[float] | None = None,
    sigma_rels: Sequence[float] | None = None,
    excluded: Collection[int] = (),
    tolerance: float = DEFAULT_TOLERANCE,
) -> Plan:
    """Plan the averages that end at one of the snapshots of a listing.

    Args:
        target: The snapshot at whose step the averages end.
        snapshots: All of its history, ascending by step, as ``SnapshotStore.snapshots`` lists them.
        gammas: As in plan_synthesis(); so are all others, and what is raised.
        sigma_rels: Lengths.
        excluded: Steps that were left out of the listing.
        tolerance: Relative profile error that may be added.
    """
    plan = plan_synthesis(
        [stored_snapshot_view(snapshot) for snapshot in snapshots if snapshot.t <= target.t],
        target=stored_snapshot_view(target),
        gammas=gammas,
        sigma_rels=sigma_rels,
        excluded=excluded,
        tolerance=tolerance,
    )
    return replace(plan, trainer=snapshots[-1].stamp.trainer)


def lengths_of(gammas: Sequence[float] | None, sigma_rels: Sequence[float] | None) -> list[tuple[float, float]]:
    """(sigma_rel, gamma) of each average asked for; the given one of the two is kept to the bit."""
    lengths: list[tuple[float, float]] = []
    if (gammas is None) == (sigma_rels is None):
        raise ValueError("gammas and sigma_rels: exactly one of them says which averages are wanted.")
    for name, given in (("gammas", gammas), ("sigma_rels", sigma_rels)):
        if given is not None:
            check_sequence(name, given)
    if gammas is not None:
        lengths = [(float(gamma_to_sigma_rel(gamma)), float(gamma)) for gamma in gammas]
    elif sigma_rels is not None:
        lengths = [(float(sigma_rel), float(sigma_rel_to_gamma(sigma_rel))) for sigma_rel in sigma_rels]
    if not lengths:
        raise ValueError("no length is asked for; give at least one sigma_rel or gamma.")
    return lengths


def _report(
    choice: ColumnSelection,
    chosen: Sequence[tuple[SnapshotView, int]],
    target: SnapshotView,
    lengths: Sequence[tuple[float, float]],
) -> SynthesisReport:
    return synthesis_report(
        choice.t,
        choice.gamma,
        np.full(len(lengths), target.t, dtype=np.float64),
        np.array([gamma for _, gamma in lengths], dtype=np.float64),
        weights=choice.weights,
        checkpoint_dtype=_coarsest(chosen),
        t_first=target.t_first,
    )


def _column(moment: SnapshotView, profile: int) -> Column:
    return Column(step=moment.step, t=moment.t, gamma=moment.gammas[profile], source=moment.averages[profile])


def _coarsest(chosen: Sequence[tuple[SnapshotView, int]]) -> str:
    """The stored type with the largest rounding error among the chosen columns."""
    found = {moment.averages[profile].dtype for moment, profile in chosen}
    return next(code for code in ("BF16", "F16", "F32", "F64") if code in found)
