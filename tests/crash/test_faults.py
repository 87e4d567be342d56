"""Training and reading on a disk whose calls fail, as network file systems and object stores refuse or lose them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash import faulty_disk

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(faulty_disk.COMPILER is None, reason="needs a C compiler (cc, gcc or clang)")
@pytest.mark.skipif(sys.platform != "linux", reason="needs a library that is preloaded, as Linux does it")
@pytest.mark.parametrize("folder", ["", pytest.param("/dev/shm", marks=pytest.mark.slow)])
def test_failing_calls_do_what_is_stated(folder):
    """A short campaign; ``make crash`` goes on for minutes."""
    where = ["--folder", folder] if folder else []
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash.faults", "--random", "12", *where]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows
    assert set(rows) <= set((REPOSITORY / "docs" / "faults.md").read_text().splitlines())
    assert re.search(r"\d+ fixed and 12 random cases \(seed 0\), 0 wrong", done.stdout), done.stdout
