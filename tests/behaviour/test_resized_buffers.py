"""Buffers that ``state_dict()`` saves and that get another shape in training, as those of quantization observers do."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, KarrasEMA, PostHocEMA, load_average
from nitrous_ema.async_.synthesize_worker import launch
from nitrous_ema.errors import NitrousWarning, UntrackableModelError
from tests.support.fakes import TIMEOUT_SECONDS


class Observed(nn.Module):
    """A model with an observer of each channel, which is empty until the first forward (as torch.ao's are).

    Args:
        in_place: Resize the buffer, or replace it by another tensor.
    """

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # another copied tensor, which stays
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, x):
        y = self.linear(x)
        largest = y.detach().abs().amax(0)
        if self.in_place and self.largest.numel() == 0:
            self.largest.resize_(8).zero_()
        if self.largest.numel() == 0:
            self.largest = torch.zeros(8)
        self.largest.copy_(torch.maximum(self.largest, largest))
        self.count += 1
        return y


def train(model, ema, steps):
    """Train, and return copies of the buffer after each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        ema.update()
        seen.append(model.largest.clone())
    return seen


def options(tmp_path, **more):
    return {"update_every": 1, "checkpoint_every_num_steps": 1, "checkpoint_folder": tmp_path / "ema", **more}


@pytest.mark.parametrize("in_place", [True, False], ids=["resized in place", "replaced"])
@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_buffer_may_grow_in_training(cls, in_place, tmp_path):
    torch.manual_seed(0)
    model = Observed(in_place)
    with cls(model, **options(tmp_path)) as ema:
        averaged = ema.ema_models[0].ema_model
        ema.update()  # before the first forward
        seen = [torch.zeros(0), *train(model, ema, 4)]
        assert torch.equal(ema.ema_models[0].ema_model.largest, seen[-1])
        assert ema.ema_models[0].ema_model is averaged
        ema.flush(TIMEOUT_SECONDS)
        for snapshot, expected in zip(ema.snapshots.snapshots(), seen, strict=True):
            stored = safetensors.torch.load_file(snapshot.path)
            assert torch.equal(stored["model.largest"], expected)
            assert stored["model.count"] == snapshot.step - 1
        synthesized = ema.synthesize_ema_model(sigma_rel=0.1).ema_model
        assert torch.equal(synthesized.largest, seen[-1])
        with pytest.warns(NitrousWarning, match="first update"):
            synthesized = ema.synthesize_ema_model(sigma_rel=0.1, step=1).ema_model
        assert torch.equal(synthesized.largest, seen[0])
        weights = ema.synthesize_ema_model(sigma_rel=ema.sigma_rels[0]).ema_model.linear.weight
        torch.testing.assert_close(weights, ema.ema_models[0].ema_model.linear.weight, rtol=1e-5, atol=1e-6)
    (output,) = launch(tmp_path / "ema", sigma_rels=[0.1], out=tmp_path / "out").result(TIMEOUT_SECONDS)
    load_average(model, output.path)
    assert torch.equal(model.largest, seen[-1])


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_averages_are_those_of_a_model_without_the_buffer(cls, tmp_path):
    """The buffers that lie in memory beside it, and the averages, stay as they are."""
    results = []
    for keeps in (True, False):
        torch.manual_seed(0)
        model = Observed()
        if not keeps:
            model.largest.resize_(8).zero_()
        with cls(model, **options(tmp_path / str(keeps))) as ema:
            train(model, ema, 5)
            results.append(ema.state_dict())
    for key, value in results[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, results[1][key])


@pytest.mark.parametrize("in_place", [True, False], ids=["resized in place", "replaced"])
def test_forward_of_an_average_may_come_before_that_of_the_model(in_place):
    model = Observed(in_place)
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    averaged = ema.ema_model
    assert averaged(torch.ones(2, 8)).shape == (2, 8)
    assert ema.ema_model(torch.ones(2, 8)).shape == (2, 8)
    (expected,) = train(model, ema, 1)
    assert torch.equal(ema.ema_model.largest, expected)
    assert ema.ema_model is averaged


def test_template_may_have_the_shape_of_a_new_model():
    model = Observed()
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, ema_model=Observed)
    (expected,) = train(model, ema, 1)
    assert torch.equal(ema.ema_model.largest, expected)


def test_cast_average_follows():
    model = Observed()
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    averaged = ema.ema_model.double()
    (expected,) = train(model, ema, 1)
    assert averaged is ema.ema_model
    assert torch.equal(averaged.largest, expected.double())


@pytest.mark.parametrize("has_run", [True, False], ids=["model has run", "model is new"])
@pytest.mark.parametrize("way", ["load_state_dict", "restore"])
@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_resumed_training_has_the_buffer_of_the_state(cls, way, has_run, tmp_path):
    model = Observed()
    with cls(model, **options(tmp_path)) as ema:
        *_, expected = train(model, ema, 3)
        state = {key: value.clone() if torch.is_tensor(value) else value for key, value in ema.state_dict().items()}
    model = Observed()
    if has_run:
        model(torch.randn(4, 8))
    with cls(model, **options(tmp_path)) as ema:
        if way == "restore":
            ema.restore()
        else:
            ema.load_state_dict(state)
        assert torch.equal(ema.ema_models[0].ema_model.largest, expected)
        later = train(model, ema, 2)
        assert torch.equal(ema.ema_models[0].ema_model.largest, later[-1])
        ema.flush(TIMEOUT_SECONDS)
        assert [snapshot.step for snapshot in ema.snapshots.snapshots()] == [1, 2, 3, 4, 5]


def test_fresh_model_reads_a_finished_folder(tmp_path):
    model = Observed()
    with PostHocEMA(model, **options(tmp_path)) as ema:
        *_, expected = train(model, ema, 3)
    fresh = PostHocEMA(Observed(), **options(tmp_path))
    assert torch.equal(fresh.synthesize_ema_model(sigma_rel=0.1).ema_model.largest, expected)


def test_checkpoint_between_two_updates_has_the_buffer_of_the_last(tmp_path):
    model = Observed()
    with AsyncPostHocEMA(model, **options(tmp_path, checkpoint_every_num_steps="manual")) as ema:
        ema.update()
        model(torch.randn(4, 8))
        ema.checkpoint()
        ema.flush(TIMEOUT_SECONDS)
        assert safetensors.torch.load_file(ema.snapshots.get().path)["model.largest"].shape == (0,)


def test_parameter_may_not_change_its_shape():
    model = Observed()
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, param_or_buffer_names_no_ema=["linear.bias"])
    ema.update()
    model.linear.bias = nn.Parameter(torch.zeros(4))
    with pytest.raises(UntrackableModelError, match=r"'linear.bias' is .* of shape \(4,\) now"):
        ema.update()
