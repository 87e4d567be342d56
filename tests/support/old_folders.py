"""Folders that nitrous-ema 0.0.1 and ema-pytorch have written, for tests of their readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.peers import load_nitrous_001

SIGMA_RELS = (0.05, 0.10)


class Plain(nn.Module):
    """A model with parameters, averaged buffers and a counter of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(30, 7)
        self.norm = nn.BatchNorm1d(7)


def walk(model: nn.Module, step: int) -> None:
    """Set the weights to values that differ for each step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def write_ema_pytorch(
    folder: Path, steps: Sequence[int], model: nn.Module | None = None, dtype: torch.dtype = torch.float16
) -> Any:
    """Write snapshots of ema-pytorch at these steps; return its ``PostHocEMA``."""
    peer = pytest.importorskip("ema_pytorch")
    model = model or Plain()
    ema = peer.PostHocEMA(
        model,
        sigma_rels=SIGMA_RELS,
        checkpoint_every_num_steps="manual",
        checkpoint_folder=str(folder),
        checkpoint_dtype=dtype,
        update_every=1,
    )
    _train(ema, model, steps, lambda each, step: each.step.fill_(step))
    return ema


def write_nitrous_001(
    folder: Path, steps: Sequence[int], model: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Write snapshots of nitrous-ema 0.0.1 at these steps; return its ``PostHocEMA``."""
    model = model or Plain()
    ema = load_nitrous_001().PostHocEMA(
        model,
        sigma_rels=SIGMA_RELS,
        checkpoint_every_num_steps=10**9,
        checkpoint_folder=str(folder),
        checkpoint_dtype=dtype,
        update_every=1,
    )
    _train(ema, model, steps, lambda each, step: setattr(each, "step", step))
    return ema


def _train(ema: Any, model: nn.Module, steps: Sequence[int], jump: Any) -> None:
    """Make one update before each checkpoint; the steps in between are skipped by setting the counters."""
    for step in steps:
        for each in ema.ema_models:
            jump(each, step - 1)
        walk(model, step)
        ema.update()
        ema.checkpoint()
