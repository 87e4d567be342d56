"""Buffers whose average means nothing keep their meaning in every model with averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

from nitrous_ema import AsyncPostHocEMA, KarrasEMA, PostHocEMA, load_average
from nitrous_ema.async_.synthesize_worker import launch
from tests.support.fakes import TIMEOUT_SECONDS


def train(model: nn.Module, ema: nn.Module, steps: int = 30) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 16)) - 1).square().mean().backward()
        optimizer.step()
        ema.update()


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_pruning_masks_stay_masks_while_the_sparsity_grows(cls, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    for layer in (model[0], model[2]):
        prune.random_unstructured(layer, "weight", amount=0.2)
    options = {"update_every": 1, "checkpoint_every_num_steps": 10, "checkpoint_folder": tmp_path / "ema"}
    with cls(model, **options) as ema:
        train(model, ema)
        for layer in (model[0], model[2]):
            prune.l1_unstructured(layer, "weight", amount=0.75)
        train(model, ema)
        ema.flush(TIMEOUT_SECONDS)
        averages = [
            ema.ema_models[0].ema_model.state_dict(),
            ema.synthesize_ema_model(sigma_rel=0.1).ema_model.state_dict(),
        ]
    for state in averages:
        mask = state["0.weight_mask"]
        assert torch.equal(mask, model[0].weight_mask)
        assert (mask == 0).double().mean() == pytest.approx(0.8, abs=0.01)


class Clamped(nn.Module):
    """Layers with spectral norms of both kinds, one of them of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = parametrizations.spectral_norm(nn.Conv2d(1, 4, 3))
        self.old = old_spectral_norm(nn.Linear(16, 8))
        self.new = parametrizations.spectral_norm(nn.Linear(8, 6))
        self.vector = parametrizations.spectral_norm(nn.Linear(6, 6), name="bias")

    def forward(self, x):
        x = self.convolution(x.view(-1, 1, 4, 4)).flatten(1)
        return self.vector(self.new(self.old(x)))


def norms(model: nn.Module) -> list[float]:
    """Return the largest singular value of each weight as a forward uses it."""
    model.eval()
    with torch.no_grad():
        model(torch.zeros(2, 16))
    layers = [getattr(model, name).weight for name in ("convolution", "old", "new")]
    return [torch.linalg.svdvals(weight.detach().flatten(1).double())[0].item() for weight in layers]


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_averaged_layers_with_spectral_norm_have_norm_1(cls, tmp_path):
    """Oracle: all singular values. The online model's vectors, or averaged ones, give norms of 1.1 to 5."""
    torch.manual_seed(0)
    model = Clamped()
    options = {"update_every": 1, "checkpoint_every_num_steps": 5, "checkpoint_folder": tmp_path / "ema"}
    with cls(model, sigma_rels=(0.1, 0.25), **options) as ema:
        train(model, ema, steps=60)
        averaged = ema.ema_models[1].ema_model
        assert norms(averaged) == pytest.approx([1, 1, 1], abs=1e-3)
        train(model, ema, steps=20)
        assert norms(ema.ema_models[1].ema_model) == pytest.approx([1, 1, 1], abs=1e-3)
        assert averaged is ema.ema_models[1].ema_model
        model.eval()
        online = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with ema.average_parameters(1):
            assert norms(model) == pytest.approx([1, 1, 1], abs=1e-3)
        assert all(torch.equal(tensor, online[name]) for name, tensor in model.state_dict().items())
        ema.flush(TIMEOUT_SECONDS)
        synthesized = ema.synthesize_ema_model(sigma_rel=0.2).ema_model
        assert norms(synthesized) == pytest.approx([1, 1, 1], abs=1e-3)
    (output,) = launch(tmp_path / "ema", sigma_rels=[0.2], out=tmp_path / "out").result(TIMEOUT_SECONDS)
    loaded = Clamped()
    load_average(loaded, output.path)
    assert norms(loaded) == pytest.approx([1, 1, 1], abs=1e-3)


def test_averaging_leaves_the_vectors_of_the_online_model_alone(tmp_path):
    model = Clamped()
    with PostHocEMA(model, update_every=1, checkpoint_folder=tmp_path / "ema") as ema:
        train(model, ema)
        before = model.old.weight_u.clone()
        assert not torch.equal(ema.ema_models[0].ema_model.old.weight_u, before)
        ema.ema_models[0].ema_model(torch.zeros(2, 16))
        assert torch.equal(model.old.weight_u, before)


class Noisy(nn.Module):
    """A parametrization that draws random numbers in training."""

    def forward(self, weight):
        return weight + torch.randn_like(weight) if self.training else 2 * weight


def stacked() -> nn.Sequential:
    """Layers whose spectral norm comes after another parametrization, or after another spectral norm."""
    layers = [nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 6)]
    parametrize.register_parametrization(layers[0], "weight", Noisy())
    parametrizations.weight_norm(layers[1])  # of two tensors
    for layer in (*layers, layers[2]):
        parametrizations.spectral_norm(layer)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
