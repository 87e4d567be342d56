"""The tables of docs/synthesis.md on memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import tables_memory

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's own count")


def test_quick_command_prints_both_tables():
    command = [sys.executable, "-m", "bench.tables_memory", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert [line.count("|") for line in done.stdout.splitlines()] == [6, 6, 6, 0, 4, 4, 4]


def test_thousands_of_long_names_take_no_more_than_the_estimate(tmp_path):
    """As the system counts it, with eight outputs, each with a header of its own."""
    tables_memory.write(tmp_path, 10_000, 70, 2, snapshots=5)
    estimated, taken = tables_memory.run(tmp_path, outputs=8)
    assert estimated / 4 < taken < estimated


def test_page_names_the_command_and_the_cases():
    page = (ROOT / "docs" / "synthesis.md").read_text()
    assert "python -m bench.tables_memory" in page
    for case in (*tables_memory.TENSORS, *tables_memory.SNAPSHOTS):
        assert f"| {' | '.join(map(str, case))} | " in page
