"""Every form of optimizer: no form writes a weight before it was read, and each fences by itself or is detected.

Each form trains with a lane that does nothing until a caller waits for it. Without the wait the lane would read weights
of a later step: ``test_each_form_would_spoil_the_averages_without_the_wait`` removes the wait and shows that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousWarning, PostHocEMA
from nitrous_ema.errors import UnsafeReadError
from tests.support.fakes import TIMEOUT_SECONDS, LateLane, assert_same_bits, averages_of, use_lane
from tests.support.guarded_training import Step, averages_after, rigs, sgd, with_gradients
from tests.support.optimizer_forms import FORMS, NoTorchOptimizer, Outer, Sam, ScheduleFree, SingleFileMuon

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, in its imports


@pytest.fixture(autouse=True)
def world(request: pytest.FixtureRequest) -> Any:
    """A process group of one, for the forms that need one."""
    if "ZeroRedundancyOptimizer" not in request.node.name:
        yield
        return
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def rig():
    with rigs() as make:
        yield make


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("read", ["guarded", "copied"])
def test_averages_are_right_for_each_form(tmp_path, monkeypatch, form, read):
    expected = averages_after(PostHocEMA, tmp_path, form)
    use_lane(monkeypatch, LateLane())
    assert_same_bits(averages_after(AsyncPostHocEMA, tmp_path, form, read=read), expected)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.thread_lane
def test_each_form_would_spoil_the_averages_without_the_wait(tmp_path, monkeypatch, form):
    """The same lane, but ordered writers go on at once: with such a guard the test above fails."""
    expected = averages_after(PostHocEMA, tmp_path, form)
    use_lane(monkeypatch, LateLane())

    def unguarded(model: nn.Module, ema: Any) -> Step:
        ema._engine.guard._order_writer = lambda: None
        return form(model, ema)

    obtained = averages_after(AsyncPostHocEMA, tmp_path, unguarded, read="guarded")
    assert any(not torch.equal(obtained[key], expected[key]) for key in expected)


# When the hook fires


@pytest.mark.parametrize("named", [False, True], ids=["positional", "keyword"])
def test_closure_runs_before_the_wait(rig, named):
    rig, order = rig(), []
    optimizer, before = rig.train(), rig.weights()

    def closure():
        order.append(len(rig.waits))
        return torch.tensor(3.0)

    loss = optimizer.step(closure=closure) if named else optimizer.step(closure)
    assert loss == 3
    assert order == [0]
    assert len(rig.waits) == 1
    assert torch.equal(rig.waits[0], before)
    assert not torch.equal(rig.weights(), before)


@pytest.mark.parametrize("read", ["guarded", "auto"])
@pytest.mark.parametrize("named", [False, True], ids=["positional", "keyword"])
def test_update_inside_the_closure_is_no_violation(named, read, tmp_path):
    """Lightning calls on_before_zero_grad inside the closure, and users update their EMA there."""

    def train(cls, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        folder = tmp_path / cls.__name__
        with cls(
            model, checkpoint_folder=folder, checkpoint_every_num_steps="manual", update_every=1, **options
        ) as ema:

            def closure():
                ema.update()
                optimizer.zero_grad()
                loss = (model(torch.ones(2, 8)) - 1).square().mean()
                loss.backward()
                return loss

            for _ in range(12):
                optimizer.step(closure=closure) if named else optimizer.step(closure)
            return averages_of(ema)

    assert_same_bits(train(AsyncPostHocEMA, read=read), train(PostHocEMA))  # warnings are errors here


def test_writer_waits_for_an_update_in_a_later_call_of_its_closure(rig):
    rig = rig()
    lbfgs, calls = torch.optim.LBFGS(rig.model.parameters(), max_iter=4), []

    def closure():
        calls.append(len(rig.waits))
        if len(calls) == 2:
            rig.update()
        rig.model.zero_grad()
        loss = rig.model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    rig.update()
    lbfgs.step(closure)
    rig.update()  # raises nothing
    assert calls[1] < calls[2]


def test_closure_that_is_called_several_times_waits_once(rig):
    rig = rig()
    rig.train()
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
    rig.update()  # raises nothing


@pytest.mark.parametrize("make", [Sam, SingleFileMuon, Outer], ids=["SAM", "Muon in a single file", "subclass"])
def test_optimizer_that_may_write_before_its_closure_waits(rig, make):
    """Only torch's own optimizers are known to call the closure first."""
    rig = rig()
    rig.train()
    optimizer, before, calls = make(with_gradients(rig.model).parameters()), rig.weights(), []
    optimizer.step(lambda: calls.append(len(rig.waits)))
    assert calls[0] >= 1
    assert torch.equal(rig.waits[0], before)
    rig.update()  # raises nothing


def test_optimizer_that_calls_the_step_of_its_parent_is_no_violation(rig):
    rig = rig()
    rig.train()
    optimizer, before = Outer(with_gradients(rig.model).parameters(), lr=0.1), rig.weights()
    optimizer.step()
    assert len(rig.waits) == 2
    assert all(torch.equal(weights, before) for weights in rig.waits)
    rig.update()  # raises nothing


