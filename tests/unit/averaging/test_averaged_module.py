"""The module that shows an average."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import types

import pytest
import torch
from torch import nn

from nitrous_ema import KarrasEMA, NitrousError, PostHocEMA
from nitrous_ema.errors import UncopyableModelError, UntrackableModelError
from tests.support.memory_orders import Orders
from tests.support.models import Net, Tied, Vector, set_weights, uncopyable_models

IMAGES = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def averaged(model: nn.Module, updates: int = 3, **kwargs) -> KarrasEMA:
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, **kwargs)
    for seed in range(updates):
        set_weights(model, seed)
        ema.update()
    return ema


def assert_shows_the_average(ema: KarrasEMA) -> None:
    """Every tensor of the module is the average that the state_dict has, in the model's type."""
    shown = ema.ema_model.state_dict()
    saved = {key.removeprefix("ema_model."): value for key, value in ema.state_dict().items()}
    saved.pop("_extra_state")
    assert set(shown) == set(saved)
    for name, value in shown.items():
        assert torch.equal(value, saved[name].to(value.dtype)), name


@pytest.mark.parametrize("build", [Net, Tied, Orders, lambda: Net().bfloat16(), lambda: Net().double()])
def test_its_weights_are_the_average_in_the_models_types(build):
    model = build()
    ema = averaged(model)
    assert_shows_the_average(ema)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in ema.ema_model.state_dict().items()} == dtypes
    assert isinstance(ema.ema_model, type(model))


@pytest.mark.parametrize("build", [Net, lambda: Net().bfloat16()])
def test_it_follows_later_updates(build):
    model = build()
    ema = averaged(model)
    shown = ema.ema_model
    set_weights(model, 9)
    ema.update()
    shown(IMAGES.to(model.head.weight.dtype))  # by a forward alone, without asking for ema_model again
    assert_shows_the_average(ema)
    assert ema.ema_model is shown


def test_float32_averages_are_shown_without_a_copy():
    ema = averaged(Net())
    places = {name: value.data_ptr() for name, value in ema.state_dict().items() if name != "_extra_state"}
    assert {f"ema_model.{name}": v.data_ptr() for name, v in ema.ema_model.state_dict().items()} == places


WRITES = {
    "update": lambda ema, state: ema.update(),
    "load_state_dict": lambda ema, state: ema.load_state_dict(state),
    "copy_params_from_model_to_ema": lambda ema, state: ema.copy_params_from_model_to_ema(),
}


@pytest.mark.parametrize("given", [None, Net])
@pytest.mark.parametrize("write", WRITES)
def test_backward_through_averages_that_were_written_since_the_forward_raises(write, given):
    ema = averaged(Net(), ema_model=given)
    state = copy.deepcopy(ema.state_dict())
    images = IMAGES.clone().requires_grad_()
    loss = ema.ema_model(images).sum()
    WRITES[write](ema, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    ema.ema_model(images).sum().backward()


def test_backward_through_a_state_that_was_written_since_the_forward_raises():
    ema = averaged(Net())
    tensors = {name.removeprefix("ema_model."): value for name, value in ema.state_dict().items()}
    del tensors["_extra_state"]
    loss = torch.func.functional_call(Net().eval(), tensors, IMAGES.clone().requires_grad_()).sum()
    ema.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_through_a_cast_copy_has_the_gradients_of_its_forward():
    """An update writes the average, and the copy in the model's type only at the next use."""
    model = nn.Linear(3, 1).bfloat16()
    ema = averaged(model)
    x = torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True)
    shown = ema.ema_model
    weight, loss = shown.weight.clone(), shown(x).sum()
    set_weights(model, 9)
    ema.update()
    loss.backward()
    assert torch.equal(x.grad, weight)


def test_tied_weights_are_tied_in_it():
    shown = averaged(Tied()).ema_model
    assert shown.embed.weight is shown.out.weight


def test_it_needs_no_gradients_and_is_in_eval_mode():
    model = Net().train()
    shown = averaged(model).ema_model
    assert not any(parameter.requires_grad for parameter in shown.parameters())
    assert not any(module.training for module in shown.modules())
    assert model.training


def test_train_mode_is_refused():
    shown = averaged(Net()).ema_model
    with pytest.raises(RuntimeError, match=r"train\(\) on a model of averages. .*Train the online model"):
        shown.train()
    assert shown.eval() is shown
    assert shown.train(False) is shown


