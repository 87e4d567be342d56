"""Which snapshots to keep, while training goes on and afterwards, by what the averages lose.

The squared error of an average is a sum over the intervals between kept times, so what a step is worth is known
exactly: the cost of the interval that its going would leave, less that of the two it would join.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from nitrous_ema.posthoc.interval_cost import IntervalCost
from nitrous_ema.posthoc.kept_paths import Places
from nitrous_ema.posthoc.path_search import fewest_times, least_error
from nitrous_ema.posthoc.selection import Solver, log_ratio
from nitrous_ema.profile import FloatArray, exponents, gamma_to_sigma_rel, numbers_between, sigma_rel_to_gamma

__all__ = ["KeepAll", "KeepCount", "KeepGeometric", "KeepRule", "Retention", "count_within", "retain"]

_LENGTHS = 16
_LONGEST, _REACH = 0.25, 2.5
# Guided models want 0.015 to 0.045 (arXiv:2312.02696, Table 6); 0.28 is next to the plain mean.
_LENGTHS_TO_TELL = (0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.28)
# Where all steps together miss the wanted error, the rest may miss it by this much more.
_MORE_THAN_ALL = 1.1
_LOSS_TO_TELL = 0.05


# ---------------------------------------------------------------------------------------------------------------------
# While training goes on


class KeepRule(Protocol):
    """Tells on each arrival which kept steps go. It has no memory: what is kept is all it looks at."""

    def drop(self, t: Sequence[float] | FloatArray, pinned: Collection[int] = ()) -> tuple[int, ...]:
        """Places in ``t`` of the steps to drop.

        Args:
            t: Times of all kept steps, ascending; the last one has just arrived and is never dropped.
            pinned: Places of steps that are never dropped.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep every step."""

    def drop(self, t: Sequence[float] | FloatArray, pinned: Collection[int] = ()) -> tuple[int, ...]:
        """Nothing."""
        return ()


@dataclass(frozen=True, slots=True)
class KeepGeometric:
    """Keep steps whose times grow by a ratio: O(log t) of them, with the same error at every time."""

    ratio: float
    """Each kept step is at least this many times as late as the one before, > 1. The newest is always kept."""

    def __post_init__(self) -> None:
        numbers_between("ratio", self.ratio, 1.0, remedy="1.05 keeps 47 steps per tenfold of training.")

    def drop(self, t: Sequence[float] | FloatArray, pinned: Collection[int] = ()) -> tuple[int, ...]:
        """Steps nearer than the ratio to the last one that stays before them."""
        dropped, last = [], -np.inf
        for place, time in enumerate(t[:-1]):
            if place in pinned or time >= self.ratio * last * (1 - 1e-9):
                last = time
            else:
                dropped.append(place)
        return tuple(dropped)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepCount:
    """Keep at most a number of steps: with each arrival the one goes that costs least.

    It minimizes ``sum (error**2 + loss)**exponent`` over lengths in the range, for the newest step and each pinned one
    as targets, where ``loss`` is what dropping adds to ``error**2``. It needs not know how long training will be; its
    worst error was 1.2 to 2.4 times that of the best set of that size. Costs O(steps * lengths) an arrival.
    """

    count: int
    """Steps to keep, >= 2. Pinned ones count; if they alone are more, only they and the newest are kept."""
    gammas: tuple[float, ...]
    """Exponents of the tracked profiles."""
    sigma_rels: tuple[float, float] | None = None
    """Shortest and longest length that is wanted later; by default from the shortest tracked one to 2.5 times the
    longest, but not past 0.25."""
    exponent: float = 2.0
    """1 looks at the mean squared error over the range, more at the worst. 1 is better for two profiles and
    lengths far beyond the longest tracked one."""

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"count is {self.count!r}; expected at least 2: the newest step and one more.")
        numbers_between("exponent", self.exponent, 0.0, remedy="2 is a good choice.")
        _lengths(exponents("gammas", self.gammas), self.sigma_rels)

    def drop(self, t: Sequence[float] | FloatArray, pinned: Collection[int] = ()) -> tuple[int, ...]:
        """The steps that cost least, one after the other."""
        gammas = exponents("gammas", self.gammas)
        cost = IntervalCost.of(gammas, sigma_rel_to_gamma(_lengths(gammas, self.sigma_rels)))
        times = np.asarray(t, dtype=np.float64)
        fixed = np.zeros(times.size, dtype=bool)
        fixed[[*pinned, times.size - 1]] = True
        targets = times[fixed]
        kept = np.arange(times.size)
        while kept.size > self.count and not fixed[kept].all():
            score = self._scores(cost, times[kept], targets)
            score[fixed[kept]] = np.inf
            kept = np.delete(kept, int(score.argmin()))
        return tuple(np.setdiff1d(np.arange(times.size), kept).tolist())

    def _scores(self, cost: IntervalCost, t: FloatArray, targets: FloatArray) -> FloatArray:
        """What is left to minimize when each step goes, [steps]; that of the last one means nothing."""
        log_t = log_ratio(t, t[-1])
        width = np.diff(log_t, prepend=-np.inf)
        alone, joined = cost.of_widths(width), cost.of_widths(width[:-1] + width[1:])
        scores = np.zeros(t.size)
        for log_t_r in log_ratio(targets, t[-1]):
            weight = cost.weights(log_t, np.full(cost.powers.shape, log_t_r))
            present = alone * weight
            loss = joined * weight[1:] - present[:-1] - present[1:]
            scores[:-1] += ((present.sum(0) + np.maximum(loss, 0.0)) ** self.exponent).sum(1)
        return scores


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


# ---------------------------------------------------------------------------------------------------------------------
# Finished runs


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
    lengths, times_wanted = _lengths(tracked, sigma_rels), _times_wanted(t, pinned)
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


def _lengths(gammas: FloatArray, sigma_rels: tuple[float, float] | None) -> FloatArray:
    """Lengths over a range, evenly spaced in their logarithm, [lengths]."""
    if sigma_rels is None:
        tracked = np.asarray(gamma_to_sigma_rel(gammas))
        low, high = float(tracked.min()), float(max(tracked.max(), min(_REACH * tracked.max(), _LONGEST)))
    else:
        low, high = (float(s) for s in sigma_rels)
        if low > high:
            raise ValueError(f"sigma_rels is {sigma_rels!r}; expected the shortest length first, then the longest.")
    sigma_rel_to_gamma((low, high))  # says what is wrong with them
    return np.unique(np.geomspace(low, high, _LENGTHS)) if low < high else np.array([low])


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
    which = "; ".join(f"{told[k]:g} ({100 * before[k]:.2g} % -> {100 * after[k]:.2g} %)" for k in lost)
    return [f"Lengths outside the range are lost at the newest step: {which}. Widen the range if they are wanted."]
