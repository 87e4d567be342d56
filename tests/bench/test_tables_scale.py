"""The table of docs/benchmarks.md on folders of many snapshots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import tables_scale
from nitrous_ema import SnapshotStore

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's own count")


def test_quick_command_prints_a_cell_for_every_work():
    command = [sys.executable, "-m", "bench.tables_scale", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    assert head.count("|") == 3 + len(tables_scale.WORKS)
    assert [row.count(" s, ") for row in rows] == [len(tables_scale.WORKS)] * 2


@pytest.mark.parametrize("runs", [1, 7])
def test_written_folder_is_one_history_of_all_runs(tmp_path, runs):
    tables_scale.write(tmp_path / "s", 30, runs)
    store = SnapshotStore(tmp_path / "s")
    assert [each.step for each in store.snapshots()] == list(range(1, 31))
    assert len(store.runs()) == runs
    assert store.verify() == []


def test_page_names_the_command_and_the_cases():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert "python -m bench.tables_scale" in page
    for snapshots, runs in tables_scale.CASES:
        if snapshots <= 10_000:
            assert f"| {snapshots} | {runs} | " in page
