"""Which lengths a folder's snapshots support, and how accurate requested lengths would be: for ``inspect``.

Everything is computed from the snapshots' times and profiles; no tensor data is read.
Longer than 300 lines because the values of ``--json`` and the text made from them belong on one page.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema._base.options import Steps
from nitrous_ema.cli.terminal import columns, paragraph, percent
from nitrous_ema.posthoc import select_mixed_steps
from nitrous_ema.posthoc.coverage import LONGEST, SHORTEST, Stretch, covered_lengths, gap_errors2
from nitrous_ema.posthoc.report import rounding_of
from nitrous_ema.profile import FloatArray, gamma_to_sigma_rel
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.snapshots.readable_snapshot import SnapshotView, with_same_tensors
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.plan import Plan, plan_at, plan_synthesis
from nitrous_ema.synthesis.requested_lengths import lengths_of

_LIMITS = (0.01, 0.05)
_ROUNDING = 1e-3  # of a weight: the limit above which the synthesis report warns
_ERROR_TO_EXPLAIN = 0.01
_GAP_TO_NAME = 0.3  # of the squared error
_WIDER = 1.5  # times the gaps beside it; for a narrower gap the spacing is named as the cause, not the gap
_SOLVES_ALONE = 20_000  # snapshots times lengths up to which each length is also solved alone: a few seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthRequest:
    """Averages whose errors are predicted. Their lengths are in ``sigma_rels`` or in ``gammas``."""

    sigma_rels: Sequence[float] | None = None
    """Lengths."""
    gammas: Sequence[float] | None = None
    """The same lengths as exponents."""
    steps: Steps | None = None
    """Target steps; None for the newest snapshot."""
    tolerance: float
    """Relative profile error that may be added to read fewer snapshots."""


def coverage(source: SnapshotStore | LegacyFolder, run: str | None, exclude: Collection[int]) -> dict[str, Any] | None:
    """Return the lengths that averages at the newest snapshot can have; None without a readable snapshot.

    Args:
        source: The folder.
        run: Last run of the lineage to read; None for the newest. An old folder has no runs.
        exclude: Steps to ignore.
    """
    listed: Sequence[Snapshot | SnapshotView]
    if isinstance(source, LegacyFolder):
        listed = source.snapshots(exclude=exclude)
    else:
        # examine() lists damaged snapshots apart, where snapshots() would raise.
        listed = [each for each in source.examine(run).snapshots if each.step not in exclude]
        listed = with_same_tensors(listed[-1], listed)[0] if listed else []
    if not listed:
        return None
    last, times, gammas = listed[-1], [each.t for each in listed], [_gammas(each) for each in listed]
    dtype = last.layout.checkpoint_dtype if isinstance(last, Snapshot) else last.averages[0].dtype
    t_i = np.repeat(times, [len(each) for each in gammas])
    largest_norm = _ROUNDING / rounding_of(dtype)
    limits = [(error, norm) for error in _LIMITS for norm in (math.inf, largest_norm)]
    found = covered_lengths(t_i, np.concatenate(gammas), last.t, limits=limits)
    return {
        "step": last.step,
        "snapshots": len(listed),
        "sigma_rels": [float(gamma_to_sigma_rel(gamma)) for gamma in gammas[-1]],
        "checkpoint_dtype": dtype,
        "rounding_limit": _ROUNDING,
        "within": [
            {"profile_error": error, "lengths": _plain(any_norm), "with_little_rounding": _plain(small_norm)}
            for error, any_norm, small_norm in zip(_LIMITS, found[::2], found[1::2], strict=True)
        ],
    }


def predictions(
    source: SnapshotStore | LegacyFolder, request: LengthRequest, run: str | None, exclude: Collection[int]
) -> list[dict[str, Any]]:
    """Return what a synthesis would read and how accurate it would be, one entry for each target step.

    Args:
        source: The folder.
        request: Lengths, target steps and tolerance.
        run: Last run of the lineage to read; None for the newest. An old folder has no runs.
        exclude: Steps to ignore.

    Raises:
        ValueError: A length or the tolerance is outside its domain.
        SnapshotNotFound: A target step has no snapshot.
    """
    # Raises for wrong lengths before the folder is read.
    lengths_of(request.gammas, request.sigma_rels, ("--gamma", "--sigma-rel"))
    plan_options: dict[str, Any] = {
        "sigma_rels": request.sigma_rels,
        "gammas": request.gammas,
        "tolerance": request.tolerance,
        "excluded": exclude,
    }
    if isinstance(source, LegacyFolder):
        views = source.snapshots(exclude=exclude)
        return [
            _described(plan_synthesis(views, target=target, **plan_options), views)
            for target in (source.get(step, exclude=exclude) for step in _target_steps(request, views))
        ]
    listed = source.snapshots(run, exclude=exclude)
    return [
        _described(plan_at(target, listed, **plan_options), listed)
        for target in (source.get(step, run, exclude=exclude) for step in _target_steps(request, listed))
    ]


def _target_steps(request: LengthRequest, listed: Sequence[Snapshot | SnapshotView]) -> Sequence[int | str | None]:
    return [each.step for each in listed] if request.steps == "all" else request.steps or [None]


def _gammas(snapshot: Snapshot | SnapshotView) -> Sequence[float]:
    return snapshot.layout.gammas if isinstance(snapshot, Snapshot) else snapshot.gammas


def _plain(stretches: Sequence[Stretch]) -> list[list[float]]:
    return [[each.shortest, each.longest, each.weight_l2] for each in stretches]


def _described(plan: Plan, listed: Sequence[Snapshot | SnapshotView]) -> dict[str, Any]:
    """Return a plan in values that JSON can hold.

    Args:
        plan: The plan for one target step.
        listed: The snapshots that it chose from, and others, ascending.
    """
    candidates = [each for each in listed if each.t <= plan.target.t and each.step not in plan.left_out]
    report, dtypes = plan.report, {column.source.dtype for column in plan.columns}
    per_length = zip(plan.sigma_rels, plan.gammas, _steps_alone(plan, candidates), strict=True)
    return {
        "step": plan.target.step,
        "run": plan.target.run,
        "tolerance": plan.tolerance,
        "excluded": list(plan.excluded),
        "candidates": plan.candidates,
        "steps_read": list(plan.steps),
        "lower_bound": plan.lower_bound,
        "columns": len(plan.columns),
        "bytes_to_read": plan.bytes_to_read,
        "stored_dtypes": sorted(dtypes),
        "condition": _finite(plan.condition()),
        "lengths": [
            {
                "sigma_rel": sigma_rel,
                "gamma": gamma,
                "profile_error": float(report.profile_error[place]),
                "profile_error_of_all": float(plan.profile_error_of_all[place]),
                "sigma_rel_obtained": _finite(float(report.sigma_rel[place])),
                "weight_l1": float(report.weight_l1[place]),
                "weight_l2": float(report.weight_l2[place]),
                "rounding": float(report.rounding[place]),
                "steps_alone": alone,
            }
            for place, (sigma_rel, gamma, alone) in enumerate(per_length)
        ],
        "warnings": list(report.warnings),
        "causes": _causes(plan, candidates),
    }


def _steps_alone(plan: Plan, candidates: Sequence[Snapshot | SnapshotView]) -> list[int | None]:
    """Return how many snapshots each length would need alone; None if there are too many to solve for."""
    if len(candidates) * len(plan.gammas) > _SOLVES_ALONE:
        return [None] * len(plan.gammas)
    times, gammas = [each.t for each in candidates], [_gammas(each) for each in candidates]
    return [
        int(select_mixed_steps(times, gammas, plan.target.t, [gamma], tolerance=plan.tolerance).places.size)
        for gamma in plan.gammas
    ]


def _finite(number: float) -> float | None:
    """Return None for numbers that JSON cannot hold."""
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------------------------------
# Why a length is inaccurate


def _causes(plan: Plan, candidates: Sequence[Snapshot | SnapshotView]) -> list[str]:
    """Return one sentence for each cause of profile errors above 1 %, with its lengths and a remedy."""
    gammas = tuple(_gammas(candidates[-1]))
    poor = [place for place, error in enumerate(plan.profile_error_of_all) if error > _ERROR_TO_EXPLAIN]
    # gap_errors2 needs every profile at every time.
    if not poor or any(tuple(_gammas(each)) != gammas for each in candidates):
        return []
    # Reversed: of snapshots with one training time, the first one names the time's step.
    by_time = {each.t: each.step for each in reversed(candidates)}
    times = sorted(by_time)
    errors2 = gap_errors2(times, gammas, plan.target.t, np.array(plan.gammas)[poor])
    shares = errors2 / errors2.sum(0)
    found = sorted(
        (_cause(shares[:, row], times, plan.sigma_rels[place], gammas), place, row) for row, place in enumerate(poor)
    )
    sentences = []
    for cause, group in groupby(found, key=lambda each: each[0]):
        members = list(group)
        lengths = ", ".join(f"{plan.sigma_rels[place]:.4g}" for _, place, _ in members)
        share = min(float(shares[cause[1], row]) for _, _, row in members) if cause[1] >= 0 else 0.0
        sentences.append(_sentence(cause, f"sigma_rel {lengths}", share, [by_time[t] for t in times], gammas))
    return sentences


_START, _GAP, _SHORTER, _LONGER, _FEW = range(5)


def _cause(shares: FloatArray, times: Sequence[float], sigma_rel: float, gammas: Sequence[float]) -> tuple[int, int]:
    """Return the kind of cause and the place of its gap, or -1 for kinds without a gap.

    Args:
        shares: Share of each gap in the squared error, shape [gaps]; gap 0 lies before the first snapshot.
        times: Training times of the snapshots, ascending.
        sigma_rel: The length.
        gammas: Exponents of the tracked profiles.
    """
    largest, widths = int(shares.argmax()), np.diff(times)
    tracked = [float(gamma_to_sigma_rel(gamma)) for gamma in gammas]
    if shares[largest] > _GAP_TO_NAME and largest == 0:
        return _START, largest
    if shares[largest] > _GAP_TO_NAME:
        beside = widths[[place for place in (largest - 2, largest) if 0 <= place < widths.size]]
        if beside.size and widths[largest - 1] > _WIDER * beside.max():
            return _GAP, largest
    if sigma_rel < min(tracked):
        return _SHORTER, -1
    return (_LONGER if sigma_rel > max(tracked) else _FEW), -1


def _sentence(cause: tuple[int, int], which: str, share: float, steps: Sequence[int], gammas: Sequence[float]) -> str:
    kind, gap = cause
    tracked = sorted(float(gamma_to_sigma_rel(gamma)) for gamma in gammas)
    existing = pluralize(len(steps), "snapshot")
    if kind == _START:
        return (
            f"{which}: at least {100 * share:.0f} % of the squared error comes from before the first snapshot (step "
            f"{steps[0]}). Take snapshots earlier in training: a few that are closer together than later ones are "
            "enough (keep=KeepGeometric). Or request shorter lengths."
        )
    if kind == _GAP:
        return (
            f"{which}: at least {100 * share:.0f} % of the squared error comes from the gap between steps "
            f"{steps[gap - 1]} and {steps[gap]}. Include a snapshot in between if one was excluded or can be restored. "
            "Otherwise request a length closer to a tracked one, or another target step."
        )
    if kind == _SHORTER:
        return (
            f"{which}: shorter than the shortest tracked length ({tracked[0]:.4g}), and {existing} are too far apart "
            "for it. Take snapshots more often, or track a shorter profile."
        )
    if kind == _LONGER:
        return (
            f"{which}: longer than the longest tracked length ({tracked[-1]:.4g}), and {existing} are too few for it. "
            "Take snapshots more often and from early on, or track a longer profile."
        )
    return f"{which}: {existing} are too few. Take snapshots more often, or track a profile closer to this length."


# ---------------------------------------------------------------------------------------------------------------------
# As text


def coverage_lines(found: dict[str, Any]) -> list[str]:
    """Return the result of ``coverage`` as lines of text."""
    profiles = ", ".join(f"{each:.4g}" for each in found["sigma_rels"])
    lines = [f"supported lengths at step {found['step']}, from {pluralize(found['snapshots'], 'snapshot')}:"]
    for each in found["within"]:
        lines += paragraph(f"  up to {100 * each['profile_error']:g} % profile error  ", _stretches(each["lengths"]))
        if _ends(each["lengths"]) != _ends(each["with_little_rounding"]):
            lines += paragraph(
                "                          ",
                f"{_stretches(each['with_little_rounding'])} with a {found['checkpoint_dtype']} rounding error of up "
                f"to {found['rounding_limit']:g} of a weight",
            )
    return [*lines, f"  tracked                   sigma_rel {profiles}"]


def _ends(stretches: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(each[0], each[1]) for each in stretches]


def _stretches(stretches: Sequence[Sequence[float]]) -> str:
    """Return ranges of lengths as text, rounded inwards: every printed length is supported."""
    words = []
    for shortest, longest, *_ in stretches:
        first, last = _rounded(shortest, math.ceil), _rounded(longest, math.floor)
        if first > last:  # the range is narrower than the rounding
            words.append(f"{math.sqrt(shortest * longest):.4g}")
            continue
        begin = f"{SHORTEST:g} or less" if shortest < 1.0001 * SHORTEST else f"{first:.3g}"
        words.append(f"{begin} to {'the maximum' if longest > 0.9999 * LONGEST else f'{last:.3g}'}")
    return f"sigma_rel {'; '.join(words)}" if words else "no length"


def _rounded(number: float, towards: Any) -> float:
    """Return a number rounded to three digits by ``math.ceil`` or ``math.floor``."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return float(towards(number / unit) * unit)


