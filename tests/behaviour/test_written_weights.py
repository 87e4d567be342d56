"""Weights are written by other code than the trainer's optimizer: which calls report it, and which writers wait."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousError, NitrousWarning, PostHocEMA
from nitrous_ema.errors import UnsafeReadError
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    Gate,
    GatedLane,
    LateLane,
    assert_same_bits,
    averages_of,
    backward,
    make_batches,
    make_model,
    use_lane,
)
from tests.support.guarded_training import rigs, sgd


def trained(tmp_path, **options):
    """Return a model, its EMA after two updates, and its optimizer; the lane may still be reading the weights."""
    model = make_model()
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, **options)
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.step()
        ema.update()
    return model, ema, optimizer


@pytest.mark.thread_lane
@pytest.mark.parametrize("call", ["checkpoint", "flush", "state_dict", "close"])
def test_write_after_the_last_update_is_reported(tmp_path, call):
    model, ema, _ = trained(tmp_path, read="guarded")
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(UnsafeReadError, match=r"'0.bias' was written"):
        getattr(ema, call)()
    ema.close(TIMEOUT_SECONDS)


@pytest.mark.thread_lane
def test_refused_update_raises_a_violation_once(tmp_path):
    model, ema, _ = trained(tmp_path, read="guarded")
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(UnsafeReadError):
        ema.update()
    ema.update()
    ema.close(TIMEOUT_SECONDS)


def test_weights_may_be_written_after_close(tmp_path):
    _, ema, optimizer = trained(tmp_path, read="guarded")
    ema.close(TIMEOUT_SECONDS)
    optimizer.step()
    ema.fence()
    ema.state_dict()


@pytest.mark.parametrize("how", ["average_parameters", "copy_params_from_ema_to_model"])
def test_average_in_the_model_waits_for_every_ema_of_it(tmp_path, monkeypatch, how):
    """Hazard: one EMA writes weights that another one still reads."""

    def averages(cls, lanes):
        model = make_model()
        emas = []
        for name in "ab":
            if lanes:
                use_lane(monkeypatch, LateLane())
            emas.append(cls(model, checkpoint_folder=tmp_path / name, update_every=1))
        optimizer = sgd(model)
        for _ in range(3):
            optimizer.step()
            for ema in emas:
                ema.update()
        if how == "average_parameters":
            with emas[0].average_parameters():
                if lanes:
                    emas[1].flush()  # reads that are still pending run now
        else:
            emas[0].copy_params_from_ema_to_model()
        obtained = averages_of(emas[1])
        for ema in emas:
            ema.close(TIMEOUT_SECONDS)
        return obtained

    assert_same_bits(averages(AsyncPostHocEMA, lanes=True), averages(PostHocEMA, lanes=False))


def test_update_refuses_the_average_of_another_ema(tmp_path):
    model = make_model()
    one, other = (PostHocEMA(model, checkpoint_folder=tmp_path / name, update_every=1) for name in "ab")
    for ema in (one, other):
        ema.update()
    with one.average_parameters():
        with pytest.raises(NitrousError, match="another EMA"):
            other.update()
        with other.average_parameters():
            pass
        with pytest.raises(NitrousError, match="another EMA"):
            other.update()
    other.update()
    assert other.step == 2


def test_pickled_model_needs_torch_only():
    with rigs() as make:
        rig = make()
        assert b"nitrous" not in pickle.dumps(rig.model)


def test_weights_that_are_averaged_inline_may_be_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("nitrous_ema.async_.ema._FEW_ELEMENTS", 1 << 16)
    model, ema, _ = trained(tmp_path, read="guarded")
    with torch.no_grad():
        model[0].bias.add_(1)
    ema.update()
    ema.close(TIMEOUT_SECONDS)


def test_optimizer_of_parameters_that_were_replaced_waits(tmp_path, monkeypatch):
    def averages(cls, name):
        model = make_model()
        ema = cls(model, checkpoint_folder=tmp_path / name, update_every=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step, batch in enumerate(make_batches(6, model)):
            if step == 2:
                for module in model.modules():
                    for key, p in list(module.named_parameters(recurse=False)):
                        setattr(module, key, nn.Parameter(p.detach().clone()))
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            backward(model, batch)
            optimizer.step()
            ema.update()
        obtained = averages_of(ema)
        ema.close(TIMEOUT_SECONDS)
        return obtained

    expected = averages(PostHocEMA, "a")
    use_lane(monkeypatch, LateLane())
    assert_same_bits(averages(AsyncPostHocEMA, "b"), expected)


@pytest.mark.parametrize("when", ["construction", "later"])
def test_weights_may_be_written_after_they_were_copied_to_the_averages(tmp_path, monkeypatch, when):
    use_lane(monkeypatch, LateLane())
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, read="guarded")
    if when == "later":
        ema.copy_params_from_model_to_ema()
    for p in model.parameters():
        p.data.zero_()
    averages = averages_of(ema)
    ema.close(TIMEOUT_SECONDS)
    for name, value in before.items():
        assert torch.equal(averages[f"ema_models.0.ema_model.{name}"], value)


def test_average_that_is_put_into_the_model_is_no_violation(tmp_path):
    model = make_model()
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, read="guarded")
    optimizer = sgd(model)
    for _ in range(3):
        optimizer.step()
        ema.update()
    ema.copy_params_from_ema_to_model()
    ema.update()
    ema.close(TIMEOUT_SECONDS)


@pytest.mark.thread_lane
def test_no_writer_waits_once_parameters_are_copied(tmp_path, monkeypatch):
    gate = Gate(is_open=True)
    use_lane(monkeypatch, GatedLane(run=gate))
    model, ema, optimizer = trained(tmp_path, read="auto")
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.warns(NitrousWarning, match="copies the parameters in every update"):
        ema.update()
    gate.shut()
    ema.update()
    step = threading.Thread(target=optimizer.step, daemon=True)
    step.start()
    step.join(TIMEOUT_SECONDS)
    waits = step.is_alive()
    gate.open()
    assert not waits
    ema.close(TIMEOUT_SECONDS)
