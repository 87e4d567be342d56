"""Profiles against integrals in long double, exact fractions, and averages of unit vectors."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.profile import correlation, decay, gamma_to_sigma_rel, sigma_rel_to_gamma, update_weight

SIGMA_RELS = (0.015, 0.05, 0.1, 0.25)
GAMMA_OF_5_AND_10_PERCENT = (16.97, 6.94)  # the paper's text, section 3.1


def clock(kind, updates, seed=0):
    """Return the times of the updates: every step, every tenth step, or after batches of random size."""
    rng = np.random.default_rng(seed)
    step = {"every step": 1, "every tenth": 10, "random": rng.integers(1, 64, updates)}[kind]
    return np.cumsum(np.broadcast_to(step, updates)).astype(np.float64)


def averaged_unit_vectors(gamma, t, dtype):
    """Return the average of distinct unit vectors, one per update, computed as training computes it."""
    average = np.zeros(t.size, dtype=dtype)
    for i, t_now in enumerate(t):
        t_delta = t_now - (t[i - 1] if i else 0.0)
        weight = dtype(update_weight(gamma, t_now, t_delta))
        unit = np.zeros(t.size, dtype=dtype)
        unit[i] = 1
        average = average + weight * (unit - average)
    return average


def exact_profile(gamma, t):
    """Return the share of each update by definition: the profile integrated over the time since the last update."""
    fraction = t.astype(np.longdouble) / np.longdouble(t[-1])
    return np.diff(np.append(0.0, fraction ** (np.longdouble(gamma) + 1))).astype(np.float64)


def integrate(function, points=40_001):
    """Simpson's rule over (0, 1] in long double."""
    u = np.linspace(np.longdouble(0), np.longdouble(1), points)
    weight = np.full(points, 2.0, np.longdouble)
    weight[1::2], weight[0], weight[-1] = 4, 1, 1
    return float((weight * function(u)).sum() / (3 * (points - 1)))


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
@pytest.mark.parametrize("kind", ["every step", "every tenth", "random"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 2e-13), (np.float32, 1e-5)])
def test_average_of_unit_vectors_is_the_profile(sigma_rel, kind, dtype, tolerance):
    gamma, t = sigma_rel_to_gamma(sigma_rel), clock(kind, 800)
    average = averaged_unit_vectors(gamma, t, dtype)
    np.testing.assert_allclose(average, exact_profile(gamma, t), rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
@pytest.mark.parametrize(("kind", "updates"), [("every step", 1000), ("every tenth", 4000), ("random", 4000)])
def test_average_has_the_requested_width(sigma_rel, kind, updates):
    t = clock(kind, updates)
    share = averaged_unit_vectors(sigma_rel_to_gamma(sigma_rel), t, np.float64)
    width = math.sqrt((share * t**2).sum() - (share * t).sum() ** 2)
    assert width / t[-1] == pytest.approx(sigma_rel, rel=3e-3)


@settings(deadline=None)
@given(
    gamma=st.floats(-0.4, 300),
    parts=st.lists(st.integers(1, 10**6), min_size=1, max_size=20),
    before=st.integers(1, 10**9),
)
def test_decay_of_an_interval_is_the_product_of_the_decays_of_its_parts(gamma, parts, before):
    ends = [before + sum(parts[: n + 1]) for n in range(len(parts))]
    product = math.prod(decay(gamma, end, part) for end, part in zip(ends, parts, strict=True))
    assert decay(gamma, ends[-1], sum(parts)) == pytest.approx(product, rel=1e-11, abs=1e-290)


@given(gamma=st.integers(0, 60), t_delta=st.integers(1, 10**6), t_before=st.integers(1, 10**12))
@settings(deadline=None)
def test_update_weight_is_exact_to_rounding_at_any_time(gamma, t_delta, t_before):
    t_now = t_before + t_delta
    exact = 1 - (1 - Fraction(t_delta, t_now)) ** (gamma + 1)
    assert update_weight(gamma, t_now, t_delta) == pytest.approx(float(exact), rel=1e-14, abs=0)


def test_update_weight_keeps_its_digits_late_in_a_run():
    exact = 1 - (1 - Fraction(1, 10**12)) ** 18
    assert update_weight(17, 10**12, 1) == pytest.approx(float(exact), rel=1e-15, abs=0)


def test_first_update_is_a_plain_copy():
    assert decay(6.94, 7, 7) == 0.0
    assert update_weight(6.94, 7, 7) == 1.0


def test_decay_keeps_its_digits_where_it_is_tiny():
    assert decay(2, 10**9 + 1, 10**9) == pytest.approx(float(Fraction(1, 10**9 + 1) ** 3), rel=1e-13, abs=0)


def test_decay_and_update_weight_share_the_whole():
    for t_delta in (1, 3, 50, 99.5):
        assert decay(6.94, 100, t_delta) + update_weight(6.94, 100, t_delta) == pytest.approx(1, rel=1e-15)


def test_decay_of_one_step_matches_the_paper():
    assert decay(6.94, 1000, 1) == pytest.approx((1 - 1 / 1000) ** 7.94, rel=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 6.94, 16.97, 63.0])
