"""The folder of snapshots: which it holds, which belong to one history, and which are damaged.

Oracles: folders put together by hand.
"""

from __future__ import annotations

import errno
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nitrous_ema.errors import (
    SnapshotDamaged,
    SnapshotError,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotUnavailable,
    SnapshotUnsupported,
)
from nitrous_ema.snapshots import FileSystem, SnapshotStore, new_run_id
from tests.support.small_snapshots import LAYOUT, A, B, C, commit, everything_in, steps
from tests.support.snapshot_folders import forge, need


@pytest.fixture
def store(tmp_path):
    made = SnapshotStore(tmp_path / "snapshots")
    made.prepare()
    return made


# Listing


def test_missing_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        store = SnapshotStore(tmp_path / name)
        for read in (store.runs, store.snapshots, store.get, store.unrelated_runs, store.incomplete, store.verify):
            with pytest.raises(SnapshotNotFound, match="is not a folder of snapshots"):
                read()


def test_empty_folder_has_no_snapshots(store):
    assert (store.runs(), store.snapshots(), store.unrelated_runs(), store.incomplete(), store.verify()) == ([],) * 5
    with pytest.raises(SnapshotNotFound, match=r"holds no snapshot to read\. Check the path\.$") as caught:
        store.get()
    assert caught.value.nearest == ()
    with pytest.raises(SnapshotNotFound, match=rf"no snapshot of run {A}; runs there: none\. Check the path\.$"):
        store.get(run=A)


def test_legacy_files_are_named_where_there_is_no_snapshot(store):
    (store.root / "0.100.pt").touch()
    with pytest.raises(SnapshotNotFound, match=r"ema-pytorch.*--tracked-sigma-rel.*LegacyFolder.*nitrous-ema import"):
        store.get()
    commit(store)
    with pytest.raises(SnapshotNotFound, match=r"holds no snapshot to read\. Excluded steps"):
        store.get(exclude=range(10**4))


def test_legacy_files_beside_snapshots_are_noted(store):
    assert store.legacy_note() == ""
    commit(store)
    (store.root / "0.100.pt").touch()
    assert "also holds 1 file of nitrous-ema 0.0.1 or ema-pytorch" in store.legacy_note()


@pytest.mark.parametrize("kept", [0, 5, 100, 4000, -1])
def test_cut_copy_is_named_as_such_and_a_longer_file_is_not(store, kept):
    file = commit(store, 20).paths[0]
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    with pytest.raises(SnapshotDamaged, match=r"Incomplete copy\? Copy it again\. Exclude this snapshot"):
        store.get()
    assert "Incomplete copy?" in store.verify()[0].message
    file.write_bytes(content + b"more")
    with pytest.raises(SnapshotDamaged, match=r"expected \d+ for its layout\. Exclude"):
        store.get()


def test_nearest_complete_snapshot_is_chosen(store):
    for step in (10, 20, 40):
        commit(store, step)
    (store.root / f"step-{30:012d}-{A}").mkdir()
    assert [store.get(f"nearest:{step}").step for step in (1, 15, 16, 29, 31, 99)] == [10, 10, 20, 20, 40, 40]
    assert store.get("nearest:19", exclude=[20]).step == 10
    with pytest.raises(ValueError, match="'nearest:1234'"):
        store.get("newest")
    with pytest.raises(SnapshotNotFound, match="holds no snapshot to read"):
        store.get("nearest:10", exclude=[10, 20, 40])


def test_repr_of_a_store_names_its_folder(tmp_path):
    assert repr(SnapshotStore(tmp_path / "s")) == f"SnapshotStore({str(tmp_path / 's')!r})"


def test_repr_of_a_snapshot_is_one_short_line(store):
    commit(store, 20)
    text = repr(store.get())
    assert text.startswith(f"<Snapshot of step 20, t=20, run {A}: {len(LAYOUT.records)} tensors, sigma_rels (")
    assert text.endswith(f" in {str(store.root / f'step-{20:012d}-{A}')!r}>")
    assert len(text) < 300


def test_unreadable_folder_is_an_error(store):
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
def test_missing_step_is_reported_with_its_neighbours(store, asked, nearest):
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
        """Every call that changes something is an error."""

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
    with pytest.raises(
        SnapshotNotFound, match=r"no snapshot of step 30.*nearest steps there: 25 \(choose with step=, or --step\)"
    ) as caught:
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
    with pytest.raises(
        SnapshotNotFound, match=rf"no snapshot of run {C}; runs there: {A}, {B}\. Choose one with run=\.$"
    ):
        store.snapshots(C)


def test_run_that_has_not_committed_anything_is_not_the_newest(store):
    commit(store, 10, A)
    (store.root / f"step-000000000020-{B}").mkdir()
    assert steps(store.snapshots()) == [(10, A)]
    assert store.runs() == [A]
    with pytest.raises(SnapshotNotFound):
        store.snapshots(B)


