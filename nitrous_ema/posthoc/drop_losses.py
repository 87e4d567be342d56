"""The error that dropping each step adds, kept up to date while steps are dropped one after the other.

Dropping a step joins two intervals, so it changes the losses of its two neighbors only. A resumed run may have to drop
thousands of steps before its first snapshot: 7000 of 10 000 take 2 seconds instead of 32.
"""

from __future__ import annotations

import numpy as np

from nitrous_ema.posthoc.interval_cost import IntervalCost
from nitrous_ema.posthoc.selection import log_ratio
from nitrous_ema.profile import FloatArray


class DropLosses:
    """Scores of the remaining steps: the value that ``KeepCount`` minimizes, if one more step is dropped.

    Args:
        cost: Costs of intervals, for each requested length.
        t: Times of the steps, ascending, [steps].
        targets: Times of the averages whose errors count; each is in ``t``.
        exponent: See ``KeepCount``.
    """

    def __init__(self, cost: IntervalCost, t: FloatArray, targets: FloatArray, exponent: float) -> None:
        self._cost, self._exponent = cost, exponent
        log_t, log_targets = log_ratio(t, t[-1]), log_ratio(targets, t[-1])
        # Weights are 0 after the target's time: dropping a later step adds no error to it.
        self._weights = np.stack([cost.weights(log_t, np.full(cost.powers.shape, each)) for each in log_targets])
        self._widths = np.diff(log_t, prepend=-np.inf)
        self._before, self._after = np.arange(-1, t.size - 1), np.arange(1, t.size + 1)
        self._present = cost.of_widths(self._widths) * self._weights  # [targets, steps, lengths]
        self._errors2 = self._present.sum(1)  # with all remaining steps, [targets, lengths]
        self._losses = np.full(self._present.shape, np.inf)  # of the last step too: it has no interval after it
        self._update(np.arange(t.size - 1))

    def scores(self) -> FloatArray:
        """Return the value to minimize if each step is dropped, [steps]; infinite for dropped steps and the last."""
        errors2 = self._errors2[:, None] + self._losses
        errors2 **= self._exponent  # the operator squares faster than np.power
        return np.asarray(np.einsum("tsl->s", errors2))

    def drop(self, step: int) -> None:
        """Drop a step that remains and is not the last."""
        before, after = self._before[step], self._after[step]
        self._widths[after] += self._widths[step]
        self._errors2 -= self._present[:, step] + self._present[:, after]
        self._present[:, after] = self._cost.of_widths(self._widths[after]) * self._weights[:, after]
        self._errors2 += self._present[:, after]
        self._losses[:, step] = np.inf
        self._before[after] = before
        if before >= 0:
            self._after[before] = after
        self._update(np.array([each for each in (before, after) if 0 <= each < self._widths.size - 1], dtype=np.intp))

    def _update(self, steps: np.ndarray) -> None:
        """Compute the losses of these steps from the intervals before and after them."""
        after = self._after[steps]
        joined = self._cost.of_widths(self._widths[steps] + self._widths[after]) * self._weights[:, after]
        # A joined interval costs at least its parts, but the interpolated table may violate this by its error.
        self._losses[:, steps] = np.maximum(joined - self._present[:, steps] - self._present[:, after], 0.0)
