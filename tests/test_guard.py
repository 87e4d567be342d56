"""Whoever writes weights is ordered after the lane that reads them, or is told that he is not."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousWarning, PostHocEMA
from nitrous_ema.errors import UnsafeReadError
from nitrous_ema.guard import Guard, install_hooks
from tests.fakes import (
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

STEPS = 6


class Rig:
    """A model, its guard with hooks, and a count of how often writers were made to wait."""

    def __init__(self, read="guarded", model=None):
        self.model = model if model is not None else nn.Linear(3, 2)
        self.waits = []
        self.guard = Guard(read, lambda: self.waits.append(self.weights()))
        self.remove = install_hooks(self.guard, self.model)
        self.updates = 0

    def weights(self):
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])

    def update(self):
        self.guard.before_update()
        named = dict(self.model.named_parameters())
        self.guard.after_update(list(named), list(named.values()))
        self.updates += 1

    def forget(self):
        self.waits.clear()


@pytest.fixture
def rig():
    made = []

    def make(*args, **kwargs):
        made.append(Rig(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.remove()


def with_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def sgd(model):
    return torch.optim.SGD(with_gradients(model).parameters(), lr=0.1)


def known(rig):
    """Past the first updates, which fence by themselves."""
    optimizer = sgd(rig.model)
    rig.update()
    optimizer.step()
    rig.update()
    rig.forget()
    return optimizer


# Who waits, and when


def test_optimizer_waits_until_the_weights_were_read(rig):
    rig = rig()
    optimizer, before = known(rig), rig.weights()
    assert rig.waits == []
    optimizer.step()
    (at_the_wait,) = rig.waits
    assert torch.equal(at_the_wait, before)
    assert not torch.equal(rig.weights(), before)


def test_optimizer_waits_once_per_update(rig):
    rig = rig()
    optimizer = known(rig)
    for _ in range(3):
        optimizer.step()
    assert len(rig.waits) == 1


@pytest.mark.parametrize("named", [False, True], ids=["positional", "keyword"])
def test_closure_runs_before_the_wait(rig, named):
    rig = rig()
    optimizer, order = known(rig), []
    before = rig.weights()

    def closure():
        order.append(len(rig.waits))
        return torch.tensor(3.0)

    loss = optimizer.step(closure=closure) if named else optimizer.step(closure)
    assert loss == 3
    assert order == [0]
    assert len(rig.waits) == 1
    assert torch.equal(rig.waits[0], before)
    assert not torch.equal(rig.weights(), before)


def test_closure_that_is_called_often_waits_once(rig):
    rig = rig()
    known(rig)
    lbfgs, calls = torch.optim.LBFGS(rig.model.parameters(), max_iter=4), []

    def closure():
        calls.append(len(rig.waits))
        rig.model.zero_grad()
        loss = rig.model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    assert calls[0] == 0
    assert set(calls[1:]) == {1}
    rig.update()  # no complaint


def test_optimizer_that_calls_the_step_of_its_parent_waits_once(rig):
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    rig = rig()
    known(rig)
    optimizer = Outer(with_gradients(rig.model).parameters(), lr=0.1)
    optimizer.step()
    assert len(rig.waits) == 1
    rig.update()
    calls = []
    optimizer.step(lambda: calls.append(len(rig.waits)))
    assert calls == [1]
    assert len(rig.waits) == 2


def test_optimizer_of_another_model_neither_waits_nor_counts(rig):
    """As in a GAN: the discriminator's step between the generator's."""
    rig = rig()
    optimizer, other = known(rig), nn.Linear(3, 2)
    others = sgd(other)
    for _ in range(3):
        others.step()
    assert rig.waits == []
    optimizer.step()
    assert len(rig.waits) == 1


def test_optimizers_in_backward_wait_before_the_first_write(rig):
    rig = rig()
    known(rig)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in rig.model.parameters()}
    for parameter in rig.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = rig.weights()
    rig.model(torch.ones(1, 3)).sum().backward()
    assert len(rig.waits) == 1
    assert torch.equal(rig.waits[0], before)
    rig.update()


def test_fence_is_the_same_wait(rig):
    rig = rig()
    known(rig)
    rig.guard.fence()
    rig.guard.fence()
    assert len(rig.waits) == 1
    with torch.no_grad():
        rig.model.weight.zero_()
    rig.update()  # no complaint


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "as a part of another"])
def test_loading_a_state_into_the_model_waits(rig, wrapped):
    rig = rig()
    known(rig)
    before, whole = rig.weights(), nn.Sequential(rig.model)
    state = {key: torch.zeros_like(value) for key, value in rig.model.state_dict().items()}
    if wrapped:
        whole.load_state_dict({f"0.{key}": value for key, value in state.items()})
    else:
        rig.model.load_state_dict(state)
    (at_the_wait,) = rig.waits
    assert torch.equal(at_the_wait, before)
    assert rig.weights().abs().sum() == 0
    rig.update()  # no complaint


def test_first_updates_are_safe_without_any_optimizer(rig):
    rig = rig()
    rig.update()
    assert len(rig.waits) == 1
    rig.guard.fence()
    rig.forget()
    rig.update()  # by now it is known that somebody fences
    assert rig.waits == []


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_optimizer_whose_step_was_compiled_waits(rig):
    rig = rig()
    optimizer = known(rig)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        before = rig.weights()
        rig.forget()
        step()
        assert len(rig.waits) == 1
        assert torch.equal(rig.waits[0], before)
        assert not torch.equal(rig.weights(), before)
        rig.update()


def test_copied_makes_nobody_wait(rig):
    rig = rig("copied")
    optimizer = sgd(rig.model)
    for _ in range(3):
        rig.update()
        optimizer.step()
        with torch.no_grad():
            rig.model.weight.zero_()
    assert rig.waits == []


# What is noticed


def test_guarded_names_the_weight_that_was_written(rig):
    rig = rig()
    optimizer = known(rig)
    with torch.no_grad():
        rig.model.bias.add_(1)
    optimizer.step()  # never here
    with pytest.raises(
        UnsafeReadError, match=r"'bias' was written between update\(\).*fence\(\).*read='copied'"
    ) as told:
        rig.update()
    assert told.value.name == "bias"
    rig.update()  # once


def test_write_without_any_optimizer_step_is_noticed_too(rig):
    rig = rig()
    known(rig)
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
    optimizer = known(rig)
    with torch.no_grad():
        rig.model.bias.add_(1)
    optimizer.step()
    with pytest.warns(NitrousWarning, match="'bias' was written.*Parameters are copied at each update") as told:
        rig.update()
    assert len(told) == 1
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
    optimizer = known(rig)
    with torch.no_grad():
        rig.model.bias.add_(1)
    with pytest.warns(NitrousWarning):
        rig.update()
    optimizer.step()  # what was read live before may still be read
    assert len(rig.waits) == 1


@pytest.mark.parametrize("first", [False, True], ids=["later ones", "the very first ones"])
def test_step_skipped_by_a_gradient_scaler_is_no_mistake(rig, first):
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
    """What was read before is still being read."""
    rig = rig()
    optimizer = known(rig)
    rig.guard.before_update()  # and then the model turned out to lack a tensor
    optimizer.step()
    assert len(rig.waits) == 1


def test_an_unknown_read_mode_is_named():
    with pytest.raises(ValueError, match="read is 'live'; expected 'auto', 'guarded' or 'copied'"):
        Guard("live", lambda: None)


# Hooks


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model_keep_a_hook_that_does_nothing(rig, how):
    rig = rig()
    known(rig)
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
    optimizer = known(rig)
    rig.remove()
    optimizer.step()
    rig.model.load_state_dict(rig.model.state_dict())
    assert rig.waits == []


# The same with a real EMA, whose lane does nothing until it is waited for


def write_by_optimizer(model, optimizer, ema):
    optimizer.step()


def write_data(model, optimizer, ema):
    """No counter sees it; it stands behind the optimizer's step."""
    optimizer.step()
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def write_by_closure(model, optimizer, ema):
    optimizer.step(lambda: model[0].bias.sum())


