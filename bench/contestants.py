"""Libraries that average weights, each set up to do the same: two averages of a model, updated at every call.

No library takes snapshots here. Peers that are not installed are left out, and ``absent`` says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

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


@dataclass(frozen=True)
class Averaging:
    """Two averages of one model."""

    update: Callable[[], Any]
    fence: Callable[[], Any] | None = None
    """Orders the caller after an update that goes on in the background; None where there is none."""

    def update_and_fence(self) -> None:
        """One update; when it returns (on an accelerator: when the device is through), the averaging is done."""
        self.update()
        if self.fence is not None:
            self.fence()


Make = Callable[[nn.Module, ExitStack], Averaging]


def makers() -> tuple[dict[str, Make], dict[str, str]]:
    """Every library that is installed, ours first; and why others are absent."""
    found: dict[str, Make] = {SYNC: _sync, ASYNC: _async}
    absent: dict[str, str] = {}
    try:
        import ema_pytorch

        found[EMA_PYTORCH] = lambda model, stack: _peer(ema_pytorch, model, stack, "manual")
        found[EMA_FOREACH] = lambda model, stack: _ema_foreach(ema_pytorch, model)
    except ImportError as error:
        absent["ema-pytorch"] = str(error)
    library, reason = nitrous_001()
    if library is not None:
        found[NITROUS_001] = lambda model, stack: _peer(library, model, stack, 1e10, step_size_correction=False)
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


def _sync(model: nn.Module, stack: ExitStack) -> Averaging:
    ema = PostHocEMA(
        model, SIGMA_RELS, checkpoint_every_num_steps="manual", checkpoint_folder=_folder(stack), update_every=1
    )
    stack.enter_context(ema)
    return Averaging(ema.update)


def _async(model: nn.Module, stack: ExitStack) -> Averaging:
    ema = AsyncPostHocEMA(model, SIGMA_RELS, checkpoint_every_num_steps="manual", checkpoint_folder=_folder(stack))
    stack.enter_context(ema)
    return Averaging(ema.update, ema.fence)


def _peer(library: ModuleType, model: nn.Module, stack: ExitStack, never: Any, **options: Any) -> Averaging:
    ema = library.PostHocEMA(
        model,
        sigma_rels=SIGMA_RELS,
        checkpoint_every_num_steps=never,
        checkpoint_folder=_folder(stack),
        update_every=1,
        **options,
    )
    return Averaging(ema.update)


def _ema_foreach(library: ModuleType, model: nn.Module) -> Averaging:
    """The library's other class, which keeps one average with a constant decay: two of them."""
    emas = [
        library.EMA(
            model,
            beta=1 - weight,
            update_every=1,
            update_after_step=0,
            include_online_model=False,
            use_foreach=True,
        )
        for weight in WEIGHTS
    ]
    return Averaging(lambda: [ema.update() for ema in emas])


def _averaged_model(model: nn.Module, stack: ExitStack) -> Averaging:
    averages = [
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - weight), use_buffers=True) for weight in WEIGHTS
    ]
    return Averaging(lambda: [average.update_parameters(model) for average in averages])


def nitrous_001() -> tuple[ModuleType | None, str]:
    """The module, or None and why it is absent."""
    try:
        import pytest

        from tests.peers import load_nitrous_001
    except ImportError as error:
        return None, str(error)
    try:
        return load_nitrous_001(), ""
    except (pytest.skip.Exception, pytest.fail.Exception) as absent:
        return None, str(absent)


def _folder(stack: ExitStack) -> str:
    return stack.enter_context(tempfile.TemporaryDirectory(prefix="nitrous-ema-bench-"))
