from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nitrous_ema.cli import program as cli
from tests.support.snapshot_folders import damage, layout_of, record, run_id, snapshot_file, write_run, write_snapshot

LAYOUT = layout_of([record("w", (50_000,)), record("n", (), "I64", "copied")])  # several chunks in each profile
RUN, LATER = run_id(0), run_id(1)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "snapshots"
    write_run(root, LAYOUT, [100, 200, 300], copied=lambda step: {"n": np.int64(step).tobytes()}, run=RUN)
    return root


def test_whole_folder_verifies(folder, capsys):
    assert cli.main(["verify", str(folder)]) == 0
    assert capsys.readouterr() == ("all snapshots are intact\n", "")


def test_json_has_what_the_text_reports(folder, capsys):
    damage(snapshot_file(folder, 100), at=0.5)
    (folder / f"step-{400:012d}-{RUN}").mkdir()
    assert cli.main(["verify", str(folder), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    (damaged,), (incomplete,) = found["damaged"], found["incomplete"]
    assert damaged["path"] == str(snapshot_file(folder, 100))
    assert "--exclude 100" in damaged["message"]
    assert incomplete["path"].endswith(f"{400:012d}-{RUN}")
    assert (found["runs"], found["nonfinite"], found["hint"]) == ([RUN], [], "")


def test_json_of_a_folder_without_snapshots_has_a_hint(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["damaged"]) == ([], [])
    assert "holds no snapshot" in found["hint"]


def test_each_damaged_file_has_a_line_with_what_to_do(folder, capsys):
    for place in (0.3, 0.6, 0.9):
        damage(snapshot_file(folder, 100), at=place)
    damage(snapshot_file(folder, 200), at=0.001)  # in its header
    assert cli.main(["verify", str(folder)]) == 4
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert str(snapshot_file(folder, 100)) in first
    assert "--exclude 100" in first
    assert "2 more of its chunks" in first
    assert str(snapshot_file(folder, 200)) in second
    assert "--exclude 200" in second
    assert err == ""


@pytest.mark.parametrize("command", [["verify"], ["inspect"], ["prune", "--keep", "3"]])
def test_folder_that_is_not_there_exits_with_3(command, tmp_path, capsys):
    assert cli.main([*command, str(tmp_path / "nothing")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert str(tmp_path / "nothing") in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("command", "status"), [("verify", 3), ("inspect", 3)])
def test_folder_without_snapshots_is_reported_and_not_verified(command, status, tmp_path, capsys):
    assert cli.main([command, str(tmp_path)]) == status
    assert "holds no snapshot" in capsys.readouterr().out


def test_verify_reports_unfinished_snapshots_without_calling_them_damaged(folder, capsys):
    unfinished = folder / f"step-{400:012d}-{RUN}"
    unfinished.mkdir()
    assert cli.main(["verify", str(folder)]) == 0
    assert f"{unfinished} is not a complete snapshot and was skipped" in capsys.readouterr().err


def test_file_of_an_abandoned_branch_is_verified_too(folder, capsys):
    averages = [np.zeros(50_000)] * 2
    write_snapshot(
        folder, LAYOUT, 250, averages, {"n": bytes(8)}, run=LATER, lineage=[(RUN, 200), (LATER, None)]
    )  # fmt: skip
    damage(snapshot_file(folder, 300), at=0.5)
    assert cli.main(["verify", str(folder)]) == 4
    assert "--exclude 300" in capsys.readouterr().out


def test_snapshot_with_another_history_than_its_run_is_reported(folder, capsys):
    averages = [np.zeros(50_000)] * 2
    write_snapshot(
        folder, LAYOUT, 250, averages, {"n": bytes(8)}, run=RUN, lineage=[(run_id(-1), 20), (RUN, None)]
    )  # fmt: skip
    assert cli.main(["verify", str(folder)]) == 4
    (line,) = capsys.readouterr().out.splitlines()
    assert "lineage" in line
    assert "250" in line


def test_folder_of_another_library_is_named(tmp_path, capsys):
    (tmp_path / "0.100.pt").write_bytes(b"x")
    assert cli.main(["verify", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert "ema-pytorch" in out
    assert "nitrous-ema synthesize" in out
