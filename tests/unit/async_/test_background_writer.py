from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from nitrous_ema.async_ import staging
from nitrous_ema.async_.background_writer import BackgroundSnapshotSink
from nitrous_ema.averaging.config import AsyncEMAConfig
from nitrous_ema.averaging.execution.device_to_host import ChunkCopier
from nitrous_ema.averaging.execution.inline import InlineLane
from nitrous_ema.averaging.kernels.flat_buffers import snapshot_layout
from nitrous_ema.averaging.model.tracking import track
from nitrous_ema.errors import NitrousError, NitrousWarning, SnapshotWriteError
from nitrous_ema.posthoc.keep_rules import KeepAll, KeepCount
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.fakes import TIMEOUT_SECONDS, FaultyFiles, StalledFiles, background_threads, make_model, small_pieces
from tests.support.models import Vector
from tests.support.pending_snapshots import pending_snapshot


class Rig:
    """A sink, its store, and averages to write."""

    def __init__(self, folder, files=None, rule=None, **policy):
        model = make_model("batch norm")
        with small_pieces(chunk_bytes=256):
            self.layout = snapshot_layout(track(model), (6.94, 16.97), (0.1, 0.05), torch.float32)
        self.pending, self.flat_buffers = pending_snapshot(model, self.layout)
        self.store = SnapshotStore(folder, files=files)
        self.sink = BackgroundSnapshotSink(
            RetainingWriter(self.store, rule or KeepAll()),
            self.layout,
            AsyncEMAConfig(**{"wait_timeout": TIMEOUT_SECONDS, **policy}),
            pin=False,
        )

    def take(self, step):
        return self.sink.take_snapshot(self.pending(step), lambda device: InlineLane())


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
    with pytest.raises(SnapshotWriteError, match="step-000000000003") as caught:
        rig.sink.raise_failures()
    assert caught.value.step == 3
    assert isinstance(caught.value.__cause__, OSError)
    rig.sink.raise_failures()  # once
    assert "No space left" in rig.sink.stats().last_error


def test_several_failures_are_raised_together(rig):
    files = FaultyFiles()
    rig = rig(files=files)
    files.broken = True
    for step in (3, 4):
        rig.take(step)
    rig.sink.flush(TIMEOUT_SECONDS)
    with pytest.raises(SnapshotWriteError, match=r"(?s)step-00000000000[34].*Also.*step-00000000000[34]"):
        rig.sink.raise_failures()
    rig.sink.raise_failures()


def test_failed_write_warns_with_on_error_warn(rig):
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


def test_an_unexpected_error_is_raised_as_well_and_frees_its_slot(rig, monkeypatch):
    rig = rig(max_pending=1)
    monkeypatch.setattr(rig.store, "write", lambda *_: 1 / 0)
    for step in range(1, 6):
        rig.take(step)
        rig.sink.flush(TIMEOUT_SECONDS)
        with pytest.raises(SnapshotWriteError, match=f"step {step} was not written: ZeroDivisionError") as caught:
            rig.sink.raise_failures()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_lane_that_cannot_stage_frees_the_slot(rig):
    class BrokenLane(InlineLane):
        def mark(self):
            raise RuntimeError("no events left")

    rig = rig(max_pending=1)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no events left"):
            rig.sink.take_snapshot(rig.pending(1), lambda device: BrokenLane())
    assert rig.sink.stats().pending == 0
    assert rig.take(1)


def test_a_snapshot_that_cannot_be_staged_holds_up_no_later_snapshot(rig):
    """Under a retention rule each snapshot waits for the snapshots taken before it."""

    class BrokenLane(InlineLane):
        def enqueue_read(self, work, abandon):
            abandon()

    rig = rig(max_pending=2, rule=KeepCount(2))
    rig.sink.take_snapshot(rig.pending(1), lambda device: BrokenLane())
    for step in (2, 3, 4):
        rig.take(step)
    rig.sink.flush(TIMEOUT_SECONDS)
    assert len(rig.store.snapshots()) == 2


def test_files_that_could_not_be_dropped_cause_a_warning_and_no_failure(rig, monkeypatch):
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


def test_full_queue_skips_with_on_full_skip(rig):
    files = StalledFiles()
    rig = rig(files=files, max_pending=1, on_full="skip")
    rig.take(1)
    files.gate.wait_entered()
    assert rig.take(2) is False
    assert rig.sink.stats().skipped == 1
    files.gate.open()


def test_full_queue_raises_with_on_full_raise(rig):
    files = StalledFiles()
    rig = rig(files=files, max_pending=1, on_full="raise")
    rig.take(1)
    files.gate.wait_entered()
    with pytest.raises(NitrousError, match="snapshot of step 2: all 1 slots"):
        rig.take(2)
    files.gate.open()


def test_flush_times_out_and_names_the_steps(rig):
    files = StalledFiles()
    rig = rig(files=files)
    rig.take(4)
    files.gate.wait_entered()
    with pytest.raises(TimeoutError, match=r"steps \[4\]"):
        rig.sink.flush(0.01)
    files.gate.open()
    rig.sink.flush(TIMEOUT_SECONDS)
    assert [snapshot.step for snapshot in rig.store.snapshots()] == [4]


def test_closing_logs_unwritten_snapshots_and_ends(rig, caplog):
    files = StalledFiles()
    rig = rig(files=files)
    rig.take(4)
    files.gate.wait_entered()
    rig.sink.close(0.01)
    assert "timeout at close: snapshots of steps [4] are not on disk" in caplog.text
    files.gate.open()
    rig.sink.flush(TIMEOUT_SECONDS)


