"""The engine behind the EMA classes, with lanes that run everything at once.

What only shows with lanes in the background (ENGINE-2 to ENGINE-5) is in test_async_equality.py and around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nitrous_ema.averaging.config import AsyncEMAConfig, Background
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.inline import InlineLane
from nitrous_ema.averaging.execution.interfaces import PendingSnapshot
from nitrous_ema.averaging.stats import Stats
from nitrous_ema.errors import ClosedError, NitrousError, UntrackableModelError
from nitrous_ema.snapshots.stats import WriteStats
from tests.support.models import Net, set_weights


class RecordingSink:
    """A sink that takes snapshots, or skips them, and records them."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.taken: list[tuple[int, float, torch.Tensor]] = []
        self.calls: list[str] = []

    def take_snapshot(self, pending: PendingSnapshot, lane: Callable) -> bool:
        if self.answer:
            self.taken.append(
                (pending.stamp.step, pending.stamp.t, pending.flat_buffers.average(0, "head.bias").clone())
            )
        return self.answer

    def readbacks_in_flight(self, device: torch.device) -> None:
        return None

    def stats(self) -> WriteStats:
        return WriteStats(snapshots=len(self.taken))

    def has_lost(self, step: int) -> bool:
        return False

    def raise_failures(self) -> None:
        pass

    def flush(self, timeout_seconds: float | None = None) -> None:
        self.calls.append("flush")

    def close(self, timeout_seconds: float | None = None) -> None:
        self.calls.append("close")


class BreakingLane(InlineLane):
    """A lane whose writes fail while ``breaks`` is True."""

    breaks = False

    def enqueue_write(self, work: Callable[[], None], **options: Any) -> None:
        if self.breaks:
            raise MemoryError("no memory for the step")
        super().enqueue_write(work, **options)


def engine_of(model: nn.Module, sink: RecordingSink | None = None, *, make_lane=None, **options) -> AveragingEngine:
    config = AsyncEMAConfig(read="copied", **{"gammas": (6.94,), "checkpoint_every_num_steps": "manual", **options})
    background = None if make_lane is None else Background(config, make_lane)
    engine = AveragingEngine(model, config, background=background)
    if sink is not None:
        engine.attach(sink)
    return engine


def average(engine: AveragingEngine) -> torch.Tensor:
    return engine.flat_buffers.average(0, "head.bias").clone()


@pytest.mark.parametrize("wrong", ["time", "parameter"])
def test_failed_update_counts_nothing(wrong):
    model = Net()
    engine = engine_of(model)
    engine.update()
    before, state = average(engine), engine.schedule.state()
    set_weights(model, 1)
    if wrong == "parameter":
        model.conv.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError if wrong == "time" else UntrackableModelError):
        engine.update(-1 if wrong == "time" else 1)
    assert engine.schedule.state() == state
    assert torch.equal(average(engine), before)


def test_failed_lane_is_raised_and_the_averages_refused_until_a_state_is_loaded():
    model, lane = Net(), BreakingLane()
    engine = engine_of(model, make_lane=lambda device: lane)
    engine.update()
    lane.breaks = True
    with pytest.raises(NitrousError, match=r"averaging failed \(no memory") as error:
        engine.update()
    assert isinstance(error.value.__cause__, MemoryError)
    lane.breaks = False
    for call in (engine.update, engine.checkpoint, engine.flush, lambda: engine.order_readers("state_dict()")):
        with pytest.raises(NitrousError, match="Load a saved state"):
            call()
    engine.prepare_loading()
    engine.mark_valid()
    engine.update()


def test_snapshot_is_of_the_averages_at_its_step():
    model, sink = Net(), RecordingSink()
    engine = engine_of(model, sink, update_every=3, checkpoint_every_num_steps=2)
    seen = {}
    for step in range(1, 7):
        set_weights(model, step)
        engine.update()
        seen[step] = average(engine)
    assert [(step, t) for step, t, _ in sink.taken] == [(2, 2), (4, 4), (6, 6)]
    assert all(torch.equal(value, seen[step]) for step, _, value in sink.taken)
    assert engine.schedule.updates == 4  # at calls 1 and 4, and brought up to now at 2 and 6


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.filterwarnings("ignore:step_size_correction=False")
def test_corrections_of_nitrous_001_leave_the_averages_at_a_checkpoint(correction):
    model, sink = Net(), RecordingSink()
    engine = engine_of(model, sink, update_every=5, step_size_correction=correction)
    for step in range(1, 4):
        set_weights(model, step)
        engine.update()
    before = average(engine)
    engine.checkpoint()
    assert torch.equal(average(engine), before)
    assert [(step, t) for step, t, _ in sink.taken] == [(3, 1)]


