"""Who is late: lanes, copies and callers that are held up on the device, by a kernel that does nothing for a while.

On CUDA that opens a race wide. Elsewhere nothing sleeps: on the laggy device its schedule decides who is late.
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
WHO = ("nobody", "updates", "copies", "chunks", "streams", "caller", "readers")
"""Who is late for a moment."""


def hold_up(device: torch.device | str, cycles: int = SHORT_CYCLES) -> None:
    """What is queued on the current stream of a device from here waits that long."""
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda._sleep(cycles)


@contextmanager
def late(who: str) -> Iterator[None]:
    """In here, lanes for accelerators have this to contend with.

    Args:
        who: "updates": averaging is late, so optimizers, readers, snapshot copies and the caller's next copies must
            wait for it. "copies": snapshot copies are, so averages must not be overwritten, nor pages read, before
            them. "chunks": each chunk of a copy is, so that copies are over in parts. "streams": all of that, also on
            lanes that do not wait as they should. "caller": optimizers are, so that lanes must wait for them.
            "readers": what reads averages is, so that they must not be overwritten before. "copies, for long": copies
            are later than many steps.
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
        "nobody": nullcontext,
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
