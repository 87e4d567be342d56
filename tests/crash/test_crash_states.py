"""Every disk that a crash may leave: no acknowledged file is lost, no torn file is listed, and writers can go on.

The checks of tests/crash/checks.py, as many as fit into a minute; ``python -m tests.crash.campaign`` does more.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash import runs
from tests.crash.checks import (
    Depth,
    Tally,
    Violation,
    check_crashes,
    check_end,
    check_forgetful_disk,
    check_rot,
    check_state,
)
from tests.crash.disk import (
    TOP,
    Crashed,
    Disk,
    Linked,
    Moved,
    Promised,
    PromisedGone,
    Synced,
    Turns,
    Withdrawn,
    Written,
)
from tests.crash.runs import record
from tests.crash.states import crash_points, states
from tests.crash.subject import load_subject

DEPTH = Depth(subsets=96, samples=1, second_crash_of=50)
# At start-up one writer may rely on names that another has not made durable: in the order of seed 13, and wherever the
# first is killed.
MORE = [
    ("ranks that start together", 13),
    *((runs.KILLED, seed) for seed in (1, 3, 6, 10, 18, 20)),
    *((runs.KILLED_THINNING, seed) for seed in (9, 13, 15)),  # each time another name is not durable
    *((runs.KILLED_BY_FILES, seed) for seed in (10, 15, 22)),
]
RUNS = [*((name, 0) for name in runs.NAMES), *MORE]


@pytest.fixture(scope="module")
def subject():
    return load_subject()


@pytest.fixture(scope="module")
def tallies():
    """The counts of the tests in this file, by run and seed."""
    return {}


@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_no_crash_loses_an_acknowledged_snapshot_or_shows_a_torn_one(subject, tallies, name, seed):
    tally = tallies[name, seed] = check_crashes(record(name, subject, seed), subject, DEPTH)
    assert tally.distinct > 100
    assert tally.restarts >= 10


@pytest.mark.parametrize("name", runs.RACES)
def test_in_no_order_of_calls_is_a_pinned_or_a_new_snapshot_lost(subject, name):
    for seed in range(100):
        check_end(record(name, subject, seed), subject)


def test_killed_writer_in_one_pass_leaves_whole_files_or_none_that_are_listed(subject):
    incomplete = 0
    for seed in range(60):
        recording = record(runs.KILLED_IN_ONE_PASS, subject, seed)
        check_end(recording, subject)
        incomplete += len(subject.store.SnapshotStore(runs.ROOT, files=recording.disk).incomplete())
    assert incomplete > 5  # files that were cut


def test_tens_of_thousands_of_disks_were_checked(tallies):
    if tallies.keys() != set(RUNS):
        pytest.skip("only after all the tests above")
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    assert total.distinct > 20_000
    assert total.restarts > 500
    assert total.second > 1_000


@pytest.mark.parametrize("orderly", [False, True], ids=["in any order", "in order"])
def test_disk_that_loses_durable_bytes_makes_no_reader_return_wrong_ones(subject, orderly):
    assert check_forgetful_disk(record("one rank", subject), subject, orderly=orderly, every=4) > 5


def test_flipped_bit_lost_end_and_wrong_name_are_never_taken_for_a_snapshot(subject):
    assert check_rot(subject, every=7) > 700


# The enumerator itself: the legal disks are written by hand, for logs short enough to list all of them.

FOLDER, FILE = 2, 3


def disks(*log):
    """Return all disks that are possible after the last entry of a log, as sets of (path, content)."""
    last = None
    for last in crash_points(log, Crashed({TOP: {}}, {})):
        if last.index == len(log):
            return {frozenset(state.walk()) for state in states(last, subsets=1024, samples=1000)}
    raise AssertionError("no crash points")


def test_a_name_may_be_lost_until_its_folder_is_synced():
    made = Linked(TOP, "a", FILE)
    assert disks(made) == {frozenset(), frozenset({("/a", b"")})}
    assert disks(made, Synced(FILE)) == disks(made)
    assert disks(made, Synced(TOP)) == {frozenset({("/a", b"")})}


def test_bytes_may_be_lost_until_their_file_is_synced():
    begun = (Linked(TOP, "a", FILE), Synced(TOP), Written(FILE, 0, b"xy"))
    contents = {dict(disk)["/a"] for disk in disks(*begun)}
    assert {b"", b"x", b"xy", b"\0\0"} <= contents
    assert any(len(content) == 2 and content not in (b"xy", b"\0\0") for content in contents)  # garbage
    assert disks(*begun, Synced(FILE)) == {frozenset({("/a", b"xy")})}


def test_a_rename_may_come_before_the_bytes_and_leave_both_names_or_none():
    names = (Linked(TOP, "b", FILE), Linked(TOP, "a", None))
    found = disks(Linked(TOP, "a", FILE), Synced(TOP), Written(FILE, 0, b"x"), *names)
    assert {frozenset(path for path, _ in disk) for disk in found} == {
        frozenset({"/a"}),
        frozenset({"/a", "/b"}),
        frozenset({"/b"}),
        frozenset(),
    }
    assert frozenset({("/b", b"")}) in found


def test_a_folder_may_be_lost_with_all_that_was_synced_in_it():
    found = disks(
        Linked(TOP, "f", FOLDER, True), Linked(FOLDER, "a", FILE), Written(FILE, 0, b"x"), Synced(FILE), Synced(FOLDER)
    )
    assert found == {frozenset(), frozenset({("/f", None), ("/f/a", b"x")})}


def test_a_renamed_folder_has_one_of_its_names_and_is_whole():
    made = (Linked(TOP, "f", FOLDER, True), Synced(TOP), Linked(FOLDER, "a", FILE), Synced(FOLDER))
    twice = (Moved(TOP, "f", "g", FOLDER), Moved(TOP, "g", "h", FOLDER))
    assert disks(*made, *twice) == {frozenset({(f"/{name}", None), (f"/{name}/a", b"")}) for name in "fgh"}
    assert disks(*made, *twice, Synced(TOP)) == {frozenset({("/h", None), ("/h/a", b"")})}
    assert len(disks(*made, *twice, Linked(FOLDER, "a", None))) == 6  # unlinked before its folder's name is durable


def test_hidden_snapshot_that_is_back_or_a_pinned_one_that_is_lost_is_a_violation(subject):
    recording = record("one rank", subject)
    good, promises = recording.disk.now(), [e for e in recording.disk.log if isinstance(e, Promised)]
    folder = promises[1].path.rpartition("/")[0]
    note = Promised(folder.replace("step-", "pin-"), b"")
    asked = [*promises, Withdrawn(folder)]
    check_state(good, good.walk(), asked, recording, subject)
    with pytest.raises(Violation, match="was acknowledged to be gone and is there"):
        check_state(good, good.walk(), [*asked, PromisedGone(folder)], recording, subject)
    pinned = Disk(good)
    pinned.open_exclusive(Path(note.path))
    check_state(pinned.now(), pinned.now().walk(), [*asked, PromisedGone(folder), note], recording, subject)
    pinned.unlink(Path(promises[1].path))
    with pytest.raises(Violation, match="is pinned and lost"):
        check_state(pinned.now(), pinned.now().walk(), [*promises, note, Withdrawn(folder)], recording, subject)
    with pytest.raises(Violation, match="remains of"):
        check_state(pinned.now(), pinned.now().walk(), asked, recording, subject)


def test_a_lost_promise_and_a_torn_file_are_violations(subject):
    recording = record("one rank", subject)
    good = recording.disk.now()
    promises = [entry for entry in recording.disk.log if isinstance(entry, Promised)]
    assert len(check_state(good, good.walk(), promises, recording, subject)) == 3
    path = promises[1].path
    with pytest.raises(Violation, match="was acknowledged and is lost"):
        check_state(Crashed({TOP: {}}, {}), [], promises, recording, subject)
    torn = Crashed(good.folders, {n: held[:-1] for n, held in good.contents.items()})
    with pytest.raises(Violation, match=f"{path} was acknowledged and holds something else"):
        check_state(torn, torn.walk(), promises, recording, subject)
    with pytest.raises(Violation, match="has its final name and is not whole"):
        check_state(torn, torn.walk(), [], recording, subject)


def test_a_seed_decides_whose_turn_it_is():
    def order(seed):
        turn_order, turns = [], Turns(seed)
        turns.run(*(lambda name=name: [(turn_order.append(name), turns.wait()) for _ in range(8)] for name in "abc"))
        return "".join(turn_order)

    assert order(1) == order(1)
    assert len({order(seed) for seed in range(5)}) > 1


def test_disk_in_memory_is_a_file_system(subject, tmp_path):
    """The same calls leave the same files on it and on a real disk."""
    here, real = Disk(), subject.filesystem.FileSystem()
    for files, root in ((here, runs.ROOT), (real, tmp_path / "snapshots")):
        player = runs.Player(subject, Disk())
        player.store = store = subject.store.SnapshotStore(root, files=files)
        store.prepare()
        player.write(10)
        player.write(10)  # taken
        for step in (20, 30, 40):
            player.write(step)
        store.close_run(runs.A)
        store.pin(30, runs.A)
        store.hide([store.get(10)])
        assert store.remove_hidden(older_than_seconds=60) == 0
        assert store.remove_hidden() > 0
        store.hide([store.get(20)])
        assert len(player.failures) == 1
    found = {
        str(path.relative_to(tmp_path)): path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")
    }
    assert found == {path.removeprefix("/run/"): content for path, content in here.now().walk() if path != "/run"}
