"""Oracle: the errors of the remaining steps without each step, computed anew from the table of costs."""

from __future__ import annotations

import numpy as np
import pytest

from nitrous_ema.posthoc.drop_losses import DropLosses
from nitrous_ema.posthoc.interval_cost import IntervalCost
from nitrous_ema.posthoc.selection import log_ratio

COST = IntervalCost.of(np.array([16.97, 6.94]), np.array([4.0, 9.0, 30.0]))


def expected_scores(t, remaining, targets, exponent):
    """Return the sum over targets and lengths of the squared error, to a power, without each remaining step."""
    scores = np.full(t.size, np.inf)
    for step in remaining[:-1]:
        others = log_ratio(t[remaining[remaining != step]], t[-1])
        log_targets = log_ratio(targets, t[-1])
        errors2 = [COST.errors2(others, np.full(COST.powers.shape, each)) for each in log_targets]
        scores[step] = (np.array(errors2) ** exponent).sum()
    return scores


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.5])
def test_scores_stay_those_of_the_remaining_steps(exponent):
    rng = np.random.default_rng(0)
    t = np.cumsum(rng.uniform(1, 20, 40))
    targets = t[[30, 39]]
    losses, remaining = DropLosses(COST, t, targets, exponent), np.arange(40)
    for _ in range(30):
        scores, expected = losses.scores(), expected_scores(t, remaining, targets, exponent)
        droppable = remaining[~np.isin(t[remaining], targets)]
        np.testing.assert_allclose(scores[droppable], expected[droppable], rtol=1e-9)
        assert np.isinf(np.delete(scores, remaining[:-1])).all()
        step = rng.choice(droppable)
        losses.drop(step)
        remaining = remaining[remaining != step]
