"""Retention during training, against trying every drop and against the numbers of an independent simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.posthoc.keep_rules import KeepAll, KeepBytes, KeepCount, KeepGeometric, keep_rule
from tests.support.keep_losses import PAIR, TRIPLE, errors, gammas_of, least_score


def drop(rule, t, sigma_rels=PAIR, *, snapshot_bytes=100, pinned=()):
    return rule.drop(t, gammas=gammas_of(sigma_rels), snapshot_bytes=snapshot_bytes, pinned=pinned)


def keep_as_training_goes(rule, arrivals, sigma_rels=PAIR, *, pinned=()):
    """Yield each time 1, 2, ... with the times that are kept after it."""
    kept = []
    for now in range(1, arrivals + 1):
        kept.append(float(now))
        dropped = drop(rule, kept, sigma_rels, pinned=[place for place, time in enumerate(kept) if time in pinned])
        kept = [time for place, time in enumerate(kept) if place not in dropped]
        yield now, kept


def worst_error(rule, arrivals, sigma_rels, lengths, *, since, every=23):
    compared = [
        kept for now, kept in keep_as_training_goes(rule, arrivals, sigma_rels) if now >= since and now % every == 0
    ]
    return max(errors(kept, sigma_rels, kept[-1], lengths).max() for kept in compared)


def test_keep_all_drops_nothing():
    assert drop(KeepAll(), [1.0, 2.0, 3.0]) == ()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(3, 12),
    sigma_rels=st.sampled_from([(0.1,), PAIR, TRIPLE, (0.03, 0.06, 0.1, 0.2)]),
    exponent=st.sampled_from([1.0, 2.0]),
    unit=st.sampled_from([1.0, 1e12]),
    pin=st.booleans(),
)
def test_step_that_adds_least_error_is_dropped(seed, steps, sigma_rels, exponent, unit, pin):
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.uniform(0.2, 1, steps)) * unit
    pinned = [int(rng.integers(steps - 1))] if pin else []
    rule = KeepCount(steps - 1, sigma_rels=(0.04, 0.2), exponent=exponent)
    (dropped,) = drop(rule, t, sigma_rels, pinned=pinned)
    fixed = {steps - 1, *pinned}
    lengths = np.geomspace(0.04, 0.2, 16)
    best, scores = least_score(t, sigma_rels, lengths, t[sorted(fixed)], exponent, fixed)
    assert scores[dropped] <= scores[best] * 1.01 + 1e-25  # equal but for the table that the rule reads


def test_newest_and_pinned_steps_are_never_dropped():
    rule = KeepCount(4)
    for now, kept in keep_as_training_goes(rule, 60, pinned={7.0, 20.0}):
        assert kept[-1] == now
        assert {pin for pin in (7.0, 20.0) if pin <= now} <= set(kept)
        assert len(kept) <= 4
    assert drop(rule, [1.0, 2.0, 3.0, 4.0, 5.0], pinned=range(5)) == ()


def test_pinned_step_stays_a_target():
    """Keeping the pinned step alone would lose the steps that its averages are made of."""
    rule, lengths = KeepCount(40), np.geomspace(0.03, 0.25, 9)
    *_, (_, pinned) = keep_as_training_goes(rule, 600, TRIPLE, pinned={150.0})
    *_, (_, unpinned) = keep_as_training_goes(rule, 600, TRIPLE)
    assert errors(pinned, TRIPLE, 150, lengths).max() < 3e-3
    assert errors([*(t for t in unpinned if t < 150), 150], TRIPLE, 150, lengths).max() > 6e-3


@pytest.mark.parametrize(
    ("sigma_rels", "count", "lowest", "bound"),
    [(TRIPLE, 32, 0.03, 3.05e-4), (PAIR, 32, 0.05, 0.042), ((0.02, 0.05, 0.16), 32, 0.015, 6.8e-3)],
)
def test_error_of_a_bounded_number_is_bounded_at_every_time(sigma_rels, count, lowest, bound):
    lengths = np.geomspace(lowest, 0.25, 17)
    rule = KeepCount(count, sigma_rels=(lowest, 0.25))
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


def test_steps_of_equal_time_are_dropped_first():
    """Snapshots between two updates of a legacy schedule have the time of the last one."""
    assert drop(KeepCount(3), [1.0, 2.0, 2.0, 3.0]) in ((1,), (2,))
    assert drop(KeepCount(2), [4.0, 4.0, 4.0]) in ((0,), (1,))


def test_budget_of_bytes_leaves_space_for_one_more_snapshot():
    t = [float(time) for time in range(1, 9)]
    for budget, snapshot_bytes, count in ((1000, 200, 4), (1199, 200, 4), (1200, 200, 5), ("1kB", 100, 8)):
        rule = KeepBytes(budget, sigma_rels=(0.05, 0.2))
        expected = drop(KeepCount(count, sigma_rels=(0.05, 0.2)), t)
        assert drop(rule, t, snapshot_bytes=snapshot_bytes) == expected
        assert len(t) - len(expected) == count
        assert rule.most_snapshots(snapshot_bytes) in (count + 1, 10)


def test_snapshots_larger_than_the_budget_leave_the_newest_and_the_pinned():
    assert drop(KeepBytes(100), [1.0, 2.0, 3.0, 4.0], snapshot_bytes=1000, pinned=[1]) == (0, 2)


def test_rules_know_the_largest_number_of_snapshots():
    assert KeepAll().most_snapshots(100) is None
    assert KeepGeometric(2.0).most_snapshots(100) is None
    assert KeepCount(5).most_snapshots(100) == 6
    assert KeepBytes("1kB").most_snapshots(150) == 6


@pytest.mark.parametrize(
    ("keep", "rule"),
    [
        ("all", KeepAll()),
        (32, KeepCount(32)),
        ("100GB", KeepBytes("100GB")),
        (KeepGeometric(1.05), KeepGeometric(1.05)),
        (KeepCount(4, exponent=1), KeepCount(4, exponent=1)),
    ],
)
def test_rule_has_short_forms(keep, rule):
    assert keep_rule(keep) == rule


@pytest.mark.parametrize("keep", [None, 1.05, True, ["all"], KeepAll])
def test_other_types_are_refused(keep):
    with pytest.raises(TypeError, match=r"keep is .*; expected 'all', a number of snapshots .* or a rule"):
        keep_rule(keep)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeepGeometric(1.0), "ratio is 1.0; expected numbers greater than 1"),
        (lambda: KeepCount(1), "keep is 1; expected a whole number of at least 2"),
        (lambda: KeepCount(2.5), "keep is 2.5; expected a whole number of at least 2"),
        (lambda: KeepCount(4, sigma_rels=(0.2, 0.1)), "expected the shortest length first"),
        (lambda: KeepBytes(400, sigma_rels=(0.2, 0.4)), "sigma_rels has 0.4"),
        (lambda: KeepCount(4, exponent=0), "exponent is 0.0"),
        (lambda: KeepBytes("many"), "is not an amount of bytes"),
        (lambda: KeepBytes(0), "budget is 0; expected more than 0 bytes"),
        (lambda: keep_rule("32"), "keep is '32'; expected 'all', a number"),
        (lambda: keep_rule("everything"), "keep is 'everything'; expected 'all', a number"),
        (lambda: KeepCount(4).check((-0.7,), 100), "gammas has -0.7"),
        (lambda: KeepBytes("1kB").check((7.0,), 334), r"1,000 bytes, which holds 2 snapshots .*checkpoint_dtype"),
    ],
)
def test_bad_rule_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", [KeepAll(), KeepGeometric(1.1), KeepCount(2), KeepBytes(1000)])
def test_valid_rule_is_accepted(rule):
    rule.check(gammas_of(PAIR), 333)
