"""Optimizers on streams of their own, on a device that reorders work as a real device may."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from nitrous_ema.averaging.execution.write_guard import WriteGuard
from tests.support.fakes import averages_of, make_gradients, make_model, small_pieces
from tests.support.laggy.runner import SCHEDULES, run_on_laggy
from tests.support.scenarios import make_ema

_fence = WriteGuard.fence


def fence_once(guard: WriteGuard) -> None:
    """The bug: the second writer is not ordered."""
    if guard._reading:
        _fence(guard)


def step_side_by_side(optimizers: list[torch.optim.Optimizer]) -> Callable[[], None]:
    """Return a function that steps each optimizer on its own stream; on the CPU one after the other."""
    device = optimizers[0].param_groups[0]["params"][0].device
    streams = [torch.Stream(device=device) for _ in optimizers if device.type != "cpu"]

    def step() -> None:
        if not streams:
            for optimizer in optimizers:
                optimizer.step()
            return
        home = torch.accelerator.current_stream()
        for stream in streams:
            stream.wait_stream(home)
        for optimizer, stream in zip(optimizers, streams, strict=True):
            torch.accelerator.set_stream(stream)
            optimizer.step()
        torch.accelerator.set_stream(home)
        for stream in streams:
            home.wait_stream(stream)

    return step


def train(device: str, *, broken: bool = False) -> dict[str, Any]:
    bug = mock.patch.object(WriteGuard, "fence", fence_once) if broken else nullcontext()
    with tempfile.TemporaryDirectory() as folder, small_pieces(), bug:
        model = make_model("plain", device)
        parameters = list(model.parameters())
        halves = parameters[:2], parameters[2:]
        step = step_side_by_side([torch.optim.SGD(half, lr=0.3, foreach=True) for half in halves])
        ema = make_ema(model, folder, read="guarded", checkpoint_every_num_steps="manual")
        for of_step in make_gradients(6, model):
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = gradient
            step()
            ema.update()
        averages = averages_of(ema)
        ema.close()
        return averages


@pytest.mark.slow
def test_optimizers_on_two_streams_are_both_ordered():
    outcomes = run_on_laggy(train, cases=[{}, {"broken": True}])
    right, broken = outcomes[: len(SCHEDULES)], outcomes[len(SCHEDULES) :]
    assert [(outcome.schedule, outcome.detail) for outcome in right if outcome.verdict != "same"] == []
    assert any(outcome.verdict != "same" for outcome in broken), "the second writer's order makes no difference here"
