"""Which snapshots are on disk as others are written, how long dropped ones stay there, and failures to drop."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import ClassVar

import numpy as np
import pytest

from nitrous_ema.errors import NitrousWarning, NonFiniteError, SnapshotWriteError
from nitrous_ema.posthoc.keep_rules import KeepAll, KeepBytes, KeepCount, KeepGeometric
from nitrous_ema.snapshots.header import Stamp
from nitrous_ema.snapshots.names import folder_name
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.fakes import TIMEOUT_SECONDS, Gate, QuickFiles
from tests.support.small_snapshots import KeepsFolders
from tests.support.snapshot_folders import layout_of, record, run_id, snapshot_file
from tests.support.weighing_files import WeighingFiles, weight

LAYOUT = layout_of([record("weight", (50, 50))])
A, B, OTHER, LATER = map(run_id, range(1, 5))


def stamp_of(step, run=A, lineage=None):
    return Stamp(step=step, t=step, t_first=1, run=run, lineage=lineage or ((run, None),))


class Rig:
    """A retaining writer and its folder."""

    def __init__(self, root, rule, files=None, **options):
        root.mkdir(exist_ok=True)
        self.root, self.store = root, SnapshotStore(root, files=files or QuickFiles())
        self.writer = RetainingWriter(self.store, rule, **options)

    def write(self, step, run=A, lineage=None, layout=LAYOUT, fill=bytes(4)):
        chunks = [(fill * (end - begin))[: end - begin] for begin, end in layout.chunks]
        return self.writer.write(layout, stamp_of(step, run, lineage), lambda: chunks)

    def steps(self, run=A):
        """Steps of all folders with a final name, from these names alone."""
        return sorted(int(path.name[5:17]) for path in self.root.glob(f"step-*-{run}"))

    def hidden(self):
        return sorted(int(path.name.split("step-")[1][:12]) for path in self.root.glob(".trash-*"))


@pytest.fixture
def rig(tmp_path):
    return lambda rule, **options: Rig(tmp_path / "snapshots", rule, **options)


class EveryOther:
    """A rule of a user's own that keeps even steps; records its arguments."""

    def __init__(self, gate=None):
        self.asked, self.gate, self.error = [], gate, None

    def drop(self, t, *, gammas, snapshot_bytes, pinned=()):
        self.asked.append((tuple(t), tuple(sorted(pinned))))
        if self.gate is not None:
            self.gate.pass_through()
        if self.error is not None:
            raise self.error
        return tuple(place for place, time in enumerate(t[:-1]) if time % 2 and place not in pinned)

    def check(self, gammas, snapshot_bytes):
        pass

    def most_snapshots(self, snapshot_bytes):
        return None


# Kept and dropped snapshots


def test_without_a_rule_all_snapshots_are_kept(rig):
    rig = rig(KeepAll())
    for step in range(1, 6):
        rig.write(step)
    assert rig.steps() == [1, 2, 3, 4, 5]
    assert rig.hidden() == []
    assert rig.writer.ledger.read().dropped == 0


@pytest.mark.parametrize("rule", [KeepCount(4), KeepGeometric(1.5), KeepBytes(130_000), EveryOther()])
def test_snapshots_on_disk_are_those_the_rule_keeps_after_every_write(rule, rig):
    rig, expected = rig(rule), []
    for step in range(1, 26):
        size = rig.write(step).bytes
        expected.append(step)
        dropped = rule.drop(np.array(expected, float), gammas=LAYOUT.gammas, snapshot_bytes=size)
        expected = [kept for place, kept in enumerate(expected) if place not in dropped]
        assert rig.steps() == expected
    assert len(expected) < 25
    assert rig.writer.ledger.read().dropped == 25 - len(expected)


