from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest

from nitrous_ema._base.temporary_files import temporary_name
from nitrous_ema.cli import program as cli
from nitrous_ema.snapshots.filesystem import NO_FOLDER_FSYNC, ONLY_ONE_PASS, FileSystem
from nitrous_ema.snapshots.names import one_pass_file_name
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.small_snapshots import KeepsFolders
from tests.support.snapshot_folders import damage, layout_of, record, run_id, snapshot_file, write_run

LAYOUT = layout_of([record("w", (50_000,)), record("n", (), "I64", "copied")])
RUN, LATER, OTHER = run_id(0), run_id(1), run_id(-1)


def written(root: Path, steps, run: str = RUN, **stamp) -> Path:
    write_run(root, LAYOUT, steps, copied=lambda step: {"n": np.int64(step).tobytes()}, run=run, **stamp)
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    return written(tmp_path / "snapshots", [100, 200, 300])


def inspected(folder: Path, capsys) -> dict:
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_lists_runs_with_profiles_steps_times_and_sizes(folder, capsys):
    (folder / f"closed-{RUN}").touch()
    found = inspected(folder, capsys)
    (run,) = found["runs"]
    assert run["run"] == RUN
    assert run["closed"] is True
    assert run["lineage"] == [[RUN, None]]
    assert run["sigma_rels"] == [0.05, 0.1]
    assert run["gammas"] == pytest.approx([16.97, 6.94], abs=0.01)
    assert (run["checkpoint_dtype"], run["tensors"], run["average_elements"]) == ("F32", 2, 50_000)
    sizes = [snapshot_file(folder, step).stat().st_size for step in (100, 200, 300)]
    assert [(each["step"], each["t"], each["bytes"]) for each in run["snapshots"]] == list(
        zip((100, 200, 300), (100, 200, 300), sizes, strict=True)
    )
    assert run["bytes"] == sum(sizes)
    assert (found["incomplete"], found["damaged"]) == ([], [])


def test_text_of_inspect_has_the_same_numbers(folder, capsys):
    (folder / f"closed-{RUN}").touch()
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in (f"run {RUN} (closed)", "sigma_rel 0.05 (gamma 16.97)", "50,000", "F32", "3, 1.2 MiB"):
        assert part in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith("UTC")] == ["100", "200", "300"]


def test_inspect_lists_the_runs_that_a_run_continues(folder, capsys):
    lineage = [(RUN, 200), (LATER, None)]
    write_run(folder, LAYOUT, [250, 300], copied=lambda step: {"n": bytes(8)}, run=LATER, lineage=lineage)
    found = inspected(folder, capsys)
    assert [[each["step"] for each in run["snapshots"]] for run in found["runs"]] == [[100, 200, 300], [250, 300]]
    assert cli.main(["inspect", str(folder)]) == 0
    assert f"continues  {RUN} up to step 200" in capsys.readouterr().out


def test_inspect_distinguishes_incomplete_from_damaged_snapshots(folder, capsys):
    unfinished = folder / f"step-{400:012d}-{RUN}"
    unfinished.mkdir()
    broken = snapshot_file(folder, 200)
    damage(broken, at=0.001)
    found = inspected(folder, capsys)
    assert [each["step"] for each in found["runs"][0]["snapshots"]] == [100, 300]
    assert found["incomplete"] == [{"path": str(unfinished), "reason": "it holds no finished file"}]
    (failure,) = found["damaged"]
    assert failure["path"] == str(broken)
    assert "damaged" in failure["message"]
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{unfinished}: it holds no finished file" in out
    assert str(broken) in out


def test_inspect_survives_a_run_with_nothing_whole(folder, capsys):
    for step in (100, 200, 300):
        damage(snapshot_file(folder, step), at=0.001)
    found = inspected(folder, capsys)
    assert [run["snapshots"] for run in found["runs"]] == [[]]
    assert len(found["damaged"]) >= 1
    assert cli.main(["inspect", str(folder)]) == 0


def test_inspect_lists_which_snapshots_readers_use(folder, capsys):
    written(folder, [250, 300], LATER, lineage=[(RUN, 200), (LATER, None)])
    written(folder, [50], OTHER)
    found = inspected(folder, capsys)
    assert [(run["run"], run["role"]) for run in found["runs"]] == [
        (OTHER, "unrelated"),
        (RUN, "ancestor"),
        (LATER, "newest"),
    ]
    used = {(run["run"], each["step"]) for run in found["runs"] for each in run["snapshots"] if each["in_history"]}
    assert used == {(each.run, each.step) for each in SnapshotStore(folder).snapshots()}
    assert used == {(RUN, 100), (RUN, 200), (LATER, 250), (LATER, 300)}
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"unrelated to run {LATER}" in out
    assert "up to step 200; 1 later snapshot is abandoned" in " ".join(out.split())


def test_branch_that_was_left_for_a_newer_one_is_ignored(folder, capsys):
    written(folder, [150], LATER, lineage=[(RUN, 100), (LATER, None)])
    newest = run_id(2)
    written(folder, [250], newest, lineage=[(RUN, 200), (newest, None)])
    roles = {run["run"]: run["role"] for run in inspected(folder, capsys)["runs"]}
    assert roles == {RUN: "ancestor", LATER: "branch", newest: "newest"}


