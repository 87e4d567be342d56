"""Results of a run of the CUDA tests as JSON: the device, the version of torch, and the outcome of each test."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch


def machine() -> dict[str, Any]:
    """Return the device and the versions that the results belong to."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    found |= {"python": platform.python_version(), "triton": _version("triton"), "pytest": pytest.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "capability": list(torch.cuda.get_device_capability(0)),
            "memory_bytes": properties.total_memory,
        }
    return found


class Results:
    """Writes the file anew after each test, so that an interrupted run leaves the results so far.

    Args:
        path: The file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tests: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tests[nodeid] = {"outcome": "not finished", "seconds": 0.0}
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._tests[report.nodeid]
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed" or test["outcome"] == "not finished":
            test["outcome"] = report.outcome
        if report.skipped:
            test["why"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.failed:
            test["why"] = report.longreprtext[-4000:]
        if report.when == "teardown":
            self._write()

    def _write(self) -> None:
        outcomes = [test["outcome"] for test in self._tests.values()]
        counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
        text = json.dumps({"machine": machine(), "counts": counts, "tests": self._tests}, indent=1)
        being_written = self._path.with_name(f".{self._path.name}")
        being_written.write_text(text + "\n")
        os.replace(being_written, self._path)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