@pytest.mark.parametrize(("fitting", "is_first"), [(1000, True), (1, False)])
def test_first_snapshot_of_a_resume_waits_for_no_header_unless_the_disk_is_full(fitting, is_first, rig):
    before = rig(KeepCount(8))
    for step in range(1, 8):
        size = before.write(step).bytes

    class Files(QuickFiles):
        opened: ClassVar[list[str]] = []

        def free_bytes(self, path):
            return fitting * size

        def open_read(self, path):
            self.opened.append(f"read {path.parent.name[5:17]}")
            return super().open_read(path)

        def open_exclusive(self, path):
            self.opened.append("write")
            return super().open_exclusive(path)

    resumed = rig(KeepCount(3), files=Files())
    resumed.write(10, run=B, lineage=((A, 7), (B, None)))
    assert "write" in Files.opened
    assert (Files.opened[0] == "write") == is_first
    assert resumed.steps(A) + resumed.steps(B) == sorted(each.step for each in resumed.store.snapshots())
    assert len(resumed.store.snapshots()) == 3


def test_as_many_are_kept_where_folders_cannot_be_renamed(rig):
    rig = rig(KeepCount(3), files=KeepsFolders())
    for step in range(1, 11):
        rig.write(step)
        assert len(rig.store.snapshots()) == min(step, 3)
        assert len(rig.steps()) <= 4  # the one that was dropped last is removed in the next turn
    rig.writer.end()
    assert len(rig.steps()) == 3
    assert rig.writer.ledger.read().dropped == 7


def test_dropped_snapshot_stays_until_the_next_is_written(rig):
    rig = rig(KeepCount(2))
    for step in (1, 2):
        rig.write(step)
    contents = {step: snapshot_file(rig.root, step).read_bytes() for step in (1, 2)}
    rig.write(3)
    (gone,) = rig.hidden()
    assert rig.steps() == sorted({1, 2, 3} - {gone})
    (file,) = rig.root.glob(".trash-*/*.safetensors")
    assert file.read_bytes() == contents[gone]
    assert rig.writer.ledger.read().bytes_freed == 0
    rig.write(4)
    assert len(rig.hidden()) == 1
    assert rig.hidden() != [gone]
    assert rig.writer.ledger.read().bytes_freed == len(contents[gone])


def test_newest_and_pinned_snapshots_are_kept_whatever_a_rule_returns(rig):
    class DropsAll(EveryOther):
        def drop(self, t, **_):
            return tuple(range(-3, len(t) + 3))

    rig = rig(DropsAll())
    rig.write(1)
    rig.store.pin(1, A)
    for step in (2, 3):
        rig.write(step)
        assert rig.steps() == [1, step]


def test_pinned_step_is_passed_to_the_rule_until_it_is_unpinned(rig):
    rule = EveryOther()
    rig = rig(rule)
    rig.write(3)
    rig.store.pin(3, A)
    rig.write(4)
    assert rig.steps() == [3, 4]
    assert rule.asked[-1] == ((3, 4), (0,))
    rig.store.unpin(3, A)
    rig.write(6)
    assert rig.steps() == [4, 6]


# Histories


@pytest.fixture
def resumed(rig):
    """Six snapshots of one run, one of an unrelated run, and a writer with keep=2 for a run resumed from step 4."""
    before = rig(KeepAll())
    for step in range(1, 7):
        before.write(step)
    before.write(9, run=OTHER)
    return rig(KeepCount(2))


def test_resumed_run_goes_on_with_the_snapshots_of_its_ancestors(resumed):
    resumed.write(5, run=B, lineage=((A, 4), (B, None)))
    assert resumed.steps(B) == [5]
    assert len(resumed.steps(A)) == 3
    assert set(resumed.steps(A)) > {5, 6}  # of the abandoned future
    assert resumed.steps(OTHER) == [9]


def test_history_that_a_finished_run_shares_is_left_alone(resumed):
    resumed.store.close_run(A)
    resumed.write(5, run=B, lineage=((A, 4), (B, None)))
    assert resumed.steps(A) == [1, 2, 3, 4, 5, 6]


