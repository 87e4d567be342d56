"""Which lengths a folder's snapshots can give, and how well they give those that are asked for: for ``inspect``.

Everything is computed from the snapshots' times and profiles; no number of theirs is read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema.cli.terminal import columns, paragraph, percent
from nitrous_ema.posthoc import select_mixed_steps
from nitrous_ema.posthoc.coverage import LONGEST, SHORTEST, Stretch, covered_lengths, gap_errors2
from nitrous_ema.posthoc.report import rounding_of
from nitrous_ema.profile import FloatArray, gamma_to_sigma_rel
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.snapshots.readable_snapshot import SnapshotView
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.plan import Plan, lengths_of, plan_at, plan_synthesis

_LIMITS = (0.01, 0.05)
_ROUNDING = 1e-3  # of a weight: as the report warns of
_ERROR_TO_EXPLAIN = 0.01
_GAP_TO_NAME = 0.3  # of the squared error
_WIDER = 1.5  # than the gaps beside it; else it is not the gap but the spacing that is to blame
_SOLVES_ALONE = 20_000  # snapshots times lengths that are also looked at one by one: a few seconds


def covered(options: argparse.Namespace, store: SnapshotStore) -> dict[str, Any] | None:
    """The lengths that averages can have which end at the newest snapshot; None if there is none that can be read."""
    listed: Sequence[Snapshot | SnapshotView]
    if old_profiles_given(options):
        listed = _old_folder(options).snapshots(exclude=options.exclude)
    else:
        listed = [each for each in store.examine(options.run).snapshots if each.step not in options.exclude]
    if not listed:
        return None
    last, times, gammas = listed[-1], [each.t for each in listed], [_gammas(each) for each in listed]
    dtype = last.layout.checkpoint_dtype if isinstance(last, Snapshot) else last.averages[0].dtype
    t_i = np.repeat(times, [len(each) for each in gammas])
    quiet = _ROUNDING / rounding_of(dtype)
    limits = [(error, norm) for error in _LIMITS for norm in (math.inf, quiet)]
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


def asked(options: argparse.Namespace, store: SnapshotStore) -> list[dict[str, Any]]:
    """What a synthesis of the lengths asked for would read, and how good it would be: one entry for each step."""
    wanted = {"sigma_rels": options.sigma_rel, "gammas": options.gamma, "tolerance": options.tolerance}
    lengths_of(options.gamma, options.sigma_rel)
    if old_profiles_given(options):
        folder = _old_folder(options)
        moments = folder.snapshots(exclude=options.exclude)
        steps = [each.step for each in moments] if options.step == "all" else options.step or [None]
        return [
            _described(
                plan_synthesis(moments, target=target, excluded=options.exclude, **wanted),
                [each for each in moments if each.t <= target.t],
            )
            for target in (folder.get(step, exclude=options.exclude) for step in steps)
        ]
    listed = store.snapshots(options.run, exclude=options.exclude)
    steps = [each.step for each in listed] if options.step == "all" else options.step or [None]
    return [
        _described(
            plan_at(target, listed, excluded=options.exclude, **wanted), [each for each in listed if each.t <= target.t]
        )
        for target in (store.get(step, options.run, exclude=options.exclude) for step in steps)
    ]


def old_profiles_given(options: argparse.Namespace) -> bool:
    """Whether the folder is said to be one of nitrous-ema 0.0.1 or ema-pytorch."""
    return options.sigma_rels is not None or options.gammas is not None


def _old_folder(options: argparse.Namespace) -> LegacyFolder:
    return LegacyFolder(Path(options.folder), sigma_rels=options.sigma_rels, gammas=options.gammas)


def _gammas(snapshot: Snapshot | SnapshotView) -> Sequence[float]:
    return snapshot.layout.gammas if isinstance(snapshot, Snapshot) else snapshot.gammas


def _plain(stretches: Sequence[Stretch]) -> list[list[float]]:
    return [[each.shortest, each.longest, each.weight_l2] for each in stretches]


def _described(plan: Plan, candidates: Sequence[Snapshot | SnapshotView]) -> dict[str, Any]:
    """A plan in plain values."""
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
    """Steps that each length would need by itself; None where there are too many to look."""
    if len(candidates) * len(plan.gammas) > _SOLVES_ALONE:
        return [None] * len(plan.gammas)
    times, gammas = [each.t for each in candidates], [_gammas(each) for each in candidates]
    return [
        int(select_mixed_steps(times, gammas, plan.target.t, [gamma], tolerance=plan.tolerance).places.size)
        for gamma in plan.gammas
    ]


def _finite(number: float) -> float | None:
    """JSON has nothing else."""
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------------------------------
# Why a length does not come out well


def _causes(plan: Plan, candidates: Sequence[Snapshot | SnapshotView]) -> list[str]:
    """One sentence per thing that stands in the way of lengths whose error stays above 1 %, with what would help."""
    gammas = tuple(_gammas(candidates[-1]))
    poor = [place for place, error in enumerate(plan.profile_error_of_all) if error > _ERROR_TO_EXPLAIN]
    if not poor or any(tuple(_gammas(each)) != gammas for each in candidates):
        return []
    by_time = {each.t: each.step for each in reversed(candidates)}
    times = sorted(by_time)
    errors2 = gap_errors2(times, gammas, plan.target.t, np.array(plan.gammas)[poor])
    shares = errors2 / errors2.sum(0)
    found = sorted(
        (_cause(shares[:, row], times, plan.sigma_rels[place], gammas), place, row) for row, place in enumerate(poor)
    )
    told = []
    for cause, group in groupby(found, key=lambda each: each[0]):
        members = list(group)
        lengths = ", ".join(f"{plan.sigma_rels[place]:.4g}" for _, place, _ in members)
        share = min(float(shares[cause[1], row]) for _, _, row in members) if cause[1] >= 0 else 0.0
        told.append(_sentence(cause, f"sigma_rel {lengths}", share, [by_time[t] for t in times], gammas))
    return told


_START, _GAP, _SHORTER, _LONGER, _FEW = range(5)


def _cause(shares: FloatArray, times: Sequence[float], sigma_rel: float, gammas: Sequence[float]) -> tuple[int, int]:
    """The kind, and the gap that it is about or -1."""
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
    there = pluralize(len(steps), "snapshot")
    if kind == _START:
        return (
            f"{which}: at least {100 * share:.0f} % of the squared error is from before the first snapshot (step "
            f"{steps[0]}). Take snapshots from early on: a few, closer together than later, are enough "
            "(keep=KeepGeometric). Or ask for shorter lengths."
        )
    if kind == _GAP:
        return (
            f"{which}: at least {100 * share:.0f} % of the squared error is from the gap between steps "
            f"{steps[gap - 1]} and {steps[gap]}. A snapshot in between would help, if one was excluded or can be had; "
            "else ask for a length nearer to a tracked one, or for an average that ends at another step."
        )
    if kind == _SHORTER:
        return (
            f"{which}: shorter than the shortest tracked length ({tracked[0]:.4g}), and {there} are too far apart for "
            "that. Take snapshots more often, or track a shorter profile."
        )
    if kind == _LONGER:
        return (
            f"{which}: longer than the longest tracked length ({tracked[-1]:.4g}), and {there} are too few for that. "
            "Take snapshots more often, from early on, or track a longer profile."
        )
    return f"{which}: {there} are too few. Take snapshots more often, or track a profile nearer to that length."


# ---------------------------------------------------------------------------------------------------------------------
# In words


def covered_lines(found: dict[str, Any]) -> list[str]:
    """What ``covered`` says, for people."""
    profiles = ", ".join(f"{each:.4g}" for each in found["sigma_rels"])
    told = [f"lengths of averages that end at step {found['step']}, from {pluralize(found['snapshots'], 'snapshot')}:"]
    for each in found["within"]:
        lines = paragraph(f"  within {100 * each['profile_error']:g} %", _stretches(each["lengths"]))
        if _ends(each["lengths"]) != _ends(each["with_little_rounding"]):
            lines += paragraph(
                "            ",
                f"{_stretches(each['with_little_rounding'])} if the rounding of {found['checkpoint_dtype']} is to "
                f"stay below {found['rounding_limit']:g} of a weight",
            )
        told += lines
    return [*told, f"  tracked    sigma_rel {profiles}"]


def _ends(stretches: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(each[0], each[1]) for each in stretches]


def _stretches(stretches: Sequence[Sequence[float]]) -> str:
    """Rounded into each stretch, so that what is said holds."""
    words = []
    for shortest, longest, *_ in stretches:
        first, last = _rounded(shortest, math.ceil), _rounded(longest, math.floor)
        if first > last:
            words.append(f"{math.sqrt(shortest * longest):.4g}")
            continue
        begin = f"{SHORTEST:g} or less" if shortest < 1.0001 * SHORTEST else f"{first:.3g}"
        words.append(f"{begin} to {'the longest there is' if longest > 0.9999 * LONGEST else f'{last:.3g}'}")
    return f"sigma_rel {'; '.join(words)}" if words else "no length"


def _rounded(number: float, towards: Any) -> float:
    """Three digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return float(towards(number / unit) * unit)


