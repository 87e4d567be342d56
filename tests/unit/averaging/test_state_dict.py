"""Saving and loading averages: the keys, which states load, and that a state that does not load changes nothing."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from nitrous_ema import KarrasEMA, NitrousWarning, PostHocEMA
from nitrous_ema.errors import NitrousError
from tests.support.memory_orders import Orders
from tests.support.models import Net, Tied, set_weights


def posthoc(model: nn.Module, folder, **kwargs) -> PostHocEMA:
    return PostHocEMA(
        model,
        **{"update_every": 2, "checkpoint_every_num_steps": "manual", "checkpoint_folder": folder, **kwargs},
    )


def train(ema: nn.Module, model: nn.Module, seeds: range, **kwargs) -> None:
    for seed in seeds:
        set_weights(model, seed)
        ema.update(**kwargs)


def tensors(state: dict) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same(one: dict, other: dict) -> None:
    assert set(one) == set(other)
    for key in one:
        assert torch.equal(one[key], other[key]), key


def parent_of(ema: nn.Module) -> nn.Module:
    parent = nn.Module()
    parent.inner = nn.Module()
    parent.inner.ema = ema
    return parent


@pytest.mark.parametrize("build", [Net, Tied, Orders, lambda: Net().bfloat16()])
def test_state_goes_through_a_file_and_comes_back_to_the_bit(build, tmp_path):
    model = build()
    ema = posthoc(model, tmp_path)
    train(ema, model, range(5))
    torch.save(ema.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = posthoc(build(), tmp_path)
    assert str(again.load_state_dict(saved)) == "<All keys matched successfully>"
    assert_same(tensors(again.state_dict()), tensors(ema.state_dict()))
    assert (again.step, again.t, again.initted) == (5, 5, True)


@pytest.mark.parametrize("calls", [0, 1, 4, 5])
def test_resumed_training_continues_to_the_bit(calls, tmp_path):
    model = Net()
    whole, first, second = (posthoc(model, tmp_path, update_every=3) for _ in range(3))
    train(whole, model, range(20), t_delta=2.5)
    train(first, model, range(calls), t_delta=2.5)
    second.load_state_dict(first.state_dict())
    train(second, model, range(calls, 20), t_delta=2.5)
    assert_same(tensors(second.state_dict()), tensors(whole.state_dict()))
    assert second.state_dict()["ema_models.0._extra_state"]["t"] == whole.t


def test_averages_are_saved_in_float32_whatever_the_models_type(tmp_path):
    model = Net().bfloat16()
    state = posthoc(model, tmp_path).state_dict()
    assert state["ema_models.0.ema_model.head.weight"].dtype == torch.float32


def test_tied_weights_are_saved_under_each_of_their_keys(tmp_path):
    state = posthoc(Tied(), tmp_path).state_dict()
    assert torch.equal(state["ema_models.1.ema_model.embed.weight"], state["ema_models.1.ema_model.out.weight"])


def test_skipped_tensors_and_buffers_that_are_not_saved_are_not_there(tmp_path):
    model = Net()
    model.register_buffer("cache", torch.ones(2), persistent=False)
    keys = posthoc(model, tmp_path, ignore_names=["head.bias"]).state_dict()
    assert not [key for key in keys if key.endswith(("cache", "head.bias"))]


@pytest.mark.parametrize("strict", [True, False])
def test_state_loads_as_part_of_the_users_module(strict, tmp_path):
    model = Net()
    ema = posthoc(model, tmp_path)
    train(ema, model, range(4))
    state = parent_of(ema).state_dict()
    assert all(key.startswith("inner.ema.ema_models.") for key in state)
    again = posthoc(Net(), tmp_path)
    parent_of(again).load_state_dict(state, strict=strict)
    assert_same(tensors(again.state_dict()), tensors(ema.state_dict()))
    assert again.step == 4


def test_karras_ema_loads_as_part_of_the_users_module():
    model = Net()
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    train(ema, model, range(4))
    again = KarrasEMA(Net(), sigma_rel=0.1, update_every=1)
    parent_of(again).load_state_dict(parent_of(ema).state_dict())
    assert_same(tensors(again.state_dict()), tensors(ema.state_dict()))


def test_state_of_one_profile_loads_into_a_karras_ema(tmp_path):
    """``ema_models[i]`` of nitrous-ema 0.0.1 is a KarrasEMA, whose state users have saved."""
    model = Net()
    ema = posthoc(model, tmp_path)
    train(ema, model, range(4))
    alone = KarrasEMA(Net(), sigma_rel=0.1, update_every=2)
    alone.load_state_dict(ema.ema_models[1].state_dict())
    assert_same(tensors(alone.state_dict()), tensors(ema.ema_models[1].state_dict()))


# ---- what does not fit


def changed(state: dict, kind: str) -> dict:
    state = dict(state)
    key = "ema_models.1.ema_model.head.weight"
    if kind == "missing":
        del state[key]
    elif kind == "missing counters":
        del state["ema_models.0._extra_state"]
    elif kind == "unexpected":
        state["ema_models.0.ema_model.other"] = torch.ones(1)
    elif kind == "shape":
        state[key] = torch.ones(1)
    elif kind == "cast down":
        state[key] = state[key].double()
    elif kind == "kind of number":
        state[key] = state[key].int()
    elif kind == "no tensor":
        state[key] = "weights"
    elif kind == "counters":
        state["ema_models.0._extra_state"] = 7
    elif kind == "profile":
        state["ema_models.0._extra_state"] = {**state["ema_models.0._extra_state"], "gamma": 3.0}
    return state


WORDS = {
    "missing": "Missing key.*ema_models.1.ema_model.head.weight",
    "missing counters": "Missing key.*_extra_state",
    "unexpected": "Unexpected key.*other",
    "shape": r"head.weight' has shape \(1,\) in the state but shape \(3, 4\)",
    "cast down": "never cast down",
    "kind of number": "torch.int32 in the state",
    "no tensor": "head.weight' has str in the state",
    "counters": "expected a dict with the number of steps",
    "profile": "averaged with gamma 3.0",
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", WORDS)
def test_state_that_does_not_fit_is_refused_and_nothing_is_touched(kind, nested, tmp_path):
    model = Net()
    ema = posthoc(model, tmp_path)
    train(ema, model, range(4))
    state = changed(ema.state_dict(), kind)
    again = posthoc(Net(), tmp_path)
    before, extra = tensors(again.state_dict()), again.state_dict()["ema_models.0._extra_state"]
    target: nn.Module = parent_of(again) if nested else again
    with pytest.raises(RuntimeError, match="(?s)" + ("inner.ema" if nested else WORDS[kind])):
        target.load_state_dict({f"{'inner.ema.' * nested}{key}": value for key, value in state.items()})
    assert_same(tensors(again.state_dict()), before)
    assert again.state_dict()["ema_models.0._extra_state"] == extra


@pytest.mark.parametrize("kind", ["missing", "missing counters", "unexpected"])
def test_keys_that_fit_are_loaded_without_strict(kind, tmp_path):
    model = Net()
    ema = posthoc(model, tmp_path)
    train(ema, model, range(4))
    again = posthoc(Net(), tmp_path)
    kept = again.state_dict()["ema_models.1.ema_model.head.weight"].clone()
    result = again.load_state_dict(changed(ema.state_dict(), kind), strict=False)
    assert len(result.missing_keys) == kind.startswith("missing")
    assert len(result.unexpected_keys) == (kind == "unexpected")
    now, then = again.state_dict(), ema.state_dict()
    assert torch.equal(now["ema_models.0.ema_model.conv.weight"], then["ema_models.0.ema_model.conv.weight"])
    assert torch.equal(now["ema_models.1.ema_model.head.weight"], kept) == (kind == "missing")


@pytest.mark.parametrize("kind", ["shape", "cast down", "profile"])
def test_wrong_values_are_refused_also_where_missing_keys_are_not(kind, tmp_path):
    ema = posthoc(Net(), tmp_path)
    with pytest.raises(RuntimeError, match=WORDS[kind]):
        ema.load_state_dict(changed(ema.state_dict(), kind), strict=False)


def test_narrow_averages_are_widened(tmp_path):
    ema = posthoc(Net(), tmp_path)
    state = {key: v.bfloat16() if "weight" in key else v for key, v in ema.state_dict().items()}
    ema.load_state_dict(state)
    value = ema.state_dict()["ema_models.0.ema_model.head.weight"]
    assert value.dtype == torch.float32
    assert torch.equal(value, state["ema_models.0.ema_model.head.weight"].float())


# ---- names


class Confusing(nn.Module):
    """Has a submodule called ``module`` with the same names as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.zeros(2, 2))


