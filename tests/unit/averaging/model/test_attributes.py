"""Attributes that are no tensors: ``ema_model`` computes what the online model computes with the average."""

from __future__ import annotations

import collections
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nitrous_ema import KarrasEMA
from nitrous_ema.errors import UncopyableModelError
from tests.support.models import set_weights

X = torch.ones(1, 2)


class Scaled(nn.Module):
    """A model whose output depends on attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.number = 1.0
        self.scaling = {"default": 1.0}
        self.nested = {"a": [1.0, (2.0,)]}
        self.config = types.SimpleNamespace(factor=1.0, inner=types.SimpleNamespace(factor=1.0))
        self.array = np.ones(2)
        self.table = torch.ones(2)
        self.queue = collections.deque([1.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.number * self.scaling["default"] * self.nested["a"][0] * self.nested["a"][1][0]
        factor *= self.config.factor * self.config.inner.factor * float(self.array[0]) * self.queue[0]
        return self.layer(x) * factor * self.table


def averaged(model: nn.Module) -> KarrasEMA:
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    for seed in range(3):
        set_weights(model, seed)
        ema.update()
    return ema


def assert_computes_what_the_online_model_would(ema: KarrasEMA, model: nn.Module) -> None:
    with torch.no_grad():
        shown = ema.ema_model(X)
        with ema.average_parameters():
            assert torch.equal(shown, model(X))


def _replace_number(model: Scaled) -> None:
    model.number = 3.0


def _write_in_array(model: Scaled) -> None:
    model.array[0] = 3.0


def _write_in_table(model: Scaled) -> None:
    model.table[0] = 3.0


CHANGES = {
    "number": _replace_number,
    "entry of a dict": lambda model: model.scaling.update(default=3.0),
    "nested entry": lambda model: model.nested["a"].__setitem__(1, (3.0,)),
    "attribute of an object": lambda model: setattr(model.config, "factor", 3.0),
    "attribute of an object in an object": lambda model: setattr(model.config.inner, "factor", 3.0),
    "another object": lambda model: setattr(model, "config", types.SimpleNamespace(factor=2.0, inner=model.config)),
    "array": _write_in_array,
    "tensor": lambda model: setattr(model, "table", torch.full((2,), 3.0)),
    "element of a tensor": _write_in_table,
    "deque": lambda model: model.queue.__setitem__(0, 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_attribute_is_that_of_the_online_model(change):
    model = Scaled()
    ema = averaged(model)
    held = ema.ema_model
    CHANGES[change](model)
    assert_computes_what_the_online_model_would(ema, model)
    CHANGES[change](model)
    assert_computes_what_the_online_model_would(ema, model)
    assert ema.ema_model is held


def test_attribute_that_a_user_set_stays_until_the_online_models_changes():
    model = Scaled()
    ema = averaged(model)
    ema.ema_model.scaling["default"] = 5.0
    ema.ema_model.number = 7.0
    ema.ema_model.note = "mine"
    model.queue[0] = 2.0  # another attribute of the same module
    assert (ema.ema_model.scaling["default"], ema.ema_model.number, ema.ema_model.queue[0]) == (5.0, 7.0, 2.0)
    model.scaling["default"] = 3.0
    assert (ema.ema_model.scaling["default"], ema.ema_model.number, ema.ema_model.note) == (3.0, 7.0, "mine")


def test_copied_attributes_share_nothing_with_the_online_model():
    model = Scaled()
    ema = averaged(model)
    _ = ema.ema_model
    model.scaling = {"default": 3.0}
    ema.ema_model.scaling["default"] = 9.0
    assert model.scaling == {"default": 3.0}


def test_new_and_removed_attributes_follow():
    model = Scaled()
    ema = averaged(model)
    _ = ema.ema_model
    model.added = [model.layer]
    del model.number
    assert ema.ema_model.added == [ema.ema_model.layer]
    assert not hasattr(ema.ema_model, "number")


def test_attribute_that_cannot_be_copied_is_named():
    model = Scaled()
    ema = averaged(model)
    _ = ema.ema_model
    model.config = threading.Lock()
    with pytest.raises(UncopyableModelError, match="attribute 'config' of a Scaled has changed"):
        _ = ema.ema_model


def test_attribute_that_refers_to_itself_is_followed():
    model = Scaled()
    loop: list[Any] = [1.0]
    loop.append(loop)
    model.loop = loop
    ema = averaged(model)
    _ = ema.ema_model
    loop[0] = 2.0
    assert ema.ema_model.loop[0] == 2.0


def test_long_container_counts_by_object_and_length():
    model = Scaled()
    model.words = {str(number): number for number in range(20_000)}
    ema = averaged(model)
    copied = ema.ema_model.words
    model.words["0"] = 5  # not seen
    assert ema.ema_model.words is copied
    model.words["new"] = 1
    assert ema.ema_model.words == model.words


def test_trainer_of_a_lightning_module_is_not_copied():
    """Its copies have none either: its ``__getstate__`` leaves the trainer out."""

    class Lightning(Scaled):
        _trainer = None

        def __getstate__(self):
            return {**self.__dict__, "_trainer": None}

    model = Lightning()
    ema = averaged(model)
    for _ in range(2):
        model._trainer = types.SimpleNamespace(lock=threading.Lock())
        assert ema.ema_model._trainer is None


def test_nothing_is_copied_where_nothing_has_changed():
    model = Scaled()
    ema = averaged(model)
    config = ema.ema_model.config
    set_weights(model, 5)
    ema.update()
    assert ema.ema_model.config is config
