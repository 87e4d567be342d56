"""The rules of torch's CUDA sanitizer on the laggy device: no false alarm, and an alarm where a wait is left out."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import pytest

from nitrous_ema.async_ import lanes
from tests.cuda.in_sanitizer import NAMES, is_reached_and_seen
from tests.support import slow_snapshots
from tests.support.laggy.cases import SCENARIOS
from tests.support.laggy.loops import train
from tests.support.laggy.runner import run_on_laggy
from tests.support.laggy.sanitizer import sanitized
from tests.support.laggy.without import without
from tests.support.slow_snapshots import long_copy, no_writer_waits_before

SCHEDULES = ("eager", "lazy", "random:0")


def races(device: str, name: str, line: str | None = None, queries: bool = True) -> dict[str, Any]:
    with ExitStack() as stack:
        if device == "cpu":
            return {"races": []}
        if queries:
            stack.enter_context(mock.patch.object(lanes._DeviceMark, "is_reached", is_reached_and_seen))
        else:  # and writers wait for nothing until training is over, because the sanitizer would see their waits
            only_wait = partial(no_writer_waits_before, nor_queries=False)
            stack.enter_context(
                mock.patch.object(slow_snapshots, "no_writer_waits_before", lambda gate, **_: only_wait(gate))
            )
        stack.enter_context(without(line))
        found = stack.enter_context(sanitized())
        if name == "long copy":
            long_copy(device, outlives=not queries)
        else:
            train(device, **SCENARIOS[name])
        return {"races": sorted(set(found))}


@pytest.mark.parametrize("names", [NAMES[:1], pytest.param([*NAMES[1:], "long copy"], marks=pytest.mark.slow)])
def test_sanitizer_sees_no_race_in_any_training(names):
    outcomes = run_on_laggy(races, cases=[{"name": name} for name in names], schedules=SCHEDULES)
    assert [outcome.detail for outcome in outcomes if outcome.verdict != "same"] == []


@pytest.mark.parametrize(
    "line",
    [
        "optimizer does not wait",
        pytest.param("update does not wait for the trainer", marks=pytest.mark.slow),
        pytest.param("averages written while they are copied", marks=pytest.mark.slow),
    ],
)
def test_sanitizer_sees_a_wait_that_is_left_out(line):
    outcomes = run_on_laggy(races, cases=[{"name": "guarded", "line": line}], schedules=SCHEDULES)
    assert any("foreach" in outcome.detail for outcome in outcomes if outcome.verdict == "different")


@pytest.mark.slow
def test_sanitizer_reports_a_race_where_the_host_has_queried_an_event():
    """The reason why each successful query is followed by a wait in programs that run under the sanitizer."""
    outcomes = run_on_laggy(races, cases=[{"name": "long copy", "queries": False}], schedules=SCHEDULES)
    assert "different" in [outcome.verdict for outcome in outcomes]
