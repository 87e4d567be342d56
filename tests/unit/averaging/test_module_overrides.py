"""What the module of an average does differently, and what its copies and pickles do not."""

from __future__ import annotations

import copy
import gc
import pickle
import pickletools
import weakref

import pytest
import torch
from torch import nn

import nitrous_ema.async_.ema
from nitrous_ema import AsyncPostHocEMA, KarrasEMA
from tests.support.fakes import LateLane
from tests.support.models import Net, SelfPickling, Tied, set_weights

IMAGES = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def averaged(model: nn.Module, **options) -> KarrasEMA:
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, **options)
    for seed in range(3):
        set_weights(model, seed)
        ema.update()
    return ema


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


AGAIN = pytest.mark.parametrize("again", [copy.deepcopy, through_pickle])


@AGAIN
@pytest.mark.parametrize("given", [None, Net])
def test_copy_is_a_plain_module_with_the_average_of_now(again, given):
    model = Net()
    ema = averaged(model, ema_model=given)
    shown = ema.ema_model
    set_weights(model, 7)
    ema.update()
    other = again(shown)
    assert type(other) is Net
    assert set(other.__dict__) == set(Net().__dict__)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert not other.training
    torch.testing.assert_close(values(other), values(ema.ema_model), rtol=0, atol=0)
    before = values(other)
    set_weights(model, 8)
    ema.update()
    other(IMAGES)
    torch.testing.assert_close(values(other), before, rtol=0, atol=0)


@AGAIN
def test_copy_can_be_trained_and_shares_nothing(again):
    model = Net()
    model.conv.requires_grad_(False)
    ema = averaged(model, ignore_names=["head.weight"])
    other = again(ema.ema_model)
    before, online = copy.deepcopy(ema.state_dict()), values(model)
    assert {name: p.requires_grad for name, p in other.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other.train()(IMAGES).sum().backward()
    optimizer.step()
    now = ema.state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.items() if isinstance(value, torch.Tensor))
    torch.testing.assert_close(values(model), online, rtol=0, atol=0)
    assert not torch.equal(other.head.weight, model.head.weight)


@AGAIN
def test_copy_of_a_held_module_is_made_behind_a_lane_that_is_late(again, tmp_path, monkeypatch):
    lane = LateLane()
    monkeypatch.setattr(nitrous_ema.async_.ema, "_FEW_ELEMENTS", 0)
    monkeypatch.setattr(nitrous_ema.async_.ema, "make_lane", lambda device: lane)
    model = Net()
    with AsyncPostHocEMA(model, checkpoint_folder=tmp_path) as ema:
        held = ema.ema_models[0].ema_model.double()
        for seed in range(3):
            ema.fence()
            set_weights(model, seed)
            ema.update()
        other = again(held)
        torch.testing.assert_close(values(other), values(ema.ema_models[0].ema_model), rtol=0, atol=0)


def test_pickle_names_nothing_of_this_library():
    shown = averaged(nn.Linear(1, 1)).ema_model
    words = [word for _, word, _ in pickletools.genops(pickle.dumps(shown)) if isinstance(word, str)]
    assert not [word for word in words if "nitrous" in word]


@AGAIN
def test_copy_of_a_copy_is_a_copy(again):
    other = again(again(averaged(Tied()).ema_model))
    assert other.embed.weight is other.out.weight
    assert other.out.weight.requires_grad


class Knows(nn.Module):
    """A layer that refers to the model, and a model that stores a bound method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.parents = [self]
        self.run = self.double_it

    def double_it(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


@AGAIN
def test_references_to_the_module_are_references_to_the_copy(again):
    ema = averaged(Knows())
    assert ema.ema_model.run.__self__ is ema.ema_model
    other = again(ema.ema_model)
    assert other.layer.parents == [other]
    assert other.run.__self__ is other
    x = torch.ones(1, 2)
    assert torch.equal(other(x), ema.ema_model(x))


@AGAIN
def test_module_whose_pickle_holds_its_state_as_arguments_can_be_copied(again):
    ema = averaged(SelfPickling())
    other = again(ema.ema_model)
    x = torch.ones(1, 2)
    assert torch.equal(again(other)(x), ema.ema_model(x))
    other.train()(x).sum().backward()


def test_traced_module_can_be_copied():
    """Its class has a ``__deepcopy__`` of its own."""
    ema = averaged(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
    other = copy.deepcopy(ema.ema_model)
    x = torch.ones(1, 2)
    assert torch.equal(other(x), ema.ema_model(x))
    other.train()(x).sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_deep_copy_can_be_scripted():
    ema = averaged(Net())
    scripted = torch.jit.script(copy.deepcopy(ema.ema_model))
    torch.testing.assert_close(scripted(IMAGES), ema.ema_model(IMAGES))


def test_part_of_the_module_can_be_copied():
    other = copy.deepcopy(averaged(Net()).ema_model.head)
    other.train().requires_grad_()(torch.ones(1, 4)).sum().backward()


def test_module_and_what_it_holds_are_freed():
    ema = averaged(Net())
    owner = weakref.ref(ema._averaged_module)
    shown = ema.ema_model
    module = weakref.ref(shown)
    del ema
    gc.collect()
    assert owner() is None
    shown(IMAGES)
    del shown
    gc.collect()
    assert module() is None


# ---- adapters


class Adapter(nn.Module):
    """A layer of adapters, as PEFT's: its merge writes through ``.data``, which no version counter sees."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(2, 2)
        self.delta = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.delta

    def merge(self) -> None:
        self.base.weight.data += self.delta.data.t()

    def unmerge(self) -> None:
        self.base.weight.data -= self.delta.data.t()


class Tuner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Adapter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def merge_adapter(self) -> None:
        self.layer.merge()

    def merge_and_unload(self) -> nn.Module:
        self.layer.merge()
        return self.layer.base


class Peft(nn.Module):
    """The outer module of PEFT, which looks missing attributes up in the tuner."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Tuner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_model(x)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


MERGES = {
    "merge_and_unload": lambda module: module.merge_and_unload(),
    "merge_adapter": lambda module: module.merge_adapter(),
    "of the tuner": lambda module: module.base_model.merge_adapter(),
    "of a layer": lambda module: module.base_model.layer.merge(),
}


@pytest.mark.parametrize("ignored", [(), ("base_model.layer.base.",)])
@pytest.mark.parametrize("merge", MERGES)
def test_merging_adapters_in_place_is_refused_and_works_on_copies(merge, ignored):
    model = Peft()
    ema = averaged(model, ignore_startswith_names=ignored)
    before, online = copy.deepcopy(ema.state_dict()), values(model)
    with pytest.raises(RuntimeError, match=r"would write into the averages.*copy\.deepcopy\(ema_model\)"):
        MERGES[merge](ema.ema_model)
    for again in (copy.deepcopy, through_pickle):
        other = again(ema.ema_model)
        weight, delta = other.base_model.layer.base.weight.clone(), other.base_model.layer.delta.detach()
        MERGES[merge](other)
        torch.testing.assert_close(other.base_model.layer.base.weight, weight + delta.t())
    now = ema.state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.items() if isinstance(value, torch.Tensor))
    torch.testing.assert_close(values(model), online, rtol=0, atol=0)


def test_merging_works_on_a_copied_part():
    other = copy.deepcopy(averaged(Peft()).ema_model.base_model)
    weight = other.layer.base.weight.clone()
    other.merge_adapter()
    assert not torch.equal(other.layer.base.weight, weight)