def write_by_keyword_closure(model, optimizer, ema):
    """As Lightning calls it."""
    optimizer.step(closure=lambda: model[0].bias.sum())


def write_by_hand(model, optimizer, ema):
    ema.fence()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)


def write_data_by_hand(model, optimizer, ema):
    ema.fence()
    for parameter in model.parameters():
        parameter.data.sub_(0.1 * parameter.grad)


def write_by_loading(model, optimizer, ema):
    model.load_state_dict({key: value * 0.9 for key, value in model.state_dict().items()})


WRITERS = [
    write_by_optimizer, write_data, write_by_closure, write_by_keyword_closure, write_by_hand, write_data_by_hand,
    write_by_loading,
]  # fmt: skip


def averages_after(cls, folder, write: Callable[..., None], make_optimizer=None, **options):
    model = make_model()
    make_optimizer = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    ema = cls(model, checkpoint_folder=folder, checkpoint_every_num_steps="manual", update_every=1, **options)
    optimizer = make_optimizer(model.parameters())
    for batch in make_batches(STEPS, model):
        backward(model, batch)
        write(model, optimizer, ema)
        ema.update()
    averages = averages_of(ema)
    ema.close(TIMEOUT_SECONDS)
    return averages


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("read", ["guarded", "copied"])
def test_averages_are_right_whoever_writes(tmp_path, monkeypatch, write, read):
    expected = averages_after(PostHocEMA, tmp_path, write)
    use_lane(monkeypatch, LateLane())
    assert_same_bits(averages_after(AsyncPostHocEMA, tmp_path, write, read=read), expected)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_averages_are_right_with_every_kernel_of_an_optimizer(tmp_path, monkeypatch, options):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=0.1, **options)

    expected = averages_after(PostHocEMA, tmp_path, write_by_optimizer, adamw)
    use_lane(monkeypatch, LateLane())
    obtained = averages_after(AsyncPostHocEMA, tmp_path, write_by_optimizer, adamw, read="guarded")
    assert_same_bits(obtained, expected)


