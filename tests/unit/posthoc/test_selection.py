"""Selection of the fewest steps, against trying every subset where possible, and against the exact solve."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.posthoc import select_steps, solve_weights, synthesis_report
from nitrous_ema.posthoc.selection import Solver
from nitrous_ema.posthoc.subset_search import fewest_times
from nitrous_ema.profile import sigma_rel_to_gamma

PAIR = (0.05, 0.1)
RANGE = tuple(np.linspace(0.05, 0.15, 11))


def exact_errors(t, sigma_rels, t_r, lengths):
    """Return the errors of the solve, and the norms of its weights."""
    gammas, wanted = sigma_rel_to_gamma(sigma_rels), sigma_rel_to_gamma(lengths)
    inputs = np.repeat(t, gammas.size), np.tile(gammas, len(t)), np.full(wanted.size, float(t_r)), wanted
    weights = solve_weights(*inputs)
    return synthesis_report(*inputs, weights=weights).profile_error, np.linalg.norm(weights, axis=0)


def selected(t, sigma_rels, lengths, tolerance, t_r=None):
    gammas, wanted = sigma_rel_to_gamma(sigma_rels), sigma_rel_to_gamma(lengths)
    return select_steps(t, gammas, t[-1] if t_r is None else t_r, wanted, tolerance=tolerance)


def fewest_by_trying_all(t, sigma_rels, lengths, tolerance):
    limit2 = exact_errors(t, sigma_rels, t[-1], lengths)[0] ** 2 + tolerance**2
    for size in range(len(t)):
        for others in itertools.combinations(range(len(t) - 1), size):
            kept = t[[*others, len(t) - 1]]
            if (exact_errors(kept, sigma_rels, t[-1], lengths)[0] ** 2 <= limit2).all():
                return size + 1
    return len(t)


# --- Certainty -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [(0.08,), (0.04, 0.15), (0.05, 0.1, 0.2)])
@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03, 0.01])
def test_no_smaller_set_exists(lengths, tolerance):
    t = np.array([1, 2, 3.5, 4, 6, 7, 9, 10.0])
    chosen = selected(t, PAIR, lengths, tolerance)
    assert chosen.lower_bound <= fewest_by_trying_all(t, PAIR, lengths, tolerance) == chosen.places.size


spaced_times = st.lists(st.floats(0.05, 3.0), min_size=2, max_size=7).map(lambda gaps: np.cumsum(gaps))


@settings(max_examples=12, deadline=None)
@given(
    times=spaced_times,
    sigma_rels=st.sampled_from([(0.1,), PAIR, (0.03, 0.1, 0.25)]),
    lengths=st.lists(st.floats(0.03, 0.25), min_size=1, max_size=3, unique=True),
    tolerance=st.sampled_from([0.3, 0.05, 0.01]),
)
def test_bound_is_never_above_the_smallest_set_nor_that_above_ours(times, sigma_rels, lengths, tolerance):
    chosen = selected(times, sigma_rels, lengths, tolerance)
    smallest = fewest_by_trying_all(times, sigma_rels, lengths, tolerance)
    assert chosen.lower_bound <= smallest <= chosen.places.size <= smallest + 1


@pytest.mark.parametrize(
    ("lengths", "steps"),
    [((0.08,), {1e-2: 3, 1e-3: 10, 1e-4: 31}), ((0.15,), {1e-3: 36, 1e-4: 118}), (RANGE, {1e-3: 36, 1e-4: 118})],
)
def test_fewest_of_2000_even_steps(lengths, steps):
    """The numbers of an independent search: a shortest path over all pairs of steps."""
    for tolerance, expected in steps.items():
        chosen = selected(np.arange(1.0, 2001), PAIR, lengths, tolerance)
        assert chosen.places.size == chosen.lower_bound == expected


@pytest.mark.parametrize(("steps", "tolerance"), [(2000, 1e-3), (2000, 1e-4), (4000, 1e-3)])
def test_one_profile_of_thousands_of_steps_is_thinned_down_to_the_bound(steps, tolerance):
    """No small set of candidates meets the limit, so a search that begins on a coarse graph must still converge."""
    chosen = selected(np.arange(1.0, steps + 1), (0.1,), (0.05,), tolerance)
    assert 0.98 * chosen.places.size <= chosen.lower_bound <= chosen.places.size < steps / 4


@pytest.mark.parametrize("seed", [0, 8, 12, 29, 38, 68])  # but for the first, no best path is within the limits
def test_fewest_of_few_steps_with_one_profile_where_the_sum_of_one_matters_most(seed):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.choice(np.arange(1.0, 400), 7, replace=False))
    lengths, tolerance = rng.uniform(0.02, 0.27, 1 + seed % 2), (1e-3, 1e-2, 0.1)[seed % 3]
    chosen = selected(t, (0.05,), lengths, tolerance)
    assert chosen.places.size == fewest_by_trying_all(t, (0.05,), lengths, tolerance)


@pytest.mark.parametrize("lengths", [(0.15,), RANGE])
def test_sum_of_one_costs_one_step_at_a_wide_tolerance(lengths):
    """Without the condition that the weights sum to 1 ten steps are enough."""
    chosen = selected(np.arange(1.0, 2001), PAIR, lengths, 1e-2)
    assert (chosen.lower_bound, chosen.places.size) == (10, 11)


# --- What is promised of every choice --------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 120),
    unit=st.sampled_from([1e-3, 1.0, 1e12]),
    sigma_rels=st.sampled_from([(0.1,), PAIR, (0.03, 0.1, 0.25), (0.03, 0.06, 0.1, 0.2)]),
    tolerance=st.sampled_from([0.1, 1e-2, 1e-3, 1e-5]),
)
def test_choice_keeps_the_tolerance_at_the_predicted_error(seed, steps, unit, sigma_rels, tolerance):
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.exponential(1, steps) ** 3 + 1e-3) * unit
    lengths = rng.uniform(0.03, 0.27, 3)
    chosen = selected(t, sigma_rels, lengths, tolerance)
    of_all, _ = exact_errors(t, sigma_rels, t[-1], lengths)
    error, norm = exact_errors(t[chosen.places], sigma_rels, t[-1], lengths)
    assert chosen.places[-1] == steps - 1
    assert (np.diff(chosen.places) > 0).all()
    assert chosen.lower_bound <= chosen.places.size
    assert (error**2 <= of_all**2 * (1 + 1e-6) + tolerance**2 * (1 + 1e-6)).all()
    np.testing.assert_allclose(chosen.profile_error, error, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(chosen.profile_error_of_all, of_all, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(chosen.weight_l2, norm)


def test_tolerance_of_zero_selects_all_steps():
    chosen = selected(np.arange(1.0, 51), PAIR, (0.08,), 0)
    assert np.array_equal(chosen.places, np.arange(50))
    assert chosen.lower_bound == 50


def test_tracked_lengths_need_the_target_only():
    chosen = selected(np.arange(1.0, 51), PAIR, PAIR, 1e-6)
    assert chosen.places.tolist() == [49]
    assert not chosen.profile_error.any()


def test_steps_after_the_target_are_not_chosen():
    chosen = selected(np.arange(1.0, 101), PAIR, (0.08, 0.15), 1e-2, t_r=60.0)
    assert chosen.places[-1] == 59


def test_places_are_those_of_the_given_order():
    t = np.arange(1.0, 101)
    shuffled = np.random.default_rng(0).permutation(t)
    in_order, chosen = (selected(times, PAIR, RANGE, 1e-2, t_r=100.0) for times in (t, shuffled))
    assert np.array_equal(t[in_order.places], shuffled[chosen.places])


def test_unit_of_time_does_not_matter():
    t = np.arange(1.0, 301)
    assert np.array_equal(selected(t, PAIR, RANGE, 1e-3).places, selected(t * 1e12, PAIR, RANGE, 1e-3).places)


def test_tolerance_can_be_met_where_the_steps_begin_late():
    """All steps together have a far larger error than the tolerance, which is the error that may be added."""
    t = np.arange(50.0, 201)
    chosen = selected(t, PAIR, (0.2,), 1e-3)
    assert chosen.profile_error_of_all[0] > 1e-2
    assert chosen.places.size < 80  # 64 where this was written


def test_several_smallest_sets_are_compared_by_amplification():
    chosen = selected(np.arange(1.0, 2001), (0.03, 0.1, 0.25), tuple(np.geomspace(0.03, 0.25, 11)), 1e-3)
    assert chosen.ties > 1


@pytest.mark.parametrize("seed", range(4))
def test_of_the_smallest_evaluated_sets_the_least_amplifying_is_selected(seed):
    evaluated, rng = {}, np.random.default_rng(seed)
    gammas, wanted = sigma_rel_to_gamma((0.03, 0.1, 0.25)), sigma_rel_to_gamma(np.geomspace(0.03, 0.25, 11))
    solver = Solver.of(np.arange(1, 2001), gammas, 2000, wanted)
    of_all = solver.solve(np.arange(2000))[0] ** 2

    def evaluate(places):
        within = (solver.solve(places)[0] ** 2 <= of_all + 1e-6).all()
        return evaluated.setdefault(tuple(places), rng.uniform(1, 9)) if within else None

    found = fewest_times(solver.subset_problem(of_all + 1e-6, of_all), evaluate)
    least = {places: value for places, value in evaluated.items() if len(places) == found.places.size}
    assert found.ties == len(least) > 1
    assert tuple(found.places) == min(least, key=least.get)


def test_4000_steps_and_21_lengths_take_about_a_second():
    t = np.arange(1.0, 4001)
    started = time.process_time()
    selected(t, PAIR, tuple(np.linspace(0.05, 0.25, 21)), 1e-3)
    assert time.process_time() - started < 10  # 0.6 s where nothing else runs


def test_candidates_are_thinned_where_there_are_too_many_steps():
    t = np.arange(1.0, 12001)
    chosen = selected(t, PAIR, (0.08,), 1e-2)
    assert 2000 < chosen.candidates < 12000
    assert chosen.places[-1] == 11999
    assert chosen.places.size == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [7.0], 0.5, [10.0]), "t_r has 0.5, but the earliest average in t_i has t = 1"),
        (([], [7.0], 1.0, [10.0]), "0 steps, 1 tracked profiles and 1 outputs; expected at least one of each"),
        (([1.0], [7.0], 1.0, []), "and 0 outputs"),
        (([-1.0], [7.0], 1.0, [10.0]), r"t has -1\.0"),
        (([1.0], [7.0], 1.0, [-0.7]), r"gammas_r has -0\.7"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_steps(*arguments)


def test_negative_tolerance_is_named():
    with pytest.raises(ValueError, match=r"tolerance is -1\.0; expected numbers of at least 0, finite"):
        select_steps([1.0], [7.0], 1.0, [10.0], tolerance=-1.0)
