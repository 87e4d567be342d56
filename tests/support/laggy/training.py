"""Ordinary training without an EMA: it must give the CPU's bits before averages of it can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.support.laggy import device as laggy

STEPS = 3


def train(device: str, optimizer: str, **options: Any) -> Mapping[str, Any]:
    """Train a small network for some steps; return its state, the loss, and the calls that stopped the host."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Dropout(0.2),
        nn.GELU(), nn.Linear(8, 1),
    ).to(device)  # fmt: skip
    parameters = torch.optim.__dict__[optimizer](model.parameters(), lr=0.05, **options)
    batches = [torch.randn(16, 1, 8).to(device) for _ in range(STEPS)]
    laggy.take_host_waits()
    for batch in batches:
        parameters.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        parameters.step()
    waits = laggy.take_host_waits()
    return {**model.state_dict(), "loss": loss, "host waits": waits}
