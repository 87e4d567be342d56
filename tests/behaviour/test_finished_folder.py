"""An average from a finished folder: a fresh EMA, the model and the folder are all that is needed.

Oracle: ``synthesize``, which knows no model, and the weights that were trained.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousWarning, PostHocEMA, SnapshotStore, sweep
from nitrous_ema.async_.synthesize_worker import launch
from nitrous_ema.async_.synthesize_worker import main as run_worker
from nitrous_ema.cli import program as cli
from nitrous_ema.errors import SnapshotMismatch, SnapshotNotFound
from nitrous_ema.snapshots.legacy.conversion import plan_import
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.synthesis import synthesize
from tests.support.memory_orders import Orders
from tests.support.models import Net, set_weights
from tests.support.old_folders import SIGMA_RELS, Plain, walk, write_nitrous_001

KINDS = pytest.mark.parametrize("kind", [PostHocEMA, AsyncPostHocEMA])
LENGTH = 0.08


def write_training(root, model, steps=range(1, 61), every=10, **more) -> str:
    settings = {"checkpoint_every_num_steps": every, "checkpoint_folder": root, "update_every": 1, **more}
    with PostHocEMA(model, **settings) as ema:
        for step in steps:
            set_weights(model, step)
            ema.update()
        return ema.run


def expected(root, **more) -> dict[str, torch.Tensor]:
    found = synthesize(root, sigma_rels=[LENGTH], dtype="float64", **more).averaged(0)
    return {name: torch.from_numpy(value.copy()) for name, value in found.items()}


def assert_average(average, root, **more) -> None:
    state = average.ema_model.state_dict()
    for name, value in expected(root, **more).items():
        torch.testing.assert_close(state[name], value.to(state[name].dtype), rtol=1e-6, atol=1e-7)


@KINDS
@pytest.mark.parametrize("build", [Net, Orders])
@pytest.mark.parametrize("profiles", [{}, {"sigma_rels": (0.1, 0.2, 0.25)}], ids=["equal", "others"])
def test_fresh_ema_takes_the_newest_run_whatever_its_own_profiles_are(tmp_path, kind, build, profiles):
    write_training(tmp_path / "s", build())
    run = write_training(tmp_path / "t", model := build())
    (tmp_path / "t" / f"closed-{run}").unlink()
    fresh = kind(build(), checkpoint_folder=tmp_path / "t", **profiles)
    average = fresh.synthesize_ema_model(sigma_rel=LENGTH, step=None)
    assert average.step == 60
    assert_average(average, tmp_path / "t")
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point() and not buffer.is_complex():
            assert torch.equal(dict(average.ema_model.named_buffers())[name], buffer), name
    fresh.close()
    assert SnapshotStore(tmp_path / "t").runs() == [run]
    assert not (tmp_path / "t" / f"closed-{fresh.run}").exists()


@KINDS
def test_updated_ema_reads_its_own_run_only(tmp_path, kind):
    write_training(tmp_path, Net())
    with kind(Net(), checkpoint_folder=tmp_path) as ema:
        with pytest.warns(NitrousWarning, match="begins anew"):
            ema.update()
        with pytest.raises(SnapshotNotFound, match=f"no snapshot of run {ema.run}"):
            ema.synthesize_ema_model(sigma_rel=LENGTH)


@KINDS
@pytest.mark.parametrize(
    "filters",
    [
        {"param_or_buffer_names_no_ema": ["norm.running_var", "head.weight"]},
        {"ignore_names": ["conv.weight", "norm.running_mean"]},
    ],
    ids=["copied", "skipped"],
)
@pytest.mark.parametrize("there", [False, True], ids=["here", "there"])
def test_roles_may_differ(tmp_path, kind, filters, there):
    """Tensors that the snapshots skip, or that are skipped here, are those of the online model."""
    model = Net()
    write_training(tmp_path, trained := Net(), **(filters if there else {}))
    fresh = kind(model, checkpoint_folder=tmp_path, **({} if there else filters))
    average = fresh.synthesize_ema_model(sigma_rel=LENGTH)
    state, wanted, own = average.ema_model.state_dict(), expected(tmp_path), model.state_dict()
    for name in filters.get("ignore_names", ()):
        assert torch.equal(state[name], own[name]), name
        wanted.pop(name, None)
    for name in filters.get("param_or_buffer_names_no_ema", ()) if there else ():
        assert torch.equal(state[name], trained.state_dict()[name]), name
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value.float(), rtol=1e-6, atol=1e-7)


@KINDS
def test_model_may_have_another_type(tmp_path, kind):
    write_training(tmp_path, Net())
    average = kind(Net().half(), checkpoint_folder=tmp_path).synthesize_ema_model(sigma_rel=LENGTH)
    assert average.ema_model.conv.weight.dtype == torch.float16
    assert_average_half = average.ema_model.conv.weight
    torch.testing.assert_close(assert_average_half, expected(tmp_path)["conv.weight"].half(), rtol=1e-3, atol=1e-3)


@KINDS
@pytest.mark.parametrize("device", [None, "cpu"])
def test_snapshots_of_another_model_are_refused(tmp_path, kind, device):
    write_training(tmp_path, Net())
    other = Net()
    other.head = nn.Linear(4, 5)
    other.extra = nn.Linear(2, 2)
    with pytest.raises(SnapshotMismatch, match=r"'head.weight' is \(3, 4\) in the snapshot and \(5, 4\) in the model"):
        kind(other, checkpoint_folder=tmp_path).synthesize_ema_model(sigma_rel=LENGTH, device=device)
    other = Net()
    del other.head
    with pytest.raises(SnapshotMismatch, match=r"'head.weight' is missing in the model"):
        kind(other, checkpoint_folder=tmp_path).synthesize_ema_model(sigma_rel=LENGTH, device=device)


@KINDS
def test_step_run_and_exclusions_are_chosen(tmp_path, kind):
    first = write_training(tmp_path, Net())
    with pytest.warns(NitrousWarning, match="begins anew"):
        write_training(tmp_path, Net(), range(101, 141), every=20)
    fresh = kind(Net(), checkpoint_folder=tmp_path)
    assert fresh.synthesize_ema_model(sigma_rel=LENGTH).step == 40
    average = fresh.synthesize_ema_model(sigma_rel=LENGTH, run=first, exclude=[20, 60])
    assert average.step == 50
    assert_average(average, tmp_path, run=first, exclude=[20, 60])
    with pytest.warns(NitrousWarning, match=r"^Step 30 is taken for 'nearest:34'\.$"):
        near = fresh.synthesize_ema_model(sigma_rel=LENGTH, step="nearest:34", run=first)
    assert near.step == 30
    assert fresh.synthesize_ema_model(sigma_rel=LENGTH, step="nearest:30", run=first).step == 30
    with pytest.raises(SnapshotNotFound, match="nearest steps there: 30 and 40"):
        fresh.synthesize_ema_model(sigma_rel=LENGTH, step=34, run=first)
    with pytest.raises(ValueError, match="step 30 is the target step and is excluded"):
        fresh.synthesize_ema_model(sigma_rel=LENGTH, step=30, run=first, exclude=[30])
    with pytest.raises(TypeError, match=r"step is '34'; expected .*or 'nearest:1234'"):
        fresh.synthesize_ema_model(sigma_rel=LENGTH, step="34")
    with pytest.warns(NitrousWarning, match="Step 30 is taken"):
        assert fresh.restore(step="nearest:34", run=first) == 30


def test_nearest_steps_are_taken_by_the_worker_and_the_commands(tmp_path, capsys):
    write_training(tmp_path / "s", Net())
    options = ["--sigma-rel", "0.08", "--out", str(tmp_path / "out")]
    assert run_worker([str(tmp_path / "s"), *options, "--step", "nearest:34,nearest:29,60,nearest:50"]) == 0
    steps = [60, 30, 50]
    captured = capsys.readouterr()
    assert [line.split('"step": ')[1].split(",")[0] for line in captured.out.splitlines()] == list(map(str, steps))
    assert "synthesize: warning: Step 30 is taken for 'nearest:34'." in captured.err
    assert "nearest:50" not in captured.err
    job = launch(tmp_path / "s", out=tmp_path / "out2", sigma_rels=[0.08], step="nearest:34")
    assert [output.step for output in job.result()] == [30]
    assert job.warnings == ("Step 30 is taken for 'nearest:34'.",)
    assert run_worker([str(tmp_path / "s"), *options, "--step", "nearest:34", "--follow"]) == 2
    assert "--step nearest:34 has no meaning with --follow" in capsys.readouterr().err
    assert run_worker([str(tmp_path / "s"), *options, "--step", "nearest:x"]) == 2
    assert cli.main(["inspect", str(tmp_path / "s"), "--sigma-rel", "0.08", "--step", "nearest:34"]) == 0
    assert "target step 30" in capsys.readouterr().out


# Files of other libraries in the folder


def test_legacy_files_beside_snapshots_are_noted_by_every_reader(tmp_path, capsys):
    root = tmp_path / "s"
    write_training(root, Net())
    torch.save({"ema_model.w": torch.ones(2)}, root / "0.100.pt")
    for kind in (PostHocEMA, AsyncPostHocEMA):
        with pytest.warns(NitrousWarning, match="also holds 1 file of nitrous-ema 0.0.1 or ema-pytorch") as caught:
            kind(Net(), checkpoint_folder=root).synthesize_ema_model(sigma_rel=LENGTH)
        assert len(caught) == 1
    table = sweep(root, lambda state: 1.0, sigma_rels=[LENGTH], results=tmp_path / "r.jsonl")
    assert any("also holds 1 file" in note for note in table.notes)
    assert run_worker([str(root), "--sigma-rel", "0.08", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("also holds 1 file") == 1
    assert run_worker([str(root), "--sigma-rel", "0.08", "--out", str(tmp_path / "out"), "--follow"]) == 0
    assert capsys.readouterr().err.count("also holds 1 file") == 1
    assert cli.main(["inspect", str(root)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "also holds 1 file of nitrous-ema 0.0.1" in printed
    assert "100 1" in printed


def imported(tmp_path):
    """Snapshots of 0.0.1, imported into a new folder, and the state that 0.0.1 saved at their end."""
    peer = write_nitrous_001(tmp_path / "old", (100, 200, 300), model := Plain())
    folder = LegacyFolder(tmp_path / "old", sigma_rels=SIGMA_RELS)
    assert plan_import(folder, SnapshotStore(tmp_path / "new")).write_missing() == []
    return model, peer.state_dict()


@KINDS
def test_state_of_nitrous_001_continues_the_imported_run(tmp_path, kind):
    model, state = imported(tmp_path)
    (old,) = SnapshotStore(tmp_path / "new").runs()
    settings = {"checkpoint_every_num_steps": 100, "checkpoint_folder": tmp_path / "new", "update_every": 1}
    with kind(model, sigma_rels=SIGMA_RELS, **settings) as ema:
        with pytest.warns(NitrousWarning, match=f"holds run {old}, which was imported .* continues it from step 300"):
            ema.load_state_dict(state)
        assert ema.synthesize_ema_model(sigma_rel=LENGTH).step == 300
        for step in range(301, 401):
            ema.fence()
            walk(model, step)
            ema.update()
        ema.flush()
        assert [each.step for each in ema.snapshots.snapshots(ema.run)] == [100, 200, 300, 400]
        assert ema.snapshots.get().stamp.lineage == ((old, 300), (ema.run, None))


def test_imported_run_of_other_profiles_or_of_another_model_is_not_continued(tmp_path):
    model, state = imported(tmp_path)
    with PostHocEMA(model, sigma_rels=SIGMA_RELS, checkpoint_folder=tmp_path / "other") as ema:
        ema.load_state_dict(state)
        own = ema.state_dict()
    with PostHocEMA(nn.Linear(2, 2), sigma_rels=SIGMA_RELS, checkpoint_folder=tmp_path / "new") as ema:
        extra = {f"ema_models.{i}._extra_state": {"step": 300, "initted": True} for i in range(2)}
        ema.load_state_dict({**ema.state_dict(), **extra})
        assert ema._engine.run_lineage.ancestors == ()
    with PostHocEMA(model, sigma_rels=SIGMA_RELS, checkpoint_folder=tmp_path / "new") as ema:
        ema.load_state_dict(own)  # names its own run
        assert [run for run, _ in ema._engine.run_lineage.ancestors] == [
            own["ema_models.0._extra_state"]["lineage"][-1][0]
        ]
