"""Fakes for tests of the background: gates, lanes as late as allowed, file systems that stall or fail; small models."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import nitrous_ema.async_.ema
import nitrous_ema.async_.lanes
import nitrous_ema.averaging.ema
import nitrous_ema.averaging.kernels.flat_buffers
import nitrous_ema.averaging.kernels.foreach_step
from nitrous_ema.async_.lanes import ThreadLane
from nitrous_ema.averaging.execution.interfaces import Work
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.store import SnapshotStore

TIMEOUT_SECONDS = 60
"""A wait that takes this long has failed."""


class Gate:
    """A point where a background thread stops until a test opens it."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()
        if is_open:
            self._open.set()

    def pass_through(self) -> None:
        self.entered.set()
        if not self._open.wait(TIMEOUT_SECONDS):
            raise TimeoutError("a test's gate was never opened")

    def wait_entered(self) -> None:
        assert self.entered.wait(TIMEOUT_SECONDS), "no thread came to the gate"

    def open(self) -> None:
        self._open.set()

    def is_open(self) -> bool:
        return self._open.is_set()

    def shut(self) -> None:
        self.entered.clear()
        self._open.clear()


class GatedLane(ThreadLane):
    """A lane that stops before each piece of averaging work, and before each readback."""

    def __init__(self, *, run: Gate | None = None, copy: Gate | None = None) -> None:
        self.run_gate = run or Gate(is_open=True)
        self.copy_gate = copy or Gate(is_open=True)
        super().__init__()

    def enqueue_write(self, work: Work, **options: Any) -> None:
        super().enqueue_write(partial(_after, self.run_gate, work), **options)

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        super().enqueue_read(partial(_after, self.copy_gate, work), abandon)


class LateLane(ThreadLane):
    """A lane that does nothing until a caller must wait for it: as late as a lane may be."""

    def __init__(self) -> None:
        self._may_work = threading.Event()
        self.waits = 0  # calls of order_writer() and order_reader()
        super().__init__()

    def order_writer(self) -> None:
        self.waits += 1
        self._may_work.set()
        super().order_writer()
        self._may_work.clear()

    def order_reader(self) -> None:
        self.waits += 1
        self._may_work.set()
        super().order_reader()
        self._may_work.clear()

    def drain(self, timeout_seconds: float | None = None) -> None:
        self._may_work.set()
        super().drain(timeout_seconds)
        self._may_work.clear()

    def _put(self, work: Work, abandon: Work | None) -> None:
        if len(self._queue) >= nitrous_ema.async_.lanes._MAX_QUEUED:
            self._may_work.set()
        super()._put(partial(self._late, work), abandon)
        self._may_work.clear()

    def _late(self, work: Work) -> None:
        if not self._may_work.wait(TIMEOUT_SECONDS):
            raise TimeoutError("no caller ever waited for the lane")
        work()


class QuickFiles(FileSystem):
    """A file system that never waits for the disk: for tests of many snapshots and no crash."""

    def fsync(self, descriptor: int) -> None:
        pass

    def fsync_folder(self, path: Path) -> None:
        pass


class StalledFiles(FileSystem):
    """A file system that stops before each write of a snapshot's bytes."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()

    def write_at(self, descriptor: int, buffer: Any, offset: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            self.gate.pass_through()
        return super().write_at(descriptor, buffer, offset)


class FaultyFiles(FileSystem):
    """A disk that is full for as long as ``broken`` is set."""

    def __init__(self) -> None:
        self.broken = False

    def write_at(self, descriptor: int, buffer: Any, offset: int) -> int:
        if self.broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write_at(descriptor, buffer, offset)


def _after(gate: Gate, work: Work) -> None:
    gate.pass_through()
    work()


def use_lane(monkeypatch: pytest.MonkeyPatch, lane: ThreadLane) -> None:
    """Make the next AsyncPostHocEMA average on this lane; with ``--small-models inline`` it averages in update()."""
    if nitrous_ema.async_.ema._FEW_ELEMENTS > 0:
        lane.close()  # its thread would stay, and other tests count threads
        return
    monkeypatch.setattr(nitrous_ema.async_.ema, "make_lane", lambda device: lane)


def use_files(monkeypatch: pytest.MonkeyPatch, files: FileSystem) -> None:
    """Make EMAs that are constructed from now on write their snapshots with this file system."""
    monkeypatch.setattr(nitrous_ema.averaging.ema, "SnapshotStore", partial(SnapshotStore, files=files))


@contextmanager
def small_pieces(chunk_bytes: int = 1024, batch_elements: int = 192) -> Iterator[None]:
    """Make chunks of snapshots and batches of averaging so small that a toy model has many of both."""
    with ExitStack() as patches:
        layout = partial(Layout, chunk_bytes=chunk_bytes)
        patches.enter_context(mock.patch.object(nitrous_ema.averaging.kernels.flat_buffers, "Layout", layout))
        for name in ("_BATCH_ELEMENTS_CPU", "_BATCH_ELEMENTS_ACCELERATOR"):
            patches.enter_context(mock.patch.object(nitrous_ema.averaging.kernels.foreach_step, name, batch_elements))
        yield


class ForcedNorm(nn.Module):
    """A model that writes its weights in forward, as EDM2's networks do (forced weight normalization)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 16))
        self.head = nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.weight / self.weight.norm(dim=1, keepdim=True))
        return self.head(torch.tanh(x @ self.weight.t()))