def test_forward_with_a_submodule_in_train_mode_is_refused_and_nothing_is_written():
    ema = averaged(Net())
    shown = ema.ema_model
    before = shown.norm.running_mean.clone()
    shown.norm.train()
    with pytest.raises(RuntimeError, match="'norm' was put in train mode"):
        shown(IMAGES)
    assert torch.equal(shown.norm.running_mean, before)


def test_skipped_tensors_are_the_online_models_own():
    model = Net()
    shown = averaged(model, ignore_names=["head.bias"]).ema_model
    assert shown.head.bias is model.head.bias


def test_buffers_that_are_not_saved_are_there():
    model = Vector(3)
    model.register_buffer("cache", torch.ones(2), persistent=False)
    ema = averaged(model)
    assert torch.equal(ema.ema_model.cache, model.cache)
    assert ema.ema_model.cache is not model.cache


def test_attributes_of_parameters_are_copied():
    model = Vector(3)
    model.weight.is_sharded_somehow = True
    assert averaged(model).ema_model.weight.is_sharded_somehow


def test_online_model_is_not_copied_until_the_first_access(monkeypatch, tmp_path):
    """Nor at a checkpoint, for which nitrous-ema 0.0.1 made two copies of it per profile."""

    def refuse(*_):
        raise AssertionError("a copy of the model")

    model = Net()
    monkeypatch.setattr(copy, "deepcopy", refuse)
    ema = PostHocEMA(model, update_every=1, checkpoint_folder=tmp_path, checkpoint_every_num_steps=2)
    for _ in range(4):
        ema.update()
    ema.state_dict()
    assert len(ema.snapshots.snapshots()) == 2


# ---- models that cannot be copied


@pytest.mark.parametrize("build", uncopyable_models())
def test_model_that_cannot_be_copied_is_refused_by_name_and_averaged_all_the_same(build, tmp_path):
    model = build()
    ema = PostHocEMA(model, update_every=1, checkpoint_folder=tmp_path, checkpoint_every_num_steps=20)
    for seed in range(40):
        set_weights(model, seed)
        ema.update()
    with pytest.raises(UncopyableModelError, match="Pass ema_model=a function that builds the module"):
        _ = ema.ema_models[0].ema_model
    synthesized = ema.synthesize_ema_model(sigma_rel=0.08)
    with pytest.raises(UncopyableModelError):
        _ = synthesized.ema_model
    assert all(value.isfinite().all() for key, value in synthesized.state_dict().items() if key != "_extra_state")
    with ema.average_parameters():
        model(torch.ones(1, 3))


@pytest.mark.parametrize(("build", "name"), [*zip(uncopyable_models(), ["body.1", "", "1"], strict=True)])
def test_error_names_the_submodule_that_cannot_be_copied(build, name):
    with pytest.raises(UncopyableModelError) as error:
        _ = averaged(build()).ema_model
    assert error.value.name == name


