"""Retention after training, against trying every subset and against an independent dynamic program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.posthoc import retain
from nitrous_ema.posthoc.pruning import count_within
from tests.support.keep_losses import PAIR, TRIPLE, errors, gammas_of


def test_budget_of_bytes_becomes_a_number_of_snapshots():
    assert count_within(1000, 300) == 3
    with pytest.raises(ValueError, match="holds 1 snapshot of 600 bytes; expected space for at least 2"):
        count_within(1000, 600)


def best_worst_error(t, sigma_rels, lengths, keep, required):
    """Return the least worst error over all subsets, without the condition that weights sum to 1."""
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
def test_reported_errors_are_those_of_the_solve(seed, steps, sigma_rels, pin, by):
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


def test_lengths_lost_outside_the_range_are_reported():
    choice = retain(np.arange(1, 501), gammas_of(PAIR), keep=32)
    assert choice.sigma_rels[choice.in_range[[0, -1]]] == pytest.approx([0.05, 0.25])
    (warning,) = choice.warnings
    assert "become inaccurate at the newest step" in warning
    assert "0.015 (0.04 % -> 17 %)" in warning
    assert "Widen the range" in warning
    assert not retain(np.arange(1, 501), gammas_of(PAIR), keep=200, sigma_rels=(0.015, 0.28)).warnings


def test_error_limit_that_all_steps_miss_is_reported():
    choice = retain(np.arange(1, 21), gammas_of(PAIR), error=1e-3)
    assert any(
        "cannot be met at every length in the range, even with all snapshots" in each for each in choice.warnings
    )


def test_run_with_few_snapshots_keeps_all():
    choice = retain([3.0, 1.0, 2.0], gammas_of(PAIR), keep=5)
    assert choice.kept.tolist() == [1, 2, 0]
    assert choice.dropped.size == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 3, "error": 0.1}, "keep=3 and error=0.1: expected exactly one"),
        ({}, "keep=None and error=None: expected exactly one"),
        ({"keep": 1, "pinned": (0,)}, "keep is 1, but 2 steps are always kept"),
        ({"keep": 2, "pinned": (5,)}, "pinned has 5; expected places in t, which has 3 steps"),
        ({"error": 0.0}, "error is 0.0"),
        ({"t": [1.0, 1.0], "keep": 2}, "expected a 1-d array of different times"),
    ],
)
def test_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        retain(**{"t": [1.0, 2.0, 3.0], "gammas": gammas_of(PAIR), **arguments})


@pytest.mark.parametrize("by", [{"keep": 5}, {"error": 0.1}])
def test_required_steps_are_kept_without_being_targets(by):
    choice = retain(np.arange(1, 41), gammas_of(PAIR), required=(6, 20), sigma_rels=(0.05, 0.2), **by)
    assert {6, 20, 39} <= set(choice.kept.tolist())
    assert choice.error_after.shape[0] == 1
