from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from nitrous_ema.async_ import synthesize_worker as worker
from nitrous_ema.errors import SnapshotDamaged, SnapshotNotFound
from nitrous_ema.posthoc import solve_weights
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.synthesis.in_memory import synthesize_plan
from nitrous_ema.synthesis.plan import plan_synthesis
from tests.support.old_folders import SIGMA_RELS, Plain, write_ema_pytorch, write_nitrous_001

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
    arguments = [tmp_path, "--tracked-sigma-rel", "0.05,0.1", "--sigma-rel", "0.07,0.08", "--out", tmp_path / "out"]
    assert worker.main([str(each) for each in [*arguments, "--step", 300]]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    state = safetensors.torch.load_file(lines[1]["path"])
    real_net.load_state_dict(state, strict=True)
    assert real_net[1].num_batches_tracked == 300
    average = torch.from_numpy(expected(states, "0.weight", 300, 0.08).real).float()
    assert torch.equal(real_net[0].weight, average)
    assert (lines[1]["step"], lines[1]["columns"]) == (300, 6)
    assert lines[1]["run"] == LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS).run


@pytest.mark.parametrize("other", ["profiles", "files"])
def test_average_of_other_profiles_or_files_is_not_taken_for_this_one(tmp_path, capsys, other):
    write_nitrous_001(tmp_path / "a", [100, 200])
    write_nitrous_001(tmp_path / "b", [100, 200])

    def made(folder, profiles):
        asked = [tmp_path / folder, "--tracked-sigma-rel", profiles, "--sigma-rel", 0.07, "--out", tmp_path / "out"]
        assert worker.main([*map(str, asked), "--skip-existing", "--tolerance", "0"]) == 0
        return json.loads(capsys.readouterr().out)["state"]

    first, second = ("a", "0.05,0.1"), ("a", "0.05,0.15") if other == "profiles" else ("b", "0.05,0.1")
    assert [made(*each) for each in (first, first, second, second)] == ["written", "kept", "written", "kept"]


def test_run_of_a_folder_is_named_by_its_first_whole_step(tmp_path):
    write_nitrous_001(tmp_path, [100, 200, 300])
    run = LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS).run
    (tmp_path / "1.300.pt").write_bytes(b"torn")
    assert LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS).run == run
    for step in (100, 200):
        (tmp_path / f"0.{step}.pt").write_bytes(b"torn")
    assert LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS).run == "legacy"


# Counters beyond what half precision holds exactly (2048), and beyond what it holds at all (65504).


@pytest.fixture
def halved(tmp_path):
    """A folder of ema-pytorch as it is by default, of a model that had seen so many batches when its EMA was made."""

    def written(batches: int, dtype: torch.dtype = torch.float16):
        model = Plain()
        model.norm.num_batches_tracked.fill_(batches)
        write_ema_pytorch(tmp_path / "old", [1000, 3001, 70001], model, dtype)
        return tmp_path / "old"

    return written


def test_files_of_ema_pytorch_have_lost_their_counters(halved):
    old = halved(3001)
    steps = [torch.load(old / f"0.{step}.pt", weights_only=True)["step"] for step in (3001, 70001)]
    assert [float(step) for step in steps] == [3000, float("inf")]
    held = torch.load(old / "0.1000.pt", weights_only=True)["ema_model.norm.num_batches_tracked"]
    assert (held.dtype, float(held)) == (torch.float16, 3000)


def test_steps_of_ema_pytorch_files_are_those_of_their_names(halved):
    folder = LegacyFolder(halved(0), sigma_rels=SIGMA_RELS)
    assert [(each.step, each.t) for each in folder.snapshots()] == [(1000, 1000), (3001, 3001), (70001, 70001)]
    plan = plan_synthesis(folder.snapshots(), target=folder.get(), sigma_rels=[0.07], tolerance=0)
    expected = solve_weights([1000, 1000, 3001, 3001, 70001, 70001], GAMMAS * 3, [70001], [sigma_rel_to_gamma(0.07)])
    np.testing.assert_allclose(plan.weights, expected[np.any(expected != 0, axis=1)], rtol=1e-12)


