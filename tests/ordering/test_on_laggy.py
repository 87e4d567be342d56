"""Training on a device that reorders work as a real device may: averages and snapshots have the bits of the CPU.

The reference is ``PostHocEMA`` on the CPU, where nothing runs in the background. The suite tries few schedules,
`make test-slow` more, and `make races` thousands.
"""

from __future__ import annotations

import functools

import pytest

from tests.support.laggy.cases import IN_DEPTH, SCENARIOS
from tests.support.laggy.loops import train
from tests.support.laggy.runner import SCHEDULES, Outcome, run_on_laggy
from tests.support.laggy.without import LINES, of

COMMON = {name: line for name, line in LINES.items() if not line.is_rare}
OTHERS = tuple(name for name in SCENARIOS if name not in IN_DEPTH)
GROUPS = {
    "in depth": (IN_DEPTH, SCHEDULES[:4]),
    "in depth, many schedules": (IN_DEPTH, SCHEDULES[:12]),
    "others": (OTHERS, SCHEDULES[:4]),
}
"""The scenarios of one child process, which takes seconds to start, and their schedules."""
SLOW_GROUPS = ("in depth, many schedules", "others")


@functools.cache
def run_group(group: str) -> dict[str, list[Outcome]]:
    names, schedules = GROUPS[group]
    cases = [SCENARIOS[name] for name in names]
    outcomes = run_on_laggy(train, cases=cases, schedules=schedules)
    return {name: outcomes[i * len(schedules) : (i + 1) * len(schedules)] for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, marks=[pytest.mark.slow] if group in SLOW_GROUPS else [])
        for group, (names, _) in GROUPS.items()
        for name in names
    ],
)
def test_training_gives_the_bits_of_the_cpu_and_neither_stops_the_host_nor_waits_for_copies(group, name):
    outcomes = run_group(group)[name]
    assert len(outcomes) == len(GROUPS[group][1])
    assert [(outcome.schedule, outcome.detail) for outcome in outcomes if outcome.verdict != "same"] == []


@pytest.fixture(scope="module")
def wrong() -> list[Outcome]:
    """Return the outcomes of all missing lines; schedules are tried until one differs."""
    cases = [{"bug": name, **line.case} for name, line in COMMON.items()]
    return run_on_laggy(train, cases=cases, until_different=True)


@pytest.mark.parametrize("name", COMMON)
def test_a_line_that_is_left_out_is_detected(wrong, name):
    verdicts = [outcome.verdict for outcome in wrong if outcome.case["bug"] == name]
    assert "different" in verdicts, f"{LINES[name].guards}: not detected: {name}"


@pytest.mark.parametrize("name", LINES)
def test_every_line_is_where_the_table_has_it(name):
    _, _, _, source = of(name)
    compile(source, name, "exec")
