"""One bad folder among the snapshots does not keep its users from the others: each is one line of a report."""

from __future__ import annotations

import errno
import json
import os

import pytest

from nitrous_ema import AsyncPostHocEMA, PostHocEMA, SnapshotStore
from nitrous_ema.async_.synthesize_worker import main as run_worker
from nitrous_ema.cli import program as cli
from nitrous_ema.errors import SnapshotUnavailable
from nitrous_ema.snapshots import FileSystem
from nitrous_ema.snapshots.names import folder_name
from tests.support.models import Net, set_weights
from tests.support.small_snapshots import steps

OTHER = "29991231T235959.123456-1a2b3c4d"  # the newest run of the folder
BAD = folder_name(10, OTHER)


def refused(path):
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def forbid(root, monkeypatch, *, is_listed):
    """Make the snapshot of another user, who has kept others from its folder, or from the files in it."""
    (root / BAD).mkdir()
    (root / BAD / "rank-00000-of-00001.safetensors").write_bytes(b"secret")
    (root / BAD / ".rank-00000-of-00001.safetensors.tmp").write_bytes(b"secret")
    list_names, open_read, lstat = FileSystem.list, FileSystem.open_read, FileSystem.lstat

    def refusing(method, is_bad):
        def call(files, path):
            if is_bad(path):
                raise refused(path)
            return method(files, path)

        return call

    if not is_listed:
        monkeypatch.setattr(FileSystem, "list", refusing(list_names, lambda path: path.name == BAD))
    monkeypatch.setattr(FileSystem, "open_read", refusing(open_read, lambda path: path.parent.name == BAD))
    monkeypatch.setattr(FileSystem, "lstat", refusing(lstat, lambda path: path.parent.name == BAD))


BADS = {
    "a link to itself": lambda root, monkeypatch: (root / BAD).symlink_to(BAD),
    "a folder that may not be listed": lambda root, monkeypatch: forbid(root, monkeypatch, is_listed=False),
    "files that may not be opened": lambda root, monkeypatch: forbid(root, monkeypatch, is_listed=True),
}


def train(root, kind=PostHocEMA, **more):
    """Train for 40 steps, with a snapshot every ten; return the EMA, closed."""
    with kind(model := Net(), checkpoint_folder=root, checkpoint_every_num_steps=10, update_every=1, **more) as ema:
        for step in range(1, 41):
            ema.fence()
            set_weights(model, step)
            ema.update()
    return ema


@pytest.fixture(params=BADS)
def bad(request, tmp_path, monkeypatch):
    """A folder with a run of four snapshots, and the bad one."""
    root = tmp_path / "snapshots"
    train(root)
    BADS[request.param](root, monkeypatch)
    return root


@pytest.mark.parametrize("kind", [PostHocEMA, AsyncPostHocEMA])
@pytest.mark.filterwarnings("ignore:.*begins anew")
def test_training_goes_on_beside_it(bad, kind):
    ema = train(bad, kind, keep=2)
    assert [step for step, _ in steps(SnapshotStore(bad).snapshots(ema.run))][-1] == 40
    assert SnapshotStore(bad).get().run == ema.run


@pytest.mark.parametrize("kind", BADS)
def test_training_begins_where_nothing_else_is(tmp_path, monkeypatch, caplog, kind):
    (tmp_path / "snapshots").mkdir()
    BADS[kind](tmp_path / "snapshots", monkeypatch)
    ema = train(tmp_path / "snapshots")
    assert SnapshotStore(tmp_path / "snapshots").get().run == ema.run
    assert [record.exc_info for record in caplog.records] == [None] * len(caplog.records)  # one line, no traceback


def test_commands_report_it_and_go_on(bad, capsys):
    is_link = (bad / BAD).is_symlink()

    def command(*arguments):
        status = cli.main([*arguments, "--json"])
        return status, json.loads(capsys.readouterr().out)

    status, found = command("inspect", str(bad))
    reported = [each["path"] for each in (*found["incomplete"], *found["damaged"])]
    assert status == 0
    assert len([path for path in reported if BAD in path]) == 1
    status, found = command("verify", str(bad))
    assert status == (0 if is_link else 4)
    assert len([each for each in (*found["incomplete"], *found["damaged"]) if BAD in each["path"]]) == 1
    status, found = command("prune", str(bad), "--keep", "2", "--yes")
    assert (status, found["thinning"]["dropped"] != []) == (0, True)
    assert len(SnapshotStore(bad).snapshots()) == 2


def test_synthesis_goes_on_and_names_the_other_run(bad, tmp_path, capsys):
    arguments = [str(bad), "--sigma-rel", "0.1", "--out", str(tmp_path / "out")]
    assert run_worker(arguments) == 0
    assert (OTHER in capsys.readouterr().err) == (not (bad / BAD).is_symlink())
    assert run_worker([*arguments, "--run", OTHER]) != 0
    assert OTHER in capsys.readouterr().err


def test_a_run_that_may_not_be_read_is_an_error_where_there_is_no_other(tmp_path, monkeypatch):
    tmp_path.joinpath("snapshots").mkdir()
    forbid(tmp_path / "snapshots", monkeypatch, is_listed=True)
    with pytest.raises(SnapshotUnavailable, match=r"cannot be opened: Permission denied.*give this user access to it"):
        SnapshotStore(tmp_path / "snapshots").get()
