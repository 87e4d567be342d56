"""A folder that is near the snapshot folder is named as such by every reader, with the folder to give."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from nitrous_ema import LegacyFolder, PostHocEMA, SnapshotStore, sweep
from nitrous_ema.async_.synthesize_worker import main as run_worker
from nitrous_ema.cli import program as cli
from nitrous_ema.errors import SnapshotNotFound
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.wrong_folder import right_folder
from nitrous_ema.synthesis import plan_from_store
from tests.support.snapshot_folders import layout_of, record, snapshot_file, write_run


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "runs" / "snapshots"
    folder.parent.mkdir()
    write_run(folder, layout_of([record("weight", (2, 2)), record("bias", (2,))]), range(10, 60, 10))
    return folder


@pytest.fixture(params=["parent", "snapshot", "file"])
def given(request, root):
    """A path near the folder, and the folder."""
    file = snapshot_file(root, 30)
    return {"parent": root.parent, "snapshot": file.parent, "file": file}[request.param], root


READERS = {
    "get": lambda path: SnapshotStore(path).get(),
    "step": lambda path: SnapshotStore(path).get(30),
    "plan": lambda path: plan_from_store(path, sigma_rels=[0.08]),
    "sweep": lambda path: sweep(path, lambda state: 1.0, sigma_rels=[0.08], results=path.parents[1] / "r.jsonl"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_python_names_the_folder_to_give(given, read):
    path, root = given
    with pytest.raises(
        SnapshotNotFound, match=rf"give .*{re.escape(str(root)) if path != root.parent else ''}"
    ) as caught:
        read(path)
    assert str(root) in str(caught.value)
    assert "Check the path" not in str(caught.value)


def test_ema_names_the_folder_to_give(root):
    with pytest.raises(SnapshotNotFound, match="give that folder"):
        PostHocEMA(torch.nn.Linear(2, 2), checkpoint_folder=root.parent).synthesize_ema_model(sigma_rel=0.08)


@pytest.mark.parametrize("command", ["inspect", "verify", "prune", "worker", "follow"])
def test_commands_name_the_folder_to_give(given, command, tmp_path, capsys):
    path, root = given
    worker = [str(path), "--sigma-rel", "0.08", "--out", str(tmp_path / "out")]
    if command in ("worker", "follow"):
        status = run_worker([*worker, *(["--follow", "--idle", "0.01"] if command == "follow" else [])])
    else:
        status = cli.main([command, str(path), *(["--keep", "3"] if command == "prune" else [])])
    assert status == 3
    captured = capsys.readouterr()
    assert str(root) in captured.out + captured.err
    assert "give " in captured.out + captured.err
    assert not (tmp_path / "out").exists()


def test_several_folders_are_named_and_the_snapshot_folder_is_not(root):
    for name in ("a", "b", "c"):
        shutil.copytree(root, root.parent / name)
    text = right_folder(FileSystem(), root.parent)
    first = ", ".join(str(root.parent / name) for name in ("a", "b", "c"))
    assert text == f"There are snapshots in {first} and 1 more: give one of them."
    assert right_folder(FileSystem(), root) == right_folder(FileSystem(), root.parent.parent / "nothing") == ""


def test_folder_above_legacy_files_is_named(tmp_path):
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / "old" / "0.100.pt")
    with pytest.raises(SnapshotNotFound, match=rf"There are snapshots in {tmp_path / 'old'}: give that folder\."):
        LegacyFolder(tmp_path, sigma_rels=[0.05])
