"""Real processes and real disks that fail: kills, full and broken disks, folders that vanish."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nitrous_ema import AsyncPostHocEMA
from nitrous_ema.errors import SnapshotError, SnapshotWriteError
from nitrous_ema.snapshots import FileSystem, SnapshotStore
from tests.crash import fill
from tests.support.fakes import TIMEOUT_SECONDS, StalledFiles, use_files

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)


def filled(*options: object, before: tuple[str, ...] = ()) -> dict[str, object]:
    """Return the report of a process that fills a folder."""
    done = run(*before, sys.executable, "-m", "tests.crash.fill", *map(str, options))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def may_mount() -> bool:
    """Return whether a process may have mounts of its own, as root of a user namespace."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return False
    return run("unshare", "-Urm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/tmp").returncode == 0


@functools.cache
def may_inject() -> bool:
    """Return whether system calls can be made to fail."""
    return shutil.which("strace") is not None and run("strace", "-o", "/dev/null", "true").returncode == 0


needs_mounts = pytest.mark.skipif("not may_mount()", reason="needs unshare(1) with user namespaces")
needs_injection = pytest.mark.skipif("not may_inject()", reason="needs strace(1), and leave to trace")


def assert_only_the_acknowledged_is_there(report: dict[str, object]) -> None:
    assert report["listed"] == report["acknowledged"]
    assert (report["problems"], report["left"], report["open"]) == ([], [], [])


