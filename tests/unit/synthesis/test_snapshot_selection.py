"""Columns and weights of a synthesis, from numbers alone."""

from __future__ import annotations

import numpy as np
import pytest

from nitrous_ema.posthoc import solve_weights, synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.synthesis.snapshot_selection import choose_columns

PAIR, TRIPLE = (tuple(sigma_rel_to_gamma(each)) for each in ((0.05, 0.1), (0.03, 0.1, 0.25)))
TIMES = [float(t) for t in range(1, 101)]


def test_tracked_length_is_one_column_of_the_target():
    for tolerance in (0, 1e-3):
        selection = choose_columns(TIMES, [PAIR] * 100, 100, [PAIR[1]], tolerance=tolerance)
        assert selection.places == ((99, 1),)
        np.testing.assert_array_equal(selection.weights, [[1.0]])


@pytest.mark.parametrize("tolerance", [0, 1e-3, 1e-1])
def test_weights_belong_to_the_columns_they_stand_beside(tolerance):
    gammas, requested = [PAIR] * 50 + [TRIPLE] * 50, sigma_rel_to_gamma([0.06, 0.2])
    selection = choose_columns(TIMES, gammas, 100, requested.tolist(), tolerance=tolerance)
    assert [(TIMES[step], gammas[step][profile]) for step, profile in selection.places] == list(
        zip(selection.t, selection.gamma, strict=True)
    )
    outputs = np.full(2, 100.0), requested
    report = synthesis_report(selection.t, selection.gamma, *outputs, weights=selection.weights)
    limit = np.hypot(selection.steps.profile_error_of_all, tolerance)
    assert (report.profile_error <= limit * (1 + 1e-6)).all()
    if tolerance == 0:
        np.testing.assert_array_equal(selection.weights, solve_weights(selection.t, selection.gamma, *outputs))


def test_columns_stand_in_the_order_of_time():
    selection = choose_columns(TIMES, [TRIPLE] * 100, 100, sigma_rel_to_gamma([0.04, 0.2]).tolist(), tolerance=1e-2)
    assert (np.diff(selection.t) >= 0).all()
    assert selection.places == tuple(sorted(selection.places))
    assert selection.least_error_l2[0] > 1.2 * np.linalg.norm(selection.weights[:, 0])
