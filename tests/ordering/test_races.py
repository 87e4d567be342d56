"""The real dispatcher, deferred updates, stash, lanes and slots under the race detector.

`test_on_laggy.py` tests the orders that its seeds draw. Each run here covers every legal order: no two accesses, one of
which writes, are without order. The seed draws the answers to the host's queries of events, and when writers run.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nitrous_ema.async_ import background_writer
from nitrous_ema.async_.lanes import AcceleratorLane
from nitrous_ema.async_.staging import SlotPool
from nitrous_ema.averaging.execution.device_to_host import ChunkCopier
from nitrous_ema.averaging.execution.dispatch import UpdateDispatcher
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, snapshot_layout
from nitrous_ema.averaging.model.tracking import TrackingPolicy, track
from tests.support.fakes import make_gradients, make_model, small_pieces
from tests.support.laggy.without import without
from tests.support.race_detector import Race
from tests.support.streams_under_detector import Streams, in_thread

CPU = torch.device("cpu")
STEPS = 12
SEEDS = range(20)
WEIGHTS = (0.25, 0.5)


class Slots:
    """A sink of real slots and real readbacks, whose writer runs when the test calls it."""

    def __init__(self, streams: Streams, flat_buffers: FlatBuffers) -> None:
        self.streams, self.flat_buffers = streams, flat_buffers
        self.pool = SlotPool(flat_buffers.layout, 2, pin=False)
        self.copier = ChunkCopier(CPU, flat_buffers.layout)
        self.sealed: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.written: list[list[bytes]] = []

    def readbacks_in_flight(self, device: torch.device) -> Any:
        return self.pool.readbacks_in_flight(device)

    def take(self, lane: AcceleratorLane) -> None:
        if self.pool.num_busy() == 2:
            self.write()
        slot = self.pool.claim(0)
        pending = SimpleNamespace(flat_buffers=self.flat_buffers)
        self.pool.assign(slot, pending, {CPU: lane.mark})
        for copies in slot.copies.values():
            work = partial(background_writer._fill, slot, pending, copies, self.copier, self.pool, self.sealed)
            lane.enqueue_read(work, lambda: None)

    def write(self) -> None:
        """Write one snapshot on a thread of its own."""
        self.streams.checker.receive(in_thread(self.streams, self._write, "writer"))

    def _write(self) -> None:
        slot = self.sealed.get()
        pages = []
        for page in background_writer._pages(slot):
            self.streams.checker.host_access(reads=[slot.pages[len(pages)]], label="write the file")
            pages.append(bytes(page))
        self.written.append(pages)
        background_writer._wait_copied(slot)
        self.pool.release(slot)


def train(seed: int, kind: str = "plain", scratch_bytes: int | None = 1 << 20, may_skip: bool = False) -> list[Any]:
    """Train with two optimizers on their own streams, readers and a writer; return averages and snapshots."""
    streams, decide = Streams(seed), random.Random(seed)
    with small_pieces(), torch.no_grad():
        model = make_model(kind)
        tracked = track(model, TrackingPolicy())
        flat_buffers = FlatBuffers(tracked, snapshot_layout(tracked, (5.0, 6.0), (0.1, 0.2), torch.float32))
        for group in flat_buffers.groups:
            group.together = None  # as on an accelerator: a call for all profiles writes no range of bytes
        gradients, parameters = make_gradients(STEPS, model), list(model.parameters())
        live = {name: parameter.data for name, parameter in model.named_parameters()}
        with streams.instead_of_torch():
            lane = AcceleratorLane(CPU)
            dispatch = UpdateDispatcher(
                flat_buffers, lambda device: lane, reads_later=True, scratch_bytes=scratch_bytes
            )
            slots = Slots(streams, flat_buffers)
            dispatch.sinks.append(slots)
            seen: list[Any] = []
            for step, of_step in enumerate(gradients):
                step_on_two_streams(streams, dispatch, parameters, of_step)
                weights = (1.0, 1.0) if step == 0 else WEIGHTS
                dispatch.queue(live, weights, copy_all=False, may_skip=may_skip)
                if step in (1, 3, 4, 8):
                    dispatch.flush_deferred()
                    slots.take(lane)
                if step == 6:
                    dispatch.order_readers()
                    seen += [average.clone() for _, average in flat_buffers.averages(0)]
                while slots.pool.num_busy() and decide.random() < 0.15:
                    slots.write()
            dispatch.order_readers()
            seen += [average.clone() for profile in (0, 1) for _, average in flat_buffers.averages(profile)]
            while slots.pool.num_busy():
                slots.write()
            streams.home.synchronize()
            _raise(dispatch.take_error())  # a hook must not raise
        return [*seen, *slots.written]


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def step_on_two_streams(
    streams: Streams,
    dispatch: UpdateDispatcher,
    parameters: Sequence[torch.nn.Parameter],
    gradients: Sequence[torch.Tensor],
) -> None:
    """Step each half of the parameters by an optimizer on its own stream, with no order between the two."""
    sides = [streams.stream(), streams.stream()]
    for side in sides:
        side.wait_stream(streams.home)
    for side, half in zip(sides, (slice(0, 1), slice(1, None)), strict=True):
        with streams.entered(side):
            dispatch.order_writers()  # the optimizer's hook
            for parameter, gradient in zip(parameters[half], gradients[half], strict=True):
                parameter.data.sub_(gradient)
    for side in sides:
        streams.home.wait_stream(side)


def plain_averages(kind: str) -> list[torch.Tensor]:
    """Return the last averages by the definition, tensor by tensor."""
    with torch.no_grad():
        model = make_model(kind)
        parameters = [parameter.data for parameter in model.parameters()]
        averages = [[parameter.clone() for parameter in parameters] for _ in WEIGHTS]
        for step, of_step in enumerate(make_gradients(STEPS, model)):
            for index, (parameter, gradient) in enumerate(zip(parameters, of_step, strict=True)):
                parameter.sub_(gradient)
                for of_profile, weight in zip(averages, WEIGHTS, strict=True):
                    if step == 0:
                        of_profile[index].copy_(parameter)
                    else:
                        of_profile[index].lerp_(parameter, weight)
        return [average for of_profile in averages for average in of_profile]


CASES = {
    "large stash": {},
    "small stash": {"scratch_bytes": 2000},
    "no stash": {"scratch_bytes": 0},
    "transposed": {"kind": "transposed"},
    "flags": {"may_skip": True},
    "flags, small stash": {"may_skip": True, "scratch_bytes": 2000},
}


@pytest.mark.parametrize("case", CASES)
def test_no_two_accesses_lack_an_order_for_any_answers_to_queries(case):
    expected = plain_averages(CASES[case].get("kind", "plain"))
    for seed in SEEDS:
        found = [value for value in train(seed, **CASES[case]) if isinstance(value, torch.Tensor)][-len(expected) :]
        assert all(map(torch.equal, found, expected))


RACES = {
    "update does not wait for the trainer": {},
    "optimizer does not wait": {},
    "parameters count as read before they are": {},
    "snapshot copied before the update": {},
    "averages read before the update": {},
    "stashed parameters averaged before they are stashed": {},
    "parameters written while another stream stashes them": {},
    "batch averaged before its readbacks have finished": {},
    "stash written while it is read": {},
    "stash not marked as read": {},
    "forced averaging does not wait for the readbacks": {"scratch_bytes": 0},
    "readbacks count as finished when they are queued": {},
    "pages read before they are copied": {},
    "another memory order than the file's is ignored": {"kind": "transposed"},
}


def race_without(line: str, case: dict[str, Any]) -> str:
    """Return the first race that the detector reports for any seed; empty if it reports none."""
    for seed in SEEDS:
        try:
            with without(line):
                train(seed, **case)
        except Race as race:
            return str(race)
    return ""


@pytest.mark.parametrize("line", RACES)
def test_a_missing_wait_is_a_race(line):
    assert "is not ordered after" in race_without(line, RACES[line])
