"""The check of the disk's free space before a training run begins."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import warnings

import pytest

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema.errors import NitrousWarning, SnapshotError
from nitrous_ema.snapshots.disk_space import check_disk_space, explained
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.fakes import background_threads, make_model, nothing_left_behind, use_files
from tests.support.snapshot_folders import run_id

MIB = 2**20
REMEDIES = ("keep=", "checkpoint_dtype=", "checkpoint_folder")


class FreeSpace(FileSystem):
    """A disk with a set free space; None for a disk that does not report it."""

    def __init__(self, free_bytes):
        self.free = free_bytes

    def free_bytes(self, path):
        if self.free is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return self.free


def check(store, snapshot_bytes, most_snapshots):
    check_disk_space(store.root, store.files, store.names, snapshot_bytes, most_snapshots)


@pytest.fixture
def store(tmp_path):
    return lambda free_bytes: SnapshotStore(tmp_path, files=FreeSpace(free_bytes))


def test_disk_without_space_for_one_snapshot_is_refused(store, tmp_path):
    with pytest.raises(SnapshotError, match=r"needs 3\.0 MiB, and 2\.0 MiB are free: not even one fits") as caught:
        check(store(2 * MIB), 3 * MIB, 5)
    assert caught.value.path == tmp_path
    assert all(remedy in str(caught.value) for remedy in REMEDIES)


def test_space_for_exactly_one_snapshot_is_no_error(store):
    with pytest.warns(NitrousWarning):
        check(store(3 * MIB), 3 * MIB, None)


@pytest.mark.parametrize(
    ("fitting", "most", "existing", "warns"),
    [
        (19, None, 0, True),
        (20, None, 0, False),
        (19, None, 30, True),
        (4, 5, 0, True),
        (5, 5, 0, False),
        (2, 5, 2, True),
        (2, 5, 3, False),
    ],
)
def test_space_for_fewer_than_will_be_kept_is_warned_of_with_remedies(store, tmp_path, fitting, most, existing, warns):
    for step in range(existing):
        (tmp_path / f"step-{step:012d}-{run_id()}").mkdir()
    (tmp_path / "notes.txt").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(store(fitting * MIB + MIB // 2), MIB, most)
    assert len(caught) == warns
    for warning in caught:
        assert warning.category is NitrousWarning
        assert f"needs 1.0 MiB, and {fitting}.5 MiB are free" in str(warning.message)
        assert f"there is space for {fitting} " in str(warning.message)
        assert all(remedy in str(warning.message) for remedy in REMEDIES)


def test_size_and_number_are_logged_once(store, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nitrous_ema.snapshots.disk_space")
    check(store(100 * MIB), 4 * MIB, None)
    assert caplog.messages == [f"a snapshot takes 4.0 MiB; there is space for 25 in {tmp_path}"]


def test_disk_that_does_not_report_its_free_space_is_not_checked(store, caplog):
    caplog.set_level(logging.INFO, "nitrous_ema.snapshots.disk_space")
    check(store(None), 4 * MIB, 1000)
    assert "does not report its free space" in caplog.text


@pytest.mark.parametrize("failures", [1, 4])
def test_folder_that_cannot_be_listed_is_named(tmp_path, failures):
    class Failing(FreeSpace):
        left = failures

        def list(self, path):
            self.left -= 1
            if self.left >= 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().list(path)

        def wait(self, seconds):
            pass

    store = SnapshotStore(tmp_path, files=Failing(3 * MIB))
    check = functools.partial(check_disk_space, store.root, store.files, store.names, MIB, 5)
    if failures == 1:
        with pytest.warns(NitrousWarning, match="space for 3 more"):
            check()
    else:
        with pytest.raises(SnapshotError, match=f"{tmp_path} cannot be listed: Stale file handle"):
            check()


@pytest.mark.parametrize("make", [PostHocEMA, AsyncPostHocEMA])
def test_training_without_space_does_not_begin(make, tmp_path, monkeypatch):
    use_files(monkeypatch, FreeSpace(1000))
    before = background_threads()
    with nothing_left_behind():
        with pytest.raises(SnapshotError, match="not even one fits"):
            make(make_model(), checkpoint_folder=tmp_path / "new")
        assert background_threads() == before
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("make", [PostHocEMA, AsyncPostHocEMA])
def test_size_of_the_whole_file_is_checked_and_the_caller_is_named(make, tmp_path, monkeypatch):
    ema = make(make_model(), checkpoint_every_num_steps="manual", checkpoint_folder=tmp_path)
    ema.update()
    ema.checkpoint()
    ema.close()
    size = ema.snapshots.get().bytes
    use_files(monkeypatch, FreeSpace(20 * size))
    make(make_model(), checkpoint_folder=tmp_path / "enough").close()
    use_files(monkeypatch, FreeSpace(20 * size - 1))
    with pytest.warns(NitrousWarning, match="there is space for 19 ") as caught:
        make(make_model(), checkpoint_folder=tmp_path / "less").close()
    assert caught[0].filename == __file__


def test_rule_sets_the_number_of_snapshots_that_must_fit(tmp_path, monkeypatch):
    use_files(monkeypatch, FreeSpace(100_000))
    with pytest.warns(NitrousWarning, match=r"keep= allows 33"):
        PostHocEMA(make_model(), checkpoint_folder=tmp_path, keep=32)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "Free space on that disk"),
        (errno.EDQUOT, "Free space on that disk"),
        (errno.EFBIG, r"limit on the size of a file \(ulimit -f\)"),
        (errno.EROFS, "Give this user access"),
    ],
)
def test_failed_call_is_explained_once_with_its_remedy(tmp_path, number, expected):
    message = explained(OSError(number, os.strerror(number), str(tmp_path)), tmp_path)
    assert message.startswith(f"{os.strerror(number)}. ")
    assert re.search(expected, message)
    assert (str(tmp_path) in message, "Errno" in message) == (False, False)
