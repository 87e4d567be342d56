from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nitrous_ema.arena import Arena, snapshot_layout
from nitrous_ema.async_ import writer
from nitrous_ema.async_.staging import SlotPool
from nitrous_ema.async_.writer import BackgroundSink, WritePolicy
from nitrous_ema.errors import NitrousError, NitrousWarning, SnapshotWriteError
from nitrous_ema.keeping import Keeper
from nitrous_ema.pipeline import InlineLane, Pending
from nitrous_ema.posthoc.keep_rules import KeepAll, KeepCount
from nitrous_ema.resources import AvailableMemory
from nitrous_ema.snapshots.format import Stamp
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.tracked import track
from tests.fakes import TIMEOUT_SECONDS, FaultyFiles, StalledFiles, background_threads, make_model, small_pieces

RUN = "20261122T101530.123456-1a2b3c4d"


def pending_snapshot(model, layout):
    """A function of a step that gives a snapshot to be taken, and its averages."""
    with torch.no_grad():
        arena = Arena(track(model), layout)
        for group in arena.groups:
            for number, flat in enumerate(group.flats):
                flat.copy_(torch.arange(flat.numel()) + number)

    def pending(step):
        return Pending(arena, Stamp(step=step, t=step, t_first=1, run=RUN, lineage=((RUN, None),)))

    return pending, arena


class Rig:
    """A sink with its store and something to write."""

    def __init__(self, folder, files=None, rule=None, **policy):
        model = make_model("batch norm")
        with small_pieces(chunk_bytes=256):
            self.layout = snapshot_layout(track(model), (6.94, 16.97), (0.1, 0.05), torch.float32)
        self.pending, self.arena = pending_snapshot(model, self.layout)
        self.store = SnapshotStore(folder, files=files)
        self.sink = BackgroundSink(
            Keeper(self.store, rule or KeepAll()),
            self.layout,
            WritePolicy(**{"wait_timeout": TIMEOUT_SECONDS, **policy}),
            pin=False,
        )

    def take(self, step):
        return self.sink.take(self.pending(step), lambda device: InlineLane())


