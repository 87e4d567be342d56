"""Removing snapshots from a folder: pins, hiding, unlinking, and files of dead processes.

Oracles: the recorded order of file system calls, and the folder itself. Crashes are tested in tests/crash.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys

import pytest

from nitrous_ema._base.processes import signature
from nitrous_ema.errors import SnapshotError, SnapshotNotFound, SnapshotWriteError
from nitrous_ema.snapshots import FileSystem, SnapshotStore
from nitrous_ema.snapshots.names import rank_file_name
from nitrous_ema.snapshots.reading import OpenFiles
from tests.support.small_snapshots import A, B, Failing, KeepsFolders, Recorded, commit, content, everything_in, steps


@pytest.fixture
def store(tmp_path):
    """A store with three snapshots."""
    made = SnapshotStore(tmp_path / "snapshots")
    made.prepare()
    for step in (10, 20, 30):
        commit(made, step)
    return made


def folder_of(step, run=A):
    return f"step-{step:012d}-{run}"


def watched(store, files=None):
    files = files or Recorded()
    return SnapshotStore(store.root, files=files), files.calls


def changes(calls):
    return [call for call in calls if call != ("close", "read")]


def signature_of_a_dead_process():
    code = "from nitrous_ema._base.processes import signature; import sys; sys.stdout.write(signature())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout


# Hiding and removing


def test_hidden_snapshots_are_listed_no_more_and_lose_no_byte(store):
    ten, twenty, thirty = store.snapshots()
    before = twenty.paths[0].read_bytes()
    assert store.hide([ten, twenty]) == ten.bytes + twenty.bytes
    assert (store.snapshots(), store.incomplete(), store.verify(), store.runs()) == ([thirty], [], [], [A])
    assert [path.name for path in store.hidden()] == [f".trash-{folder_of(10)}", f".trash-{folder_of(20)}"]
    assert (store.hidden()[1] / twenty.paths[0].name).read_bytes() == before
    with pytest.raises(SnapshotNotFound, match="nearest steps there: 30"):
        store.get(20)


def test_all_are_hidden_by_renames_and_one_sync(store):
    other, calls = watched(store)
    other.hide(store.snapshots()[:2])
    renames = [("rename", folder_of(step), f".trash-{folder_of(step)}") for step in (10, 20)]
    assert changes(calls) == [*renames, ("fsync_folder", "snapshots")]


def test_nothing_is_unlinked_before_it_is_durably_hidden(store):
    store.hide(store.snapshots()[:2])
    other, calls = watched(store)
    other.remove_hidden()
    names = [call[0] for call in calls]
    assert names == ["rename", "rename", "fsync_folder", *2 * ["unlink", "remove_folder"]]
    assert calls[2] == ("fsync_folder", "snapshots")


def test_nothing_is_unlinked_if_hiding_cannot_be_made_durable(store):
    store.hide(store.snapshots()[:1])
    other, calls = watched(store, Failing({("fsync_folder", 0): errno.EIO}))
    with pytest.raises(SnapshotError, match=r"nothing was removed, since its names could not be made durable"):
        other.remove_hidden()
    assert [call[0] for call in calls] == ["rename", "fsync_folder"]
    with pytest.raises(SnapshotError, match="may come back if the machine stops"):
        watched(store, Failing({("fsync_folder", 0): errno.EIO}))[0].hide([store.get(20)])


def test_only_hidden_snapshots_are_removed(store):
    hidden = store.get(10)
    store.hide([hidden])
    for name in (".trash-mine", f".trash-{folder_of(20)}x", ".trash-step-7", f"trash-{folder_of(20)}"):
        (store.root / name).mkdir()
    (store.root / f"closed-{A}").touch()
    store.pin(20, A)
    expected = {
        path: held for path, held in everything_in(store.root).items() if path not in everything_in_trash(store)
    }
    assert store.remove_hidden() == hidden.bytes
    assert everything_in(store.root) == expected
    assert (store.hidden(), store.remove_hidden()) == ([], 0)


def everything_in_trash(store):
    return {path for folder in store.hidden() for path in (folder, *folder.rglob("*"))}


def test_hidden_link_is_removed_and_its_target_is_not(store, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (store.root / folder_of(10)).rename(elsewhere)
    (store.root / folder_of(10)).symlink_to(elsewhere)
    store.hide([store.get(10)])
    store.remove_hidden()
    assert store.hidden() == []
    assert len(list(elsewhere.iterdir())) == 1


def test_copy_of_a_hidden_snapshot_is_not_hidden_before_that_is_removed(store):
    shutil.copytree(store.root / folder_of(10), store.root / f".trash-{folder_of(10)}")
    with pytest.raises(SnapshotError, match="File exists"):
        store.hide([store.get(10)])
    store.remove_hidden()
    store.hide([store.get(10)])
    assert steps(store.snapshots()) == [(20, A), (30, A)]


def test_file_system_without_exclusive_rename_hides_too(store):
    other, calls = watched(store, Failing({("rename", 0): errno.EINVAL}))
    other.hide([store.get(10)])
    assert [call[0] for call in changes(calls)] == ["rename", "rename", "fsync_folder"]
    assert steps(store.snapshots()) == [(20, A), (30, A)]


@pytest.mark.parametrize("call", ["rename", "unlink", "remove_folder"])
def test_error_of_the_system_is_raised_with_its_remedy(store, call):
    ten, twenty = store.get(10), store.get(20)
    store.hide([ten] if call != "rename" else [])
    other, _ = watched(store, Failing({(call, 0): errno.EACCES}))
    with pytest.raises(SnapshotError, match=r"could not be .*Permission denied.*Give this user access"):
        other.hide([twenty]) if call == "rename" else other.remove_hidden()
    assert steps(store.snapshots())[-2:] == [(20, A), (30, A)]


def test_one_that_cannot_be_removed_does_not_keep_the_others(store):
    store.hide([store.get(10), store.get(20)])
    (store.hidden()[0] / "folder").mkdir()
    with pytest.raises(SnapshotError, match=r"could not be removed"):
        store.remove_hidden()
    assert [path.name.split(".")[1] for path in store.hidden()] == [f"trash-{folder_of(10).split('.')[0]}"]


def test_file_that_is_open_on_a_network_disk_is_removed_another_time(store):
    store.hide([store.get(10)])
    other, _ = watched(store, Failing({("unlink", 0): errno.EBUSY}))
    assert other.remove_hidden() == 0
    assert other.remove_hidden() > 0
    assert store.hidden() == []


def test_recently_hidden_snapshot_is_left_to_its_readers(store):
    store.hide([store.get(10)])
    assert store.remove_hidden(older_than_seconds=600) == 0
    store.prepare()
    assert len(store.hidden()) == 1
    (hidden,) = store.hidden()

    class LongAgo(FileSystem):
        def lstat(self, path):
            found = super().lstat(path)
            seconds = 601 if path == hidden else 0
            return os.stat_result((*found[:7], found[7] - seconds, found[8] - seconds, found[9] - seconds))

    SnapshotStore(store.root, files=LongAgo()).prepare()
    assert store.hidden() == []


@pytest.mark.parametrize("refuses", [True, False], ids=["renameat2", "without renameat2"])
def test_two_processes_that_do_the_same_do_no_harm(store, refuses):
    chosen = store.snapshots()[:2]

    class Overtaken(Recorded):
        """Just before each of its calls, another process makes all of the same calls."""

        def note(self, call, name, *more):
            if call in ("rename", "unlink", "remove_folder"):
                store.hide(chosen)
                if call != "rename":
                    store.remove_hidden()
            super().note(call, name, *more)

        def rename_new(self, source, target):
            if not refuses:
                store.hide(chosen)
                raise OSError(errno.EINVAL, "not on this file system")
            super().rename_new(source, target)

    other, calls = watched(store, Overtaken())
    assert other.hide(chosen) == 0
    assert calls[-1] == ("fsync_folder", "snapshots")  # it promises what the other has not made durable yet
    assert other.remove_hidden() == 0
    assert (steps(store.snapshots()), store.hidden(), store.incomplete()) == ([(30, A)], [], [])


def test_hiding_nothing_does_nothing(store):
    other, calls = watched(store)
    assert (other.hide([]), other.remove_hidden(), calls) == (0, 0, [])


# Pins


def test_pin_is_a_durable_note(store):
    other, calls = watched(store)
    other.pin(20, A)
    note = f"pin-000000000020-{A}"
    assert changes(calls) == [("open", note), ("fsync", note), ("close", note), ("fsync_folder", "snapshots")]
    other.pin(20, A)
    assert store.pins() == {(20, A)}
    other.unpin(20, A)
    assert calls[-2:] == [("unlink", note), ("fsync_folder", "snapshots")]
    other.unpin(20, A)
    assert store.pins() == frozenset()


def test_pin_of_a_missing_snapshot_is_refused_and_leaves_no_note(store):
    (store.root / folder_of(25)).mkdir()
    for step, run, nearest in ((25, A, "20 and 30"), (5, A, "10"), (20, B, "none")):
        with pytest.raises(SnapshotNotFound, match=f"no snapshot of step {step} of run {run} to pin.*there: {nearest}"):
            store.pin(step, run)
    assert store.pins() == frozenset()
    store.pin(40, A, must_exist=False)
    assert store.pins() == {(40, A)}


@pytest.mark.parametrize(("step", "run"), [(5, "x/../../y"), (-1, A), (10**18, A)])
def test_pin_of_no_snapshots_name_is_refused(store, step, run):
    with pytest.raises(ValueError, match="not the step and run of a snapshot"):
        store.pin(step, run, must_exist=False)


def test_foreign_notes_are_passed_over(store):
    for name in (f"pin-5-{A}", "pin-", f"pin-000000000005-{A}.bak", "pinned"):
        (store.root / name).touch()
    assert store.pins() == frozenset()


def test_notes_of_closed_runs_and_pins_are_listed(store):
    assert not store.is_closed(A)
    store.close_run(A)
    store.pin(20, A)
    (store.root / "pinned").touch()
    assert store.is_closed(A)
    assert [note.name for note in store.notes()] == [f"closed-{A}", f"pin-000000000020-{A}"]


def test_failure_to_pin_is_raised(store):
    for pin in (lambda store: store.pin(20, A), lambda store: store.unpin(20, A)):
        other, _ = watched(store, Failing({("fsync_folder", 0): errno.EIO}))
        with pytest.raises(SnapshotError, match=r"pin-000000000020-.* could not be (written|removed)"):
            pin(other)


def test_pinned_and_newest_snapshots_are_not_hidden(store):
    ten, twenty, thirty = store.snapshots()
    store.pin(20, A)
    before = everything_in(store.root)
    for kept, why in ((twenty, "is pinned"), (thirty, "is the newest snapshot")):
        with pytest.raises(SnapshotError, match=why):
            store.hide([ten, kept])
    assert everything_in(store.root) == before


def test_pin_that_comes_between_two_renames_is_honoured(store):
    ten, twenty, _ = store.snapshots()

    class Raced(Recorded):
        def rename_new(self, source, target):
            super().rename_new(source, target)
            store.pin(20, A)

    other, calls = watched(store, Raced())
    with pytest.raises(SnapshotError, match="is pinned"):
        other.hide([ten, twenty])
    assert calls[-1] == ("fsync_folder", "snapshots")
    assert steps(store.snapshots()) == [(20, A), (30, A)]


def test_pin_that_came_too_late_brings_the_snapshot_back(store):
    ten = store.get(10)

    class Raced(Recorded):
        def rename_new(self, source, target):
            store.pin(10, A)
            super().rename_new(source, target)

    watched(store, Raced())[0].hide([ten])
    assert store.remove_hidden(older_than_seconds=600) == 0
    assert store.get(10) == ten
    assert (store.hidden(), store.verify()) == ([], [])


def test_pin_of_a_hidden_snapshot_brings_it_back(store):
    ten = store.get(10)
    store.hide([ten])
    other, calls = watched(store)
    other.pin(10, A)
    renamed = calls.index(("rename", f".trash-{folder_of(10)}", folder_of(10)))
    assert ("fsync_folder", "snapshots") in calls[renamed:]
    assert (store.get(10), store.hidden(), store.verify()) == (ten, [], [])


def test_pin_does_not_bring_back_a_snapshot_being_unlinked(store):
    store.hide([store.get(10)])
    other, _ = watched(store, Failing({("unlink", 0): errno.EIO}))
    with pytest.raises(SnapshotError, match="could not be removed"):
        other.remove_hidden()
    with pytest.raises(SnapshotNotFound, match="to pin"):
        store.pin(10, A)
    store.pin(10, A, must_exist=False)
    assert store.remove_hidden() > 0
    assert (store.hidden(), store.incomplete()) == ([], [])


def test_pinned_one_whose_name_is_taken_again_stays_hidden(store, caplog):
    shutil.copytree(store.root / folder_of(10), store.root / f".trash-{folder_of(10)}")
    store.pin(10, A)
    shutil.copytree(store.root / folder_of(10), store.root / f".trash-{folder_of(10)}", dirs_exist_ok=True)
    assert store.remove_hidden() == 0
    assert len(store.hidden()) == 1
    assert "could not be renamed back" in caplog.text


# Folders that cannot be renamed


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EMFILE, errno.EPERM, errno.EINVAL])
def test_files_are_removed_one_by_one_behind_a_note(store, number):
    other, calls = watched(store, KeepsFolders(number))
    ten, name = store.get(10), rank_file_name(0, 1)
    note = f"dropped-{10:012d}-{A}"
    assert other.hide([ten]) == ten.bytes
    assert changes(calls)[:4] == [("open", note), ("fsync", note), ("close", note), ("fsync_folder", "snapshots")]
    assert steps(store.snapshots()) == [(20, A), (30, A)]
    assert (store.incomplete(), store.verify()) == ([], [])
    assert store.hidden() == [store.root / folder_of(10)]
    assert [path.name for path in store.notes()] == [note]
    with OpenFiles([ten.paths[0]]):  # its bytes are there until it is removed
        calls.clear()
        assert other.remove_hidden() == ten.bytes
    synced = ("fsync_folder", "snapshots")
    assert changes(calls) == [synced, ("unlink", name), ("remove_folder", folder_of(10)), synced, ("unlink", note)]
    assert (store.hidden(), store.notes(), steps(store.snapshots())) == ([], [], [(20, A), (30, A)])


def test_pin_and_a_note_exclude_each_other(store):
    other, _ = watched(store, KeepsFolders())
    ten, twenty = store.snapshots()[:2]
    store.pin(20, A)
    with pytest.raises(SnapshotError, match="is pinned"):
        other.hide([twenty])
    other.hide([ten])
    with pytest.raises(SnapshotNotFound, match="to pin"):
        store.pin(10, A)
    assert store.pins() == {(20, A)}
    # Both notes, as a process leaves them that died before it looked for the pin.
    (store.root / f"dropped-{20:012d}-{A}").touch()
    other.remove_hidden()
    assert steps(store.snapshots()) == [(20, A), (30, A)]
    store.unpin(20, A)
    assert steps(store.snapshots()) == [(30, A)]


def test_pin_that_is_set_while_a_snapshot_is_hidden_by_a_note_wins(store):
    class Pinning(KeepsFolders):
        def rename_new(self, source, target):
            (store.root / f"pin-{10:012d}-{A}").touch()
            super().rename_new(source, target)

    other, _ = watched(store, Pinning())
    with pytest.raises(SnapshotError, match="is pinned"):
        other.hide([store.get(10)])
    other.remove_hidden()
    assert steps(store.snapshots()) == [(10, A), (20, A), (30, A)]


def test_pin_that_one_listing_misses_is_looked_for_again(store):
    other, _ = watched(store, KeepsFolders())
    other.hide([store.get(10)])
    (store.root / f"pin-{10:012d}-{A}").touch()

    class Late(KeepsFolders):
        def list(self, path):
            return [name for name in super().list(path) if not name.startswith("pin-")]

    assert watched(store, Late())[0].remove_hidden() == 0
    assert steps(store.snapshots()) == [(10, A), (20, A), (30, A)]


def test_note_on_a_folder_that_is_gone_is_removed(store):
    (store.root / f"dropped-{10:012d}-{B}").touch()
    assert store.remove_hidden() == 0
    assert store.notes() == []


def test_run_that_starts_removes_what_a_note_has_hidden_long_ago(store):
    class LongAgo(KeepsFolders):
        def lstat(self, path):
            status = list(super().lstat(path))
            status[9] -= 601 if path.name.startswith("dropped-") else 0
            return os.stat_result(status)

    other, _ = watched(store, KeepsFolders())
    other.hide([store.get(10)])
    other.prepare()
    assert len(store.hidden()) == 1
    watched(store, LongAgo())[0].prepare()
    assert (store.hidden(), store.notes()) == ([], [])


# Links that others put into the folder


class Swapped(FileSystem):
    """Before the first unlink, somebody else puts a link to another folder in the place of a hidden one."""

    def __init__(self, elsewhere):
        self.elsewhere = elsewhere

    def unlink(self, path):
        if path.parent.name.startswith(".trash-") and not path.parent.is_symlink():
            path.parent.rename(path.parent.with_name("moved"))
            path.parent.symlink_to(self.elsewhere)
        super().unlink(path)


def test_removal_does_not_follow_a_link_that_replaces_a_hidden_folder(store, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(store.get(10).paths[0].parent, elsewhere)
    before = everything_in(elsewhere)
    store.hide([store.get(10)])
    with pytest.raises(SnapshotError, match="a symbolic link, which is not followed"):
        SnapshotStore(store.root, files=Swapped(elsewhere)).remove_hidden()
    assert everything_in(elsewhere) == before
    store.remove_hidden()  # of the link, its name alone
    assert store.hidden() == []
    assert everything_in(elsewhere) == before


def test_snapshot_is_not_written_through_a_link_in_place_of_its_folder(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (store.root / folder_of(40)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotWriteError, match="a symbolic link, which is not followed"):
        commit(store, 40)
    assert everything_in(tmp_path / "elsewhere") == {}


# Hidden snapshots that cannot be removed


class Kept(FileSystem):
    """Refuses to rename or empty the hidden folder of step 10, whose owner has this user id."""

    def __init__(self, call, owner):
        self.call, self.owner = call, owner

    def refuse(self, call, path):
        if call == self.call and "step-000000000010" in str(path):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def rename_new(self, source, target):
        self.refuse("rename", source)
        super().rename_new(source, target)

    def unlink(self, path):
        self.refuse("unlink", path)
        super().unlink(path)

    def lstat(self, path):
        status = super().lstat(path)
        if "step-000000000010" not in str(path):
            return status
        return os.stat_result([*status[:4], self.owner, *status[5:10]], {"st_ctime": status.st_ctime})


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_hidden_snapshot_of_another_user_is_left_to_that_user(store, call):
    snapshots = store.snapshots()
    store.hide(snapshots[:2])
    other = SnapshotStore(store.root, files=Kept(call, os.geteuid() + 1))
    assert other.remove_hidden() == snapshots[1].bytes
    assert len(other.hidden()) == 1


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_failure_to_remove_one_is_raised_when_the_others_are_gone(store, call):
    store.hide(store.snapshots()[:2])
    with pytest.raises(SnapshotError, match=r"step-000000000010.* could not be removed: Operation not permitted"):
        SnapshotStore(store.root, files=Kept(call, os.geteuid())).remove_hidden()
    assert len(store.hidden()) == 1


# Readers


class While(FileSystem):
    """Calls ``happens`` just before call number ``at`` of a reader."""

    def __init__(self, at, happens):
        self.left, self.happens = at, happens

    def _look(self):
        self.left -= 1
        if self.left == 0:
            self.happens()

    def list(self, path):
        self._look()
        return super().list(path)

    def open_read(self, path):
        self._look()
        return super().open_read(path)

    def exists(self, path):
        self._look()
        return super().exists(path)


READS = {
    "snapshots": lambda store: steps(store.snapshots())[-1],
    "get": lambda store: steps([store.get()])[0],
    "get of a step": lambda store: steps([store.get(40)])[0],
    "examine": lambda store: steps(store.examine().snapshots)[-1],
    "runs": lambda store: store.runs(),
    "unrelated": lambda store: store.unrelated_runs(),
    "incomplete": lambda store: store.incomplete(),
    "verify": lambda store: store.verify(),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("removed", [False, True], ids=["hidden", "removed"])
@pytest.mark.parametrize("files", [FileSystem, KeepsFolders])
def test_no_reader_fails_when_listed_snapshots_are_dropped_at_any_moment(tmp_path, read, removed, files):
    """At each call of a reader, all that it has listed is dropped, and one new snapshot is written."""
    for at in range(1, 40):
        writer = SnapshotStore(tmp_path / str(at), files=files())
        writer.prepare()
        for step in (10, 20, 40) if read == "get of a step" else (10, 20):
            commit(writer, step)

        def drop_listed(writer=writer):
            listed = writer.snapshots()
            commit(writer, 50)
            writer.hide([each for each in listed if read != "get of a step" or each.step != 40])
            if removed:
                writer.remove_hidden()

        reading = While(at, drop_listed)
        found = READS[read](SnapshotStore(writer.root, files=reading))
        assert found in {"runs": [[A]], "get of a step": [(40, A)]}.get(read, [[], (20, A), (50, A)])
        if reading.left > 0:
            break
    assert at > 3


def test_reader_finds_what_was_hidden_since_it_listed(store):
    ten = store.get(10)
    path, begin = ten.paths[0], ten.data_begin
    store.hide([ten])
    out = memoryview(bytearray(ten.layout.data_bytes))
    with OpenFiles([path]) as files:
        store.remove_hidden()  # a file that is open is read to its end
        assert files.read_into(path, begin, out) == len(out)
    assert bytes(out) == content(10).tobytes()
    with pytest.raises(SnapshotNotFound, match=f"{path} was deleted after it was listed"), OpenFiles([path]):
        pass


def test_file_that_is_no_snapshots_is_looked_for_under_its_own_name_only(tmp_path):
    (tmp_path / ".trash-folder").mkdir()
    (tmp_path / ".trash-folder" / "0.10.pt").touch()
    with pytest.raises(SnapshotNotFound), OpenFiles([tmp_path / "folder" / "0.10.pt"]):
        pass


# Files of dead processes


def leave(store, writer, folder=None, name=".rank-00000-of-00001.safetensors."):
    folder = store.root / (folder_of(25) if folder is None else folder)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}{writer}-0123456789abcdef"
    path.write_bytes(b"x" * 9000)
    return path


def test_temporary_files_of_the_provably_dead_are_removed(store):
    dead, alive = signature_of_a_dead_process(), signature()
    here = alive.split(".")
    gone = [leave(store, dead), leave(store, dead, folder_of(20)), leave(store, dead, "", ".probe.")]
    kept = [
        leave(store, alive, folder_of(26)),
        leave(store, alive, "", ".probe."),
        leave(store, "1234", folder_of(27)),
        leave(store, ".".join([here[0], "0" * 16, *here[2:]]), folder_of(27)),  # another boot, but new
        leave(store, ".".join(["0" * 16, "0" * 16, *here[2:]]), folder_of(27)),  # another host
        leave(store, ".".join([*here[:2], "1", *here[3:]]), folder_of(27)),  # another container
        leave(store, dead, folder_of(28), ".another-writers."),
    ]
    writers = {each.path: each.writer for each in store.temporary()}
    assert {path for path, writer in writers.items() if writer == "gone"} == set(gone)
    assert sorted(set(writers.values())) == ["alive", "elsewhere", "gone", "unknown"]
    snapshots = store.snapshots()
    store.prepare()
    assert [path.exists() for path in (*gone, *kept)] == [False] * 3 + [True] * 7
    assert not gone[0].parent.exists()  # it held nothing else
    assert (store.snapshots(), store.verify()) == (snapshots, [])


def test_failure_to_clean_up_is_logged_and_nothing_else(store, caplog):
    first, second = (
        leave(store, signature_of_a_dead_process()),
        leave(store, signature_of_a_dead_process(), folder_of(26)),
    )
    with caplog.at_level(logging.WARNING):
        watched(store, Failing({("unlink", 0): errno.EACCES}))[0].prepare()
    assert "could not be cleaned up" in caplog.text
    assert (first.exists(), second.exists()) == (True, False)

    class Unlisted(FileSystem):
        def list(self, path):
            raise PermissionError(errno.EACCES, "Permission denied")

    SnapshotStore(store.root, files=Unlisted()).prepare()


def test_folder_that_vanishes_before_its_first_file_is_made_again(store):
    class Swept(Recorded):
        swept = 0

        def open_exclusive(self, path):
            if not self.swept:
                self.swept = 1
                os.rmdir(path.parent)
            return super().open_exclusive(path)

    other, calls = watched(store, Swept())
    commit(other, 40)
    assert [call[0] for call in calls].count("make_folder") == 2
    assert store.get().step == 40


def test_temporary_name_names_its_writer(tmp_path):
    class Looking(Recorded):
        def fsync(self, descriptor):
            found.extend(SnapshotStore(tmp_path).temporary())
            super().fsync(descriptor)

    found = []
    snapshot = commit(SnapshotStore(tmp_path, files=Looking()))
    (written,) = found
    assert (written.path.parent, written.writer, written.bytes) == (snapshot.paths[0].parent, "alive", snapshot.bytes)
