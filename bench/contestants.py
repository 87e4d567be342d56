"""Libraries that average weights, each set up to do the same: two averages of a model, updated at every call.

No library takes snapshots here. Peers that are not installed are left out, and ``absent`` lists them.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nitrous_ema import AsyncPostHocEMA, PostHocEMA

SIGMA_RELS = (0.05, 0.10)
WEIGHTS = (0.01, 0.001)  # of the parameters, where a library wants constants; their values do not change the work

FLOOR = "2 flat lerp_"
FOREACH = "2 torch._foreach_lerp_"
SYNC = "PostHocEMA"
ASYNC = "AsyncPostHocEMA"
EMA_PYTORCH = "ema-pytorch PostHocEMA"
EMA_FOREACH = "ema-pytorch 2 x EMA(use_foreach)"
NITROUS_001 = "nitrous-ema 0.0.1 PostHocEMA"
TORCH = "torch 2 x AveragedModel"
SIDE_STREAM = "side stream as in NeMo"


@dataclass(frozen=True)
class Averaging:
    """Two averages of one model."""

    update: Callable[[], Any]
    fence: Callable[[], Any] | None = None
    """Orders the caller after an update that goes on in the background; None where nothing runs in the background."""
    before_step: Callable[[], Any] | None = None
    """What the library does at the start of an optimizer step, if it wraps the optimizer."""

    def update_and_fence(self) -> None:
        """One update; when it returns (on an accelerator: when the device is through), the averaging is done."""
        self.update()
        if self.fence is not None:
            self.fence()


class Make(Protocol):
    """Sets a library up for a model, until the stack is left."""

    def __call__(self, model: nn.Module, stack: ExitStack, update_every: int = 1) -> Averaging: ...


def makers() -> tuple[dict[str, Make], dict[str, str]]:
    """Every library that is installed, ours first; and why others are absent."""
    found: dict[str, Make] = {SYNC: _sync, ASYNC: _async}
    absent: dict[str, str] = {}
    try:
        import ema_pytorch

        found[EMA_PYTORCH] = partial(_peer, ema_pytorch, never="manual")
        found[EMA_FOREACH] = partial(_ema_foreach, ema_pytorch)
    except ImportError as error:
        absent["ema-pytorch"] = str(error)
    library, reason = nitrous_001()
    if library is not None:
        found[NITROUS_001] = partial(_peer, library, never=1e10, step_size_correction=False)
    else:
        absent["nitrous-ema 0.0.1"] = reason
    found[TORCH] = _averaged_model
    return found, absent


def floor(elements: int, device: torch.device) -> Averaging:
    """The least there is to do: two flat float32 averages move towards one flat float32 tensor, one after the other."""
    parameters = torch.rand(elements, device=device)
    averages = [torch.zeros_like(parameters) for _ in WEIGHTS]

    def update() -> None:
        for average, weight in zip(averages, WEIGHTS, strict=True):
            average.lerp_(parameters, weight)

    return Averaging(update)


def foreach(model: nn.Module) -> Averaging:
    """The same by one foreach call per average over the model's own tensors, prepared outside the timing."""
    tensors = [each.detach() for each in [*model.parameters(), *model.buffers()] if each.is_floating_point()]
    averages = [[torch.zeros_like(each) for each in tensors] for _ in WEIGHTS]

    def update() -> None:
        for average, weight in zip(averages, WEIGHTS, strict=True):
            torch._foreach_lerp_(average, tensors, weight)

    return Averaging(update)


