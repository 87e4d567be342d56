"""The scenarios of the CUDA tests, without a CUDA device: on the CPU, and on the laggy device.

On a real device, only the parts that are CUDA's own then run for the first time.
"""

from __future__ import annotations

import pytest

from tests.cuda.test_scenarios import OPENED_BY
from tests.support.laggy.cases import SCENARIOS
from tests.support.laggy.loops import train
from tests.support.laggy.runner import assert_right_on_laggy, run_on_laggy
from tests.support.laggy.without import LINES, without
from tests.support.late import WHO, late
from tests.support.scenarios import replay
from tests.support.slow_snapshots import long_copy, slow_disk

SCHEDULES = ("eager", "lazy", *(f"random:{seed}" for seed in range(4)))


@pytest.mark.parametrize("scenario", [long_copy, slow_disk, replay])
def test_results_are_the_same_on_the_cpu_in_the_background(scenario):
    right, obtained = (scenario("cpu", background=background) for background in (False, True))
    assert [key for key in right if str(right[key]) != str(obtained[key])] == []


def late_train(device, who):
    with late(who):
        return train(device, **SCENARIOS["guarded"], then="ema_model")


@pytest.mark.slow
def test_results_are_the_same_on_laggy_with_any_late_party():
    assert_right_on_laggy(late_train, cases=[{"who": who} for who in WHO], schedules=SCHEDULES)


@pytest.mark.parametrize(
    "scenario", [long_copy, *(pytest.param(each, marks=pytest.mark.slow) for each in (slow_disk, replay))]
)
def test_results_are_the_same_on_laggy(scenario):
    assert_right_on_laggy(scenario, schedules=SCHEDULES)


@pytest.mark.slow
def test_training_ends_while_no_part_of_a_snapshot_is_copied():
    assert_right_on_laggy(long_copy, cases=[{"who": "copies, for long", "outlives": True}], schedules=["lazy"])


def late_train_without(device, line, who):
    with without(line if device != "cpu" else None), late(who):
        return train(device, **LINES[line].case)


@pytest.mark.slow
def test_lines_are_left_out_also_with_a_late_party():
    cases = [{"line": line, "who": who} for line, who in OPENED_BY.items()]
    outcomes = run_on_laggy(late_train_without, cases=cases, until_different=True)
    detected = {outcome.case["line"] for outcome in outcomes if outcome.verdict == "different"}
    assert detected == set(OPENED_BY)
