"""A write guard whose waits are only logged, and a training loop with any way of writing weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nitrous_ema import PostHocEMA
from nitrous_ema.averaging.execution.write_guard import WriteGuard, install_hooks
from tests.support.fakes import TIMEOUT_SECONDS, averages_of, make_batches, make_model

STEPS = 6

Step = Callable[[torch.Tensor], None]
"""One training step on a batch: gradients, and the writing of weights."""
Form = Callable[[nn.Module, Any], Step]
"""Given the model and its EMA, makes the step: an optimizer and the way in which it is used."""


class Rig:
    """A model, its guard with hooks, and a log of the weights and the thread at each time a writer was ordered."""

    def __init__(self, read: Any = "guarded", model: nn.Module | None = None) -> None:
        self.model = model if model is not None else nn.Linear(3, 2)
        self.waits: list[torch.Tensor] = []
        self.threads: list[int] = []
        self.is_capturing = False
        self.guard = WriteGuard(read, self._order, lambda: self.is_capturing)
        self.remove = install_hooks(self.guard, self.model)

    def _order(self) -> None:
        self.waits.append(self.weights())
        self.threads.append(threading.get_ident())

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])

    def update(self) -> None:
        self.guard.before_update()
        named = dict(self.model.named_parameters())
        self.guard.after_update(list(named), list(named.values()))

    def forget(self) -> None:
        self.waits.clear()
        self.threads.clear()

    def train(self) -> torch.optim.Optimizer:
        """Train past the first updates, which fence by themselves; the weights are being read when this returns."""
        optimizer = sgd(self.model)
        self.update()
        optimizer.step()
        self.update()
        self.forget()
        return optimizer


@contextmanager
def rigs() -> Iterator[Callable[..., Rig]]:
    """Yield a function that makes rigs, and remove their hooks at the end."""
    made: list[Rig] = []

    def make(*args: Any, **kwargs: Any) -> Rig:
        made.append(Rig(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.remove()


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    return model


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(with_gradients(model).parameters(), lr=0.1)


def averages_after(
    cls: type[PostHocEMA], folder: Path, form: Form, kind: str = "plain", **options: Any
) -> dict[str, torch.Tensor]:
    """Return the averages after a short training of a model of ``make_model``."""
    model = make_model(kind)
    ema = cls(model, checkpoint_folder=folder, checkpoint_every_num_steps="manual", update_every=1, **options)
    try:
        step = form(model, ema)
        for batch in make_batches(STEPS, model):
            step(batch)
            ema.update()
        return averages_of(ema)
    finally:
        ema.close(TIMEOUT_SECONDS)
