"""Which tensors are averaged, copied or skipped, and what they are called."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from nitrous_ema import PostHocEMA
from nitrous_ema.averaging.model.live_tensors import StructureCheck
from nitrous_ema.averaging.model.tracking import (
    TrackingPolicy,
    canonical_tensors,
    track,
    unwrap,
    without_wrappers,
    writable_view,
)
from nitrous_ema.errors import NitrousWarning, UntrackableModelError
from tests.support.models import Net, Tied

FILTERS = ("param_or_buffer_names_no_ema", "ignore_names", "ignore_startswith_names")


def roles(model: nn.Module, **policy) -> dict[str, str]:
    return {tensor.name: tensor.role for tensor in track(model, TrackingPolicy(**policy))}


def names(model: nn.Module) -> list[str]:
    return [tensor.name for tensor in track(model)]


class OfOneTensor(nn.Module):
    def __init__(self, tensor: torch.Tensor, *, buffer: bool = False) -> None:
        super().__init__()
        self.fine = nn.Linear(1, 1)
        if buffer:
            self.register_buffer("odd", tensor)
        else:
            self.odd = nn.Parameter(tensor, requires_grad=False)


# ---- roles


def test_parameters_and_floating_buffers_are_averaged_and_integer_buffers_copied():
    found = roles(Net())
    assert found.pop("norm.num_batches_tracked") == "copied"
    assert set(found.values()) == {"averaged"}
    assert {"norm.running_mean", "norm.running_var", "conv.weight"} <= set(found)


def test_names_are_the_keys_of_the_state_dict_in_its_order():
    model = Net()
    assert names(model) == list(model.state_dict())


def test_buffer_that_is_not_saved_is_skipped_unless_it_is_named():
    model = nn.Linear(2, 2)
    model.register_buffer("cache", torch.ones(3), persistent=False)
    tracked = track(model, TrackingPolicy(buffers="average"))
    (cache,) = [tensor for tensor in tracked if tensor.name == "cache"]
    assert (cache.role, cache.persistent) == ("skipped", False)
    assert roles(model, param_or_buffer_names_no_ema=["cache"])["cache"] == "copied"


def test_buffer_that_is_saved_under_one_of_its_names_is_averaged():
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    shared = torch.ones(2)
    model[0].register_buffer("cache", shared, persistent=False)
    model[1].register_buffer("cache", shared)
    (cache,) = [tensor for tensor in track(model, TrackingPolicy(buffers="average")) if "1.cache" in tensor.keys]
    assert (cache.role, cache.persistent, cache.keys) == ("averaged", True, ("1.cache",))


def test_buffer_with_infinities_is_copied_and_told():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    with pytest.warns(NitrousWarning, match="'mask' holds inf or nan"):
        assert roles(model, buffers="average")["mask"] == "copied"
    assert roles(model)["mask"] == "copied"  # without a warning: its average is not asked for


class Buffers(nn.Module):
    """Running statistics, and buffers whose averages mean nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("cache", torch.ones(3), persistent=False)
        prune.random_unstructured(self.linear, "weight", amount=0.5)


@pytest.mark.parametrize(
    ("buffers", "averaged"),
    [
        ("auto", {"norm.running_mean", "norm.running_var"}),
        ("average", {"norm.running_mean", "norm.running_var", "scale", "linear.weight_mask"}),
        ("copy", set()),
        (["scale"], {"scale"}),
        (lambda name: name.startswith("norm."), {"norm.running_mean", "norm.running_var"}),
    ],
)
def test_buffers_are_averaged_as_requested(buffers, averaged):
    found = roles(Buffers(), buffers=buffers)
    parameters = {"linear.weight_orig", "linear.bias", "norm.weight", "norm.bias"}
    assert {name for name, role in found.items() if role == "averaged"} == parameters | averaged
    assert found.pop("cache") == "skipped"
    assert set(found.values()) == {"averaged", "copied"}


def test_filters_overrule_the_request_for_buffers():
    found = roles(
        Buffers(), buffers="average", param_or_buffer_names_no_ema=["scale"], ignore_names=["norm.running_var"]
    )
    assert (found["scale"], found["norm.running_var"]) == ("copied", "skipped")


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ("all", ValueError, r"buffers is 'all'; expected 'auto', 'average', 'copy'"),
        (None, TypeError, "buffers is None"),
        (True, TypeError, "buffers is True"),
        (["shift"], ValueError, "buffers: 'shift' matches no tensor of the model"),
        ([3], TypeError, "buffers has 3"),
    ],
)
def test_invalid_request_for_buffers_is_refused(buffers, error, message):
    with pytest.raises(error, match=message):
        roles(Buffers(), buffers=buffers)


