"""The model's tensors as they are now, whatever was done to the model since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema.averaging.model.live_tensors import LiveTensors
from nitrous_ema.averaging.model.tracking import TrackingPolicy, track
from nitrous_ema.errors import UntrackableModelError
from tests.support.fakes import LateLane, assert_same_bits, backward, use_lane
from tests.support.guarded_training import Step, averages_after


def live_tensors(model: nn.Module, **policy: object) -> LiveTensors:
    return LiveTensors(model, track(model, TrackingPolicy(**policy)))


def test_the_same_mapping_is_returned_as_long_as_nothing_moved():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tensors = live_tensors(model)
    first = tensors.find()
    model(torch.ones(3, 2))  # writes buffers in place
    with torch.no_grad():
        model[0].weight.add_(1)
    assert tensors.find() is first
    assert first["0.weight"] is model[0].weight
    assert "1.num_batches_tracked" in first


def test_skipped_tensors_are_not_looked_for():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tensors = live_tensors(model, ignore_startswith_names=["1."])
    model[1] = nn.Identity()
    assert list(tensors.find()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "move",
    [
        lambda model: setattr(model, "weight", nn.Parameter(torch.ones(2, 2))),
        lambda model: setattr(model.weight, "data", torch.ones(2, 2)),
        lambda model: model.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, assign=True),
    ],
    ids=["another object", "another storage", "assigned"],
)
def test_a_replaced_tensor_is_found(move):
    model = nn.Linear(2, 2)
    tensors = live_tensors(model)
    first = tensors.find()
    move(model)
    found = tensors.find()
    assert found is not first
    assert torch.equal(found["weight"], torch.ones(2, 2))


def test_other_strides_at_the_same_address_are_found():
    model = nn.Linear(2, 2)
    tensors = live_tensors(model)
    first = tensors.find()
    model.weight.data = model.weight.data.t()
    assert tensors.find() is not first


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: delattr(model, "weight"),
        lambda model: setattr(model, "weight", nn.Parameter(torch.ones(3, 2))),
        lambda model: setattr(model.weight, "data", model.weight.data[:1]),
        lambda model: model.half(),
    ],
    ids=["gone", "another shape", "fewer rows at the same address", "another type"],
)
def test_a_tensor_that_is_not_the_tracked_one_any_more_is_named(spoil):
    model = nn.Linear(2, 2)
    tensors = live_tensors(model)
    tensors.find()
    spoil(model)
    with pytest.raises(UntrackableModelError, match="'weight' is"):
        tensors.find()


# What becomes of an update whose tensors are moved before the lane has read them


def new_memory(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = 0.9 * p.data


def new_memory_in_another_order(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = (0.9 * p.data.t()).contiguous().t()


def same_memory_in_another_order(model: nn.Module) -> None:
    model.enter.weight.data = model.enter.weight.data.t()


def new_objects(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(0.9 * p.detach()))


def assigned(model: nn.Module) -> None:
    model.load_state_dict({key: 0.9 * value for key, value in model.state_dict().items()}, assign=True)


def moved_there_and_back(model: nn.Module) -> None:
    model.double().float()


MOVES = {
    "p.data": (new_memory, "plain"),
    "p.data in another order": (new_memory_in_another_order, "plain"),
    "p.data of another order": (new_memory, "transposed"),
    "p.data with other strides": (same_memory_in_another_order, "tied"),
    "p.data of a tied parameter": (new_memory, "tied"),
    "another object": (new_objects, "plain"),
    "load_state_dict(assign=True)": (assigned, "plain"),
    ".to()": (moved_there_and_back, "plain"),
}


def between_update_and_step(move: Callable[[nn.Module], None]) -> Callable[..., Step]:
    def form(model: nn.Module, ema: Any) -> Step:
        optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.1), []

        def step(batch: torch.Tensor) -> None:
            if len(steps) > 1:
                move(model)
                for p in model.parameters():  # whoever was let go of is somebody else's by now
                    steps.extend(torch.full_like(p, torch.nan) for _ in range(4))
            optimizer.param_groups[0]["params"] = list(model.parameters())
            backward(model, batch)
            optimizer.step()
            steps.append(torch.empty(0))

        return step

    return form


@pytest.mark.parametrize(("move", "kind"), MOVES.values(), ids=MOVES)
def test_replaced_storage_is_held_until_it_was_read(tmp_path, monkeypatch, move, kind):
    """The lane reads as late as it may: after the trainer has replaced, and freed, what it is to read."""
    form = between_update_and_step(move)
    expected = averages_after(PostHocEMA, tmp_path, form, kind)
    use_lane(monkeypatch, LateLane())
    assert_same_bits(averages_after(AsyncPostHocEMA, tmp_path, form, kind, read="guarded"), expected)


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_weights_in_new_memory_are_averaged(tmp_path, cls):
    """Against a model that is written in place, not against the other class: both resolve tensors in one place."""
    averages = []
    for name in ("in place", "replaced"):
        model = nn.Linear(3, 2)
        ema = cls(model, checkpoint_folder=tmp_path / name, update_every=1, checkpoint_every_num_steps="manual")
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                value = torch.randn(p.shape, generator=generator)
                ema.fence()
                p.data = value if name == "replaced" else p.data.copy_(value)
            ema.update()
        averages.append(ema.state_dict()["ema_models.0.ema_model.weight"].clone())
        ema.close()
    assert torch.equal(*averages)
