"""Which snapshots of a finished run to keep: the best of a number, or the fewest for an error.

The squared error of an average is a sum over the intervals between kept times, so the best set of steps is a shortest
path over the times. What to keep while training goes on is told by ``keep_rules``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nitrous_ema.posthoc.keep_rules import wanted_lengths
from nitrous_ema.posthoc.selection import Solver
from nitrous_ema.posthoc.shortest_paths import Places
from nitrous_ema.posthoc.subset_search import fewest_times, least_error
from nitrous_ema.profile import FloatArray, exponents, numbers_between, sigma_rel_to_gamma

__all__ = ["Retention", "count_within", "retain"]

# Guided models want 0.015 to 0.045 (arXiv:2312.02696, Table 6); 0.28 is next to the plain mean.
_LENGTHS_TO_TELL = (0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.28)
# Where all steps together miss the wanted error, the rest may miss it by this much more.
_MORE_THAN_ALL = 1.1
_LOSS_TO_TELL = 0.05


def count_within(budget_bytes: int, snapshot_bytes: int) -> int:
    """Snapshots of one size that fit a budget.

    Raises:
        ValueError: Not even two fit: the newest, which is only dropped once the next one is written, and one more.
    """
    count = int(budget_bytes) // int(snapshot_bytes)
    if count < 2:
        raise ValueError(
            f"the budget of {budget_bytes:,} bytes holds {count} snapshots of {snapshot_bytes:,} bytes; expected room "
            'for at least 2. Raise the budget, or store snapshots as "BF16" or of fewer profiles.'
        )
    return count


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retention:
    """Which steps of a run to keep, and what the averages lose. Errors are relative profile errors."""

    kept: Places
    """Places of the steps to keep in the given ``t``, ascending by time."""
    dropped: Places
    """Places of the others."""
    lower_bound: float
    """For ``keep``: the worst error over the range that no set of that size goes below. For ``error``: the number of
    steps that no set with such errors goes below. (Of the candidates, should the steps be too many to look at all.)"""
    sigma_rels: FloatArray
    """Lengths that are judged, ascending, [lengths]."""
    in_range: Places
    """Places in ``sigma_rels`` of the lengths that the choice was made for."""
    error_before: FloatArray
    """Error of each length with all steps, [targets, lengths]; the pinned steps first, the newest last."""
    error_after: FloatArray
    """Error of each length with the kept steps, [targets, lengths]."""
    warnings: tuple[str, ...]
    """What may surprise: lengths outside the range that are lost, an error that not even all steps reach."""


def retain(
    t: ArrayLike,
    gammas: ArrayLike,
    *,
    keep: int | None = None,
    error: float | None = None,
    sigma_rels: tuple[float, float] | None = None,
    pinned: Collection[int] = (),
) -> Retention:
    """The best steps of a finished run to keep: of a given number, or the fewest for a given error.

    With ``keep`` the worst error over the range is as small as it can be for that many steps; with ``error`` the number
    of steps is as small as it can be. Targets are the newest step and the pinned ones: what a pinned step needs to be
    one is kept with it. Short lengths at all other old steps are lost. For a budget of bytes use
    ``keep=count_within(...)``.

    Args:
        t: Times of the kept steps, shape [steps], > 0, all different; each has all profiles.
        gammas: Exponents of the tracked profiles, shape [profiles], > -0.5.
        keep: Steps to keep, the newest and the pinned ones among them.
        error: Largest relative profile error in the range. Where all steps together miss it, the kept ones may have a
            tenth more than they.
        sigma_rels: Shortest and longest length wanted; default as in ``KeepCount``.
        pinned: Places in ``t`` of steps that stay, and for which the same lengths are wanted.

    Returns:
        The choice, with errors before and after for the range and beyond it.

    Raises:
        ValueError: Numbers out of range, not one of ``keep`` and ``error``, or fewer to keep than are pinned.

    Source:
        As ``select_steps``.
    """
    tracked = exponents("gammas", gammas).ravel()
    lengths, times_wanted = wanted_lengths(tracked, sigma_rels), _times_wanted(t, pinned)
    told = np.union1d(lengths, _LENGTHS_TO_TELL)
    in_range = np.flatnonzero((told >= lengths[0]) & (told <= lengths[-1]))
    solver = _solver(t, tracked, times_wanted, told[in_range])
    required = np.searchsorted(solver.t, times_wanted)
    everything = np.arange(solver.t.size)
    warnings: list[str] = []
    if keep is not None and error is None:
        places, bound = _keep(solver, int(keep), required)
    elif error is not None and keep is None:
        places, bound, warnings = _within(solver, error, required)
    else:
        raise ValueError(f"keep is {keep!r} and error is {error!r}; expected exactly one of them.")
    teller = _solver(t, tracked, times_wanted, told)
    before, after = (teller.solve(some)[0].reshape(-1, told.size) for some in (everything, places))
    return Retention(
        kept=solver.given[places],
        dropped=solver.given[np.setdiff1d(everything, places)],
        lower_bound=bound,
        sigma_rels=told,
        in_range=in_range,
        error_before=before,
        error_after=after,
        warnings=(*warnings, *_told_losses(told, in_range, before[-1], after[-1])),
    )


def _times_wanted(t: ArrayLike, pinned: Collection[int]) -> FloatArray:
    """Times of the pinned steps and of the newest one, ascending."""
    given = np.asarray(t, dtype=np.float64)
    if given.ndim != 1 or not given.size or np.unique(given).size != given.size:
        raise ValueError(f"t has the shape {given.shape}; expected a 1-d array of different times, at least 1.")
    wrong = [place for place in pinned if not 0 <= place < given.size]
    if wrong:
        raise ValueError(f"pinned has {wrong[0]!r}; expected places in t, which has {given.size} steps.")
    return np.unique(given[[*pinned, int(given.argmax())]])


def _solver(t: ArrayLike, gammas: FloatArray, times_wanted: FloatArray, lengths: FloatArray) -> Solver:
    """One target for each time and length, time by time."""
    t_r = np.repeat(times_wanted, lengths.size)
    return Solver.of(t, gammas, t_r, np.tile(sigma_rel_to_gamma(lengths), len(times_wanted)))


def _keep(solver: Solver, keep: int, required: Places) -> tuple[Places, float]:
    """The best ``keep`` steps, and the error that none of that number go below."""
    if keep < required.size:
        raise ValueError(
            f"keep is {keep!r}, but {required.size} steps stay in any case (the newest and the pinned ones); expected "
            "at least that many. Keep more, or unpin some."
        )
    everything = np.arange(solver.t.size)
    question = solver.question(np.ones(solver.t_r.size), np.zeros(solver.t_r.size), required)
    if keep >= everything.size:
        return everything, float(np.sqrt(question.errors2(everything).max()))
    if keep == required.size:
        return np.sort(required), float(np.sqrt(question.errors2(np.sort(required)).max()))
    found = least_error(question, keep)
    return found.places, found.lower_bound


def _within(solver: Solver, error: float, required: Places) -> tuple[Places, float, list[str]]:
    """The fewest steps for an error, their least number, and what is to be told."""
    limit = float(numbers_between("error", error, 0.0, remedy="0.01 is one percent."))
    error_before, _ = solver.solve(np.arange(solver.t.size))
    allowed = np.where(error_before <= limit, limit, _MORE_THAN_ALL * error_before)
    found = fewest_times(solver.question(allowed**2, error_before**2, required), solver.judge(allowed**2))
    return found.places, float(found.lower_bound), _told_missed(error_before, limit)


def _told_missed(error_before: FloatArray, limit: float) -> list[str]:
    if (error_before <= limit).all():
        return []
    return [
        f"Not even all steps give every length in the range within {limit:.3g} (the worst: {error_before.max():.3g}). "
        f"There up to {100 * (_MORE_THAN_ALL - 1):.0f} % more than they give was allowed."
    ]


def _told_losses(told: FloatArray, in_range: Places, before: FloatArray, after: FloatArray) -> list[str]:
    lost = np.setdiff1d(np.flatnonzero((after > _LOSS_TO_TELL) & (after > 2 * before)), in_range)
    if not lost.size:
        return []
    which = "; ".join(f"{told[k]:g} ({_percent(before[k])} -> {_percent(after[k])})" for k in lost)
    return [f"Lengths outside the range are lost at the newest step: {which}. Widen the range if they are wanted."]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.1 else f"{100 * fraction:.2g} %"
