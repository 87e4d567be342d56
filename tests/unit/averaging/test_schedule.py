"""When updates are applied, and with which weight."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from nitrous_ema.averaging.schedule import Schedule
from nitrous_ema.errors import NitrousWarning
from nitrous_ema.profile import gamma_to_sigma_rel

GAMMA = 6.94


def run(schedule: Schedule, calls: int, t_delta: float = 1) -> list[tuple[int, float]]:
    """(call, weight of the first profile) of every applied update."""
    applied = []
    for _ in range(calls):
        weights = schedule.advance(t_delta)
        if weights is not None:
            applied.append((schedule.step, weights[0]))
    return applied


@pytest.mark.parametrize("update_every", [1, 3, 10])
def test_updates_are_applied_at_the_first_call_and_every_kth_after_it(update_every):
    applied = run(Schedule([GAMMA], update_every, "exact"), 31)
    assert [step for step, _ in applied] == list(range(1, 32, update_every))


@pytest.mark.parametrize("correction", ["exact", True, False])
@pytest.mark.filterwarnings("ignore:step_size_correction=False")
def test_first_update_is_a_copy(correction):
    assert Schedule([GAMMA, 17.0], 3, correction).advance(1) == (1.0, 1.0)


@pytest.mark.parametrize("update_every", [1, 3, 10])
def test_exact_weights_leave_each_interval_the_share_of_its_profile(update_every):
    """Oracle: the integral of (gamma + 1) t^gamma / T^(gamma + 1) over the interval between two applied updates."""
    applied = run(Schedule([GAMMA], update_every, "exact"), 101)
    last = applied[-1][0]
    shares = []
    for index, (_, weight) in enumerate(applied):
        shares.append(weight * math.prod(1 - later for _, later in applied[index + 1 :]))
    edges = np.array([0, *(step for step, _ in applied)]) / last
    np.testing.assert_allclose(shares, np.diff(edges ** (GAMMA + 1)), rtol=1e-10, atol=1e-15)


def test_time_is_counted_in_the_units_of_t_delta():
    schedule = Schedule([GAMMA], 2, "exact")
    for t_delta in (256, 256, 512, 128):
        schedule.advance(t_delta)
    assert (schedule.step, schedule.now, schedule.t, schedule.t_first) == (4, 1152, 1024, 256)
    assert isinstance(schedule.now, int)


def test_catch_up_does_not_shift_the_schedule():
    schedule = Schedule([GAMMA], 10, "exact")
    applied = run(schedule, 5)
    assert schedule.is_behind
    assert schedule.catch_up() == (pytest.approx(1 - (1 / 5) ** (GAMMA + 1)),)
    assert schedule.catch_up() is None
    applied += run(schedule, 20)
    assert [step for step, _ in applied] == [1, 11, 21]
    assert applied[1][1] == pytest.approx(1 - (5 / 11) ** (GAMMA + 1))


@pytest.mark.filterwarnings("ignore:step_size_correction=False")
@pytest.mark.parametrize("correction", [True, False])
def test_without_the_exact_correction_nothing_is_caught_up(correction):
    schedule = Schedule([GAMMA], 10, correction)
    run(schedule, 5)
    assert schedule.catch_up() is None
    assert schedule.t == 1


def test_frozen_applies_only_the_first_update():
    schedule = Schedule([GAMMA], 2, "exact", frozen=True)
    assert run(schedule, 9) == [(1, 1.0)]
    assert schedule.step == 9
    assert schedule.catch_up() is None


def test_uncorrected_weights_warn_with_the_length_that_they_give():
    """Oracle: the standard deviation of the profile that the uncorrected decay really leaves after 3000 calls."""
    sigma_rel = gamma_to_sigma_rel(30.0)
    with pytest.warns(NitrousWarning, match="update_every=4") as caught:
        schedule = Schedule([30.0], 4, False)
    applied = run(schedule, 3001)
    kept = np.cumprod([1 - weight for _, weight in applied[:0:-1]])[::-1]
    shares = np.array([weight for _, weight in applied]) * np.append(kept, 1.0)
    times = np.array([step for step, _ in applied]) / applied[-1][0]
    width = math.sqrt(float(shares @ times**2 - (shares @ times) ** 2))
    assert f"{sigma_rel:.3f} becomes {width:.3f}" in str(caught[0].message)


@pytest.mark.parametrize("t_delta", [0, -1, math.nan, math.inf, "1", None, 1 + 0j, True])
def test_time_that_does_not_move_forward_is_refused_and_nothing_counts(t_delta):
    schedule = Schedule([GAMMA], 1, "exact")
    schedule.advance(1)
    with pytest.raises(ValueError, match=r"t_delta is .*: training time must move forward"):
        schedule.advance(t_delta)
    assert schedule.state() == {"step": 1, "now": 1, "t": 1, "t_first": 1, "updates": 1}


@pytest.mark.parametrize("t_delta", [np.int64(3), np.float32(2.5), 7])
def test_plain_and_numpy_numbers_are_times(t_delta):
    schedule = Schedule([GAMMA], 1, "exact")
    schedule.advance(t_delta)
    assert schedule.now == float(t_delta)
    assert type(schedule.now) in (int, float)


@pytest.mark.parametrize("correction", [True, False])
def test_other_times_than_calls_need_the_exact_correction(correction):
    schedule = Schedule([GAMMA], 1, correction)
    with pytest.raises(ValueError, match="'exact'"):
        schedule.advance(2)
    assert schedule.step == 0


@pytest.mark.parametrize("calls", range(25))
def test_saved_schedule_goes_on_where_it_was(calls):
    first, second = Schedule([GAMMA], 7, "exact"), Schedule([GAMMA], 7, "exact")
    run(first, calls, 2.5)
    second.load(first.state())
    assert run(first, 20, 3) == run(second, 20, 3)
    assert first.state() == second.state()


@pytest.mark.parametrize("calls", [0, 1, 2, 7, 8, 14, 15, 16])
def test_state_that_knows_its_step_only_counts_time_in_steps(calls):
    first, second = Schedule([GAMMA], 7, True), Schedule([GAMMA], 7, True)
    run(first, calls)
    second.load({"step": calls})
    assert second.state() == first.state()


def late(update_every: int) -> Schedule:
    """A schedule at step 1e6 + 1, directly after an applied update."""
    schedule = Schedule([GAMMA], update_every, "exact")
    schedule.load({"step": 10**6 + 1, "updates": 10**6 // update_every + 1})
    return schedule


def small_weight_warnings(schedule: Schedule, calls: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            weights = schedule.advance(1)
            if weights is not None:
                schedule.warn_of_small(weights)
    return [str(warning.message) for warning in caught]


def test_weights_too_small_for_float32_cause_one_warning():
    (message,) = small_weight_warnings(late(update_every=1), 50)
    assert "7.9e-06" in message  # (gamma + 1) / t
    assert "update_every=10 " in message


def test_sparse_updates_cause_no_warning():
    assert small_weight_warnings(late(update_every=100), 500) == []


def test_short_interval_after_a_checkpoint_is_no_small_weight():
    schedule = late(update_every=100)
    assert small_weight_warnings(schedule, 99) == []
    schedule.catch_up()
    assert small_weight_warnings(schedule, 1) == []  # one step since the checkpoint: weight 8e-6


def test_dense_updates_that_became_sparse_cause_no_warning():
    schedule = Schedule([GAMMA], 100, "exact")
    schedule.load({"step": 10**6, "now": 10**6, "t": 10**6, "updates": 10**6})
    assert small_weight_warnings(schedule, 500) == []  # the first one comes after a single step


def test_small_weights_of_float64_averages_cause_no_warning():
    schedule = late(update_every=1)
    schedule.least_weight = 0.0
    assert small_weight_warnings(schedule, 5) == []
