"""The plan of a pruning: which snapshots of a finished lineage to keep, what accuracy is lost, and both as text.

``posthoc.retain`` makes the choice, by training times. Several snapshots may have one training time: an EMA that is
frozen, or is written between two updates, has the same averages at several steps. One of these snapshots is enough,
so ``retain`` sees each time once. A pinned snapshot is kept even if another one has its time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema.cli.terminal import columns, paragraph, percent, step_ranges
from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.posthoc import Retention, retain
from nitrous_ema.snapshots.readable_snapshot import with_same_tensors
from nitrous_ema.snapshots.snapshot import Snapshot

_OLD_STEPS = (
    "errors apply to averages at the newest step and at pinned steps. At other old steps, short lengths are lost; "
    "--pin STEP keeps a step as a target."
)
_GUIDED = (0.015, 0.045)  # arXiv:2312.02696, Table 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneTarget:
    """How much to keep. Exactly one of the first three fields is set."""

    keep: int | None = None
    """Number of snapshots."""
    budget_bytes: int | None = None
    """Bytes of all kept snapshots."""
    error: float | None = None
    """Largest relative profile error in the wanted range."""
    sigma_rels: tuple[float, float] | None = None
    """Shortest and longest wanted length; by default the range that the tracked profiles cover."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrunePlan:
    """A choice of snapshots to keep."""

    target: PruneTarget
    snapshots: tuple[Snapshot, ...]
    """The lineage, ascending by step, without snapshots of other tensors than the newest."""
    pinned: frozenset[int]
    """Steps that are kept in any case, besides the newest."""
    kept: frozenset[int]
    """Steps to keep. Snapshots with values that are not finite are kept only where the finite ones do not suffice."""
    retention: Retention
    """Errors before and after. Its places count training times, not snapshots."""
    note: str | None = None
    """A note on snapshots that the plan leaves out."""

    @property
    def dropped(self) -> list[Snapshot]:
        """Snapshots to drop, ascending by step."""
        return [each for each in self.snapshots if each.step not in self.kept]

    @property
    def target_steps(self) -> list[int]:
        """Target steps, as rows of the retention's errors: pinned steps, one for each time, then the newest."""
        by_time = {each.t: each.step for each in self.snapshots if each.step in self.pinned}
        by_time[self.snapshots[-1].t] = self.snapshots[-1].step
        return [by_time[t] for t in sorted(by_time)]

    def described(self) -> dict[str, Any]:
        """Return the plan in values that JSON can hold, for ``--json`` and for ``lines``."""
        found, target, dropped = self.retention, self.target, self.dropped
        wanted = found.sigma_rels[found.in_range]
        before = sum(each.bytes for each in self.snapshots)
        return {
            "keep": target.keep,
            "budget_bytes": target.budget_bytes,
            "error": target.error,
            "sigma_rels": [float(wanted.min()), float(wanted.max())],
            "steps": [each.step for each in self.snapshots],
            "kept": sorted(self.kept),
            "dropped": [each.step for each in dropped],
            "pinned": sorted(self.pinned),
            "bytes_before": before,
            "bytes_after": before - sum(each.bytes for each in dropped),
            "nonfinite": [each.step for each in self.snapshots if not each.is_finite],
            "lower_bound": {"of": "worst error" if target.error is None else "steps", "value": found.lower_bound},
            "targets": [self._described_target(row, step) for row, step in enumerate(self.target_steps)],
            "warnings": [*found.warnings, *filter(None, (self.note,))],
        }

    def _described_target(self, row: int, step: int) -> dict[str, Any]:
        """Return the errors of averages at one target step, in values that JSON can hold.

        Args:
            row: The target's row in the retention's errors.
            step: The target step.
        """
        found = self.retention
        before, after = found.error_before[row], found.error_after[row]
        return {
            "step": step,
            "worst_before": float(before[found.in_range].max()),
            "worst_after": float(after[found.in_range].max()),
            "lengths": [
                {
                    "sigma_rel": float(sigma_rel),
                    "wanted": place in found.in_range,
                    "error_before": float(before[place]),
                    "error_after": float(after[place]),
                }
                for place, sigma_rel in enumerate(found.sigma_rels)
            ],
        }