@pytest.mark.parametrize(
    ("batches", "dtype", "repaired"),
    [
        (0, torch.float16, 0),
        (2047, torch.float16, 2047),
        (2049, torch.float16, 70001),
        (100_000, torch.float16, 70001),
        (255, torch.bfloat16, 255),
        (257, torch.bfloat16, 70001),
        (100_000, torch.float32, 100_000),
    ],
)
def test_worker_repairs_the_counters_of_ema_pytorch(halved, tmp_path, batches, dtype, repaired):
    old = halved(batches, dtype)
    arguments = [
        old,
        "--tracked-sigma-rel",
        "0.05,0.1",
        "--sigma-rel",
        "0.07",
        "--step",
        70001,
        "--out",
        tmp_path / "out",
    ]
    assert worker.main([str(each) for each in arguments]) == 0
    state = safetensors.torch.load_file(tmp_path / "out" / "step-70001-sigma-0.07.safetensors")
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    assert int(state["norm.num_batches_tracked"]) == repaired
    model = Plain()
    model.load_state_dict(state, strict=True)
    assert model.linear.weight.isfinite().all()


def test_damaged_counter_is_damage(halved):
    old = halved(3)
    content = (old / "0.3001.pt").read_bytes()
    numbers = torch.load(old / "0.3001.pt", weights_only=True)
    held = numbers["ema_model.norm.num_batches_tracked"].numpy().tobytes()
    place = content.index(held + b"PK")
    (old / "0.3001.pt").write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(SnapshotDamaged, match="checksum mismatch: found"):
        _ = LegacyFolder(old, sigma_rels=SIGMA_RELS).get(3001).records


def test_number_that_only_looks_like_a_counter_is_averaged(tmp_path):
    net = nn.Linear(2, 2)
    net.register_buffer("num_batches_tracked", torch.tensor(3.0))
    write_nitrous_001(tmp_path, [1000], net)
    records = {each.name: each for each in LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS).get().records}
    assert (records["num_batches_tracked"].dtype, records["num_batches_tracked"].role) == ("F32", "averaged")


def test_step_without_files_names_the_nearest(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    with pytest.raises(SnapshotNotFound, match="200, 300") as e:
        LegacyFolder(tmp_path, gammas=GAMMAS).get(240)
    assert e.value.nearest == (200, 300)


def test_profiles_must_all_be_named(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    for named in ([0.05], [0.05, 0.1, 0.2]):
        with pytest.raises(ValueError, match=f"files of 2 profiles, but {len(named)} (was|were) passed"):
            LegacyFolder(tmp_path, sigma_rels=named)


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


def test_files_of_another_model_are_left_out_with_a_note(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    other = nn.Sequential(nn.Linear(7, 30), nn.BatchNorm1d(30))
    for profile in range(2):
        torch.save(nitrous_state(other, 200), tmp_path / f"{profile}.200.pt")
    views = LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS).snapshots()
    plan = plan_synthesis(views, target=views[-1], sigma_rels=[0.07], tolerance=0)
    assert 200 not in plan.steps
    assert any("'0.weight'" in note for note in plan.report.warnings)


def test_files_that_are_not_read_are_not_opened(tmp_path, real_net):
    """Thousands of them take minutes, and one may be damaged."""
    write_folder(tmp_path, nitrous_state, real_net)
    for profile in range(2):
        (tmp_path / f"{profile}.200.pt").write_bytes(b"damaged")
    views = LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS).snapshots()
    plan = plan_synthesis(views, target=views[-1], sigma_rels=[SIGMA_RELS[1]])
    assert plan.steps == (400,)
    assert plan.candidates == len(views)


def test_two_profiles_of_one_step_must_hold_the_same_tensors(tmp_path, real_net):
    write_folder(tmp_path, nitrous_state, real_net)
    other = nn.Sequential(nn.Linear(7, 30), nn.BatchNorm1d(30))
    torch.save(nitrous_state(other, 200), tmp_path / "1.200.pt")
    with pytest.raises(SnapshotDamaged, match=r"'0\.weight' is missing, or differs in shape or type from") as e:
        synthesized(tmp_path, 400)
    assert e.value.path == tmp_path / "1.200.pt"


def test_nearest_step_is_chosen(tmp_path):
    for step in STEPS:
        torch.save(nitrous_state(model(), step), tmp_path / f"0.{step}.pt")
    folder = LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS[:1])
    assert [folder.get(f"nearest:{step}").step for step in (1, 150, 151, 999)] == [100, 100, 200, 400]
    assert folder.get("nearest:190", exclude=[200]).step == 100
    with pytest.raises(SnapshotNotFound, match="no files of step 190; nearest steps: 100, 200"):
        folder.get(190)


def test_cut_copy_of_a_file_is_named_as_such(tmp_path):
    torch.save(nitrous_state(model(), 100), tmp_path / "0.100.pt")
    content = (tmp_path / "0.100.pt").read_bytes()
    (tmp_path / "0.100.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(SnapshotDamaged, match=r"Incomplete copy\? Copy it again\. Exclude"):
        _ = LegacyFolder(tmp_path, sigma_rels=SIGMA_RELS[:1]).get().records
