"""Common parts of scenarios, as functions of the device: for the laggy device, for CUDA, and for the CPU.

A scenario returns results that must be the same, to the bit, wherever and however late anything ran. The expected
results come from ``PostHocEMA``, where nothing runs in the background. For the laggy device, whose kernels are the
CPU's, it runs on the CPU; for a real device it runs on that device. ``laggy/loops.py`` has most of the scenarios.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from tests.support.fakes import averages_of, make_gradients, make_model, small_pieces, snapshot_bytes
from tests.support.late import late

STEPS = 5


def make_ema(
    model: torch.nn.Module, folder: str, *, read: str = "auto", background: bool | None = None, **options: Any
) -> PostHocEMA:
    """Construct an EMA: in the background, or (by default on the CPU) inline, for the expected results."""
    options = {"sigma_rels": (0.05, 0.15), "update_every": 1, "checkpoint_every_num_steps": 2, **options}
    if background is None:
        background = next(model.parameters()).device.type != "cpu"
    if not background:
        for name in ("max_pending", "on_full", "scratch", "offload"):
            options.pop(name, None)
        return PostHocEMA(model, checkpoint_folder=folder, **options)
    return AsyncPostHocEMA(model, checkpoint_folder=folder, read=read, **options)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, foreach=True)  # by default foreach is chosen by device


@contextmanager
def same_stream_after(device: str) -> Iterator[None]:
    """Restore the current stream after the block, when all work is done."""
    if device == "cpu":
        yield
        return
    before = torch.accelerator.current_stream()
    try:
        yield
    finally:
        torch.accelerator.synchronize()
        torch.accelerator.set_stream(before)


def switch_stream(device: str) -> None:
    """Make a new stream current, ordered after the last: as a user does who trains on streams of their own."""
    before, after = torch.accelerator.current_stream(), torch.Stream(device=device)
    after.wait_stream(before)
    torch.accelerator.set_stream(after)


def replay(device: str, who: str = "none", background: bool | None = None) -> dict[str, Any]:
    """Train with optimizer steps that are captured into a CUDA graph; on other devices they run eagerly."""
    with tempfile.TemporaryDirectory() as folder, small_pieces(), late(who):
        model = make_model("plain", device)
        (gradients,) = make_gradients(1, model)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer = make_optimizer(model)
        ema = make_ema(model, folder, read="guarded", background=background)

        def step() -> None:
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad.mul_(0.9)

        train_step = captured(step) if device.startswith("cuda") else step
        for _ in range(STEPS):
            ema.fence()  # no hook runs in a replay
            train_step()
            ema.update()
        averages = averages_of(ema)
        ema.close()
        return {**averages, "snapshots": snapshot_bytes(folder)}


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return a function that replays a step, which was captured without being run; it has no state to warm up."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