def test_folder_of_a_failed_snapshot_does_not_make_its_run_a_finished_one(rig):
    before = rig(KeepAll())
    for step in range(1, 5):
        before.write(step)
    (before.root / folder_name(5, A)).mkdir()  # as a full disk leaves it
    before.store.close_run(A)
    after = rig(KeepCount(2))
    after.write(5, run=B, lineage=((A, 4), (B, None)))
    assert len(after.store.snapshots(B)) == 2


def test_ancestor_without_snapshots_is_passed_over(resumed):
    resumed.write(5, run=LATER, lineage=((A, 4), (B, 4), (LATER, None)))
    assert len(resumed.steps(A)) == 3


def test_history_is_read_again_after_a_state_is_loaded_in_mid_run(rig):
    rule = EveryOther()
    rig = rig(rule)
    for step in (2, 4, 6):
        rig.write(step)
    rig.write(8, run=B, lineage=((A, 4), (B, None)))  # back to step 4
    assert rule.asked[-1][0] == (2, 4, 8)
    rig.write(10, run=B, lineage=((A, 4), (B, None)))
    assert rule.asked[-1][0] == (2, 4, 8, 10)
    assert rig.steps(A) == [2, 4, 6]


def test_damaged_snapshots_are_left_alone_and_do_not_count(rig):
    before = rig(KeepAll())
    for step in range(1, 5):
        before.write(step)
    snapshot_file(before.root, 2).write_bytes(b"not a snapshot")
    rig = rig(KeepCount(3))
    rig.write(5)
    assert 2 in rig.steps()
    assert len(rig.steps()) == 4


def test_budget_counts_ancestors_at_their_own_size(rig):
    """A run that resumes with half the bytes must not count its ancestors' snapshots at its own size."""
    before = rig(KeepAll())
    size = max(before.write(step).bytes for step in range(1, 9))
    half = layout_of(LAYOUT.records, checkpoint_dtype="F16")
    rig = rig(KeepBytes(5 * size))
    for step in range(9, 13):
        rig.write(step, run=B, lineage=((A, 8), (B, None)), layout=half)
        assert weight(rig.root) <= 5 * size


def test_snapshot_that_another_process_removed_is_forgotten(rig):
    rule = EveryOther()
    rig = rig(rule)
    for step in (2, 4, 6):
        rig.write(step)
    rig.store.hide([rig.store.get(4)])
    rig.write(8)
    assert rule.asked[-1][0] == (2, 6, 8)


# Several writers


def test_rule_is_applied_in_the_order_snapshots_were_taken(rig):
    rule = EveryOther()
    rig = rig(rule)
    for step in (10, 11, 12):
        rig.writer.expect(stamp_of(step))
    with ThreadPoolExecutor(3) as writers:
        late = [writers.submit(rig.write, step) for step in (12, 11)]
        assert not any(each.done() for each in late)
        writers.submit(rig.write, 10).result(TIMEOUT_SECONDS)
        for each in late:
            each.result(TIMEOUT_SECONDS)
    assert [each[0] for each in rule.asked if len(each[0]) > 1] == [(10, 11), (10, 11, 12)]
    assert rig.steps() == [10, 12]


def test_without_a_rule_snapshots_are_written_side_by_side(rig, monkeypatch):
    rig, both = rig(KeepAll()), threading.Barrier(2)
    write = rig.store.write
    monkeypatch.setattr(rig.store, "write", lambda *args: (both.wait(TIMEOUT_SECONDS), write(*args))[1])
    with ThreadPoolExecutor(2) as writers:
        for each in [writers.submit(rig.write, step) for step in (1, 2)]:
            each.result(TIMEOUT_SECONDS)
    assert rig.steps() == [1, 2]


