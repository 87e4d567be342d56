from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from nitrous_ema.async_ import staging
from nitrous_ema.async_.background_writer import BackgroundSnapshotSink
from nitrous_ema.async_.staging import SlotPool, SlotReadbacks, SlotState, StagingCopies, page_spans
from nitrous_ema.averaging.config import AsyncEMAConfig
from nitrous_ema.averaging.execution.inline import InlineLane
from nitrous_ema.averaging.kernels.flat_buffers import snapshot_layout
from nitrous_ema.averaging.model.tracking import track
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.fakes import TIMEOUT_SECONDS, FaultyFiles, Gate, StalledFiles, make_model, small_pieces
from tests.support.models import Vector
from tests.support.pending_snapshots import pending_snapshot

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def layout():
    with small_pieces(chunk_bytes=256):
        return snapshot_layout(track(make_model("batch norm")), (6.94, 16.97), (0.1, 0.05), torch.float32)


@pytest.fixture
def pool(layout):
    return SlotPool(layout, 2, pin=False)


class LoggedMark:
    """A mark that is reached when its gate is opened after it was recorded; logs its calls."""

    def __init__(self, name="", log=None):
        self.name, self.log, self.gate = name, log if log is not None else [], Gate(is_open=True)

    def record(self):
        self.log.append(("record", self.name))
        self.gate.shut()

    def wait_on_device(self):
        self.log.append(("order", self.name))

    def wait_on_host(self):
        self.log.append(("wait", self.name))
        self.gate.pass_through()

    def is_reached(self):
        self.log.append(("query", self.name))
        return self.gate.is_open()


def logged_copies(num_pages, slot=0, log=None):
    """Return readbacks that are all queued, and their marks."""
    marks = [LoggedMark((slot, page), log) for page in range(num_pages)]
    copies = StagingCopies(marks)
    for _ in marks:
        copies.record()
    return copies, marks


def test_a_slot_has_a_page_for_each_chunk(pool, layout):
    slot = pool.claim(0)
    assert [page.numel() for page in slot.pages] == [end - begin for begin, end in layout.chunks]
    assert pool.spans == layout.chunks


@pytest.mark.parametrize("pin", [False, True])
def test_slots_of_another_layout_keep_the_pages_of_the_averages(layout, pin, monkeypatch):
    monkeypatch.setattr(staging, "_page", lambda size_bytes, pin: torch.zeros(size_bytes, dtype=torch.uint8))
    pool = SlotPool(layout, 2, pin=pin)
    before = list(pool.claim(0).pages)
    larger = resized(layout, (1000,))
    with pytest.raises(RuntimeError, match="a slot is filling, not free"):
        pool.resize(larger)
    pool.abandon(pool._slots[0])
    pool.resize(larger)
    slot = pool.claim(0)
    assert pool.spans == page_spans(larger, pin)
    assert [page.numel() for page in slot.pages] == [end - begin for begin, end in pool.spans]
    of_averages = [span for span in pool.spans if span.end <= larger.sections[1].end]
    assert all(new is old for new, old, _ in zip(slot.pages, before, of_averages, strict=False))
    pool.abandon(slot)
    pool.resize(layout)
    assert [page.numel() for page in pool.claim(0).pages] == [page.numel() for page in before]


def resized(layout, shape):
    """Return the layout with another shape of its first copied tensor."""
    first = layout.copied[0].name
    return replace(
        layout, records=tuple(replace(each, shape=shape) if each.name == first else each for each in layout.records)
    )


