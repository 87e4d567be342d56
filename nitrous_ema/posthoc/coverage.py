"""Which lengths the kept snapshots can give, and what stands in the way of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema.posthoc.intervals import fit_intervals, interval_errors2
from nitrous_ema.posthoc.least_squares import LeastSquaresProblem, solve
from nitrous_ema.profile import (
    SIGMA_REL_LIMIT,
    FloatArray,
    exponents,
    gamma_to_sigma_rel,
    numbers_between,
    sigma_rel_to_gamma,
    times,
)

SHORTEST, LONGEST = 0.002, 0.9999 * SIGMA_REL_LIMIT
"""Lengths that are looked at."""

_LENGTHS = 96  # 5 % from one to the next
_HALVINGS = 7  # of such a step, to find where the error crosses a limit: 0.04 %
_MOST_COLUMNS = 1024  # of which a condition is computed: the matrix is dense


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Lengths next to each other that come out well enough."""

    shortest: float
    """sigma_rel, rounded into the stretch by at most 0.04 %."""
    longest: float
    """sigma_rel, in the same way."""
    weight_l2: float
    """Largest amplification of rounding in it: root of the sum of the squared weights of least error."""


def covered_lengths(
    t_i: ArrayLike,
    gamma_i: ArrayLike,
    t_r: float,
    *,
    limits: Sequence[tuple[float, float]] = ((0.01, math.inf), (0.05, math.inf)),
) -> tuple[tuple[Stretch, ...], ...]:
    """Lengths that a synthesis from all of these averages gives well enough, ending at one time.

    Lengths from 0.002 to 0.2886 are looked at in steps of 5 %, and the tracked ones: a gap between stretches that is
    narrower is not seen, nor is a narrower stretch without a tracked length.

    Args:
        t_i: Times of the given averages, as in ``solve_weights``; so are ``gamma_i`` and what is raised.
        gamma_i: Their exponents, shape [inputs].
        t_r: Time at which the averages end.
        limits: What is well enough: pairs of the largest relative profile error and the largest amplification of
            rounding, each > 0; infinity is no limit.

    Returns:
        For each pair its stretches, the shorter lengths first.
    """
    allowed = np.array(limits, dtype=np.float64).reshape(-1, 2)
    numbers_between("limits", np.minimum(allowed, 1e300), 0.0, remedy="Give pairs of an error and an amplification.")
    judge = _LengthErrors(t_i, gamma_i, float(t_r))
    lengths = judge.lengths()
    error, norm = judge(lengths)
    runs = [
        (pair, first, last)
        for pair, (most_error, most_norm) in enumerate(allowed)
        for first, last in _runs((error <= most_error) & (norm <= most_norm))
    ]
    if not runs:
        return tuple(() for _ in limits)
    ends = np.array([(first, last) for _, first, last in runs])
    inside, outside = lengths[ends].ravel(), lengths[np.clip(ends + np.array([-1, 1]), 0, lengths.size - 1)].ravel()
    most_error, most_norm = np.repeat(allowed[[pair for pair, _, _ in runs]], 2, axis=0).T
    for _ in range(_HALVINGS):
        middle = np.sqrt(inside * outside)
        error_there, norm_there = judge(middle)
        good = (error_there <= most_error) & (norm_there <= most_norm)
        inside, outside = np.where(good, middle, inside), np.where(good, outside, middle)
    norm_at_ends = judge(inside)[1].reshape(-1, 2)
    found: list[list[Stretch]] = [[] for _ in limits]
    for (pair, first, last), (shortest, longest), of_ends in zip(
        runs, inside.reshape(-1, 2).tolist(), norm_at_ends, strict=True
    ):
        most = float(max(norm[first : last + 1].max(), of_ends.max()))
        found[pair].append(Stretch(shortest=shortest, longest=longest, weight_l2=most))
    return tuple(map(tuple, found))


class _LengthErrors:
    """Errors and amplifications of averages that end at one time, by their lengths."""

    def __init__(self, t_i: ArrayLike, gamma_i: ArrayLike, t_r: float) -> None:
        self._t_i, self._gamma_i, self._t_r = times("t_i", t_i), exponents("gamma_i", gamma_i), t_r

    def lengths(self) -> FloatArray:
        """What is looked at."""
        at_end = np.atleast_1d(self._gamma_i)[np.atleast_1d(self._t_i) == self._t_r]
        tracked = np.asarray(gamma_to_sigma_rel(at_end[at_end > 0]))
        tracked = tracked[(tracked >= SHORTEST) & (tracked <= LONGEST)]
        return np.unique(np.concatenate([np.geomspace(SHORTEST, LONGEST, _LENGTHS), tracked]))

    def __call__(self, sigma_rels: FloatArray) -> tuple[FloatArray, FloatArray]:
        asked = np.full(sigma_rels.size, self._t_r), np.asarray(sigma_rel_to_gamma(sigma_rels))
        weights, error = solve(LeastSquaresProblem.of(self._t_i, self._gamma_i, *asked), "constrain")
        return error, np.sqrt((weights**2).sum(0))


def gap_errors2(t: ArrayLike, gammas: ArrayLike, t_r: float, gammas_r: ArrayLike) -> FloatArray:
    """What each gap between kept times adds to the squared relative errors, before weights are made to sum to 1.

    Args:
        t: Kept times, ascending, shape [steps], up to ``t_r``; each has all profiles.
        gammas: Exponents of the profiles, shape [profiles].
        t_r: Time at which the averages end.
        gammas_r: Their exponents, shape [outputs].

    Returns:
        Shape [steps, outputs]; the first row is of the time before the first snapshot.
    """
    kept, wanted = times("t", t), exponents("gammas_r", gammas_r)
    tracked = -np.sort(-exponents("gammas", gammas))
    return interval_errors2(fit_intervals(kept, tracked, wanted).residual, wanted, kept / t_r)


def condition(t_i: ArrayLike, gamma_i: ArrayLike) -> float:
    """How nearly the given profiles depend on each other: the condition number of the least squares they make.

    It is that of the matrix that has the profiles, each of norm 1, as its columns; the equations of Alg. 3 have its
    square. The solve here goes interval by interval and does not lose the digits that it tells of; what it costs is
    weights that are large and of both signs (``weight_l2``).

    Args:
        t_i: Times of the averages, shape [inputs].
        gamma_i: Their exponents, shape [inputs].

    Returns:
        At least 1; NaN for more than 1024 averages, and infinity if one of them is given twice.
    """
    problem = LeastSquaresProblem.of(t_i, gamma_i, [np.max(np.asarray(t_i))], [0.0])
    if problem.t_i.size > _MOST_COLUMNS:
        return math.nan
    if problem.t_i.size > (problem.row >= 0).sum():
        return math.inf
    t, gamma, place = problem.t, problem.gamma, problem.at_gamma
    factor = fit_intervals(t, gamma, np.zeros(1)).factor  # [steps, profiles, profiles]
    reach = np.minimum(t[:, None] / problem.t_i, 1.0) ** (problem.gamma_i + 0.5)
    reach = np.where(t[:, None] <= problem.t_i, reach, 0.0) * np.sqrt(2 * problem.gamma_i + 1)
    columns = factor[:, :, place] * reach[:, None]  # coordinates on each interval, [steps, profiles, inputs]
    singular = np.linalg.svd(columns.reshape(-1, problem.t_i.size), compute_uv=False)
    with np.errstate(divide="ignore"):
        return float(singular[0] / singular[-1])


def _runs(good: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last place of each group of neighbours that are good."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(np.int8)))
    return [(int(first), int(after) - 1) for first, after in edges.reshape(-1, 2)]
