"""Plan a synthesis: which columns to read, and with which weights, for the requested averages.

A *column* is one profile of one snapshot, as large as the model. An average is a weighted sum of columns, and its
profile is the same weighted sum of their profiles. So a plan can be computed from the headers of the snapshots alone.
``snapshot_selection`` chooses the snapshots and solves for the weights; ``streaming`` reads the columns.

Longer than 300 lines: the plan stands with the functions that make it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from nitrous_ema._base.arguments import check_not_excluded, choose_step, nearest_note
from nitrous_ema._base.dtypes import STORED_DTYPES
from nitrous_ema.errors import SnapshotMismatch, warn
from nitrous_ema.posthoc import SynthesisReport, synthesis_report
from nitrous_ema.posthoc.coverage import condition
from nitrous_ema.snapshots.nonfinite import NonFiniteAverage
from nitrous_ema.snapshots.readable_snapshot import (
    SnapshotView,
    StoredSnapshotView,
    stored_snapshot_view,
    with_same_tensors,
)
from nitrous_ema.snapshots.reading import Source
from nitrous_ema.snapshots.sharded import ShardedSnapshotView
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.requested_lengths import lengths_of
from nitrous_ema.synthesis.snapshot_selection import DEFAULT_TOLERANCE, ColumnSelection, choose_columns

_MOST_STEPS_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """One profile of one snapshot, which a plan reads."""

    step: int
    """Step of the snapshot."""
    t: float
    """Training time of the snapshot."""
    gamma: float
    """Exponent of the profile."""
    source: Source
    """The column's numbers on disk."""
    nonfinite: NonFiniteAverage | None = None
    """What the snapshot records of values that are not finite; None if all are finite or nothing is recorded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """Averages of one target step, and the weighted columns that they are sums of."""

    target: SnapshotView
    """The target snapshot: the averages end at its step, and its copied tensors go into every output."""
    sigma_rels: tuple[float, ...]
    """Length of each output, as a fraction of the training time."""
    gammas: tuple[float, ...]
    """The same lengths as exponents."""
    columns: tuple[Column, ...]
    """The columns to read, ascending in time; each has a weight that is not 0 in some output."""
    weights: NDArray[np.float64]
    """Weight of each column in each output, shape [columns, outputs]."""
    report: SynthesisReport
    """Profile error of each output, and its amplification of the rounding errors of the columns."""
    steps: tuple[int, ...]
    """Steps of the snapshots that are read, ascending."""
    lower_bound: int
    """Proven minimum: no smaller set of candidates gives all outputs within the tolerance. 1 where profiles differ."""
    candidates: int
    """Number of snapshots that the selection chose from."""
    tolerance: float
    """Relative profile error that may be added: an output's squared error exceeds that of all snapshots by at most its
    square."""
    profile_error_of_all: NDArray[np.float64]
    """Relative profile error of each output with all snapshots."""
    least_error_l2: NDArray[np.float64]
    """``weight_l2`` with the weights of least error: above the report's where tolerance was spent on rounding."""
    excluded: tuple[int, ...] = ()
    """Steps that were ignored on request, ascending."""
    left_out: tuple[int, ...] = ()
    """Steps that were ignored because they hold other tensors than the target, ascending."""
    trainer: Mapping[str, str | int | float] = field(default_factory=dict)
    """The process that wrote the newest snapshot: ``host``, ``pid``, ``started`` (seconds since 1970)."""

    @property
    def nonfinite_steps(self) -> tuple[int, ...]:
        """Steps of the columns with values that are not finite, ascending. All outputs have such values, too."""
        return tuple(dict.fromkeys(column.step for column in self.columns if column.nonfinite))

    @property
    def elements(self) -> int:
        """Numbers in the averaged tensors of one output."""
        return self.target.average_spans[-1][1]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all columns and of the target's copied tensors."""
        copied = self.target.copied
        return sum(column.source.num_bytes for column in self.columns) + (copied.num_bytes if copied else 0)

    def condition(self) -> float:
        """Return the condition number of the columns' profiles; NaN for more than 1024 columns (see ``coverage``)."""
        return condition([column.t for column in self.columns], [column.gamma for column in self.columns])

    def only(self, indices: Sequence[int]) -> Plan:
        """Return the same plan for some of its outputs.

        The columns and weights stay as they are. A new plan for these outputs alone might read other snapshots. Then
        the bits of an average would depend on the passes, and on the outputs that exist already.
        """
        chosen = list(indices)
        # Every field of the report has one value per output, but for the warnings, which are text.
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

    Candidates are the snapshots up to the target's training time that hold the same tensors; a warning of the report
    counts the others. The plan reads the fewest of them that give all averages together within the tolerance, with
    weights that sum to 1. It does not read columns whose weight is 0 in every output: for a tracked length all columns
    but one. The remaining tolerance is spent on smaller weights where the weights would amplify rounding errors (see
    ``choose_columns``).

    Args:
        snapshots: Committed snapshots of one lineage, ascending in time, including the target.
        target: The target snapshot: the averages end at its step.
        gammas: Requested lengths as exponents, or
        sigma_rels: as fractions of the training time, in (0, 12 ** -0.5). Exactly one of the two.
        excluded: Steps that were left out of ``snapshots`` on request; recorded in the plan.
        tolerance: Relative profile error that may be added to that with all snapshots, >= 0. The two errors add as
            their squares do. 0 reads all snapshots.

    Raises:
        ValueError: Both or neither of gammas and sigma_rels, or one outside its domain; or a negative tolerance.
        TypeError: A single length or text instead of a sequence.
        SnapshotMismatch: The target has no averaged tensors.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Algorithm 3.
    """
    lengths = lengths_of(gammas, sigma_rels)
    if not target.average_spans:
        raise SnapshotMismatch(f"{target.path}: the snapshot has no averaged tensors to synthesize.", path=target.path)
    # A snapshot after the target contains weights of later steps, which no average that ends at the target contains.
    candidates = [view for view in snapshots if view.t <= target.t and view.gammas]
    same, note, selection = _select(candidates, target, [gamma for _, gamma in lengths], tolerance)
    chosen = [(same[place], profile) for place, profile in selection.places]
    kept = set(map(id, same))
    columns = tuple(_column(view, profile) for view, profile in chosen)
    report = _report(selection, chosen, target, lengths)
    return Plan(
        target=target,
        sigma_rels=tuple(sigma_rel for sigma_rel, _ in lengths),
        gammas=tuple(gamma for _, gamma in lengths),
        columns=columns,
        weights=selection.weights,
        report=replace(report, warnings=(*_nonfinite_warnings(columns), *report.warnings, *filter(None, (note,)))),
        steps=tuple(dict.fromkeys(view.step for view, _ in chosen)),
        lower_bound=selection.steps.lower_bound,
        candidates=selection.steps.candidates,
        tolerance=float(tolerance),
        profile_error_of_all=selection.steps.profile_error_of_all,
        least_error_l2=selection.least_error_l2,
        excluded=tuple(sorted(excluded)),
        left_out=tuple(view.step for view in candidates if id(view) not in kept),
    )


def _select(
    candidates: list[SnapshotView], target: SnapshotView, gammas: Sequence[float], tolerance: float
) -> tuple[list[SnapshotView], str | None, ColumnSelection]:
    """Choose columns of the candidates with the target's tensors.

    Returns:
        These candidates; a note on the others, or None; the columns.
    """

    def choose(views: Sequence[SnapshotView]) -> ColumnSelection:
        return choose_columns(
            [view.t for view in views], [view.gammas for view in views], target.t, gammas, tolerance=tolerance
        )

    if isinstance(target, (StoredSnapshotView, ShardedSnapshotView)):
        same, note = with_same_tensors(target, candidates)
        return same, note, choose(same)
    # The tensors of a legacy snapshot are read from its files, and thousands of files take minutes. So the chosen ones
    # are compared first, and all of them only if one differs.
    selection = choose(candidates)
    if with_same_tensors(target, [candidates[place] for place, _ in selection.places])[1] is None:
        return candidates, None, selection
    same, note = with_same_tensors(target, candidates)
    return same, note, choose(same)


def plan_from_store(
    store: SnapshotStore | str | os.PathLike[str],
    *,
    gammas: Sequence[float] | None = None,
    sigma_rels: Sequence[float] | None = None,
    step: int | str | None = None,
    run: str | None = None,
    exclude: Collection[int] = (),
    tolerance: float = DEFAULT_TOLERANCE,
) -> Plan:
    """Plan the averages that end at a committed snapshot of a snapshot folder.

    Args:
        store: The folder, or a store opened on it.
        gammas: Requested lengths as exponents, or
        sigma_rels: as fractions of the training time; as in plan_synthesis().
        step: The target step, which must have a committed snapshot; by default the newest. ``"nearest:1234"`` is the
            step nearest to 1234; a warning names it.
        run: The run whose lineage is read; by default the newest.
        exclude: Steps of snapshots to ignore, for example damaged ones.
        tolerance: As in plan_synthesis().

    Raises:
        ValueError, TypeError: As plan_synthesis(); also if the target step is excluded.
        SnapshotNotFound: There is no such snapshot or run; the message names the nearest steps.
        SnapshotDamaged: A snapshot that is not excluded has a wrong size or header.
        SnapshotMismatch: As plan_synthesis().
    """
    check_not_excluded(step, exclude)
    lengths_of(gammas, sigma_rels)  # an invalid length is reported before thousands of snapshots are listed
    if not isinstance(store, SnapshotStore):
        store = SnapshotStore(store)
    snapshots = store.snapshots(run, exclude=exclude)
    chosen = choose_step(step, [each.step for each in snapshots])
    target = next((each for each in snapshots if each.step == chosen), None)
    if target is None:
        # get() raises with the nearest steps. If it does not raise, the snapshot was committed after the listing, so
        # the folder is listed again.
        store.get(step, run, exclude=exclude)
        return plan_from_store(
            store, gammas=gammas, sigma_rels=sigma_rels, step=step, run=run, exclude=exclude, tolerance=tolerance
        )
    if note := nearest_note(step, target.step):
        warn(note)
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
        target: The target snapshot.
        snapshots: Its whole history, ascending by step, as ``SnapshotStore.snapshots`` lists it; not empty.
        gammas: Requested lengths as exponents, or
        sigma_rels: as fractions of the training time.
        excluded: Steps that were left out of the listing.
        tolerance: Relative profile error that may be added.

    Raises:
        ValueError, TypeError, SnapshotMismatch: As plan_synthesis().
        SnapshotUnreadable: A file of a snapshot of several ranks has a wrong header.
    """
    plan = plan_synthesis(
        [stored_snapshot_view(snapshot) for snapshot in snapshots if snapshot.t <= target.t],
        target=stored_snapshot_view(target),
        gammas=gammas,
        sigma_rels=sigma_rels,
        excluded=excluded,
        tolerance=tolerance,
    )
    # The writer of the newest snapshot, not of the target, is the process that may still be training.
    return replace(plan, trainer=snapshots[-1].stamp.trainer)


