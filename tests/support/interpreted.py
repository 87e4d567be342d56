"""Runs cases in Triton's interpreter: on the CPU, one program after the other, by numpy.

Triton chooses the interpreter when ``@triton.jit`` is applied, so the cases run in a process of their own. A case is a
function of a module, named after its claim; it fails by raising.
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
    """Return the public functions that a module defines, in its order."""
    members = vars(importlib.import_module(module)).items()
    return {
        name: member
        for name, member in members
        if inspect.isfunction(member) and member.__module__ == module and not name.startswith("_")
    }


def run_interpreted(module: str, cache: Path) -> dict[str, str]:
    """Return the traceback of each case of a module, by name; empty where the case passed."""
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
        print(f"{name} ...", file=sys.stderr)  # after a crash, the last name is the case that crashed
        try:
            case()
        except (Exception, pytest.fail.Exception):
            outcomes[name] = traceback.format_exc()
        else:
            outcomes[name] = ""
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
