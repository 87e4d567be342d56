"""Weights that amplify the rounding of stored snapshots less, at the price of a profile error that is allowed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema.posthoc.least_squares import (
    LeastSquaresProblem,
    TargetTime,
    profile_heights,
    profile_norms2,
    solve,
    unreachable,
)
from nitrous_ema.profile import FloatArray, numbers_between

# Larger systems keep the weights of least error. Many columns come from few profiles, wide ranges and small tolerances,
# where there is next to nothing to gain, and a few hundred steps already take a few tenths of a second.
_MOST_COLUMNS = 1024
# Weights of norm 1 amplify nothing: a sum of averages is then no noisier than one of them.
_QUIET = 1.0
# Prices of |w|**2 in squared relative error: powers of 10 from this exponent on, in steps. Only whole steps are tried:
# what rounding does to the errors compared then changes no bit of the weights.
_LEAST_PRICE, _PRICES_PER_DECADE, _PRICES = -24, 16, 26 * 16


def least_amplifying_weights(
    t_i: ArrayLike, gamma_i: ArrayLike, t_r: ArrayLike, gamma_r: ArrayLike, *, within: ArrayLike
) -> FloatArray:
    """Weights of sum 1 with the least ``|w|_2`` among those whose profile errors stay within a limit.

    Rounding errors of stored snapshots are independent and add up to ``|w|_2`` times one of them. Where that norm is
    at most 1 with the weights of ``solve_weights``, these are returned: nothing is amplified, and no error is spent.
    In the same way no more error is spent than brings the norm down to 1.

    Args:
        t_i: As in ``solve_weights``, and so are ``gamma_i``, ``t_r`` and ``gamma_r``.
        gamma_i: Exponents of the given averages, shape [inputs].
        t_r: Training times wanted, shape [outputs].
        gamma_r: Exponents wanted, shape [outputs].
        within: Largest relative profile error of each output, shape [outputs] or one number, >= 0. An output whose
            least error is not below it gets the weights of ``solve_weights``. So do all where some time lacks a
            profile, or where there are more than 1024 averages.

    Returns:
        Weights, shape [inputs, outputs].

    Raises:
        ValueError: As ``solve_weights``; also limits that are negative, or neither one nor as many as the outputs.

    Source:
        The least squares of Karras et al. 2023, arXiv:2312.02696, Eq. 128-143, with a price on ``|w|**2`` (Tikhonov),
        raised by bisection until the error reaches its limit or the norm reaches 1.
    """
    problem = LeastSquaresProblem.of(t_i, gamma_i, t_r, gamma_r)
    limit = numbers_between("within", within, 0.0, or_low=True, remedy="Give the errors that are allowed.")
    if limit.shape not in ((), problem.t_r.shape):
        raise ValueError(f"within has the shape {limit.shape}; expected one number, or one for each output.")
    limit2 = np.broadcast_to(limit, problem.t_r.shape) ** 2
    weights, _ = solve(problem, "constrain")
    loud = np.linalg.norm(weights, axis=0) > _QUIET
    for target in problem.targets() if loud.any() else ():
        own = np.flatnonzero(loud[target.outputs])
        if own.size and target.row.size <= _MOST_COLUMNS and (target.row >= 0).all():
            outputs = target.outputs[own]
            there = np.ix_(target.row.ravel(), outputs)
            weights[there] = _PenalizedFit.of(target, own).largest_penalty(limit2[outputs], weights[there])
    return weights


class _PenalizedFit(NamedTuple):
    """Fits of some outputs of one time, in which the squared norm of the weights has a price, one for each output.

    Coefficients are those of ``least_squares``: the fit is one block per interval, and the weights are differences of
    neighbours. So it is a block-bidiagonal least squares again, with one QR of small blocks per step. (One large
    decomposition would be shorter, but its last bits depend on the number of threads.)
    """

    target: TargetTime
    outputs: NDArray[np.intp]  # places in the target's outputs
    factor: FloatArray  # takes coefficients to coordinates, [steps, profiles, profiles]
    wanted: FloatArray  # coordinates of the profiles wanted, and of the constant 1, [outputs, steps, profiles, 2]
    per_profile: FloatArray  # weight per difference of coefficients, [steps, profiles]
    carry: FloatArray  # what the next interval's coefficient counts in that difference, [steps, profiles]

    @classmethod
    def of(cls, target: TargetTime, outputs: NDArray[np.intp]) -> _PenalizedFit:
        factor = target.fit.factor * np.sqrt(target.tau)[:, None, None]
        heights = profile_heights(target, target.power[outputs])[:, None]
        fits = factor @ (target.fit.coefficients[..., outputs] * heights)
        constant = np.broadcast_to(factor @ target.constant, fits.shape)
        wanted = np.stack([fits, constant], axis=-1).transpose(2, 0, 1, 3)
        carry = np.vstack([target.ratio[:, None] ** target.gamma, np.zeros(target.gamma.size)])
        return cls(target, outputs, factor, wanted, target.tau[:, None] / (target.gamma + 1), carry)

    def largest_penalty(self, limit2: FloatArray, kept: FloatArray) -> FloatArray:
        """Weights [steps * profiles, outputs] at the highest price that the limits allow; ``kept`` where none is."""
        low, high = np.zeros(limit2.size, np.intp), np.full(limit2.size, _PRICES)
        while (high - low > 1).any():
            middle = (low + high) // 2
            weights, error2 = self.solve(middle)
            allowed = (error2 <= limit2) & ((weights**2).sum(0) >= _QUIET)
            low, high = np.where(allowed, middle, low), np.where(allowed, high, middle)
            kept = np.where(allowed, weights, kept)
        return kept

    def solve(self, price: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
        """Weights of sum 1 [steps * profiles, outputs] and squared errors [outputs] at these prices."""
        root = 10.0 ** ((_LEAST_PRICE + price / _PRICES_PER_DECADE) / 2)
        coefficients = self._solve(root[:, None, None])
        following = np.zeros_like(coefficients)
        following[:, :-1] = coefficients[:, 1:]
        both = (coefficients - self.carry[..., None] * following) * self.per_profile[..., None]
        sums = both.sum((1, 2))
        share = np.array([np.ones_like(sums[:, 0]), (1 - sums[:, 0]) / sums[:, 1]]).T[:, None, None]
        missed = (self.factor @ coefficients * share).sum(-1) - self.wanted[..., 0]
        power = self.target.power[self.outputs]
        error2 = unreachable(self.target)[self.outputs] + (missed**2).sum((1, 2)) / profile_norms2(power)
        return (both * share).sum(-1).reshape(power.size, -1).T, error2

    def _solve(self, root: FloatArray) -> FloatArray:
        """Coefficients [outputs, steps, profiles, 2] of the fits at these square roots of prices, [outputs, 1, 1]."""
        outputs, steps, profiles, _ = self.wanted.shape
        own, after = slice(profiles), slice(profiles, None)  # columns: coefficients of this and of the next interval
        prior, fit, norm = slice(profiles), slice(profiles, 2 * profiles), slice(2 * profiles, None)  # rows
        rows, values = np.zeros((outputs, 3 * profiles, 2 * profiles)), np.zeros((outputs, 3 * profiles, 2))
        eliminated = []
        for j in range(steps):
            rows[:, fit, own], values[:, fit] = self.factor[j], self.wanted[:, j]
            weight_of_own = root * np.diag(self.per_profile[j])
            rows[:, norm, own], rows[:, norm, after] = weight_of_own, -weight_of_own * self.carry[j]
            q, r = np.linalg.qr(rows)
            inside = q.swapaxes(1, 2) @ values
            eliminated.append((r[:, own, own], r[:, own, after], inside[:, own]))
            rows[:, prior, own], values[:, prior] = r[:, after, after], inside[:, after]
        coefficients = np.zeros((outputs, steps + 1, profiles, 2))
        for j in reversed(range(steps)):
            of_own, of_next, inside = eliminated[j]
            coefficients[:, j] = np.linalg.solve(of_own, inside - of_next @ coefficients[:, j + 1])
        return coefficients[:, :-1]
