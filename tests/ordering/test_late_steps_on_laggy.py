"""Optimizer steps that come while a snapshot is being copied out, on the laggy device."""

from __future__ import annotations

import tempfile
import threading
from typing import Any
from unittest import mock

import pytest
import torch

from nitrous_ema.async_.lanes import AcceleratorLane
from nitrous_ema.averaging.execution.deferred_updates import StashPool
from tests.support.fakes import TIMEOUT_SECONDS, averages_of, make_gradients, make_model, small_pieces
from tests.support.laggy import device as laggy
from tests.support.laggy.loops import quick_files
from tests.support.laggy.runner import assert_right_on_laggy
from tests.support.scenarios import make_ema, make_optimizer

PAGE_BYTES = 4096


def set_gradients(model: torch.nn.Module, of_step: Any) -> None:
    for parameter, gradient in zip(model.parameters(), of_step, strict=True):
        parameter.grad = gradient


def long_copy(device: str, profiles: int, steps: int) -> dict[str, Any]:
    """Train while the copy of a snapshot takes so many steps and advances evenly."""
    with tempfile.TemporaryDirectory() as folder, small_pieces(PAGE_BYTES, PAGE_BYTES // 4), quick_files():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)]).to(device)
        ema = make_ema(
            model,
            folder,
            checkpoint_every_num_steps="manual",
            read="guarded",
            sigma_rels=(0.05, 0.15)[:profiles],
        )
        optimizer = make_optimizer(model)
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        pages, copied = -(-num_bytes // PAGE_BYTES) * profiles, 0
        for done, of_step in enumerate(make_gradients(steps + 1, model)):
            if done:
                let_through, copied = pages * done // steps - copied, pages * done // steps
                laggy.hold_copies(let_through) if done < steps else laggy.release_copies()
            if device != "cpu":
                settle()
            set_gradients(model, of_step)
            optimizer.step()
            ema.update()
            if done == 0:
                laggy.hold_copies()
                ema.checkpoint()
        stats = ema.stats()
        most = num_bytes + 6 * PAGE_BYTES
        ema.close()
        return {"held up": stats.held_up, "within the scratch": stats.scratch_bytes <= most, **averages_of(ema)}


def settle() -> None:
    """Return when everything has run that may run: work on a stream of its own, behind no copy, starts the device.

    A wait for the device would end the hold, so its counter of pending tasks is polled until it stays.
    """
    home, pause, counts = torch.accelerator.current_stream(), threading.Event(), []
    torch.accelerator.set_stream(torch.Stream(device=laggy.NAME))
    while len(counts) < 200 and (len(counts) < 3 or len(set(counts[-3:])) > 1):
        torch.ones(1, device=laggy.NAME)
        pause.wait(0.01)
        counts.append(laggy.counters()["pending"])
    torch.accelerator.set_stream(home)


@pytest.mark.parametrize("profiles", [1, 2])
def test_six_late_steps_fit_in_the_default_scratch(profiles):
    assert_right_on_laggy(long_copy, cases=[{"profiles": profiles, "steps": 6}], schedules=["eager"])


def interrupted(device: str) -> dict[str, Any]:
    """Press Ctrl-C in the hook, right after a late batch was queued; the step has written nothing, and is repeated."""
    with tempfile.TemporaryDirectory() as folder, small_pieces(), quick_files():
        model = make_model("plain", device)
        ema = make_ema(model, folder, checkpoint_every_num_steps="manual", read="guarded")
        optimizer, was_interrupted = make_optimizer(model), device == "cpu"
        enqueue_write = AcceleratorLane.enqueue_write

        def interrupt(self: AcceleratorLane, *arguments: Any, **options: Any) -> None:
            enqueue_write(self, *arguments, **options)
            raise KeyboardInterrupt

        for step, of_step in enumerate(make_gradients(5, model)):
            set_gradients(model, of_step)
            if step == 3 and device != "cpu":
                laggy.release_copies()
                ema._engine._sink.flush(TIMEOUT_SECONDS)  # what was late is averaged in the next hook
                with mock.patch.object(AcceleratorLane, "enqueue_write", interrupt):
                    try:
                        optimizer.step()
                    except KeyboardInterrupt:
                        was_interrupted = True
            optimizer.step()
            ema.update()
            if step == 1:
                laggy.hold_copies()
                ema.checkpoint()
        laggy.release_copies()
        averages = averages_of(ema)
        ema.close()
        return {**averages, "was interrupted": was_interrupted}


def test_interrupted_step_is_averaged_once():
    assert_right_on_laggy(interrupted, schedules=["eager", "lazy", "random:0", "random:1"])


def memory_of_the_stash(device: str) -> dict[str, Any]:
    """Train with deferred updates while freed blocks of every size are in the cache of the trainer's stream."""
    streams: list[Any] = []
    allocate = StashPool._allocate

    def noted(self: StashPool, num_bytes: int) -> Any:
        before = laggy.counters()["reuses"]
        block = allocate(self, num_bytes)
        streams.append(laggy.counters()["reuses"] - before)
        return block

    with tempfile.TemporaryDirectory() as folder, small_pieces(), quick_files():
        model = make_model("plain", device)
        ema = make_ema(model, folder, checkpoint_every_num_steps="manual", read="guarded")
        optimizer = make_optimizer(model)
        with mock.patch.object(StashPool, "_allocate", noted):
            for step, of_step in enumerate(make_gradients(4, model)):
                set_gradients(model, of_step)
                optimizer.step()
                ema.update()
                if step == 1:
                    laggy.hold_copies()
                    ema.checkpoint()
                freed = [torch.ones(size, dtype=torch.uint8, device=device) for size in range(16, 5000, 16)]
                del freed
        laggy.release_copies()
        averages = averages_of(ema)
        ema.close()
        return {**averages, "allocated": bool(streams) or device == "cpu", "of the trainer's memory": sum(streams)}


def test_stash_takes_no_memory_out_of_the_trainers_cache():
    assert_right_on_laggy(memory_of_the_stash, schedules=["eager", "lazy", "random:0"])