def test_averages_are_right_with_a_gradient_scaler(tmp_path, monkeypatch):
    def run(cls, **options):
        model = make_model()
        ema = cls(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps="manual", update_every=1, **options)
        optimizer, scaler = (
            torch.optim.SGD(model.parameters(), lr=0.1),
            torch.amp.GradScaler("cpu", init_scale=2.0**127),
        )
        for batch in make_batches(8, model):
            optimizer.zero_grad()
            scaler.scale(1e4 * (model(batch) - 1).square().mean()).backward()
            scaler.step(optimizer)  # skipped at first: the scale is far too large
            scaler.update()
            ema.update()
        assert 0 < scaler.get_scale() < 2.0**127
        averages = averages_of(ema)
        ema.close(TIMEOUT_SECONDS)
        return averages

    expected = run(PostHocEMA)
    use_lane(monkeypatch, LateLane())
    assert_same_bits(run(AsyncPostHocEMA, read="guarded"), expected)


def train_forced_norm(cls, folder, **options):
    model = make_model("forced norm")
    ema = cls(model, checkpoint_folder=folder, checkpoint_every_num_steps="manual", update_every=1, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        for batch in make_batches(STEPS, model):
            backward(model, batch)
            optimizer.step()
            ema.update()
        return averages_of(ema)
    finally:
        ema.close(TIMEOUT_SECONDS)


def train_by_hand(cls, folder, **options):
    def write(model, optimizer, ema):
        for parameter in model.parameters():
            parameter.data.sub_(0.1 * parameter.grad)

    return averages_after(cls, folder, write, lambda parameters: None, **options)


CARELESS = {"weights written in forward": train_forced_norm, "neither an optimizer nor fence()": train_by_hand}


@pytest.mark.parametrize("train", CARELESS.values(), ids=CARELESS)
def test_guarded_refuses_a_careless_writer(tmp_path, monkeypatch, train):
    use_lane(monkeypatch, LateLane())
    with pytest.raises(UnsafeReadError, match=r"read='copied'"):
        train(AsyncPostHocEMA, tmp_path, read="guarded")


@pytest.mark.parametrize("train", CARELESS.values(), ids=CARELESS)
def test_copied_is_right_for_a_careless_writer(tmp_path, monkeypatch, train):
    expected = train(PostHocEMA, tmp_path)
    use_lane(monkeypatch, LateLane())
    assert_same_bits(train(AsyncPostHocEMA, tmp_path, read="copied"), expected)


@pytest.mark.parametrize("train", CARELESS.values(), ids=CARELESS)
def test_auto_is_right_for_a_careless_writer_and_warns_once(tmp_path, monkeypatch, train):
    expected = train(PostHocEMA, tmp_path)
    use_lane(monkeypatch, LateLane())
    with pytest.warns(NitrousWarning, match=r"Parameters are copied at each update\(\)") as told:
        obtained = train(AsyncPostHocEMA, tmp_path)
    assert len(told) == 1
    assert told[0].filename in (__file__, averages_after.__code__.co_filename)  # the user's own line
    assert_same_bits(obtained, expected)


@pytest.mark.parametrize("call", ["checkpoint", "flush", "state_dict", "close"])
def test_mistake_is_told_by_whatever_is_called_next(tmp_path, call):
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
    """Hazard: the update is refused, and the optimizer then writes what the one before still reads."""
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