def prediction_lines(found: dict[str, Any], *, verbose: bool) -> list[str]:
    """Return one entry of ``predictions`` as lines of text; with condition number and bounds if ``verbose``."""
    together = f"{len(found['lengths'])} lengths together: " if len(found["lengths"]) > 1 else ""
    lines = [f"predicted errors at target step {found['step']}, tolerance {found['tolerance']:g}:"]
    lines += paragraph(
        " ",
        f"{together}synthesis reads {len(found['steps_read'])} of {pluralize(found['candidates'], 'snapshot')}"
        + (f" (at least {found['lower_bound']} needed)" if verbose else "")
        + f", {pluralize(found['columns'], 'stored average')}, {format_bytes(found['bytes_to_read'])}"
        + (f"; condition number {_number(found['condition'])}" if verbose else ""),
    )
    lines += columns([[*row, ""] for row in _prediction_rows(found, verbose=verbose)])
    for warning in found["warnings"]:
        lines += paragraph("warning:", warning)
    for cause in found["causes"]:
        lines += paragraph("cause:", cause)
    return lines


def _prediction_rows(found: dict[str, Any], *, verbose: bool) -> list[list[str]]:
    rounding = f"rounding ({'/'.join(found['stored_dtypes'])})"
    rows = [["sigma_rel", "gamma", "error", rounding]]
    if verbose:
        rows = [[*rows[0], "error with all", "amplification", "snapshots alone"]]
    for each in found["lengths"]:
        rows.append([f"{each['sigma_rel']:.4g}", f"{each['gamma']:.4g}", percent(each["profile_error"])])
        rows[-1].append(f"{each['rounding']:.1e}")
        if verbose:
            rows[-1] += [
                percent(each["profile_error_of_all"]),
                f"{each['weight_l2']:.3g}",
                _number(each["steps_alone"]),
            ]
    return rows


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
