"""torch's own CUDA sanitizer sees no race in training with an EMA, and sees one where a wait is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEEN = "CSAN detected a possible data race"


def run(device: str, *lines: str, sanitizer: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_CUDA_SANITIZER": "1"}
    if not sanitizer:
        del environment["TORCH_CUDA_SANITIZER"]
    command = [sys.executable, "-m", "tests.cuda.in_sanitizer", device, *lines]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=140, check=False)


@pytest.mark.cuda
def test_sanitizer_sees_no_race():
    done = run("cuda")
    assert SEEN not in done.stderr, done.stderr[:8000]
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout.endswith("to the end\n")


@pytest.mark.cuda
@pytest.mark.parametrize(
    "line",
    ["update does not wait for the trainer", "optimizer does not wait", "averages written while they are copied"],
)
def test_sanitizer_sees_a_wait_that_is_left_out(line):
    done = run("cuda", line)
    assert SEEN in done.stderr
    assert done.stdout.count("no race:")  # it was not there before


def test_what_runs_under_the_sanitizer_runs_without_a_device():
    done = run("cpu", sanitizer=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("to the end\n")
