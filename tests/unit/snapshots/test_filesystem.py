"""The file system calls of the store, on a real file system."""

from __future__ import annotations

import errno
import os

import pytest

from nitrous_ema._base.temporary_files import temporary_name
from nitrous_ema.snapshots import filesystem as files_module
from nitrous_ema.snapshots.filesystem import (
    NO_FOLDER_FSYNC,
    FileSystem,
    read_fully,
    reason,
    rename_to_new,
    sync_folder,
    write_fully,
)
from nitrous_ema.snapshots.names import folder_name, hidden_name
from tests.support.small_snapshots import A


@pytest.fixture
def files() -> FileSystem:
    return FileSystem()


def test_name_that_exists_is_not_opened_for_writing(files, tmp_path):
    (tmp_path / "taken").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        files.open_exclusive(tmp_path / "taken")
    assert (tmp_path / "taken").read_bytes() == b"old"


def test_written_bytes_are_read_back_at_their_positions(files, tmp_path):
    descriptor = files.open_exclusive(tmp_path / "new")
    write_fully(files, descriptor, b"world", 6)
    write_fully(files, descriptor, b"hello ", 0)
    files.fsync(descriptor)
    files.close(descriptor)
    descriptor = files.open_read(tmp_path / "new")
    assert bytes(read_fully(files, descriptor, bytearray(5), 6)) == b"world"
    assert bytes(read_fully(files, descriptor, bytearray(100), 3)) == b"lo world"
    assert files.stat(descriptor).st_size == 11
    files.close(descriptor)


def test_short_and_interrupted_calls_are_continued(tmp_path):
    class Halting(FileSystem):
        calls = 0

        def write_at(self, descriptor, buffer, offset):
            self.calls += 1
            if self.calls % 2:
                raise InterruptedError(errno.EINTR, "interrupted")
            return super().write_at(descriptor, memoryview(buffer)[:3], offset)

        def read_at(self, descriptor, buffer, offset):
            self.calls += 1
            if self.calls % 2:
                raise InterruptedError(errno.EINTR, "interrupted")
            return super().read_at(descriptor, memoryview(buffer)[:3], offset)

    files = Halting()
    descriptor = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT)
    write_fully(files, descriptor, bytes(range(100)), 7)
    assert bytes(read_fully(files, descriptor, bytearray(100), 7)) == bytes(range(100))
    os.close(descriptor)


def test_write_that_makes_no_progress_is_an_error(tmp_path):
    class Stuck(FileSystem):
        def write_at(self, descriptor, buffer, offset):
            return 0

    with pytest.raises(OSError, match="wrote 0 bytes"):
        write_fully(Stuck(), 0, b"abc", 0)


def test_preallocation_sets_the_size(files, tmp_path):
    descriptor = files.open_exclusive(tmp_path / "new")
    try:
        files.preallocate(descriptor, 100_000)
        assert files.stat(descriptor).st_size == 100_000
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        pytest.skip("this file system does not preallocate")
    finally:
        files.close(descriptor)


def test_error_of_a_system_call_without_python_wrapper_is_an_oserror(files, tmp_path):
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        files.preallocate(-1, 10)
    assert caught.value.errno in (errno.EBADF, errno.ENOSYS)
    with pytest.raises(FileNotFoundError) as caught:
        files.rename_new(tmp_path / "missing", tmp_path / "new")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "missing"), str(tmp_path / "new"))


def test_rename_to_a_new_name_refuses_a_taken_one(files, tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(FileExistsError):
        files.rename_new(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"b"
    files.rename_new(tmp_path / "a", tmp_path / "é")
    assert sorted(files.list(tmp_path)) == ["b", "é"]


def test_missing_c_function_raises_enosys():
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)) as caught:
        files_module._c_function("no_such_function_anywhere")()
    assert caught.value.errno == errno.ENOSYS


