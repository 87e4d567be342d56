from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nitrous_ema.arena import snapshot_layout
from nitrous_ema.async_.staging import SlotPool, SlotState, deadline_after, order_writes
from nitrous_ema.async_.writer import BackgroundSink, WritePolicy
from nitrous_ema.keeping import Keeper
from nitrous_ema.pipeline import InlineLane
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.tracked import track
from tests.fakes import TIMEOUT_SECONDS, Gate, StalledFiles, make_model, small_pieces
from tests.test_writer import pending_snapshot

CPU = torch.device("cpu")


@pytest.fixture
def layout():
    with small_pieces(chunk_bytes=256):
        return snapshot_layout(track(make_model("batch norm")), (6.94, 16.97), (0.1, 0.05), torch.float32)


@pytest.fixture
def pool(layout):
    return SlotPool(layout, 2, pin=False)


class CountingMark:
    """A mark that is reached when its gate is opened, and remembers who asked."""

    def __init__(self, name="", log=None):
        self.name, self.log, self.gate = name, log if log is not None else [], Gate()

    def record(self):
        self.log.append(("record", self.name))

    def order(self):
        self.log.append(("order", self.name))

    def wait(self):
        self.log.append(("wait", self.name))
        self.gate.pass_through()


def test_a_slot_has_a_page_for_each_chunk(pool, layout):
    slot = pool.claim(0)
    assert [page.numel() for page in slot.pages] == [end - begin for begin, end in layout.chunks]


def test_a_claimed_slot_is_nobody_elses(pool):
    first, second = pool.claim(0), pool.claim(0)
    assert first is not second
    assert pool.claim(0) is None
    assert pool.num_busy() == 2


def test_slot_in_the_wrong_state_is_named_as_a_bug(pool):
    slot = pool.claim(0)
    with pytest.raises(RuntimeError, match="filling, not sealed: this is a bug"):
        pool.release(slot)
    pool.expect(slot, None, {CPU: []})
    assert pool.filled(slot)
    with pytest.raises(RuntimeError, match="sealed, not filling: this is a bug"):
        pool.filled(slot)
    pool.release(slot)
    with pytest.raises(RuntimeError, match="free, not sealed: this is a bug"):
        pool.release(slot)


def test_slot_is_sealed_when_every_device_has_queued_its_copies(pool):
    slot = pool.claim(0)
    pool.expect(slot, None, {CPU: [], torch.device("cuda:0"): []})
    assert not pool.filled(slot)
    assert slot.state is SlotState.FILLING
    assert pool.filled(slot)
    assert slot.state is SlotState.SEALED


def test_a_snapshot_that_cannot_be_staged_gives_its_slot_back_once(pool):
    slot = pool.claim(0)
    assert pool.abandon(slot)
    assert not pool.abandon(slot)
    assert pool.num_busy() == 0
    again = pool.claim(0)
    pool.expect(again, None, {CPU: []})
    pool.filled(again)
    assert not pool.abandon(again)  # sealed: the writer's now
    assert again.state is SlotState.SEALED


def test_slot_stays_taken_until_its_file_is_committed(layout, tmp_path):
    files = StalledFiles()
    sink = BackgroundSink(Keeper(SnapshotStore(tmp_path, files=files)), layout, WritePolicy(max_pending=1), pin=False)
    pool = sink._pool
    pending, _ = pending_snapshot(make_model("batch norm"), layout)
    assert sink.take(pending(1), lambda device: InlineLane())
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


def test_waiting_for_idle_names_the_steps_that_are_on_their_way(pool, layout):
    pending, _ = pending_snapshot(make_model("batch norm"), layout)
    slots = [pool.claim(0), pool.claim(0)]
    for slot, step in zip(slots, (7, 9), strict=True):
        pool.expect(slot, pending(step), {CPU: []})
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


def test_slots_are_read_from_until_their_copies_have_finished(pool):
    slot = pool.claim(0)
    pool.expect(slot, None, {CPU: []})
    assert pool.reading(CPU) == [slot]
    assert pool.reading(torch.device("cuda:0")) == []
    slot.is_copied = True
    assert pool.reading(CPU) == []


def test_write_waits_for_the_copy_of_its_chunks_only(layout):
    log = []
    marks = [[CountingMark((slot, chunk), log) for chunk in range(len(layout.chunks))] for slot in range(2)]
    order = order_writes(layout, marks)
    for chunk, (begin, end) in enumerate(layout.chunks):
        log.clear()
        order(begin, end)
        assert sorted(name for _, name in log) == [(0, chunk), (1, chunk)]
    log.clear()
    order(layout.chunks[1].end - 1, layout.chunks[3].begin + 1)
    assert sorted({chunk for _, (_, chunk) in log}) == [1, 2, 3]


def test_a_deadline_is_what_is_left_of_a_timeout():
    assert deadline_after(None)() is None
    assert 0 < deadline_after(100)() <= 100
    assert deadline_after(0)() == 0