def asked_lines(found: dict[str, Any]) -> list[str]:
    """One entry of ``asked``, for people."""
    together = f"{len(found['lengths'])} together: " if len(found["lengths"]) > 1 else ""
    told = [f"averages that end at step {found['step']}, within {found['tolerance']:g} of what all snapshots give:"]
    told += paragraph(
        " ",
        f"{together}{len(found['steps_read'])} of {pluralize(found['candidates'], 'snapshot')} "
        f"{'is' if len(found['steps_read']) == 1 else 'are'} read "
        f"(no fewer than {found['lower_bound']} would do), {pluralize(found['columns'], 'column')}, "
        f"{format_bytes(found['bytes_to_read'])}; condition {_number(found['condition'])}",
    )
    stored = "/".join(found["stored_dtypes"])
    rows = [["sigma_rel", "gamma", "error", "with all", "amplification", f"rounding ({stored})", "steps alone", ""]]
    rows += [
        [
            f"{each['sigma_rel']:.4g}",
            f"{each['gamma']:.4g}",
            percent(each["profile_error"]),
            percent(each["profile_error_of_all"]),
            f"{each['weight_l2']:.3g}",
            f"{each['rounding']:.1e}",
            _number(each["steps_alone"]),
            "",
        ]
        for each in found["lengths"]
    ]
    told += columns(rows)
    for warning in found["warnings"]:
        told += paragraph("warning:", warning)
    for cause in found["causes"]:
        told += paragraph("why:", cause)
    return told


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