@pytest.mark.parametrize("numbers", [1, 1024, 1025, 3 * 2**18, 2**20 + 5, 2**22 + 2**13 + 77])
def test_pinned_slots_take_what_the_file_takes_to_a_page_per_section(monkeypatch, numbers):
    taken = []

    def rounded_up(size_bytes, pin):  # as torch's allocator of pinned memory rounds
        assert pin
        taken.append(1 << (size_bytes - 1).bit_length())
        return torch.empty(size_bytes, dtype=torch.uint8)

    monkeypatch.setattr(staging, "_page", rounded_up)
    with small_pieces(chunk_bytes=2**20):
        layout = snapshot_layout(track(Vector(numbers)), (6.94, 16.97), (0.1, 0.05), torch.float32)
    pool = SlotPool(layout, 3, pin=True)
    assert taken.pop(0) == 32  # the slots' counts of skipped updates
    in_pages = sum(-(-(end - begin) // 4096) * 4096 for begin, end in layout.sections)
    assert 3 * layout.data_bytes <= sum(taken) <= 3 * in_pages
    assert sum(taken) == 3 * layout.data_bytes or numbers * 4 % 4096
    assert len(taken) == 3 * len(pool.spans) <= 3 * len(layout.sections) * (layout.chunks[-1].end // 2**20 + 10)


@pytest.mark.parametrize("numbers", [1, 1024, 1025, 2**20 + 5])
def test_pages_cover_the_data_in_order_and_none_lies_across_two_chunks(numbers):
    with small_pieces(chunk_bytes=2**16):
        layout = snapshot_layout(track(Vector(numbers)), (6.94, 16.97), (0.1, 0.05), torch.float32)
    spans = page_spans(layout, pin=True)
    assert [span.begin for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == layout.data_bytes
    assert {chunk.end for chunk in layout.chunks} <= {span.end for span in spans}
    assert all(begin % 4 == 0 for begin, _ in spans)


def test_a_claimed_slot_is_not_claimed_twice(pool):
    first, second = pool.claim(0), pool.claim(0)
    assert first is not second
    assert pool.claim(0) is None
    assert pool.num_busy() == 2


def test_slot_in_the_wrong_state_is_named_as_a_bug(pool):
    slot = pool.claim(0)
    with pytest.raises(RuntimeError, match="filling, not sealed; this is a bug"):
        pool.release(slot)
    pool.assign(slot, None, {CPU: LoggedMark})
    assert pool.filled(slot, None)
    with pytest.raises(RuntimeError, match="sealed, not filling; this is a bug"):
        pool.filled(slot, None)
    pool.release(slot)
    with pytest.raises(RuntimeError, match="free, not sealed; this is a bug"):
        pool.release(slot)


def test_slot_is_sealed_when_every_device_has_queued_its_copies(pool):
    slot = pool.claim(0)
    pool.assign(slot, None, {CPU: LoggedMark, CUDA: LoggedMark})
    assert not pool.filled(slot, None)
    assert slot.state is SlotState.FILLING
    assert pool.filled(slot, None)
    assert slot.state is SlotState.SEALED


def test_a_snapshot_that_cannot_be_staged_frees_its_slot_once(pool):
    slot = pool.claim(0)
    assert pool.abandon(slot)
    assert not pool.abandon(slot)
    assert pool.num_busy() == 0
    again = pool.claim(0)
    pool.assign(again, None, {CPU: LoggedMark})
    pool.filled(again, None)
    assert not pool.abandon(again)  # sealed, so the writer owns it
    assert again.state is SlotState.SEALED


def test_copies_of_an_abandoned_snapshot_seal_no_other(pool, layout):
    pending, _ = pending_snapshot(make_model("batch norm"), layout)
    abandoned, other = pending(1), pending(2)
    slot = pool.claim(0)
    pool.assign(slot, abandoned, {CPU: LoggedMark, CUDA: LoggedMark})
    assert not pool.filled(slot, abandoned)
    pool.abandon(slot)
    assert pool.claim(0) is slot
    pool.assign(slot, other, {CPU: LoggedMark})
    assert not pool.filled(slot, abandoned)  # the other device's readbacks are queued late
    assert slot.state is SlotState.FILLING
    assert pool.filled(slot, other)


def test_slot_stays_taken_until_its_file_is_committed(layout, tmp_path):
    files = StalledFiles()
    sink = BackgroundSnapshotSink(
        RetainingWriter(SnapshotStore(tmp_path, files=files)), layout, AsyncEMAConfig(max_pending=1), pin=False
    )
    pool = sink._pool
    pending, _ = pending_snapshot(make_model("batch norm"), layout)
    assert sink.take_snapshot(pending(1), lambda device: InlineLane())
    files.gate.wait_entered()
    assert pool.claim(0) is None
    with ThreadPoolExecutor(1) as other:
        claimed = other.submit(pool.claim, TIMEOUT_SECONDS)
        assert not claimed.done()
        files.gate.open()
        slot = claimed.result(TIMEOUT_SECONDS)
    assert SnapshotStore(tmp_path).get(1).step == 1
    pool.abandon(slot)
    sink.close(TIMEOUT_SECONDS)


def test_slot_is_not_free_before_its_copies_have_finished(layout, tmp_path):
    """Also where its file has failed at the first page."""

    class DeviceLane(InlineLane):
        def __init__(self):
            self.marks = []

        def mark(self):
            self.marks.append(LoggedMark())
            return self.marks[-1]

    files, lane = FaultyFiles(), DeviceLane()
    sink = BackgroundSnapshotSink(
        RetainingWriter(SnapshotStore(tmp_path, files=files)), layout, AsyncEMAConfig(max_pending=1), pin=False
    )
    files.broken = True
    pending, _ = pending_snapshot(make_model("batch norm"), layout)
    sink.take_snapshot(pending(1), lambda device: lane)
    lane.marks[0].gate.open()
    lane.marks[-1].gate.wait_entered()
    assert sink.stats().failed == 1
    assert sink._pool.claim(0) is None
    lane.marks[-1].gate.open()
    sink.flush(TIMEOUT_SECONDS)
    sink.close(TIMEOUT_SECONDS)


def test_waiting_for_idle_returns_the_steps_in_flight(pool, layout):
    pending, _ = pending_snapshot(make_model("batch norm"), layout)
    slots = [pool.claim(0), pool.claim(0)]
    for slot, step in zip(slots, (7, 9), strict=True):
        pool.assign(slot, pending(step), {CPU: LoggedMark})
    assert pool.wait_idle(0.01) == [7, 9]
    for slot in slots:
        pool.abandon(slot)
    assert pool.wait_idle(0) == []


def test_waiting_ends_as_soon_as_the_last_slot_is_free(pool):
    slot, idle = pool.claim(0), threading.Event()
    waiter = threading.Thread(target=lambda: (pool.wait_idle(TIMEOUT_SECONDS), idle.set()))
    waiter.start()
    assert not idle.is_set()
    pool.abandon(slot)
    assert idle.wait(TIMEOUT_SECONDS)
    waiter.join(TIMEOUT_SECONDS)


def claimed(pool, log, devices=(CUDA,)):
    """Return a slot whose readbacks are all queued, and its marks."""
    slot = pool.claim(0)
    pool.assign(slot, None, {device: partial(LoggedMark, "", log) for device in devices})
    for copies in slot.copies.values():
        for _ in slot.pages:
            copies.record()
    return slot, slot.marks


def test_copies_are_in_flight_until_the_last_one_has_finished(pool):
    slot, marks = claimed(pool, [])
    assert pool.readbacks_in_flight(CPU) is None
    for mark in marks[CUDA][:-1]:
        assert pool.readbacks_in_flight(CUDA) is not None
        mark.gate.open()
    assert pool.readbacks_in_flight(CUDA) is not None
    marks[CUDA][-1].gate.open()
    assert pool.readbacks_in_flight(CUDA) is None  # found by a query alone, and the file is not written
    assert slot.state is SlotState.FILLING


def test_copies_from_one_device_do_not_wait_for_those_from_another(pool):
    _, marks = claimed(pool, [], devices=(CUDA, torch.device("cuda:1")))
    for mark in marks[CUDA]:
        mark.gate.open()
    assert pool.readbacks_in_flight(CUDA) is None
    assert pool.readbacks_in_flight(torch.device("cuda:1")) is not None


def test_marks_are_made_once_and_recorded_again(pool):
    log = []
    slot, marks = claimed(pool, log)
    first = list(marks[CUDA])
    pool.abandon(slot)
    again, marks = claimed(pool, log)
    assert again is slot
    assert marks[CUDA] == first
    assert [kind for kind, _ in log].count("record") == 2 * len(slot.pages)


def test_copies_have_not_finished_before_they_are_queued():
    """A mark that is not recorded yet, or was recorded for the snapshot before, reports that it is reached."""
    copies = StagingCopies([LoggedMark(), LoggedMark()])
    assert not copies.have_finished(1)
    copies.record()
    assert not copies.have_finished(2)
    assert not copies.all_have_finished()


def test_copies_of_a_slot_that_was_left_stay_finished(pool):
    log = []
    slot, _ = claimed(pool, log)
    before = pool.readbacks_in_flight(CUDA)
    pool.abandon(slot)
    claimed(pool, log)  # the same marks, none of them reached
    log.clear()
    end = pool.spans[-1].end
    assert before.have_finished(0, end)
    before.wait_on_device(0, end)
    assert log == []
    assert not pool.readbacks_in_flight(CUDA).have_finished(0, end)


def test_write_waits_for_the_copies_of_its_range_only(layout):
    log = []
    chunks = layout.chunks
    numbers = [*range(0, len(chunks), 2), *range(1, len(chunks), 2)]
    flight = SlotReadbacks(
        [begin for begin, _ in chunks], numbers, [logged_copies(len(chunks), slot, log)[0] for slot in range(2)]
    )
    for number, (begin, end) in zip(numbers, chunks, strict=True):
        log.clear()
        flight.wait_on_device(begin, end)
        assert sorted(log) == [("order", (0, number)), ("order", (1, number))]
    log.clear()
    flight.wait_on_device(chunks[1].end - 1, chunks[3].begin + 1)
    assert {number for _, (_, number) in log} == {max(numbers[1:4])}  # readbacks finish in order


def test_a_range_is_free_when_all_slots_have_copied_it(layout):
    chunks = layout.chunks
    both = [logged_copies(len(chunks), slot) for slot in range(2)]
    flight = SlotReadbacks([begin for begin, _ in chunks], range(len(chunks)), [copies for copies, _ in both])
    for chunk, (begin, end) in enumerate(chunks):
        for _, marks in both:
            assert not flight.have_finished(begin, end)
            assert not flight.have_finished(end - 1, end)
            marks[chunk].gate.open()
        assert flight.have_finished(begin, end)
        assert flight.have_finished(0, end)


def test_finished_copies_are_not_queried_again():
    copies, marks = logged_copies(100, log=(log := []))
    for mark in marks[:50]:
        mark.gate.open()
    log.clear()
    assert copies.have_finished(50)
    assert log == [("query", (0, 49))]  # readbacks finish in order
    for last in range(51):
        assert copies.have_finished(last)
    copies.wait_on_device(50)
    assert log == [("query", (0, 49))]
    copies.wait_on_device(52)
    assert log[1:] == [("order", (0, 51))]


def test_readbacks_are_queued_range_by_range(pool, layout):
    first, second, copied = layout.sections
    begins = [pool.spans[page].begin for page in pool.order]
    places = [begin - max(section.begin for section in layout.sections if section.begin <= begin) for begin in begins]
    assert sorted(begins) == [span.begin for span in pool.spans]
    assert begins[:3] == [first.begin, second.begin, copied.begin]
    assert places == sorted(places)


def test_number_of_finished_readbacks_takes_one_query_where_none_has_finished():
    copies, marks = logged_copies(100, log=(log := []))
    log.clear()
    assert copies.num_finished() == 0
    assert len(log) == 1
    for finished in (1, 7, 60, 99, 100):
        for mark in marks[:finished]:
            mark.gate.open()
        log.clear()
        assert copies.num_finished() == finished
        assert len(log) < 20


def test_threads_that_query_at_once_get_right_answers():
    copies, marks = logged_copies(200)

    def query_all(_):
        answers = []
        for last in range(1, 201):
            reached = marks[last - 1].gate.is_open()
            answers.append((reached, copies.have_finished(last)))
        return answers

    with ThreadPoolExecutor(4) as pool:
        queried = pool.map(query_all, range(8), timeout=TIMEOUT_SECONDS)
        for mark in marks:
            mark.gate.open()
        answers = [answer for of_thread in queried for answer in of_thread]
    assert (True, False) not in answers  # a mark that was reached before the query
    assert copies.all_have_finished()
