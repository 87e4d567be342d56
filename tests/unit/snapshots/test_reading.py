"""Files that are read while their file system fails. What is read otherwise is tested with synthesis."""

from __future__ import annotations

import errno
import os

import pytest

from nitrous_ema.errors import SnapshotDamaged, SnapshotUnavailable
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.reading import OpenFiles


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    return tmp_path / "file"


@pytest.fixture
def failing(monkeypatch):
    """A function that lets the next calls of a function of ``os`` fail."""

    def fail(name, times, number):
        call, left = getattr(os, name), [number] * times

        def failing_call(*arguments):
            if left:
                raise OSError(number, os.strerror(left.pop()))
            return call(*arguments)

        monkeypatch.setattr(os, name, failing_call)

    return fail


class Noting(FileSystem):
    """Notes waits instead of waiting."""

    def __init__(self):
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)


@pytest.mark.parametrize("kept_open", [True, False])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_read_is_repeated_with_a_file_opened_anew(path, failing, kept_open, number):
    noting, out = Noting(), memoryview(bytearray(4))
    with OpenFiles([path] if kept_open else [], files=noting) as files:
        failing("preadv", 3, number)
        assert files.read_into(path, 2, out) == 4
    assert bytes(out) == b"2345"
    # A stale descriptor is no reason to wait: the file is opened again at once.
    assert noting.waits == ([0.1, 1.0] if kept_open else [0.1, 1.0, 5.0])


def test_file_is_opened_again_where_its_server_fails(path, failing):
    noting = Noting()
    failing("open", 2, errno.ETIMEDOUT)
    with OpenFiles([path], files=noting) as files:
        assert files.read_into(path, 0, memoryview(bytearray(10))) == 10
    assert noting.waits == [0.1, 1.0]


def test_failure_that_stays_names_the_file_and_is_no_damage(path, failing):
    with OpenFiles([path], files=Noting()) as files:
        failing("preadv", 5, errno.ENOTCONN)
        with pytest.raises(SnapshotUnavailable, match=rf"^{path} could not be read.*file system fails"):
            files.read_into(path, 0, memoryview(bytearray(10)))
        failing("preadv", 1, errno.EISDIR)
        with pytest.raises(SnapshotDamaged, match=f"{path} is damaged: it cannot be read"):
            files.read_into(path, 0, memoryview(bytearray(10)))
