"""Coverage: which lengths a set of snapshots supports within error limits, and why other lengths are inaccurate."""

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
"""Range of lengths (sigma_rel) that is examined."""

_LENGTHS = 96  # 5 % from one to the next
_HALVINGS = 7  # of the step between two lengths, to find where an error crosses its limit to 0.04 %
_MAX_COLUMNS = 1024  # largest system whose condition number is computed: its matrix is dense


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A range of lengths that are all within the limits."""

    shortest: float
    """Shortest sigma_rel in the range, rounded up by at most 0.04 %."""
    longest: float
    """Longest sigma_rel in the range, rounded down by at most 0.04 %."""
    weight_l2: float
    """Largest amplification of rounding in the range: root of the sum of the squared least-squares weights."""


def covered_lengths(
    t_i: ArrayLike,
    gamma_i: ArrayLike,
    t_r: float,
    *,
    limits: Sequence[tuple[float, float]] = ((0.01, math.inf), (0.05, math.inf)),
) -> tuple[tuple[Stretch, ...], ...]:
    """Return the ranges of lengths that a synthesis from all of these averages gives within limits, at one time.

    Lengths from 0.002 to 0.2886 are examined in steps of 5 %, and also the tracked lengths. Gaps between ranges are
    missed if they are narrower than a step, and so are narrower ranges without a tracked length.

    Args:
        t_i: Times of the stored averages, shape [inputs], as in ``solve_weights``.
        gamma_i: Exponents of the stored averages, shape [inputs].
        t_r: Time of the requested averages.
        limits: Pairs of the largest relative profile error and the largest amplification of rounding, each > 0;
            infinity for no limit.

    Returns:
        The ranges for each pair, shorter lengths first.

    Raises:
        ValueError: As ``solve_weights``; also limits that are not positive.
    """
    allowed = np.array(limits, dtype=np.float64).reshape(-1, 2)
    # numbers_between accepts finite numbers only, but an infinite limit is allowed here.
    numbers_between("limits", np.minimum(allowed, 1e300), 0.0, remedy="Give pairs of an error and an amplification.")
    length_errors = _LengthErrors(t_i, gamma_i, float(t_r))
    lengths = length_errors.lengths()
    error, norm = length_errors(lengths)
    groups = [
        (pair, first, last)
        for pair, (max_error, max_norm) in enumerate(allowed)
        for first, last in _groups((error <= max_error) & (norm <= max_norm))
    ]
    if not groups:
        return tuple(() for _ in limits)
    ends = np.array([(first, last) for _, first, last in groups])
    # The first and the last examined length have no neighbor. There outside equals inside: bisection changes nothing.
    inside, outside = lengths[ends].ravel(), lengths[np.clip(ends + np.array([-1, 1]), 0, lengths.size - 1)].ravel()
    max_error, max_norm = np.repeat(allowed[[pair for pair, _, _ in groups]], 2, axis=0).T
    # Bisection of both ends of every range, in geometric means: inside stays within the limits, outside beyond them.
    for _ in range(_HALVINGS):
        middle = np.sqrt(inside * outside)
        error_at_middle, norm_at_middle = length_errors(middle)
        is_covered = (error_at_middle <= max_error) & (norm_at_middle <= max_norm)
        inside, outside = np.where(is_covered, middle, inside), np.where(is_covered, outside, middle)
    norm_at_ends = length_errors(inside)[1].reshape(-1, 2)
    found: list[list[Stretch]] = [[] for _ in limits]
    for (pair, first, last), (shortest, longest), of_ends in zip(
        groups, inside.reshape(-1, 2).tolist(), norm_at_ends, strict=True
    ):
        max_weight_l2 = float(max(norm[first : last + 1].max(), of_ends.max()))
        found[pair].append(Stretch(shortest=shortest, longest=longest, weight_l2=max_weight_l2))
    return tuple(map(tuple, found))


class _LengthErrors:
    """Errors and amplifications of averages at one time, as a function of their lengths."""

    def __init__(self, t_i: ArrayLike, gamma_i: ArrayLike, t_r: float) -> None:
        self._t_i, self._gamma_i, self._t_r = times("t_i", t_i), exponents("gamma_i", gamma_i), t_r

    def lengths(self) -> FloatArray:
        """Return the lengths to examine, ascending: a grid, and the tracked lengths, which may be narrow ranges."""
        at_end = np.atleast_1d(self._gamma_i)[np.atleast_1d(self._t_i) == self._t_r]
        tracked = np.asarray(gamma_to_sigma_rel(at_end[at_end > 0]))
        tracked = tracked[(tracked >= SHORTEST) & (tracked <= LONGEST)]
        return np.unique(np.concatenate([np.geomspace(SHORTEST, LONGEST, _LENGTHS), tracked]))

    def __call__(self, sigma_rels: FloatArray) -> tuple[FloatArray, FloatArray]:
        outputs = np.full(sigma_rels.size, self._t_r), np.asarray(sigma_rel_to_gamma(sigma_rels))
        weights, error = solve(LeastSquaresProblem.of(self._t_i, self._gamma_i, *outputs), "constrain")
        return error, np.sqrt((weights**2).sum(0))


def gap_errors2(t: ArrayLike, gammas: ArrayLike, t_r: float, gammas_r: ArrayLike) -> FloatArray:
    """Return the squared relative error that each gap between snapshots adds, without the condition of sum 1.

    Args:
        t: Times of the snapshots, ascending, shape [steps], up to ``t_r``; each has all profiles.
        gammas: Exponents of the profiles, shape [profiles].
        t_r: Time of the requested averages.
        gammas_r: Exponents of the requested averages, shape [outputs].

    Returns:
        Squared errors, shape [steps, outputs]; the first row is the time before the first snapshot.

    Raises:
        ValueError: A time or an exponent is out of range.
    """
    snapshot_t, requested = times("t", t), exponents("gammas_r", gammas_r)
    tracked = -np.sort(-exponents("gammas", gammas))
    return interval_errors2(fit_intervals(snapshot_t, tracked, requested).residual, requested, snapshot_t / t_r)


def condition(t_i: ArrayLike, gamma_i: ArrayLike) -> float:
    """Return the condition number of the least squares: how close the stored profiles are to linear dependence.

    The matrix has the profiles, each of norm 1, as its columns; the equations of Alg. 3 have the square of its
    condition number. The solve in this package goes interval by interval and loses no digits to it. A large condition
    number still means weights that are large and of both signs (``weight_l2``).

    Args:
        t_i: Times of the averages, shape [inputs].
        gamma_i: Exponents of the averages, shape [inputs].

    Returns:
        At least 1; NaN for more than 1024 averages, and infinity if an average is passed twice.

    Raises:
        ValueError: As ``solve_weights``.
    """
    problem = LeastSquaresProblem.of(t_i, gamma_i, [np.max(np.asarray(t_i))], [0.0])
    if problem.t_i.size > _MAX_COLUMNS:
        return math.nan
    if problem.t_i.size > (problem.row >= 0).sum():
        return math.inf
    t, gamma, place = problem.t, problem.gamma, problem.at_gamma
    factor = fit_intervals(t, gamma, np.zeros(1)).factor  # [steps, profiles, profiles]
    # A profile of norm 1 is sqrt(2 gamma + 1) (t / t_i)**gamma / sqrt(t_i). On the interval that ends at t_j this is
    # v**gamma of norm in v, with v = t / t_j, times sqrt(2 gamma + 1) (t_j / t_i)**(gamma + 1/2). After t_i it is 0.
    reach = np.minimum(t[:, None] / problem.t_i, 1.0) ** (problem.gamma_i + 0.5)
    reach = np.where(t[:, None] <= problem.t_i, reach, 0.0) * np.sqrt(2 * problem.gamma_i + 1)
    columns = factor[:, :, place] * reach[:, None]  # coordinates on each interval, [steps, profiles, inputs]
    # Coordinates are orthonormal on each interval, so these are the singular values of the profiles in the L2 norm.
    singular = np.linalg.svd(columns.reshape(-1, problem.t_i.size), compute_uv=False)
    with np.errstate(divide="ignore"):
        return float(singular[0] / singular[-1])


def _groups(is_covered: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the first and the last place of each group of neighbors that are True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_covered, [False]]).astype(np.int8)))
    return [(int(first), int(after) - 1) for first, after in edges.reshape(-1, 2)]
