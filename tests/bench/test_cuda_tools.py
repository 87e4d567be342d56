"""What the CUDA tests lean on, where there is no device: how traces are read, and how results are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cuda.accounts import count
from tests.cuda.results import Results, machine
from tests.cuda.test_host import no_waits
from tests.cuda.trace import Trace, overlaps
from tests.support.fakes import TIMEOUT_SECONDS

REPOSITORY = Path(__file__).resolve().parents[2]

TRACE = [
    {"cat": "user_annotation", "name": "update", "tid": 1, "ts": 0.0, "dur": 10.0},
    {"cat": "user_annotation", "name": "forward", "tid": 1, "ts": 20.0, "dur": 10.0},
    {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "tid": 1, "ts": 5.0, "dur": 1.0, "args": {"correlation": 7}},
    {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 1, "ts": 21.0, "dur": 1.0, "args": {"correlation": 8}},
    {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "tid": 1, "ts": 25.0, "dur": 1.0, "args": {}},
    {"cat": "cuda_runtime", "name": "cudaEventSynchronize", "tid": 2, "ts": 5.0, "dur": 1.0, "args": {}},
    {"cat": "cuda_runtime", "name": "cudaEventQuery", "tid": 1, "ts": 6.0, "dur": 1.0, "args": {}},
    {"cat": "kernel", "name": "average", "ts": 30.0, "dur": 10.0, "args": {"stream": 20, "correlation": 7}},
    {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 1, "ts": 7.0, "dur": 1.0, "args": {"correlation": 6}},
    {"cat": "kernel", "name": "between chunks", "ts": 41.0, "dur": 1.0, "args": {"stream": 24, "correlation": 6}},
    {"cat": "kernel", "name": "gemm", "ts": 39.0, "dur": 5.0, "args": {"stream": 7, "correlation": 8}},
    {"cat": "kernel", "name": "late gemm", "ts": 40.0, "dur": 5.0, "args": {"stream": 7, "correlation": 9}},
]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "X", **event} for event in TRACE] + [{"ph": "M"}]}))
    return Trace(path, ["update", "forward"])


def test_kernels_belong_to_the_range_that_launched_them(trace):
    assert [(kernel.name, kernel.launched_by) for kernel in trace.kernels()] == [
        ("average", "update"),
        ("gemm", "forward"),
        ("late gemm", None),
        ("between chunks", "update"),
    ]


def test_kernels_overlap_only_on_different_streams_and_at_the_same_time(trace):
    pairs = overlaps(trace.kernels(), "update", ["forward", None])
    assert [(a.name, b.name) for a, b in pairs] == [("average", "gemm")]
    assert overlaps(trace.kernels(), "forward", ["forward", None]) == []


def test_waits_are_those_of_the_same_thread_in_the_range(trace):
    assert trace.waits("update") == []
    assert trace.waits("forward") == ["cudaStreamSynchronize"]


def test_mode_that_forbids_waits_may_warn_and_ends_in_any_case(monkeypatch):
    """torch warns, once, when it is switched on; where warnings are errors it is on all the same."""
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature and ...", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(ZeroDivisionError), no_waits("cuda"):
        raise ZeroDivisionError
    assert modes == ["error", "default"]


def report(name: str, when: str, outcome: str, **more: object) -> SimpleNamespace:
    flags = {"skipped": outcome == "skipped", "failed": outcome == "failed"}
    return SimpleNamespace(nodeid=name, when=when, outcome=outcome, duration=0.5, **flags, **more)


def test_results_say_what_became_of_each_test_also_of_one_that_hangs(tmp_path):
    path = tmp_path / "new" / "results.json"
    results = Results(path)
    for name, outcome, more in [
        ("good", "passed", {}),
        ("bad", "failed", {"longreprtext": "assert 1 == 2"}),
        ("left out", "skipped", {"longrepr": ("file", 1, "one device")}),
    ]:
        results.pytest_runtest_logstart(name)
        results.pytest_runtest_logreport(report(name, "setup", "passed"))
        results.pytest_runtest_logreport(report(name, "call", outcome, **more))
        results.pytest_runtest_logreport(report(name, "teardown", "passed"))
    results.pytest_runtest_logstart("hangs")
    written = json.loads(path.read_text())
    assert written["machine"]["torch"] == machine()["torch"]
    assert written["counts"] == {"failed": 1, "not finished": 1, "passed": 1, "skipped": 1}
    assert written["tests"]["bad"] == {"outcome": "failed", "seconds": 1.5, "why": "assert 1 == 2"}
    assert written["tests"]["left out"]["why"] == "one device"


HANGING = """
import threading
import pytest

@pytest.fixture(scope="module")
def hanging():
    threading.Event().wait({timeout})

@pytest.mark.cuda
def test_something(hanging):
    pass
"""
BOUNDED = """
from tests.cuda import conftest
from tests.cuda.conftest import pytest_addoption, pytest_runtest_protocol

conftest.LIMIT_SECONDS = 0.1

def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a device")
"""


@pytest.mark.parametrize(("worker", "name"), [("", "out.hung.txt"), ("gw1", "out.gw1.hung.txt")])
def test_fixture_of_a_module_that_hangs_ends_the_run_and_leaves_all_stacks(tmp_path, worker, name):
    """Each of several processes in a file of its own."""
    (tmp_path / "conftest.py").write_text(BOUNDED)
    (tmp_path / "test_hanging.py").write_text(HANGING.format(timeout=TIMEOUT_SECONDS))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device-results", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTEST_XDIST_WORKER": worker}
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=TIMEOUT_SECONDS, capture_output=True)
    assert done.returncode == 1, done.stdout
    stacks = (tmp_path / name).read_text()
    assert stacks.startswith("test_hanging.py::test_something\n")
    assert "in hanging" in stacks


def test_memory_is_counted_at_each_moment(tmp_path):
    readings = iter([100, 150, 170, 180])
    counted = count("cpu", str(tmp_path), lambda: next(readings), lambda: 200, lambda: None, torch.float32)
    assert (counted.averages, counted.after_warm_up, counted.after_many_steps, counted.peak) == (50, 70, 80, 30)