def test_snapshot_with_another_lineage_is_refused(store):
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
    assert [header.stamp.rank for header in snapshot.headers] == [0]
    assert snapshot.bytes == sum(path.stat().st_size for path in snapshot.paths)
    assert store.incomplete() == []


# Damage


def test_other_names_do_not_stand_for_the_file_of_a_missing_rank(store):
    snapshot = commit(store, rank=0, world_size=2)
    for name in (".rank-00001-of-00002.safetensors.1-2", "rank-00001-of-00002.part", "rank-00000-of-00003.safetensors"):
        (snapshot.path.parent / name).touch()
    assert store.snapshots() == []
    (missing,) = store.incomplete()
    assert "is missing" in missing.reason


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
    with pytest.raises(SnapshotNotFound, match=r"nearest steps there: 10.*Excluded steps: \[20\]"):
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
            assert f"chunk {problem.chunk}: checksum mismatch: found" in problem.message
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
def test_final_name_of_anything_but_a_file_is_damage(store, kind):
    path = commit(store).paths[0]
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nothing" if kind == "link to nothing" else path.name)
    with pytest.raises(SnapshotDamaged, match=r"regular file|broken symbolic link|symbolic links"):
        store.get(5)
    assert [problem.path for problem in store.verify()] == [path]


class Server(FileSystem):
    """Fails the first calls of one kind, and notes the waits between attempts."""

    def __init__(self, call, times, number=errno.ESTALE):
        self.call, self.left, self.number, self.waits, self.opened = call, times, number, [], 0

    def fail(self, call):
        if call == self.call and self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))

    def list(self, path):
        self.fail("list")
        return super().list(path)

    def open_read(self, path):
        self.fail("open")
        self.opened += 1
        return super().open_read(path)

    def stat(self, descriptor):
        self.fail("stat")
        return super().stat(descriptor)

    def read_at(self, descriptor, buffer, offset):
        self.fail("read")
        return super().read_at(descriptor, buffer, offset)

    def wait(self, seconds):
        self.waits.append(seconds)


@pytest.mark.parametrize("call", ["list", "open", "stat", "read"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EIO])
def test_failure_of_a_file_system_that_passes_is_not_noticed(store, call, number):
    snapshot = commit(store)
    files = Server(call, 2, number)
    assert SnapshotStore(store.root, files=files).get() == snapshot
    assert files.waits == [0.1, 1.0]
    assert files.opened == (
        2 if call in ("list", "open") else 4
    )  # twice without failures: a descriptor may be what is stale
    assert SnapshotStore(store.root, files=Server(call, 2, number)).verify() == []


@pytest.mark.parametrize("call", ["open", "stat", "read"])
def test_failure_of_a_file_system_that_stays_is_no_damage(store, call):
    five, ten = commit(store, 5), commit(store, 10)
    files = Server(call, 8)
    with pytest.raises(SnapshotUnavailable, match=rf"^{ten.paths[0]} could not be .* file system fails"):
        SnapshotStore(store.root, files=files).get()
    assert files.waits == 2 * [0.1, 1.0, 5.0]  # of both snapshots, since any of them gives the lineage
    assert [each.path for each in SnapshotStore(store.root, files=Server(call, 4)).verify()] == [five.paths[0]]
    found = SnapshotStore(store.root, files=Server(call, 999)).examine()
    assert [each.path for each in found.damaged] == [five.paths[0], ten.paths[0]]


def test_folder_that_cannot_be_listed_is_named(store):
    commit(store)
    with pytest.raises(SnapshotError, match=f"{store.root} cannot be listed: Stale file handle"):
        SnapshotStore(store.root, files=Server("list", 4)).get()


def test_refused_access_is_not_damage(store):
    commit(store)

    class Refused(FileSystem):
        def open_read(self, path):
            raise PermissionError(errno.EACCES, "Permission denied")

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


# For tools


def test_tools_see_valid_and_damaged_snapshots_alike(store):
    for step in (10, 20, 30, 40):
        commit(store, step, A)
    for step in (25, 35, 45):
        commit(store, step, B, ((A, 30), (B, None)))
    commit(store, 27, B)  # has another lineage
    os.truncate(store.get(20).paths[0], 100)
    os.truncate(store.get(45).paths[0], 0)
    found = store.examine()
    assert found.lineage == ((A, 30), (B, None))
    assert steps(found.snapshots) == [(10, A), (25, B), (30, A), (35, B)]
    assert [(type(each), each.step) for each in found.damaged] == [
        (SnapshotDamaged, 20),
        (SnapshotMismatch, 27),
        (SnapshotDamaged, 45),
    ]
    assert steps(store.examine(A).snapshots) == [(10, A), (30, A), (40, A)]
    assert list(found.snapshots) == store.snapshots(exclude=[20, 27, 45])