class Tied(nn.Module):
    """A model with two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 16)
        self.leave = nn.Linear(16, 16)
        self.leave.weight = self.enter.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(torch.tanh(self.enter(x))).sum(dim=1, keepdim=True)


class Transposed(nn.Module):
    """A model with a parameter that is not row-major, larger than a small chunk and a small batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 16).t())
        self.head = nn.Linear(40, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(x @ self.weight))


MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1)),
    "batch norm": lambda: nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 1)),
    "bfloat16": lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).to(torch.bfloat16),
    "tied": Tied,
    "transposed": Transposed,
    "forced norm": ForcedNorm,
}


def make_model(kind: str = "plain", device: str = "cpu") -> nn.Module:
    """Return a model with 16 inputs and 1 output, with the same weights each time."""
    torch.manual_seed(0)
    model = MODELS[kind]().to(device)
    if isinstance(model, Tied):
        model.leave.weight = model.enter.weight  # torch unties them on its way to a device of another backend
    return model


def make_batches(steps: int, model: nn.Module) -> list[torch.Tensor]:
    """Return the same batches each time, on the model's device and in its type."""
    generator = torch.Generator().manual_seed(1)
    like = next(model.parameters())
    return [torch.randn(8, 16, generator=generator).to(device=like.device, dtype=like.dtype) for _ in range(steps)]


def backward(model: nn.Module, batch: torch.Tensor) -> None:
    """Compute the gradients of one step."""
    model.zero_grad()
    (model(batch) - 1).square().mean().backward()


def make_gradients(steps: int, model: nn.Module) -> list[list[torch.Tensor]]:
    """Return the same made-up gradients each time, where a real backward pass would cost more than the test."""
    generator = torch.Generator().manual_seed(2)
    return [
        [torch.randn(p.shape, generator=generator).to(device=p.device, dtype=p.dtype) for p in model.parameters()]
        for _ in range(steps)
    ]


def averages_of(ema: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of every average and copied tensor, by key."""
    return {key: value.clone() for key, value in ema.state_dict().items() if isinstance(value, torch.Tensor)}


def snapshot_bytes(root: Path | str) -> dict[int, tuple[Any, ...]]:
    """Return the contents of a folder's snapshots by step, without what differs from run to run."""
    found = {}
    for snapshot in SnapshotStore(root).snapshots():
        (path,) = snapshot.paths
        contents = path.read_bytes()[snapshot.data_begin :]
        found[snapshot.step] = (snapshot.t, snapshot.stamp.t_first, snapshot.layout.sha256, contents)
    return found


def assert_same_bits(obtained: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert obtained.keys() == expected.keys()
    wrong = [key for key in expected if not torch.equal(obtained[key].cpu(), expected[key].cpu())]
    assert not wrong, f"different bits: {wrong}"


def background_threads() -> list[str]:
    """Return the names of the package's threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("nitrous-ema")]


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Check that threads and optimizer hooks are the same before and after the block."""
    gc.collect()
    threads, hooks = background_threads(), len(_global_optimizer_pre_hooks)
    yield
    gc.collect()
    assert background_threads() == threads
    assert len(_global_optimizer_pre_hooks) == hooks
