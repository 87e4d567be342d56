"""Every form of optimizer, each as it is used in practice, for ``test_optimizers.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.support.fakes import backward
from tests.support.guarded_training import Step, with_gradients


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


def stepping(make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> Callable[..., Step]:
    """Return a form in which ``step()`` is called after backward."""

    def form(model: nn.Module, ema: Any) -> Step:
        optimizer = make_optimizer(model.parameters())

        def step(batch: torch.Tensor) -> None:
            backward(model, batch)
            optimizer.step()

        return step

    return form


def with_closure(make_optimizer: Callable[[Any], torch.optim.Optimizer], *, named: bool = False) -> Callable[..., Step]:
    """Return a form in which forward and backward run inside ``step()``."""

    def form(model: nn.Module, ema: Any) -> Step:
        optimizer = make_optimizer(model.parameters())

        def step(batch: torch.Tensor) -> None:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            if named:  # as Lightning does: lightning/pytorch/core/optimizer.py
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)

        return step

    return form


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class SingleFileMuon(torch.optim.Optimizer):
    """The single-file version (KellerJordan/Muon, ``muon.py``): momentum, then Newton-Schulz on matrices."""

    def __init__(self, parameters: Any, lr: float = 0.02) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                p.add_(momentum / (momentum.norm() + 1e-7), alpha=-group["lr"])
        return loss


class Outer(torch.optim.SGD):
    """An optimizer that calls its parent's step, which has the hook as well."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization as it is used most (davda54/sam, ``sam.py``): it writes *before* its closure."""

    def __init__(self, parameters: Any, base: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base = base(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=0.5)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base.step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


class NoTorchOptimizer:
    """Holds the weights, and is not a ``torch.optim.Optimizer``: it cannot be hooked."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)

    def step(self) -> None:
        for p in self.parameters:
            p.data.sub_(p.grad, alpha=0.1)


class ScheduleFree(torch.optim.SGD):
    """Writes weights in ``train()`` and ``eval()`` too (facebookresearch/schedule_free, ``sgd_schedulefree.py``)."""

    @torch.no_grad()
    def swap(self, factor: float) -> None:
        for p in self.param_groups[0]["params"]:
            p.mul_(factor)

    def train(self) -> None:
        self.swap(1.25)

    def eval(self) -> None:
        self.swap(0.8)


def sam_in_closure(model: nn.Module, ema: Any) -> Step:
    optimizer = Sam(model.parameters())

    def step(batch: torch.Tensor) -> None:
        backward(model, batch)
        optimizer.step(lambda: backward(model, batch))

    return step


def sam_in_two_steps(model: nn.Module, ema: Any) -> Step:
    optimizer = Sam(model.parameters())

    def step(batch: torch.Tensor) -> None:
        backward(model, batch)
        ema.fence()
        optimizer.first_step()
        backward(model, batch)
        optimizer.second_step()

    return step


def schedule_free(model: nn.Module, ema: Any) -> Step:
    optimizer = ScheduleFree(model.parameters(), lr=0.1)

    def step(batch: torch.Tensor) -> None:
        ema.fence()
        optimizer.train()
        backward(model, batch)
        optimizer.step()
        optimizer.eval()

    return step


def no_torch_optimizer(model: nn.Module, ema: Any) -> Step:
    optimizer = NoTorchOptimizer(model.parameters())

    def step(batch: torch.Tensor) -> None:
        backward(model, batch)
        ema.fence()
        optimizer.step()

    return step


def data_after_step(model: nn.Module, ema: Any) -> Step:
    """No counter sees this write; it is behind the optimizer's step."""
    optimizer = plain(model.parameters())

    def step(batch: torch.Tensor) -> None:
        backward(model, batch)
        optimizer.step()
        for parameter in model.parameters():
            parameter.data.mul_(0.9)

    return step


def loading(model: nn.Module, ema: Any) -> Step:
    return lambda batch: model.load_state_dict({key: value * 0.9 for key, value in model.state_dict().items()})


def muon_and_adamw(model: nn.Module, ema: Any) -> Step:
    """Two optimizers over subsets: matrices, and the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    muon = getattr(torch.optim, "Muon", SingleFileMuon)(matrices, lr=0.02)  # torch has Muon since 2.9
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.1)

    def step(batch: torch.Tensor) -> None:
        backward(model, batch)
        adamw.step()
        muon.step()

    return step


def accumulated(model: nn.Module, ema: Any) -> Step:
    optimizer = plain(model.parameters())

    def step(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        for micro_batch in batch.split(2):
            (loss_of(model, micro_batch) / 4).backward()
        optimizer.step()

    return step


def adversarial(model: nn.Module, ema: Any) -> Step:
    """As in a GAN: another model's optimizer steps in between."""
    discriminator = nn.Linear(1, 1)
    nn.init.ones_(discriminator.weight)
    of_model, of_other = plain(model.parameters()), plain(discriminator.parameters())

    def step(batch: torch.Tensor) -> None:
        with_gradients(discriminator)
        of_other.step()
        backward(model, batch)
        of_model.step()
        of_other.step()

    return step


def in_backward(model: nn.Module, ema: Any) -> Step:
    """One optimizer per parameter, on autograd's thread."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    return lambda batch: loss_of(model, batch).backward()


def torchs_in_backward(model: nn.Module, ema: Any) -> Step:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    return lambda batch: loss_of(model, batch).backward()


def compiled_optimizer(model: nn.Module, ema: Any) -> Step:
    optimizer = plain(model.parameters())
    compiled = torch.compile(optimizer.step, backend="eager")

    def step(batch: torch.Tensor) -> None:
        backward(model, batch)
        compiled()

    return step


def compiled_training_step(model: nn.Module, ema: Any) -> Step:
    optimizer = plain(model.parameters())

    @torch.compile(backend="eager")
    def step(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()

    return step


def scaled(model: nn.Module, ema: Any) -> Step:
    """The first steps are skipped: the scale is far too large."""
    optimizer, scaler = plain(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**126)

    def step(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(10 * loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def zero_redundancy(model: nn.Module, ema: Any) -> Step:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return stepping(lambda parameters: ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1))(model, ema)


def adamw(**options: Any) -> Callable[..., Step]:
    return stepping(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, **options))


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


FORMS = {
    "SGD": stepping(plain),
    "AdamW": adamw(foreach=False),
    "AdamW, foreach": adamw(foreach=True),
    "AdamW, fused": adamw(fused=True),
    "Adafactor": stepping(torch.optim.Adafactor),
    "Muon and AdamW": muon_and_adamw,
    "Muon in a single file": stepping(SingleFileMuon),
    "Muon in a single file, closure": with_closure(SingleFileMuon),
    "closure": with_closure(plain),
    "closure by keyword": with_closure(plain, named=True),
    "LBFGS": with_closure(lbfgs),
    "LBFGS by keyword": with_closure(lbfgs, named=True),
    "subclass": stepping(Outer),
    "subclass, closure": with_closure(Outer),
    "ZeroRedundancyOptimizer": zero_redundancy,
    "in backward": in_backward,
    "torch's in backward": torchs_in_backward,
    "compiled optimizer": compiled_optimizer,
    "compiled training step": compiled_training_step,
    "gradient scaler": scaled,
    "accumulation": accumulated,
    "GAN": adversarial,
    "SAM, closure": sam_in_closure,
    "SAM, two steps": sam_in_two_steps,
    "schedule-free": schedule_free,
    "no torch optimizer": no_torch_optimizer,
    ".data after the step": data_after_step,
    "load_state_dict": loading,
}
