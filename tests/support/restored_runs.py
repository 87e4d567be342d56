"""Trainings whose runs are restored."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from torch import nn

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    nothing_left_behind,
    small_pieces,
)
from tests.support.models import set_weights

CLASSES = [PostHocEMA, AsyncPostHocEMA]


@pytest.fixture
def make(tmp_path):
    """Makes EMAs in one folder, and closes them."""
    made = []

    def build(model: nn.Module, cls: type[PostHocEMA] = PostHocEMA, **options) -> PostHocEMA:
        defaults = {"update_every": 1, "checkpoint_every_num_steps": "manual", "checkpoint_folder": tmp_path / "ema"}
        with small_pieces(chunk_bytes=64):
            made.append(cls(model, **{**defaults, **options}))
        return made[-1]

    with nothing_left_behind():
        yield build
        for ema in made:
            ema.close(TIMEOUT_SECONDS)
        made.clear()


def train(ema: PostHocEMA, steps: range, t_delta: float = 1) -> None:
    for step in steps:
        ema.fence()
        set_weights(ema.model, step)
        ema.update(t_delta)


def saved(ema: PostHocEMA) -> dict[str, object]:
    return copy.deepcopy(dict(ema.state_dict()))


def file_of(ema: PostHocEMA, step: int) -> Path:
    return ema.snapshots.get(step).paths[0]
