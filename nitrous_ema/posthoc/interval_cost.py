"""What an interval without a kept time costs: the squared error it adds to a wanted average.

The fit on an interval knows only the ratio of its ends, so for each wanted exponent one function of the log-width ``h``
serves every pair of times: an interval that ends at ``t`` adds ``(t / t_r)**(2 gamma + 1) cost(h)`` to the squared
relative error of the average wanted at ``t_r``. Searching over thousands of sets of kept times reads that function from
a table; what is told to the user in the end comes from the fits themselves.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.posthoc.intervals import fit_from_zero, fit_widths, interval_errors2
from nitrous_ema.profile import FloatArray

_LOG_STEP = 0.02
_NODES_PER_FIT = 3  # fits are smooth enough for a polynomial of degree 5 between nodes that are 0.06 apart (1e-6)
# Below the first width the costs are powers of it to better than 1 %, and far below anything one would ask for. Beyond
# the last one an interval costs as much as one that begins at time 0 (to exp(-16) for exponents above 0).
_FIRST_WIDTH, _LAST_WIDTH = 1e-4, 16.0
_SMALLEST_LOG = -690.0  # in place of the logarithm of 0, for a wanted exponent that is tracked

INTERPOLATION_ERROR = 5e-4
"""Bound on the relative error of a cost read from the table (measured: 1.4e-4 with two profiles, 2.8e-4 with six)."""


@dataclass(frozen=True, slots=True, eq=False)
class IntervalCost:
    """Squared relative error of wanted averages for each interval between kept times, by its log-width."""

    powers: FloatArray
    """Wanted exponents, [targets], in the order given."""
    orders: int
    """Number of tracked profiles. Narrow intervals cost as their width to the power 2 * orders + 1."""
    widths: FloatArray
    """Nodes of the table, evenly spaced in their logarithm."""
    log_cost: FloatArray
    """Logarithm of the cost of an interval that ends at t_r, [nodes, targets]; it never falls with the width."""
    from_zero: FloatArray
    """The cost of the interval that begins at time 0, [targets]."""

    @classmethod
    def of(cls, gammas: FloatArray, powers: FloatArray) -> IntervalCost:
        """The table for these tracked and wanted exponents; the last few tables are kept."""
        return _table(tuple(gammas.tolist()), tuple(powers.tolist()))

    def of_widths(self, width: FloatArray) -> FloatArray:
        """Cost of intervals of these log-widths that end at t_r, [..., targets]; infinity is a beginning at 0."""
        place, share = self.places(width)
        below, above = self.log_cost[place], self.log_cost[place + 1]
        cost = np.exp(below + share[..., None] * (above - below))
        return np.where(np.isinf(width)[..., None], self.from_zero, cost)

    def places(self, width: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
        """Node below each log-width, and where between that one and the next it lies (below 0 before the first)."""
        with np.errstate(divide="ignore"):
            position = np.log(np.minimum(width, _LAST_WIDTH) / _FIRST_WIDTH) / _LOG_STEP
        position = np.maximum(position, _SMALLEST_LOG)
        place = np.clip(position.astype(np.intp), 0, self.widths.size - 2)
        return place, position - place

    def weights(self, log_t: FloatArray, log_t_r: FloatArray) -> FloatArray:
        """What multiplies the cost of intervals that end at these times, [times, targets]; 0 after a target's time."""
        log_tau = log_t[:, None] - log_t_r
        weight = np.exp((2 * self.powers + 1) * np.minimum(log_tau, 0.0))
        return np.asarray(np.where(log_tau > 0, 0.0, weight))

    def errors2(self, log_t: FloatArray, log_t_r: FloatArray) -> FloatArray:
        """Squared relative errors [targets] when exactly these times are kept, which contain those of the targets."""
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
    log_cost = np.maximum.accumulate(_refined(log_cost, _NODES_PER_FIT))
    return IntervalCost(power, gamma.size, widths, log_cost, from_zero)


def _refined(values: FloatArray, parts: int) -> FloatArray:
    """Rows of ``values`` with ``parts - 1`` more between each two, on polynomials through the six nearest ones."""
    position = np.arange(parts * (len(values) - 1) + 1) / parts
    nearest = np.clip(position.astype(np.intp) - 2, 0, len(values) - 6)[:, None] + np.arange(6)
    weights = np.ones(nearest.shape)
    for k in range(6):
        for other in range(6):
            if other != k:
                weights[:, k] *= (position - nearest[:, other]) / (k - other)
    return np.asarray(np.einsum("nk,nkm->nm", weights, values[nearest]))