def test_gamma_to_sigma_rel_is_the_standard_deviation_of_the_profile(gamma):
    mean = integrate(lambda u: (gamma + 1) * u ** (gamma + 1))
    variance = integrate(lambda u: (gamma + 1) * u**gamma * (u - mean) ** 2)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-6)  # Eq. 122
    assert gamma_to_sigma_rel(gamma) == pytest.approx(math.sqrt(variance), rel=1e-5)


def test_lengths_of_the_paper_have_the_exponents_of_the_paper():
    assert sigma_rel_to_gamma([0.05, 0.10]) == pytest.approx(GAMMA_OF_5_AND_10_PERCENT, abs=5e-3)


@settings(deadline=None)
@given(sigma_rel=st.floats(1e-6, 0.2886))
def test_sigma_rel_survives_the_round_trip_through_gamma(sigma_rel):
    assert gamma_to_sigma_rel(sigma_rel_to_gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=4e-15, abs=0)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.2, 0.28])
def test_gamma_is_the_largest_root_of_the_cubic(sigma_rel):
    t = sigma_rel**-2
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(np.roots([1, 7, 16 - t, 12 - t]).real.max(), rel=1e-12)


def test_conversions_keep_the_shape():
    grid = np.array([[0.05, 0.1, 0.2], [0.06, 0.12, 0.25]], dtype=np.float32)
    assert isinstance(sigma_rel_to_gamma(0.05), float)
    assert isinstance(gamma_to_sigma_rel(17), float)
    assert sigma_rel_to_gamma(grid).shape == grid.shape
    assert sigma_rel_to_gamma(grid).dtype == np.float64
    assert gamma_to_sigma_rel(sigma_rel_to_gamma(grid)) == pytest.approx(grid)


@pytest.mark.parametrize(("t_a", "t_b"), [(1.0, 1.0), (0.3, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize(("gamma_a", "gamma_b"), [(6.0, 17.0), (2.5, 2.5), (17.0, 0.0)])
def test_correlation_is_the_integral_of_the_product(t_a, t_b, gamma_a, gamma_b):
    def profile(t, gamma, u):
        return np.where(u <= t + 1e-12, (gamma + 1) / t * (u / t) ** gamma, 0)

    product = integrate(lambda u: profile(t_a, gamma_a, u) * profile(t_b, gamma_b, u))
    assert correlation(t_a, gamma_a, t_b, gamma_b) == pytest.approx(product, rel=1e-3)


def test_correlation_broadcasts_and_is_symmetric():
    t, gamma = np.array([1.0, 3.0, 1e12]), np.array([0.5, 7.0, 17.0])
    table = correlation(t[:, None], gamma[:, None], t, gamma)
    assert table.shape == (3, 3)
    np.testing.assert_allclose(table, table.T, rtol=1e-15)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 12**-0.5, 0.3, 5, math.nan, math.inf, [0.05, 0.3], "wide"])
def test_length_outside_the_domain_is_named(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel .*expected .*greater than 0 and less than 0\.288675.*fraction"):
        sigma_rel_to_gamma(sigma_rel)


@pytest.mark.parametrize("gamma", [-1.0, math.nan, math.inf])
def test_exponent_without_a_profile_is_named(gamma):
    for call in (lambda: gamma_to_sigma_rel(gamma), lambda: decay(gamma, 10, 1), lambda: update_weight(gamma, 10, 1)):
        with pytest.raises(ValueError, match=r"gamma .*expected .*greater than -1"):
            call()


@pytest.mark.parametrize(
    ("t_now", "t_delta"), [(10, 0), (10, 11), (10, -1), (0, 0), (math.inf, 1), (10, math.nan), (math.nan, 1)]
)
def test_invalid_time_since_the_last_update_is_named(t_now, t_delta):
    for call in (decay, update_weight):
        with pytest.raises(ValueError, match=r"t_delta is .*expected 0 < t_delta <= t_now"):
            call(6.94, t_now, t_delta)


def test_exponents_above_the_limit_are_refused():
    """sigma_rel 1e-300 is a valid length, but its integration needs too many nodes."""
    with pytest.raises(
        ValueError, match=r"gamma_b is 1e\+300; expected numbers greater than -0.5 and less than 1e\+12"
    ):
        correlation(1.0, 7.0, 1.0, 1e300)
    assert sigma_rel_to_gamma(1e-300) == pytest.approx(1e300)


@pytest.mark.parametrize(("arguments", "thing"), [((0, 1, 1, 1), "t_a"), ((1, -0.5, 1, 1), "gamma_a")])
def test_correlation_names_the_invalid_argument(arguments, thing):
    with pytest.raises(ValueError, match=f"{thing} is .*expected"):
        correlation(*arguments)