def test_snapshot_that_fails_does_not_block_the_next_one(rig, monkeypatch):
    rig = rig(KeepCount(2))
    for step in (1, 2, 3):
        rig.writer.expect(stamp_of(step))
    with ThreadPoolExecutor(1) as writer:
        second = writer.submit(rig.write, 2)
        with monkeypatch.context() as patch:
            patch.setattr(rig.store, "write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                rig.write(1)
            second.exception(TIMEOUT_SECONDS)
    rig.writer.expect(stamp_of(4))
    rig.writer.forget(stamp_of(3))
    rig.write(4)
    assert rig.steps()[-1] == 4


@pytest.mark.parametrize("budget", [3, 3.9, 7])
def test_budget_of_bytes_holds_at_every_moment(budget, rig, tmp_path):
    size = Rig(tmp_path / "one", KeepAll()).write(1).bytes
    budget_bytes = int(budget * size)
    files = WeighingFiles(tmp_path / "snapshots")
    rig = rig(KeepBytes(budget_bytes), files=files)
    for step in range(1, 31):
        rig.writer.expect(stamp_of(step))
    with ThreadPoolExecutor(3) as writers:
        for each in [writers.submit(rig.write, step) for step in range(1, 31)]:
            each.result(TIMEOUT_SECONDS)
    assert len(rig.steps()) == int(budget) - 1
    assert files.most == int(budget) * size <= budget_bytes


def test_budget_holds_from_the_first_snapshot_of_a_resumed_run_on(rig, tmp_path):
    before = rig(KeepAll())
    size = max(before.write(step).bytes for step in range(1, 8))
    files = WeighingFiles(before.root)
    Rig(before.root, KeepBytes(4 * size), files=files).write(8)
    assert files.most == 7 * size
    assert weight(before.root) == 4 * size


# Failures


class StubbornFiles(QuickFiles):
    """Refuses to rename folders or to remove files while these operations are listed in ``stubborn``."""

    stubborn: frozenset[str] = frozenset()

    def rename(self, source, target):
        if "rename" in self.stubborn and source.name.startswith("step-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        super().rename(source, target)

    def rename_new(self, source, target):
        if "rename" in self.stubborn and source.name.startswith("step-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        super().rename_new(source, target)

    def unlink(self, path):
        if "unlink" in self.stubborn and path.name.endswith(".safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        super().unlink(path)


@pytest.mark.parametrize("operation", ["rename", "unlink"])
def test_failure_to_drop_costs_no_snapshot_and_warns_once(operation, rig):
    files = StubbornFiles()
    rig = rig(KeepCount(2), files=files)
    for step in range(1, 4):
        rig.write(step)
    files.stubborn = frozenset([operation])
    rig.write(4)
    with pytest.warns(NitrousWarning, match=r"keep=.*Permission denied.*Training goes on") as caught:
        rig.writer.report_failures()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rig.writer.report_failures()
    assert rig.steps()[-1] == 4
    files.stubborn = frozenset()
    rig.write(5)
    assert len(rig.steps()) == 2
    rig.write(6)
    rig.writer.report_failures()
    assert len(rig.steps()) == 2
    assert len(rig.hidden()) == 1
    assert rig.store.verify() == []


def test_rule_that_raises_costs_no_snapshot(rig):
    rule = EveryOther()
    rig = rig(rule)
    rig.write(1)
    rule.error = KeyError("a mistake in it")
    rig.write(2)
    with pytest.warns(NitrousWarning, match="a mistake in it"):
        rig.writer.report_failures()
    rule.error = None
    rig.write(4)
    assert rig.steps() == [2, 4]


def test_failed_write_drops_nothing(rig, monkeypatch):
    rig = rig(KeepCount(2))
    for step in (1, 2):
        rig.write(step)

    def fail(*_):
        raise SnapshotWriteError("full", path=rig.root, step=3)

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "write", fail)
        with pytest.raises(SnapshotWriteError):
            rig.write(3)
    assert rig.steps() == [1, 2]
    rig.write(4)
    assert len(rig.steps()) == 2


def test_pin_waits_until_the_rule_was_applied(rig):
    """A pin that was set while the rule is applied would be a note for a snapshot that is being dropped."""
    gate = Gate(is_open=True)
    rule = EveryOther(gate)
    rig = rig(rule)
    rig.write(1)
    gate.shut()
    with ThreadPoolExecutor(2) as threads:
        written = threads.submit(rig.write, 2)
        gate.wait_entered()
        paused = threads.submit(lambda: rig.writer.paused(A).__enter__())
        with pytest.raises(FutureTimeoutError):
            paused.result(0.05)
        gate.open()
        written.result(TIMEOUT_SECONDS)
        assert paused.result(TIMEOUT_SECONDS) is not None


# Other runs in the folder


BRANCH = ((A, 50), (B, None))


@pytest.mark.parametrize("rule", [KeepCount(3), KeepBytes("10MB")], ids=["count", "bytes"])
def test_history_of_a_run_that_branched_off_is_spared(rig, rule):
    """A job is requeued while its old process lives on, and the old one drops nothing that the new one resumed from."""
    old = rig(EveryOther())
    old.writer.begin()
    for step in (10, 20, 30, 40, 50):
        old.write(step)
    young = Rig(old.root, KeepAll())
    young.writer.begin()
    young.write(60, B, BRANCH)
    old.writer._rule = rule
    for step in range(51, 61):
        old.write(step)
    with pytest.warns(NitrousWarning, match=f"run {B} has written a snapshot of step 60"):
        old.writer.report_failures()
    assert set(old.steps()) >= {10, 20, 30, 40, 50, 60}
    assert [each.step for each in old.store.snapshots()] == [10, 20, 30, 40, 50, 60]
    # What branched off does not count towards the number of snapshots that this run keeps for itself.
    if isinstance(rule, KeepCount):
        assert len([step for step in old.steps() if step > 50]) == 3


def test_budget_that_the_history_of_another_run_exceeds_is_warned_of_once(rig):
    old = rig(KeepBytes(10**9))
    old.writer.begin()
    size = max(old.write(step).bytes for step in (10, 20, 30, 40, 50))
    Rig(old.root, KeepAll()).write(60, B, BRANCH)
    old.writer._rule = KeepBytes(4 * size)
    for step in (60, 70, 80):
        old.write(step)
    with pytest.warns(NitrousWarning) as caught:
        old.writer.report_failures()
    (found,) = [str(each.message) for each in caught if "keep= has a budget" in str(each.message)]
    assert "another run in this folder resumed from" in found
    assert old.steps() == [10, 20, 30, 40, 50, 80]


def test_same_job_started_twice_is_noticed_by_the_second_to_write(rig):
    first = rig(KeepAll())
    second = Rig(first.root, KeepAll())
    for each in (first, second):
        each.writer.begin()
    first.write(60, OTHER, ((A, 50), (OTHER, None)))
    second.write(60, LATER, ((A, 50), (LATER, None)))
    first.writer.report_failures()
    with pytest.warns(NitrousWarning, match=f"run {OTHER} has written a snapshot of step 60 since this run, {LATER}"):
        second.writer.report_failures()


# Other tensors

LONGER = layout_of([record("weight", (60, 50))])


def test_snapshots_of_other_tensors_are_dropped_first(rig):
    """Training went on with a longer vocabulary: the earlier snapshots serve no average at its newest step."""
    rig = rig(KeepCount(4))
    for step in range(1, 41):
        rig.write(step, layout=LAYOUT if step <= 20 else LONGER)
        assert len(rig.steps()) == min(step, 4)
        same = [each.step for each in rig.store.snapshots() if each.layout is not LAYOUT and each.step > 20]
        assert len(same) == min(max(step - 20, 0), 4)


def test_snapshots_are_kept_for_a_pinned_one_of_other_tensors(tmp_path):
    kept = []
    for later in (LAYOUT, LONGER):
        rig = Rig(tmp_path / str(len(kept)), KeepCount(6))
        for step in range(1, 31):
            rig.write(step, layout=LAYOUT if step <= 20 else later)
            if step == 20:
                rig.store.pin(20, A)
        kept.append(rig.steps())
    assert kept[0] == kept[1]


# Values that are not finite

NAN = np.float32(np.nan).tobytes()


def write_nan(rig, step, run=A):
    return rig.write(step, run, fill=NAN)


def test_values_that_are_not_finite_are_reported_once_in_a_run(rig):
    rig = rig(KeepAll())
    rig.write(1)
    rig.writer.report_failures()
    write_nan(rig, 2)
    with pytest.warns(NitrousWarning, match="not finite at step 2 .*Restore a snapshot of an earlier step") as caught:
        rig.writer.report_failures()
    assert len(caught) == 1
    write_nan(rig, 3)
    rig.writer.report_failures()
    assert rig.writer.ledger.read().nonfinite == 2
    write_nan(rig, 3, B)  # another run: after a restore
    with pytest.warns(NitrousWarning, match="not finite at step 3 "):
        rig.writer.report_failures()


def test_values_that_are_not_finite_are_raised_once_in_a_run_if_asked(rig):
    rig = rig(KeepAll(), raises_nonfinite=True)
    write_nan(rig, 2)
    write_nan(rig, 3)
    with pytest.raises(NonFiniteError, match="not finite at step 2 "):
        rig.writer.report_failures()
    rig.writer.report_failures()
    assert rig.steps() == [2, 3]


def test_finite_snapshots_are_kept_before_others(rig):
    rig = rig(KeepCount(4))
    for step in range(1, 41):
        (rig.write if step <= 20 else lambda step: write_nan(rig, step))(step)
    # The newest stays whatever it holds, so it takes the place of one of the four finite snapshots.
    finite = [each.step for each in rig.store.snapshots() if each.is_finite]
    assert len(finite) == 3
    assert rig.steps() == [*finite, 40]
    for step in range(41, 60):
        rig.write(step)
    assert all(each.is_finite for each in rig.store.snapshots())
    assert len(rig.steps()) == 4


def test_finite_snapshots_are_chosen_as_if_there_were_no_others(tmp_path):
    """A snapshot that is not finite does not count as a near neighbor of a finite one."""
    for name, written in (("mixed", range(1, 101)), ("finite", range(1, 101, 2))):
        rig = Rig(tmp_path / name, KeepGeometric(1.3))
        for step in written:
            rig.write(step) if step % 2 else write_nan(rig, step)
        rig.write(101)
    mixed, finite = (SnapshotStore(tmp_path / name).snapshots() for name in ("mixed", "finite"))
    assert [each.step for each in mixed if each.is_finite] == [each.step for each in finite]


def test_rule_chooses_among_snapshots_that_are_not_finite_where_there_are_no_others(tmp_path):
    for name, fill in (("finite", bytes(4)), ("not", NAN)):
        rig = Rig(tmp_path / name, KeepCount(5))
        for step in range(1, 31):
            rig.write(step, fill=fill)
    finite, other = ([each.step for each in SnapshotStore(tmp_path / name).snapshots()] for name in ("finite", "not"))
    assert other == finite


def test_budget_of_bytes_holds_with_snapshots_that_are_not_finite(rig):
    rig = rig(KeepCount(2))
    size = rig.write(1).bytes
    rig = Rig(rig.root, KeepBytes(4 * size))
    for step in range(2, 30):
        (rig.write if step % 3 else lambda step: write_nan(rig, step))(step)
        assert len(rig.steps()) <= 3
    assert [step for step in rig.steps()[:-1] if step % 3 == 0] == []


def test_pinned_snapshot_stays_though_it_is_not_finite(rig):
    rig = rig(KeepCount(2))
    write_nan(rig, 1)
    rig.store.pin(1, A)
    for step in range(2, 9):
        rig.write(step)
    assert rig.steps() == [1, 8]
