from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch
from torch import nn

from nitrous_ema.averaging.load_average import load_average
from nitrous_ema.cli import program as cli
from nitrous_ema.errors import NitrousError, SnapshotError, SnapshotMismatch, SnapshotNotFound, SnapshotWriteError
from nitrous_ema.snapshots import FileSystem
from nitrous_ema.snapshots.legacy.conversion import _chunks, plan_import
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.in_memory import synthesize_plan
from nitrous_ema.synthesis.plan import plan_from_store, plan_synthesis
from tests.support.old_folders import SIGMA_RELS, Plain, write_ema_pytorch, write_nitrous_001
from tests.support.small_snapshots import everything_in
from tests.support.snapshot_folders import damage, layout_of, record, write_run

STEPS = (1000, 2000, 3000, 4000, 5000)
LENGTHS = (0.04, 0.07, 0.15)
WRITERS = [
    (write_ema_pytorch, torch.float16),
    (write_ema_pytorch, torch.bfloat16),
    (write_nitrous_001, torch.float32),
    (write_nitrous_001, torch.float64),
]


@pytest.fixture
def old(tmp_path):
    write_ema_pytorch(tmp_path / "old", STEPS)
    return tmp_path / "old"


def planned(old, new, sigma_rels=SIGMA_RELS, **options):
    files = options.pop("files", None)
    return plan_import(LegacyFolder(old, sigma_rels=sigma_rels), SnapshotStore(new, files=files), **options)


def run_cli(old, new, *more):
    return cli.main(["import", str(old), str(new), "--tracked-sigma-rel", "0.05,0.1", *more])


# ---- the imported snapshots


@pytest.mark.parametrize(("write", "dtype"), WRITERS)
@pytest.mark.parametrize("step", [None, 3000])
@pytest.mark.parametrize("tolerance", [0, 1e-3])
def test_synthesis_from_import_and_old_folder_have_the_same_bits(tmp_path, write, dtype, step, tolerance):
    write(tmp_path / "old", STEPS, dtype=dtype)
    assert planned(tmp_path / "old", tmp_path / "new").write_missing() == []
    folder = LegacyFolder(tmp_path / "old", sigma_rels=SIGMA_RELS)
    direct = synthesize_plan(
        plan_synthesis(folder.snapshots(), target=folder.get(step), sigma_rels=LENGTHS, tolerance=tolerance)
    )
    plan = plan_from_store(tmp_path / "new", sigma_rels=LENGTHS, step=step, tolerance=tolerance)
    imported = synthesize_plan(plan)
    for index in range(len(LENGTHS)):
        expected, found = direct.averaged(index), imported.averaged(index)
        assert list(found) == list(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
    assert [each.source.dtype for each in plan.columns] == [each.source.dtype for each in direct.plan.columns]


@pytest.mark.parametrize(("write", "dtype", "bound"), [(*WRITERS[0], 2e-3), (*WRITERS[2], 2e-6)])
def test_synthesis_from_the_import_is_the_peers_own_up_to_normalization(tmp_path, write, dtype, bound):
    """Both peers solve without the condition that weights sum to 1; a tracked length has the same weights in both."""
    ema = write(tmp_path / "old", STEPS, dtype=dtype)
    planned(tmp_path / "old", tmp_path / "new").write_missing()
    device = {"device": "cpu"} if write is write_nitrous_001 else {}
    for sigma_rel in SIGMA_RELS:
        peer = ema.synthesize_ema_model(sigma_rel=sigma_rel, **device).ema_model.state_dict()
        ours = synthesize_plan(plan_from_store(tmp_path / "new", sigma_rels=[sigma_rel])).averaged(0)
        for name, found in ours.items():
            np.testing.assert_allclose(found, peer[name].double().numpy(), atol=bound)


def test_weights_of_a_peer_give_its_average_from_the_imported_numbers(tmp_path):
    """Averages of ema-pytorch differ by their weights only: its weights give its average from the imported numbers."""
    peer_module = pytest.importorskip("ema_pytorch.post_hoc_ema")
    ema = write_ema_pytorch(tmp_path / "old", STEPS, dtype=torch.float32)
    planned(tmp_path / "old", tmp_path / "new").write_missing()
    snapshots = SnapshotStore(tmp_path / "new").snapshots()
    columns = [(each, profile) for each in snapshots for profile in range(2)]
    asked = ([each.t for each, _ in columns], [each.layout.gammas[profile] for each, profile in columns])
    target = (torch.tensor([5000.0]), torch.tensor([peer_module.sigma_rel_to_gamma(0.08)]))
    weights = peer_module.solve_weights(*(torch.tensor(each) for each in asked), *target)[:, 0]
    expected = ema.synthesize_ema_model(sigma_rel=0.08).ema_model.state_dict()["linear.weight"]
    found = torch.zeros_like(expected, dtype=torch.float64)
    for weight, (snapshot, profile) in zip(weights, columns, strict=True):
        with safetensors.safe_open(snapshot.paths[0], "pt") as file:
            found += weight * file.get_tensor(f"ema{profile}.linear.weight").double()
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)