def side_stream(model: nn.Module, stack: ExitStack, update_every: int = 1) -> Averaging:
    """What NeMo's EMAOptimizer does, for two averages: a side stream, foreach, and a host that waits before each step.

    Parameters only, averages in their type; the two multiplications and two additions are those of the source. On the
    CPU, where that starts a thread for each update, everything happens at once.

    Source:
        NVIDIA/NeMo at 94bd3466, nemo/collections/common/callbacks/ema.py: ``ema_update``, ``EMAOptimizer.step``,
        ``.update`` and ``.join``.
    """
    parameters = [each.detach() for each in model.parameters()]
    averages = [[each.clone() for each in parameters] for _ in WEIGHTS]
    module = torch.get_device_module(parameters[0].device)
    stream = module.Stream() if parameters[0].device.type != "cpu" else None

    def update() -> None:
        if stream is not None:
            stream.wait_stream(module.current_stream())
        with module.stream(stream):
            for average, weight in zip(averages, WEIGHTS, strict=True):
                torch._foreach_mul_(average, 1 - weight)
                torch._foreach_add_(average, parameters, alpha=weight)

    def join() -> None:
        if stream is not None:
            stream.synchronize()

    stack.callback(join)  # before the averages go: they were made on another stream
    return Averaging(_every(update_every, update), fence=join, before_step=join)


def _sync(
    model: nn.Module, stack: ExitStack, update_every: int = 1, on_nonfinite: Literal["warn", "skip"] = "warn"
) -> Averaging:
    ema = PostHocEMA(
        model,
        SIGMA_RELS,
        checkpoint_every_num_steps="manual",
        checkpoint_folder=_folder(stack),
        update_every=update_every,
        on_nonfinite=on_nonfinite,
    )
    stack.enter_context(ema)
    return Averaging(ema.update)


def skipping(model: nn.Module, stack: ExitStack) -> Averaging:
    """Ours, which first looks whether every weight is finite."""
    return _sync(model, stack, on_nonfinite="skip")


def _async(model: nn.Module, stack: ExitStack, update_every: int = 1) -> Averaging:
    ema = AsyncPostHocEMA(
        model,
        SIGMA_RELS,
        checkpoint_every_num_steps="manual",
        checkpoint_folder=_folder(stack),
        update_every=update_every,
    )
    stack.enter_context(ema)
    return Averaging(ema.update, ema.fence)


def _peer(
    library: ModuleType, model: nn.Module, stack: ExitStack, update_every: int = 1, *, never: Any, **options: Any
) -> Averaging:
    ema = library.PostHocEMA(
        model,
        sigma_rels=SIGMA_RELS,
        checkpoint_every_num_steps=never,
        checkpoint_folder=_folder(stack),
        update_every=update_every,
        **options,
    )
    return Averaging(ema.update)


def _ema_foreach(library: ModuleType, model: nn.Module, stack: ExitStack, update_every: int = 1) -> Averaging:
    """The library's other class, which keeps one average with a constant decay: two of them."""
    emas = [
        library.EMA(
            model,
            beta=1 - weight,
            update_every=update_every,
            update_after_step=0,
            include_online_model=False,
            use_foreach=True,
        )
        for weight in WEIGHTS
    ]
    return Averaging(lambda: [ema.update() for ema in emas])


def _averaged_model(model: nn.Module, stack: ExitStack, update_every: int = 1) -> Averaging:
    averages = [
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - weight), use_buffers=True) for weight in WEIGHTS
    ]
    return Averaging(_every(update_every, lambda: [average.update_parameters(model) for average in averages]))


def _every(calls: int, update: Callable[[], Any]) -> Callable[[], None]:
    """For what has no such option: the first call and every so many after it."""
    turns = itertools.cycle([update, *[_nothing] * (calls - 1)])
    return lambda: next(turns)()


def nitrous_001() -> tuple[ModuleType | None, str]:
    """The module, or None and why it is absent."""
    try:
        from tests.support.peers import ABSENT, find_nitrous_001

        return find_nitrous_001(), ABSENT
    except ImportError as error:  # what it imports itself
        return None, str(error)


def _folder(stack: ExitStack) -> str:
    return stack.enter_context(tempfile.TemporaryDirectory(prefix="nitrous-ema-bench-"))


def _nothing() -> None:
    pass
