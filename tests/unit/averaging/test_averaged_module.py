"""The module that shows an average."""

from __future__ import annotations

import copy
import functools
import pickle
import pickletools
import types

import pytest
import torch
from torch import nn

from nitrous_ema import KarrasEMA, PostHocEMA
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


# ---- copies and pickles


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_module_can_be_copied_and_pickled_as_a_snapshot_of_now(again):
    model = Net()
    ema = averaged(model)
    other = again(ema.ema_model)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    set_weights(model, 7)
    ema.update()
    other(IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match="model of averages"):
        other.train()


def test_saved_modules_find_the_names_that_their_pickles_hold():
    """The bytes are those that pickle writes for the two objects of ours in a saved module."""
    hook = pickle.loads(b"cnitrous_ema.averaging.averaged_module\n_BeforeForward\n(tR.")
    train = pickle.loads(b"cnitrous_ema.averaging.averaged_module\n_eval_only\n.")
    assert hook(nn.Identity(), ()) is None
    assert not train(nn.Identity(), False).training
    with pytest.raises(RuntimeError, match="model of averages"):
        train(nn.Identity())
    globals_of_the_pickle = {
        argument
        for _, argument, _ in pickletools.genops(pickle.dumps(averaged(nn.Linear(1, 1)).ema_model, protocol=2))
        if isinstance(argument, str) and argument.startswith("nitrous_ema")
    }
    home = "nitrous_ema.averaging.averaged_module"
    assert globals_of_the_pickle == {f"{home} _BeforeForward", f"{home} _eval_only"}


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