@pytest.fixture
def rig(tmp_path):
    made = []

    def make(**options):
        made.append(Rig(tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.sink.close(TIMEOUT_SECONDS)
    assert background_threads() == []


def test_a_snapshot_is_on_disk_after_flush(rig):
    rig = rig()
    assert rig.take(3)
    rig.sink.flush(TIMEOUT_SECONDS)
    assert [snapshot.step for snapshot in rig.store.snapshots()] == [3]
    assert rig.store.verify() == []
    stats = rig.sink.stats()
    assert (stats.snapshots, stats.pending, stats.failed) == (1, 0, 0)
    assert stats.bytes_written == rig.store.get(3).bytes


def test_failed_write_is_raised_once_at_the_next_call(rig):
    files = FaultyFiles()
    rig = rig(files=files)
    files.broken = True
    rig.take(3)
    rig.sink.flush(TIMEOUT_SECONDS)
    with pytest.raises(SnapshotWriteError, match="step-000000000003") as told:
        rig.sink.raise_failures()
    assert told.value.step == 3
    assert isinstance(told.value.__cause__, OSError)
    rig.sink.raise_failures()  # once
    assert "No space left" in rig.sink.stats().last_error


def test_several_failures_are_told_together(rig):
    files = FaultyFiles()
    rig = rig(files=files)
    files.broken = True
    for step in (3, 4):
        rig.take(step)
    rig.sink.flush(TIMEOUT_SECONDS)
    with pytest.raises(SnapshotWriteError, match=r"(?s)step-00000000000[34].*Also.*step-00000000000[34]"):
        rig.sink.raise_failures()
    rig.sink.raise_failures()


def test_failed_write_warns_where_that_is_asked_for(rig):
    files = FaultyFiles()
    rig = rig(files=files, on_error="warn")
    files.broken = True
    rig.take(3)
    rig.sink.flush(TIMEOUT_SECONDS)
    with pytest.warns(NitrousWarning, match="Training goes on without this snapshot"):
        rig.sink.raise_failures()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rig.sink.raise_failures()


def test_failed_write_gives_its_slot_back(rig):
    files = FaultyFiles()
    rig = rig(files=files, max_pending=2)
    files.broken = True
    for step in range(1, 21):
        assert rig.take(step)  # would wait for ever if one slot were lost each time
    rig.sink.flush(TIMEOUT_SECONDS)
    assert rig.sink.stats().failed == 20
    with pytest.raises(SnapshotWriteError):
        rig.sink.raise_failures()
    files.broken = False
    assert rig.take(21)
    rig.sink.flush(TIMEOUT_SECONDS)
    assert [snapshot.step for snapshot in rig.store.snapshots()] == [21]


def test_an_error_of_ours_is_told_as_well_and_gives_its_slot_back(rig, monkeypatch):
    rig = rig(max_pending=1)
    monkeypatch.setattr(rig.store, "write", lambda *_: 1 / 0)
    for step in range(1, 6):
        rig.take(step)
        rig.sink.flush(TIMEOUT_SECONDS)
        with pytest.raises(SnapshotWriteError, match=f"step {step} was not written: ZeroDivisionError") as told:
            rig.sink.raise_failures()
        assert isinstance(told.value.__cause__, ZeroDivisionError)


def test_a_lane_that_cannot_stage_gives_the_slot_back(rig):
    class BrokenLane(InlineLane):
        def mark(self):
            raise RuntimeError("no events left")

    rig = rig(max_pending=1)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no events left"):
            rig.sink.take(rig.pending(1), lambda device: BrokenLane())
    assert rig.sink.stats().pending == 0
    assert rig.take(1)


def test_a_snapshot_that_cannot_be_staged_holds_no_later_one_up(rig):
    """Under a rule each waits for those taken before it."""

    class BrokenLane(InlineLane):
        def copy_out(self, work, abandon):
            abandon()

    rig = rig(max_pending=2, rule=KeepCount(2))
    rig.sink.take(rig.pending(1), lambda device: BrokenLane())
    for step in (2, 3, 4):
        rig.take(step)
    rig.sink.flush(TIMEOUT_SECONDS)
    assert len(rig.store.snapshots()) == 2


def test_what_could_not_be_dropped_is_told_and_no_failure(rig, monkeypatch):
    rig = rig(rule=KeepCount(2))
    monkeypatch.setattr(rig.store, "hide", lambda *_: 1 / 0)
    for step in (1, 2, 3):
        rig.take(step)
    rig.sink.flush(TIMEOUT_SECONDS)
    with pytest.warns(NitrousWarning, match="ZeroDivisionError.*Training goes on"):
        rig.sink.raise_failures()
    assert rig.sink.stats().failed == 0
    assert len(rig.store.snapshots()) == 3


def test_full_queue_waits_no_longer_than_asked(rig):
    files = StalledFiles()
    rig = rig(files=files, max_pending=1, wait_timeout=0.05)
    rig.take(1)
    files.gate.wait_entered()
    with pytest.raises(TimeoutError, match=r"snapshot of step 2: all 1 slots .*wait_timeout"):
        rig.take(2)
    assert rig.sink.stats().seconds_waited >= 0.05
    files.gate.open()
    rig.sink.flush(TIMEOUT_SECONDS)
    assert rig.take(3)


def test_full_queue_waits_until_a_slot_is_free(rig):
    files = StalledFiles()
    rig = rig(files=files, max_pending=1)
    rig.take(1)
    files.gate.wait_entered()
    with ThreadPoolExecutor(1) as trainer:
        taken = trainer.submit(rig.take, 2)
        assert not taken.done()
        files.gate.open()
        assert taken.result(TIMEOUT_SECONDS)
    rig.sink.flush(TIMEOUT_SECONDS)
    assert [snapshot.step for snapshot in rig.store.snapshots()] == [1, 2]


def test_full_queue_skips_where_that_is_asked_for(rig):
    files = StalledFiles()
    rig = rig(files=files, max_pending=1, on_full="skip")
    rig.take(1)
    files.gate.wait_entered()
    assert rig.take(2) is False
    assert rig.sink.stats().skipped == 1
    files.gate.open()


def test_full_queue_raises_where_that_is_asked_for(rig):
    files = StalledFiles()
    rig = rig(files=files, max_pending=1, on_full="raise")
    rig.take(1)
    files.gate.wait_entered()
    with pytest.raises(NitrousError, match="snapshot of step 2: all 1 slots"):
        rig.take(2)
    files.gate.open()


def test_flush_gives_up_in_time_and_names_the_steps(rig):
    files = StalledFiles()
    rig = rig(files=files)
    rig.take(4)
    files.gate.wait_entered()
    with pytest.raises(TimeoutError, match=r"steps \[4\]"):
        rig.sink.flush(0.01)
    files.gate.open()
    rig.sink.flush(TIMEOUT_SECONDS)
    assert [snapshot.step for snapshot in rig.store.snapshots()] == [4]


def test_closing_says_what_it_left_and_ends(rig, caplog):
    files = StalledFiles()
    rig = rig(files=files)
    rig.take(4)
    files.gate.wait_entered()
    rig.sink.close(0.01)
    assert "steps [4] are not on disk" in caplog.text
    files.gate.open()
    rig.sink.flush(TIMEOUT_SECONDS)


def test_writer_waits_for_each_chunk_before_it_reads_it(rig):
    """Each page is filled only when its mark is waited for: a device that is as late as it may be."""
    rig = rig()
    filled = []

    class LateMark:
        def __init__(self, fill):
            self.fill = fill

        def record(self):
            pass

        def order(self):
            pass

        def wait(self):
            self.fill()

    class LateLane(InlineLane):
        def __init__(self):
            self.marks = 0

        def copy_out(self, work, abandon):
            slot = work.args[0]
            for page in slot.pages:
                page.fill_(0xFF)  # what was there before
            pages = enumerate(slot.pages)

            def fill_next():
                index, page = next(pages)
                filled.append(index)
                writer.stage_chunk(rig.arena, index, page, non_blocking=False)

            for marks in slot.marks.values():
                for mark in marks:
                    mark.fill = fill_next
            rig.sink._pool.filled(slot)
            rig.sink._sealed.put(slot)

        def mark(self):
            return LateMark(None)

    lane = LateLane()
    assert rig.sink.take(rig.pending(5), lambda device: lane)
    rig.sink.flush(TIMEOUT_SECONDS)
    rig.sink.raise_failures()
    assert filled == list(range(len(rig.layout.chunks)))
    snapshot = rig.store.get(5)
    data = snapshot.paths[0].read_bytes()[snapshot.data_begin :]
    rig.take(6)
    rig.sink.flush(TIMEOUT_SECONDS)
    other = rig.store.get(6)
    assert data == other.paths[0].read_bytes()[other.data_begin :]


def test_pageable_memory_is_told_where_there_is_no_pinned(rig, monkeypatch):
    def no_pinned(layout, num_slots, pin):
        if pin:
            raise RuntimeError("out of pinned memory")
        return SlotPool(layout, num_slots, pin=False)

    monkeypatch.setattr(writer, "SlotPool", no_pinned)
    with pytest.warns(NitrousWarning, match=r"No pinned host memory for 2 snapshots .*out of pinned memory"):
        writer._make_pool(rig().layout, 2, pin=True)


@pytest.mark.parametrize(("cgroup", "named"), [(None, "are available"), (Path("/groups/a"), "control group /groups/a")])
def test_slots_beyond_the_available_memory_are_refused_with_who_limits_it(rig, monkeypatch, cgroup, named):
    layout = rig().layout
    available = AvailableMemory(2 * layout.data_bytes, cgroup)
    monkeypatch.setattr(writer, "available_memory", lambda: available)
    writer._make_pool(layout, 2, pin=False)
    with pytest.raises(NitrousError, match=rf"for 3 snapshots.*{named}.*Lower max_pending.*checkpoint_dtype"):
        writer._make_pool(layout, 3, pin=False)


def test_no_host_memory_at_all_is_one_clear_error(rig, monkeypatch):
    layout = rig().layout

    def none(layout, num_slots, pin):
        raise MemoryError("none left")

    monkeypatch.setattr(writer, "SlotPool", none)
    with pytest.raises(NitrousError, match=r"Lower max_pending"):
        writer._make_pool(layout, 2, pin=False)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_pending", 0),
        ("max_pending", 1.5),
        ("num_writers", 0),
        ("wait_timeout", 0),
        ("wait_timeout", float("nan")),
        ("on_full", "drop"),
        ("on_error", "ignore"),
    ],
)
def test_an_argument_outside_its_range_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value!r}"):
        WritePolicy(**{argument: value})


def test_a_lost_snapshot_may_be_taken_again(rig):
    files = FaultyFiles()
    rig = rig(files=files)
    files.broken = True
    rig.take(3)
    rig.sink.flush(TIMEOUT_SECONDS)
    with pytest.raises(SnapshotWriteError):
        rig.sink.raise_failures()
    assert rig.sink.has_lost(3)
    files.broken = False
    rig.take(3)
    assert not rig.sink.has_lost(3)
    rig.sink.flush(TIMEOUT_SECONDS)
    assert rig.store.get(3).step == 3
