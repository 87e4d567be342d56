"""More scenarios (see ``scenarios.py``): snapshots whose readback, or whose disk, is far slower than training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from nitrous_ema import PostHocEMA
from nitrous_ema.async_.staging import StagingCopies
from nitrous_ema.averaging.kernels.fused_step import FusedStep
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    Gate,
    StalledFiles,
    averages_of,
    make_gradients,
    make_model,
    small_pieces,
    snapshot_bytes,
)
from tests.support.late import late
from tests.support.scenarios import STEPS, make_ema, make_optimizer


def long_copy(device: str, who: str = "none", outlives: bool = False, background: bool | None = None) -> dict[str, Any]:
    """Train while the readback of a snapshot takes longer than several steps.

    Args:
        device: The device.
        who: The late party, see ``late``.
        outlives: Whether the readback is certain to be in progress still when training has ended.
        background: As in ``make_ema``.

    Longer than 25 lines: the delays and the points where they end stand in order.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        gate = Gate(is_open=not outlives)
        may_wait = stack.enter_context(no_writer_waits_before(gate, nor_queries=not device.startswith("cuda")))
        for context in (small_pieces(1 << 14, 1 << 12), fused_pieces(1 << 12), late(who)):
            stack.enter_context(context)
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 1)).to(device)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.5)
        optimizer = make_optimizer(model)
        ema = make_ema(
            model, folder, background=background, checkpoint_every_num_steps="manual", read="guarded", scratch="1MiB"
        )
        for step, of_step in enumerate(make_gradients(STEPS, model)):
            for parameter, gradient in zip(model.parameters(), of_step, strict=True):
                parameter.grad = gradient
            optimizer.step()
            ema.update()
            if step == 1:
                ema.checkpoint()
        optimizer.step()  # writes the weights that the last update reads
        is_inline = device == "cpu" or background is False
        outlived = not outlives or is_inline or is_copying_when_trained(ema, device)
        may_wait.open()
        averages, held_up = averages_of(ema), ema.stats().held_up
        ema.close()
        return {**averages, "snapshots": snapshot_bytes(folder), "copy outlived training": outlived, "held": held_up}


@contextmanager
def no_writer_waits_before(gate: Gate, *, nor_queries: bool) -> Iterator[Gate]:
    """Keep writers from waiting for a readback before a gate is open.

    Args:
        gate: The gate.
        nor_queries: Answer no query before that either: a lazy device goes on only because of waits and queries.
    """
    wait_for_page, have_finished = StagingCopies.wait_for_page, StagingCopies.have_finished

    def wait_later(copies: StagingCopies, page: int) -> None:
        gate.pass_through()
        wait_for_page(copies, page)

    def query_later(copies: StagingCopies, last: int) -> bool:
        return (gate.is_open() or not nor_queries) and have_finished(copies, last)

    with mock.patch.multiple(StagingCopies, wait_for_page=wait_later, have_finished=query_later):
        yield gate


def is_copying_when_trained(ema: PostHocEMA, device: str) -> bool:
    """Wait, on the host, for the current stream; return whether the readback is still in progress then."""
    trained = torch.Event(torch.device(device))
    trained.record(torch.accelerator.current_stream())
    trained.synchronize()
    (lane,) = ema._engine._dispatch.lanes()
    return not lane._copy_stream.query()


@contextmanager
def fused_pieces(batch_elements: int) -> Iterator[None]:
    """Make batches of the fused step so small that there are many."""
    with mock.patch.object(FusedStep.__init__, "__defaults__", (batch_elements,)):
        yield


def slow_disk(device: str, background: bool | None = None) -> dict[str, Any]:
    """Train with one slot, and a disk that is busy until training has ended: the slot must not be written again."""
    gate = Gate()
    with tempfile.TemporaryDirectory() as folder, small_pieces(), files_of_new_emas(StalledFiles(gate)):
        model = make_model("plain", device)
        optimizer = make_optimizer(model)
        ema = make_ema(model, folder, background=background, max_pending=1, on_full="skip")
        for of_step in make_gradients(STEPS, model):
            for parameter, gradient in zip(model.parameters(), of_step, strict=True):
                parameter.grad = gradient
            optimizer.step()
            ema.update()
        gate.open()
        ema.close(TIMEOUT_SECONDS)
        return {"first snapshot": snapshot_bytes(folder)[2]}  # inline there are more


@contextmanager
def files_of_new_emas(files: FileSystem) -> Iterator[None]:
    """Make EMAs that are constructed in the block write their snapshots with this file system."""
    with mock.patch("nitrous_ema.averaging.ema.SnapshotStore", partial(SnapshotStore, files=files)):
        yield
