"""Tests that need a CUDA device: a report of the device and of each outcome, and an end to tests that hang."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from pathlib import Path

import pytest

LIMIT_SECONDS = 150
"""A test that takes this long has hung, and the device with it: the run ends with the stacks of all threads."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device-results", metavar="FILE", help="write the outcome of each CUDA test, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--device-results", default=None)
    if path is not None:
        from tests.cuda.results import Results

        config.pluginmanager.register(Results(Path(path)))


def pytest_report_header() -> str:
    from tests.cuda.results import machine

    return "device: " + ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Limit the time of a test, together with the fixtures that it is the first or the last to use."""
    if item.get_closest_marker("cuda") is None:
        return (yield)
    results = item.config.getoption("--device-results", default=None)
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # each worker has a file of its own
    suffix = f".{worker}.hung.txt" if worker else ".hung.txt"
    path = Path(results or "build/cuda-tests.json").absolute().with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stacks:  # not stderr: captured output would be lost with the process
        stacks.write(f"{item.nodeid}\n")
        stacks.flush()
        faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True, file=stacks)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            path.unlink()