@pytest.mark.parametrize(
    ("argument", "role"), [("param_or_buffer_names_no_ema", "copied"), ("ignore_names", "skipped")]
)
@pytest.mark.parametrize("given", [["head.bias"], {"head.bias"}, ("head.bias",), lambda name: name == "head.bias"])
def test_filter_takes_names_or_a_function_of_a_name(argument, role, given):
    found = roles(Net(), **{argument: given})
    assert found.pop("head.bias") == role
    assert "averaged" in found.values()
    assert role != "skipped" or "skipped" not in found.values()


def test_prefix_skips_all_that_begins_with_it():
    assert {name for name, role in roles(Net(), ignore_startswith_names=["norm."]).items() if role == "skipped"} == {
        name for name in Net().state_dict() if name.startswith("norm.")
    }


def test_skipping_wins_over_copying():
    found = roles(Net(), param_or_buffer_names_no_ema=["head.bias"], ignore_names=["head.bias"])
    assert found["head.bias"] == "skipped"


@pytest.mark.parametrize("argument", FILTERS)
@pytest.mark.parametrize("given", [["hed.bias"], lambda name: False])
def test_filter_that_matches_nothing_is_an_error(argument, given):
    if argument == "ignore_startswith_names" and callable(given):
        return
    with pytest.raises(ValueError, match=r"matches no"):
        roles(Net(), **{argument: given})


def test_filter_that_matches_nothing_names_the_nearest_names():
    with pytest.raises(ValueError, match=r"ignore_names: 'hed.bias' matches no tensor .* 'head.bias'"):
        roles(Net(), ignore_names=["hed.bias"])


@pytest.mark.parametrize("argument", FILTERS)
def test_filter_that_is_one_string_is_an_error(argument):
    with pytest.raises(TypeError, match=r"expected a collection of names: \['head.bias'\]"):
        TrackingPolicy(**{argument: "head.bias"})


# ---- names


def test_tied_tensor_is_one_with_all_its_keys():
    (tensor,) = track(Tied())
    assert tensor.keys == ("embed.weight", "out.weight")
    assert tensor.name == "embed.weight"


def test_module_used_twice_is_tracked_once_under_both_names():
    layer = nn.Linear(2, 2)
    assert [tensor.keys for tensor in track(nn.ModuleList([layer, layer]))] == [
        ("0.weight", "1.weight"),
        ("0.bias", "1.bias"),
    ]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(model)


@pytest.mark.parametrize("wrap", [compiled, checkpointed, nn.DataParallel])
def test_wrapper_leaves_the_names(wrap):
    model = Net()
    expected = list(model.state_dict())
    wrapped = wrap(model)
    assert names(wrapped) == expected
    assert unwrap(wrapped) is model


def test_wrappers_leave_the_names_at_any_depth():
    model = Net()
    expected = list(model.state_dict())
    model.norm = checkpointed(model.norm)
    model.head = compiled(model.head)
    assert names(compiled(nn.DataParallel(model))) == expected


