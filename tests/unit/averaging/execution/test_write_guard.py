"""Writers of weights are ordered after the lane that reads them, and writes without that order are detected."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousWarning, PostHocEMA
from nitrous_ema.errors import UnsafeReadError
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    Gate,
    GatedLane,
    LateLane,
    assert_same_bits,
    backward,
    make_model,
    use_lane,
)
from tests.support.guarded_training import averages_after, rigs, sgd
from tests.support.models import SelfPickling


@pytest.fixture
def rig():
    with rigs() as make:
        yield make


# Which writer waits, and when


def test_optimizer_waits_until_the_weights_were_read(rig):
    rig = rig()
    optimizer, before = rig.train(), rig.weights()
    assert rig.waits == []
    optimizer.step()
    (at_the_wait,) = rig.waits
    assert torch.equal(at_the_wait, before)
    assert not torch.equal(rig.weights(), before)


def test_fence_is_the_same_wait(rig):
    rig = rig()
    rig.train()
    before = rig.weights()
    rig.guard.fence()
    assert torch.equal(rig.waits[0], before)
    with torch.no_grad():
        rig.model.weight.zero_()
    rig.update()  # raises nothing


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "as a part of another"])
def test_loading_a_state_into_the_model_waits(rig, wrapped):
    rig = rig()
    rig.train()
    before, whole = rig.weights(), nn.Sequential(rig.model)
    state = {key: torch.zeros_like(value) for key, value in rig.model.state_dict().items()}
    if wrapped:
        whole.load_state_dict({f"0.{key}": value for key, value in state.items()})
    else:
        rig.model.load_state_dict(state)
    (at_the_wait,) = rig.waits
    assert torch.equal(at_the_wait, before)
    assert rig.weights().abs().sum() == 0
    rig.update()  # raises nothing


def test_first_updates_are_safe_without_any_optimizer(rig):
    rig = rig()
    rig.update()
    assert len(rig.waits) == 1
    rig.guard.fence()
    rig.forget()
    rig.update()  # a fence was observed
    assert rig.waits == []


def test_no_writer_waits_with_read_copied(rig):
    rig = rig("copied")
    optimizer = sgd(rig.model)
    for _ in range(3):
        rig.update()
        optimizer.step()
        with torch.no_grad():
            rig.model.weight.zero_()
    assert rig.waits == []


# What is detected


def test_guarded_names_the_weight_that_was_written(rig):
    rig = rig()
    optimizer = rig.train()
    with torch.no_grad():
        rig.model.bias.add_(1)
    optimizer.step()  # the fence comes too late
    with pytest.raises(
        UnsafeReadError, match=r"'bias' was written between update\(\).*fence\(\).*read='copied'"
    ) as caught:
        rig.update()
    assert caught.value.name == "bias"
    rig.update()  # once


def test_write_without_any_optimizer_step_is_detected_too(rig):
    rig = rig()
    rig.train()
    with torch.no_grad():
        rig.model.weight.add_(1)
    with pytest.raises(UnsafeReadError, match="'weight' was written"):
        rig.update()


def test_guarded_refuses_a_loop_without_optimizer(rig):
    rig = rig()
    rig.update()
    with pytest.raises(UnsafeReadError, match=r"neither an optimizer step nor fence\(\).*Call fence\(\)"):
        rig.update()
    rig.guard.fence()
    rig.update()


def test_auto_warns_once_and_copies_from_then_on(rig):
    rig = rig("auto")
    optimizer = rig.train()
    with torch.no_grad():
        rig.model.bias.add_(1)
    optimizer.step()
    with pytest.warns(
        NitrousWarning, match="'bias' was written.*the EMA copies the parameters in every update"
    ) as caught:
        rig.update()
    assert len(caught) == 1
    assert rig.guard.copies
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with torch.no_grad():
                rig.model.bias.add_(1)
            rig.update()
            optimizer.step()


def test_last_live_read_is_still_waited_for_after_the_switch(rig):
    rig = rig("auto")
    optimizer = rig.train()
    with torch.no_grad():
        rig.model.bias.add_(1)
    with pytest.warns(NitrousWarning):
        rig.update()
    optimizer.step()  # the last live read may still be pending
    assert len(rig.waits) == 1


@pytest.mark.parametrize("first", [False, True], ids=["later steps", "the very first steps"])
def test_step_skipped_by_a_gradient_scaler_is_no_violation(rig, first):
    rig = rig()
    optimizer = sgd(rig.model)
    if not first:
        rig.update()
        optimizer.step()
    for _ in range(4):
        rig.update()  # no step between: the scaler found an inf
    rig.forget()
    before = rig.weights()
    optimizer.step()
    assert len(rig.waits) == 1
    assert torch.equal(rig.waits[0], before)


def test_refused_update_leaves_the_weights_guarded(rig):
    """The reads of the update before are still pending."""
    rig = rig()
    optimizer = rig.train()
    rig.guard.before_update()  # and then the model turned out to lack a tensor
    optimizer.step()
    assert len(rig.waits) == 1


def test_frozen_inference_tensor_counts_no_writes(rig):
    """It has no version counter."""
    model = nn.Linear(3, 2)
    with torch.inference_mode():
        model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    rig = rig(model=model)
    rig.train()
    with torch.no_grad():
        model.bias.add_(1)
    with pytest.raises(UnsafeReadError, match="'bias' was written"):
        rig.update()


# Graphs: a captured step is replayed later, without any Python


def test_nothing_waits_while_a_graph_is_captured(rig):
    """Hazard: the wait, for an event that was recorded outside of the graph, ends the capture or is in every replay."""
    rig = rig()
    optimizer = rig.train()
    rig.is_capturing = True
    optimizer.step()
    optimizer.step(lambda: None)
    rig.guard.fence()
    rig.model.load_state_dict(rig.model.state_dict())
    assert rig.waits == []


def test_fence_before_a_replay_waits(rig):
    rig = rig()
    optimizer = rig.train()
    rig.is_capturing = True
    optimizer.step()  # counts as a write, though nothing was written
    rig.is_capturing = False
    for _ in range(2):
        before = rig.weights()
        rig.forget()
        rig.guard.fence()
        assert len(rig.waits) == 1
        assert torch.equal(rig.waits[0], before)
        rig.model.weight.data.add_(1)  # the replay
        rig.update()  # raises nothing


def test_replay_without_fence_is_detected(rig):
    rig = rig()
    optimizer = rig.train()
    rig.is_capturing = True
    optimizer.step()
    rig.is_capturing = False
    rig.guard.fence()
    rig.model.weight.data.add_(1)  # the replay
    rig.update()
    rig.model.weight.data.add_(1)
    with pytest.raises(UnsafeReadError, match=r"no fence\(\) in between.* captured into a graph"):
        rig.update()


def test_capture_before_the_first_update_is_known_after_it(rig):
    rig = rig()
    optimizer = sgd(rig.model)
    rig.is_capturing = True
    optimizer.step()
    rig.is_capturing = False
    rig.update()
    with pytest.raises(UnsafeReadError, match="captured into a graph"):
        rig.update()


def test_captured_optimizer_of_another_model_is_no_violation(rig):
    rig = rig()
    rig.train()
    other = sgd(nn.Linear(3, 2))
    rig.is_capturing = True
    other.step()
    rig.is_capturing = False
    rig.update()  # as after a skipped step


def test_captured_optimizer_that_was_freed_is_no_violation(rig):
    rig = rig()
    other = sgd(rig.model)
    optimizer = rig.train()
    rig.is_capturing = True
    other.step()
    rig.is_capturing = False
    del other
    gc.collect()
    rig.update()
    optimizer.step()


# Hooks


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model_keep_a_hook_that_does_nothing(rig, how):
    rig = rig()
    rig.train()
    if how == "deepcopy":
        other = copy.deepcopy(rig.model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(rig.model))
    else:
        file = io.BytesIO()
        torch.save(rig.model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    other.load_state_dict(rig.model.state_dict())
    assert rig.waits == []


def test_removed_hooks_do_nothing(rig):
    rig = rig()
    optimizer = rig.train()
    rig.remove()
    optimizer.step()
    rig.model.load_state_dict(rig.model.state_dict())
    assert rig.waits == []


# The same with a real EMA, whose lane does nothing until a caller waits for it


def by_sgd(model, ema):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(batch):
        backward(model, batch)
        optimizer.step()

    return step


def by_hand(model, ema):
    def step(batch):
        backward(model, batch)
        for parameter in model.parameters():
            parameter.data.sub_(0.1 * parameter.grad)

    return step


CARELESS = {
    "weights written in forward": (by_sgd, "forced norm"),
    "neither an optimizer nor fence()": (by_hand, "plain"),
}


@pytest.mark.parametrize("careless", CARELESS.values(), ids=CARELESS)
def test_guarded_refuses_a_careless_writer(tmp_path, monkeypatch, careless):
    use_lane(monkeypatch, LateLane())
    with pytest.raises(UnsafeReadError, match=r"read='copied'"):
        averages_after(AsyncPostHocEMA, tmp_path, *careless, read="guarded")


@pytest.mark.parametrize("careless", CARELESS.values(), ids=CARELESS)
def test_copied_is_right_for_a_careless_writer(tmp_path, monkeypatch, careless):
    expected = averages_after(PostHocEMA, tmp_path, *careless)
    use_lane(monkeypatch, LateLane())
    assert_same_bits(averages_after(AsyncPostHocEMA, tmp_path, *careless, read="copied"), expected)


@pytest.mark.parametrize("careless", CARELESS.values(), ids=CARELESS)
def test_auto_is_right_for_a_careless_writer_and_warns_once(tmp_path, monkeypatch, careless):
    expected = averages_after(PostHocEMA, tmp_path, *careless)
    use_lane(monkeypatch, LateLane())
    with pytest.warns(NitrousWarning, match=r"the EMA copies the parameters in every update\(\)") as caught:
        obtained = averages_after(AsyncPostHocEMA, tmp_path, *careless)
    assert len(caught) == 1
    assert caught[0].filename in (__file__, averages_after.__code__.co_filename)  # the user's own line
    assert_same_bits(obtained, expected)


@pytest.mark.parametrize("call", ["checkpoint", "flush", "state_dict", "close"])
def test_violation_is_raised_by_the_next_call_on_the_ema(tmp_path, call):
    model = make_model()
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, read="guarded")
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.step()
        ema.update()
    with torch.no_grad():
        model[0].bias.add_(1)
    optimizer.step()
    with pytest.raises(UnsafeReadError, match=r"'0.bias' was written"):
        getattr(ema, call)()
    ema.close(TIMEOUT_SECONDS)


def test_checkpoint_that_averages_is_guarded_like_an_update(tmp_path):
    model = make_model()
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, read="guarded", update_every=3)
    ema.update()
    ema.fence()
    ema.update()
    ema.checkpoint()  # brings the averages up to now, and reads the weights for that
    with torch.no_grad():
        model[0].bias.add_(1)
    ema.update()
    with pytest.raises(UnsafeReadError, match=r"'0.bias' was written"):
        ema.checkpoint()
    ema.close(TIMEOUT_SECONDS)


def test_weights_may_be_initialized_after_construction(tmp_path):
    model = make_model()
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, read="guarded")
    nn.init.zeros_(model[0].weight)
    optimizer = sgd(model)
    optimizer.step()
    ema.update()
    ema.close(TIMEOUT_SECONDS)


def test_update_that_finds_a_tensor_missing_leaves_the_weights_guarded(tmp_path, monkeypatch):
    """Hazard: the update is refused, and the optimizer then writes weights that the update before still reads."""
    model, lane = make_model(), LateLane()
    use_lane(monkeypatch, lane)
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, read="guarded")
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.step()
        ema.update()
    weight, waits = model[0].weight, lane.waits
    del model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight"):
        ema.update()
    model[0].weight = weight
    optimizer.step()
    assert lane.waits == waits + 1
    ema.close(TIMEOUT_SECONDS)


def test_step_does_not_return_before_the_lane_has_read(tmp_path, monkeypatch):
    """On the CPU it is the training thread itself that waits."""
    model, gate = make_model(), Gate(is_open=True)
    use_lane(monkeypatch, GatedLane(run=gate))
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, read="guarded")
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.step()
        ema.update()
    optimizer.step()
    gate.shut()
    ema.update()
    before, stepped = model[0].weight.detach().clone(), threading.Event()
    trainer = threading.Thread(target=lambda: (optimizer.step(), stepped.set()))
    trainer.start()
    gate.wait_entered()
    assert not stepped.is_set()
    assert torch.equal(model[0].weight, before)
    gate.open()
    assert stepped.wait(TIMEOUT_SECONDS)
    trainer.join(TIMEOUT_SECONDS)
    ema.close(TIMEOUT_SECONDS)


def test_copy_of_a_model_that_pickles_itself_can_be_loaded_and_copied(tmp_path):
    """Its pickles hold the state as arguments, so that a weak reference from a hook to the model would be dead."""
    model = SelfPickling()
    with AsyncPostHocEMA(model, checkpoint_folder=tmp_path) as ema:
        ema.update()
        for copied in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), ema.ema_models[0].ema_model):
            state = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
            copy.deepcopy(copied).load_state_dict(state)
            pickle.loads(pickle.dumps(copied)).load_state_dict(state)