def test_imported_snapshots_record_their_origin(old, tmp_path):
    planned(old, tmp_path / "new").write_missing()
    store = SnapshotStore(tmp_path / "new")
    snapshots = store.snapshots()
    assert [(each.step, each.t, each.stamp.t_first) for each in snapshots] == [(step, step, 1) for step in STEPS]
    assert {each.layout.checkpoint_dtype for each in snapshots} == {"F16"}
    assert snapshots[0].layout.sigma_rels == pytest.approx(SIGMA_RELS)
    assert snapshots[0].stamp.created_ns == max(path.stat().st_mtime_ns for path in old.glob("*.1000.pt"))
    assert (store.root / f"closed-{snapshots[0].run}").exists()
    assert store.verify() == []


def test_run_id_depends_on_how_files_are_imported(old, tmp_path):
    new = tmp_path / "new"
    ways = [{}, {"exclude": [5000]}, {"dtype": "F32"}, {"sigma_rels": (0.05, 0.15)}]
    first, again, *others = [planned(old, new, **way).run for way in ways]
    assert first == again
    assert len({first, *others}) == 3


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_averages_can_be_stored_in_another_type(old, tmp_path, dtype):
    planned(old, tmp_path / "new", dtype=dtype).write_missing()
    snapshot = SnapshotStore(tmp_path / "new").get(2000)
    assert snapshot.layout.checkpoint_dtype == dtype
    expected = torch.load(old / "1.2000.pt", weights_only=True)["ema_model.linear.weight"]
    with safetensors.safe_open(snapshot.paths[0], "pt") as file:
        found = file.get_tensor("ema1.linear.weight")
    assert torch.equal(found, expected.to(found.dtype))


def test_numbers_beyond_the_type_asked_for_are_refused(tmp_path):
    model = Plain()
    nn.init.constant_(model.linear.bias, 1e6)
    write_nitrous_001(tmp_path / "old", STEPS[:2], model)
    with pytest.raises(NitrousError, match=r"0\.1000\.pt holds numbers that overflow F16"):
        planned(tmp_path / "old", tmp_path / "new", dtype="F16").write_missing()
    assert SnapshotStore(tmp_path / "new").snapshots() == []


def test_average_of_an_import_loads_into_the_model(old, tmp_path, capsys):
    assert run_cli(old, tmp_path / "new") == 0
    out = tmp_path / "out.safetensors"
    assert cli.main(["synthesize", str(tmp_path / "new"), "--sigma-rel", "0.07", "--out", str(tmp_path / "out")]) == 0
    (out,) = (tmp_path / "out").iterdir()
    model = Plain()
    model.norm.num_batches_tracked.fill_(17)
    load_average(model, out)
    assert model.norm.num_batches_tracked == 0
    assert model.linear.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [None, "F32"])
def test_import_holds_one_chunk_at_a_time(old, tmp_path, dtype):
    (step, *_) = planned(old, tmp_path / "new", dtype=dtype).steps
    (whole,) = {b"".join(bytes(each) for each in _chunks(step))}
    small = replace(step, layout=replace(step.layout, chunk_bytes=64))
    places, pieces = set(), []
    for chunk in _chunks(small):
        places.add(np.frombuffer(chunk, np.uint8).ctypes.data)
        pieces.append(bytes(chunk))
    assert [len(piece) for piece in pieces] == [end - begin for begin, end in small.layout.chunks]
    assert len(places) == 1
    assert b"".join(pieces) == whole


# ---- repeated imports


def test_old_folder_is_left_as_it_was(old, tmp_path):
    before = everything_in(old)
    planned(old, tmp_path / "new").write_missing()
    assert everything_in(old) == before


class _Stopping(FileSystem):
    """Raises KeyboardInterrupt at the file after the first ``files``."""

    def __init__(self, files):
        self.left = files

    def rename_new(self, source, target):
        self.left -= not target.name.startswith(".probe")
        if self.left < 0:
            raise KeyboardInterrupt
        super().rename_new(source, target)


