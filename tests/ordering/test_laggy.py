"""The fake device itself: it keeps CUDA's ordering contract, gives the CPU's bits, and finds ordering bugs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

import pytest

from tests.support.laggy import build
from tests.support.laggy.build import NoCompiler
from tests.support.laggy.contract import PROBES, probe
from tests.support.laggy.pipeline import BUGS, on_cpu, on_laggy
from tests.support.laggy.runner import (
    SCHEDULES,
    LaggyDied,
    Outcome,
    assert_right_on_laggy,
    library_or_skip,
    run_on_laggy,
)
from tests.support.laggy.training import train

OPTIMIZERS = [
    {"optimizer": "SGD", "foreach": True},
    {"optimizer": "SGD", "foreach": False, "momentum": 0.9},
    {"optimizer": "SGD", "fused": True},
    {"optimizer": "AdamW", "foreach": True},
    {"optimizer": "AdamW", "foreach": False},
    {"optimizer": "AdamW", "fused": True},
]


@pytest.fixture(scope="module")
def promises() -> dict[str, list[Outcome]]:
    schedules = ["eager", "lazy", *(f"random:{seed}" for seed in range(5))]
    return by_case("name", run_on_laggy(probe, schedules=schedules, cases=[{"name": name} for name in PROBES]))


@pytest.fixture(scope="module")
def pipelines() -> dict[str | None, list[Outcome]]:
    return by_case("bug", run_on_laggy(on_laggy, reference=on_cpu, cases=[{"bug": bug} for bug in (None, *BUGS)]))


@pytest.mark.parametrize("name", PROBES)
def test_the_device_keeps_its_promise(promises, name):
    assert [outcome.detail for outcome in promises[name] if outcome.verdict != "same"] == []


@pytest.mark.slow
def test_training_gives_the_bits_of_the_cpu_and_never_waits():
    assert_right_on_laggy(train, cases=OPTIMIZERS, schedules=["eager", "lazy", "random:0", "random:1"])


def test_the_pipeline_with_all_waits_is_never_wrong(pipelines):
    assert [outcome.detail for outcome in pipelines[None] if outcome.verdict != "same"] == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_missing_wait_is_found(pipelines, bug):
    found = [outcome for outcome in pipelines[bug] if outcome.verdict == "different"]
    assert len(pipelines[bug]) == len(SCHEDULES)
    assert found, f"{BUGS[bug]}, and no schedule shows it"


def hang(device: str) -> dict[str, int]:
    if device == "laggy":
        threading.Event().wait()
    return {}


def test_a_child_that_hangs_is_ended_and_its_stacks_are_reported():
    library_or_skip()  # not in the child's time
    with pytest.raises(LaggyDied, match=r"(?s)lazy.*test_laggy.py.* in hang"):
        run_on_laggy(hang, schedules=["lazy"], timeout_seconds=6)


def test_without_a_compiler_a_test_skips_but_never_in_ci(monkeypatch):
    def no_library():
        raise NoCompiler("no g++")

    monkeypatch.setattr(build, "library", no_library)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="g\\+\\+"):
        library_or_skip()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="g\\+\\+"):
        library_or_skip()


def by_case(key: str, outcomes: Sequence[Outcome]) -> dict[str | None, list[Outcome]]:
    grouped = defaultdict(list)
    for outcome in outcomes:
        grouped[outcome.case[key]].append(outcome)
    return grouped
