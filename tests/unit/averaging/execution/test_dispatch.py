"""The work that an update puts on the lanes, and how its failures are reported; bits are in test_async_equality.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousError, PostHocEMA
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
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
