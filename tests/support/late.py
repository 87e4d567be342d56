"""Late parties: lanes, readbacks and callers that are held up on the device by a kernel that does nothing for a while.

On CUDA the delay opens a race wide. On other devices nothing sleeps: on the laggy device its schedule decides which
party is late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, partialmethod
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nitrous_ema.async_ import lanes
from nitrous_ema.averaging.execution.device_to_host import ChunkCopier
from nitrous_ema.averaging.execution.interfaces import Work

SHORT_CYCLES = 20_000_000
"""Some 10 ms: far longer than a step of a toy model."""
LONG_CYCLES = 2_000_000_000
"""About a second."""
WHO = ("none", "updates", "copies", "chunks", "streams", "caller", "readers")
"""The parties that can be late for a moment."""


def hold_up(device: torch.device | str, cycles: int = SHORT_CYCLES) -> None:
    """Delay later work on the current stream of a device by so many clock cycles; on CUDA only."""
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda._sleep(cycles)


@contextmanager
def late(who: str) -> Iterator[None]:
    """Make one party late in the block, on accelerators.

    Args:
        who: "updates": averaging is late; optimizers, readers, readbacks and the caller's next copies must wait for it.
            "copies": readbacks are late; averages must not be overwritten, nor pages read, before them. "chunks": each
            chunk of a readback is late, so that readbacks finish in parts. "streams": averaging and readbacks are late,
            also on lanes that lack a wait. "caller": optimizers are late; lanes must wait for them. "readers": readers
            of averages are late; averages must not be overwritten before. "copies, for long": readbacks are later than
            many steps. "none": no party is late.
    """
    enqueue_write = lanes.AcceleratorLane.enqueue_write
    enqueue_read = lanes.AcceleratorLane.enqueue_read
    order_reader = lanes.AcceleratorLane.order_reader

    def late_write(self: lanes.AcceleratorLane, work: Work, **options: Any) -> None:
        enqueue_write(self, partial(_after_sleep, self._device, SHORT_CYCLES, work), **options)

    def late_read_by(self: lanes.AcceleratorLane, cycles: int, work: Work, abandon: Work) -> None:
        enqueue_read(self, partial(_after_sleep, self._device, cycles, work), abandon)

    def late_reader(self: lanes.AcceleratorLane) -> None:
        order_reader(self)
        hold_up(self._device)

    patches: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "none": nullcontext,
        "updates": lambda: mock.patch.object(lanes.AcceleratorLane, "enqueue_write", late_write),
        "copies": lambda: mock.patch.object(
            lanes.AcceleratorLane, "enqueue_read", partialmethod(late_read_by, SHORT_CYCLES)
        ),
        "copies, for long": lambda: mock.patch.object(
            lanes.AcceleratorLane, "enqueue_read", partialmethod(late_read_by, LONG_CYCLES)
        ),
        "chunks": lambda: mock.patch.object(ChunkCopier, "yield_copy_engine", _sleep_between),
        "streams": lambda: mock.patch.object(lanes, "_entered", _entered_late),
        "caller": _late_optimizers,
        "readers": lambda: mock.patch.object(lanes.AcceleratorLane, "order_reader", late_reader),
    }
    with patches[who]():
        yield


@contextmanager
def _late_optimizers() -> Iterator[None]:
    def hold_up_optimizer(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        hold_up(optimizer.param_groups[0]["params"][0].device)

    hook = register_optimizer_step_pre_hook(hold_up_optimizer)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _entered_late(stream: torch.Stream) -> Iterator[None]:
    with _entered(stream):
        hold_up(stream.device)
        yield


_entered = lanes._entered


def _after_sleep(device: torch.device, cycles: int, work: Work) -> None:
    hold_up(device, cycles)
    work()


def _sleep_between(copier: ChunkCopier) -> None:
    hold_up(copier._device)
