"""Copied tensors are taken over as they were at their update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nitrous_ema.averaging.kernels.copied_step import CopiedTensorsStep
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, snapshot_layout
from nitrous_ema.averaging.model.tracking import TrackingPolicy, track


@pytest.fixture
def counting():
    """A step of three integer buffers of sizes that are no multiples of anything, and the buffers."""
    model = nn.Linear(2, 2)
    for index, shape in enumerate([(3,), (1, 2), ()]):
        model.register_buffer(f"count_{index}", torch.arange(7, dtype=torch.int16)[: max(1, 3 - index)].reshape(shape))
    tracked = track(model, TrackingPolicy())
    (group,) = FlatBuffers(tracked, snapshot_layout(tracked, [1.0], [0.1], torch.float32)).copy_groups
    return CopiedTensorsStep(group), group, [getattr(model, f"count_{index}") for index in range(3)]


def test_values_that_were_kept_are_those_of_then(counting):
    step, group, buffers = counting
    for value, buffer in enumerate(buffers, 5):
        buffer.fill_(value)
    kept = step.stash(step.sources(buffers), 0, torch.empty(step.stash_bytes(0), dtype=torch.uint8))
    for buffer in buffers:
        buffer.zero_()
    step.run_stashed(kept, (0.5,))
    assert [value.unique().tolist() for value in group.values()] == [[5], [6], [7]]


def test_values_are_taken_over_whole(counting):
    step, group, buffers = counting
    step.run(step.sources(buffers), (0.5,))
    assert all(map(torch.equal, group.values(), buffers))


def test_kept_values_are_aligned_for_any_type(counting):
    step, _, buffers = counting
    scratch = torch.empty(step.stash_bytes(0), dtype=torch.uint8)
    offsets = {value.data_ptr() - scratch.data_ptr() for value in step.stash(step.sources(buffers), 0, scratch)}
    assert offsets == {0, 16, 32}
