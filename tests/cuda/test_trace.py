"""A trace of training: averaging runs beside forward and backward, and the training thread waits for nothing.

Not run on a device yet. What may fail on a first run though the library is right: two kernels overlap only where the
first one leaves room on the device. The averaging kernel for two profiles takes 122 registers a thread (compiled
without a device), so a device that one kernel of the trainer's fills shows no overlap. CUDA loads a kernel at its first
launch, which may wait for the device: the steps before the trace have to launch every kernel once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from nitrous_ema import AsyncPostHocEMA
from tests.cuda.trace import Trace, overlaps

OURS, THEIRS = "ema.update", ("forward and backward",)
STEPS = 6


def train(device: str, folder: Path, width: int, layers: int, profiler: Any = None) -> None:
    """Many small kernels of training, a few large ones of averaging, and snapshots."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
    batch = torch.randn(64, width, device=device)
    with AsyncPostHocEMA(model, checkpoint_folder=folder, checkpoint_every_num_steps=4, read="guarded") as ema:
        for step in range(2 * STEPS):
            if step == STEPS and profiler is not None:
                torch.cuda.synchronize()
                profiler.__enter__()
            with record_function(THEIRS[0]):
                model(batch).square().mean().backward()
            with record_function("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            with record_function(OURS):
                ema.update()
        if profiler is not None:
            torch.cuda.synchronize()
            profiler.__exit__(None, None, None)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    # acc_events: there is one cycle only; torch 2.10 to 2.12 warn without it, and warnings are errors here.
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True)
    train("cuda", folder / "snapshots", 2048, 12, profiler)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return Trace(folder / "trace.json", [OURS, *THEIRS, "optimizer"])


@pytest.mark.cuda
def test_averaging_overlaps_with_forward_and_backward(trace):
    kernels = trace.kernels()
    assert {kernel.stream for kernel in kernels if kernel.launched_by == OURS}
    assert overlaps(kernels, OURS, (*THEIRS, None))  # backward is launched by a thread of autograd


@pytest.mark.cuda
@pytest.mark.parametrize("name", [OURS, "optimizer"])
def test_host_waits_for_nothing(trace, name):
    assert trace.waits(name) == []


def test_the_same_training_runs_without_a_device(tmp_path):
    train("cpu", tmp_path, 16, 2)