def test_optimizer_of_another_model_neither_waits_nor_counts(rig):
    rig = rig()
    optimizer, other = rig.train(), sgd(nn.Linear(3, 2))
    for _ in range(3):
        other.step()
    assert rig.waits == []
    optimizer.step()
    assert len(rig.waits) == 1


def test_optimizer_over_a_part_of_the_model_waits(rig):
    rig = rig()
    rig.train()
    torch.optim.SGD([rig.model.bias], lr=0.1).step()
    assert len(rig.waits) == 1


def test_optimizers_in_backward_wait_before_the_first_write(rig):
    rig = rig()
    rig.train()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in rig.model.parameters()}
    for parameter in rig.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = rig.weights()
    rig.model(torch.ones(1, 3)).sum().backward()
    assert len(rig.waits) == len(optimizers)
    assert torch.equal(rig.waits[0], before)
    rig.update()  # raises nothing


def test_every_writer_is_ordered_not_only_the_first(rig):
    """Hazard: the order of the first writer does not extend to another thread or stream."""
    rig = rig()
    first = rig.train()
    second = torch.optim.SGD([rig.model.bias], lr=0.1)
    first.step()
    thread = threading.Thread(target=second.step)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    assert len(rig.waits) == 2
    assert rig.threads[0] == threading.get_ident()
    assert rig.threads[1] != threading.get_ident()
    rig.update()  # raises nothing


def test_optimizer_whose_step_was_compiled_waits(rig):
    rig = rig()
    optimizer = rig.train()
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        before = rig.weights()
        rig.forget()
        step()
        assert len(rig.waits) == 1
        assert torch.equal(rig.waits[0], before)
        assert not torch.equal(rig.weights(), before)
        rig.update()


@pytest.mark.parametrize("whole", [False, True], ids=["optimizer", "training step"])
def test_compiler_makes_the_same_graphs_with_and_without_the_hook(rig, whole):
    def graphs(model: nn.Module, update: Callable[[], None]) -> list[int]:
        torch.compiler.reset()
        optimizer, sizes = sgd(model), []

        def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            sizes.append(len(graph.graph.nodes))
            return graph.forward

        def step() -> None:
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()

        compiled = torch.compile(step if whole else optimizer.step, backend=note)
        for _ in range(4):
            compiled()
            update()
        return sizes

    expected = graphs(nn.Linear(3, 2), lambda: None)
    rig = rig()
    assert graphs(rig.model, rig.update) == expected != []


# Optimizers that write outside of step() without a fence are detected


class MasterWeights:
    """Steps copies, which it then copies into the weights: apex O2, DeepSpeed's ZeRO-1 and 2, Megatron's float16."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.masters = [p.detach().double().requires_grad_() for p in self.weights]
        self.optimizer = torch.optim.SGD(self.masters, lr=0.1)

    @torch.no_grad()
    def step(self) -> None:
        for master in self.masters:
            master.grad = torch.ones_like(master)
        self.optimizer.step()
        for p, master in zip(self.weights, self.masters, strict=True):
            p.data.copy_(master)


class NeverInitialized(torch.optim.Optimizer):
    """Its base class's constructor was not called, which is what puts the hooks around ``step``."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        pass


UNHOOKED = {
    "no torch optimizer": lambda model: NoTorchOptimizer(with_gradients(model).parameters()),
    "master weights": MasterWeights,
    "base class not initialized": lambda model: NeverInitialized(model.parameters()),
}


@pytest.mark.parametrize("make", UNHOOKED.values(), ids=UNHOOKED)
def test_optimizer_without_hook_is_detected_before_it_has_spoiled_anything(rig, make):
    rig = rig()
    optimizer = make(rig.model)
    rig.update()
    before = rig.weights()
    assert torch.equal(rig.waits[0], before)  # update() ordered its caller
    optimizer.step()
    with pytest.raises(UnsafeReadError, match=r"no torch optimizer holds the model's parameters.*Call fence\(\)"):
        rig.update()


OUTSIDE = {
    "SAM": (Sam, Sam.first_step),
    "schedule-free": (ScheduleFree, ScheduleFree.train),
}


@pytest.mark.parametrize(("make", "write"), OUTSIDE.values(), ids=OUTSIDE)
def test_optimizer_that_writes_outside_of_step_is_detected(rig, make, write):
    rig = rig()
    rig.train()
    write(make(with_gradients(rig.model).parameters()))
    with pytest.raises(UnsafeReadError, match=r"'weight' was written between update\(\).*Call fence\(\)"):
        rig.update()


def test_auto_copies_for_an_optimizer_that_writes_outside_of_step(rig):
    rig = rig("auto")
    rig.train()
    ScheduleFree(with_gradients(rig.model).parameters()).train()
    with pytest.warns(NitrousWarning, match="the EMA copies the parameters in every update"):
        rig.update()
    assert rig.guard.copies
