"""`run_on_laggy(scenario)` returns, for each schedule, whether a scenario's results differ from the CPU's.

A *scenario* is a function at the top level of a module, `scenario(device, **case) -> {name: tensor or plain value}`.
It is called with device "cpu" once, for the expected results, then with "laggy" under every schedule. All calls are in
one child process, because a fake device changes torch for the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.laggy import build

ROOT = Path(__file__).parents[3]
SCHEDULES = ("eager", "lazy", *(f"random:{seed}" for seed in range(20)))
"""No single order finds every missing wait. Each missing wait of `pipeline.py` shows on at least one random seed in
three (measured, also on a busy machine), so that 20 seeds miss it less than once in 3000 runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one scenario under one schedule."""

    schedule: str
    case: Mapping[str, Any]
    verdict: Literal["same", "different", "error"]
    detail: str
    """Which results differ and how, or the traceback."""


class LaggyDied(AssertionError):
    """The child process ended or hung before it had answered; the message has its stacks."""


def run_on_laggy(
    scenario: Callable[..., Mapping[str, Any]],
    *,
    schedules: Sequence[str] = SCHEDULES,
    cases: Sequence[Mapping[str, Any]] = ({},),
    reference: Callable[..., Mapping[str, Any]] | None = None,
    timeout_seconds: float = 900,
    until_different: bool = False,
) -> list[Outcome]:
    """Run a scenario under every schedule for every case, in one child process.

    Args:
        scenario: See the module. It must end everything that it has started. Its results are compared bit for bit; a
            tensor on the device is copied on the current stream, with no other wait.
        schedules: "eager", "lazy", "random:SEED".
        cases: Keyword arguments of the scenario (JSON), one after the other.
        reference: Called as `reference("cpu", **case)` for the expected results; by default the scenario itself.
        timeout_seconds: For the child, after it has started; at the timeout the error has all its stacks.
            Only a test that hangs reaches the limit, however busy the machine is.
        until_different: Try no more schedules of a case after the first with different results.

    Returns:
        One outcome per case and schedule that was tried, cases first.

    Raises:
        LaggyDied: the child crashed or hung.
    """
    request = {
        "scenario": _name(scenario),
        "reference": _name(reference) if reference else None,
        "schedules": list(schedules),
        "cases": [dict(case) for case in cases],
        "timeout_seconds": timeout_seconds,
        "until_different": until_different,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.laggy.run", library_or_skip()],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout_seconds + 30,  # the child ends itself first, with its stacks
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    outcomes = [Outcome(**line["outcome"]) for line in lines if "outcome" in line]
    if done.returncode or (len(outcomes) != len(schedules) * len(cases) and not until_different):
        last = lines[-1] if lines else "nothing"
        raise LaggyDied(f"exit {done.returncode}; last output: {last}\n{done.stderr[-12000:]}")
    return outcomes


def assert_right_on_laggy(scenario: Callable[..., Mapping[str, Any]], **options: Any) -> None:
    """Fail with all differences if any schedule gives other results than the CPU; options of `run_on_laggy`."""
    outcomes = run_on_laggy(scenario, **options)
    wrong = [outcome for outcome in outcomes if outcome.verdict != "same"]
    if wrong:
        shown = "\n".join(f"{o.schedule} {dict(o.case) or ''} {o.verdict}\n{o.detail}" for o in wrong[:5])
        pytest.fail(f"{_name(scenario)} is wrong in {len(wrong)} of {len(outcomes)} runs on laggy:\n{shown}")


def library_or_skip() -> Path:
    """Return the device's library, built now if it does not exist. Without a compiler the test skips, except in CI."""
    try:
        return build.library()
    except build.NoCompiler as reason:
        if "CI" in os.environ:
            pytest.fail(f"{reason}; in CI that is a failure")
        pytest.skip(str(reason))


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"
