"""Which steps stay: against trying every drop or every subset, and against the numbers of an independent simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.posthoc import retain, synthesis_report
from nitrous_ema.posthoc.retention import KeepAll, KeepCount, KeepGeometric, count_within
from nitrous_ema.profile import sigma_rel_to_gamma

PAIR, TRIPLE = (0.05, 0.1), (0.03, 0.1, 0.25)


def gammas_of(sigma_rels):
    return tuple(sigma_rel_to_gamma(sigma_rels).tolist())


def errors(t, sigma_rels, t_r, lengths, normalize="constrain"):
    kept = np.asarray(t, float)
    kept, gammas = kept[kept <= t_r], sigma_rel_to_gamma(sigma_rels)
    inputs = np.repeat(kept, gammas.size), np.tile(gammas, kept.size)
    wanted = np.full(len(lengths), float(t_r)), sigma_rel_to_gamma(lengths)
    return synthesis_report(*inputs, *wanted, normalize=normalize).profile_error


def keep_as_training_goes(rule, arrivals, *, pinned=()):
    """What is kept after each arrival at the times 1, 2, ..."""
    kept = []
    for now in range(1, arrivals + 1):
        kept.append(float(now))
        dropped = rule.drop(kept, [place for place, time in enumerate(kept) if time in pinned])
        kept = [time for place, time in enumerate(kept) if place not in dropped]
        yield now, kept


def worst_error(rule, arrivals, sigma_rels, lengths, *, since, every=23):
    judged = [kept for now, kept in keep_as_training_goes(rule, arrivals) if now >= since and now % every == 0]
    return max(errors(kept, sigma_rels, kept[-1], lengths).max() for kept in judged)


# --- While training goes on ------------------------------------------------------------------------------------------
def test_all_means_all():
    assert KeepAll().drop([1.0, 2.0, 3.0]) == ()


def least_score(t, sigma_rels, lengths, targets, exponent, fixed):
    """The drop that the rule is defined by, each one tried with the solve over the steps that would remain."""
    scores = {}
    for place in set(range(len(t))) - fixed:
        rest = np.delete(t, place)
        each = [errors(rest, sigma_rels, target, lengths, normalize=None) for target in targets]
        scores[place] = sum((error ** (2 * exponent)).sum() for error in each)
    return min(scores, key=scores.get), scores


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(3, 12),
    sigma_rels=st.sampled_from([(0.1,), PAIR, TRIPLE, (0.03, 0.06, 0.1, 0.2)]),
    exponent=st.sampled_from([1.0, 2.0]),
    unit=st.sampled_from([1.0, 1e12]),
    pin=st.booleans(),
)
def test_step_that_costs_least_is_dropped(seed, steps, sigma_rels, exponent, unit, pin):
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.uniform(0.2, 1, steps)) * unit
    pinned = [int(rng.integers(steps - 1))] if pin else []
    rule = KeepCount(count=steps - 1, gammas=gammas_of(sigma_rels), sigma_rels=(0.04, 0.2), exponent=exponent)
    (dropped,) = rule.drop(t, pinned)
    fixed = {steps - 1, *pinned}
    lengths = np.geomspace(0.04, 0.2, 16)
    best, scores = least_score(t, sigma_rels, lengths, t[sorted(fixed)], exponent, fixed)
    assert scores[dropped] <= scores[best] * 1.01 + 1e-25  # equal but for the table that the rule reads


def test_newest_and_pinned_steps_are_never_dropped():
    rule = KeepCount(count=4, gammas=gammas_of(PAIR))
    for now, kept in keep_as_training_goes(rule, 60, pinned={7.0, 20.0}):
        assert kept[-1] == now
        assert {pin for pin in (7.0, 20.0) if pin <= now} <= set(kept)
        assert len(kept) <= 4
    everything = (0, 1, 2, 3, 4)
    assert rule.drop([1.0, 2.0, 3.0, 4.0, 5.0], everything) == ()


def test_pinned_step_stays_a_target():
    """Pinning alone would keep the step and lose what its averages are made of."""
    rule, lengths = KeepCount(count=40, gammas=gammas_of(TRIPLE)), np.geomspace(0.03, 0.25, 9)
    *_, (_, pinned) = keep_as_training_goes(rule, 600, pinned={150.0})
    *_, (_, unpinned) = keep_as_training_goes(rule, 600)
    assert errors(pinned, TRIPLE, 150, lengths).max() < 3e-3
    assert errors([*(t for t in unpinned if t < 150), 150], TRIPLE, 150, lengths).max() > 6e-3


@pytest.mark.parametrize(
    ("sigma_rels", "count", "lowest", "bound"),
    [(TRIPLE, 32, 0.03, 3.05e-4), (PAIR, 32, 0.05, 0.042), ((0.02, 0.05, 0.16), 32, 0.015, 6.8e-3)],
)
def test_error_of_a_bounded_number_is_bounded_at_every_time(sigma_rels, count, lowest, bound):
    lengths = np.geomspace(lowest, 0.25, 17)
    rule = KeepCount(count=count, gammas=gammas_of(sigma_rels), sigma_rels=(lowest, 0.25))
    assert worst_error(rule, 800, sigma_rels, lengths, since=2 * count) < bound


@pytest.mark.parametrize(
    ("sigma_rels", "ratio", "lowest", "bound"), [(PAIR, 1.05, 0.05, 0.01), ((0.03, 0.06, 0.16), 1.1, 0.03, 0.003)]
)
def test_geometric_spacing_has_the_same_error_at_every_time(sigma_rels, ratio, lowest, bound):
    lengths = np.geomspace(lowest, 0.25, 17)
    assert worst_error(KeepGeometric(ratio), 1500, sigma_rels, lengths, since=400) < bound


def test_geometric_spacing_keeps_few():
    *_, (_, kept) = keep_as_training_goes(KeepGeometric(1.05), 2000)
    ratios = np.array(kept[1:-1]) / kept[:-2]
    assert ratios.min() >= 1.05 * (1 - 1e-9)
    assert (ratios[60:] < 1.07).all()
    assert len(kept) < 110


def test_geometric_spacing_keeps_pinned_steps():
    *_, (_, kept) = keep_as_training_goes(KeepGeometric(1.5), 300, pinned={5.0, 6.0, 250.0})
    assert {5.0, 6.0, 250.0, 300.0} <= set(kept)


def test_budget_of_bytes_is_a_number_of_snapshots():
    assert count_within(1000, 300) == 3
    with pytest.raises(ValueError, match="holds 1 snapshots of 600 bytes; expected room for at least 2"):
        count_within(1000, 600)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeepGeometric(1.0), "ratio has 1.0; expected numbers greater than 1"),
        (lambda: KeepCount(count=1, gammas=(7.0,)), "count is 1; expected at least 2"),
        (lambda: KeepCount(count=4, gammas=(-0.7,)), "gammas has -0.7"),
        (lambda: KeepCount(count=4, gammas=(7.0,), sigma_rels=(0.2, 0.1)), "expected the shortest length first"),
        (lambda: KeepCount(count=4, gammas=(7.0,), sigma_rels=(0.2, 0.4)), "sigma_rel has 0.4"),
        (lambda: KeepCount(count=4, gammas=(7.0,), exponent=0), "exponent has 0.0"),
    ],
)
def test_bad_rule_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Finished runs ---------------------------------------------------------------------------------------------------
def best_worst_error(t, sigma_rels, lengths, keep, required):
    """Least worst error over all subsets, before the sum of the weights is made 1."""
    others = [place for place in range(len(t)) if place not in required]
    return min(
        max(errors(t[sorted({*some, *required})], sigma_rels, t[r], lengths, None).max() for r in required)
        for some in itertools.combinations(others, keep - len(required))
    )


@pytest.mark.parametrize("sigma_rels", [(0.1,), PAIR, TRIPLE])
@pytest.mark.parametrize("pinned", [(), (4,)])
def test_no_other_set_of_that_size_has_a_smaller_worst_error(sigma_rels, pinned):
    t, lengths = np.array([1, 2, 3.5, 4, 6, 7, 9, 10.0]), np.geomspace(0.05, 0.2, 16)
    for keep in (3, 5):
        choice = retain(t, gammas_of(sigma_rels), keep=keep, sigma_rels=(0.05, 0.2), pinned=pinned)
        best = best_worst_error(t, sigma_rels, lengths, keep, {*pinned, 7})
        ours = max(errors(t[choice.kept], sigma_rels, t[r], lengths, None).max() for r in {*pinned, 7})
        assert choice.kept.size == keep
        assert {*pinned, 7} <= set(choice.kept.tolist())
        assert choice.lower_bound <= best * (1 + 1e-9)
        assert ours <= best * 1.05


@pytest.mark.parametrize(("sigma_rels", "lowest", "expected"), [(TRIPLE, 0.03, 1.5e-4), (PAIR, 0.05, 0.0228)])
def test_best_32_of_300(sigma_rels, lowest, expected):
    """The optimum of an independent dynamic program over all pairs of steps."""
    choice = retain(np.arange(1, 301), gammas_of(sigma_rels), keep=32, sigma_rels=(lowest, 0.25))
    worst = choice.error_after[-1, choice.in_range].max()
    assert worst == pytest.approx(expected, rel=0.02)
    assert 0.97 * worst < choice.lower_bound <= worst


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(2, 60),
    sigma_rels=st.sampled_from([(0.1,), PAIR, TRIPLE]),
    pin=st.booleans(),
    by=st.sampled_from([{"keep": 8}, {"error": 0.02}, {"error": 1e-4}]),
)
def test_errors_told_are_those_of_the_solve(seed, steps, sigma_rels, pin, by):
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.exponential(1, steps) + 0.01) * 1e6
    pinned = (steps // 2,) if pin else ()
    choice = retain(t, gammas_of(sigma_rels), pinned=pinned, **by)
    targets = sorted({*pinned, steps - 1})
    for k, target in enumerate(targets):
        before, after = (errors(some, sigma_rels, t[target], choice.sigma_rels) for some in (t, t[choice.kept]))
        np.testing.assert_allclose(choice.error_before[k], before, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(choice.error_after[k], after, rtol=1e-6, atol=1e-12)
        if "error" in by:
            limit = np.where(before <= by["error"], by["error"], 1.1 * before)
            assert (after <= limit * (1 + 1e-6))[choice.in_range].all()
    assert sorted([*choice.kept, *choice.dropped]) == list(range(steps))
    assert {*targets} <= set(choice.kept.tolist())


def test_error_is_met_with_the_fewest_steps():
    choice = retain(np.arange(1, 501), gammas_of(TRIPLE), error=1e-3)
    assert choice.error_after[-1, choice.in_range].max() <= 1e-3
    assert choice.kept.size == choice.lower_bound == 16


def test_what_the_range_leaves_out_is_told():
    choice = retain(np.arange(1, 501), gammas_of(PAIR), keep=32)
    assert choice.sigma_rels[choice.in_range[[0, -1]]] == pytest.approx([0.05, 0.25])
    (told,) = choice.warnings
    assert "0.015 (0.04 % -> 17 %)" in told
    assert "Widen the range" in told
    assert not retain(np.arange(1, 501), gammas_of(PAIR), keep=200, sigma_rels=(0.015, 0.28)).warnings


def test_error_that_all_steps_miss_is_told():
    choice = retain(np.arange(1, 21), gammas_of(PAIR), error=1e-3)
    assert any("Not even all steps" in told for told in choice.warnings)


def test_a_run_that_is_small_enough_stays_whole():
    choice = retain([3.0, 1.0, 2.0], gammas_of(PAIR), keep=5)
    assert choice.kept.tolist() == [1, 2, 0]
    assert choice.dropped.size == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 3, "error": 0.1}, "keep is 3 and error is 0.1; expected exactly one"),
        ({}, "keep is None and error is None"),
        ({"keep": 1, "pinned": (0,)}, "keep is 1, but 2 steps stay in any case"),
        ({"keep": 2, "pinned": (5,)}, "pinned has 5; expected places in t, which has 3 steps"),
        ({"error": 0.0}, "error has 0.0"),
        ({"t": [1.0, 1.0], "keep": 2}, "expected a 1-d array of different times"),
    ],
)
def test_bad_question_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        retain(**{"t": [1.0, 2.0, 3.0], "gammas": gammas_of(PAIR), **arguments})
