"""Weights that amplify the rounding of stored snapshots less, at the cost of an allowed profile error.

The least-squares weights can be large and of both signs, and the rounding of the snapshots is multiplied by their norm.
A penalty on ``|w|**2`` (Tikhonov regularization) lowers the norm and raises the profile error. For each output the
search finds the largest penalty whose profile error is within the limit.
"""

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

# Larger systems get the weights of least error. Many columns come from few profiles, wide ranges and small tolerances,
# where almost nothing can be gained, and a few hundred steps already take a few tenths of a second.
_MAX_COLUMNS = 1024
# Weights of norm 1 amplify nothing: the sum is then no noisier than one average.
_NO_AMPLIFICATION = 1.0
# Penalties on |w|**2 in squared relative error: powers of 10 from this exponent on, in steps. Only whole steps are
# tried, so that rounding of the compared errors changes no bit of the weights.
_LEAST_PENALTY, _PENALTIES_PER_DECADE, _PENALTIES = -24, 16, 26 * 16


def least_amplifying_weights(
    t_i: ArrayLike, gamma_i: ArrayLike, t_r: ArrayLike, gamma_r: ArrayLike, *, within: ArrayLike
) -> FloatArray:
    """Return the weights of sum 1 with the least ``|w|_2`` whose profile errors are within a limit.

    Rounding errors of stored snapshots are independent, so their sum is ``|w|_2`` times the rounding error of one
    snapshot. Where this norm is at most 1 with the weights of ``solve_weights``, nothing is amplified, and these
    weights are returned. Profile error is added only until the norm is 1.

    Args:
        t_i: As in ``solve_weights``, like ``gamma_i``, ``t_r`` and ``gamma_r``.
        gamma_i: Exponents of the stored averages, shape [inputs].
        t_r: Training times of the requested averages, shape [outputs].
        gamma_r: Exponents of the requested averages, shape [outputs].
        within: Largest relative profile error of each output, shape [outputs] or one number, >= 0. An output whose
            least error is not below it gets the weights of ``solve_weights``. So do all outputs where some time lacks a
            profile, or where there are more than 1024 averages.

    Returns:
        Weights, shape [inputs, outputs].

    Raises:
        ValueError: As ``solve_weights``; also negative limits, or limits that are not one number or one per output.

    Source:
        The least squares of Karras et al. 2023, arXiv:2312.02696, Eq. 128-143, with a penalty on ``|w|**2`` (Tikhonov),
        raised by bisection until the error reaches its limit or the norm reaches 1.
    """
    problem = LeastSquaresProblem.of(t_i, gamma_i, t_r, gamma_r)
    limit = numbers_between("within", within, 0.0, or_low=True, remedy="Give the largest allowed profile errors.")
    if limit.shape not in ((), problem.t_r.shape):
        raise ValueError(f"within has the shape {limit.shape}; expected one number, or one for each output.")
    limit2 = np.broadcast_to(limit, problem.t_r.shape) ** 2
    weights, _ = solve(problem, "constrain")
    amplifying = np.linalg.norm(weights, axis=0) > _NO_AMPLIFICATION
    for target in problem.targets() if amplifying.any() else ():
        own = np.flatnonzero(amplifying[target.outputs])
        if own.size and target.row.size <= _MAX_COLUMNS and (target.row >= 0).all():
            outputs = target.outputs[own]
            entries = np.ix_(target.row.ravel(), outputs)
            weights[entries] = _PenalizedFit.of(target, own).largest_penalty(limit2[outputs], weights[entries])
    return weights


class _PenalizedFit(NamedTuple):
    """Fits of some outputs of one time with a penalty on the squared norm of the weights, one penalty per output.

    Coefficients are those of ``least_squares``: the fit is one block per interval, and weights are differences of
    neighboring coefficients. So this is again a block-bidiagonal least squares, with one QR of small blocks per step.
    One large decomposition would be shorter, but its last bits depend on the number of threads.
    """

    target: TargetTime
    outputs: NDArray[np.intp]  # places in the target's outputs
    factor: FloatArray  # maps coefficients to coordinates, [steps, profiles, profiles]
    wanted: FloatArray  # coordinates of the requested profiles, and of the constant 1, [outputs, steps, profiles, 2]
    per_profile: FloatArray  # weight per difference of coefficients, [steps, profiles]
    carry: FloatArray  # factor of the next interval's coefficient in that difference, [steps, profiles]

    @classmethod
    def of(cls, target: TargetTime, outputs: NDArray[np.intp]) -> _PenalizedFit:
        factor = target.fit.factor * np.sqrt(target.tau)[:, None, None]
        heights = profile_heights(target, target.power[outputs])[:, None]
        fits = factor @ (target.fit.coefficients[..., outputs] * heights)
        constant = np.broadcast_to(factor @ target.constant, fits.shape)
        wanted = np.stack([fits, constant], axis=-1).transpose(2, 0, 1, 3)
        carry = np.vstack([target.ratio[:, None] ** target.gamma, np.zeros(target.gamma.size)])
        return cls(target, outputs, factor, wanted, target.tau[:, None] / (target.gamma + 1), carry)

    def largest_penalty(self, limit2: FloatArray, fallback: FloatArray) -> FloatArray:
        """Return the weights at the largest penalty within each limit, [steps * profiles, outputs].

        Args:
            limit2: Largest squared relative error of each output, [outputs].
            fallback: Weights of outputs that no penalty keeps within the limit, [steps * profiles, outputs].
        """
        low, high = np.zeros(limit2.size, np.intp), np.full(limit2.size, _PENALTIES)
        while (high - low > 1).any():
            middle = (low + high) // 2
            weights, error2 = self.solve(middle)
            # A norm below 1 adds error without need, so its penalty counts as too large.
            allowed = (error2 <= limit2) & ((weights**2).sum(0) >= _NO_AMPLIFICATION)
            low, high = np.where(allowed, middle, low), np.where(allowed, high, middle)
            fallback = np.where(allowed, weights, fallback)
        return fallback

    def solve(self, penalty: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
        """Return weights of sum 1 [steps * profiles, outputs] and squared relative errors [outputs] at these penalties.

        Args:
            penalty: Steps of the penalty above the least one, [outputs].
        """
        root = 10.0 ** ((_LEAST_PENALTY + penalty / _PENALTIES_PER_DECADE) / 2)
        coefficients = self._solve(root[:, None, None])
        following = np.zeros_like(coefficients)
        following[:, :-1] = coefficients[:, 1:]
        both = (coefficients - self.carry[..., None] * following) * self.per_profile[..., None]
        sums = both.sum((1, 2))
        # The sum is corrected by adding a multiple of the penalized fit of the constant 1, as in least_squares.
        share = np.array([np.ones_like(sums[:, 0]), (1 - sums[:, 0]) / sums[:, 1]]).T[:, None, None]
        missed = (self.factor @ coefficients * share).sum(-1) - self.wanted[..., 0]
        power = self.target.power[self.outputs]
        error2 = unreachable(self.target)[self.outputs] + (missed**2).sum((1, 2)) / profile_norms2(power)
        return (both * share).sum(-1).reshape(power.size, -1).T, error2

    def _solve(self, root: FloatArray) -> FloatArray:
        """Return the coefficients [outputs, steps, profiles, 2] at these square roots of penalties, [outputs, 1, 1].

        Each step has three blocks of rows: the rest of the previous steps, the fit on its interval, and the penalty.
        """
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