def test_killed_runs_leave_every_acknowledged_snapshot_and_no_part_of_another():
    done = run(sys.executable, "-m", "tests.crash.kills", "--kills", "12", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = re.match(r"(\d+) of.*: (\d+) snap.*; (\d+) ack.*lost, (\d+) of", done.stdout).groups()
    killed, listed, acknowledged, dropped = map(int, numbers)
    assert killed == 12, done.stdout
    assert listed >= acknowledged - dropped, done.stdout
    assert acknowledged > 0, done.stdout


@needs_mounts
@pytest.mark.parametrize("noticed", fill.NOTICED)
def test_full_disk_costs_the_snapshots_that_do_not_fit(tmp_path, noticed):
    mount = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"', str(tmp_path))
    report = filled(tmp_path / "snapshots", "--noticed", noticed, before=mount)
    assert_only_the_acknowledged_is_there(report)
    assert 1 <= len(report["acknowledged"]) < 10
    assert all("No space left on device" in message and "Free space on" in message for message in report["errors"])
    assert len(report["errors"]) + len(report["acknowledged"]) == 10
    assert all((" needed, " in message) == (noticed == "before") for message in report["errors"])


@needs_mounts
def test_disk_that_can_hold_no_more_files_costs_the_snapshots_that_do_not_fit(tmp_path):
    script = 'mount -t tmpfs -o size=64m,nr_inodes=12 none "$0" && exec "$@"'
    report = filled(tmp_path / "snapshots", before=("unshare", "-Urm", "sh", "-c", script, str(tmp_path)))
    assert_only_the_acknowledged_is_there(report)
    assert 1 <= len(report["acknowledged"]) < 10
    assert all("No space left on device" in message and "df -i" in message for message in report["errors"])
    assert len(report["errors"]) + len(report["acknowledged"]) == 10


@pytest.mark.parametrize("noticed", ["preallocating", "writing"])
def test_limit_of_file_sizes_costs_the_snapshots_that_exceed_it(tmp_path, noticed):
    report = filled(tmp_path / "snapshots", "--limit-after", 4, "--noticed", noticed)
    assert_only_the_acknowledged_is_there(report)
    assert report["acknowledged"] == [1, 2, 3, 4]
    assert all("File too large" in message for message in report["errors"])


@needs_injection
@pytest.mark.parametrize(
    ("failing", "acknowledged"),
    [("1", [1, 2, 3]), ("1+", []), ("4..5", [1, 3]), ("2", [2, 3]), ("3", [2, 3])],
    ids=["of a file, once", "always", "of a file, twice", "of a folder", "of ROOT"],
)
def test_failed_fsync_is_healed_by_a_new_file_or_raised(tmp_path, failing, acknowledged):
    in_prepare = 1 + len(tmp_path.parents) + 1  # of ROOT's parent, of the folders above, of the probe
    when = re.sub(r"\d+", lambda count: str(in_prepare + int(count[0])), failing)
    inject = ("strace", "-f", "-o", "/dev/null", "-e", "trace=fsync", "-e", f"inject=fsync:error=EIO:when={when}")
    report = filled(tmp_path / "snapshots", "--most", 3, before=inject)
    assert report["acknowledged"] == acknowledged
    assert set(acknowledged) <= set(report["listed"])  # a failed fsync of a folder leaves a whole file
    assert (report["problems"], report["left"], report["open"]) == ([], [], [])
    assert all("Input/output error" in message for message in report["errors"])
    assert len(report["errors"]) == 3 - len(acknowledged)


@needs_injection
def test_failed_write_is_healed_by_a_new_file(tmp_path):
    inject = ("strace", "-f", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", "inject=pwrite64:error=EIO:when=4")
    report = filled(tmp_path / "snapshots", "--most", 3, before=inject)
    assert_only_the_acknowledged_is_there(report)
    assert report["acknowledged"] == [1, 2, 3]


@needs_mounts
def test_read_only_folder_is_read_and_refused_for_writing(tmp_path):
    root = tmp_path / "snapshots"
    assert filled(root, "--most", 1)["acknowledged"] == [1]
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    report = filled(root, "--most", 3, before=("unshare", "-Urm", "sh", "-c", script, str(root)))
    assert (report["acknowledged"], report["listed"]) == ([], [1])
    assert len(report["errors"]) == 3
    assert "Read-only file system" in report["errors"][0]
    assert "Give this user access to it, or choose another folder." in report["errors"][0]


def test_device_that_is_always_full_gets_no_final_name(tmp_path):
    class Full(FileSystem):
        def open_exclusive(self, path):
            os.close(super().open_exclusive(path))
            return os.open("/dev/full", os.O_WRONLY)

    commit(tmp_path, FileSystem(), 1)
    with pytest.raises(SnapshotError, match="No space left on device"):
        SnapshotStore(tmp_path, files=Full()).prepare()
    with pytest.raises(SnapshotWriteError, match="No space left on device"):
        commit(tmp_path, Full(), 2)
    assert [snapshot.step for snapshot in SnapshotStore(tmp_path).snapshots()] == [1]
    assert list(tmp_path.rglob(".*")) == []


def commit(root: Path, files: FileSystem, step: int) -> None:
    data = fill.content(fill.LAYOUT.data_bytes, step, fill.A, 0)
    stamp = fill.Stamp(step=step, t=step, t_first=1, run=fill.A, lineage=fill.LINEAGES[fill.A])
    SnapshotStore(root, files=files).write(fill.LAYOUT, stamp, lambda: [data[b:e] for b, e in fill.LAYOUT.chunks])


# Training runs


@pytest.fixture
def training(tmp_path):
    model = torch.nn.Linear(4, 3)
    ema = AsyncPostHocEMA(model, checkpoint_every_num_steps="manual", checkpoint_folder=tmp_path / "snapshots")
    yield ema
    ema.close(TIMEOUT_SECONDS)


def take_one(ema: AsyncPostHocEMA) -> None:
    ema.fence()
    ema.update()
    ema.checkpoint()
    ema.flush(TIMEOUT_SECONDS)


@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_training_survives_a_vanished_folder_and_raises_once(training, instead):
    root = training.snapshots.root
    take_one(training)
    shutil.rmtree(root)
    if instead == "a file":
        root.write_bytes(b"")
    with pytest.raises(SnapshotWriteError, match=r"step-000000000002.*was not written") as caught:
        take_one(training)
    assert caught.value.step == 2
    if instead == "a file":
        root.unlink()
    root.mkdir()
    take_one(training)  # the failure is not raised again, and its slot is free
    assert [snapshot.step for snapshot in training.snapshots.snapshots()] == [3]


def test_training_keeps_to_its_deadline_when_the_disk_hangs(tmp_path, monkeypatch):
    files = StalledFiles()
    use_files(monkeypatch, files)
    ema = AsyncPostHocEMA(
        torch.nn.Linear(4, 3),
        checkpoint_every_num_steps="manual",
        checkpoint_folder=tmp_path,
        wait_timeout=0.05,
        max_pending=1,
    )
    ema.update()
    ema.checkpoint()
    files.gate.wait_entered()
    ema.fence()
    ema.update()
    with pytest.raises(TimeoutError, match="slow or hangs"):
        ema.checkpoint()
    ema.fence()
    ema.update()  # training goes on
    files.gate.open()
    ema.flush(TIMEOUT_SECONDS)
    ema.close(TIMEOUT_SECONDS)
    assert [snapshot.step for snapshot in ema.snapshots.snapshots()] == [1]