def _report(
    selection: ColumnSelection,
    chosen: Sequence[tuple[SnapshotView, int]],
    target: SnapshotView,
    lengths: Sequence[tuple[float, float]],
) -> SynthesisReport:
    return synthesis_report(
        selection.t,
        selection.gamma,
        np.full(len(lengths), target.t, dtype=np.float64),
        np.array([gamma for _, gamma in lengths], dtype=np.float64),
        weights=selection.weights,
        # The report estimates rounding for one stored type. The coarsest gives an upper estimate for mixed types.
        checkpoint_dtype=_coarsest(chosen),
        t_first=target.t_first,
    )


def _column(view: SnapshotView, profile: int) -> Column:
    return Column(
        step=view.step,
        t=view.t,
        gamma=view.gammas[profile],
        source=view.averages[profile],
        nonfinite=view.nonfinite[profile],
    )


def _nonfinite_warnings(columns: Sequence[Column]) -> list[str]:
    """Return a warning if a column has values that are not finite: 0 times NaN is NaN, so every output has them too."""
    found = [column for column in columns if column.nonfinite is not None]
    if not found:
        return []
    steps = list(dict.fromkeys(column.step for column in found))
    more = f" and {len(steps) - _MOST_STEPS_NAMED} more" if len(steps) > _MOST_STEPS_NAMED else ""
    return [
        f"The synthesized averages have values that are not finite (inf or nan), because stored averages have them: at "
        f"step {', '.join(map(str, steps[:_MOST_STEPS_NAMED]))}{more} ({found[0].nonfinite}). Choose an earlier target "
        "step, or exclude these steps (exclude=, or --exclude on the command line)."
    ]


def _coarsest(chosen: Sequence[tuple[SnapshotView, int]]) -> str:
    """Return the stored type with the largest rounding error among the chosen columns."""
    found = {view.averages[profile].dtype for view, profile in chosen}
    return next(code for code in reversed(STORED_DTYPES) if code in found)
