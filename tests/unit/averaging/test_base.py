"""What users assign to an EMA, and how an EMA shows itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nitrous_ema import KarrasEMA, PostHocEMA
from nitrous_ema.errors import ClosedError, UntrackableModelError
from tests.support.fakes import TIMEOUT_SECONDS
from tests.support.models import Net
from tests.support.restored_runs import CLASSES, train


@pytest.mark.parametrize("cls", CLASSES)
def test_assigned_folder_takes_the_later_snapshots(cls, make, tmp_path):
    ema = make(Net(), cls, checkpoint_every_num_steps=1)
    train(ema, range(1, 4))
    before = ema.snapshots
    ema.checkpoint_folder = tmp_path / "other"
    train(ema, range(4, 6))
    ema.flush(TIMEOUT_SECONDS)
    assert [each.step for each in before.snapshots()] == [1, 2, 3]
    assert [each.step for each in ema.snapshots.snapshots()] == [4, 5]
    assert ema.checkpoint_folder == tmp_path / "other"
    assert {each.run for each in before.snapshots()} == {each.run for each in ema.snapshots.snapshots()}


@pytest.mark.parametrize("cls", CLASSES)
def test_assigned_folder_is_the_one_that_retention_works_on(cls, make, tmp_path):
    ema = make(Net(), cls, checkpoint_every_num_steps=1, keep=2)
    train(ema, range(1, 6))
    before = ema.snapshots
    ema.checkpoint_folder = tmp_path / "other"
    train(ema, range(6, 12))
    ema.flush(TIMEOUT_SECONDS)
    assert [len(before.snapshots()), len(ema.snapshots.snapshots())] == [2, 2]


def test_folder_that_cannot_be_used_changes_nothing(make, tmp_path):
    ema = make(Net())
    (tmp_path / "file").touch()
    before = ema.checkpoint_folder
    for wrong in ("s3://bucket/ema", tmp_path / "file" / "below"):
        with pytest.raises(Exception, match=r"URL|cannot be written"):
            ema.checkpoint_folder = wrong
    assert ema.checkpoint_folder == ema.snapshots.root == before
    ema.close(TIMEOUT_SECONDS)
    with pytest.raises(ClosedError):
        ema.checkpoint_folder = tmp_path / "other"


@pytest.mark.parametrize("cls", CLASSES)
def test_interval_of_snapshots_may_be_assigned(cls, make):
    ema = make(Net(), cls, checkpoint_every_num_steps=2)
    train(ema, range(1, 4))
    ema.checkpoint_every_num_steps = 3
    train(ema, range(4, 10))
    ema.checkpoint_every_num_steps = "manual"
    train(ema, range(10, 20))
    ema.flush(TIMEOUT_SECONDS)
    assert [each.step for each in ema.snapshots.snapshots()] == [2, 6, 9]
    with pytest.raises(ValueError, match="checkpoint_every_num_steps is 0"):
        ema.checkpoint_every_num_steps = 0
    assert ema.checkpoint_every_num_steps == "manual"


def test_frozen_may_be_assigned_to_an_ema_and_to_one_of_its_profiles(make):
    ema = make(Net())
    train(ema, range(1, 3))
    ema.frozen = True
    before = ema.stats().updates
    train(ema, range(3, 5))
    assert (ema.step, ema.stats().updates) == (4, before)
    ema.ema_models[0].frozen = False
    train(ema, range(5, 6))
    assert (ema.frozen, ema.stats().updates) == (False, before + 1)
    with pytest.raises(TypeError, match="frozen is 1; expected True or False"):
        ema.frozen = 1


@pytest.mark.parametrize("name", ["beta", "sigma_rels", "update_every", "ema_models", "step"])
def test_attribute_without_an_effect_cannot_be_assigned(name, make):
    """nitrous-ema 0.0.1 and ema-pytorch read theirs at each update; here the assignment would do nothing."""
    ema = make(Net())
    for each, assignable in (
        (ema, "frozen, checkpoint_folder, checkpoint_every_num_steps"),
        (ema.ema_models[0], "frozen"),
    ):
        with pytest.raises(
            AttributeError, match=rf"{type(each).__name__}\.{name} cannot be assigned.*: {assignable}\."
        ):
            setattr(each, name, 1)


def test_class_of_a_user_may_have_attributes_of_its_own(tmp_path):
    class Named(PostHocEMA):
        def __init__(self, model):
            super().__init__(model, checkpoint_folder=tmp_path / "ema")
            self.title = "mine"

    with Named(Net()) as ema:
        assert ema.title == "mine"


def test_repr_shows_profiles_step_and_snapshots(make, tmp_path):
    ema = make(Net(), checkpoint_every_num_steps=2, sigma_rels=(0.05, 0.1))
    train(ema, range(1, 6), t_delta=32)
    folder = tmp_path / "ema"
    shown = f"PostHocEMA(sigma_rels=(0.05, 0.1), step=5, t=160, 2 snapshots written to '{folder}'"
    assert repr(ema) == f"{shown})"
    assert repr(ema.ema_models[1]) == "KarrasEMA(sigma_rel=0.1, gamma=6.937, step=5)"
    ema.close(TIMEOUT_SECONDS)
    assert repr(ema) == f"{shown}, closed)"
    assert repr(KarrasEMA(Net(), gamma=7.0)) == "KarrasEMA(sigma_rel=0.09938, gamma=7, step=0)"


@pytest.mark.parametrize("cls", CLASSES)
def test_lazy_module_that_has_not_run_is_named(cls, tmp_path):
    with pytest.raises(UntrackableModelError, match=r"'0\.weight' is uninitialized\. Run one"):
        cls(nn.Sequential(nn.LazyLinear(3)), checkpoint_folder=tmp_path / "ema")


@pytest.mark.parametrize("cls", CLASSES)
def test_ema_may_be_made_in_inference_mode(cls, make):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.inference_mode():
        ema = make(model, cls, checkpoint_every_num_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(4):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        ema.update()
    ema.flush(TIMEOUT_SECONDS)
    assert [each.step for each in ema.snapshots.snapshots()] == [2, 4]