WRAPPINGS = {
    "none": lambda model: model,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("saved", WRAPPINGS)
@pytest.mark.parametrize("now", WRAPPINGS)
def test_state_with_the_names_of_one_wrapping_loads_under_another(saved, now, tmp_path):
    """As 0.0.1 saved them, with the attribute names of wrappers in its keys."""
    model = Net()
    ema = posthoc(WRAPPINGS[now](model), tmp_path)
    train(ema, model, range(3))
    old = {"compile": "_orig_mod.", "parallel": "module.", "both": "_orig_mod.module.", "none": ""}[saved]
    state = {key.replace(".ema_model.", f".ema_model.{old}"): value for key, value in ema.state_dict().items()}
    again = posthoc(WRAPPINGS[now](Net()), tmp_path)
    again.load_state_dict(state)
    assert_same(tensors(again.state_dict()), tensors(ema.state_dict()))


@pytest.mark.parametrize("now", ["none", "parallel"])
def test_users_submodule_called_module_is_never_mistaken_for_a_wrapper(now, tmp_path):
    model = Confusing()
    ema = posthoc(WRAPPINGS[now](model), tmp_path)
    train(ema, model, range(3))
    wrapped = {key.replace(".ema_model.", ".ema_model.module."): v for key, v in ema.state_dict().items()}
    again = posthoc(WRAPPINGS[now](Confusing()), tmp_path)
    again.load_state_dict(ema.state_dict())
    assert_same(tensors(again.state_dict()), tensors(ema.state_dict()))
    again = posthoc(WRAPPINGS[now](Confusing()), tmp_path)
    if now == "parallel":
        again.load_state_dict(wrapped)
        assert_same(tensors(again.state_dict()), tensors(ema.state_dict()))
    else:
        before = tensors(again.state_dict())
        with pytest.raises(RuntimeError, match="Missing key"):
            again.load_state_dict(wrapped)
        assert_same(tensors(again.state_dict()), before)


# ---- the run


def test_loaded_state_continues_its_run(tmp_path):
    model = Net()
    old, new = posthoc(model, tmp_path), posthoc(model, tmp_path)
    train(old, model, range(4))
    new.load_state_dict(old.state_dict())
    assert new.state_dict()["ema_models.0._extra_state"]["lineage"] == [[old.run, 4], [new.run, None]]


def test_loading_an_earlier_state_after_a_snapshot_begins_a_new_run(tmp_path):
    model = Net()
    ema = posthoc(model, tmp_path)
    train(ema, model, range(4))
    before, state = ema.run, {key: v.clone() if torch.is_tensor(v) else v for key, v in ema.state_dict().items()}
    train(ema, model, range(4, 8))
    ema.checkpoint()
    ema.load_state_dict(state)
    assert ema.run != before
    train(ema, model, range(14, 18))
    ema.checkpoint()
    assert [snapshot.run for snapshot in ema.snapshots.snapshots()] == [ema.run]  # step 8 of the old run is no ancestor


@pytest.mark.filterwarnings("ignore")
def test_update_every_may_change_at_a_resume(tmp_path):
    model = Net()
    first, second = posthoc(model, tmp_path), posthoc(model, tmp_path, update_every=3)
    train(first, model, range(4))
    second.load_state_dict(first.state_dict())
    train(second, model, range(4, 8))
    assert (second.step, second.t) == (8, 7)
    assert not issubclass(NitrousWarning, DeprecationWarning)


# torch.distributed.checkpoint, which reads into the tensors of a state_dict() before it calls load_state_dict()


def test_averages_that_a_failed_load_has_overwritten_are_refused_until_a_load_succeeds(make):
    saved, other = make(Net(), sigma_rels=(0.05, 0.1)), make(Net(), sigma_rels=(0.15, 0.25))
    for ema in (saved, other):
        train(ema, ema.model, range(1, 4))
    before = copy.deepcopy(dict(other.state_dict()))
    state = other.state_dict()
    for key, value in saved.state_dict().items():
        if isinstance(value, torch.Tensor):
            with torch.no_grad():
                state[key].copy_(value)
        else:
            state[key] = value
    with pytest.raises(RuntimeError, match="the state was averaged with gamma"):
        other.load_state_dict(state)
    for refused in (other.update, lambda: other.ema_models[0].ema_model):
        with pytest.raises(NitrousError, match=r"load_state_dict\(\) failed \(the state was read into the averages"):
            refused()
    other.load_state_dict(before)
    other.update()


def test_failed_load_that_has_touched_nothing_leaves_the_averages_in_use(make):
    saved, other = make(Net(), sigma_rels=(0.05, 0.1)), make(Net(), sigma_rels=(0.15, 0.25))
    for ema in (saved, other):
        train(ema, ema.model, range(1, 4))
    with pytest.raises(RuntimeError, match="the state was averaged with gamma"):
        other.load_state_dict(saved.state_dict())
    state = dict(other.state_dict()) | {"unknown": torch.ones(1)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state)
    other.update()


def test_state_of_a_module_that_owns_an_ema_is_found_by_torch_distributed(make):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.ema = make(self.net)

    owner = Owner()
    owner.ema.update()
    state = get_model_state_dict(owner)
    assert set(state) == set(owner.state_dict())
    with pytest.raises(AttributeError, match="'2'"):
        getattr(owner.ema.ema_models, "2")


# ---- the unit of training time


@pytest.mark.parametrize(("t_delta", "warns"), [(256, True), (0.1, True), (8, False), (0.5, False), (1, False)])
def test_first_interval_after_a_load_may_not_be_of_another_unit(t_delta, warns, make):
    first, second = make(Net()), make(Net())
    train(first, first.model, range(1, 6))
    second.load_state_dict(copy.deepcopy(dict(first.state_dict())))
    expected = pytest.warns(NitrousWarning, match="advanced by 1 per update") if warns else nullcontext()
    with expected:
        second.update(t_delta)
    second.update(t_delta)  # warned of once: warnings are errors here


# ema-pytorch


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_ema_pytorch_brings_its_counters(strict, tmp_path):
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = nn.Linear(3, 2)
    options = {"sigma_rels": (0.05, 0.1), "update_every": 1}
    peer = ema_pytorch.PostHocEMA(model, checkpoint_folder=tmp_path / "peer", **options)
    ours = posthoc(model, tmp_path / "ema", **options)
    for seed in range(6):
        set_weights(model, seed)
        peer.update()
    ours.load_state_dict(peer.state_dict(), strict=strict)
    assert ours.step == int(peer.ema_models[0].step)
    expected = {name: value.clone() for name, value in peer.ema_models[1].ema_model.state_dict().items()}
    assert_same(dict(ours.ema_models[1].ema_model.state_dict()), expected)
    set_weights(model, 7)
    ours.update()
    weight = ours.ema_models[1].ema_model.weight
    assert not torch.equal(weight, model.weight), "the first update() would copy the model over the averages"


def test_averages_without_a_counter_are_refused(tmp_path):
    model = Net()
    first, second = posthoc(model, tmp_path / "1"), posthoc(model, tmp_path / "2")
    train(first, model, range(4))
    state = {key: value for key, value in first.state_dict().items() if not key.endswith("_extra_state")}
    before = tensors(second.state_dict())
    with pytest.raises(RuntimeError, match="averages without the number of steps"):
        second.load_state_dict(state, strict=False)
    assert_same(tensors(second.state_dict()), before)
