from __future__ import annotations

import inspect

import numpy as np
import pytest
from torch import nn

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema.errors import SnapshotNotFound

KINDS = pytest.mark.parametrize("kind", [PostHocEMA, AsyncPostHocEMA])


@KINDS
@pytest.mark.parametrize("length", [0.07, np.float32(0.25), 0.2886])
def test_length_by_position_is_refused_and_the_keyword_named(tmp_path, kind, length):
    ema = kind(nn.Linear(2, 2), checkpoint_folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"^gamma is .*passed by position.*Pass sigma_rel=.* if it is the length, or gamma="
    ):
        ema.synthesize_ema_model(length)


@KINDS
@pytest.mark.parametrize(("args", "kwargs"), [((16.97,), {}), ((0.3,), {}), ((), {"gamma": 0.07}), ((None, 0.07), {})])
def test_exponents_and_keywords_are_taken(tmp_path, kind, args, kwargs):
    with pytest.raises(SnapshotNotFound):
        kind(nn.Linear(2, 2), checkpoint_folder=tmp_path).synthesize_ema_model(*args, **kwargs)


@KINDS
@pytest.mark.parametrize("lengths", [(0.05, 0.1), [0.28], np.array([0.05, 0.1])])
def test_order_of_ema_pytorch_is_refused_and_the_keyword_named(tmp_path, kind, lengths):
    with pytest.raises(ValueError, match=r"^gammas is .*passed by position.*Pass sigma_rels=.* or gammas="):
        kind(nn.Linear(2, 2), None, lengths, checkpoint_folder=tmp_path)
    assert not list(tmp_path.iterdir())


@KINDS
def test_exponents_by_position_are_tracked(tmp_path, kind):
    assert kind(nn.Linear(2, 2), None, (16.97, 6.94), checkpoint_folder=tmp_path).gammas == (16.97, 6.94)
    assert kind(nn.Linear(2, 2), gammas=(0.1, 6.94), checkpoint_folder=tmp_path).gammas == (0.1, 6.94)


@KINDS
def test_signatures_are_those_that_are_written(kind):
    assert list(inspect.signature(kind.synthesize_ema_model).parameters)[:4] == ["self", "gamma", "sigma_rel", "step"]
    assert list(inspect.signature(kind).parameters)[:3] == ["model", "sigma_rels", "gammas"]
