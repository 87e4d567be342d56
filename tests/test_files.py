"""The file system as the package sees it, on the real one."""

from __future__ import annotations

import errno
import os

import pytest

from nitrous_ema.snapshots import files as files_module
from nitrous_ema.snapshots.files import FileSystem, read_fully, write_fully


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

    with pytest.raises(OSError, match="wrote nothing"):
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


def test_c_library_without_the_function_is_told_as_enosys():
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)) as caught:
        files_module._c_function("no_such_function_anywhere")()
    assert caught.value.errno == errno.ENOSYS


def test_opening_a_pipe_does_not_wait_for_its_writer(files, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    files.close(files.open_read(tmp_path / "pipe"))


def test_link_to_nothing_has_taken_its_name(files, tmp_path):
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
