"""Which snapshots of a finished history stay, what the averages lose by it, and both in words.

The choice is ``posthoc.retain``'s. Snapshots of one time hold the same averages, so one of them is enough, unless they
are pinned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema.cli.terminal import columns, paragraph, percent, segments
from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.posthoc import Retention, retain
from nitrous_ema.snapshots.snapshot import Snapshot

_OLD_STEPS = (
    "errors are those at the newest step and at pinned ones; at all other old steps short lengths are lost. "
    "--pin STEP keeps a step as a target."
)
_GUIDED = (0.015, 0.045)  # arXiv:2312.02696, Table 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneTarget:
    """How much is to stay: one of the first three."""

    keep: int | None = None
    """Snapshots."""
    budget_bytes: int | None = None
    """Bytes of all snapshots that stay."""
    error: float | None = None
    """Largest relative profile error in the range."""
    sigma_rels: tuple[float, float] | None = None
    """Shortest and longest length wanted; by default what the tracked profiles cover."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrunePlan:
    """A choice of snapshots."""

    wish: PruneTarget
    snapshots: tuple[Snapshot, ...]
    """The history, ascending by step."""
    pinned: frozenset[int]
    """Steps that stay in any case, beside the newest."""
    kept: frozenset[int]
    """Steps that stay."""
    retention: Retention
    """What the averages lose; its places are those of different times."""

    @property
    def dropped(self) -> list[Snapshot]:
        """Snapshots that go, ascending."""
        return [each for each in self.snapshots if each.step not in self.kept]

    @property
    def targets(self) -> list[int]:
        """Steps whose errors are told: the pinned ones, one of each time, then the newest."""
        by_time = {each.t: each.step for each in self.snapshots if each.step in self.pinned}
        by_time[self.snapshots[-1].t] = self.snapshots[-1].step
        return [by_time[t] for t in sorted(by_time)]

    def described(self) -> dict[str, Any]:
        """All of it in plain values: what ``--json`` gives, and what ``lines`` puts into words."""
        found, wish, dropped = self.retention, self.wish, self.dropped
        wanted = found.sigma_rels[found.in_range]
        before = sum(each.bytes for each in self.snapshots)
        return {
            "keep": wish.keep,
            "budget_bytes": wish.budget_bytes,
            "error": wish.error,
            "sigma_rels": [float(wanted.min()), float(wanted.max())],
            "steps": [each.step for each in self.snapshots],
            "kept": sorted(self.kept),
            "dropped": [each.step for each in dropped],
            "pinned": sorted(self.pinned),
            "bytes_before": before,
            "bytes_after": before - sum(each.bytes for each in dropped),
            "lower_bound": {"of": "worst error" if wish.error is None else "steps", "value": found.lower_bound},
            "targets": [self._described_target(row, step) for row, step in enumerate(self.targets)],
            "warnings": list(found.warnings),
        }

    def _described_target(self, row: int, step: int) -> dict[str, Any]:
        """Errors of averages that end at one step; ``row`` is its place among the retention's targets."""
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


def plan_pruning(snapshots: Sequence[Snapshot], pinned: Collection[int], wish: PruneTarget) -> PrunePlan:
    """Choose what stays. Changes nothing.

    Args:
        snapshots: Of one history, ascending by step, at least one.
        pinned: Steps of theirs that stay in any case, and as targets with all that they need.
        wish: How much stays.

    Raises:
        ValueError: A number out of range, or less room than for the newest and the pinned steps.
        SnapshotMismatch: The snapshots have different profiles.
    """
    _check_profiles(snapshots)
    asked, fixed = frozenset(pinned), {*pinned, snapshots[-1].step}
    times_asked = {each.t for each in snapshots if each.step in asked}
    by_time: dict[float, Snapshot] = {}
    for each in snapshots:
        if each.t not in by_time or by_time[each.t].step not in asked:
            by_time[each.t] = each
    candidates = sorted(by_time.values(), key=lambda each: each.t)
    beside = fixed - {each.step for each in candidates}
    keep = _number(snapshots, wish, fixed)
    retention = retain(
        [each.t for each in candidates],
        snapshots[-1].layout.gammas,
        keep=None if keep is None else keep - len(beside),
        error=wish.error,
        sigma_rels=wish.sigma_rels,
        pinned=[place for place, each in enumerate(candidates) if each.t in times_asked],
    )
    kept = beside | {candidates[place].step for place in retention.kept.tolist()}
    return PrunePlan(wish=wish, snapshots=tuple(snapshots), pinned=asked, kept=frozenset(kept), retention=retention)


