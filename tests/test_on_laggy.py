"""The library on a device that reorders work as a real one may: averages and snapshots have the bits of the CPU.

The reference is ``PostHocEMA`` on the CPU, where nothing runs in the background.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema.async_ import lane as lanes
from nitrous_ema.async_ import writer
from nitrous_ema.copies import CallerCopies
from nitrous_ema.guard import Guard
from tests.fakes import (
    averages_of,
    make_batches,
    make_gradients,
    make_model,
    small_pieces,
    snapshot_bytes,
)
from tests.laggy import device as laggy
from tests.laggy.runner import SCHEDULES, Outcome, run_on_laggy

STEPS = 5


def make_ema(model: torch.nn.Module, folder: str, *, read: str = "auto", **options: Any) -> PostHocEMA:
    """In the background, except on the CPU, which gives the right results."""
    options = {"sigma_rels": (0.05, 0.15), "update_every": 1, "checkpoint_every_num_steps": 2, **options}
    if next(model.parameters()).device.type == "cpu":
        return PostHocEMA(model, checkpoint_folder=folder, **options)
    return AsyncPostHocEMA(model, checkpoint_folder=folder, read=read, **options)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, foreach=True)  # by default foreach is chosen by device


def train(device: str, kind: str = "plain", bug: str | None = None, **options: Any) -> dict[str, Any]:
    """A training loop as users write it; nothing in it may stop the host."""
    with tempfile.TemporaryDirectory() as folder, small_pieces(), break_(bug):
        model = make_model(kind, device)
        inputs, gradients = make_batches(STEPS, model), make_gradients(STEPS, model)
        optimizer = make_optimizer(model)
        ema = make_ema(model, folder, **options)
        waits = []
        for batch, of_step in zip(inputs, gradients, strict=True):
            if kind in ("batch norm", "forced norm"):
                model(batch)  # writes buffers, or weights
            for parameter, gradient in zip(model.parameters(), of_step, strict=True):
                parameter.grad = gradient
            laggy.take_host_waits()
            optimizer.step()
            ema.update()
            waits += laggy.take_host_waits()
        ema.checkpoint()
        ema.fence()
        waits += laggy.take_host_waits()
        averages = averages_of(ema)
        ema.close()
        return {**averages, "snapshots": snapshot_bytes(folder), "host waits": waits, "t": ema.t}


TRAININGS: dict[str, dict[str, Any]] = {
    "guarded": {"read": "guarded"},
    "copied": {"read": "copied"},
    "guarded, every third": {"read": "guarded", "update_every": 3},
    "copied, every third": {"read": "copied", "update_every": 3},
    "batch norm": {"kind": "batch norm"},
    "bfloat16": {"kind": "bfloat16"},
    "bfloat16, copied": {"kind": "bfloat16", "read": "copied"},
    "tied": {"kind": "tied"},
    "transposed": {"kind": "transposed"},
    "weights written in forward": {"kind": "forced norm", "read": "copied"},
}


def run_by_name(cases: dict[str, dict[str, Any]]) -> dict[str, list[Outcome]]:
    """All in one child: it takes seconds to start."""
    outcomes = run_on_laggy(train, cases=list(cases.values()), timeout_seconds=200)
    return {name: outcomes[i * len(SCHEDULES) : (i + 1) * len(SCHEDULES)] for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def trainings() -> dict[str, list[Outcome]]:
    return run_by_name(TRAININGS)


@pytest.mark.parametrize("name", TRAININGS)
def test_training_gives_the_bits_of_the_cpu_and_never_stops_the_host(trainings, name):
    assert len(trainings[name]) == len(SCHEDULES)
    assert [(outcome.schedule, outcome.detail) for outcome in trainings[name] if outcome.verdict != "same"] == []


BUGS: dict[str, dict[str, Any]] = {
    "averages before the caller has written": {},
    "done before the work": {},
    "optimizer does not wait": {},
    "averages written while they are copied": {},
    "averages in another order written while they are copied": {"kind": "transposed"},
    "pages read before they are copied": {},
    "averages copied before they are written": {},
    "copies written while they are read": {"read": "copied"},
}


@contextmanager
def break_(bug: str | None) -> Iterator[None]:
    """Leave out one wait of the library."""
    lane = "nitrous_ema.async_.service.AcceleratorLane"
    patches = {
        None: nullcontext,
        "averages before the caller has written": lambda: mock.patch(lane, Hasty),
        "done before the work": lambda: mock.patch(lane, Premature),
        "optimizer does not wait": lambda: mock.patch.object(Guard, "fence", fence_without_order),
        "averages written while they are copied": lambda: mock.patch.object(
            writer.BackgroundSink, "writes_order", return_value=None
        ),
        "averages in another order written while they are copied": lambda: mock.patch(
            "nitrous_ema.dispatch._is_permuted", return_value=False
        ),
        "pages read before they are copied": lambda: mock.patch.object(lanes._DeviceMark, "wait", return_value=None),
        "averages copied before they are written": lambda: mock.patch(lane, Overtaking),
        "copies written while they are read": lambda: mock.patch.object(CallerCopies, "take", take_at_once),
    }
    with patches[bug]():
        yield


class Hasty(lanes.AcceleratorLane):
    """Does not wait for what the caller has queued before."""

    def run(self, work):
        with lanes._entered(self._update_stream):
            work()
        self._done.record(self._update_stream)
        self._has_run = True


class Premature(lanes.AcceleratorLane):
    """Says that it has read the parameters before it has."""

    def run(self, work):
        self._ready.record(lanes._current_stream(self._device))
        self._update_stream.wait_event(self._ready)
        self._done.record(self._update_stream)
        with lanes._entered(self._update_stream):
            work()
        self._has_run = True


class Overtaking(lanes.AcceleratorLane):
    """Copies averages out without waiting for the update that writes them."""

    def copy_out(self, work, abandon):
        with lanes._entered(self._copy_stream):
            work()


def fence_without_order(self):
    self._order_writer, order = (lambda: None), self._order_writer
    try:
        _fence(self)
    finally:
        self._order_writer = order


_fence = Guard.fence


def take_at_once(self, live, devices):
    self._order_caller, ordered = (lambda: None), self._order_caller
    try:
        return _take(self, live, devices)
    finally:
        self._order_caller = ordered


_take = CallerCopies.take


@pytest.fixture(scope="module")
def broken() -> dict[str, list[Outcome]]:
    return run_by_name({name: {"bug": name, **case} for name, case in BUGS.items()})


@pytest.mark.parametrize("bug", BUGS)
def test_a_wait_that_is_left_out_is_noticed(broken, bug):
    found = [outcome for outcome in broken[bug] if outcome.verdict == "different"]
    assert found, f"nobody notices: {bug}"


def use(device: str, what: str, read: str = "guarded") -> dict[str, Any]:
    """What else is done with an EMA while work is pending."""
    with tempfile.TemporaryDirectory() as folder, small_pieces():
        model = make_model("plain", device)
        if what == "two devices":
            model[2].to(f"{device}:1" if device != "cpu" else device)
        inputs, gradients = make_batches(STEPS, model), make_gradients(STEPS, model)
        ema = make_ema(model, folder, read=read)
        optimizer = None if what == "no optimizer" else make_optimizer(model)
        seen: dict[str, Any] = {}
        state: dict[str, Any] = {}
        for step, (batch, of_step) in enumerate(zip(inputs, gradients, strict=True)):
            for parameter, gradient in zip(model.parameters(), of_step, strict=True):
                parameter.grad = gradient
            if what == "streams" and device != "cpu":
                switch_stream(device)
            if optimizer is None:
                ema.fence()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.sub_(parameter.grad)
            elif what == "closure":
                optimizer.step(lambda model=model: model[0].bias.sum())
            else:
                optimizer.step()
            ema.update()
            with torch.no_grad():
                if what == "average_parameters":
                    with ema.average_parameters(step % 2):
                        seen[f"output {step}"] = model(batch)
                elif what == "ema_model":
                    seen[f"output {step}"] = ema.ema_models[step % 2].ema_model(batch)
                elif what == "copies to the model":
                    ema.copy_params_from_ema_to_model()
            if what == "load" and step == 1:
                state = {k: v.clone() if torch.is_tensor(v) else v for k, v in ema.state_dict().items()}
            if what == "load" and step == 3:
                ema.load_state_dict(state)
        ema.checkpoint()
        seen |= averages_of(ema)
        ema.close()
        if what == "streams" and device != "cpu":
            torch.accelerator.synchronize()
        return {**seen, "snapshots": snapshot_bytes(folder)}


def switch_stream(device: str) -> None:
    """As a user who trains on streams of his own, each after the one before."""
    before, after = torch.accelerator.current_stream(), torch.Stream(device=device)
    after.wait_stream(before)
    torch.accelerator.set_stream(after)


USES: dict[str, dict[str, Any]] = {
    "load": {},
    "average_parameters": {},
    "ema_model": {},
    "two devices": {},
    "no optimizer": {},
    "closure": {},
    "copies to the model": {},
    "streams": {},
    "streams, copied": {"what": "streams", "read": "copied"},
}


@pytest.fixture(scope="module")
def uses() -> dict[str, list[Outcome]]:
    cases = [{"what": name, **case} for name, case in USES.items()]
    outcomes = run_on_laggy(use, cases=cases, timeout_seconds=200)
    return {name: outcomes[i * len(SCHEDULES) : (i + 1) * len(SCHEDULES)] for i, name in enumerate(USES)}


@pytest.mark.parametrize("what", USES)
def test_averages_are_right_whatever_is_done_with_them(uses, what):
    assert len(uses[what]) == len(SCHEDULES)
    assert [(outcome.schedule, outcome.detail) for outcome in uses[what] if outcome.verdict != "same"] == []