@pytest.mark.parametrize("change", [{}, {"pid": 2**22 + 1}, {"host": "another"}])
def test_inspect_reports_whether_the_trainer_runs(tmp_path, capsys, change):
    me = psutil.Process()
    trainer = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time(), **change}
    root = written(tmp_path / "s", [100], trainer=trainer)
    expected = {"pid": "gone", "host": "elsewhere"}.get(next(iter(change), ""), "alive")
    (run,) = inspected(root, capsys)["runs"]
    assert (run["state"], run["closed"]) == (expected, False)
    assert cli.main(["inspect", str(root)]) == 0
    assert f"process {trainer['pid']}" in capsys.readouterr().out


def test_inspect_lists_pins_markers_and_hidden_snapshots(folder, capsys):
    store = SnapshotStore(folder)
    store.pin(200, RUN)
    hidden_bytes = store.hide([store.get(100)])
    store.close_run(RUN)
    found = inspected(folder, capsys)
    assert [(each["step"], each["pinned"]) for each in found["runs"][0]["snapshots"]] == [(200, True), (300, False)]
    stray = folder / f"pin-{170:012d}-{RUN}"
    stray.touch()
    notes = {Path(each["path"]).name: each["stray"] for each in inspected(folder, capsys)["notes"]}
    assert notes == {f"pin-{200:012d}-{RUN}": False, f"closed-{RUN}": False, stray.name: True}
    assert [each["bytes"] for each in found["hidden"]] == [hidden_bytes]


def test_inspect_lists_a_snapshot_that_a_note_hides_as_hidden(folder, capsys):
    SnapshotStore(folder, files=KeepsFolders()).hide([SnapshotStore(folder).get(100)])
    found = inspected(folder, capsys)
    assert [Path(each["path"]).name for each in found["hidden"]] == [f"step-{100:012d}-{RUN}"]
    assert [each["stray"] for each in found["notes"]] == [False]


def test_inspect_reports_that_folders_have_no_fsync(folder, capsys, monkeypatch):
    assert inspected(folder, capsys)["disk"]["missing"] == []

    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(FileSystem, "fsync_folder", refuse)
    assert inspected(folder, capsys)["disk"]["missing"] == [NO_FOLDER_FSYNC]
    assert cli.main(["inspect", str(folder)]) == 0
    assert NO_FOLDER_FSYNC in " ".join(capsys.readouterr().out.split())


def test_inspect_reports_that_snapshots_are_written_in_one_pass(folder, capsys):
    file = snapshot_file(folder, 300)
    file.rename(file.with_name(one_pass_file_name(0, 1, 7)))
    assert inspected(folder, capsys)["disk"]["missing"] == [ONLY_ONE_PASS]


def test_inspect_reports_space_for_more_snapshots(folder, capsys, monkeypatch):
    size = snapshot_file(folder, 300).stat().st_size
    monkeypatch.setattr(SnapshotStore, "free_bytes", lambda self: 5 * size + 1)
    assert inspected(folder, capsys)["disk"] == {
        "free_bytes": 5 * size + 1,
        "snapshot_bytes": size,
        "snapshots_that_fit": 5,
        "missing": [],
    }
    assert cli.main(["inspect", str(folder)]) == 0
    assert "free: space for 5 more snapshots of" in capsys.readouterr().out


def test_long_runs_are_shortened_without_all(tmp_path, capsys):
    steps = range(1, 41)
    root = tmp_path / "s"
    write_run(root, layout_of([record("w", (2,))]), steps, run=RUN)
    assert cli.main(["inspect", str(root)]) == 0
    short = capsys.readouterr().out.splitlines()
    assert len(short) < 36
    assert any("24 more" in line for line in short)
    assert cli.main(["inspect", str(root), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines if line.endswith("UTC")] == list(steps)
    assert len({len(line) for line in lines if line.endswith("UTC")}) == 1  # aligned


def test_folder_of_another_library_is_listed(tmp_path, capsys):
    for profile, step in [(0, 100), (1, 100), (0, 200)]:
        (tmp_path / f"{profile}.{step}.pt").write_bytes(b"xyz")
    assert inspected(tmp_path, capsys)["legacy"] == [
        {"step": 100, "profiles": 2, "bytes": 6},
        {"step": 200, "profiles": 1, "bytes": 3},
    ]
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ema-pytorch" in out
    assert "holds no snapshot" not in out


def test_unfinished_files_are_listed_with_the_state_of_their_writer(folder, capsys):
    unfinished = folder / f"step-{400:012d}-{RUN}"
    unfinished.mkdir()
    temporary = unfinished / temporary_name("rank-00000-of-00001.safetensors")
    temporary.write_bytes(b"xyz")
    assert inspected(folder, capsys)["temporary"] == [{"path": str(temporary), "bytes": 3, "writer": "alive"}]
    assert cli.main(["inspect", str(folder)]) == 0
    assert f"{temporary}: 3 B, being written by a process on this host" in capsys.readouterr().out