def test_tools_see_a_run_with_damaged_snapshots_only(store):
    commit(store, 10, A)
    path = commit(store, 20, B, ((A, 10), (B, None))).paths[0]
    os.truncate(path, 0)
    for found in (store.examine(), store.examine(B)):
        assert (found.lineage, found.snapshots) == (((B, None),), ())
        assert [each.path for each in found.damaged] == [path]


def test_tools_see_an_empty_folder_and_no_missing_run(store):
    found = store.examine()
    assert (found.lineage, found.snapshots, found.damaged) == ((), (), ())
    with pytest.raises(SnapshotNotFound, match=f"no snapshot of run {A}"):
        store.examine(A)


# Files of newer versions


def test_snapshot_that_needs_a_newer_version_is_named_and_not_passed_over(store):
    for step in (10, 20):
        commit(store, step)
    need(store.get(20).paths[0], columns="1.2")
    message = r"000020.*rank-00000-of-00001.safetensors needs `columns`, from nitrous_ema 1\.2 on"
    for read in (store.get, store.snapshots):
        with pytest.raises(SnapshotUnsupported, match=message):
            read()
    assert store.get(exclude=[20]).step == 10
    found = store.examine()
    assert steps(found.snapshots) == [(10, A)]
    assert [(type(each), each.step, each.requires) for each in found.damaged] == [
        (SnapshotUnsupported, 20, ("columns",))
    ]
    assert [failure.message for failure in store.verify()] == [str(found.damaged[0])]


def test_unknown_optional_field_does_not_change_what_a_reader_finds(store):
    written = commit(store, 10)
    forge(written.paths[0], "change", "[0.25]", before="nonfinite")
    assert store.verify() == []
    found = store.get()
    assert (found.layout, found.headers[0].crc32) == (written.layout, written.headers[0].crc32)
    assert found.stamp.unknown == {"change": "[0.25]"}


def test_merged_file_of_a_newer_version_is_ignored_beside_its_part_and_named_alone(store):
    """A step may have two versions: the snapshot, and a file that was merged from it and earlier ones."""
    path = commit(store, 10).paths[0]
    merged = path.with_name("rank-00000-of-00001.from-000000000004.safetensors")
    shutil.copy(path, merged)
    need(merged, merged="1.3")
    assert store.get().paths == (path,)
    assert [failure.path for failure in store.verify()] == [merged]
    path.unlink()
    with pytest.raises(SnapshotUnsupported, match=r"from-000000000004\.safetensors needs `merged`"):
        store.get()
    assert store.incomplete() == []


def test_damaged_snapshot_of_the_younger_run_does_not_give_way_to_one_of_the_same_step(store):
    commit(store, 10, A)
    os.truncate(commit(store, 10, B, ((A, 10), (B, None))).paths[0], 0)
    commit(store, 20, B, ((A, 10), (B, None)))
    found = store.examine()
    assert (steps(found.snapshots), [each.step for each in found.damaged]) == ([(20, B)], [10])


def test_store_that_remembers_reads_each_header_once_and_finds_new_folders(store, monkeypatch):
    for step in (10, 20):
        commit(store, step)
    opened, open_read = [], FileSystem.open_read
    monkeypatch.setattr(FileSystem, "open_read", lambda self, path: opened.append(path) or open_read(self, path))
    reader = store.remembering()
    for _ in range(2):
        assert steps(reader.snapshots()) == [(10, A), (20, A)]
        assert (reader.get().step, reader.incomplete(), reader.runs()) == (20, [], [A])
    assert len(opened) == 2
    commit(store, 30)
    assert steps(reader.snapshots()) == [(10, A), (20, A), (30, A)]


def test_runs_are_listed_with_their_own_snapshots(store):
    for step in (10, 20):
        commit(store, step, A)
    os.truncate(commit(store, 25, B, ((A, 10), (B, None))).paths[0], 0)
    commit(store, 30, B, ((A, 10), (B, None)))
    first, second = store.examine_runs()
    assert (first.lineage, steps(first.snapshots), first.damaged) == (((A, None),), [(10, A), (20, A)], ())
    assert (second.lineage, steps(second.snapshots)) == (((A, 10), (B, None)), [(30, B)])
    assert [each.step for each in second.damaged] == [25]


def test_snapshots_of_a_run_share_the_memory_of_their_lineage(store):
    """A training that was resumed often has a long one."""
    commit(store, 10, A, ((A, None),))
    commit(store, 20, B, ((A, 10), (B, None)))
    commit(store, 30, B, ((A, 10), (B, None)))
    _, first, second = store.snapshots()
    assert first.stamp.lineage is second.stamp.lineage
