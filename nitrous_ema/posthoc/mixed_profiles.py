"""Selection of few snapshots where snapshots differ in their profiles.

Profiles differ when a run is resumed with other profiles, or when a file lacks one. The intervals are then no longer
independent, and a shortest path as in ``selection`` does not count their errors. So the snapshots are grouped by their
profiles. Snapshots are selected from each group separately, with its share of the tolerance, and the exact solve
evaluates the union of the selections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema.posthoc.least_squares import LeastSquaresProblem, solve
from nitrous_ema.posthoc.selection import Selection, Solver, select_steps
from nitrous_ema.posthoc.subset_search import fewest_times
from nitrous_ema.profile import FloatArray, numbers_between, times

_MAX_GROUPS = 4
# Shares of the tolerance to try. Smaller shares select more steps of each group.
_SHARES = (0.95, 0.7, 0.35)


def select_mixed_steps(
    t: ArrayLike, gammas: Sequence[Sequence[float]], t_r: float, gammas_r: ArrayLike, *, tolerance: float = 1e-3
) -> Selection:
    """Return few steps that give all requested averages within a tolerance, for steps with different profiles.

    Where all steps have the same profiles, the result is that of ``select_steps``. Otherwise it meets the tolerance,
    but is not proven to be small: ``lower_bound`` is 1. Steps are selected from the target step's group alone, or from
    each group of steps with the same profiles, whichever needs fewer. All steps are returned for more than four groups,
    or where no such selection meets the tolerance.

    Args:
        t: Times of the snapshots, shape [steps], > 0, any order. Of steps with equal times the first is used.
        gammas: Exponents of the profiles of each step, > -0.5.
        t_r: Time of the requested averages, as in ``select_steps``.
        gammas_r: Exponents of the requested averages, shape [outputs], > -0.5.
        tolerance: Relative profile error that may be added, >= 0. 0 selects all steps.

    Returns:
        The steps and the errors of the exact solve, as ``select_steps``.

    Raises:
        ValueError: As ``select_steps``; also if the numbers of times and of lists of exponents differ.
    """
    input_t = times("t", t)
    if input_t.shape != (len(gammas),):
        raise ValueError(
            f"t has the shape {input_t.shape}, but gammas has {len(gammas)} lists of exponents; "
            "expected one list for each time."
        )
    tolerance = float(numbers_between("tolerance", tolerance, 0.0, or_low=True, remedy="0 selects all steps."))
    unique_t, input_places = np.unique(input_t, return_index=True)
    columns = _MixedColumns(
        [np.asarray(gammas[place], dtype=np.float64) for place in input_places], unique_t, float(t_r), gammas_r
    )
    # A group is a set of profiles; ``group`` is the group of each usable step, so the target step's is the last.
    groups, group = np.unique(columns.table, axis=0, return_inverse=True)
    group = group.reshape(-1)
    if len(groups) == 1:
        return select_steps(input_t, columns.gammas, t_r, gammas_r, tolerance=tolerance)
    of_all = columns.solve(np.arange(columns.usable))
    chosen = of_all
    if tolerance > 0 and len(groups) <= _MAX_GROUPS:
        chosen = _smallest(columns, columns.candidate_sets(groups, group, tolerance), of_all, tolerance)
    return Selection(
        places=input_places[chosen.places],
        lower_bound=1,
        candidates=of_all.places.size,
        profile_error=chosen.error,
        profile_error_of_all=of_all.error,
        weight_l2=chosen.weight_l2,
        ties=1,
    )


class _Solved(NamedTuple):
    """Steps, and the exact solve with them: relative errors and norms of the weights, [outputs] each."""

    places: NDArray[np.intp]
    error: FloatArray
    weight_l2: FloatArray


def _smallest(
    columns: _MixedColumns, candidate_sets: Iterable[NDArray[np.intp]], of_all: _Solved, tolerance: float
) -> _Solved:
    """Return the first smallest of the sets of steps that add at most the tolerance; all steps if none does."""
    limit2, smallest = of_all.error**2 + tolerance**2, of_all
    for places in candidate_sets:
        solved = columns.solve(places)
        if places.size < smallest.places.size and (solved.error**2 <= limit2).all():
            smallest = solved
    return smallest


class _MixedColumns:
    """Exact solves with steps that have their own profiles. Steps ascend in time."""

    def __init__(self, gammas_of_steps: Sequence[FloatArray], t: FloatArray, t_r: float, gammas_r: ArrayLike) -> None:
        self._gammas_of_steps, self._t = gammas_of_steps, t
        self._gammas_r = np.atleast_1d(np.asarray(gammas_r, dtype=np.float64))
        self._t_r = np.full(self._gammas_r.shape, t_r)
        problem = self._problem(np.arange(t.size))  # raises for arguments that are out of range
        self.gammas = problem.gamma
        self.usable = int(np.searchsorted(t, t_r, side="right"))
        self.table = problem.row[: self.usable] >= 0  # which profiles each usable step has

    def solve(self, places: NDArray[np.intp]) -> _Solved:
        """Return the exact solve with these steps."""
        weights, error = solve(self._problem(places), "constrain")
        return _Solved(places, error, np.sqrt((weights**2).sum(0)))

    def candidate_sets(
        self, groups: NDArray[np.bool_], group: NDArray[np.intp], tolerance: float
    ) -> Iterator[NDArray[np.intp]]:
        """Yield steps of the target step's group alone, then unions of all groups at smaller and smaller tolerances."""
        yield self._fewest(group == group[-1], groups[group[-1]], (_SHARES[0] * tolerance) ** 2)
        for share in _SHARES:
            of_each = (share * tolerance) ** 2 / len(groups)
            chosen = [self._fewest(group == number, has, of_each) for number, has in enumerate(groups)]
            yield np.sort(np.concatenate(chosen))

    def _fewest(self, own: NDArray[np.bool_], has: NDArray[np.bool_], tolerance2: float) -> NDArray[np.intp]:
        """Return the fewest of these steps, with these profiles, that add at most this squared error at t_r."""
        places = np.flatnonzero(own)
        # The group is solved for averages at its own last time. At t_r these squared errors count less, by the power of
        # last / t_r with which an interval's cost decreases (interval_cost), so the tolerance is larger by that power.
        last = self._t[places[-1]]
        solver = Solver.of(self._t[places], self.gammas[has], last, self._gammas_r)
        of_all2 = solver.solve(np.arange(places.size))[0] ** 2
        limit2 = of_all2 + tolerance2 * (self._t_r / last) ** (2 * self._gammas_r + 1)
        return np.asarray(
            places[fewest_times(solver.subset_problem(limit2, of_all2), solver.amplification_within(limit2)).places]
        )

    def _problem(self, places: NDArray[np.intp]) -> LeastSquaresProblem:
        counts = [self._gammas_of_steps[place].size for place in places]
        gamma_i = np.concatenate([self._gammas_of_steps[place] for place in places])
        return LeastSquaresProblem.of(np.repeat(self._t[places], counts), gamma_i, self._t_r, self._gammas_r)