@pytest.mark.parametrize("make", [Clamped, stacked])
def test_evaluation_leaves_vectors_and_random_numbers_as_they_were(make, cls, tmp_path):
    """In train mode a call of a spectral norm moves its vectors on, and the training that follows would differ."""
    model = make()
    with cls(model, update_every=1, checkpoint_every_num_steps=30, checkpoint_folder=tmp_path / "ema") as ema:
        train(model, ema)
        before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
        with ema.average_parameters(0):
            pass
        assert ema.ema_models[0].ema_model is not None
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_norm_after_other_parametrizations_is_1(cls, tmp_path):
    torch.manual_seed(0)
    model = stacked()

    def largest(module: nn.Module) -> list[float]:
        module.eval()
        return [torch.linalg.svdvals(layer.weight.detach().double())[0].item() for layer in module]

    with cls(
        model, (0.1, 0.25), update_every=1, checkpoint_every_num_steps=10, checkpoint_folder=tmp_path / "e"
    ) as ema:
        train(model, ema, steps=40)
        assert largest(ema.ema_models[1].ema_model) == pytest.approx([1, 1, 1], abs=1e-3)
        with ema.average_parameters(1):
            assert largest(model) == pytest.approx([1, 1, 1], abs=1e-3)
        ema.flush(TIMEOUT_SECONDS)
        assert largest(ema.synthesize_ema_model(sigma_rel=0.2).ema_model) == pytest.approx([1, 1, 1], abs=1e-3)


class Cached(nn.Module):
    """A model with a cache that follows the length of its input, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("cache", torch.zeros(0), persistent=False)

    def forward(self, x):
        if self.cache is None or len(self.cache) != len(x):
            self.cache = torch.arange(len(x), dtype=torch.float32)
        return self.linear(x) + self.cache[:, None]


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_cache_may_grow_in_training_and_in_validation(cls, tmp_path):
    torch.manual_seed(0)
    model = Cached()
    options = {"update_every": 1, "checkpoint_every_num_steps": 2, "checkpoint_folder": tmp_path / "ema"}
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with cls(model, **options) as ema:
        averaged = ema.ema_models[0].ema_model
        for length in (4, 8, 8, 3, 12):
            optimizer.zero_grad()
            model(torch.randn(length, 16)).square().mean().backward()
            optimizer.step()
            ema.update()
            assert averaged(torch.zeros(length + 5, 16)).shape == (length + 5, 16)  # a longer validation
            assert len(model.cache) == length
            with ema.average_parameters():
                model(torch.zeros(length + 2, 16))
        model.cache = None  # emptied between phases
        ema.update()
        assert averaged(torch.zeros(2, 16)).shape == (2, 16)
        ema.flush(TIMEOUT_SECONDS)
        assert "cache" not in {record.name for record in ema.snapshots.get().layout.records if record.role != "skipped"}
        assert ema.synthesize_ema_model(sigma_rel=0.1).ema_model(torch.zeros(7, 16)).shape == (7, 16)


class Windowed(nn.Module):
    """A model with caches that belong to an attribute, as timm's Swin: one of them is absent for small windows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.set_window_size(size)

    def set_window_size(self, size):
        self.size = size
        self.register_buffer("index", torch.arange(size), persistent=False)
        self.register_buffer("mask", torch.zeros(size, 1) if size > 4 else None, persistent=False)

    def forward(self, x):
        if len(x) > self.size:
            self.set_window_size(len(x))
        x = self.linear(x[self.index])
        return x if self.mask is None else x + self.mask


@pytest.mark.parametrize(("first", "second"), [(4, 8), (8, 4), (8, 12)])
def test_caches_and_their_attributes_are_those_of_the_same_moment(first, second):
    model = Windowed(first)
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    ema.update()
    for size in (first, second, first):
        model.set_window_size(size)
        ema.update()  # warns of no added tensor: warnings are errors here
        averaged = ema.ema_model
        assert (averaged.size, len(averaged.index), averaged.mask is None) == (size, size, size <= 4)
        assert averaged(torch.zeros(size, 4)).shape == (size, 4)
        assert averaged(torch.zeros(20, 4)).shape == (20, 4)  # grows its own
        assert ema.ema_model(torch.zeros(20, 4)).shape == (20, 4)
        assert (model.size, len(model.index)) == (size, size)


def test_caches_of_a_cast_average_stay_cast():
    model = Windowed(8)
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    averaged = ema.ema_model.double()
    model.set_window_size(12)
    ema.update()
    assert ema.ema_model is averaged
    assert (averaged.mask.dtype, averaged.index.dtype) == (torch.float64, torch.int64)
    assert averaged(torch.zeros(12, 4).double()).shape == (12, 4)


def test_forward_of_an_average_leaves_the_caches_of_the_model_alone():
    model = Windowed(8)
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    ema.ema_model.mask.fill_(7)
    assert not model.mask.any()
