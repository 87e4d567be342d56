from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import nitrous_ema
from nitrous_ema.synthesis.worker.launch import launch
from tests.support.old_folders import SIGMA_RELS, write_nitrous_001
from tests.support.snapshot_folders import layout_of, record, write_run

TIMEOUT = 60
PACKAGE = Path(nitrous_ema.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("snapshots")
    write_run(root, layout_of([record("w", (500,))]), range(100, 1100, 100))
    return root


def test_several_steps_and_lengths_come_in_their_order(folder, tmp_path):
    outputs = launch(
        folder, sigma_rels=[0.1, 0.07], steps=[900, 300], out=tmp_path / "{step}" / "{sigma_rel}.safetensors"
    ).result(TIMEOUT)
    expected = [(900, 0.1), (900, 0.07), (300, 0.1), (300, 0.07)]
    assert [(each.step, each.sigma_rel) for each in outputs] == expected
    assert [each.path for each in outputs] == [tmp_path / str(s) / f"{length}.safetensors" for s, length in expected]
    assert all(max(each.steps_read) <= each.step and each.path.exists() for each in outputs)


def test_all_steps_may_be_requested(folder, tmp_path):
    outputs = launch(folder, sigma_rels=[0.1], steps="all", out=tmp_path, exclude=[500], dry_run=True).result(TIMEOUT)
    assert [each.step for each in outputs] == [step for step in range(100, 1100, 100) if step != 500]


def test_dry_run_estimates_the_outputs_and_writes_nothing(folder, tmp_path):
    what = {"sigma_rels": [0.06, 0.1], "out": tmp_path / "out", "memory": "64MiB"}
    planned = launch(folder, dry_run=True, **what).result(TIMEOUT)
    assert not (tmp_path / "out").exists()
    written = launch(folder, **what).result(TIMEOUT)
    assert {each.state for each in planned} == {"planned"}
    for name in ("path", "file_bytes", "bytes_read", "memory_bytes", "profile_error", "rounding", "steps_read"):
        assert [getattr(each, name) for each in planned] == [getattr(each, name) for each in written]
    assert [each.file_bytes for each in written] == [each.path.stat().st_size for each in written]
    assert 0 < written[0].memory_bytes <= 64 << 20


def test_existing_outputs_are_reused_and_reported_in_their_place(folder, tmp_path):
    what = {"out": tmp_path, "skip_existing": True, "tolerance": 0}
    launch(folder, sigma_rels=[0.07, 0.09], **what).result(TIMEOUT)
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    (tmp_path / "step-1000-sigma-0.09.safetensors").write_bytes(b"torn")
    outputs = launch(folder, sigma_rels=[0.06, 0.07, 0.09, 0.1], **what).result(TIMEOUT)
    assert [(each.sigma_rel, each.state) for each in outputs] == [
        (0.06, "written"), (0.07, "kept"), (0.09, "written"), (0.1, "written"),
    ]  # fmt: skip
    assert (tmp_path / "step-1000-sigma-0.07.safetensors").stat().st_ino == before["step-1000-sigma-0.07.safetensors"]
    assert [each.bytes_read == 0 for each in outputs] == [False, True, False, False]
    again = launch(folder, sigma_rels=[0.06, 0.07, 0.09, 0.1], **what, dry_run=True).result(TIMEOUT)
    assert [each.state for each in again] == ["kept"] * 4


def test_process_of_a_training_under_torchrun_writes_whole_files(folder, tmp_path, monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    (output,) = launch(folder, sigma_rels=[0.07], out=tmp_path).result(TIMEOUT)
    assert (output.part, output.parts) == (1, 1)
    assert output.path.name == "step-1000-sigma-0.07.safetensors"


def test_process_finds_the_standard_library_before_installed_packages(folder, tmp_path):
    """pip installs the package beside others, some of which bring old copies of standard modules (argparse 1.4.0)."""
    installed, elsewhere = tmp_path / "site-packages", tmp_path / "elsewhere"
    shutil.copytree(PACKAGE, installed / "nitrous_ema", ignore=shutil.ignore_patterns("__pycache__"))
    elsewhere.mkdir()
    for place in (installed, elsewhere):
        (place / "argparse.py").write_text("raise ImportError('not the standard argparse')")
    program = """
import sys
at = next(index for index, path in enumerate(sys.path) if path.endswith("site-packages"))
sys.path[:] = [*sys.path[1:at], sys.argv[1], *sys.path[at:]]
from nitrous_ema.async_ import synthesize_worker
assert synthesize_worker.__file__.startswith(sys.argv[1]), synthesize_worker.__file__
print(synthesize_worker.launch(sys.argv[2], sigma_rels=[0.07], out=sys.argv[3]).result(60)[0].path)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, str(installed), str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": 1, "steps": [2]}, ValueError, "at most one of step and steps"),
        ({"steps": 5}, TypeError, "steps is 5"),
        ({"steps": "some"}, TypeError, "steps is 'some'"),
        ({"steps": []}, ValueError, "steps is empty"),
        ({"exclude": "5"}, TypeError, "exclude is '5'"),
        ({"progress": 5}, TypeError, "progress is 5"),
    ],
)
def test_wrong_steps_are_reported_at_once(folder, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        launch(folder, sigma_rels=[0.1], out=tmp_path, **arguments)


def test_missing_lengths_are_reported_at_once(folder, tmp_path):
    with pytest.raises(ValueError, match="sigma_rels is empty"):
        launch(folder, sigma_rels=[], out=tmp_path)


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_and_tensors_are_sequences_of_numbers(folder, tmp_path, array):
    what = {"steps": array([900, 1000]), "exclude": array([100, 500]), "dry_run": True}
    outputs = launch(folder, sigma_rels=array([0.0625, 0.125]), out=tmp_path, **what).result(TIMEOUT)
    expected = [(900, 0.0625), (900, 0.125), (1000, 0.0625), (1000, 0.125)]
    assert [(each.step, each.sigma_rel) for each in outputs] == expected
    assert {each.excluded for each in outputs} == {(100, 500)}


def test_tracked_profiles_of_an_old_folder_are_named_and_come_back_as_they_are(tmp_path):
    write_nitrous_001(tmp_path / "old", [10, 20, 30])
    job = launch(tmp_path / "old", sigma_rels=SIGMA_RELS, tracked_sigma_rels=SIGMA_RELS, out=tmp_path / "out")
    for profile, output in enumerate(job.result(TIMEOUT)):
        expected = torch.load(tmp_path / "old" / f"{profile}.30.pt", weights_only=True)
        found = load_file(output.path)
        assert torch.equal(found["linear.weight"], expected["ema_model.linear.weight"])
    with pytest.raises(TypeError, match=r"tracked_gammas is 5"):
        launch(tmp_path / "old", sigma_rels=[0.1], tracked_gammas=5, out=tmp_path / "out")


def test_threads_and_type_of_sums_reach_the_worker(folder, tmp_path):
    (output,) = launch(folder, sigma_rels=[0.07], out=tmp_path, threads=1, accumulate="float32").result(TIMEOUT)
    content = output.path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"]["accumulate"] == "float32"
    with pytest.raises(ValueError, match="--threads: '0': expected a whole number, at least 1"):
        launch(folder, sigma_rels=[0.07], out=tmp_path, threads=0).result(TIMEOUT)
