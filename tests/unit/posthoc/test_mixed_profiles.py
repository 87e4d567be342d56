"""Selection of steps with different profiles: the exact solve confirms the tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.posthoc import select_mixed_steps, select_steps, synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma

PAIR, TRIPLE, LONG = (tuple(sigma_rel_to_gamma(s)) for s in ((0.05, 0.1), (0.03, 0.1, 0.25), (0.1,)))
LENGTHS = sigma_rel_to_gamma([0.05, 0.08, 0.15, 0.2])


def exact_errors(t, gammas, places):
    """Return the errors with all averages at these steps."""
    counts = [len(gammas[place]) for place in places]
    t_i = np.repeat(np.asarray(t, float)[places], counts)
    gamma_i = np.concatenate([gammas[place] for place in places])
    return synthesis_report(t_i, gamma_i, np.full(LENGTHS.size, float(t[-1])), LENGTHS).profile_error


@pytest.mark.parametrize("tolerance", [0, 1e-2, 1e-4])
def test_steps_with_the_same_profiles_are_selected_as_by_select_steps(tolerance):
    t = np.arange(1.0, 301)
    mixed = select_mixed_steps(t, [PAIR] * 300, 300, LENGTHS, tolerance=tolerance)
    same = select_steps(t, PAIR, 300, LENGTHS, tolerance=tolerance)
    assert np.array_equal(mixed.places, same.places)
    assert mixed.lower_bound == same.lower_bound


def test_two_roundings_of_one_profile_are_the_same():
    shaken = tuple(gamma * (1 + 2.0**-52) for gamma in PAIR)
    mixed = select_mixed_steps(np.arange(1.0, 101), [PAIR, shaken] * 50, 100, LENGTHS, tolerance=1e-2)
    assert mixed.lower_bound > 1


@pytest.mark.parametrize(("tolerance", "most"), [(1e-2, 25), (1e-3, 80), (1e-4, 250)])
def test_run_resumed_with_other_profiles_needs_few_steps(tolerance, most):
    t, gammas = np.arange(1.0, 1001), [PAIR] * 500 + [TRIPLE] * 500
    chosen = select_mixed_steps(t, gammas, 1000, LENGTHS, tolerance=tolerance)
    assert chosen.places.size <= most  # 17, 53, 166 where this was written
    assert chosen.places[-1] == 999
    assert (chosen.places < 500).any()
    assert chosen.lower_bound == 1


@pytest.mark.parametrize("lacking", [LONG, PAIR[:1]])
def test_file_that_lacks_a_profile_costs_no_more_than_itself(lacking):
    t, gammas = np.arange(1.0, 401), [PAIR] * 400
    for place in range(5, 395, 10):
        gammas[place] = lacking
    chosen = select_mixed_steps(t, gammas, 400, LENGTHS, tolerance=1e-2)
    whole = select_steps(t, PAIR, 400, LENGTHS, tolerance=1e-2)
    assert chosen.places.size <= whole.places.size + 2
    assert all(gammas[place] == PAIR for place in chosen.places)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 80),
    unit=st.sampled_from([1e-3, 1.0, 1e12]),
    kinds=st.lists(st.sampled_from([PAIR, TRIPLE, LONG, PAIR[:1], TRIPLE[2:]]), min_size=1, max_size=5, unique=True),
    tolerance=st.sampled_from([0, 1e-3, 1e-2, 0.1]),
)
def test_tolerance_holds_for_any_mix_of_profiles(seed, steps, unit, kinds, tolerance):
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.exponential(1, steps) ** 3 + 1e-3) * unit
    gammas = [kinds[k] for k in rng.integers(0, len(kinds), steps)]
    chosen = select_mixed_steps(t, gammas, t[-1], LENGTHS, tolerance=tolerance)
    of_all, error = (exact_errors(t, gammas, places) for places in (np.arange(steps), chosen.places))
    assert chosen.places[-1] == steps - 1
    assert (np.diff(chosen.places) > 0).all()
    assert (error**2 <= of_all**2 * (1 + 1e-6) + tolerance**2 * (1 + 1e-6)).all()
    np.testing.assert_allclose(chosen.profile_error, error, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(chosen.profile_error_of_all, of_all, rtol=1e-6, atol=1e-12)


def test_more_than_four_groups_select_all_steps():
    kinds = [PAIR, TRIPLE, LONG, PAIR[:1], TRIPLE[2:]]
    chosen = select_mixed_steps(np.arange(1.0, 51), kinds * 10, 50, LENGTHS, tolerance=0.1)
    assert np.array_equal(chosen.places, np.arange(50))


def test_places_are_those_of_the_given_order_and_later_steps_are_left_out():
    t, gammas = np.arange(1.0, 101), [PAIR] * 40 + [TRIPLE] * 60
    shuffled = np.random.default_rng(0).permutation(100)
    ordered = select_mixed_steps(t, gammas, 80, LENGTHS, tolerance=1e-2)
    mixed = select_mixed_steps(t[shuffled], [gammas[place] for place in shuffled], 80, LENGTHS, tolerance=1e-2)
    assert ordered.places[-1] == 79
    assert np.array_equal(shuffled[mixed.places], ordered.places)


def test_lists_that_do_not_fit_the_times_are_named():
    with pytest.raises(
        ValueError, match=r"t has the shape \(2,\), but gammas has 1 lists of exponents; expected one list"
    ):
        select_mixed_steps([1.0, 2.0], [PAIR], 2, LENGTHS)


def test_negative_tolerance_is_named():
    with pytest.raises(ValueError, match="tolerance is -1"):
        select_mixed_steps([1.0], [PAIR], 1, LENGTHS, tolerance=-1)