def _number(snapshots: Sequence[Snapshot], wish: PruneTarget, fixed: Collection[int]) -> int | None:
    """How many stay, by number or by bytes; None if an error decides."""
    if wish.error is not None:
        return None
    if wish.budget_bytes is None:
        number, budget = (len(snapshots) if wish.keep is None else wish.keep), None
    else:
        largest = max(each.bytes for each in snapshots)
        number, budget = wish.budget_bytes // largest, f"the budget of {wish.budget_bytes:,} bytes holds"
    if number < len(fixed):
        stay = "the newest stays" if len(fixed) == 1 else f"the newest and the {len(fixed) - 1} pinned ones stay"
        needed = sum(each.bytes for each in snapshots if each.step in fixed)
        raise ValueError(
            f"{budget or 'keep:'} {pluralize(number, 'snapshot')}, but {stay} in any case ({needed:,} bytes). "
            f"Give room for at least {len(fixed)}{', or unpin some' if len(fixed) > 1 else ''}."
        )
    return number


def _check_profiles(snapshots: Sequence[Snapshot]) -> None:
    last = snapshots[-1]
    for each in snapshots:
        if each.layout.gammas != last.layout.gammas:
            raise SnapshotMismatch(
                f"step {each.step} has the profiles {each.layout.sigma_rels}, step {last.step} has "
                f"{last.layout.sigma_rels}: what thinning costs is only known for the same ones. "
                f"Leave the former out with --exclude {each.step}, or prune its run with --run {each.run}.",
                path=each.paths[0].parent,
            )


# ---------------------------------------------------------------------------------------------------------------------
# In words


def lines(found: dict[str, Any]) -> list[str]:
    """What ``PrunePlan.tensor_entry`` says, for people."""
    steps, kept = found["steps"], frozenset(found["kept"])
    pinned = [f"pinned {each}" for each in found["pinned"]]
    told = [
        f"{len(kept)} of {pluralize(len(steps), 'step')} stay: {format_bytes(found['bytes_before'])} -> "
        f"{format_bytes(found['bytes_after'])}, {format_bytes(found['bytes_before'] - found['bytes_after'])} less."
    ]
    told += [_bound(found)] if found["dropped"] else []
    told += paragraph("stay:", f"{segments(steps, kept)}" + (f" ({', '.join(pinned)})" if pinned else ""))
    told += paragraph("go:", segments(steps, frozenset(found["dropped"])))
    told += ["", *_table(found), ""]
    for target in found["targets"][:-1]:
        before, after = percent(target["worst_before"]), percent(target["worst_after"])
        told.append(f"at step {target['step']}, which is pinned, the worst in the range: {before} -> {after}")
    for warning in found["warnings"]:
        told += paragraph("warning:", warning)
    if found["dropped"]:
        told += paragraph("note:", _OLD_STEPS)
    return told


def _bound(found: dict[str, Any]) -> str:
    """What no other choice does better."""
    bound, worst = found["lower_bound"]["value"], max(target["worst_after"] for target in found["targets"])
    number = len(found["kept"])
    if found["lower_bound"]["of"] == "steps":
        allowed = f"the wanted lengths within {percent(found['error'])}"
        if any("Not even all" in warning for warning in found["warnings"]):
            allowed = "the wanted lengths as near to that as all steps do"
        best = ": none does it with fewer" if number <= bound else ""
        return f"No fewer than {pluralize(round(bound), 'step')} give {allowed}; these are {number}{best}."
    best = ": there is no better choice" if worst <= bound * (1 + 1e-6) else ""
    least = percent(bound, rounded_down=True)
    what = "a worst error in the wanted range"
    return f"No {number} of these steps have {what} below {least}; these have {percent(worst)}{best}."


def _table(found: dict[str, Any]) -> list[str]:
    """Errors at the newest step by length: everything outside the wanted range, round lengths and the worst inside."""
    lengths = found["targets"][-1]["lengths"]
    wanted = [each for each in lengths if each["wanted"]]
    shown = [max(wanted, key=lambda each: each["error_after"]), wanted[0], wanted[-1]]
    rows = [["sigma_rel", "all steps", f"{pluralize(len(found['kept']), 'step')}", ""]]
    for each in lengths:
        if each in shown or not each["wanted"] or np.isclose(each["sigma_rel"], round(each["sigma_rel"], 3), rtol=1e-9):
            mark = "wanted" if each["wanted"] else ""
            mark += ", the worst of these" if each is shown[0] and len(wanted) > 1 else ""
            rows.append([f"{each['sigma_rel']:.3g}", percent(each["error_before"]), percent(each["error_after"]), mark])
    guided = [each for each in lengths if _GUIDED[0] <= each["sigma_rel"] <= _GUIDED[1]]
    before, after = (percent(max(each[when] for each in guided)) for when in ("error_before", "error_after"))
    return [
        "error of an average that ends at the newest step:",
        *columns(rows),
        f"  guided EDM2 models had their best at {_GUIDED[0]} to {_GUIDED[1]}; the worst there: {before} -> {after}",
    ]
