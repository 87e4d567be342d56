"""Weights of snapshots by least squares (Karras et al. 2023, arXiv:2312.02696, appendix C, Alg. 3).

Alg. 3 solves one dense system over all snapshots (Eq. 128-143). From about a thousand steps of three profiles on, this
system is numerically singular. This module never forms it. Between two snapshot times every power-function average is a
combination of the tracked powers ``t**gamma``. The least squares is therefore one small fit per interval between
snapshot times, and its squared error is the sum over the intervals. The cost is linear in the number of steps.

The code goes from the outside in: ``solve_weights`` is the public function, ``LeastSquaresProblem`` the checked input,
``TargetTime`` the fits that all outputs of one time share, and ``solve`` combines the fits into weights and errors.

Longer than 300 lines because the weights, their normalization and the solve around gaps are one derivation.
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

# Exponents closer than this (relative to gamma + 1) are one profile: they differ by the rounding of one sigma_rel.
_SAME_GAMMA = 1e-12


def solve_weights(
    t_i: ArrayLike, gamma_i: ArrayLike, t_r: ArrayLike, gamma_r: ArrayLike, *, normalize: Normalize = "constrain"
) -> FloatArray:
    """Return the weights with which the stored averages sum to the requested averages, by least squares of profiles.

    Costs O(steps * profiles**3) and is accurate to rounding at any number of steps. An output that is one of the inputs
    gets weight 1 for this input and 0 for all others.

    Args:
        t_i: Training times of the stored averages, shape [inputs], > 0; any unit, any order.
        gamma_i: Exponents of the stored averages, shape [inputs], > -0.5.
        t_r: Training times of the requested averages, shape [outputs]. Each needs a stored average at that time or
            before. The time between the last such average and t_r has no data and counts as error.
        gamma_r: Exponents of the requested averages, shape [outputs], > -0.5.
        normalize: ``"constrain"``: sum 1 is a condition of the fit. ``"edm2"``: the fit is divided by its sum, as
            EDM2's code does; never more accurate. ``None``: the plain least squares of the paper.

    Returns:
        Weights, shape [inputs, outputs]. They are 0 for averages later than t_r and for repetitions of an earlier row.

    Raises:
        ValueError: Shapes differ, numbers are out of range, or a requested time has no average at or before it.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Algorithm 3 and Eq. 128-143. The paper does not normalize.
    """
    problem = LeastSquaresProblem.of(t_i, gamma_i, t_r, gamma_r)
    return solve(problem, normalize)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Input: stored averages and requested averages


@dataclass(frozen=True, slots=True, eq=False)
class LeastSquaresProblem:
    """Checked input of a solve: stored averages in a table of times and profiles, and the outputs."""

    t_i: FloatArray  # in the caller's order, [inputs]
    gamma_i: FloatArray
    t_r: FloatArray  # in the caller's order, [outputs]
    gamma_r: FloatArray
    t: FloatArray  # distinct snapshot times, ascending, [steps]
    gamma: FloatArray  # distinct exponents, descending, [profiles]
    at_time: NDArray[np.intp]  # place of each input in t
    at_gamma: NDArray[np.intp]  # place of each input in gamma
    row: NDArray[np.intp]  # first input with this time and profile, -1 for a missing average, [steps, profiles]

    @classmethod
    def of(cls, t_i: ArrayLike, gamma_i: ArrayLike, t_r: ArrayLike, gamma_r: ArrayLike) -> LeastSquaresProblem:
        """Check the arguments of ``solve_weights`` and sort them.

        Raises:
            ValueError: As ``solve_weights``.
        """
        ti, gi = _averages(("t_i", t_i), ("gamma_i", gamma_i))
        tr, gr = _averages(("t_r", t_r), ("gamma_r", gamma_r))
        if tr.min() < ti.min():
            raise ValueError(
                f"t_r has {tr.min():g}, but the earliest average in t_i has t = {ti.min():g}; expected an average at "
                "or before every requested time. Request a later time."
            )
        t, at_time = np.unique(ti, return_inverse=True)
        gamma, at_gamma = _profiles(gi)
        if gamma.size > PROFILES_LIMIT:
            raise ValueError(
                f"gamma_i has {gamma.size} different exponents; expected at most {PROFILES_LIMIT}. "
                "Use fewer profiles: more than four hardly help."
            )
        places, first = np.unique(at_time * gamma.size + at_gamma, return_index=True)
        row = np.full((t.size, gamma.size), -1, dtype=np.intp)
        row.flat[places] = first
        return cls(ti, gi, tr, gr, t, gamma, at_time, at_gamma, row)

    def targets(self) -> Iterator[TargetTime]:
        """Yield the outputs grouped by time, each group with the averages up to that time."""
        # Exponent 0 is the constant 1, which _normalized needs. The fits do not depend on t_r, so they are made once.
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

    def outputs_among_inputs(self) -> Iterator[tuple[int, int]]:
        """Yield each output that is one of the inputs, with the place of that input."""
        for output, (t_r, gamma_r) in enumerate(zip(self.t_r, self.gamma_r, strict=True)):
            same = np.abs(self.gamma_i - gamma_r) <= _SAME_GAMMA * (gamma_r + 1)
            rows = np.flatnonzero(same & (self.t_i == t_r))
            if rows.size:
                yield output, int(rows[0])


class TargetTime(NamedTuple):
    """Fits for the outputs of one time t_r. Times, and integrals over time, are fractions of t_r."""

    outputs: NDArray[np.intp]  # places in the problem's outputs
    row: NDArray[np.intp]  # places in the problem's inputs, -1 for a missing average, [steps, profiles]
    tau: FloatArray  # snapshot times / t_r, [steps]
    ratio: FloatArray  # each snapshot time but the last / the next one, [steps - 1]
    gamma: FloatArray  # tracked exponents, descending, [profiles]
    power: FloatArray  # requested exponents, [outputs]
    fit: Fits
    constant: FloatArray  # coefficients of the fit of the constant 1, [steps, profiles, 1]


def _averages(named_times: tuple[str, ArrayLike], named_gammas: tuple[str, ArrayLike]) -> tuple[FloatArray, FloatArray]:
    """Return times and exponents of averages as two arrays [averages]; each argument is a name and its value."""
    t, gamma = times(*named_times), exponents(*named_gammas)
    if t.ndim != 1 or t.shape != gamma.shape or not t.size:
        raise ValueError(
            f"{named_times[0]} and {named_gammas[0]} have the shapes {t.shape} and {gamma.shape}; expected two 1-d "
            "arrays of the same length, at least 1. Give one time and one exponent for each average."
        )
    return t, gamma


def _profiles(gamma_i: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """Return the distinct exponents, descending, and the place of each input among them."""
    gamma, inverse = np.unique(-gamma_i, return_inverse=True)
    new = np.append(True, np.diff(gamma) > _SAME_GAMMA * (1 - gamma[1:]))
    return -gamma[new], (np.cumsum(new) - 1)[inverse]


# ---------------------------------------------------------------------------------------------------------------------
# Solution: weights and errors from the fits of all intervals


def solve(problem: LeastSquaresProblem, normalize: Normalize) -> tuple[FloatArray, FloatArray]:
    """Return the weights [inputs, outputs] and the relative profile errors [outputs].

    Raises:
        ValueError: ``normalize`` is unknown, or ``"edm2"`` has no positive sum to divide by.
    """
    if normalize not in ("constrain", "edm2", None):
        raise ValueError(f"normalize is {normalize!r}; expected 'constrain', 'edm2' or None.")
    weights = np.zeros((problem.t_i.size, problem.t_r.size))
    error = np.empty(problem.t_r.size)
    for target in problem.targets():
        table, error2 = _least_squares(target)
        table, error2 = _normalized(target, table, error2, normalize)
        present = target.row >= 0
        weights[np.ix_(target.row[present], target.outputs)] = table[present]
        error[target.outputs] = np.sqrt(error2)
    # The fit would give such an output up to rounding. With these weights the stored average is returned to the bit.
    for output, row in problem.outputs_among_inputs():
        weights[:, output] = 0.0
        weights[row, output] = 1.0
    return weights, error


def _least_squares(target: TargetTime) -> tuple[FloatArray, FloatArray]:
    """Return weights [steps, profiles, outputs + 1] of the plain least squares, and squared relative errors [outputs].

    The last column is the fit of the constant 1 (the profile of exponent 0).
    """
    power = np.append(target.power, 0.0)
    coefficients = np.concatenate([target.fit.coefficients, target.constant], axis=-1)
    coefficients = coefficients * profile_heights(target, power)[:, None]
    error2 = unreachable(target)
    if (target.row < 0).any():
        coefficients, added = _fit_around_gaps(target, coefficients)
        error2 = error2 + added[:-1] / profile_norms2(target.power)
    # The profile of an average covers all intervals up to its time. So the coefficient on an interval sums the averages
    # at its end and later, and the averages at its end are the difference from the next interval's coefficient. By
    # Eq. 121 an average of weight 1 has the coefficient (gamma + 1) / tau on the interval that ends at its time.
    following = np.zeros_like(coefficients)
    following[:-1] = coefficients[1:] * _carry(target)[..., None]
    per_profile = (target.tau[:, None] / (target.gamma + 1))[..., None]
    weights = (coefficients - following) * per_profile
    return np.where((target.row < 0)[..., None], 0.0, weights), error2


def _normalized(
    target: TargetTime, table: FloatArray, error2: FloatArray, normalize: Normalize
) -> tuple[FloatArray, FloatArray]:
    """Return the weights [steps, profiles, outputs] normalized as requested, and their squared relative errors."""
    weights, constant = table[..., :-1], table[..., -1:]
    excess = weights.sum((0, 1)) - 1
    if normalize == "constrain":
        # The smallest change of the profile that corrects the sum is along the fit of the constant 1. The weights of
        # this fit sum to its own squared norm.
        norm2 = constant.sum()
        return weights - constant * (excess / norm2), error2 + excess**2 / norm2 / profile_norms2(target.power)
    if normalize == "edm2":
        if (excess <= -1).any():
            raise ValueError(
                "normalize is 'edm2', but the least-squares weights do not have a positive sum to divide by. The "
                'averages are too far from the requested profiles: use normalize="constrain" or later averages.'
            )
        # The fit is orthogonal to its residual, so the squared change of the fit adds to the squared error.
        return weights / (1 + excess), error2 + (excess / (1 + excess)) ** 2 * np.maximum(1 - error2, 0.0)
    return weights, error2


def profile_heights(target: TargetTime, power: FloatArray) -> FloatArray:
    """Return the profiles of these exponents (Eq. 121) at the snapshot times, [steps, powers]."""
    return np.asarray((power + 1) * target.tau[:, None] ** power)


def profile_norms2(power: FloatArray) -> FloatArray:
    """Return the squared L2 norm of the profiles of these exponents (Eq. 151 of a profile with itself)."""
    return (power + 1) ** 2 / (2 * power + 1)


def _carry(target: TargetTime) -> FloatArray:
    """Return each coefficient per coefficient of the same power on the next interval, [steps - 1, profiles]."""
    return np.asarray(target.ratio[:, None] ** target.gamma)


def unreachable(target: TargetTime) -> FloatArray:
    """Return the squared relative error that no weights avoid, [outputs].

    It is the residual of the best fit on each interval, plus the whole profile after the last snapshot.
    """
    # expm1, because 1 - tau**(2 power + 1) would lose its digits where the last snapshot is just before t_r.
    after_last = -np.expm1((2 * target.power + 1) * np.log(target.tau[-1]))
    return np.asarray(after_last + interval_errors2(target.fit.residual, target.power, target.tau).sum(0))


def _fit_around_gaps(target: TargetTime, wanted: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the coefficients nearest to ``wanted`` where some times lack profiles, and the squared errors this adds.

    Where a time lacks a profile, no weight can change this profile's coefficient there: on the interval before, the
    coefficient is that of the next interval. Such a coefficient is tied, the others are free. The least squares is then
    block-bidiagonal: one small QR per interval, forward in time, then back-substitution.

    Args:
        target: Times, profiles and factors.
        wanted: Coefficients of v**gamma fitted on each interval alone, [steps, profiles, powers].

    Returns:
        Coefficients [steps, profiles, powers], and squared errors [powers], not divided by the profiles' norms.
    """
    steps, profiles, powers = wanted.shape
    # After the last snapshot there is no interval, so coefficients that are tied there are 0.
    absent, carry = target.row < 0, np.vstack([_carry(target), np.zeros(profiles)])
    # A fit measures in v = t / t_j. The root of tau turns its squares into integrals over time.
    factor = target.fit.factor * np.sqrt(target.tau)[:, None, None]
    added, eliminated = np.zeros(powers), []
    prior, prior_wanted = np.zeros((0, profiles)), np.zeros((0, powers))
    for j in range(steps):
        free, tied = np.flatnonzero(~absent[j]), np.flatnonzero(absent[j])
        rows = np.vstack([prior, factor[j]])[:, np.append(free, tied)]
        rows[:, free.size :] *= carry[j, tied]  # a tied column belongs to the unknown of the next interval
        values = np.vstack([prior_wanted, factor[j] @ wanted[j]])
        q, r = np.linalg.qr(rows)
        inside = q.T @ values
        added += ((values - q @ inside) ** 2).sum(0)  # outside the span of all columns: no unknown reduces it
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
    """Return the least-norm solution of a least squares, after scaling the columns to equal length.

    The scaling keeps the rank that ``lstsq`` finds independent of the sizes of the columns.
    """
    length = np.sqrt((matrix**2).sum(0))
    length[length == 0] = 1.0
    solution: FloatArray = np.linalg.lstsq(matrix / length, values, rcond=None)[0]
    return np.asarray(solution / length[:, None])
