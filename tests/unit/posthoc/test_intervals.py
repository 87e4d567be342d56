"""Fits on single intervals, against integrals in long double (the solve that uses them is in test_posthoc.py)."""

from __future__ import annotations

import numpy as np
import pytest

from nitrous_ema.posthoc.intervals import fit_intervals

LONG = np.longdouble


def gram(exponents, start):
    """Return the inner products of v**a and v**b over (start, 1], in closed form."""
    total = exponents[:, None] + exponents[None, :] + LONG(1)
    return (1 - LONG(start) ** total) / total


def norm_of_misfit(gamma, power, coefficients, start):
    """Return the L2 norm over (start, 1] of v**power minus the combination of v**gamma."""
    exponents = np.append(gamma, power).astype(LONG)
    misfit = np.append(-coefficients, 1.0).astype(LONG)
    return float(np.sqrt(np.maximum(misfit @ gram(exponents, start) @ misfit, 0)))


@pytest.mark.parametrize("ratio", [1.3, 2.0, 10.0, 1e4])
@pytest.mark.parametrize("gamma", [[6.9], [16.9, 6.9], [29.7, 6.9, 0.7]])
def test_residual_is_the_norm_of_the_difference(gamma, ratio):
    t, gamma, power = np.array([1.0, ratio]), np.array(gamma), np.array([1.5, 11.0])
    fits = fit_intervals(t, gamma, power)
    for interval, start in enumerate([0.0, 1 / ratio]):
        for p, exponent in enumerate(power):
            measured = norm_of_misfit(gamma, exponent, fits.coefficients[interval, :, p], start)
            assert fits.residual[interval, p] == pytest.approx(measured, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("ratio", [1.3, 10.0])
def test_no_other_coefficients_come_closer(ratio):
    gamma, power = np.array([16.9, 6.9]), np.array([11.0])
    fits = fit_intervals(np.array([1.0, ratio]), gamma, power)
    for interval, start in enumerate([0.0, 1 / ratio]):
        best = fits.coefficients[interval, :, 0]
        error = norm_of_misfit(gamma, power[0], best, start)
        for nudge in ([1e-3, 0], [-1e-3, 0], [0, 1e-3], [0, -1e-3], [1e-3, -1e-3]):
            assert norm_of_misfit(gamma, power[0], best + nudge, start) > error


def test_tracked_power_is_returned_as_it_is():
    gamma = np.array([16.9, 6.9])
    fits = fit_intervals(np.array([1.0, 3.0, 3.0000001]), gamma, gamma[::-1].copy())
    assert np.array_equal(fits.coefficients, np.broadcast_to(np.eye(2)[:, ::-1], (3, 2, 2)))
    assert not fits.residual.any()


@pytest.mark.parametrize("ratio", [1.3, 10.0])
def test_factor_measures_combinations(ratio):
    gamma = np.array([16.9, 6.9])
    fits = fit_intervals(np.array([1.0, ratio]), gamma, np.array([1.5]))
    for factor, start in zip(fits.factor, [0.0, 1 / ratio], strict=True):
        expected = gram(gamma.astype(LONG), start).astype(float)
        np.testing.assert_allclose(factor.T @ factor, expected, rtol=1e-10)
