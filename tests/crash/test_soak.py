from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_readers_and_a_pruner_beside_a_writer_fail_only_on_removed_snapshots():
    """A short soak; ``make soak`` goes on for minutes."""
    share = ["--seconds", "0", "--lives", "4", "--rounds", "4", "--syntheses", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash.soak", *share]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* hidden; .*no wrong answer", done.stdout), done.stdout
