"""The folder of snapshots: the order of calls that makes a snapshot durable, and which snapshots belong together.

Oracles: the safetensors package, the recorded order of file system calls, and folders put together by hand.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nitrous_ema.errors import (
    SnapshotDamaged,
    SnapshotError,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotWriteError,
)
from nitrous_ema.snapshots import FileSystem, Layout, SnapshotStore, Stamp, TensorRecord, new_run_id

A, B, C = (f"2026112{day}T101530.123456-1a2b3c4d" for day in (1, 2, 3))

LAYOUT = Layout(
    records=(
        TensorRecord(name="w", keys=("w",), dtype="F32", shape=(10, 10), role="averaged"),
        TensorRecord(name="n", keys=("n",), dtype="I64", shape=(3,), role="copied"),
    ),
    gammas=(6.94, 16.97),
    sigma_rels=(0.10, 0.05),
    chunk_bytes=256,
)


def stamp(step=5, run=A, lineage=None, **more):
    return Stamp(step=step, t=step, t_first=1, run=run, lineage=lineage or ((run, None),), **more)


def content(step=5):
    return np.random.default_rng(step).integers(0, 256, LAYOUT.data_bytes, np.uint8)


def chunks_of(step=5, layout=LAYOUT):
    return lambda: (content(step)[begin:end] for begin, end in layout.chunks)


def commit(store, step=5, run=A, lineage=None, **more):
    return store.write(LAYOUT, stamp(step, run, lineage, **more), chunks_of(step))


def steps(snapshots):
    return [(snapshot.step, snapshot.run) for snapshot in snapshots]


def everything_in(root):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(root).rglob("*"))}


class Recorded(FileSystem):
    """Notes every call that changes or secures something: ("write_at", name of the file, position, bytes)."""

    def __init__(self):
        self.calls = []
        self.open = {}

    def note(self, call, name, *more):
        self.calls.append((call, str(name), *more))

    def open_exclusive(self, path):
        self.note("open", path.name)
        descriptor = super().open_exclusive(path)
        self.open[descriptor] = path.name
        return descriptor

    def preallocate(self, descriptor, size_bytes):
        self.note("preallocate", self.open[descriptor], size_bytes)
        super().preallocate(descriptor, size_bytes)

    def write_at(self, descriptor, buffer, offset):
        self.note("write", self.open[descriptor], offset, len(buffer))
        return super().write_at(descriptor, buffer, offset)

    def fsync(self, descriptor):
        self.note("fsync", self.open[descriptor])
        super().fsync(descriptor)

    def close(self, descriptor):
        super().close(descriptor)
        self.note("close", self.open.pop(descriptor, "read"))

    def rename(self, source, target):
        self.note("rename", source.name, target.name)
        super().rename(source, target)

    def rename_new(self, source, target):
        self.note("rename", source.name, target.name)
        super().rename_new(source, target)

    def unlink(self, path):
        self.note("unlink", path.name)
        super().unlink(path)

    def make_folder(self, path):
        self.note("make_folder", path.name)
        super().make_folder(path)

    def fsync_folder(self, path):
        self.note("fsync_folder", path.name)
        super().fsync_folder(path)


class Failing(Recorded):
    """Fails some calls, after they were noted: {(call, how many of them went before): errno}."""

    def __init__(self, failures):
        super().__init__()
        self.failures = dict(failures)
        self.counts = {}

    def note(self, call, name, *more):
        super().note(call, name, *more)
        count = self.counts.get(call, 0)
        self.counts[call] = count + 1
        if (number := self.failures.get((call, count))) is not None:
            raise OSError(number, os.strerror(number))


@pytest.fixture
def store(tmp_path):
    made = SnapshotStore(tmp_path / "snapshots")
    made.prepare()
    return made


# Writing


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
    chunks = [(snapshot.data_begin + begin, end - begin) for begin, end in LAYOUT.chunks]
    assert writes == [*chunks, (0, snapshot.data_begin)]


def test_whole_commit_is_these_calls_and_no_others(tmp_path):
    snapshot, calls = recorded_write(tmp_path)
    expected = ["make_folder", "open", "preallocate", *["write"] * (len(LAYOUT.chunks) + 1)]
    expected += ["fsync", "close", "rename", "fsync_folder", "fsync_folder", "returned"]
    assert [call[0] for call in calls] == expected
    temporary, final = next(call[1:] for call in calls if call[0] == "rename")
    assert temporary.startswith(".")
    assert not Path(f"step-x/{temporary}").match("step-*/rank-*.safetensors")
    assert final == snapshot.paths[0].name == "rank-00000-of-00001.safetensors"
    assert calls[2] == ("preallocate", temporary, snapshot.bytes)


FATAL = [(call, 0) for call in ("open", "write", "fsync", "close", "rename")] + [("write", len(LAYOUT.chunks))]


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
    assert sum(call[0] == "write" for call in second) == len(LAYOUT.chunks) + 1
    assert os.listdir(snapshot.paths[0].parent) == [snapshot.paths[0].name]
    assert store.verify() == []
    assert store.get() == snapshot
    assert files.open == {}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "rename"])
def test_second_failure_is_told_with_its_cause_and_leaves_nothing(tmp_path, call):
    files = Failing({(call, count): errno.EIO for count in range(100)})
    store = SnapshotStore(tmp_path, files=files)
    with pytest.raises(
        SnapshotWriteError, match=r"was not written: \[Errno 5\].*; nor the first time: \[Errno 5\]"
    ) as caught:
        commit(store)
    assert isinstance(caught.value.__cause__, OSError)
    assert (caught.value.step, caught.value.path.name) == (5, "rank-00000-of-00001.safetensors")
    assert len({name for name, *_ in (c[1:] for c in files.calls if c[0] == "open")}) == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert store.snapshots() == []
    assert [found.path for found in store.incomplete()] == [caught.value.path.parent]


def test_full_disk_is_told_with_its_remedy(tmp_path):
    store = SnapshotStore(tmp_path, files=Failing({("preallocate", count): errno.ENOSPC for count in range(9)}))
    with pytest.raises(SnapshotWriteError, match=r"No space left on device.*Free some space"):
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
    with pytest.raises(SnapshotWriteError, match="is whole, but its name may be lost"):
        commit(store)
    assert sum(call[0] == "fsync_folder" for call in files.calls) == count + 1  # not tried again
    assert sum(call[0] == "open" for call in files.calls) == 1


def test_file_system_without_folder_sync_is_accepted(tmp_path):
    store = SnapshotStore(tmp_path, files=Failing({("fsync_folder", count): errno.EINVAL for count in range(9)}))
    assert commit(store) == store.get()


def test_failure_to_make_the_folder_is_told(tmp_path):
    store = SnapshotStore(tmp_path / "gone")
    with pytest.raises(SnapshotWriteError, match="No such file or directory"):
        commit(store)
    assert not (tmp_path / "gone").exists()


def test_final_name_that_exists_is_not_overwritten(store):
    snapshot = commit(store)
    before = snapshot.paths[0].read_bytes()
    files = Recorded()
    with pytest.raises(SnapshotWriteError, match="exists already, and a snapshot is never overwritten"):
        SnapshotStore(store.root, files=files).write(LAYOUT, stamp(), chunks_of(99))
    assert [call[0] for call in files.calls] == ["make_folder"]  # told before gigabytes are written
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

    with pytest.raises(SnapshotWriteError, match="exists already"):
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
        store.write(LAYOUT, stamp(), wrong)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_error_from_the_source_of_the_data_passes_unchanged_and_leaves_nothing(tmp_path):
    def broken():
        yield content()[:256]
        raise KeyboardInterrupt

    files = Recorded()
    with pytest.raises(KeyboardInterrupt):
        SnapshotStore(tmp_path, files=files).write(LAYOUT, stamp(), broken)
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
        thread.join(timeout=20)
    assert steps(store.snapshots()) == [(step, A) for step in range(1, 9)]
    assert store.verify() == []


# Preparing and closing


def test_prepare_makes_the_folder_and_its_parents_durable_and_leaves_no_file(tmp_path):
    files = Recorded()
    SnapshotStore(tmp_path / "a" / "b", files=files).prepare()
    made = [("make_folder", "a"), ("fsync_folder", tmp_path.name), ("make_folder", "b"), ("fsync_folder", "a")]
    older = [("fsync_folder", folder.name) for folder in reversed(tmp_path.parents)]  # their maker may have been killed
    assert files.calls[: 4 + len(older)] == made + older
    assert [call[0] for call in files.calls[4 + len(older) :]] == ["open", "write", "fsync", "close", "unlink"]
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert files.open == {}


@pytest.mark.parametrize("call", ["make_folder", "fsync_folder", "open", "write", "fsync", "close", "unlink"])
def test_folder_that_cannot_be_written_is_told_with_reason_and_remedy(tmp_path, call):
    files = Failing({(call, 0): errno.EACCES})
    root = tmp_path / "new"
    with pytest.raises(
        SnapshotError, match=r"cannot be written to .*new: .*Permission denied.*Allow this user"
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


# Listing


def test_missing_folder_is_told(tmp_path):
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        store = SnapshotStore(tmp_path / name)
        for read in (store.runs, store.snapshots, store.get, store.unrelated_runs, store.incomplete, store.verify):
            with pytest.raises(SnapshotNotFound, match="is not a folder of snapshots"):
                read()


def test_empty_folder_has_no_snapshots(store):
    assert (store.runs(), store.snapshots(), store.unrelated_runs(), store.incomplete(), store.verify()) == ([],) * 5
    with pytest.raises(SnapshotNotFound, match="holds no snapshot to read") as caught:
        store.get()
    assert caught.value.nearest == ()
    with pytest.raises(SnapshotNotFound, match=f"no snapshot of run {A}; runs there: none"):
        store.get(run=A)


def test_unreadable_folder_is_told(store):
    class Forbidden(FileSystem):
        def list(self, path):
            raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(SnapshotError, match="cannot be listed"):
        SnapshotStore(store.root, files=Forbidden()).snapshots()


def test_foreign_names_are_passed_over(store):
    snapshot = commit(store)
    for name in (f".trash-step-000000000007-{A}", "step-7", f"step-7-{A}", "notes", f"step-000000000007-{A}.bak"):
        (store.root / name).mkdir()
    for name in (f"closed-{A}", f"pin-5-{A}", "readme.txt", ".probe-1"):
        (store.root / name).touch()
    for name in (".rank-00000-of-00001.safetensors.1-2", "rank-00001-of-00001.safetensors", "README"):
        (snapshot.paths[0].parent / name).touch()
    assert (store.snapshots(), store.incomplete(), store.verify()) == ([snapshot], [], [])


def test_snapshots_are_listed_by_step(store):
    for step in (1000, 7, 10**12, 12):
        commit(store, step)
    assert [snapshot.step for snapshot in store.snapshots()] == [7, 12, 1000, 10**12]
    assert store.get().step == 10**12
    assert store.get(12).t == 12


@pytest.mark.parametrize(("asked", "nearest"), [(1, (10,)), (15, (10, 20)), (21, (20, 40)), (100, (40,))])
def test_missing_step_is_told_with_its_neighbours(store, asked, nearest):
    for step in (10, 20, 40):
        commit(store, step)
    (store.root / f"step-000000000030-{A}").mkdir()
    with pytest.raises(SnapshotNotFound, match=f"no snapshot of step {asked} of run {A}; nearest steps") as caught:
        store.get(asked)
    assert caught.value.nearest == nearest
    assert " and ".join(map(str, nearest)) in str(caught.value)


def test_reading_changes_nothing_on_disk(store):
    for step in (1, 2):
        commit(store, step)
    (store.root / f"step-000000000003-{A}").mkdir()

    class ReadOnly(FileSystem):
        """Any of the calls that change something is an error."""

        def open_exclusive(self, path):
            raise AssertionError(path)

        write_at = rename = rename_new = unlink = make_folder = fsync = fsync_folder = preallocate = open_exclusive

    before = everything_in(store.root)
    reader = SnapshotStore(store.root, files=ReadOnly())
    assert len(reader.snapshots()) == 2
    reader.runs(), reader.get(), reader.unrelated_runs(), reader.incomplete(), reader.verify()
    assert everything_in(store.root) == before


# Lineage


def test_resumed_run_continues_its_ancestor_up_to_where_it_was_left(store):
    for step in (10, 20, 30, 40):
        commit(store, step, A)
    for step in (25, 30, 35):
        commit(store, step, B, ((A, 20), (B, None)))
    assert steps(store.snapshots()) == [(10, A), (20, A), (25, B), (30, B), (35, B)]
    assert store.get(30).run == B
    assert steps(store.snapshots(run=A)) == [(10, A), (20, A), (30, A), (40, A)]
    assert (store.runs(), store.unrelated_runs()) == ([A, B], [])


def test_abandoned_future_is_not_mixed_in(store):
    for step in (10, 20, 30):
        commit(store, step, A)
    commit(store, 25, B, ((A, 20), (B, None)))
    with pytest.raises(SnapshotNotFound, match=r"no snapshot of step 30.*nearest steps there: 25") as caught:
        store.get(30)
    assert caught.value.nearest == (25,)


def test_two_resumes_make_one_history(store):
    for step in (10, 20, 30):
        commit(store, step, A)
    for step in (25, 30):
        commit(store, step, B, ((A, 20), (B, None)))
    commit(store, 27, C, ((A, 20), (B, 25), (C, None)))
    assert steps(store.snapshots()) == [(10, A), (20, A), (25, B), (27, C)]


def test_second_resume_from_the_same_step_leaves_the_first_aside(store):
    commit(store, 10, A)
    commit(store, 15, B, ((A, 10), (B, None)))
    commit(store, 12, C, ((A, 10), (C, None)))
    assert steps(store.snapshots()) == [(10, A), (12, C)]
    assert store.unrelated_runs() == [B]
    assert store.unrelated_runs(B) == [C]
    assert steps(store.snapshots(B)) == [(10, A), (15, B)]


def test_unrelated_newer_run_is_the_one_that_is_read(store):
    commit(store, 10, A)
    commit(store, 5, B)
    assert steps(store.snapshots()) == [(5, B)]
    assert (store.runs(), store.unrelated_runs()) == ([A, B], [A])
    assert store.get(10, run=A).run == A
    with pytest.raises(SnapshotNotFound, match=f"run {A} has that step"):
        store.get(10)
    with pytest.raises(SnapshotNotFound, match=f"no snapshot of run {C}; runs there: {A}, {B}"):
        store.snapshots(C)


def test_run_that_has_not_committed_anything_is_not_the_newest(store):
    commit(store, 10, A)
    (store.root / f"step-000000000020-{B}").mkdir()
    assert steps(store.snapshots()) == [(10, A)]
    assert store.runs() == [A]
    with pytest.raises(SnapshotNotFound):
        store.snapshots(B)


def test_snapshot_that_tells_another_history_is_refused(store):
    commit(store, 10, A)
    commit(store, 20, B, ((A, 10), (B, None)))
    commit(store, 30, B)
    with pytest.raises(SnapshotMismatch, match="has the lineage"):
        store.snapshots()
    assert steps(store.snapshots(exclude=[10, 20])) == [(30, B)]


def test_step_of_both_runs_is_taken_from_the_younger_and_else_from_the_elder(store):
    commit(store, 10, A)
    younger = commit(store, 10, B, ((A, 10), (B, None)))
    commit(store, 20, B, ((A, 10), (B, None)))
    assert steps(store.snapshots()) == [(10, B), (20, B)]
    younger.paths[0].unlink()
    assert steps(store.snapshots()) == [(10, A), (20, B)]
    assert store.get(10).run == A


# Several ranks


def test_snapshot_of_two_ranks_exists_when_both_files_are_there(store):
    commit(store, rank=1, world_size=2)
    (missing,) = store.incomplete()
    assert missing.reason == "it holds 1 of 2 files; rank-00000-of-00002.safetensors is missing"
    assert store.snapshots() == []
    commit(store, rank=0, world_size=2)
    (snapshot,) = store.snapshots()
    assert [path.name for path in snapshot.paths] == [f"rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    assert [header.stamp.rank for header in snapshot.headers] == [0, 1]
    assert snapshot.bytes == sum(path.stat().st_size for path in snapshot.paths)
    assert store.incomplete() == []


def other_layout():
    return Layout(records=LAYOUT.records, gammas=(6.94, 7.0), sigma_rels=LAYOUT.sigma_rels, chunk_bytes=256)


@pytest.mark.parametrize(
    ("what", "layout", "stamped"),
    [
        ("layout", other_layout(), {}),
        ("t", LAYOUT, {"t": 7}),
        ("t_first", LAYOUT, {"t_first": 2}),
        ("lineage", LAYOUT, {"lineage": ((B, 2), (A, None))}),
    ],
)
def test_ranks_that_disagree_are_no_snapshot(store, what, layout, stamped):
    facts = {"step": 5, "t": 5, "t_first": 1, "run": A, "lineage": ((A, None),), "world_size": 2}
    store.write(LAYOUT, Stamp(**facts, rank=0), chunks_of())
    store.write(layout, Stamp(**facts | stamped, rank=1), chunks_of())
    assert store.snapshots() == []
    (found,) = store.incomplete()
    assert f"ranks 0 and 1 disagree on {what}: " in found.reason


# Damage


def test_newest_damaged_snapshot_is_an_error_until_it_is_left_out(store):
    good, bad = commit(store, 10), commit(store, 20)
    os.truncate(bad.paths[0], bad.bytes - 1)
    for read in (store.get, store.snapshots, lambda: store.get(20)):
        with pytest.raises(SnapshotDamaged, match=r"exclude=\[20\]") as caught:
            read()
        assert (caught.value.step, caught.value.path) == (20, bad.paths[0])
    assert store.snapshots(exclude=[20]) == [good]
    assert store.get(exclude=[20]) == store.get(10) == good
    assert (store.runs(), store.incomplete()) == ([A], [])
    with pytest.raises(SnapshotNotFound, match=r"nearest steps there: 10.*Left out by exclude: \[20\]"):
        store.get(20, exclude=[20])


def test_newest_run_with_damage_only_does_not_give_way_to_an_older_one_unasked(store):
    commit(store, 10, A)
    os.truncate(commit(store, 20, B).paths[0], 0)
    with pytest.raises(SnapshotDamaged):
        store.snapshots()
    with pytest.raises(SnapshotNotFound, match=f"run {B} has damaged snapshots only.*Choose another run"):
        store.snapshots(exclude=[20])
    assert steps(store.snapshots(A)) == [(10, A)]
    assert store.runs() == [A, B]


SIZE = 4096 + LAYOUT.data_bytes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    store = SnapshotStore(tmp_path_factory.mktemp("written"))
    return store, commit(store)


@given(position=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bit_anywhere_in_a_file_is_found(written, position, bit):
    store, snapshot = written
    path = snapshot.paths[0]
    blob = path.read_bytes()
    assert len(blob) == SIZE
    broken = bytearray(blob)
    broken[position] ^= 1 << bit
    path.write_bytes(broken)
    try:
        (problem,) = store.verify()
        assert (problem.path, problem.step) == (path, 5)
        if position < snapshot.data_begin:
            assert problem.chunk is None
            with pytest.raises(SnapshotDamaged):
                store.get()
        else:
            begin, end = LAYOUT.chunks[problem.chunk]
            assert begin <= position - snapshot.data_begin < end
            assert f"chunk {problem.chunk}: its checksum is" in problem.message
    finally:
        path.write_bytes(blob)


@pytest.mark.parametrize("size", [0, 1, 8, 9, 4095, 4096, 4097, 4096 + 256, SIZE - 1, SIZE + 1, SIZE + 4096])
def test_file_of_another_size_is_found(store, size):
    path = commit(store).paths[0]
    os.truncate(path, size)
    (problem,) = store.verify()
    assert (problem.path, problem.chunk) == (path, None)
    with pytest.raises(SnapshotDamaged, match="is damaged"):
        store.get()


def test_verify_looks_at_every_final_name(store):
    commit(store, 10, A)
    abandoned = commit(store, 20, A)
    commit(store, 15, B, ((A, 10), (B, None)))
    alone = commit(store, 30, C, rank=1, world_size=2)
    for path in (*abandoned.paths, *alone.paths):
        blob = bytearray(path.read_bytes())
        blob[-1] ^= 1
        blob[4500] ^= 1  # byte 404 of the data, in the second profile
        path.write_bytes(blob)
    found = [(problem.path, problem.chunk) for problem in store.verify()]
    assert found == [(path, chunk) for path in (*abandoned.paths, *alone.paths) for chunk in (2, 4)]


def test_file_under_another_snapshots_name_is_damage(store):
    snapshot = commit(store, 10)
    other = store.root / f"step-000000000011-{A}"
    shutil.copytree(snapshot.paths[0].parent, other)
    with pytest.raises(SnapshotDamaged, match=f"it was written as step-000000000010-{A}/rank-00000-of-00001"):
        store.get(11)
    assert store.get(10) == snapshot


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link to itself"])
def test_final_name_of_something_that_is_no_file_is_damage(store, kind):
    path = commit(store).paths[0]
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nothing" if kind == "link to nothing" else path.name)
    with pytest.raises(SnapshotDamaged, match=r"regular file|link to nothing|symbolic links"):
        store.get(5)
    assert [problem.path for problem in store.verify()] == [path]


def test_read_error_is_damage_and_refused_access_is_not(store):
    commit(store)

    class Broken(FileSystem):
        def read_at(self, descriptor, buffer, offset):
            raise OSError(errno.EIO, "Input/output error")

    class Refused(FileSystem):
        def open_read(self, path):
            raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(SnapshotDamaged, match=r"cannot be read.*Input/output error"):
        SnapshotStore(store.root, files=Broken()).get()
    with pytest.raises(SnapshotError, match=r"cannot be opened.*Permission denied") as caught:
        SnapshotStore(store.root, files=Refused()).get()
    assert not isinstance(caught.value, SnapshotDamaged)
    assert len(SnapshotStore(store.root, files=Refused()).verify()) == 1


def test_snapshot_removed_while_it_is_read_is_passed_over(store):
    kept, removed = commit(store, 10), commit(store, 20)

    class Pruned(FileSystem):
        def open_read(self, path):
            if path == removed.paths[0]:
                shutil.rmtree(path.parent, ignore_errors=True)
            return super().open_read(path)

    assert SnapshotStore(store.root, files=Pruned()).snapshots() == [kept]
    assert SnapshotStore(store.root, files=Pruned()).verify() == []


def test_readers_leave_no_descriptor_open(store):
    os.truncate(commit(store, 20).paths[0], 5000)
    commit(store, 10)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        store.verify(), store.incomplete(), store.runs()
        with pytest.raises(SnapshotDamaged):
            store.get()
    assert len(os.listdir("/proc/self/fd")) == before


def test_new_run_ids_are_accepted_as_runs(store):
    run = new_run_id()
    assert commit(store, 5, run) == store.get(5, run)