def test_wrapped_method_over_the_online_layer_is_refused():
    """Replace forward as mixed-precision launchers do: by a bound method around the previous forward."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = model[1].forward

    @functools.wraps(before)
    def in_float32(self, x):
        return before(x).float()

    model[1].forward = types.MethodType(in_float32, model[1])
    with pytest.raises(UncopyableModelError, match="forward of '1' was replaced"):
        _ = averaged(model).ema_model


def test_patch_that_refers_to_no_module_is_copied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    factor = 2.0

    def doubled(self, x):
        return factor * nn.functional.linear(x, self.weight, self.bias)

    model[1].forward = types.MethodType(doubled, model[1])
    shown = averaged(model).ema_model
    x = torch.ones(1, 2)
    torch.testing.assert_close(shown(x), 2.0 * nn.functional.linear(shown[0](x), shown[1].weight, shown[1].bias))


def test_nested_wrappers_are_left_out_of_it():
    model = Net()
    model.head = torch.compile(model.head, backend="eager")
    ema = averaged(model)
    assert type(ema.ema_model.head) is nn.Linear
    assert ema.ema_model(IMAGES).shape == (2, 3)


def test_model_compiled_in_place_is_shown_uncompiled():
    model = Net().eval()
    model.compile(backend="eager")
    model(IMAGES)
    ema = averaged(model)
    expected = Net()
    expected.load_state_dict(ema.ema_model.state_dict())
    assert torch.equal(ema.ema_model(IMAGES), expected.eval()(IMAGES))


def test_model_that_owns_its_ema_can_be_shown():
    model = Net()
    model.ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    model.ema.update()
    assert model.ema.ema_model(IMAGES).shape == (2, 3)


# ---- a given module


@pytest.mark.parametrize("given", [Net, Net()])
def test_given_module_or_function_shows_the_average(given):
    model = Net()
    ema = averaged(model, ema_model=given)
    assert_shows_the_average(ema)
    if isinstance(given, nn.Module):
        assert ema.ema_model is given
    with pytest.raises(RuntimeError, match="model of averages"):
        ema.ema_model.train()


def test_given_function_serves_a_model_that_cannot_be_copied():
    build = uncopyable_models()[0]
    ema = averaged(build(), ema_model=build)
    assert_shows_the_average(ema)
    assert ema(torch.ones(1, 3)).shape == (1, 2)


@pytest.mark.filterwarnings("ignore:.*cannot be reconstructed accurately")  # from a handful of snapshots
def test_given_function_serves_every_profile_and_the_synthesized(tmp_path):
    build = uncopyable_models()[1]
    model = build()
    ema = PostHocEMA(model, update_every=1, checkpoint_folder=tmp_path, checkpoint_every_num_steps=30, ema_model=build)
    for seed in range(30):
        set_weights(model, seed)
        ema.update()
    shown = [view.ema_model for view in ema.ema_models] + [ema.synthesize_ema_model(sigma_rel=0.07).ema_model]
    assert len({id(module) for module in shown}) == 3


@pytest.mark.parametrize("given", [lambda: nn.Linear(2, 2), lambda: nn.Sequential(Net())])
def test_given_module_of_another_architecture_is_refused(given):
    with pytest.raises(UncopyableModelError, match="Build ema_model with the same architecture"):
        _ = averaged(Net(), ema_model=given).ema_model


def test_given_module_without_the_models_ties_is_refused():
    def untied() -> nn.Module:
        model = Tied()
        model.out.weight = nn.Parameter(model.out.weight.detach().clone())
        return model

    with pytest.raises(UncopyableModelError, match=r"'out.weight' and 'embed.weight' are one tensor in the online"):
        _ = averaged(Tied(), ema_model=untied).ema_model


# ---- casts and moves


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "there and back": lambda module: module.half().float(),
    "channels_last": lambda module: module.to(memory_format=torch.channels_last),
    "shared memory": lambda module: module.share_memory(),
    "one layer": lambda module: module.conv.half(),
}


@pytest.mark.parametrize("given", [None, Net])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_module_that_was_cast_or_moved_follows_its_average_in_its_new_type(cast, mode, given):
    model = Net()
    ema = averaged(model, ema_model=given)
    shown = ema.ema_model
    parameters, places = (
        [*shown.parameters()],
        [
            tensor.data_ptr()
            for tensor in ema.state_dict().values()
            if tensor is not None and isinstance(tensor, torch.Tensor)
        ],
    )
    with mode():
        CASTS[cast](shown)
    dtypes = [tensor.dtype for tensor in shown.state_dict().values()]
    for seed in (7, 8):
        set_weights(model, seed)
        ema.update()
        if seed == 7:  # by a forward of the module that is held
            shown.train(False)
            with contextlib.suppress(RuntimeError):  # layers of two types, in the case of one layer
                shown(IMAGES.to(shown.head.weight.dtype))
        else:
            assert ema.ema_model is shown
        assert_shows_the_average(ema)
    assert [tensor.dtype for tensor in shown.state_dict().values()] == dtypes
    assert all(map(operator.is_, shown.parameters(), parameters))
    assert [t.data_ptr() for t in ema.state_dict().values() if isinstance(t, torch.Tensor)] == places


def test_cast_parameter_is_given_memory_of_its_own_and_no_other_tensor_is_written():
    model = Net()
    ema = averaged(model)
    other = Net()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for parameter, of_other in zip(ema.ema_model.parameters(), other.parameters(), strict=True):
        parameter.data = of_other.data
    assert_shows_the_average(ema)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_update_between_forward_and_backward_of_a_cast_module_is_no_error():
    model = nn.Linear(3, 1)
    ema = averaged(model)
    shown = ema.ema_model.double()
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    loss = shown(x).sum()
    weight = shown.weight.clone()
    ema.update()
    loss.backward()
    assert torch.equal(x.grad, weight)


def test_memory_shared_with_other_processes_stays_shared():
    model = Net()
    ema = averaged(model)
    shown = ema.ema_model.share_memory()
    places = [parameter.data_ptr() for parameter in shown.parameters()]
    assert ema.ema_model.head.weight.is_shared()
    assert [parameter.data_ptr() for parameter in shown.parameters()] == places
    assert_shows_the_average(ema)


REPLACED = {
    "load_state_dict": lambda module: module.load_state_dict(Net().state_dict(), assign=True),
    "one parameter": lambda module: setattr(module.head, "weight", nn.Parameter(torch.zeros(3, 4))),
    "removed": lambda module: delattr(module.head, "bias"),
    "meta": lambda module: module.to("meta"),
    "shape": lambda module: setattr(module.head.weight, "data", torch.zeros(5, 4)),
}


@pytest.mark.parametrize("replace", REPLACED)
def test_replaced_tensors_are_an_error_and_nothing_is_written(replace):
    ema = averaged(Net())
    shown = ema.ema_model
    REPLACED[replace](shown)
    ema.update()
    before = copy.deepcopy(ema.state_dict())
    for use in (lambda: ema.ema_model, lambda: shown(IMAGES)):
        with pytest.raises(NitrousError, match=r"ema_model: .* was replaced .* copy.deepcopy\(ema_model\)"):
            use()
    torch.testing.assert_close(ema.state_dict()["ema_model.head.weight"], before["ema_model.head.weight"])


@pytest.mark.parametrize("names", [["head.weight"], ["head.weight", "norm.running_mean"]])
def test_functional_call_of_the_module_uses_the_tensors_of_the_call(names):
    ema = averaged(Net())
    shown = ema.ema_model
    tensors = {name: torch.full_like(value, 0.5) for name, value in shown.state_dict().items() if name in names}
    expected = copy.deepcopy(shown)
    expected.load_state_dict(tensors, strict=False)
    output = torch.func.functional_call(shown, dict(tensors), IMAGES)
    torch.testing.assert_close(output, expected(IMAGES))
    assert all((value == 0.5).all() for value in tensors.values())
    shown(IMAGES)
    assert_shows_the_average(ema)


# ---- skipped tensors


@pytest.mark.parametrize("given", [None, Net])
def test_skipped_tensors_that_are_not_shared_are_copies_that_follow_the_online_model(given):
    model = Net()
    ema = averaged(model, ignore_names=["head.bias", "norm.running_mean"], share_skipped=False, ema_model=given)
    shown = ema.ema_model
    assert shown.head.bias is not model.head.bias
    for change in (
        lambda: set_weights(model, 5),
        lambda: setattr(model.head, "bias", nn.Parameter(torch.full((3,), 4.0))),
        lambda: setattr(model.norm, "running_mean", torch.full((4,), 5.0)),
    ):
        change()
        shown(IMAGES)
        assert torch.equal(shown.head.bias, model.head.bias)
        assert torch.equal(shown.norm.running_mean, model.norm.running_mean)
    with torch.no_grad():
        shown.head.bias.zero_()
    assert model.head.bias.all()


# ---- computed attributes


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_model_whose_forward_left_computed_weights_can_be_shown(norm):
    model = nn.Sequential(norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    copied = [name for name, _ in model.named_buffers()]
    ema = averaged(model, param_or_buffer_names_no_ema=copied)
    x = torch.randn(5, 3)
    model(x).sum().backward()
    shown = ema.ema_model
    model(x)
    ema.update()
    with torch.no_grad(), ema.average_parameters():
        model.eval()
        expected = model(x)
    torch.testing.assert_close(ema.ema_model(x), expected)
    assert ema.ema_model is shown


# ---- lifetime


def test_module_outlives_its_ema():
    ema = averaged(Net())
    shown = ema.ema_model
    del ema
    assert shown(IMAGES).shape == (2, 3)


@pytest.mark.parametrize("replace", ["submodule", "shape"])
def test_changed_model_is_refused_by_the_next_update_and_nothing_counts(replace):
    model = Net()
    ema = averaged(model)
    if replace == "submodule":
        model.head = nn.Linear(4, 3)
    else:
        model.head.weight = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(UntrackableModelError, match=r"'head.weight'"):
        ema.update()
    assert ema.step == 3


def test_attribute_error_of_the_models_own_code_is_reported(tmp_path):
    """torch's modules replace an AttributeError inside a property by one about the property itself."""

    class Broken(nn.Linear):
        def __setstate__(self, state):
            raise AttributeError("'Broken' object has no attribute 'cache'")

    ema = PostHocEMA(Broken(2, 2), checkpoint_folder=tmp_path, update_every=1)
    ema.update()
    with pytest.raises(NitrousError, match="cache"):
        _ = ema.ema_models[0].ema_model