def test_submodule_of_the_user_called_module_keeps_its_name():
    class User(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self._orig_mod = nn.Linear(2, 2)

    expected = ["module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias"]
    assert names(User()) == expected
    assert names(nn.DataParallel(User())) == expected


def test_filters_understand_names_as_the_wrapped_model_has_them():
    found = roles(nn.DataParallel(Net()), ignore_names=["module.head.bias"], ignore_startswith_names=["module.norm."])
    assert {name for name, role in found.items() if role == "skipped"} >= {"head.bias", "norm.weight"}


def test_canonical_tensors_have_the_keys_of_the_unwrapped_state_dict():
    model = Tied()
    model.register_buffer("cache", torch.ones(1), persistent=False)
    wrapped = nn.DataParallel(model)
    assert list(canonical_tensors(wrapped)) == list(model.state_dict())
    assert canonical_tensors(wrapped)["out.weight"] is model.embed.weight
    assert "cache" in canonical_tensors(wrapped, persistent_only=False)


def test_name_without_wrappers_loses_every_part_that_a_wrapper_could_have_added():
    assert without_wrappers("module._orig_mod.layer._checkpoint_wrapped_module.weight") == "layer.weight"
    assert without_wrappers("modules.weight") == "modules.weight"


# ---- what cannot be tracked


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


class Unknown(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


ODD = {
    "meta": (lambda: torch.ones(2, device="meta"), "meta device"),
    "quantized": (quantized, "unquantized"),
    "sparse": (lambda: torch.ones(2, 2).to_sparse(), "layout"),
    "complex128": (lambda: torch.ones(2, dtype=torch.complex128), "complex128"),
    "complex32": (lambda: torch.ones(2, dtype=torch.complex32), "complex32"),
    "conjugated": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
    "subclass": (lambda: torch.Tensor._make_subclass(Unknown, torch.ones(2)), "Unknown, a tensor subclass"),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that some of these types are not finished
@pytest.mark.parametrize("kind", ODD)
def test_tensor_that_cannot_be_averaged_is_refused_by_name(kind):
    make, message = ODD[kind]
    with pytest.raises(UntrackableModelError, match=message) as error:
        track(OfOneTensor(make(), buffer=kind == "subclass"))
    assert error.value.name == "odd"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["meta", "quantized", "complex128"])
def test_tensor_that_cannot_be_averaged_may_be_skipped(kind):
    assert roles(OfOneTensor(ODD[kind][0]()), ignore_names=["odd"])["odd"] == "skipped"


def test_uninitialized_lazy_parameter_is_refused_by_name():
    with pytest.raises(UntrackableModelError, match=r"'weight' is uninitialized. Run one forward"):
        track(nn.LazyLinear(3))


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Module()])
def test_model_without_weights_is_refused(model):
    with pytest.raises(UntrackableModelError, match="no tensor to average"):
        track(model)


def test_model_that_is_filtered_empty_is_refused():
    with pytest.raises(UntrackableModelError, match="no tensor to average"):
        track(nn.Linear(2, 2), TrackingPolicy(ignore_names=["weight", "bias"]))


# ---- while training


def test_tensor_is_found_again_after_it_was_replaced():
    model = nn.Linear(2, 2)
    weight, _ = track(model)
    model.weight = nn.Parameter(torch.ones(2, 2))
    assert weight.live() is model.weight


@pytest.mark.parametrize("new", [None, nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 2).double())])
def test_tensor_that_is_gone_or_another_is_refused(new):
    model = nn.Linear(2, 2)
    weight, _ = track(model)
    model.weight = new
    with pytest.raises(UntrackableModelError, match=r"'weight' is .* now but was torch.float32 of shape \(2, 2\)"):
        weight.live()


def test_replaced_submodule_is_noticed():
    model = Net()
    structure = StructureCheck(model, track(model))
    structure.check()
    model.head = nn.Linear(4, 3)
    with pytest.raises(UntrackableModelError, match=r"the submodule that holds 'head.weight' was replaced"):
        structure.check()


def test_tensor_that_was_added_is_reported_once():
    model = Net()
    structure = StructureCheck(model, track(model))
    model.head.register_parameter("scale", nn.Parameter(torch.ones(1)))
    message = r"tensors added to the model since tracking began are not averaged: 'head.scale'\. Make a new EMA"
    with pytest.warns(NitrousWarning, match=message):
        structure.check()
    structure.check()


def test_wrapping_a_submodule_is_no_replacement():
    model = Net()
    structure = StructureCheck(model, track(model))
    model.head = checkpointed(model.head)
    structure.check()
    model.head = nn.Linear(4, 3)  # still noticed after the first change
    with pytest.raises(UntrackableModelError):
        structure.check()


def test_one_element_of_each_repeated_one_is_written_of_an_expanded_tensor():
    rows = torch.zeros(1, 3)
    live, value = writable_view(rows.expand(4, 3), torch.ones(4, 3))
    live.copy_(value)
    assert rows.tolist() == [[1.0, 1.0, 1.0]]
    plain = torch.zeros(2, 3)
    assert writable_view(plain, plain)[0] is plain


@pytest.mark.parametrize("argument", ["ignore_names", "ignore_startswith_names", "param_or_buffer_names_no_ema"])
def test_names_may_come_from_an_iterator(tmp_path, argument):
    ema = PostHocEMA(nn.Linear(3, 2), checkpoint_folder=tmp_path, **{argument: (name for name in ["bias"])})
    assert [tensor.role == "averaged" for tensor in ema._engine.flat_buffers.tracked] == [True, False]


@pytest.mark.parametrize("argument", ["ignore_names", "ignore_startswith_names", "param_or_buffer_names_no_ema"])
def test_name_that_is_no_string_is_named(tmp_path, argument):
    with pytest.raises(TypeError, match=f"{argument} has 3; expected"):
        PostHocEMA(nn.Linear(3, 2), checkpoint_folder=tmp_path, **{argument: [3]})