def test_skipped_snapshot_is_taken_at_the_next_request():
    sink = RecordingSink(answer=False)
    engine = engine_of(Net(), sink)
    engine.update()
    assert engine.checkpoint() is False
    sink.answer = True
    assert engine.checkpoint() is True
    assert engine.checkpoint() is True
    assert len(sink.taken) == 1


def test_checkpoint_without_a_sink_is_refused():
    engine = engine_of(Net())
    engine.update()
    with pytest.raises(NitrousError, match="writes no snapshots"):
        engine.checkpoint()


def test_closing_flushes_then_closes_once():
    sink = RecordingSink()
    engine = engine_of(Net(), sink)
    engine.update()
    assert engine.close() is True
    assert engine.close() is False
    assert sink.calls == ["flush", "close"]
    with pytest.raises(ClosedError, match=r"update\(\): the EMA was closed"):
        engine.update()


def test_end_of_one_refusal_leaves_a_later_one():
    engine = engine_of(Net())
    swapped, closed = NitrousError("swapped"), NitrousError("closed")
    engine.refuse(swapped)
    engine.refuse(closed)
    engine.end_refusal(swapped)
    with pytest.raises(NitrousError, match="closed"):
        engine.update()
    engine.end_refusal(closed)
    engine.update()


def test_stats_are_those_of_the_sink_with_the_updates():
    sink = RecordingSink()
    engine = engine_of(Net(), sink)
    for _ in range(3):
        engine.update()
    engine.checkpoint()
    assert (engine.stats().updates, engine.stats().snapshots) == (3, 1)
    assert engine_of(Net()).stats() == Stats()


def test_frozen_copy_has_the_roles_of_the_tensors_and_its_own_averages():
    model = Net()
    model.register_buffer("scale", torch.ones(2))
    engine = engine_of(model)
    engine.update()
    model.scale.fill_(torch.inf)  # would be copied if it were tracked anew
    other = engine.frozen_copy(engine.frozen_config(None, (3.0,)), None)
    assert [tensor.role for tensor in other.flat_buffers.tracked] == [
        tensor.role for tensor in engine.flat_buffers.tracked
    ]
    before = average(engine)
    other.flat_buffers.average(0, "head.bias").fill_(7.0)
    assert torch.equal(average(engine), before)


def test_float64_averages_do_not_warn_of_small_weights():
    assert engine_of(Net().double()).schedule.least_weight == 0.0
    assert engine_of(Net()).schedule.least_weight > 0.0


class CapturingLane(InlineLane):
    """A lane whose caller records a graph while ``captures`` is True."""

    captures = False

    def is_capturing(self) -> bool:
        return self.captures


@pytest.mark.parametrize("call", [AveragingEngine.update, AveragingEngine.checkpoint])
def test_nothing_is_put_into_a_graph_that_is_being_captured(call):
    lane = CapturingLane()
    engine = engine_of(Net(), RecordingSink(), make_lane=lambda device: lane)
    engine.update()
    lane.captures = True
    with pytest.raises(NitrousError, match=r"captured into a graph.*outside.*fence\(\)"):
        call(engine)
    lane.captures = False
    assert engine.schedule.step == 1
    engine.update()


def test_averages_are_not_read_in_a_graph_that_is_being_captured():
    """A replay would not wait for the averaging of its own step."""
    lane = CapturingLane()
    engine = engine_of(Net(), make_lane=lambda device: lane)
    engine.update()
    lane.captures = True
    with pytest.raises(NitrousError, match=r"ema_model: .*captured into a graph.*copy\.deepcopy\(ema_model\)"):
        engine.order_readers("ema_model")
    lane.captures = False
    engine.order_readers("ema_model")
