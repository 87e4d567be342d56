"""Selection of the fewest snapshots that give the requested averages within a tolerance.

Without a selection, a synthesis reads every snapshot whose weight is not 0, though most of them hardly change the
profile. ``synthesis/snapshot_selection.py`` uses this module to choose the snapshots to read. ``Solver`` is the exact
solve for any subset of the snapshots. The search over subsets is ``subset_search``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nitrous_ema.posthoc.interval_cost import IntervalCost
from nitrous_ema.posthoc.least_squares import LeastSquaresProblem, solve
from nitrous_ema.posthoc.shortest_paths import Places, SubsetProblem
from nitrous_ema.posthoc.subset_search import FewestTimes, fewest_times
from nitrous_ema.profile import FloatArray, exponents, numbers_between, times

__all__ = ["Selection", "select_steps"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """Result of ``select_steps``. Arrays are float64, one number per output."""

    places: Places
    """Places of the selected steps in the argument ``t``, ascending by time; the last one is the target step."""
    lower_bound: int
    """Proven minimum: no smaller set of the candidates meets the tolerance."""
    candidates: int
    """Number of steps that the search chose from: all up to the target step, or fewer where there are too many."""
    profile_error: FloatArray
    """Relative profile error of each output with the selected steps, as in ``synthesis_report``."""
    profile_error_of_all: FloatArray
    """Relative profile error of each output with all steps up to the target step."""
    weight_l2: FloatArray
    """Root of the sum of the squared weights of each output: the amplification of independent rounding errors."""
    ties: int
    """Number of sets of the selected size that were compared; the selected one amplifies rounding least."""


def select_steps(
    t: ArrayLike, gammas: ArrayLike, t_r: float, gammas_r: ArrayLike, *, tolerance: float = 1e-3
) -> Selection:
    """Return the fewest steps whose snapshots give all requested averages within a tolerance.

    Whole steps are selected, for all outputs together. A set is within the tolerance if the squared relative error of
    each output exceeds that with all steps by at most ``tolerance**2``. So errors add as independent errors do, and a
    tolerance can be met wherever the steps begin. Among the smallest sets that the search evaluates, the set with the
    least amplification of rounding errors is selected. Takes about a second for 4000 steps and 21 outputs.

    Args:
        t: Times of the snapshots, shape [steps], > 0, any order; each has all profiles.
        gammas: Exponents of the tracked profiles, shape [profiles], > -0.5.
        t_r: Time of the requested averages. Later steps are ignored; the last step at or before it is always selected.
        gammas_r: Exponents of the requested averages, shape [outputs], > -0.5.
        tolerance: Relative profile error that may be added, >= 0. 0 selects all steps.

    Returns:
        The steps, with a certified lower bound on their number and the errors of the exact solve with
        ``normalize="constrain"``.

    Raises:
        ValueError: Numbers are out of range, no step lies at or before ``t_r``, or there are no steps, profiles or
            outputs.

    Source:
        The squared error is a sum over the intervals between snapshot times (``least_squares``), so the set is a
        shortest path; the bound is its Lagrangian dual, closed by a shortest path for each number of steps.
    """
    solver = Solver.of(t, gammas, t_r, gammas_r)
    tolerance = float(numbers_between("tolerance", tolerance, 0.0, or_low=True, remedy="0 selects all steps."))
    everything = np.arange(solver.log_t.size)
    error_of_all, weight_l2 = solver.solve(everything)
    found = FewestTimes(places=everything, lower_bound=everything.size, candidates=everything.size, ties=1)
    if tolerance > 0:
        problem = solver.subset_problem(error_of_all**2 + tolerance**2, error_of_all**2)
        found = fewest_times(problem, solver.amplification_within(problem.limit2))
    error, weight_l2 = (error_of_all, weight_l2) if found.places.size == everything.size else solver.solve(found.places)
    return Selection(
        places=solver.input_places[found.places],
        lower_bound=found.lower_bound,
        candidates=found.candidates,
        profile_error=error,
        profile_error_of_all=error_of_all,
        weight_l2=weight_l2,
        ties=found.ties,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """The exact solve with any subset of the steps."""

    t: FloatArray  # times up to the last target, ascending, [steps]
    input_places: Places  # places of these times in the caller's array
    gammas: FloatArray  # tracked exponents
    t_r: FloatArray  # [targets]
    gammas_r: FloatArray
    log_t: FloatArray  # log(t / t[-1])

    @classmethod
    def of(cls, t: ArrayLike, gammas: ArrayLike, t_r: ArrayLike, gammas_r: ArrayLike) -> Solver:
        """Check the arguments. Each requested exponent is one target, at ``t_r`` (one time, or one for each target).

        Raises:
            ValueError: As ``select_steps``.
        """
        input_t, t_r_of_targets = times("t", t).ravel(), times("t_r", t_r)
        tracked, requested = exponents("gammas", gammas).ravel(), exponents("gammas_r", gammas_r).ravel()
        if not requested.size or not tracked.size or not input_t.size:
            raise ValueError(
                f"there are {input_t.size} steps, {tracked.size} tracked profiles and {requested.size} outputs; "
                "expected at least one of each."
            )
        unique_t, input_places = np.unique(input_t, return_index=True)
        usable = int(np.searchsorted(unique_t, t_r_of_targets.max(), side="right"))
        t_r_of_targets = np.broadcast_to(t_r_of_targets, requested.shape).copy()
        # Raises for arguments that are out of range, before any search begins.
        LeastSquaresProblem.of(
            np.repeat(unique_t, tracked.size), np.tile(tracked, unique_t.size), t_r_of_targets, requested
        )
        usable_t = unique_t[:usable]
        log_t = log_ratio(usable_t, usable_t[-1])
        return cls(usable_t, input_places[:usable], np.unique(tracked), t_r_of_targets, requested, log_t)

    def subset_problem(self, limit2: FloatArray, of_all2: FloatArray, required: Places | None = None) -> SubsetProblem:
        """Return the search problem for times with which the targets are within these limits.

        Args:
            limit2: Largest squared relative error of each target, [targets].
            of_all2: Squared relative error of each target with all times, [targets].
            required: Places that every set must contain, ascending; the last time by default.
        """
        return SubsetProblem(
            log_t=self.log_t,
            log_t_r=log_ratio(self.t_r, self.t[-1]),
            cost=IntervalCost.of(self.gammas, self.gammas_r),
            limit2=limit2,
            slack2=np.maximum(limit2 - of_all2, 1e-9 * limit2),  # positive also where all times just meet the limit
            required=np.array([self.t.size - 1]) if required is None else required,
        )

    def solve(self, places: Places) -> tuple[FloatArray, FloatArray]:
        """Return the relative errors and the norms of the weights, [targets] each, with these steps."""
        t_i, gamma_i = np.repeat(self.t[places], self.gammas.size), np.tile(self.gammas, places.size)
        weights, error = solve(LeastSquaresProblem.of(t_i, gamma_i, self.t_r, self.gammas_r), "constrain")
        return error, np.sqrt((weights**2).sum(0))

    def amplification_within(self, limit2: FloatArray) -> Callable[[Places], float | None]:
        """Return a function from a set of steps to its largest amplification, or to None if it exceeds a limit."""

        def amplification(places: Places) -> float | None:
            error, weight_l2 = self.solve(places)
            return float(weight_l2.max()) if (error**2 <= limit2).all() else None

        return amplification


def log_ratio(t: FloatArray, t_last: float) -> FloatArray:
    """Return log(t / t_last), with all digits of the differences near the last time."""
    return np.asarray(np.where(2 * t > t_last, np.log1p((t - t_last) / t_last), np.log(t / t_last)))