class LateLane(InlineLane):
    """Fills each page only when its mark is waited for: a device that is as late as allowed."""

    def __init__(self):
        self.marks = []

    def mark(self):
        self.marks.append(LateMark())
        return self.marks[-1]


class LateMark:
    """Recording does nothing; ``wait_on_host`` makes the copies that were queued before the mark."""

    def __init__(self):
        self.fill = lambda: None

    def record(self):
        pass

    def wait_on_device(self):
        pass

    def wait_on_host(self):
        self.fill()

    def is_reached(self):
        return False


def make_late(monkeypatch, lane):
    """Fill pages with ones, as in a poisoned slot, until their marks are waited for. Returns a list of filled pages."""
    copy, filled, queued = ChunkCopier.copy, [], []

    def copy_late(self, flat_buffers, span, page, *, non_blocking):
        page.fill_(0xFF)
        queued.append((span, partial(copy, self, flat_buffers, span, page, non_blocking=non_blocking)))
        if len(queued) == len(lane.marks):
            for mark, (of_page, fill) in zip(lane.marks, queued, strict=True):
                mark.fill = partial(_filled, filled, of_page, fill)

    monkeypatch.setattr(ChunkCopier, "copy", copy_late)
    return filled


def _filled(filled, span, fill):
    filled.append(span)
    fill()


def snapshot_data(snapshot):
    return snapshot.paths[0].read_bytes()[snapshot.data_begin :]


def test_writer_waits_for_each_page_before_it_reads_it(rig, monkeypatch):
    rig, lane = rig(max_pending=1), LateLane()
    rig.take(5)
    rig.sink.flush(TIMEOUT_SECONDS)
    rig.sink._pool._slots[0].marks.clear()  # marks of another lane are to be made
    filled = make_late(monkeypatch, lane)
    assert rig.sink.take_snapshot(rig.pending(6), lambda device: lane)
    rig.sink.flush(TIMEOUT_SECONDS)
    rig.sink.raise_failures()
    assert filled[: len(rig.layout.chunks)] == list(rig.layout.chunks)
    assert snapshot_data(rig.store.get(6)) == snapshot_data(rig.store.get(5))


def test_page_that_is_read_too_early_is_detected(rig, monkeypatch):
    """Without the wait the data of the test above differs, so that test can fail."""
    rig, lane = rig(), LateLane()
    make_late(monkeypatch, lane)
    monkeypatch.setattr(LateMark, "wait_on_host", lambda self: None)
    rig.sink.take_snapshot(rig.pending(5), lambda device: lane)
    rig.sink.flush(TIMEOUT_SECONDS)
    assert set(snapshot_data(rig.store.get(5))) == {0xFF}


def test_copy_engine_is_yielded_after_each_page_and_after_its_mark(rig, monkeypatch):
    """A mark behind the kernel that lets other copies through would be as late as that kernel."""
    calls = []
    monkeypatch.setattr(ChunkCopier, "copy", lambda *_, **__: calls.append("copy"))
    monkeypatch.setattr(ChunkCopier, "yield_copy_engine", lambda _: calls.append("yield"))
    monkeypatch.setattr(LateMark, "record", lambda _: calls.append("record"))
    rig, lane = rig(), LateLane()
    rig.sink.take_snapshot(rig.pending(1), lambda device: lane)
    rig.sink.flush(TIMEOUT_SECONDS)
    assert calls == ["copy", "record", "yield"] * len(rig.layout.chunks)


def test_pinned_slots_make_the_same_file(tmp_path, monkeypatch):
    """Pages of pinned slots are not the layout's chunks. Pinning itself needs a device, and plays no part here."""
    monkeypatch.setattr(staging, "_page", lambda size_bytes, pin: torch.full((size_bytes,), 0xFF, dtype=torch.uint8))
    model = Vector(7000)
    with small_pieces(chunk_bytes=2**14):
        layout = snapshot_layout(track(model), (6.94, 16.97), (0.1, 0.05), torch.float32)
    pending, _ = pending_snapshot(model, layout)
    found = []
    for pin in (False, True):
        (tmp_path / str(pin)).mkdir()
        store = SnapshotStore(tmp_path / str(pin))
        sink = BackgroundSnapshotSink(RetainingWriter(store), layout, AsyncEMAConfig(), pin)
        sink.take_snapshot(pending(1), lambda device: InlineLane())
        sink.close(TIMEOUT_SECONDS)
        assert store.verify() == []
        found.append((snapshot_data(store.get(1)), store.get(1).headers[0].crc32, len(sink._pool.spans)))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] < found[1][2]


def test_model_that_moves_to_an_accelerator_later_causes_one_warning_that_copies_block(rig):
    class NoLane(InlineLane):
        def enqueue_read(self, work, abandon):
            abandon()

    rig = rig()
    rig.flat_buffers.groups[0].device = torch.device("cuda:0")  # pretended
    with pytest.warns(NitrousWarning, match=r"on cuda:0 now, but .*not pinned.*after moving the model"):
        rig.sink.take_snapshot(rig.pending(1), lambda device: NoLane())
    rig.sink.take_snapshot(rig.pending(2), lambda device: NoLane())


def test_averages_on_the_cpu_have_no_copies_to_wait_for(rig):
    """The CPU's lane runs all work in order, so no readback is in the way, not even one that has not begun."""

    class LaterLane(InlineLane):
        def enqueue_read(self, work, abandon):
            self.work = work

    rig, lane = rig(), LaterLane()
    rig.sink.take_snapshot(rig.pending(1), lambda device: lane)
    assert rig.sink.readbacks_in_flight(torch.device("cpu")) is None
    lane.work()
    rig.sink.flush(TIMEOUT_SECONDS)


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
