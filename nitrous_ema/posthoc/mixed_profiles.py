"""The fewest steps where not every step has the same profiles.

A run that went on with other profiles, or a file that lacks one, ties intervals together that are else independent, and
the shortest path of ``selection`` no longer counts their errors. So the steps with the same profiles are chosen from
apart, each group with its share of the tolerance, and the exact solve judges them all together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema.posthoc.least_squares import LeastSquaresProblem, solve
from nitrous_ema.posthoc.selection import Selection, Solver, select_steps
from nitrous_ema.posthoc.subset_search import fewest_times
from nitrous_ema.profile import FloatArray, numbers_between, times

_MOST_GROUPS = 4
_SHARES = (0.95, 0.7, 0.35)


def select_mixed_steps(
    t: ArrayLike, gammas: Sequence[Sequence[float]], t_r: float, gammas_r: ArrayLike, *, tolerance: float = 1e-3
) -> Selection:
    """As ``select_steps``, for steps with profiles of their own; the same where all have the same ones.

    Else the choice keeps the tolerance, but is not proven to be small: ``lower_bound`` is 1. It is made from the steps
    that have the target's profiles alone, or from each group of steps with the same profiles, whichever needs fewer.
    All steps are taken where there are more than four groups, or where no such choice meets the tolerance.

    Args:
        t: Times of the kept steps, shape [steps], > 0, any order. Of steps with one time the first is used.
        gammas: Exponents of the profiles of each step, > -0.5.
        t_r: Time of the averages wanted, as in ``select_steps``.
        gammas_r: Their exponents, shape [outputs], > -0.5.
        tolerance: Relative profile error that may be added, >= 0. 0 chooses all steps.

    Returns:
        The steps and the errors of the exact solve, as ``select_steps``.

    Raises:
        ValueError: As ``select_steps``; also as many lists of exponents as steps were expected.
    """
    given_t = times("t", t)
    if given_t.shape != (len(gammas),):
        raise ValueError(f"t and gammas: {given_t.shape} times and {len(gammas)} lists of exponents; expected as many.")
    tolerance = float(numbers_between("tolerance", tolerance, 0.0, or_low=True, remedy="0 chooses all steps."))
    kept, given = np.unique(given_t, return_index=True)
    columns = _MixedColumns(
        [np.asarray(gammas[place], dtype=np.float64) for place in given], kept, float(t_r), gammas_r
    )
    groups, group = np.unique(columns.table, axis=0, return_inverse=True)
    group = group.reshape(-1)
    if len(groups) == 1:
        return select_steps(given_t, columns.gammas, t_r, gammas_r, tolerance=tolerance)
    everything = np.arange(columns.usable)
    error_of_all, weight_l2 = columns.solve(everything)
    places, error = everything, error_of_all
    if tolerance > 0 and len(groups) <= _MOST_GROUPS:
        limit2 = error_of_all**2 + tolerance**2
        for chosen in columns.choices(groups, group, tolerance):
            of_chosen, l2_of_chosen = columns.solve(chosen)
            if chosen.size < places.size and (of_chosen**2 <= limit2).all():
                places, error, weight_l2 = chosen, of_chosen, l2_of_chosen
    return Selection(
        places=given[places],
        lower_bound=1,
        candidates=everything.size,
        profile_error=error,
        profile_error_of_all=error_of_all,
        weight_l2=weight_l2,
        ties=1,
    )


class _MixedColumns:
    """Steps ascending in time, each with its own profiles."""

    def __init__(self, of_steps: Sequence[FloatArray], t: FloatArray, t_r: float, gammas_r: ArrayLike) -> None:
        self._of_steps, self._t = of_steps, t
        self._gammas_r = np.atleast_1d(np.asarray(gammas_r, dtype=np.float64))
        self._t_r = np.full(self._gammas_r.shape, t_r)
        problem = self._problem(np.arange(t.size))  # says what is wrong
        self.gammas = problem.gamma
        self.usable = int(np.searchsorted(t, t_r, side="right"))
        self.table = problem.row[: self.usable] >= 0  # which profiles each usable step has

    def solve(self, places: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
        """Relative errors and norms of the weights, [outputs] each, with these steps."""
        weights, error = solve(self._problem(places), "constrain")
        return error, np.sqrt((weights**2).sum(0))

    def choices(
        self, groups: NDArray[np.bool_], group: NDArray[np.intp], tolerance: float
    ) -> Iterator[NDArray[np.intp]]:
        """Steps of the target's group alone, and of all groups, with some smaller and smaller tolerances."""
        yield self._fewest(group == group[-1], groups[group[-1]], (_SHARES[0] * tolerance) ** 2)
        for share in _SHARES:
            of_each = (share * tolerance) ** 2 / len(groups)
            chosen = [self._fewest(group == number, has, of_each) for number, has in enumerate(groups)]
            yield np.sort(np.concatenate(chosen))

    def _fewest(self, own: NDArray[np.bool_], has: NDArray[np.bool_], tolerance2: float) -> NDArray[np.intp]:
        """The fewest of these steps, with these profiles, that add at most this squared error at t_r."""
        places = np.flatnonzero(own)
        # For averages that end at their own last step: at t_r those squared errors count by its share of the time.
        last = self._t[places[-1]]
        solver = Solver.of(self._t[places], self.gammas[has], last, self._gammas_r)
        of_all2 = solver.solve(np.arange(places.size))[0] ** 2
        limit2 = of_all2 + tolerance2 * (self._t_r / last) ** (2 * self._gammas_r + 1)
        return np.asarray(places[fewest_times(solver.question(limit2, of_all2), solver.judge(limit2)).places])

    def _problem(self, places: NDArray[np.intp]) -> LeastSquaresProblem:
        counts = [self._of_steps[place].size for place in places]
        gamma_i = np.concatenate([self._of_steps[place] for place in places])
        return LeastSquaresProblem.of(np.repeat(self._t[places], counts), gamma_i, self._t_r, self._gammas_r)
