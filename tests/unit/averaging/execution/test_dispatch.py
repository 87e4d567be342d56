"""The work that an update puts on the lanes, and how its failures are reported; bits are in test_async_equality.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousError, PostHocEMA
from nitrous_ema.averaging.execution.dispatch import UpdateDispatcher
from nitrous_ema.averaging.execution.inline import InlineLane
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, snapshot_layout
from nitrous_ema.averaging.model.tracking import TrackingPolicy, track
from tests.support.fakes import TIMEOUT_SECONDS, Gate


def divide_by_zero() -> None:
    raise ZeroDivisionError("division by zero")


@pytest.fixture
def ema(tmp_path):
    service = AsyncPostHocEMA(nn.Linear(3, 2), checkpoint_folder=tmp_path)
    service.update()
    yield service
    with pytest.raises(NitrousError, match="averaging failed"):
        service.close(timeout=60)


@pytest.mark.parametrize(
    "read",
    [
        lambda ema: ema.state_dict(),
        lambda ema: ema.ema_models[0].ema_model,
        lambda ema: ema.copy_params_from_ema_to_model(),
        lambda ema: ema.average_parameters().__enter__(),
    ],
    ids=["state_dict", "ema_model", "copy_to_model", "average_parameters"],
)
def test_failure_of_the_work_that_a_reader_waits_for_reaches_that_reader(ema, read):
    (lane,) = ema._engine._dispatch.lanes()
    lane.enqueue_write(divide_by_zero)
    with pytest.raises(NitrousError, match="averaging failed"):
        read(ema)


def test_averages_are_moved_once_the_copies_out_of_them_are_done(tmp_path, monkeypatch):
    gate, moves = Gate(), []
    with AsyncPostHocEMA(nn.Linear(3, 2), checkpoint_folder=tmp_path) as ema:
        ema.update()
        (lane,) = ema._engine._dispatch.lanes()
        drain = lane.drain
        lane.enqueue_read(gate.pass_through, gate.open)
        gate.wait_entered()
        # Opened by the wait itself, so that without a wait the move comes first.
        monkeypatch.setattr(lane, "drain", lambda timeout_seconds=None: (gate.open(), drain(TIMEOUT_SECONDS)))
        monkeypatch.setattr(FlatBuffers, "to", lambda flat_buffers, device: moves.append(gate.is_open()))
        ema._engine.move(torch.device("cpu"))
        gate.open()
    assert moves == [True]


def test_tensor_of_a_submodule_that_was_added_later_causes_a_warning(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2))
    ema = PostHocEMA(net, checkpoint_folder=tmp_path, update_every=1)
    ema.update()
    net.add_module("head", nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"are not averaged: 'head.weight', 'head.bias'\. "):
        ema.update()
    ema.update()  # once


def test_frozen_part_made_in_inference_mode_is_averaged_in_the_background(tmp_path):
    with torch.inference_mode():
        frozen = nn.Linear(3, 3)
    net = nn.Sequential(frozen.requires_grad_(False), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net[1].parameters(), lr=0.1)
    with AsyncPostHocEMA(net, checkpoint_folder=tmp_path) as ema:
        for _ in range(3):
            with torch.no_grad():
                net[1].weight.grad = torch.ones(2, 3)
            optimizer.step()
            ema.update()
        assert torch.equal(ema.state_dict()["ema_models.0.ema_model.0.weight"], frozen.weight)


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
@pytest.mark.parametrize("is_closed", [True, False])
def test_averages_are_freed_with_the_ema_without_a_garbage_collection(tmp_path, cls, is_closed):
    """Device memory: torch's allocator starts no garbage collection, and some trainers disable the collector."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gc.disable()
    try:
        ema = cls(net, checkpoint_folder=tmp_path, update_every=1)
        optimizer.step()
        ema.update()
        ema.checkpoint()
        averages = [weakref.ref(flat) for group in ema._engine.flat_buffers.groups for flat in group.flats]
        if is_closed:
            ema.close(timeout=60)
        del ema
        assert [each() for each in averages] == [None, None]
    finally:
        gc.enable()


class Noting(InlineLane):
    """A lane that notes, for each call, whether it came without the dispatcher's lock or in the caller's modes."""

    def __init__(self):
        self.lock, self.wrong, self.calls = None, [], set()

    def note(self, call, *, runs=False):
        self.calls.add(call)
        if not self.lock.depth:
            self.wrong.append(f"{call} without the lock")
        if runs and torch.is_inference_mode_enabled():
            self.wrong.append(f"{call} in inference mode")

    def enqueue_write(self, work, **options):
        self.note("enqueue_write", runs=True)
        super().enqueue_write(work, **options)

    def stash(self, work):
        self.note("stash", runs=True)
        super().stash(work)

    def order_writer(self):
        self.note("order_writer")

    def order_reader(self):
        self.note("order_reader")


class Depth:
    """A lock that knows how often it is held."""

    depth = 0

    def __enter__(self):
        self.depth += 1

    def __exit__(self, *_):
        self.depth -= 1


class Unfinished:
    """A sink whose readbacks never finish."""

    num_finished = 0

    def readbacks_in_flight(self, device):
        return self

    def have_finished(self, begin, end):
        return False

    def wait_on_device(self, begin, end):
        pass


@pytest.mark.parametrize("call", ["order_writers", "flush_deferred", "order_readers"])
def test_lanes_are_called_under_the_lock_and_in_neutral_modes(call):
    """Optimizers step on other threads, and call from within the modes of their caller."""
    model, lane = nn.Linear(3, 2), Noting()
    tracked = track(model, TrackingPolicy())
    flat_buffers = FlatBuffers(tracked, snapshot_layout(tracked, (5.0,), (0.1,), torch.float32))
    dispatch = UpdateDispatcher(flat_buffers, lambda device: lane, reads_later=True)
    dispatch._lock = lane.lock = Depth()
    with torch.no_grad():
        dispatch.queue(dict(model.named_parameters()), (1.0,), copy_all=False)
        dispatch.sinks.append(Unfinished())
        dispatch.queue(dict(model.named_parameters()), (0.5,), copy_all=False)
    lane.calls.clear()
    with torch.inference_mode():
        getattr(dispatch, call)()
    assert "stash" in lane.calls
    assert lane.wrong == []
