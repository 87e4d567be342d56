"""However a process ends: its snapshots are whole, it ends in time, and it logs the snapshots that are not on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nitrous_ema import SnapshotStore
from tests.crash.endings import ENDINGS

ALL = [1, 2, 3, 4, 5, 6]
LEFT = "timeout at close: snapshots of steps [1, 2, 3, 4, 5, 6] are not on disk"
# Exit status, steps that are on disk, steps that may be as well, and text on stderr.
EXPECTED = {
    "training raises": (1, ALL, [], "KeyError: 'training failed'"),
    "training raises while the ema is in the traceback": (1, ALL, [], "ValueError: t_delta is 'text'"),
    "sys exit with the ema in a cycle": (3, ALL, [], ""),
    "os exit": (5, ALL[:3], ALL[3:], ""),  # what was flushed
    "training in a thread that outlives main": (0, ALL, [], ""),
    "exit while a write hangs": (0, ALL, [], ""),
    "exit while the disk hangs for good": (0, [], [], LEFT),
    "exception while the disk hangs for good": (1, [], [], LEFT),
    "interrupt while waiting for a slot": (-signal.SIGINT, [1], [], "KeyboardInterrupt"),
    "forks while a write hangs": (0, ALL, [], ""),
    "spawns while a write hangs": (0, ALL, [], ""),
    "interrupt before the lane's enqueue_write": (-signal.SIGINT, ALL[:3], [], "KeyboardInterrupt"),
    "interrupt after the lane's enqueue_write": (-signal.SIGINT, ALL[:3], [], "KeyboardInterrupt"),
    "interrupt before the lane's enqueue_read": (-signal.SIGINT, ALL[:3], [], "KeyboardInterrupt"),
    "interrupt after the lane's enqueue_read": (
        -signal.SIGINT,
        ALL[:3],
        [4],
        "KeyboardInterrupt",
    ),  # the lane may be ahead
    "interrupt before the lane's mark": (-signal.SIGINT, ALL[:1], [], "KeyboardInterrupt"),
    "interrupt after the lane's mark": (-signal.SIGINT, ALL[:1], [], "KeyboardInterrupt"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    root = tmp_path_factory.mktemp("ended")
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash.endings", str(root)]
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDINGS)
def test_process_that_ends_leaves_whole_snapshots_and_logs_missing_ones(ended, name):
    root, ends = ended
    end, (status, written, possible, message) = ends[name], EXPECTED[name]
    assert end["status"] == status, end["stderr"]
    assert message in end["stderr"]
    assert message or not end["stderr"], end["stderr"]
    store = SnapshotStore(root / end["folder"])
    found = [snapshot.step for snapshot in store.snapshots()]
    assert found[: len(written)] == written
    assert set(found) <= {*written, *possible}
    assert store.verify() == []
