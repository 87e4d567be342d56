from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from nitrous_ema.async_ import synthesize_worker as worker
from nitrous_ema.errors import SnapshotDamaged, SnapshotMismatch, SnapshotNotFound
from nitrous_ema.posthoc import solve_weights
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.snapshots.legacy import LegacyFolder
from nitrous_ema.synthesis.arrays import synthesize_plan
from nitrous_ema.synthesis.plan import plan_synthesis

SIGMA_RELS = (0.05, 0.10)
GAMMAS = [float(sigma_rel_to_gamma(each)) for each in SIGMA_RELS]
STEPS = (100, 200, 300, 400)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 7), nn.BatchNorm1d(7), nn.Linear(3, 2, dtype=torch.complex64))


def nitrous_state(net: nn.Module, step: int) -> dict:
    """What nitrous-ema 0.0.1 saves: KarrasEMA's state_dict, its counters in an extra state."""
    state = {f"ema_model.{key}": tensor for key, tensor in net.state_dict().items()}
    return {**state, "_extra_state": {"initted": True, "step": step}}


def ema_pytorch_state(net: nn.Module, step: int) -> dict:
    """What ema-pytorch saves: all in float16, the counters too (65504 is the largest)."""
    state = {f"ema_model.{key}": tensor.to(torch.float16) for key, tensor in net.state_dict().items()}
    counters = {"step": torch.tensor(step * 1000), "initted": torch.tensor(True)}
    return {**state, **{key: value.to(torch.float16) for key, value in counters.items()}}


def write_folder(root, make_state, net):
    states = {}
    for step in STEPS:
        for profile in range(2):
            with torch.no_grad():
                for tensor in net.parameters():
                    tensor.normal_()
            net[1].num_batches_tracked.fill_(step)
            states[step, profile] = state = make_state(net, step)
            torch.save(state, root / f"{profile}.{step}.pt")
            states[step, profile] = torch.load(root / f"{profile}.{step}.pt", weights_only=True)
    return states


@pytest.fixture
def real_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 7), nn.BatchNorm1d(7))


def synthesized(root, target, lengths=(0.07,), **options):
    folder = LegacyFolder(root, sigma_rels=SIGMA_RELS)
    plan = plan_synthesis(folder.snapshots(**options), target=folder.get(target), sigma_rels=lengths)
    return synthesize_plan(plan, dtype=np.float64)


def expected(states, key, target, sigma_rel):
    """The weighted sum, by definition."""
    columns = [(step, profile) for step, profile in states if step <= target]
    weights = solve_weights(
        np.array([float(step) for step, _ in columns]),
        np.array([GAMMAS[profile] for _, profile in columns]),
        np.array([float(target)]),
        np.array([float(sigma_rel_to_gamma(sigma_rel))]),
    )[:, 0]
    tensors = [states[column][f"ema_model.{key}"].to(torch.complex128) for column in columns]
    return sum(w * tensor for w, tensor in zip(weights, tensors, strict=True)).numpy()


def test_folder_of_version_0_0_1_is_summed(tmp_path):
    net = model()
    states = write_folder(tmp_path, nitrous_state, net)
    tensors = synthesized(tmp_path, 300).averaged(0)
    for key in ("0.weight", "0.bias", "1.running_var", "2.weight", "2.bias"):
        np.testing.assert_allclose(tensors[key], expected(states, key, 300, 0.07), atol=1e-12)
    assert "1.num_batches_tracked" not in tensors


def test_folder_of_ema_pytorch_is_summed_in_spite_of_its_counters(tmp_path, real_net):
    states = write_folder(tmp_path, ema_pytorch_state, real_net)
    assert torch.isinf(states[100, 0]["step"])
    tensors = synthesized(tmp_path, None).averaged(0)
    np.testing.assert_allclose(tensors["0.weight"], expected(states, "0.weight", 400, 0.07).real, atol=1e-12)