def plan_pruning(snapshots: Sequence[Snapshot], pinned: Collection[int], target: PruneTarget) -> PrunePlan:
    """Choose the snapshots to keep. Changes nothing.

    Args:
        snapshots: Snapshots of one lineage, ascending by step, at least one.
        pinned: Their steps that are kept in any case, with the snapshots that they need as targets.
        target: How much to keep.

    Returns:
        The choice, with the errors before and after. It leaves out snapshots of other tensors than the newest: they are
        neither dropped nor counted.

    Raises:
        ValueError: A number is out of range, or too small for the newest and the pinned steps.
        SnapshotMismatch: The snapshots have different profiles.
    """
    snapshots, note = with_same_tensors(snapshots[-1], snapshots)
    pinned = {each.step for each in snapshots}.intersection(pinned)
    _check_profiles(snapshots)
    pinned_steps, fixed = frozenset(pinned), {*pinned, snapshots[-1].step}
    pinned_times = {each.t for each in snapshots if each.step in pinned_steps}
    # The last snapshot of a time is its candidate, so that the newest snapshot, which is kept anyway, is one. Finite
    # snapshots have priority, and pinned ones before them.
    by_time: dict[float, Snapshot] = {}
    for each in sorted(snapshots, key=lambda each: (each.is_finite or each.step in fixed, each.step)):
        if each.t not in by_time or by_time[each.t].step not in pinned_steps:
            by_time[each.t] = each
    candidates: Sequence[Snapshot] = sorted(by_time.values(), key=lambda each: each.t)
    # Kept snapshots that share their time with a candidate: they count, although retain() does not see them.
    beside = fixed - {each.step for each in candidates}
    keep = _count(snapshots, target, fixed)
    count = None if keep is None else keep - len(beside)
    candidates, retention = _choose(candidates, fixed, pinned_times, target, count)
    kept = beside | {candidates[place].step for place in retention.kept.tolist()}
    return PrunePlan(
        target=target,
        snapshots=tuple(snapshots),
        pinned=pinned_steps,
        kept=frozenset(kept),
        retention=retention,
        note=note,
    )


def _choose(
    candidates: Sequence[Snapshot],
    fixed: Collection[int],
    pinned_times: Collection[float],
    target: PruneTarget,
    count: int | None,
) -> tuple[Sequence[Snapshot], Retention]:
    """Return the candidates that were chosen from, and the choice.

    Snapshots with values that are not finite are candidates only if all finite ones do not suffice, which then stay.
    """

    def chosen(some: Sequence[Snapshot], required: Collection[int] = ()) -> Retention:
        return retain(
            [each.t for each in some],
            some[-1].layout.gammas,
            keep=count,
            error=target.error,
            sigma_rels=target.sigma_rels,
            pinned=[place for place, each in enumerate(some) if each.t in pinned_times],
            required=[place for place, each in enumerate(some) if each.step in required],
        )

    preferred = [each for each in candidates if each.is_finite or each.step in fixed]
    if len(preferred) == len(candidates):
        return candidates, chosen(candidates)
    if count is None or count <= len(preferred):
        found = chosen(preferred)
        if target.error is None or (found.error_before[:, found.in_range] <= target.error).all():
            return preferred, found
    return candidates, chosen(candidates, {each.step for each in preferred})


def _count(snapshots: Sequence[Snapshot], target: PruneTarget, fixed: Collection[int]) -> int | None:
    """Return how many snapshots to keep, by number or by bytes; None if an error decides."""
    if target.error is not None:
        return None
    if target.budget_bytes is None:
        count = len(snapshots) if target.keep is None else target.keep
        given = f"--keep {count}"
        remedy = f"Pass --keep {len(fixed)} or more"
    else:
        # By the largest snapshot, so that the budget holds whichever ones are chosen.
        largest = max(each.bytes for each in snapshots)
        count = target.budget_bytes // largest
        remedy = f"Pass --budget {len(fixed) * largest} or more"
        given = f"--budget {target.budget_bytes:,} bytes (space for {pluralize(count, 'snapshot')})"
    if count < len(fixed):
        pinned = f" and the {pluralize(len(fixed) - 1, 'pinned snapshot')}" if len(fixed) > 1 else ""
        needed = sum(each.bytes for each in snapshots if each.step in fixed)
        raise ValueError(
            f"{given} is too small: the newest snapshot{pinned} must be kept ({needed:,} bytes). "
            f"{remedy}{', or unpin snapshots' if len(fixed) > 1 else ''}."
        )
    return count


