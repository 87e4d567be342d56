"""Lengths within limits, against the dense system of the paper, solved for each length alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nitrous_ema.posthoc.coverage import LONGEST, SHORTEST, condition, covered_lengths, gap_errors2
from nitrous_ema.posthoc.report import rounding_of
from nitrous_ema.profile import SIGMA_REL_LIMIT, correlation, sigma_rel_to_gamma

NO_LIMIT = math.inf


def columns(times, sigma_rels):
    gammas = np.asarray(sigma_rel_to_gamma(list(sigma_rels)))
    return np.repeat(np.asarray(times, dtype=float), gammas.size), np.tile(gammas, len(times))


def gram(t, gamma):
    """Inner products of profiles of norm 1: the closed form of the paper (Eq. 151), not the intervals."""
    inner = correlation(t[:, None], gamma[:, None], t, gamma)
    norm = np.sqrt(np.diag(inner))
    return inner / np.outer(norm, norm)


def dense(t_i, gamma_i, t_r, sigma_rel):
    """Error and |w|_2 with the condition that weights sum to 1, by the equations of Alg. 3 and one multiplier."""
    gamma_r = float(sigma_rel_to_gamma(sigma_rel))
    a = correlation(t_i[:, None], gamma_i[:, None], t_i, gamma_i)
    b = correlation(t_i, gamma_i, t_r, gamma_r)
    norm2 = float(correlation(t_r, gamma_r, t_r, gamma_r))
    bordered = np.block([[a, np.ones((a.shape[0], 1))], [np.ones((1, a.shape[0])), np.zeros((1, 1))]])
    weights = np.linalg.solve(bordered, np.append(b, 1.0))[:-1]
    error2 = norm2 - 2 * weights @ b + weights @ a @ weights
    return math.sqrt(max(error2, 0.0) / norm2), float(np.linalg.norm(weights))


@pytest.mark.parametrize(
    ("times", "sigma_rels"),
    [
        (np.arange(1, 13), (0.05, 0.1)),
        (1.2 ** np.arange(14), (0.05, 0.1)),
        (np.arange(1, 9), (0.03, 0.1, 0.25)),
        ([1, 2, 3, 7, 8, 9], (0.08,)),
        ([5e11, 1e12], (0.05, 0.1)),
    ],
)
@pytest.mark.parametrize("limit", [(0.01, NO_LIMIT), (0.05, NO_LIMIT), (0.05, 2.0)])
def test_lengths_are_within_the_limit_inside_a_stretch_and_beyond_it_outside(times, sigma_rels, limit):
    t_i, gamma_i = columns(times, sigma_rels)
    (stretches,) = covered_lengths(t_i, gamma_i, float(times[-1]), limits=[limit])
    assert stretches
    for length in [*np.geomspace(SHORTEST, LONGEST, 60), *sigma_rels]:
        error, norm = dense(t_i, gamma_i, float(times[-1]), float(length))
        inside = any(each.shortest <= length <= each.longest for each in stretches)
        near = any(abs(math.log(length / end)) < 1e-3 for each in stretches for end in (each.shortest, each.longest))
        assert near or inside == (error <= limit[0] + 1e-7 and norm <= limit[1])
        if inside:
            (own,) = (each for each in stretches if each.shortest <= length <= each.longest)
            assert norm <= own.weight_l2 * 1.02


def test_ends_of_a_stretch_hold_themselves():
    t_i, gamma_i = columns(np.arange(1, 13), (0.05, 0.1))
    for limit, stretches in zip((0.01, 0.05), covered_lengths(t_i, gamma_i, 12.0), strict=True):
        (stretch,) = stretches
        for end, outwards in ((stretch.shortest, 0.998), (stretch.longest, 1.002)):
            assert dense(t_i, gamma_i, 12.0, end)[0] <= limit
            assert dense(t_i, gamma_i, 12.0, end * outwards)[0] > limit


def test_tracked_lengths_are_islands_of_one_snapshot():
    t_i, gamma_i = columns([7.0], (0.05, 0.1))
    ((first, second), _) = covered_lengths(t_i, gamma_i, 7.0, limits=[(1e-4, NO_LIMIT), (0.05, NO_LIMIT)])
    assert (first.shortest, first.longest) == pytest.approx((0.05, 0.05), rel=1e-3)
    assert (second.shortest, second.longest) == pytest.approx((0.1, 0.1), rel=1e-3)
    assert first.weight_l2 == pytest.approx(1, abs=0.01)


def test_many_snapshots_cover_every_length():
    t_i, gamma_i = columns(np.arange(1, 1501), (0.03, 0.1, 0.25))
    ((stretch,),) = covered_lengths(t_i, gamma_i, 1500.0, limits=[(0.05, NO_LIMIT)])
    assert (stretch.shortest, stretch.longest) == pytest.approx((SHORTEST, LONGEST))
    assert LONGEST < SIGMA_REL_LIMIT


def test_no_length_is_covered_at_an_end_without_a_snapshot():
    t_i, gamma_i = columns([1.0], (0.05, 0.1))
    assert covered_lengths(t_i, gamma_i, 2.0) == ((), ())


def test_limit_of_zero_is_named():
    t_i, gamma_i = columns([1.0, 2.0], (0.05, 0.1))
    with pytest.raises(ValueError, match="limits has 0"):
        covered_lengths(t_i, gamma_i, 2.0, limits=[(0.0, 1.0)])


@pytest.mark.parametrize("sigma_rels", [(0.05, 0.1), (0.03, 0.1, 0.25), (0.08,)])
@pytest.mark.parametrize("times", [np.arange(1, 9), 1.3 ** np.arange(9), [1, 2, 2.5, 9]])
def test_condition_is_that_of_the_dense_system(times, sigma_rels):
    t_i, gamma_i = columns(times, sigma_rels)
    kept = np.arange(t_i.size) != 1  # a time lacks a profile
    for some in (slice(None), kept):
        expected = math.sqrt(np.linalg.cond(gram(t_i[some], gamma_i[some])))
        assert condition(t_i[some], gamma_i[some]) == pytest.approx(expected, rel=1e-5)


def test_condition_of_one_average_is_one_and_of_too_many_is_not_computed():
    assert condition([3.0], [7.0]) == pytest.approx(1)
    assert math.isnan(condition(*columns(np.arange(1, 514), (0.05, 0.1))))


def test_an_average_given_twice_has_no_finite_condition():
    assert math.isinf(condition([3.0, 3.0, 4.0], [7.0, 7.0, 7.0]))


@pytest.mark.parametrize("sigma_rels", [(0.05, 0.1), (0.1, 0.05), (0.03, 0.1, 0.25)])
def test_gaps_add_up_to_the_squared_error(sigma_rels):
    times, lengths = np.array([1.0, 2, 3, 7, 8]), (0.02, 0.07, 0.2)
    t_i, gamma_i = columns(times, sigma_rels)
    found = gap_errors2(times, sigma_rel_to_gamma(sigma_rels), 8.0, sigma_rel_to_gamma(lengths))
    a = correlation(t_i[:, None], gamma_i[:, None], t_i, gamma_i)
    for place, gamma in enumerate(sigma_rel_to_gamma(lengths)):
        b, norm2 = correlation(t_i, gamma_i, 8.0, gamma), float(correlation(8.0, gamma, 8.0, gamma))
        plain = (norm2 - b @ np.linalg.solve(a, b)) / norm2
        assert found[:, place].sum() == pytest.approx(plain, rel=1e-6)


def test_the_widest_gap_adds_most():
    found = gap_errors2([1.0, 2, 3, 7, 8], sigma_rel_to_gamma((0.05, 0.1)), 8.0, sigma_rel_to_gamma((0.2,)))
    assert found[:, 0].argmax() == 3


@pytest.mark.parametrize(("dtype", "unit"), [("F16", 2.1e-4), ("BF16", 1.7e-3)])
def test_rounding_of_a_dtype_matches_stored_numbers(dtype, unit):
    assert rounding_of(dtype) == pytest.approx(unit, rel=0.03)
