"""Libraries that save averages, each set up to do the same: one checkpoint of two averages of a model.

Peers that are not installed are left out, and ``absent`` lists them. Ours, ``torch.distributed.checkpoint`` and
``torch.save`` with an fsync are durable when they are done; the other files are wherever the system has them.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench import contestants
from bench.contestants import ASYNC, EMA_PYTORCH, NITROUS_001, SYNC
from nitrous_ema import AsyncPostHocEMA, PostHocEMA

EMA_PYTORCH_HALF = f"{EMA_PYTORCH}, float16 files"
EMA_PYTORCH_FULL = f"{EMA_PYTORCH}, float32 files"
DCP = "torch.distributed.checkpoint async_save"
TORCH_SAVE = "torch.save"


@dataclass(frozen=True, kw_only=True)
class Saver:
    """Two averages of one model, and a way to save them."""

    folder: Path
    update: Callable[[], Any]
    """One update of the averages: after it, they may be saved again."""
    save: Callable[[], Any]
    """One checkpoint: the training thread goes on when it returns."""
    save_durably: Callable[[], Any] | None = None
    """One checkpoint, until its bytes are durable; None if nothing here makes them so."""
    fence: Callable[[], Any] | None = None
    """The caller is past the averaging; None where it always is."""
    wait: Callable[[], Any] | None = None
    """Until what ``save`` left to the background is done; None where nothing is."""
    is_saving: Callable[[], bool] = lambda: False
    """Whether it is not done yet."""

    def settle(self) -> None:
        """Untimed, between two samples: nothing is under way, no file is left, and one more update is done."""
        if self.wait is not None:
            self.wait()
        clear(self.folder)
        self.update()
        if self.fence is not None:
            self.fence()


Make = Callable[[nn.Module, ExitStack, Path], dict[str, Saver]]


def makers() -> tuple[list[Make], dict[str, str]]:
    """Every library that is installed, ours first; and why others are absent."""
    found: list[Make] = [_sync, _async]
    absent: dict[str, str] = {}
    library, reason = contestants.nitrous_001()
    if library is not None:
        found.append(partial(_nitrous_001, library))
    else:
        absent["nitrous-ema 0.0.1"] = reason
    try:
        import ema_pytorch

        found.append(partial(_ema_pytorch, ema_pytorch))
    except ImportError as error:
        absent["ema-pytorch"] = str(error)
    found.append(_torch)
    return found, absent


def clear(folder: Path) -> None:
    """Remove what is in a folder, with all of its unwritten pages: no contestant waits for another's bytes."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # nor for the removal
    finally:
        os.close(descriptor)


def _sync(model: nn.Module, stack: ExitStack, parent: Path) -> dict[str, Saver]:
    folder = _folder(parent, "sync")
    ema = PostHocEMA(
        model,
        contestants.SIGMA_RELS,
        checkpoint_every_num_steps="manual",
        checkpoint_folder=folder,
        update_every=1,
    )
    stack.enter_context(ema)
    ema.update()
    return {SYNC: Saver(folder=folder, update=ema.update, save=ema.checkpoint, save_durably=ema.checkpoint)}


def _async(model: nn.Module, stack: ExitStack, parent: Path) -> dict[str, Saver]:
    folder = _folder(parent, "async")
    ema = AsyncPostHocEMA(
        model, contestants.SIGMA_RELS, checkpoint_every_num_steps="manual", checkpoint_folder=folder, max_pending=2
    )
    stack.enter_context(ema)
    ema.update()
    ema.fence()

    def save_durably() -> None:
        ema.checkpoint()
        ema.flush()

    saver = Saver(
        folder=folder,
        update=ema.update,
        save=ema.checkpoint,
        save_durably=save_durably,
        fence=ema.fence,
        wait=ema.flush,
        is_saving=lambda: ema.stats().pending > 0,
    )
    return {ASYNC: saver}


def _nitrous_001(library: ModuleType, model: nn.Module, stack: ExitStack, parent: Path) -> dict[str, Saver]:
    folder = _folder(parent, "nitrous-001")
    ema = library.PostHocEMA(
        model,
        sigma_rels=contestants.SIGMA_RELS,
        checkpoint_every_num_steps=1e10,
        checkpoint_folder=str(folder),
        update_every=1,
        step_size_correction=False,
    )
    ema.update()
    return {NITROUS_001: Saver(folder=folder, update=ema.update, save=ema.checkpoint)}


def _ema_pytorch(library: ModuleType, model: nn.Module, stack: ExitStack, parent: Path) -> dict[str, Saver]:
    """One pair of averages, saved in the library's default type and in the one that the others use."""
    folder = _folder(parent, "ema-pytorch")
    ema = library.PostHocEMA(
        model,
        sigma_rels=contestants.SIGMA_RELS,
        checkpoint_every_num_steps="manual",
        checkpoint_folder=str(folder),
        update_every=1,
    )
    ema.update()

    def saving(dtype: torch.dtype) -> Callable[[], None]:
        def save() -> None:
            ema.checkpoint_dtype = dtype
            ema.checkpoint()

        return save

    half = Saver(folder=folder, update=ema.update, save=saving(torch.float16))
    return {EMA_PYTORCH_HALF: half, EMA_PYTORCH_FULL: replace(half, save=saving(torch.float32))}


def _torch(model: nn.Module, stack: ExitStack, parent: Path) -> dict[str, Saver]:
    """Two averages by ``torch._foreach_lerp_``, saved by what torch has for that."""
    folder, states = _folder(parent, "torch"), averaged_states(model)
    live = [tensor.detach() for tensor in model.state_dict().values() if tensor.is_floating_point()]
    numbers = count()

    def update() -> None:
        for state, weight in zip(states.values(), contestants.WEIGHTS, strict=True):
            torch._foreach_lerp_(list(state.values()), live, weight)

    def save_plainly() -> None:
        torch.save(states, folder / f"{next(numbers)}.pt")

    def save_durably() -> None:
        with (folder / f"{next(numbers)}.pt").open("wb") as file:
            torch.save(states, file)
            file.flush()
            os.fsync(file.fileno())

    plainly = Saver(folder=folder, update=update, save=save_plainly, save_durably=save_durably)
    return {**_distributed_checkpoint(plainly, states, numbers), TORCH_SAVE: plainly}


def _distributed_checkpoint(
    plainly: Saver, states: dict[str, dict[str, Tensor]], numbers: count[int]
) -> dict[str, Saver]:
    """The same averages and folder. Its files are synced by default; it needs no other process."""
    from torch.distributed import checkpoint

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is asked to be, by no_dist
    running: list[Future[Any]] = []

    def save() -> None:
        made = checkpoint.async_save(states, checkpoint_id=plainly.folder / f"{next(numbers)}", no_dist=True)
        assert isinstance(made, Future)  # another kind is returned only with staging in the background
        running.append(made)

    def wait() -> None:
        while running:
            running.pop().result()

    def is_saving() -> bool:
        return not all(made.done() for made in running)

    def save_durably() -> None:
        checkpoint.save(states, checkpoint_id=plainly.folder / f"{next(numbers)}", no_dist=True)

    return {DCP: replace(plainly, save=save, save_durably=save_durably, wait=wait, is_saving=is_saving)}


def averaged_states(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Two averages of a model as libraries save them: a ``state_dict`` each."""
    return {
        name: {key: value.detach().clone() for key, value in model.state_dict().items() if value.is_floating_point()}
        for name in ("0", "1")
    }


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder
