"""Retention after training: the best snapshots of a given number, or the fewest snapshots for a given error.

The squared error of an average is a sum over the intervals between snapshot times, so the best set of steps is a
shortest path over the times. Retention during training is in ``keep_rules``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nitrous_ema._base.arguments import pluralize
from nitrous_ema.posthoc.selection import Solver
from nitrous_ema.posthoc.shortest_paths import Places
from nitrous_ema.posthoc.subset_search import fewest_times, least_error_times
from nitrous_ema.posthoc.wanted_lengths import wanted_lengths
from nitrous_ema.profile import FloatArray, exponents, numbers_between, sigma_rel_to_gamma

__all__ = ["Retention", "count_within", "retain"]

# Lengths whose loss is reported, in the range or not. Guided models had their best lengths at 0.015 to 0.045
# (arXiv:2312.02696, Table 6); 0.28 is next to the plain mean.
_REPORTED_LENGTHS = (0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.28)
# Allowed error where all steps together miss the limit, as a multiple of the error with all steps.
_MORE_THAN_ALL = 1.1
_LOSS_TO_WARN = 0.05  # profile error above which a warning lists a length as inaccurate


def count_within(budget_bytes: int, snapshot_bytes: int) -> int:
    """Return how many snapshots of one size fit into a budget.

    Raises:
        ValueError: Fewer than two fit: the newest snapshot, which is only dropped once the next one is written, and one
            more.
    """
    count = int(budget_bytes) // int(snapshot_bytes)
    if count < 2:
        raise ValueError(
            f"the budget of {budget_bytes:,} bytes holds {pluralize(count, 'snapshot')} of {snapshot_bytes:,} bytes; "
            "expected space for at least 2. Raise the budget, store averages in half the bytes "
            "(checkpoint_dtype=torch.bfloat16), or track fewer profiles."
        )
    return count


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retention:
    """Result of ``retain``: the steps to keep, and the errors of averages before and after."""

    kept: Places
    """Places of the steps to keep in the argument ``t``, ascending by time."""
    dropped: Places
    """Places of all other steps."""
    lower_bound: float
    """For ``keep``: no set of that size has a smaller worst error over the range. For ``error``: no set of fewer steps
    has such errors. Where the steps are too many to search all of them, both hold for the candidates of the search."""
    sigma_rels: FloatArray
    """Lengths whose errors are reported, ascending, [lengths]."""
    in_range: Places
    """Places in ``sigma_rels`` of the lengths for which the steps were chosen."""
    error_before: FloatArray
    """Relative profile error with all steps, [targets, lengths]; pinned steps first, the newest step last."""
    error_after: FloatArray
    """Relative profile error with the kept steps, [targets, lengths]."""
    warnings: tuple[str, ...]
    """One text for each problem: lengths outside the range that become inaccurate, an error limit that even all steps
    miss."""


def retain(
    t: ArrayLike,
    gammas: ArrayLike,
    *,
    keep: int | None = None,
    error: float | None = None,
    sigma_rels: tuple[float, float] | None = None,
    pinned: Collection[int] = (),
    required: Collection[int] = (),
) -> Retention:
    """Choose the steps of a finished run to keep: the best of a given number, or the fewest for a given error.

    With ``keep`` the worst error over the range is as small as possible for that many steps. With ``error`` the number
    of steps is as small as possible. Targets are the newest step and the pinned steps; the steps that averages at a
    pinned step need are kept with it. Short lengths at all other old steps are lost. For a budget of bytes use
    ``keep=count_within(...)``.

    Args:
        t: Times of the snapshots, shape [steps], > 0, all different; each has all profiles.
        gammas: Exponents of the tracked profiles, shape [profiles], > -0.5.
        keep: Number of steps to keep, including the newest step and the pinned steps.
        error: Largest relative profile error in the range, > 0. At lengths where all steps together miss it, the kept
            steps may have up to 1.1 times the error of all steps.
        sigma_rels: Shortest and longest length that you may request; default as in ``KeepCount``.
        pinned: Places in ``t`` of steps that must be kept and stay usable as targets for the same lengths.
        required: Places in ``t`` of further steps that must be kept. They need not stay usable as targets.

    Returns:
        The steps to keep and to drop, with the errors before and after, in the range and beyond it.

    Raises:
        ValueError: Numbers are out of range, both or neither of ``keep`` and ``error`` are given, or ``keep`` is less
            than the number of required steps.

    Source:
        As ``select_steps``.
    """
    tracked = exponents("gammas", gammas).ravel()
    lengths, target_times = wanted_lengths(tracked, sigma_rels), _target_times(t, pinned)
    kept_times = np.union1d(target_times, _target_times(t, required))
    reported = np.union1d(lengths, _REPORTED_LENGTHS)
    in_range = np.flatnonzero((reported >= lengths[0]) & (reported <= lengths[-1]))
    # Steps are chosen for the lengths in the range; errors are reported for all lengths.
    solver = _solver(t, tracked, target_times, reported[in_range])
    fixed = np.searchsorted(solver.t, kept_times)
    everything = np.arange(solver.t.size)
    warnings: list[str] = []
    if keep is not None and error is None:
        places, bound = _best_of_count(solver, int(keep), fixed)
    elif error is not None and keep is None:
        places, bound, warnings = _fewest_within(solver, error, fixed)
    else:
        raise ValueError(f"keep={keep!r} and error={error!r}: expected exactly one of them.")
    reported_solver = _solver(t, tracked, target_times, reported)
    before, after = (reported_solver.solve(some)[0].reshape(-1, reported.size) for some in (everything, places))
    return Retention(
        kept=solver.input_places[places],
        dropped=solver.input_places[np.setdiff1d(everything, places)],
        lower_bound=bound,
        sigma_rels=reported,
        in_range=in_range,
        error_before=before,
        error_after=after,
        warnings=(*warnings, *_warn_of_losses(reported, in_range, before[-1], after[-1])),
    )


def _target_times(t: ArrayLike, pinned: Collection[int]) -> FloatArray:
    """Return the times of the pinned steps and of the newest step, ascending."""
    all_times = np.asarray(t, dtype=np.float64)
    if all_times.ndim != 1 or not all_times.size or np.unique(all_times).size != all_times.size:
        raise ValueError(f"t has the shape {all_times.shape}; expected a 1-d array of different times, at least 1.")
    wrong = [place for place in pinned if not 0 <= place < all_times.size]
    if wrong:
        raise ValueError(f"pinned has {wrong[0]!r}; expected places in t, which has {all_times.size} steps.")
    return np.unique(all_times[[*pinned, int(all_times.argmax())]])


def _solver(t: ArrayLike, gammas: FloatArray, target_times: FloatArray, lengths: FloatArray) -> Solver:
    """Return the exact solve with one target for each time and length, ordered by time."""
    t_r = np.repeat(target_times, lengths.size)
    return Solver.of(t, gammas, t_r, np.tile(sigma_rel_to_gamma(lengths), len(target_times)))


def _best_of_count(solver: Solver, keep: int, required: Places) -> tuple[Places, float]:
    """Return the best ``keep`` steps, and a lower bound on the worst error of any set of that size."""
    if keep < required.size:
        raise ValueError(
            f"keep is {keep!r}, but {required.size} steps are always kept (the newest and the pinned ones); expected "
            "at least that many. Keep more steps, or unpin some."
        )
    everything = np.arange(solver.t.size)
    # least_error_times ignores the limits, so these values have no effect.
    problem = solver.subset_problem(np.ones(solver.t_r.size), np.zeros(solver.t_r.size), required)
    if keep >= everything.size:
        return everything, float(np.sqrt(problem.errors2(everything).max()))
    if keep == required.size:
        return np.sort(required), float(np.sqrt(problem.errors2(np.sort(required)).max()))
    found = least_error_times(problem, keep)
    return found.places, found.lower_bound


def _fewest_within(solver: Solver, error: float, required: Places) -> tuple[Places, float, list[str]]:
    """Return the fewest steps for an error limit, a lower bound on their number, and warnings."""
    limit = float(numbers_between("error", error, 0.0, remedy="0.01 is one percent."))
    error_before, _ = solver.solve(np.arange(solver.t.size))
    allowed = np.where(error_before <= limit, limit, _MORE_THAN_ALL * error_before)
    found = fewest_times(
        solver.subset_problem(allowed**2, error_before**2, required), solver.amplification_within(allowed**2)
    )
    return found.places, float(found.lower_bound), _warn_of_missed_limit(error_before, limit)


def _warn_of_missed_limit(error_before: FloatArray, limit: float) -> list[str]:
    if (error_before <= limit).all():
        return []
    return [
        f"The error limit {limit:.3g} cannot be met at every length in the range, even with all snapshots (worst error "
        f"{error_before.max():.3g}). At lengths that miss it, up to {100 * (_MORE_THAN_ALL - 1):.0f} % more error than "
        "with all snapshots is allowed."
    ]


def _warn_of_losses(reported: FloatArray, in_range: Places, before: FloatArray, after: FloatArray) -> list[str]:
    lost = np.setdiff1d(np.flatnonzero((after > _LOSS_TO_WARN) & (after > 2 * before)), in_range)
    if not lost.size:
        return []
    which = "; ".join(f"{reported[k]:g} ({_percent(before[k])} -> {_percent(after[k])})" for k in lost)
    return [
        f"Lengths outside the range become inaccurate at the newest step (profile error before -> after): {which}. "
        "Widen the range if you may need them."
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.1 else f"{100 * fraction:.2g} %"
