"""Runs cases where Triton's kernels are interpreted: on the CPU, one program after the other, by numpy.

Triton decides that when it sees ``@triton.jit``, so it takes a process of its own. A case is a function of a module, in
whose name its claim stands; it fails by an exception.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

TIMEOUT_SECONDS = 300

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which exists for Linux only (pip install triton)"
)


def cases(module: str) -> dict[str, Callable[[], None]]:
    """The public functions that a module defines, in its order."""
    members = vars(importlib.import_module(module)).items()
    return {
        name: member
        for name, member in members
        if inspect.isfunction(member) and member.__module__ == module and not name.startswith("_")
    }


def run_interpreted(module: str, cache: Path) -> dict[str, str]:
    """What went wrong in each case of a module; empty where nothing did."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted", module],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"ended with {done.returncode}: {done.stderr}")
    outcomes: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


def main() -> None:
    outcomes = {}
    for name, case in cases(sys.argv[1]).items():
        print(f"{name} ...", file=sys.stderr)  # the last one that is named crashed
        try:
            case()
        except (Exception, pytest.fail.Exception):
            outcomes[name] = traceback.format_exc()
        else:
            outcomes[name] = ""
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
