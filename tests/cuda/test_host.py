"""The host never waits in the training loop, and a forked child, such as a DataLoader's worker, uses no device."""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nitrous_ema import AsyncPostHocEMA
from tests.support.fakes import TIMEOUT_SECONDS, averages_of, backward, make_batches, make_model, snapshot_bytes
from tests.support.late import late

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Make operations in the block that wait for the device an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():  # of the mode being a prototype; after the warning it is enabled
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "batch norm", "bfloat16", "transposed"])
@pytest.mark.parametrize("read", ["guarded", "copied"])
@pytest.mark.parametrize("who", ["updates", "chunks"])
def test_nothing_in_the_loop_waits_for_the_device(tmp_path, device, kind, read, who):
    with late(who):
        model = make_model(kind, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps=3, max_pending=5, read=read)
        batches = make_batches(10, model)
        for batch in batches[:4]:  # with a snapshot, because some memory is allocated when it is first needed
            backward(model, batch)
            optimizer.step()
            ema.update()
        with no_waits(device):
            for batch in batches[4:]:
                backward(model, batch)
                optimizer.step()
                ema.update()
                ema.fence()
            ema.checkpoint()
        ema.close(TIMEOUT_SECONDS)
    assert list(snapshot_bytes(tmp_path)) == [3, 6, 9, 10]


def use_in_child(ema: AsyncPostHocEMA, optimizer: torch.optim.Optimizer) -> None:
    ema.update()
    ema.checkpoint()
    ema.fence()
    ema.flush(1)
    ema.stats()
    ema.close(1)
    del ema
    gc.collect()


def fork(work: Any, *arguments: Any) -> int | None:
    """Return the exit code of a child process that does this work; None if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: this process has threads
        child = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        child.start()
    child.join(TIMEOUT_SECONDS)
    if child.exitcode is None:
        child.kill()
    return child.exitcode


@pytest.mark.parametrize("device", DEVICES)
def test_forked_child_leaves_the_device_and_the_slots_alone(tmp_path, device):
    with late("copies"):
        model = make_model("plain", device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps=2)
        for batch in make_batches(2, model):
            backward(model, batch)
            optimizer.step()
            ema.update()
        assert fork(use_in_child, ema, optimizer) == 0
        averages = averages_of(ema)
        ema.update()
        ema.close(TIMEOUT_SECONDS)
    assert list(snapshot_bytes(tmp_path)) == [2]
    assert all(value.isfinite().all() for value in averages.values())
