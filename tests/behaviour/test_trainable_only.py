"""Adapters in a frozen model: ``trainable_only=True`` averages and stores what is trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, KarrasEMA, PostHocEMA, load_average
from nitrous_ema.async_.synthesize_worker import launch
from nitrous_ema.errors import NitrousWarning, UntrackableModelError
from tests.support.fakes import TIMEOUT_SECONDS

BASE_BYTES = 1024 * 512 * 4
TRAINED = {"adapter.weight", "adapter.bias"}


class Adapted(nn.Module):
    """A frozen layer of 2 MiB, and a small one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(1024, 512).requires_grad_(False)
        self.adapter = nn.Linear(512, 2)

    def forward(self, x):
        return self.adapter(self.base(x))


def train(model, ema, steps=20):
    """Train, and return the trained weights of each step."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.01)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(4, 1024)) - 1).square().mean().backward()
        optimizer.step()
        ema.update()
        seen.append(model.adapter.weight.detach().double().clone())
    return seen


def power_average(values, gamma):
    """The average by its definition: the weight of step i is the part of the profile's integral on (i - 1, i]."""
    edges = torch.arange(len(values) + 1, dtype=torch.float64).div(len(values)).pow(gamma + 1)
    return sum(weight * value for weight, value in zip(edges.diff(), values, strict=True))


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_snapshots_and_outputs_hold_what_is_trained(cls, tmp_path):
    torch.manual_seed(0)
    model = Adapted()
    options = {"update_every": 1, "checkpoint_every_num_steps": 1, "checkpoint_folder": tmp_path / "ema"}
    with cls(model, trainable_only=True, **options) as ema:
        values = train(model, ema)
        ema.flush(TIMEOUT_SECONDS)
        assert ema.snapshots.get().bytes < 0.01 * BASE_BYTES
        expected = power_average(values, ema.gammas[1])
        averaged = ema.ema_models[1].ema_model
        torch.testing.assert_close(averaged.adapter.weight.double(), expected, rtol=1e-4, atol=1e-6)
        assert averaged.base.weight.data_ptr() == model.base.weight.data_ptr()
        synthesized = ema.synthesize_ema_model(sigma_rel=ema.sigma_rels[1]).ema_model
        torch.testing.assert_close(synthesized.adapter.weight.double(), expected, rtol=1e-4, atol=1e-6)
        (output,) = launch(tmp_path / "ema", sigma_rels=[ema.sigma_rels[1]], out=tmp_path / "out").result(
            TIMEOUT_SECONDS
        )
    whole = Adapted()
    whole.base.load_state_dict(model.base.state_dict())
    load_average(whole, output.path)  # strict: the file records which tensors it leaves out
    assert set(whole.state_dict()) == TRAINED | {"base.weight", "base.bias"}
    torch.testing.assert_close(whole.adapter.weight.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(whole.base.weight, model.base.weight)


def test_most_of_the_bytes_being_frozen_is_reported_once():
    with pytest.warns(NitrousWarning, match=r"2.0 MiB of the 2.0 MiB of averaged tensors .* trainable_only=True"):
        ema = KarrasEMA(Adapted(), sigma_rel=0.1, update_every=1)
    ema.update()  # warned of once: warnings are errors here


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda model: None, {"trainable_only": False}),
        (lambda model: None, {"trainable_only": True}),
        (lambda model: model.requires_grad_(False), {}),  # constructed before requires_grad_(True)
        (lambda model: model.base.requires_grad_(True), {}),
        (lambda model: None, {"ignore_startswith_names": ["base."]}),
    ],
    ids=["all on request", "trainable only", "nothing is trained yet", "all is trained", "ignored by name"],
)
def test_nothing_is_reported_where_nothing_is_wasted(change, options):
    model = Adapted()
    change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KarrasEMA(model, sigma_rel=0.1, **options)


def test_parameter_that_is_trained_later_is_reported_once():
    model = Adapted()
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, trainable_only=True)
    train(model, ema, steps=2)
    model.base.requires_grad_(True)
    with pytest.warns(NitrousWarning, match=r"require gradients now .*: 'base.weight', 'base.bias'\.") as said:
        train(model, ema, steps=2)
    assert len(said) == 1


def test_names_overrule():
    ema = KarrasEMA(Adapted(), sigma_rel=0.1, trainable_only=True, param_or_buffer_names_no_ema=["base.bias"])
    assert "ema_model.base.bias" in ema.state_dict()


def test_state_of_all_parameters_loads_where_only_trained_ones_are_averaged():
    model = Adapted()
    full = KarrasEMA(model, sigma_rel=0.1, update_every=1, trainable_only=False)
    train(model, full, steps=3)
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, trainable_only=True)
    ema.load_state_dict(full.state_dict())
    assert {key.removeprefix("ema_model.") for key in ema.state_dict()} == TRAINED | {"_extra_state"}
    assert torch.equal(ema.ema_model.adapter.weight, full.ema_model.adapter.weight)


def test_quantized_parameters_are_left_to_the_online_model():
    model = Adapted()
    model.base.weight.quant_state = object()  # the mark of bitsandbytes
    with pytest.raises(UntrackableModelError, match="trainable_only=True"):
        KarrasEMA(model, sigma_rel=0.1)
    ema = KarrasEMA(model, sigma_rel=0.1, trainable_only=True)
    assert ema.ema_model.base.weight.data_ptr() == model.base.weight.data_ptr()


def test_model_without_trained_parameters_is_refused():
    with pytest.raises(UntrackableModelError, match=r"no tensor to average.*trainable_only"):
        KarrasEMA(Adapted().requires_grad_(False), sigma_rel=0.1, trainable_only=True)


def test_other_values_are_refused():
    with pytest.raises(TypeError, match="trainable_only is 'yes'; expected True, False or None"):
        KarrasEMA(Adapted(), sigma_rel=0.1, trainable_only="yes")