def _check_profiles(snapshots: Sequence[Snapshot]) -> None:
    last = snapshots[-1]
    for each in snapshots:
        if each.layout.gammas != last.layout.gammas:
            raise SnapshotMismatch(
                f"step {each.step} has the profiles {each.layout.sigma_rels}, but step {last.step} has "
                f"{last.layout.sigma_rels}: the cost of pruning is known only for snapshots with the same profiles. "
                f"Ignore the former with --exclude {each.step}, or prune its run with --run {each.run}.",
                path=each.paths[0].parent,
            )


# ---------------------------------------------------------------------------------------------------------------------
# As text


def lines(found: dict[str, Any], *, verbose: bool) -> list[str]:
    """Return what ``PrunePlan.described`` returns as lines of text; with the bound on the choice if ``verbose``."""
    steps, kept = found["steps"], frozenset(found["kept"])
    pinned = [f"pinned {each}" for each in found["pinned"]]
    text = [
        f"{len(kept)} of {pluralize(len(steps), 'snapshot')} kept: {format_bytes(found['bytes_before'])} -> "
        f"{format_bytes(found['bytes_after'])}, {format_bytes(found['bytes_before'] - found['bytes_after'])} less."
    ]
    text += [_bound(found)] if found["dropped"] and verbose else []
    text += paragraph("kept:", f"{step_ranges(steps, kept)}" + (f" ({', '.join(pinned)})" if pinned else ""))
    text += paragraph("dropped:", step_ranges(steps, frozenset(found["dropped"])))
    text += ["", *_table(found), ""]
    for target in found["targets"][:-1]:
        before, after = percent(target["worst_before"]), percent(target["worst_after"])
        text.append(f"largest error in the wanted range at step {target['step']}, which is pinned: {before} -> {after}")
    for warning in found["warnings"]:
        text += paragraph("warning:", warning)
    if found["dropped"]:
        text += paragraph("note:", _OLD_STEPS)
    if found["nonfinite"]:
        others = pluralize(len(found["nonfinite"]), "snapshot")
        text += paragraph("note:", f"{others} with values that are not finite: dropped before any finite one.")
    return text


def _bound(found: dict[str, Any]) -> str:
    """Return how close the choice is to the proven optimum."""
    bound, worst = found["lower_bound"]["value"], max(target["worst_after"] for target in found["targets"])
    count = len(found["kept"])
    if found["lower_bound"]["of"] == "steps":
        goal = f"of up to {percent(found['error'])}"
        if any(target["worst_before"] > found["error"] for target in found["targets"]):
            goal = "as close to the limit as all snapshots allow"
        optimal = ", which is the minimum" if count <= bound else ""
        least = pluralize(round(bound), "snapshot")
        return f"Errors in the wanted range {goal} need at least {least}; this choice has {count}{optimal}."
    optimal = ", which is the minimum" if worst <= bound * (1 + 1e-6) else ""
    least = percent(bound, rounded_down=True)
    return (
        f"No choice of {pluralize(count, 'snapshot')} has a largest error below {least} in the wanted range; this "
        f"choice has {percent(worst)}{optimal}."
    )


def _table(found: dict[str, Any]) -> list[str]:
    """Return errors at the newest step: lengths outside the wanted range, and round lengths and the worst inside."""
    lengths = found["targets"][-1]["lengths"]
    wanted = [each for each in lengths if each["wanted"]]
    worst = max(wanted, key=lambda each: each["error_after"])
    rows = [["sigma_rel", "all snapshots", pluralize(len(found["kept"]), "snapshot"), ""]]
    for each in lengths:
        # Of the many wanted lengths, only those with at most three decimals are printed.
        is_round = np.isclose(each["sigma_rel"], round(each["sigma_rel"], 3), rtol=1e-9)
        if each in (worst, wanted[0], wanted[-1]) or not each["wanted"] or is_round:
            mark = "wanted" if each["wanted"] else ""
            mark += ", largest error" if each is worst and len(wanted) > 1 else ""
            rows.append([f"{each['sigma_rel']:.3g}", percent(each["error_before"]), percent(each["error_after"]), mark])
    guided = [each for each in lengths if _GUIDED[0] <= each["sigma_rel"] <= _GUIDED[1]]
    before, after = (percent(max(each[when] for each in guided)) for when in ("error_before", "error_after"))
    return [
        "error of an average at the newest step:",
        *columns(rows),
        f"  largest error from {_GUIDED[0]} to {_GUIDED[1]}, where guided EDM2 models were best: {before} -> {after}",
    ]
