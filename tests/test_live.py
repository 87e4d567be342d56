"""The model's tensors as they are now, whatever was done to the model since."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nitrous_ema.errors import UntrackableModelError
from nitrous_ema.live import LiveTensors
from nitrous_ema.tracked import TrackingPolicy, track


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
    tensors = live_tensors(model, skipped_prefixes=["1."])
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


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: delattr(model, "weight"),
        lambda model: setattr(model, "weight", nn.Parameter(torch.ones(3, 2))),
        lambda model: model.half(),
    ],
    ids=["gone", "another shape", "another type"],
)
def test_a_tensor_that_is_not_the_tracked_one_any_more_is_named(spoil):
    model = nn.Linear(2, 2)
    tensors = live_tensors(model)
    tensors.find()
    spoil(model)
    with pytest.raises(UntrackableModelError, match="'weight' is"):
        tensors.find()