def test_interrupted_import_continues_where_it_stopped(old, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        planned(old, tmp_path / "new", files=_Stopping(2)).write_missing()
    before = {each.step: each.paths[0].stat().st_mtime_ns for each in SnapshotStore(tmp_path / "new").snapshots()}
    assert list(before) == [1000, 2000]
    again = planned(old, tmp_path / "new")
    assert (again.present, [each.stamp.step for each in again.steps]) == ((1000, 2000), [3000, 4000, 5000])
    assert again.write_missing() == []
    store = SnapshotStore(tmp_path / "new")
    assert [each.step for each in store.snapshots()] == list(STEPS)
    assert len(store.runs()) == 1
    assert before == {step: store.get(step).paths[0].stat().st_mtime_ns for step in before}
    assert store.temporary() == []
    assert planned(old, tmp_path / "new").steps == ()


def test_excluding_a_step_that_does_not_exist_is_logged_and_excludes_nothing(old, tmp_path, capsys):
    plan = planned(old, tmp_path / "new", exclude=[4001])
    assert plan.excluded == ()
    plan.write_missing()
    assert list((tmp_path / "new").glob("closed-*"))
    run_cli(old, tmp_path / "new", "--exclude=4001,5000,4002", "--dry-run")
    printed = capsys.readouterr()
    assert "--exclude: there is no snapshot of step 4001, 4002" in printed.err
    assert "excluded: 5000\n" in printed.out


def test_steps_that_came_later_are_added(old, tmp_path):
    planned(old, tmp_path / "new", exclude=[4000, 5000]).write_missing()
    assert not list((tmp_path / "new").glob("closed-*"))
    planned(old, tmp_path / "new").write_missing()
    assert [each.step for each in SnapshotStore(tmp_path / "new").snapshots()] == list(STEPS)
    assert list((tmp_path / "new").glob("closed-*"))


def test_pruned_snapshots_are_not_imported_again(old, tmp_path):
    planned(old, tmp_path / "new").write_missing()
    assert cli.main(["prune", str(tmp_path / "new"), "--keep", "3"]) == 0
    there = [each.step for each in SnapshotStore(tmp_path / "new").snapshots()]
    again = planned(old, tmp_path / "new")
    assert again.steps == ()
    assert sorted((*again.removed, *there)) == list(STEPS)


# ---- damaged files and refused imports


def test_damaged_files_are_named_and_the_others_imported(old, tmp_path, capsys):
    (old / "1.2000.pt").write_bytes((old / "1.2000.pt").read_bytes()[:-700])
    whole = (old / "0.3000.pt").read_bytes()
    numbers = torch.load(old / "0.3000.pt", weights_only=True)["ema_model.linear.weight"].numpy().tobytes()
    damage(old / "0.3000.pt", at=(whole.index(numbers) + 1) / len(whole))  # seen only when they are read
    assert run_cli(old, tmp_path / "new") == 4
    out = capsys.readouterr().out
    assert "1.2000.pt" in out
    assert "0.3000.pt" in out
    assert [each.step for each in SnapshotStore(tmp_path / "new").snapshots()] == [1000, 4000, 5000]
    (old / "0.3000.pt").write_bytes(whole)
    assert run_cli(old, tmp_path / "new", "--json") == 4
    assert json.loads(capsys.readouterr().out)["written"] == [3000]


def test_step_that_lacks_a_profile_is_imported_and_reported(old, tmp_path, capsys):
    (old / "1.3000.pt").unlink()
    assert run_cli(old, tmp_path / "new") == 0
    assert "step 3000 has only the profile of sigma_rel 0.05" in capsys.readouterr().out
    folder = LegacyFolder(old, sigma_rels=SIGMA_RELS)
    direct = synthesize_plan(plan_synthesis(folder.snapshots(), target=folder.get(), sigma_rels=LENGTHS, tolerance=0))
    found = synthesize_plan(plan_from_store(tmp_path / "new", sigma_rels=LENGTHS, tolerance=0))
    for name, expected in direct.averaged(1).items():
        np.testing.assert_array_equal(found.averaged(1)[name], expected)


def _other_model(old, new):
    write_ema_pytorch(old, [6000], nn.Sequential(nn.Linear(3, 2)))


def _other_training(old, new):
    planned(old, new).write_missing()
    shutil.rmtree(old)
    write_ema_pytorch(old, STEPS, nn.Sequential(nn.Linear(30, 7)))


def _another_run(old, new):
    write_run(new, layout_of([record("w", (3,))]), [1000])


def _other_steps(old, new):
    planned(old, new).write_missing()
    shutil.rmtree(old)
    write_ema_pytorch(old, [7000])


def _other_type(old, new):
    planned(old, new, dtype="F32", exclude=[5000]).write_missing()


def _other_profiles(old, new):
    planned(old, new, sigma_rels=(0.05, 0.2), exclude=[5000]).write_missing()


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (_other_model, SnapshotMismatch, "holds averages of different tensors"),
        (_other_training, SnapshotMismatch, "was imported from other files"),
        (_another_run, SnapshotMismatch, "was not imported from this folder"),
        (_other_steps, SnapshotMismatch, "was not imported from this folder"),
        (_other_type, SnapshotMismatch, "another type than requested for .*: F32, expected F16"),
        (_other_profiles, SnapshotMismatch, "with other profiles"),
    ],
)
def test_refused_import_writes_nothing(old, tmp_path, prepare, error, message):
    prepare(old, tmp_path / "new")
    before = everything_in(tmp_path)
    with pytest.raises(error, match=message):
        planned(old, tmp_path / "new")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("new", ["old", "old/new"])