def test_opening_a_pipe_does_not_wait_for_its_writer(files, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    files.close(files.open_read(tmp_path / "pipe"))


def test_dangling_link_takes_its_name(files, tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    assert files.exists(tmp_path / "link")
    assert not files.exists(tmp_path / "other")


def test_folders_are_made_once_and_made_durable(files, tmp_path):
    files.make_folder(tmp_path / "new")
    files.fsync_folder(tmp_path / "new")
    with pytest.raises(FileExistsError):
        files.make_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.fsync_folder(tmp_path / "file")
    files.unlink(tmp_path / "file")
    assert files.list(tmp_path) == ["new"]


def test_writeback_of_a_part_of_a_file_changes_no_byte(files, tmp_path):
    descriptor = files.open_exclusive(tmp_path / "new")
    try:
        write_fully(files, descriptor, b"x" * 10_000, 0)
        files.start_writeback(descriptor, 4096, 5000)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        pytest.skip("this system has no such call")
    finally:
        files.close(descriptor)
    assert (tmp_path / "new").read_bytes() == b"x" * 10_000


def test_writeback_of_an_invalid_descriptor_is_an_oserror(files):
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        files.start_writeback(-1, 0, 10)
    assert caught.value.errno in (errno.EBADF, errno.ENOSYS)


def test_free_bytes_are_those_for_an_ordinary_user(files, tmp_path, monkeypatch):
    status = os.statvfs(tmp_path)
    numbers = [512, 4096, 1000, 300, 200, *tuple(status)[5:]]  # f_bsize, f_frsize, f_blocks, f_bfree, f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(numbers))
    assert files.free_bytes(tmp_path) == 200 * 4096


def test_file_system_without_blocks_reports_no_free_space(files, tmp_path, monkeypatch):
    numbers = [4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255]
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(numbers))
    with pytest.raises(OSError, match="not supported") as caught:
        files.free_bytes(tmp_path)
    assert caught.value.errno == errno.ENOTSUP


@pytest.mark.parametrize("refuses", [True, False], ids=["renameat2", "without renameat2"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_rename_to_a_new_name_changes_nothing_if_the_name_is_taken(tmp_path, refuses, kind):
    class Old(FileSystem):
        def rename_new(self, source, target):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    files = FileSystem() if refuses else Old()
    for name in "ab":
        (tmp_path / name).mkdir() if kind == "folder" else (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        rename_to_new(files, tmp_path / "a", tmp_path / "b")
    assert sorted(files.list(tmp_path)) == ["a", "b"]
    rename_to_new(files, tmp_path / "a", tmp_path / "c")
    assert sorted(files.list(tmp_path)) == ["b", "c"]
    with pytest.raises(FileNotFoundError):
        rename_to_new(files, tmp_path / "a", tmp_path / "d")


def test_folder_is_removed_only_if_it_is_empty(files, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(OSError, match="not empty") as caught:
        files.remove_folder(tmp_path / "folder")
    assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    files.unlink(tmp_path / "folder" / "file")
    files.remove_folder(tmp_path / "folder")
    assert not files.exists(tmp_path / "folder")


def test_lstat_is_of_the_link_itself(files, tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    assert files.lstat(tmp_path / "link").st_size == len("nothing")


class FolderFsyncFails(FileSystem):
    def __init__(self, number):
        self.number = number

    def fsync_folder(self, path):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_file_system_without_folder_sync_is_noted_once(tmp_path, caplog, monkeypatch, number):
    monkeypatch.setattr("nitrous_ema.snapshots.filesystem._noted_devices", set())
    caplog.set_level("INFO")
    (tmp_path / "second").mkdir()
    assert not any(sync_folder(FolderFsyncFails(number), each) for each in (tmp_path, tmp_path / "second"))
    assert caplog.messages == [f"{tmp_path}: {NO_FOLDER_FSYNC}"]


def test_folder_sync_that_fails_otherwise_is_raised(tmp_path):
    with pytest.raises(OSError, match="Input"):
        sync_folder(FolderFsyncFails(errno.EIO), tmp_path)


def test_reason_of_a_failed_call_names_another_path_only(tmp_path):
    denied = os.strerror(errno.EACCES)
    assert reason(OSError(errno.EACCES, denied, str(tmp_path)), tmp_path) == denied
    assert reason(OSError(errno.EACCES, denied, str(tmp_path / "x")), tmp_path) == f"{denied} ({tmp_path / 'x'})"
    assert reason(OSError("out of cheese"), tmp_path) == "out of cheese"  # no errno, so no strerror


OUR_FOLDERS = [folder_name(10, A), hidden_name(folder_name(10, A)), f"{hidden_name(folder_name(10, A))}.0123abcd"]
CHANGES = {
    "open_exclusive": lambda files, here, folder: files.open_exclusive(folder / "new"),
    "rename out of it": lambda files, here, folder: files.rename(folder / "a", here / "b"),
    "rename into it": lambda files, here, folder: files.rename(here / "mine", folder / "a"),
    "rename_new out of it": lambda files, here, folder: files.rename_new(folder / "a", here / "b"),
    "rename_new into it": lambda files, here, folder: files.rename_new(here / "mine", folder / "b"),
    "unlink": lambda files, here, folder: files.unlink(folder / "a"),
    "make_folder": lambda files, here, folder: files.make_folder(folder / "new"),
    "remove_folder": lambda files, here, folder: files.remove_folder(folder / "empty"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "name",
    [*OUR_FOLDERS, temporary_name("sweep.jsonl")],
    ids=["listed", "hidden", "while it is removed", "temporary"],
)
def test_nothing_is_changed_through_a_link(files, tmp_path, name, change):
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    (elsewhere / "empty").mkdir(parents=True)
    (elsewhere / "a").write_bytes(b"precious")
    here.mkdir()
    (here / "mine").write_bytes(b"mine")
    (here / name).symlink_to(elsewhere)
    with pytest.raises(NotADirectoryError, match="symbolic link, which is not followed") as caught:
        change(files, here, here / name)
    assert reason(caught.value, here / name).startswith("Not a folder")
    assert sorted(path.name for path in elsewhere.iterdir()) == ["a", "empty"]
    assert (elsewhere / "a").read_bytes() == b"precious"


def test_the_folder_that_the_user_names_may_be_a_link(files, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "step-by-step").symlink_to("disk")
    files.close(files.open_exclusive(tmp_path / "step-by-step" / "new"))
    files.unlink(tmp_path / "step-by-step" / "new")


def test_error_in_one_of_our_folders_names_the_whole_path(files, tmp_path):
    folder = tmp_path / OUR_FOLDERS[0]
    folder.mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        files.rename(folder / "a", tmp_path / "b")
    assert (caught.value.filename, caught.value.filename2) == (str(folder / "a"), str(tmp_path / "b"))
    with pytest.raises(FileNotFoundError) as caught:
        files.unlink(folder / "a")
    assert (caught.value.filename, caught.value.filename2) == (str(folder / "a"), None)
