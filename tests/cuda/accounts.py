"""Training loops whose memory is counted by torch's allocators; on the CPU there is nothing to count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA

WIDTH = 512
Meter = Callable[[], int]


def device_bytes(kind: str = "current") -> int:
    """Return the bytes that tensors on the device have requested, without the allocator's rounding."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]


def host_bytes() -> int:
    """Return the bytes of pinned memory in use. Not in torch 2.6."""
    stats = torch.cuda.host_memory_stats()  # empty before the first allocation
    # In its first releases "allocated_bytes" has this meaning; in later releases it is what the allocator holds.
    return stats.get("active_bytes.current", stats.get("allocated_bytes.current", 0))


@dataclass(frozen=True)
class Counted:
    """Bytes at a few moments of a training run, without the ``scratch_bytes`` of ``stats()``."""

    averages: int
    """After constructing the EMA."""
    after_warm_up: int
    after_many_steps: int
    peak: int
    """Above the bytes that were held at its reset, after the warm-up."""


def make_network(device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)).to(device=device, dtype=dtype)


def count(
    device: str,
    folder: str,
    now: Meter,
    peak: Meter,
    reset_peak: Callable[[], None],
    dtype: torch.dtype,
    **options: Any,
) -> Counted:
    """Train for 6 steps, then for 50, each with an update and every second with a snapshot.

    Args:
        now, peak: Return an allocator's current and peak bytes.
        reset_peak: Resets ``peak``.
    """
    model = make_network(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = now()
    ema = AsyncPostHocEMA(
        model, sigma_rels=(0.05, 0.15), checkpoint_folder=folder, checkpoint_every_num_steps=2, **options
    )
    averages = now() - before

    def train(steps: int) -> int:
        for _ in range(steps):
            optimizer.step()
            ema.update()
        ema.flush(60)
        return now() - ema.stats().scratch_bytes

    after_warm_up = train(6)
    reset_peak()
    after_many_steps = train(50)
    ema.close(60)
    return Counted(averages, after_warm_up - before, after_many_steps - before, peak() - after_warm_up)