def test_tensors_of_several_types_are_summed(tmp_path, real_net):
    real_net[0].to(torch.bfloat16)
    states = write_folder(tmp_path, nitrous_state, real_net)
    tensors = synthesized(tmp_path, 400).averaged(0)
    for key in ("0.weight", "1.weight"):
        np.testing.assert_allclose(tensors[key], expected(states, key, 400, 0.07).real, atol=1e-12)


def test_worker_writes_what_the_model_takes(tmp_path, real_net, capsys):
    states = write_folder(tmp_path, nitrous_state, real_net)
    arguments = [tmp_path, "--sigma-rels", "0.05,0.1", "--sigma-rel", "0.07,0.08", "--out", tmp_path / "out"]
    assert worker.main([str(each) for each in [*arguments, "--step", 300]]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    state = safetensors.torch.load_file(lines[1]["path"])
    real_net.load_state_dict(state, strict=True)
    assert real_net[1].num_batches_tracked == 300
    average = torch.from_numpy(expected(states, "0.weight", 300, 0.08).real).float()
    assert torch.equal(real_net[0].weight, average)
    assert (lines[1]["step"], lines[1]["columns"], lines[1]["run"]) == (300, 6, "legacy")


def test_step_without_files_names_the_nearest(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    with pytest.raises(SnapshotNotFound, match="200, 300") as e:
        LegacyFolder(tmp_path, gammas=GAMMAS).get(240)
    assert e.value.nearest == (200, 300)


def test_profiles_must_all_be_named(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    with pytest.raises(ValueError, match="files of 2 profiles, but 1 are named"):
        LegacyFolder(tmp_path, sigma_rels=[0.05])


@pytest.mark.parametrize("gammas", [{}, {"gammas": [1.0], "sigma_rels": [0.1]}])
def test_profiles_are_named_one_way(tmp_path, gammas):
    with pytest.raises(ValueError, match="exactly one"):
        LegacyFolder(tmp_path, **gammas)


def test_folder_without_such_files_is_not_found(tmp_path):
    (tmp_path / "model.pt").write_text("")
    with pytest.raises(SnapshotNotFound, match="no files named"):
        LegacyFolder(tmp_path, gammas=GAMMAS)
    with pytest.raises(SnapshotNotFound, match="no such folder"):
        LegacyFolder(tmp_path / "nowhere", gammas=GAMMAS)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip file", None])
def test_damaged_file_is_named_and_can_be_left_out(tmp_path, real_net, content):
    write_folder(tmp_path, nitrous_state, real_net)
    path = tmp_path / "1.200.pt"
    path.write_bytes(path.read_bytes()[:-700] if content is None else content)
    with pytest.raises(SnapshotDamaged, match="--exclude 200") as e:
        synthesized(tmp_path, 400)
    assert (e.value.path, e.value.step) == (path, 200)
    assert 200 not in {column.step for column in synthesized(tmp_path, 400, exclude=[200]).plan.columns}


def test_pickles_that_run_code_are_refused(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    torch.save({"ema_model.x": print}, tmp_path / "0.100.pt")
    with pytest.raises(SnapshotDamaged, match="cannot load"):
        synthesized(tmp_path, 400)


def test_files_of_another_model_are_refused(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    other = nn.Sequential(nn.Linear(7, 30), nn.BatchNorm1d(30))
    for profile in range(2):
        torch.save(nitrous_state(other, 200), tmp_path / f"{profile}.200.pt")
    with pytest.raises(SnapshotMismatch, match=r"'0\.weight'"):
        synthesized(tmp_path, 400)


def test_two_profiles_of_one_step_must_hold_the_same_tensors(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    other = nn.Sequential(nn.Linear(7, 30), nn.BatchNorm1d(30))
    torch.save(nitrous_state(other, 200), tmp_path / "1.200.pt")
    with pytest.raises(SnapshotDamaged, match=r"'0\.weight' is not as in the other files of its step") as e:
        synthesized(tmp_path, 400)
    assert e.value.path == tmp_path / "1.200.pt"
