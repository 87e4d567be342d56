"""``average_parameters()``: an average in the online model, and the weights restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nitrous_ema import KarrasEMA, NitrousError, PostHocEMA
from nitrous_ema.errors import ClosedError
from tests.support.memory_orders import Orders
from tests.support.models import Net, Tied, set_weights


def averaged(model: nn.Module, **kwargs) -> KarrasEMA:
    """An EMA whose average is not the model's weights."""
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, **kwargs)
    for seed in range(3):
        set_weights(model, seed)
        ema.update()
    return ema


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("build", [Net, Tied, Orders])
def test_model_has_the_average_inside_and_its_weights_again_after(build):
    model = build()
    ema = averaged(model)
    before, average = values(model), {name: t.clone() for name, t in ema.ema_model.state_dict().items()}
    with ema.average_parameters():
        assert_same(values(model), average)
    assert_same(values(model), before)


def test_storages_stay_the_same():
    model = Net()
    ema = averaged(model)
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    with ema.average_parameters():
        assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_weights_come_back_after_any_exception(error):
    model = Net()
    ema = averaged(model)
    before = values(model)
    with pytest.raises(error), ema.average_parameters():
        raise error
    assert_same(values(model), before)
    ema.update()


REFUSED = {
    "update": lambda ema: ema.update(),
    "state_dict": lambda ema: ema.state_dict(),
    "load_state_dict": lambda ema: ema.load_state_dict({}),
    "copy_params_from_model_to_ema": lambda ema: ema.copy_params_from_model_to_ema(),
    "copy_params_from_ema_to_model": lambda ema: ema.copy_params_from_ema_to_model(),
    "a second swap": lambda ema: ema.average_parameters().__enter__(),
}


@pytest.mark.parametrize("call", REFUSED)
def test_calls_that_would_mix_weights_and_averages_are_refused_inside(call):
    model = Net()
    ema = averaged(model)
    before, inside = values(model), None
    with ema.average_parameters():
        inside = values(model)
        with pytest.raises(NitrousError, match=r"the model currently holds averaged weights. Leave the `with"):
            REFUSED[call](ema)
        assert_same(values(model), inside)
    assert_same(values(model), before)
    assert ema.step == 3
    ema.update()


def test_closing_inside_stays_closed_after():
    model = Net()
    ema = averaged(model)
    before = values(model)
    with ema.average_parameters():
        ema.close()
    assert_same(values(model), before)
    with pytest.raises(ClosedError):
        ema.update()


def test_gradients_and_optimizer_go_on_after():
    model = nn.Linear(2, 1)
    ema = averaged(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ema.average_parameters(), torch.no_grad():
        model(torch.ones(1, 2))
    model(torch.ones(1, 2)).sum().backward()
    before = model.bias.item()
    optimizer.step()
    assert model.bias.item() == pytest.approx(before - 0.1)


def test_ambient_inference_mode_makes_no_inference_tensor():
    model = Net().eval()
    ema = averaged(model)
    before = values(model)
    with torch.inference_mode(), ema.average_parameters():
        model(torch.zeros(1, 2, 4, 4))
    assert_same(values(model), before)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_bfloat16_weights_come_back_to_the_bit():
    model = Net().bfloat16()
    ema = averaged(model)
    before = values(model)
    with ema.average_parameters():
        assert model.head.weight.dtype == torch.bfloat16
        assert not torch.equal(model.head.weight, before["head.weight"])
    assert_same(values(model), before)


def test_frozen_part_made_in_inference_mode_is_swapped_too(tmp_path):
    with torch.inference_mode():
        frozen = nn.Linear(2, 2).requires_grad_(False)
    model = nn.Sequential(nn.Linear(3, 2), frozen, nn.Linear(2, 2))
    ema = PostHocEMA(model, checkpoint_folder=tmp_path, update_every=1)
    ema.update()
    with torch.no_grad():
        model[2].weight.add_(1)
    before = [tensor.clone() for tensor in model.parameters()]
    with ema.average_parameters():
        assert not torch.equal(model[2].weight, before[4])
    assert all(map(torch.equal, model.parameters(), before))
    ema.copy_params_from_ema_to_model()


@pytest.mark.parametrize("restore_buffers", [True, False])
def test_buffers_that_a_forward_changes_come_back_where_this_is_asked_for(restore_buffers):
    model = Net()
    model.register_buffer("cache", torch.ones(2), persistent=False)
    model.register_buffer("grown", torch.ones(2), persistent=False)
    ema = averaged(model)
    before, cache, grown = values(model), model.cache.clone(), model.grown
    with ema.average_parameters(restore_buffers=restore_buffers):
        torch.optim.swa_utils.update_bn([torch.randn(8, 2, 4, 4)], model)
        model.cache.zero_()
        model.grown = torch.zeros(5)
    changed = [name for name, value in values(model).items() if not torch.equal(value, before[name])]
    if restore_buffers:
        assert changed == []
        assert torch.equal(model.cache, cache)
        assert model.grown is grown
    else:
        assert changed == ["norm.num_batches_tracked"]


def test_average_of_one_profile_is_its_own(tmp_path):
    model = Net()
    ema = PostHocEMA(model, checkpoint_folder=tmp_path, update_every=1)
    for seed in range(5):
        set_weights(model, seed)
        ema.update()
    for view in ema.ema_models:
        expected = values(view.ema_model)
        with view.average_parameters():
            assert_same(values(model), expected)
    first = ema.ema_models[0]
    with pytest.raises(IndexError, match=r"expected 0 \(1 tracked profile\)"), first.average_parameters(1):
        pass
    ema.ema_models[0].copy_params_from_ema_to_model()
    assert_same(values(model), values(ema.ema_models[0].ema_model))
