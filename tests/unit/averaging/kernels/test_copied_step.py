"""Copied tensors are taken over as they were at their update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema._base.torch_dtypes import TORCH_DTYPES
from nitrous_ema.averaging.kernels.copied_step import CopiedTensorsStep, copy_each
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


REFUSED = {"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"}


@pytest.fixture
def calls(monkeypatch):
    """``_foreach_copy_`` as it is where it knows least: the number of tensors of each call."""
    seen, original = [], torch._foreach_copy_

    def strict(targets, sources, non_blocking=False):
        for name in {str(each.dtype).removeprefix("torch.") for each in [*targets, *sources]}:
            if name in REFUSED:
                raise NotImplementedError(f'"foreach_tensor_copy" not implemented for {name}')
        assert len({each.dtype for each in sources}) == 1
        seen.append(len(targets))
        return original(targets, sources, non_blocking)

    monkeypatch.setattr(torch, "_foreach_copy_", strict)
    return seen


def test_tensors_of_one_type_take_one_call(calls):
    sources = [torch.ones(3), torch.full((), 2), torch.full((2,), 4.0), torch.full((5,), 3)]
    targets = [torch.zeros_like(each) for each in sources]
    copy_each(targets, sources)
    assert all(map(torch.equal, targets, sources))
    assert calls == [2, 2]


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_every_type_is_copied(calls, dtype):
    source = torch.tensor([0, 1, 2, 3]).to(dtype)
    target = torch.zeros(4, dtype=torch.uint8).to(dtype)
    copy_each([target], [source])
    assert torch.equal(target.view(torch.uint8), source.view(torch.uint8))


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_model_with_tensors_of_any_type_is_averaged(tmp_path, calls, cls, dtype):
    model = nn.Linear(2, 2)
    model.register_buffer("extra", torch.tensor([1, 2, 0]).to(dtype))
    if dtype.is_floating_point:
        model.narrow = nn.Parameter(torch.ones(5).to(dtype), requires_grad=False)
    with cls(model, checkpoint_folder=tmp_path, update_every=1) as ema:
        ema.fence()
        ema.update()
        with ema.average_parameters():
            pass
        kept = ema.state_dict()["ema_models.0.ema_model.extra"]
        assert kept.flatten().tolist() == model.extra.flatten().tolist()
