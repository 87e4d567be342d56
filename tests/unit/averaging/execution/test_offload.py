"""Averaging in host memory, on steps and lanes that only log their calls, and on real lanes."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from nitrous_ema.async_.lanes import ThreadLane
from nitrous_ema.averaging.execution import offload
from nitrous_ema.averaging.execution.offload import Offload
from tests.support.fakes import TIMEOUT_SECONDS, Gate, GatedLane
from tests.support.noting import BATCHES, NotingLane, NotingStep


class SourceLane(NotingLane):
    """A lane whose marks are gates: a copy has arrived when the test opens its gate."""

    def mark(self):
        self.marks.append(GateMark(self.log))
        return self.marks[-1]


class GateMark:
    """A mark that is reached when its gate is open."""

    def __init__(self, log):
        self.log = log
        self.gate = Gate()

    def record(self):
        self.log.append("copied")

    def wait_on_host(self):
        self.gate.pass_through()


@pytest.fixture(autouse=True)
def no_pinned_memory(monkeypatch):
    """Pinned memory does not exist without an accelerator."""
    monkeypatch.setattr(offload, "_piece", lambda num_bytes, pin: torch.empty(num_bytes, dtype=torch.uint8))


@pytest.fixture
def host():
    lane = ThreadLane()
    yield lane
    lane.close(TIMEOUT_SECONDS)


def test_batch_is_averaged_after_it_has_come(host):
    log = []
    source = SourceLane(log)
    Offload(NotingStep(log), source, host).enqueue_update("a", (0.5,))
    queued = ["stash a0", "copied", "stash a1", "copied", "stash a2", "copied"]
    for batch, mark in enumerate(source.marks[:BATCHES]):
        mark.gate.wait_entered()
        assert log == queued + [f"average stashed a{before}" for before in range(batch)]
        mark.gate.open()
    host.drain(TIMEOUT_SECONDS)
    assert log[-1] == "average stashed a2"


def test_set_is_not_filled_while_it_is_averaged():
    log, gate = [], Gate()
    host = GatedLane(run=gate)
    offloaded = Offload(NotingStep(log), NotingLane(log), host)
    for name in "ab":
        offloaded.enqueue_update(name, (0.5,))
    assert offloaded.num_held_up == 0
    third = threading.Thread(target=partial(offloaded.enqueue_update, "c", (0.5,)))
    third.start()
    gate.wait_entered()
    assert "stash c0" not in log
    gate.open()
    third.join(TIMEOUT_SECONDS)
    host.close(TIMEOUT_SECONDS)
    assert offloaded.num_held_up == 1
    assert [entry for entry in log if entry.startswith("average")] == [
        f"average stashed {name}{batch}" for name in "abc" for batch in range(BATCHES)
    ]


def test_failed_lane_gives_its_set_back(host):
    class Failing(NotingStep):
        def run_stashed(self, stashed, weights, allowed=None):
            raise ArithmeticError("simulated")

    log = []
    offloaded = Offload(Failing(log), NotingLane(log), host)
    for name in "abc":
        offloaded.enqueue_update(name, (0.5,))
    host.drain(TIMEOUT_SECONDS)
    assert isinstance(host.take_error(), ArithmeticError)
    assert offloaded._free.qsize() == 2


def test_copies_that_cannot_be_queued_give_their_set_back(host):
    class Failing(NotingStep):
        def stash(self, sources, batch, memory):
            raise ArithmeticError("simulated")

    offloaded = Offload(Failing([]), NotingLane([]), host)
    with pytest.raises(ArithmeticError):
        offloaded.enqueue_update("a", (0.5,))
    assert offloaded._free.qsize() == 2


def test_optimizer_does_not_wait_for_the_averaging():
    gate = Gate()
    host, source = GatedLane(run=gate), NotingLane([])
    Offload(NotingStep([]), source, host).enqueue_update("a", (0.5,))
    host.order_writer()  # returns, although nothing is averaged
    assert source.reads == [True]
    gate.open()
    host.close(TIMEOUT_SECONDS)


def test_blocks_fill_pieces_of_powers_of_two_without_overlap():
    sizes = [4096] * 5 + [4112] * 20 + [16, 1 << 20, 48]
    pieces, places = offload._pack(sizes)
    assert all(piece & (piece - 1) == 0 for piece in pieces)
    ends = {}
    for (piece, begin), size in zip(places, sizes, strict=True):
        assert begin >= ends.get(piece, 0)
        assert begin + size <= pieces[piece]
        ends[piece] = begin + size


def test_pieces_of_a_large_model_waste_little():
    sizes = [1 << 22] * 700 + [(1 << 22) + 64] * 7 + [12345 * 16]
    pieces, _ = offload._pack(sizes)
    assert sum(pieces) < 1.02 * sum(sizes)
