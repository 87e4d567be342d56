"""The examples, run as their readers run them, in a short form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nitrous_ema import SnapshotStore
from nitrous_ema.search.results import ResultsFile

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str, *arguments: str, warned: str = "error") -> list[str]:
    command = [sys.executable, "-W", warned, str(ROOT / "examples" / name), *arguments]
    # One thread: on busy cores a second one makes steps of so small a model several times slower.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_evaluation_follows_a_training_up_to_its_last_snapshot(tmp_path):
    options = [f"--out={tmp_path}", "--steps=240", "--every=20"]
    lines = run_example("follow_training.py", *options)
    steps = [
        int(re.fullmatch(r"step (\d+): best sigma_rel [\d.]+, mean squared error [\d.]+", line)[1]) for line in lines
    ]
    assert steps == sorted(set(steps))
    assert steps[-1] == 240
    assert {row.step for row in ResultsFile(tmp_path / "sweep.jsonl").read()} == set(steps)
    assert {snapshot.step for snapshot in SnapshotStore(tmp_path / "snapshots").snapshots()} >= set(steps)

    before = (tmp_path / "sweep.jsonl").read_bytes()
    assert (
        run_example("follow_training.py", *options, "--attach", warned="default") == lines[-1:]
    )  # nothing is evaluated again
    assert (tmp_path / "sweep.jsonl").read_bytes() == before


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_ranks_of_ddp_print_the_same_and_write_one_run(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "ddp.py"), str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r"rank (\d): ([\d.]+)", done.stdout))
    assert printed.keys() == {"0", "1"}
    assert printed["0"] == printed["1"]
    store = SnapshotStore(tmp_path / "s")
    (run,) = store.runs()
    assert store.is_closed(run)
    assert [each.step for each in store.snapshots()] == list(range(20, 401, 20))


@pytest.mark.slow
def test_a_second_training_in_a_used_folder_is_followed_too(tmp_path):
    run_example("follow_training.py", f"--out={tmp_path}", "--steps=60", "--every=20")
    again = run_example("follow_training.py", f"--out={tmp_path}", "--steps=40", "--every=20", warned="default")
    assert re.match(r"step 40: ", again[-1])
    assert not any(line.startswith("step 60: ") for line in again)
    assert len({row.run for row in ResultsFile(tmp_path / "sweep.jsonl").read()}) == 2