def test_old_folder_takes_no_snapshots(old, tmp_path, new):
    with pytest.raises(ValueError, match="is the imported folder or inside it"):
        planned(old, tmp_path / new)
    assert run_cli(old, tmp_path / new) == 2


def test_import_that_does_not_fit_is_refused_before_it_begins(old, tmp_path, monkeypatch):
    monkeypatch.setattr(FileSystem, "free_bytes", lambda self, path: 10_000)
    with pytest.raises(
        SnapshotError, match=r"not enough disk space for 5 snapshots: .* are needed, and 9\.8 KiB are free"
    ):
        planned(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folder_without_any_readable_file_is_not_imported(old, tmp_path):
    for path in old.iterdir():
        path.write_bytes(b"no archive")
    with pytest.raises(SnapshotNotFound, match=r"nothing to import: .*1000\.pt"):
        planned(old, tmp_path / "new")
    assert run_cli(old, tmp_path / "new") == 3


def test_full_disk_stops_the_import_and_leaves_written_snapshots(old, tmp_path):
    class Full(FileSystem):
        files = 0

        def open_exclusive(self, path):
            Full.files += "rank" in path.name
            if Full.files > 2:
                raise OSError(28, "No space left on device")
            return super().open_exclusive(path)

    with pytest.raises(SnapshotWriteError, match="Free space on"):
        planned(old, tmp_path / "new", files=Full()).write_missing()
    assert [each.step for each in SnapshotStore(tmp_path / "new").snapshots()] == [1000, 2000]


# ---- the command


def test_dry_run_prints_the_plan_and_writes_nothing(old, tmp_path, capsys):
    assert run_cli(old, tmp_path / "new", "--dry-run", "--exclude", "2000") == 0
    out = capsys.readouterr().out
    assert "4 snapshots" in out
    assert "averages as F16: 1000, 3000 to 5000 (3)" in out
    assert "excluded: 2000" in out
    assert not (tmp_path / "new").exists()


def test_command_reports_written_and_skipped_snapshots(old, tmp_path, capsys):
    assert run_cli(old, tmp_path / "new", "--exclude", "5000") == 0
    first = capsys.readouterr()
    assert "done: 4 snapshots written, 0 already imported." in first.out
    assert [line.split(":")[1].strip() for line in first.err.splitlines()] == [f"step {step}" for step in STEPS[:4]]
    assert run_cli(old, tmp_path / "new") == 0
    assert "already imported: 1000 to 4000 (4)" in (out := capsys.readouterr().out)
    assert "done: 1 snapshot written, 4 already imported." in out


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (["--tracked-sigma-rel", "0.05"], "files of 2 profiles, but 1"),
        (["--tracked-gamma", "17,7,3"], "files of 2 profiles, but 3"),
    ],
)
def test_profiles_that_do_not_fit_the_files_are_a_usage_error(old, tmp_path, capsys, profiles, message):
    assert cli.main(["import", str(old), str(tmp_path / "new"), *profiles]) == 2
    assert message in capsys.readouterr().err


def test_profiles_must_be_named(old, tmp_path, capsys):
    assert cli.main(["import", str(old), str(tmp_path / "new")]) == 2
    assert "--tracked-sigma-rel" in capsys.readouterr().err
