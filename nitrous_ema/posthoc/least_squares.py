"""Weights of snapshots by least squares (Karras et al. 2023, arXiv:2312.02696, appendix C, Alg. 3).

Between two kept times every power-function average is a combination of the tracked powers ``t**gamma``. The least
squares of Alg. 3 over all snapshots (Eq. 128-143) is therefore one small fit per interval between kept times, and its
squared error is the sum over the intervals. Nothing here forms the dense system, which is numerically singular from
about a thousand steps of three profiles on; the cost is linear in the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema.posthoc.intervals import PROFILES_LIMIT, Fits, fit_intervals, interval_errors2
from nitrous_ema.profile import FloatArray, exponents, times

Normalize: TypeAlias = Literal["constrain", "edm2"] | None

# Exponents closer than this (relative to gamma + 1) are one profile: written by two roundings of one sigma_rel.
_SAME_GAMMA = 1e-12


def solve_weights(
    t_i: ArrayLike, gamma_i: ArrayLike, t_r: ArrayLike, gamma_r: ArrayLike, *, normalize: Normalize = "constrain"
) -> FloatArray:
    """Weights of the snapshots whose sum has the profiles asked for, as nearly as least squares can.

    Costs O(steps * profiles**3) and is accurate to rounding at any number of steps. An input that is exactly an output
    gets weight 1 and all others 0.

    Args:
        t_i: Training times of the given averages, shape [inputs], > 0; any unit, any order.
        gamma_i: Their exponents, shape [inputs], > -0.5.
        t_r: Training times wanted, shape [outputs]. At each there must be an average at that time or before; what lies
            between the last of those and t_r cannot be made up for and counts as error.
        gamma_r: Exponents wanted, shape [outputs], > -0.5.
        normalize: ``"constrain"``: sum 1 is a condition of the fit. ``"edm2"``: the fit is divided by its sum, as
            EDM2's code does; never better. ``None``: the plain least squares of the paper.

    Returns:
        Weights, shape [inputs, outputs]. They are 0 for averages later than t_r and for repetitions of an earlier row.

    Raises:
        ValueError: Shapes that do not fit, numbers out of range, or no average at or before a wanted time.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Algorithm 3 and Eq. 128-143. The paper does not normalize.
    """
    problem = LeastSquaresProblem.of(t_i, gamma_i, t_r, gamma_r)
    return solve(problem, normalize)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The question: which averages there are, and which are wanted


@dataclass(frozen=True, slots=True, eq=False)
class LeastSquaresProblem:
    """Given averages sorted into a table of kept times and profiles, and the outputs."""

    t_i: FloatArray  # as given, [inputs]
    gamma_i: FloatArray
    t_r: FloatArray  # as given, [outputs]
    gamma_r: FloatArray
    t: FloatArray  # kept times, ascending, [steps]
    gamma: FloatArray  # profiles, descending, [profiles]
    at_time: NDArray[np.intp]  # place of each input in t
    at_gamma: NDArray[np.intp]  # place of each input in gamma
    row: NDArray[np.intp]  # first input with that time and profile, -1 where there is none, [steps, profiles]

    @classmethod
    def of(cls, t_i: ArrayLike, gamma_i: ArrayLike, t_r: ArrayLike, gamma_r: ArrayLike) -> LeastSquaresProblem:
        """The question of ``solve_weights``, checked."""
        ti, gi = _averages(("t_i", t_i), ("gamma_i", gamma_i))
        tr, gr = _averages(("t_r", t_r), ("gamma_r", gamma_r))
        if tr.min() < ti.min():
            raise ValueError(
                f"t_r has {tr.min():g}, but the earliest given average is of t = {ti.min():g}; expected a given "
                "average at or before every wanted time. Ask for a later time."
            )
        t, at_time = np.unique(ti, return_inverse=True)
        gamma, at_gamma = _profiles(gi)
        if gamma.size > PROFILES_LIMIT:
            raise ValueError(
                f"gamma_i has {gamma.size} different exponents; expected at most {PROFILES_LIMIT}. "
                "Leave some profiles out: more than four hardly help."
            )
        places, first = np.unique(at_time * gamma.size + at_gamma, return_index=True)
        row = np.full((t.size, gamma.size), -1, dtype=np.intp)
        row.flat[places] = first
        return cls(ti, gi, tr, gr, t, gamma, at_time, at_gamma, row)

    def targets(self) -> Iterator[TargetTime]:
        """Outputs grouped by time, each group with the averages that may be used for it."""
        powers = np.unique(np.append(self.gamma_r, 0.0))
        fits = fit_intervals(self.t, self.gamma, powers)
        for t_r in np.unique(self.t_r):
            steps = int(np.searchsorted(self.t, t_r, side="right"))
            outputs = np.flatnonzero(self.t_r == t_r)
            place = np.searchsorted(powers, self.gamma_r[outputs])
            yield TargetTime(
                outputs=outputs,
                row=self.row[:steps],
                tau=self.t[:steps] / t_r,
                ratio=self.t[: steps - 1] / self.t[1:steps],
                gamma=self.gamma,
                power=self.gamma_r[outputs],
                fit=Fits(fits.coefficients[:steps, :, place], fits.residual[:steps, place], fits.factor[:steps]),
                constant=fits.coefficients[:steps, :, np.searchsorted(powers, [0.0])],
            )

    def given_outputs(self) -> Iterator[tuple[int, int]]:
        """Outputs that are inputs, with their row."""
        for output, (t_r, gamma_r) in enumerate(zip(self.t_r, self.gamma_r, strict=True)):
            same = np.abs(self.gamma_i - gamma_r) <= _SAME_GAMMA * (gamma_r + 1)
            rows = np.flatnonzero(same & (self.t_i == t_r))
            if rows.size:
                yield output, int(rows[0])


class TargetTime(NamedTuple):
    """Everything about the outputs of one time t_r. Times are fractions of it, and so are integrals over time."""

    outputs: NDArray[np.intp]  # places in the problem's outputs
    row: NDArray[np.intp]  # [steps, profiles], inputs, -1 where there is none
    tau: FloatArray  # kept times / t_r, [steps]
    ratio: FloatArray  # each kept time but the last / the next one, [steps - 1]
    gamma: FloatArray  # [profiles]
    power: FloatArray  # exponents wanted, [outputs]
    fit: Fits
    constant: FloatArray  # coefficients of the fit of the constant 1, [steps, profiles, 1]


def _averages(given_times: tuple[str, ArrayLike], given_gammas: tuple[str, ArrayLike]) -> tuple[FloatArray, FloatArray]:
    """Times and exponents of averages, by their names, as two arrays [averages]."""
    t, gamma = times(*given_times), exponents(*given_gammas)
    if t.ndim != 1 or t.shape != gamma.shape or not t.size:
        raise ValueError(
            f"{given_times[0]} and {given_gammas[0]} have the shapes {t.shape} and {gamma.shape}; expected two 1-d "
            "arrays of one length, at least 1. Give one time and one exponent for each average."
        )
    return t, gamma


def _profiles(gamma_i: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """Distinct exponents, descending, and the place of each input among them."""
    gamma, inverse = np.unique(-gamma_i, return_inverse=True)
    new = np.append(True, np.diff(gamma) > _SAME_GAMMA * (1 - gamma[1:]))
    return -gamma[new], (np.cumsum(new) - 1)[inverse]


# ---------------------------------------------------------------------------------------------------------------------
# All intervals: weights and errors


def solve(problem: LeastSquaresProblem, normalize: Normalize) -> tuple[FloatArray, FloatArray]:
    """Weights [inputs, outputs] and relative errors [outputs]."""
    if normalize not in ("constrain", "edm2", None):
        raise ValueError(f"normalize is {normalize!r}; expected 'constrain', 'edm2' or None.")
    weights = np.zeros((problem.t_i.size, problem.t_r.size))
    error = np.empty(problem.t_r.size)
    for target in problem.targets():
        table, error2 = _least_squares(target)
        table, error2 = _normalized(target, table, error2, normalize)
        given = target.row >= 0
        weights[np.ix_(target.row[given], target.outputs)] = table[given]
        error[target.outputs] = np.sqrt(error2)
    for output, row in problem.given_outputs():
        weights[:, output] = 0.0
        weights[row, output] = 1.0
    return weights, error


def _least_squares(target: TargetTime) -> tuple[FloatArray, FloatArray]:
    """Weights [steps, profiles, outputs + 1] of the plain least squares, and squared relative errors [outputs].

    The last column is the fit of the constant 1 (the profile of exponent 0).
    """
    power = np.append(target.power, 0.0)
    coefficients = np.concatenate([target.fit.coefficients, target.constant], axis=-1)
    coefficients = coefficients * profile_heights(target, power)[:, None]
    error2 = unreachable(target)
    if (target.row < 0).any():
        coefficients, added = _fit_around_gaps(target, coefficients)
        error2 = error2 + added[:-1] / profile_norms2(target.power)
    following = np.zeros_like(coefficients)
    following[:-1] = coefficients[1:] * _carry(target)[..., None]
    per_profile = (target.tau[:, None] / (target.gamma + 1))[..., None]
    weights = (coefficients - following) * per_profile
    return np.where((target.row < 0)[..., None], 0.0, weights), error2


def _normalized(
    target: TargetTime, table: FloatArray, error2: FloatArray, normalize: Normalize
) -> tuple[FloatArray, FloatArray]:
    """The weights [steps, profiles, outputs] with the sum that was asked for, and their squared errors."""
    weights, constant = table[..., :-1], table[..., -1:]
    excess = weights.sum((0, 1)) - 1
    if normalize == "constrain":
        # The least change of the profile that changes the sum is along the fit of the constant 1, whose sum of weights
        # is its own squared norm.
        norm2 = constant.sum()
        return weights - constant * (excess / norm2), error2 + excess**2 / norm2 / profile_norms2(target.power)
    if normalize == "edm2":
        if (excess <= -1).any():
            raise ValueError(
                "the weights of the least squares do not have a positive sum; expected one to divide by. The given "
                'averages are far from the wanted ones: use normalize="constrain" or later averages.'
            )
        # The fit is orthogonal to what it misses, so scaling it adds the square of what the scaling takes away.
        return weights / (1 + excess), error2 + (excess / (1 + excess)) ** 2 * np.maximum(1 - error2, 0.0)
    return weights, error2


def profile_heights(target: TargetTime, power: FloatArray) -> FloatArray:
    """Profiles of these exponents (Eq. 121) at the kept times, [steps, powers]."""
    return np.asarray((power + 1) * target.tau[:, None] ** power)


def profile_norms2(power: FloatArray) -> FloatArray:
    """Squared L2 norm of the profiles of these exponents (Eq. 151 with itself)."""
    return (power + 1) ** 2 / (2 * power + 1)


def _carry(target: TargetTime) -> FloatArray:
    """Coefficient of v**gamma per coefficient on the next interval, where the power goes on, [steps - 1, profiles]."""
    return np.asarray(target.ratio[:, None] ** target.gamma)


def unreachable(target: TargetTime) -> FloatArray:
    """Squared error, relative to the norm, of the best fit on each interval and of nothing after the last one."""
    after_last = -np.expm1((2 * target.power + 1) * np.log(target.tau[-1]))
    return np.asarray(after_last + interval_errors2(target.fit.residual, target.power, target.tau).sum(0))


def _fit_around_gaps(target: TargetTime, wanted: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Coefficients nearest to ``wanted`` where not every time has every profile, and the squared errors this adds.

    Where a time lacks a profile, that profile's coefficient just before it is carried over from the next interval. The
    least squares is then block-bidiagonal: one QR of the factor, eliminated forward in time, then back-substitution.

    Args:
        target: Times, profiles and factors.
        wanted: Coefficients of v**gamma fitted on each interval alone, [steps, profiles, powers].
    """
    steps, profiles, powers = wanted.shape
    absent, carry = target.row < 0, np.vstack([_carry(target), np.zeros(profiles)])  # nothing goes on after the last
    factor = target.fit.factor * np.sqrt(target.tau)[:, None, None]
    added, eliminated = np.zeros(powers), []
    prior, prior_wanted = np.zeros((0, profiles)), np.zeros((0, powers))
    for j in range(steps):
        free, tied = np.flatnonzero(~absent[j]), np.flatnonzero(absent[j])
        rows = np.vstack([prior, factor[j]])[:, np.append(free, tied)]
        rows[:, free.size :] *= carry[j, tied]
        values = np.vstack([prior_wanted, factor[j] @ wanted[j]])
        q, r = np.linalg.qr(rows)
        inside = q.T @ values
        added += ((values - q @ inside) ** 2).sum(0)
        eliminated.append((free, tied, r[: free.size], inside[: free.size]))
        prior, prior_wanted = np.zeros((tied.size, profiles)), inside[free.size :]
        prior[:, tied] = r[free.size :, free.size :]
    coefficients = np.zeros((steps + 1, profiles, powers))
    for j in reversed(range(steps)):
        free, tied, r, inside = eliminated[j]
        coefficients[j, tied] = coefficients[j + 1, tied] * carry[j, tied, None]
        rest = inside - r[:, free.size :] @ coefficients[j + 1, tied]
        coefficients[j, free] = _smallest_solution(r[:, : free.size], rest)
    return coefficients[:steps], added + (prior_wanted**2).sum(0)


def _smallest_solution(matrix: FloatArray, values: FloatArray) -> FloatArray:
    """Solution of least norm, of columns made equally long first."""
    length = np.sqrt((matrix**2).sum(0))
    length[length == 0] = 1.0
    solution: FloatArray = np.linalg.lstsq(matrix / length, values, rcond=None)[0]
    return np.asarray(solution / length[:, None])
