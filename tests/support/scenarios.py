"""What scenarios share, as functions of the device: for the laggy device, for CUDA, and for the CPU.

A scenario returns what must be the same, to the bit, wherever and however late anything ran. The right results come
from ``PostHocEMA``, where nothing runs in the background: on the CPU for the laggy device, whose kernels are the CPU's,
and on the same device for a real one. ``laggy/loops.py`` has most of them.
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
    """In the background, except for the right results: by default those are what the CPU gives."""
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
    """Whatever stream is made current, the one from before is when all is done."""
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
    """As a user who trains on streams of his own, each after the one before."""
    before, after = torch.accelerator.current_stream(), torch.Stream(device=device)
    after.wait_stream(before)
    torch.accelerator.set_stream(after)


def replay(device: str, who: str = "nobody", background: bool | None = None) -> dict[str, Any]:
    """Optimizer steps that are captured into a CUDA graph; elsewhere they are taken as they are."""
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
    """What replays a step, without having run it; it keeps no state of its own, so it needs no warming up."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
