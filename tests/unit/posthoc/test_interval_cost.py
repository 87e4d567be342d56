"""The table of interval costs, against the solve over all steps (whose own oracles are in test_posthoc.py)."""

from __future__ import annotations

import numpy as np
import pytest

from nitrous_ema.posthoc import synthesis_report
from nitrous_ema.posthoc.interval_cost import INTERPOLATION_ERROR, IntervalCost
from nitrous_ema.profile import sigma_rel_to_gamma

WANTED = sigma_rel_to_gamma([0.015, 0.04, 0.08, 0.15, 0.24, 0.28])


@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.1), (0.03, 0.1, 0.25), (0.03, 0.06, 0.1, 0.2)])
@pytest.mark.parametrize("times", ["even", "geometric", "random", "tokens"])
def test_costs_of_all_intervals_sum_to_the_squared_error(sigma_rels, times):
    t = {
        "even": np.arange(1.0, 101),
        "geometric": 1.07 ** np.arange(100.0),
        "random": np.sort(np.random.default_rng(0).uniform(1, 1e4, 60)),
        "tokens": 1e12 * np.arange(1.0, 31) + np.arange(30) % 7,
    }[times]
    gammas = sigma_rel_to_gamma(sigma_rels)
    log_t = np.log(t)
    errors2 = IntervalCost.of(gammas, WANTED).errors2(log_t, np.full(WANTED.size, log_t[-1]))
    inputs = np.repeat(t, gammas.size), np.tile(gammas, t.size)
    report = synthesis_report(*inputs, np.full(WANTED.size, t[-1]), WANTED, normalize=None)
    np.testing.assert_allclose(errors2, report.profile_error**2, rtol=2 * INTERPOLATION_ERROR, atol=1e-30)


def test_tracked_length_costs_nothing():
    gammas = sigma_rel_to_gamma([0.05, 0.1])
    cost = IntervalCost.of(gammas, gammas)
    assert cost.of_widths(np.array([1e-3, 1.0, np.inf])).max() < 1e-200


@pytest.mark.parametrize("wanted", [-0.45, 0.5, 12.0])
def test_beginning_at_zero_costs_the_muentz_distance(wanted):
    """Closed form of the distance from one power to another on (0, 1]."""
    tracked = 7.0
    cost = IntervalCost.of(np.array([tracked]), np.array([wanted]))
    expected = ((wanted - tracked) / (wanted + tracked + 1)) ** 2
    assert cost.of_widths(np.array(np.inf)) == pytest.approx(expected, rel=1e-12)


def test_wider_interval_costs_at_least_as_much_as_its_parts():
    cost = IntervalCost.of(sigma_rel_to_gamma([0.05, 0.1]), WANTED)
    for left, right in [(0.01, 0.01), (0.5, 0.1), (3.0, 0.2), (np.inf, 0.3)]:
        whole, first, last = (cost.of_widths(np.array(width)) for width in (left + right, left, right))
        parts = last + first * np.exp(-right * (2 * WANTED + 1))
        assert (whole >= parts * (1 - INTERPOLATION_ERROR)).all()


def test_target_ignores_later_times():
    cost = IntervalCost.of(sigma_rel_to_gamma([0.05, 0.1]), WANTED[:2])
    log_t, log_t_r = np.log([1.0, 2.0, 3.0, 4.0]), np.log([2.0, 2.0])
    np.testing.assert_allclose(cost.errors2(log_t, log_t_r), cost.errors2(log_t[:2], log_t_r))
