"""Averages in parts, written by processes that do not communicate."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.outputs.reader import read_average
from tests.support.snapshot_folders import layout_of, record, write_run

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120
MODULE = "nitrous_ema.async_.synthesize_worker"
NAME = "step-1000-sigma-0.07"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("snapshots")
    write_run(root, layout_of([record(f"w{index}", (3000,)) for index in range(6)]), range(100, 1100, 100))
    return root


def start(folder, out, *more, **variables) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", MODULE, str(folder), "--sigma-rel=0.07", f"--out={out}", *more]
    environment = {**os.environ, **variables}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def ended(process) -> tuple[int, list[dict[str, object]], str]:
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    return process.returncode, [json.loads(line) for line in stdout.splitlines()], stderr


def ranks(folder, out, count, which):
    numbers = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [start(folder, out, "--step=1000", RANK=str(rank), **numbers) for rank in which]


def test_processes_that_know_their_rank_write_the_bits_of_one(folder, tmp_path):
    assert ended(start(folder, tmp_path / "one"))[0] == 0
    found = [ended(process) for process in ranks(folder, tmp_path / "three", 3, (2, 0, 1))]
    assert [(status, lines[0]["part"], lines[0]["parts"]) for status, lines, _ in found] == [
        (0, 3, 3), (0, 1, 3), (0, 2, 3),
    ]  # fmt: skip
    assert found[1][1][0]["path"].endswith(f"{NAME}-00001-of-00003.safetensors")
    whole = safetensors.numpy.load_file(tmp_path / "one" / f"{NAME}.safetensors")
    parts = read_average(tmp_path / "three" / f"{NAME}.safetensors.index.json")
    assert parts.keys() == whole.keys()
    assert all(np.array_equal(parts[key].numpy(), whole[key]) for key in whole)


def test_part_of_a_killed_process_is_missing_and_made_later(folder, tmp_path):
    for process in ranks(folder, tmp_path, 3, (0, 2)):
        assert ended(process)[0] == 0
    index = tmp_path / f"{NAME}.safetensors.index.json"
    with pytest.raises(NitrousError, match="00002-of-00003"):
        read_average(index)
    states = []
    for part in ("1/3", "2/3", "3/3"):
        status, lines, _ = ended(start(folder, tmp_path, "--step=1000", "--skip-existing", f"--part={part}"))
        assert status == 0
        states += [line["state"] for line in lines]
    assert states == ["kept", "written", "kept"]
    assert len(read_average(index)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Pass the target steps"),
        (("--step=all",), "Pass the target steps"),
        (("--step=1000", "--format=pt"), "written in parts"),
        (("--follow",), "its own pace"),
    ],
)
def test_parts_that_may_not_fit_together_are_wrong_usage(folder, tmp_path, arguments, message):
    status, lines, stderr = ended(start(folder, tmp_path / "out", "--part=1/2", *arguments))
    assert (status, lines) == (2, [])
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_newest_step_of_a_closed_run_is_the_same_for_all(tmp_path):
    run = write_run(tmp_path / "snapshots", layout_of([record("w", (300,)), record("v", (300,))]), [100, 200])
    SnapshotStore(tmp_path / "snapshots").close_run(run)
    assert ended(start(tmp_path / "snapshots", tmp_path / "out", "--part=1/2"))[0] == 0


def test_torchrun_starts_it(folder, tmp_path):
    if importlib.util.find_spec("torch.distributed.run") is None:
        pytest.skip("this torch has no torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "-m", MODULE]
    done = subprocess.run(
        [*command, str(folder), "--sigma-rel=0.07", "--step=1000", f"--out={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(line)["part"] for line in done.stdout.splitlines()) == [1, 2]
    assert len(read_average(tmp_path / f"{NAME}.safetensors.index.json")) == 6
