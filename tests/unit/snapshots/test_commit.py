"""Writing snapshots: on a slow, full or old disk (hints, free space), and the order of calls that makes one durable.

Oracles: the recorded order of file system calls, and the safetensors package.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotWriteError
from nitrous_ema.snapshots.commit import Committer
from nitrous_ema.snapshots.disk_space import DiskSpace
from nitrous_ema.snapshots.filesystem import ONLY_ONE_PASS, FileSystem
from nitrous_ema.snapshots.header import Stamp, header_bytes
from nitrous_ema.snapshots.names import one_pass_file_name
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.small_snapshots import LAYOUT as SMALL
from tests.support.small_snapshots import A, Failing, OnePass, Recorded, chunks_of, commit, content, stamp, steps
from tests.support.snapshot_folders import layout_of, record, run_id

LAYOUT = layout_of([record("w", (100, 10)), record("n", (3,), "I64", "copied")], chunk_bytes=1024)
RUN = run_id()
STAMP = Stamp(step=5, t=5, t_first=1, run=RUN, lineage=((RUN, None),))
DATA_BEGIN = header_bytes(LAYOUT, STAMP)
FILE_BYTES = DATA_BEGIN + LAYOUT.data_bytes


class Disk(FileSystem):
    """The real disk with a set free space. It records its calls, which fail with the errors that ``failing`` lists."""

    def __init__(self, **failing):
        self.free, self.failing, self.calls = 10 * FILE_BYTES, failing, []

    def note(self, call, *arguments):
        self.calls.append((call, *arguments))
        if self.failing.get(call) and (number := self.failing[call].pop(0)):
            raise OSError(number, os.strerror(number))

    def named(self, call):
        return [noted for noted in self.calls if noted[0] == call]

    def free_bytes(self, path):
        self.note("free_bytes", path)
        return self.free

    def open_exclusive(self, path):
        self.note("open_exclusive")
        return super().open_exclusive(path)

    def make_folder(self, path):
        self.note("make_folder")
        super().make_folder(path)

    def preallocate(self, descriptor, size_bytes):
        self.note("preallocate")
        super().preallocate(descriptor, size_bytes)

    def write_at(self, descriptor, buffer, offset):
        self.note("write_at", offset, len(buffer))
        return super().write_at(descriptor, buffer, offset)

    def start_writeback(self, descriptor, offset, size_bytes):
        self.note("start_writeback", offset, size_bytes)
        super().start_writeback(descriptor, offset, size_bytes)

    def fsync(self, descriptor):
        self.note("fsync")
        super().fsync(descriptor)


def chunks():
    return [bytes([index]) * (end - begin) for index, (begin, end) in enumerate(LAYOUT.chunks)]


def write(root: Path, disk: Disk, **more):
    return Committer(root, disk, **more).write(LAYOUT, STAMP, chunks)


def test_writeback_of_each_chunk_starts_as_soon_as_it_is_written(tmp_path):
    disk = Disk()
    write(tmp_path, disk)
    spans = [(DATA_BEGIN + begin, end - begin) for begin, end in LAYOUT.chunks]
    expected = [(call, *span) for span in spans for call in ("write_at", "start_writeback")]
    seen = [noted for noted in disk.calls if noted[0] in ("write_at", "start_writeback", "fsync")]
    assert seen == [*expected, ("write_at", 0, DATA_BEGIN), ("fsync",)]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EPERM])
def test_writeback_hint_that_fails_is_not_repeated_for_the_file(tmp_path, number):
    disk = Disk(start_writeback=[0, number])
    snapshot = write(tmp_path, disk)
    assert len(disk.named("start_writeback")) == 2
    assert snapshot.paths[0].read_bytes()[DATA_BEGIN:] == b"".join(chunks())
    assert len(disk.named("open_exclusive")) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_file_whose_writeback_lost_bytes_is_written_again(tmp_path, number):
    disk = Disk(start_writeback=[number])
    snapshot = write(tmp_path, disk)
    assert snapshot.paths[0].read_bytes()[DATA_BEGIN:] == b"".join(chunks())
    assert len(disk.named("open_exclusive")) == 2
    assert len(disk.named("fsync")) == 1
    assert list(tmp_path.rglob(".*")) == []


def test_snapshot_that_does_not_fit_leaves_nothing_behind(tmp_path):
    disk = Disk()
    disk.free = FILE_BYTES - 1
    with pytest.raises(SnapshotWriteError, match=r"KiB needed, .*KiB free.*Free space on") as caught:
        write(tmp_path, disk)
    assert caught.value.step == 5
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert {noted[0] for noted in disk.calls} == {"free_bytes"}


def test_snapshot_that_just_fits_is_written(tmp_path):
    disk = Disk()
    disk.free = FILE_BYTES
    assert write(tmp_path, disk).bytes == FILE_BYTES
    assert disk.named("free_bytes") == [("free_bytes", tmp_path)]


def test_dropped_snapshots_are_removed_before_a_new_one_is_refused(tmp_path):
    disk = Disk()
    disk.free = 0

    def reclaim():
        disk.free = FILE_BYTES

    assert write(tmp_path, disk, reclaim=reclaim).bytes == FILE_BYTES


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["preallocate", "write_at"])
def test_space_is_reclaimed_before_the_second_attempt_on_a_full_disk(tmp_path, call, number):
    disk = Disk(**{call: [number]})
    write(tmp_path, disk, reclaim=lambda: disk.note("reclaim"))
    calls = [noted[0] for noted in disk.calls if noted[0] in ("open_exclusive", "reclaim")]
    assert calls == ["open_exclusive", "reclaim", "open_exclusive"]


def test_other_failures_remove_nothing(tmp_path):
    disk = Disk(write_at=[errno.EIO])
    write(tmp_path, disk, reclaim=lambda: disk.note("reclaim"))
    assert disk.named("reclaim") == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), SnapshotError("not now")])
def test_failure_to_reclaim_space_is_logged_and_the_full_disk_reported(tmp_path, caplog, error):
    disk = Disk()
    disk.free = 0

    def reclaim():
        raise error

    with pytest.raises(SnapshotWriteError, match=" needed, "):
        write(tmp_path, disk, reclaim=reclaim)
    assert str(error) in caplog.text


def test_disk_that_does_not_report_its_free_space_is_written_to(tmp_path):
    disk = Disk(free_bytes=[errno.ENOTSUP])
    disk.free = 0
    assert write(tmp_path, disk).bytes == FILE_BYTES


def test_free_space_is_that_of_the_folders_disk_and_unknown_without_a_folder(tmp_path):
    files = FileSystem()
    free_bytes = DiskSpace(tmp_path, files).free_bytes()
    assert 0 <= free_bytes <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    assert DiskSpace(tmp_path / "missing", files).free_bytes() is None


@pytest.fixture
def store(tmp_path):
    made = SnapshotStore(tmp_path / "snapshots")
    made.prepare()
    return made


# The order of durable calls


def recorded_write(tmp_path):
    files = Recorded()
    store = SnapshotStore(tmp_path / "snapshots", files=files)
    store.prepare()
    files.calls.clear()
    snapshot = commit(store)
    files.calls.append(("returned",))
    return snapshot, files.calls


def test_committed_file_is_what_safetensors_reads(store):
    snapshot = commit(store)
    tensors = safetensors.numpy.load_file(snapshot.paths[0])
    assert (
        tensors["ema0.w"].tobytes() + tensors["ema1.w"].tobytes() + tensors["model.n"].tobytes() == content().tobytes()
    )
    assert tensors["ema1.w"].shape == (10, 10)
    assert snapshot.bytes == snapshot.paths[0].stat().st_size
    with snapshot.paths[0].open("rb") as file:
        file.seek(snapshot.data_begin + snapshot.layout.sections[1].begin)
        assert file.read(400) == tensors["ema1.w"].tobytes()


def test_file_is_durable_before_it_has_its_name(tmp_path):
    _, calls = recorded_write(tmp_path)
    names = [call[0] for call in calls]
    last_write = max(i for i, name in enumerate(names) if name == "write")
    assert names[last_write:] == ["write", "fsync", "close", "rename", "fsync_folder", "fsync_folder", "returned"]


def test_write_returns_after_both_folders_are_durable(tmp_path):
    snapshot, calls = recorded_write(tmp_path)
    folder = snapshot.paths[0].parent.name
    assert calls[-4][:1] == ("rename",)
    assert calls[-3:] == [("fsync_folder", folder), ("fsync_folder", "snapshots"), ("returned",)]


def test_header_is_written_once_and_last(tmp_path):
    snapshot, calls = recorded_write(tmp_path)
    writes = [call[2:] for call in calls if call[0] == "write"]
    chunks = [(snapshot.data_begin + begin, end - begin) for begin, end in SMALL.chunks]
    assert writes == [*chunks, (0, snapshot.data_begin)]


def test_whole_commit_is_these_calls_and_no_others(tmp_path):
    snapshot, calls = recorded_write(tmp_path)
    expected = ["make_folder", "open", "preallocate", *["write"] * (len(SMALL.chunks) + 1)]
    expected += ["fsync", "close", "rename", "fsync_folder", "fsync_folder", "returned"]
    assert [call[0] for call in calls] == expected
    temporary, final = next(call[1:] for call in calls if call[0] == "rename")
    assert temporary.startswith(".")
    assert not Path(f"step-x/{temporary}").match("step-*/rank-*.safetensors")
    assert final == snapshot.paths[0].name == "rank-00000-of-00001.safetensors"
    assert calls[2] == ("preallocate", temporary, snapshot.bytes)


FATAL = [(call, 0) for call in ("open", "write", "fsync", "close", "rename")] + [("write", len(SMALL.chunks))]


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        *((failure, errno.EIO) for failure in FATAL),
        *((failure, errno.ENOSPC) for failure in (("write", 1), ("fsync", 0), ("preallocate", 0))),
        (("preallocate", 0), errno.EDQUOT),
    ],
)
def test_failed_call_is_answered_by_one_whole_new_file(tmp_path, failure, number):
    files = Failing({failure: number})
    store = SnapshotStore(tmp_path, files=files)
    snapshot = commit(store)
    opened = [call[1] for call in files.calls if call[0] == "open"]
    assert len(set(opened)) == len(opened) == 2
    synced = [call[1] for call in files.calls if call[0] == "fsync"]
    assert len(set(synced)) == len(synced)
    assert synced[-1] == opened[1]
    second = files.calls[max(i for i, call in enumerate(files.calls) if call[0] == "open") :]
    assert sum(call[0] == "write" for call in second) == len(SMALL.chunks) + 1
    assert os.listdir(snapshot.paths[0].parent) == [snapshot.paths[0].name]
    assert store.verify() == []
    assert store.get() == snapshot
    assert files.open == {}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "rename"])
def test_second_failure_is_raised_with_its_cause_and_leaves_nothing(tmp_path, call):
    files = Failing({(call, count): errno.EIO for count in range(100)})
    store = SnapshotStore(tmp_path, files=files)
    with pytest.raises(
        SnapshotWriteError,
        match=r"was not written: Input/output error.*; the first attempt failed too: Input/output error",
    ) as caught:
        commit(store)
    assert isinstance(caught.value.__cause__, OSError)
    assert (caught.value.step, caught.value.path.name) == (5, "rank-00000-of-00001.safetensors")
    assert len({name for name, *_ in (c[1:] for c in files.calls if c[0] == "open")}) == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert store.snapshots() == []
    assert [found.path for found in store.incomplete()] == [caught.value.path.parent]


def test_full_disk_is_reported_with_its_remedy(tmp_path):
    store = SnapshotStore(tmp_path, files=Failing({("preallocate", count): errno.ENOSPC for count in range(9)}))
    with pytest.raises(SnapshotWriteError, match=r"No space left on device.*Free space on"):
        commit(store)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_file_system_that_cannot_preallocate_is_written_all_the_same(tmp_path, number):
    files = Failing({("preallocate", 0): number})
    store = SnapshotStore(tmp_path, files=files)
    commit(store)
    assert sum(call[0] == "open" for call in files.calls) == 1
    assert store.verify() == []


@pytest.mark.parametrize("count", [0, 1])
def test_snapshot_whose_name_is_not_durable_is_not_acknowledged(tmp_path, count):
    files = Failing({("fsync_folder", count): errno.EIO})
    store = SnapshotStore(tmp_path, files=files)
    with pytest.raises(SnapshotWriteError, match="is complete, but its name may be lost"):
        commit(store)
    assert sum(call[0] == "fsync_folder" for call in files.calls) == count + 1  # not tried again
    assert sum(call[0] == "open" for call in files.calls) == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF])
def test_file_system_without_folder_sync_is_accepted(tmp_path, number):
    store = SnapshotStore(tmp_path, files=Failing({("fsync_folder", count): number for count in range(9)}))
    assert commit(store) == store.get()


def test_failure_to_make_the_folder_is_raised(tmp_path):
    store = SnapshotStore(tmp_path / "gone")
    with pytest.raises(SnapshotWriteError, match="No such file or directory"):
        commit(store)
    assert not (tmp_path / "gone").exists()


def test_final_name_that_exists_is_not_overwritten(store):
    snapshot = commit(store)
    before = snapshot.paths[0].read_bytes()
    files = Recorded()
    with pytest.raises(SnapshotWriteError, match="already exists, and a snapshot is never overwritten"):
        SnapshotStore(store.root, files=files).write(SMALL, stamp(), chunks_of(99))
    assert files.calls == []  # refused before gigabytes are written
    assert os.listdir(snapshot.paths[0].parent) == [snapshot.paths[0].name]
    assert snapshot.paths[0].read_bytes() == before


@pytest.mark.parametrize("refuses", [True, False], ids=["renameat2", "without renameat2"])
def test_name_taken_during_the_write_is_not_overwritten(tmp_path, refuses):
    class Raced(Recorded):
        def rename_new(self, source, target):
            if refuses:
                return super().rename_new(source, target)
            raise OSError(errno.EINVAL, "not on this file system")

        def fsync(self, descriptor):
            super().fsync(descriptor)
            (folder,) = tmp_path.iterdir()
            (folder / "rank-00000-of-00001.safetensors").write_bytes(b"theirs")

    with pytest.raises(SnapshotWriteError, match="already exists"):
        commit(SnapshotStore(tmp_path, files=Raced()))
    (folder,) = tmp_path.iterdir()
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [
        ("rank-00000-of-00001.safetensors", b"theirs")
    ]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_file_system_without_exclusive_rename_is_renamed_on(tmp_path, number):
    files = Failing({("rename", 0): number})
    store = SnapshotStore(tmp_path, files=files)
    assert commit(store) == store.get()
    assert sum(call[0] == "rename" for call in files.calls) == 2
    assert sum(call[0] == "open" for call in files.calls) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        list,
        lambda: list(chunks_of()())[:-1],
        lambda: [*chunks_of()(), b"more"],
        lambda: [*chunks_of()(), b""],
        lambda: [b"x" * 255, *list(chunks_of()())[1:]],
        lambda: [np.zeros(512, np.uint8)[::2], *list(chunks_of()())[1:]],
    ],
    ids=["none", "too few", "too many", "an empty one more", "short", "strided"],
)
def test_buffers_that_do_not_fit_the_layout_are_our_bug(store, wrong):
    with pytest.raises(RuntimeError, match="bug in nitrous_ema"):
        store.write(SMALL, stamp(), wrong)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("size", [1, 100, 256])
def test_chunks_may_come_in_parts(store, size):
    snapshot = store.write(SMALL, stamp(), lambda: (part for chunk in chunks_of()() for part in _parts(chunk, size)))
    assert store.verify() == []
    assert snapshot.paths[0].read_bytes()[snapshot.data_begin :] == b"".join(chunks_of()())
    assert list(snapshot.headers[0].crc32) == [zlib.crc32(chunk) for chunk in chunks_of()()]


def _parts(chunk, size):
    view = memoryview(chunk)
    return [view[begin : begin + size] for begin in range(0, len(view), size)]


def test_error_from_the_source_of_the_data_passes_unchanged_and_leaves_nothing(tmp_path):
    def broken():
        yield content()[:256]
        raise KeyboardInterrupt

    files = Recorded()
    with pytest.raises(KeyboardInterrupt):
        SnapshotStore(tmp_path, files=files).write(SMALL, stamp(), broken)
    assert files.open == {}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_short_writes_make_a_whole_file(tmp_path):
    class Short(FileSystem):
        def write_at(self, descriptor, buffer, offset):
            return super().write_at(descriptor, memoryview(buffer)[:100], offset)

    store = SnapshotStore(tmp_path, files=Short())
    assert commit(store) == store.get()
    assert store.verify() == []


def test_snapshots_are_written_from_several_threads_at_once(store):
    threads = [threading.Thread(target=commit, args=(store, step)) for step in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert steps(store.snapshots()) == [(step, A) for step in range(1, 9)]
    assert store.verify() == []


# In one pass


@pytest.fixture
def one_pass(tmp_path):
    store = SnapshotStore(tmp_path / "snapshots", files=OnePass())
    store.prepare()
    store.files.calls.clear()
    return store


@pytest.mark.parametrize("can", [{}, {"takes_offsets": True}, {"renames": True}])
def test_file_system_that_refuses_renames_or_offsets_is_written_in_one_pass(tmp_path, caplog, can):
    caplog.set_level("INFO")
    store = SnapshotStore(tmp_path / "snapshots", files=OnePass(**can))
    store.prepare()
    assert [each for each in caplog.messages if ONLY_ONE_PASS in each] == [caplog.messages[-1]]
    assert list(store.root.iterdir()) == []
    for step in (10, 20):
        assert commit(store, step) == store.get()
    reader = SnapshotStore(store.root)
    assert (steps(reader.snapshots()), reader.verify(), reader.incomplete()) == ([(10, A), (20, A)], [], [])
    usual = SnapshotStore(tmp_path / "usual")
    usual.prepare()
    assert commit(usual, 20).paths[0].read_bytes()[HEADER:] == reader.get().paths[0].read_bytes()[HEADER:]
    assert usual.get().headers[0].crc32 == reader.get().headers[0].crc32


HEADER = header_bytes(SMALL, stamp())


def test_pass_begins_with_the_header_and_is_durable_before_it_is_acknowledged(one_pass):
    (name,) = {path.name for path in commit(one_pass).paths}
    assert re.fullmatch(r"rank-00000-of-00001\.one-pass-[0-9a-f]{16}\.safetensors", name)
    written = [("write", name, 0, HEADER), *(("write", name, HEADER + b, e - b) for b, e in SMALL.chunks)]
    begun, ended = [("make_folder", one_pass.get().paths[0].parent.name), ("open", name)], [("fsync", name)]
    ended += [("close", name), ("fsync_folder", one_pass.get().paths[0].parent.name), ("fsync_folder", "snapshots")]
    assert [call for call in one_pass.files.calls if call != ("close", "read")] == [*begun, *written, *ended]


def test_file_in_one_pass_is_listed_with_its_last_byte(one_pass):
    path = commit(one_pass).paths[0]
    whole = path.read_bytes()
    for size in (0, 7, 8, 4095, HEADER, HEADER + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert (one_pass.snapshots(), one_pass.verify()) == ([], [])
        assert [each.path for each in one_pass.incomplete()] == [path.parent]
    path.write_bytes(whole)
    assert (steps(one_pass.snapshots()), one_pass.incomplete()) == ([(5, A)], [])
    for wrong in (whole + b"x", whole[:100] + b"x" + whole[101:]):
        path.write_bytes(wrong)
        with pytest.raises(SnapshotDamaged):
            one_pass.get()
        assert len(one_pass.verify()) == 1


def test_failed_pass_is_repeated_under_a_new_name(one_pass):
    class FailsOnce(OnePass):
        fails = False

        def fsync(self, descriptor):
            if self.fails:
                self.fails = False
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().fsync(descriptor)

    files = FailsOnce()
    store = SnapshotStore(one_pass.root, files=files)
    store.prepare()
    files.calls.clear()
    files.fails = True
    commit(store)
    first, second = [call[1] for call in files.calls if call[0] == "open"]
    assert first < second
    assert [path.name for path in store.get().paths] == [second]
    assert [path.name for path in store.get().paths[0].parent.iterdir()] == [second]


def test_failed_pass_is_never_read_once_another_began(one_pass):
    path = commit(one_pass).paths[0]
    newer = path.with_name(one_pass_file_name(0, 1, time.time_ns()))
    newer.write_bytes(path.read_bytes()[:-1])
    assert one_pass.snapshots() == []
    newer.write_bytes(path.read_bytes())
    assert one_pass.get().paths == (newer,)


def test_all_ranks_make_a_snapshot_in_one_pass(one_pass):
    commit(one_pass, rank=0, world_size=2)
    assert one_pass.snapshots() == []
    commit(one_pass, rank=1, world_size=2)
    assert len(one_pass.get().paths) == 2


# Preparing and closing


def test_prepare_makes_the_folder_and_its_parents_durable_and_leaves_no_file(tmp_path):
    files = Recorded()
    SnapshotStore(tmp_path / "a" / "b", files=files).prepare()
    made = [("make_folder", "a"), ("fsync_folder", tmp_path.name), ("make_folder", "b"), ("fsync_folder", "a")]
    older = [
        ("fsync_folder", folder.name) for folder in reversed(tmp_path.parents)
    ]  # whose makers may have been killed
    assert files.calls[: 4 + len(older)] == made + older
    assert [call[0] for call in files.calls[4 + len(older) :]] == [
        "open",
        "write",
        "fsync",
        "close",
        "rename",
        "unlink",
    ]
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert files.open == {}


@pytest.mark.parametrize("call", ["make_folder", "fsync_folder", "open", "write", "fsync", "close", "rename", "unlink"])
def test_folder_that_cannot_be_written_is_reported_with_reason_and_remedy(tmp_path, call):
    files = Failing({(call, 0): errno.EACCES})
    root = tmp_path / "new"
    with pytest.raises(
        SnapshotError, match=r"cannot be written to .*new: .*Permission denied.*Give this user access"
    ) as caught:
        SnapshotStore(root, files=files).prepare()
    assert caught.value.path == root
    assert isinstance(caught.value.__cause__, PermissionError)
    if call != "unlink":
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("root", ["file", "file/below", "link"])
def test_folder_whose_name_is_something_else_is_refused(tmp_path, root):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(SnapshotError, match="choose another folder"):
        SnapshotStore(tmp_path / root).prepare()
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_making_a_store_touches_nothing_and_survives_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = SnapshotStore("snapshots")
    assert list(tmp_path.iterdir()) == []
    store.prepare()
    monkeypatch.chdir("/")
    commit(store)
    assert steps(SnapshotStore(tmp_path / "snapshots").snapshots()) == [(5, A)]


def test_closed_run_is_noted_once(tmp_path):
    files = Recorded()
    store = SnapshotStore(tmp_path, files=files)
    store.close_run(A)
    assert [call[0] for call in files.calls] == ["open", "fsync", "close", "fsync_folder"]
    store.close_run(A)
    assert os.listdir(tmp_path) == [f"closed-{A}"]
    with pytest.raises(SnapshotError, match="could not be written"):
        SnapshotStore(tmp_path / "gone").close_run(A)
