"""The cost of an interval without a snapshot: the squared error that it adds to a requested average.

Searches compare thousands of sets of snapshot times, and one solve for each set would be too slow. The fit on an
interval depends only on the ratio of its ends. So for each requested exponent one function of the log-width ``h``
serves every pair of times: an interval that ends at ``t`` adds ``(t / t_r)**(2 gamma + 1) cost(h)`` to the squared
relative error of the average at ``t_r``. Searches read this function from a table. Reported errors come from the fits
themselves.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.posthoc.intervals import fit_from_zero, fit_widths, interval_errors2
from nitrous_ema.profile import FloatArray

_LOG_STEP = 0.02  # between the logarithms of neighboring widths in the table
# Only every third node is fitted: a polynomial of degree 5 between nodes that are 0.06 apart is accurate to 1e-6.
_NODES_PER_FIT = 3
# Below the first width the costs are powers of the width to better than 1 %, and far below any useful tolerance. An
# interval beyond the last width costs as much as one that begins at time 0 (to exp(-16) for exponents above 0).
_FIRST_WIDTH, _LAST_WIDTH = 1e-4, 16.0
_SMALLEST_LOG = -690.0  # replaces the logarithm of 0: a requested exponent that is tracked costs nothing

INTERPOLATION_ERROR = 5e-4
"""Bound on the relative error of a cost read from the table (measured: 1.4e-4 with two profiles, 2.8e-4 with six)."""


@dataclass(frozen=True, slots=True, eq=False)
class IntervalCost:
    """Squared relative error that an interval adds to each requested average, as a table over its log-width."""

    powers: FloatArray
    """Requested exponents, [targets], in the caller's order."""
    orders: int
    """Number of tracked profiles. The cost of narrow intervals is proportional to width**(2 * orders + 1)."""
    widths: FloatArray
    """Log-widths of the table, evenly spaced in their own logarithm, [nodes]."""
    log_cost: FloatArray
    """Logarithm of the cost of an interval that ends at t_r, [nodes, targets]; it never decreases with the width."""
    from_zero: FloatArray
    """Cost of the interval from time 0 to t_r, [targets]."""

    @classmethod
    def of(cls, gammas: FloatArray, powers: FloatArray) -> IntervalCost:
        """Return the table for these tracked and requested exponents; the last few tables are cached."""
        return _table(tuple(gammas.tolist()), tuple(powers.tolist()))

    def of_widths(self, width: FloatArray) -> FloatArray:
        """Return the cost of intervals of these log-widths that end at t_r, [..., targets].

        An infinite width is an interval that begins at time 0.
        """
        node, fraction = self.locate(width)
        below, above = self.log_cost[node], self.log_cost[node + 1]
        cost = np.exp(below + fraction[..., None] * (above - below))
        return np.where(np.isinf(width)[..., None], self.from_zero, cost)

    def locate(self, width: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
        """Return the node below each log-width, and its position from there as a fraction of the way to the next node.

        The fraction is negative for widths below the first node: costs are then extrapolated.
        """
        with np.errstate(divide="ignore"):
            position = np.log(np.minimum(width, _LAST_WIDTH) / _FIRST_WIDTH) / _LOG_STEP
        position = np.maximum(position, _SMALLEST_LOG)
        node = np.clip(position.astype(np.intp), 0, self.widths.size - 2)
        return node, position - node

    def weights(self, log_t: FloatArray, log_t_r: FloatArray) -> FloatArray:
        """Return the factors on the cost of intervals that end at these times, [times, targets]; 0 after the target."""
        log_tau = log_t[:, None] - log_t_r
        weight = np.exp((2 * self.powers + 1) * np.minimum(log_tau, 0.0))
        return np.asarray(np.where(log_tau > 0, 0.0, weight))

    def errors2(self, log_t: FloatArray, log_t_r: FloatArray) -> FloatArray:
        """Return the squared relative errors [targets] with snapshots at these times, which include the targets'."""
        width = np.diff(log_t, prepend=-np.inf)
        return np.asarray((self.of_widths(width) * self.weights(log_t, log_t_r)).sum(0))


@functools.lru_cache(maxsize=8)
def _table(gammas: tuple[float, ...], powers: tuple[float, ...]) -> IntervalCost:
    gamma, power = -np.sort(-np.array(gammas)), np.array(powers)
    fitted = 6 + int(np.log(_LAST_WIDTH / _FIRST_WIDTH) / (_NODES_PER_FIT * _LOG_STEP))
    widths = _FIRST_WIDTH * np.exp(_LOG_STEP * np.arange(_NODES_PER_FIT * (fitted - 1) + 1))
    at_target = np.ones(fitted)
    cost = interval_errors2(fit_widths(widths[::_NODES_PER_FIT], gamma, power).residual, power, at_target)
    from_zero = interval_errors2(fit_from_zero(gamma, power).residual[None], power, at_target[:1])[0]
    with np.errstate(divide="ignore"):
        log_cost = np.maximum(np.log(cost), _SMALLEST_LOG)
    # A binary search for a width by its cost needs costs that never decrease; interpolation does not guarantee this.
    log_cost = np.maximum.accumulate(_interpolated(log_cost, _NODES_PER_FIT))
    return IntervalCost(power, gamma.size, widths, log_cost, from_zero)


def _interpolated(values: FloatArray, parts: int) -> FloatArray:
    """Return ``values`` with ``parts - 1`` rows between neighbors, on polynomials through the six nearest rows."""
    position = np.arange(parts * (len(values) - 1) + 1) / parts
    nearest = np.clip(position.astype(np.intp) - 2, 0, len(values) - 6)[:, None] + np.arange(6)
    weights = np.ones(nearest.shape)
    for k in range(6):
        for other in range(6):
            if other != k:
                weights[:, k] *= (position - nearest[:, other]) / (k - other)
    return np.asarray(np.einsum("nk,nkm->nm", weights, values[nearest]))
