"""Training steps on an accelerator: the models, the steps that averaging goes along with, and what they cost."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import models
from bench.contestants import Averaging, Make
from bench.harness import Report, described, synchronizer, timed
from bench.models import VisionTransformer

COPY_BYTES = 256 << 20
NO_TIME = "no time was left; --minutes gives more"


def vit_h_14() -> nn.Module:
    """632 million parameters in 392 tensors, those of torchvision's model of that name."""
    return VisionTransformer(width=1280, depth=32, heads=16, patch=14)


def vit_quick() -> nn.Module:
    """A few thousand parameters: to see that everything runs."""
    return VisionTransformer(width=16, depth=1, heads=2, patch=8, image=16, classes=10)


def torchvision_vit_h_14() -> tuple[Callable[[], nn.Module], str]:
    """Torchvision's ViT-H/14 and what it is; where torchvision is missing or broken, ours and why."""
    try:
        from torchvision.models import vit_h_14 as theirs
    except Exception as error:  # a build for another torch raises RuntimeError
        return vit_h_14, f"ViT-H/14 of plain torch, for torchvision is left out ({described(error)})"
    return theirs, "torchvision's vit_h_14"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model to be trained, and on what."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    image: int = 224
    steps: int = 10
    """Training steps per sample, if there are no more calls from one update to the next."""
    rounds: int = 7
    wants_long_copy: bool = False
    """A snapshot's copy should take longer than three training steps; the batch is made smaller for that."""


VIT_H = Workload(name="ViT-H/14", make=vit_h_14, batch=8, wants_long_copy=True)
VIT_TI = Workload(name="ViT-Ti/16", make=models.vit_ti, batch=32, steps=20)
QUICK = Workload(name="tiny ViT", make=vit_quick, batch=2, image=16, steps=4, rounds=2, wants_long_copy=True)


class Trainee:
    """A model in training: forward in bfloat16 where there is an accelerator, backward and AdamW in float32."""

    def __init__(self, workload: Workload, device: torch.device, *, compiled: bool = False) -> None:
        torch.manual_seed(0)
        with device:
            model = workload.make()
            self._images = torch.randn(workload.batch, 3, workload.image, workload.image)
        self.workload, self.device, self.batch = workload, device, workload.batch
        self.model: nn.Module = torch.compile(model) if compiled else model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    @property
    def described(self) -> str:
        """What a training step is."""
        precision = "float32" if self.device.type == "cpu" else "bfloat16 autocast"
        return f"batch {self.batch}, {precision}, fused AdamW"

    def step(self, averaging: Averaging | None = None) -> None:
        """One, with the update after it."""
        is_mixed = self.device.type != "cpu"
        with torch.autocast(self.device.type, torch.bfloat16) if is_mixed else nullcontext():
            loss = self.model(self._images[: self.batch]).float().square().mean()
        loss.backward()
        if averaging is not None and averaging.before_step is not None:
            averaging.before_step()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if averaging is not None:
            averaging.update()

    def steps(self, count: int, averaging: Averaging | None = None) -> Callable[[], None]:
        """So many in a row, until the averaging is done."""

        def run() -> None:
            for _ in range(count):
                self.step(averaging)
            if averaging is not None and averaging.fence is not None:
                averaging.fence()

        return run


@dataclass
class Marks:
    """Moments on the caller's stream, or on the CPU."""

    device: torch.device
    _marks: list[Any] = field(default_factory=list, init=False)

    def add(self) -> None:
        if self.device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        mark = torch.Event(self.device, enable_timing=True)
        mark.record(torch.accelerator.current_stream(self.device))
        self._marks.append(mark)

    def intervals(self) -> list[float]:
        """Seconds from each to the next. Everything that was queued must be done."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        self._marks = []
        if self.device.type == "cpu":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """How many bytes of the device tensors have held at most since here; 0 on the CPU, which does not count them."""
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        yield lambda: 0
        return
    release(device)
    module.reset_peak_memory_stats()
    yield module.max_memory_allocated


def release(device: torch.device) -> None:
    """Free unused memory, so that each contestant begins with the same amount."""
    gc.collect()
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def copy_seconds(size: int, device: torch.device, synchronize: Callable[[], None] | None) -> float:
    """How long so many bytes take to host memory (pinned, from an accelerator) with nothing else going on."""
    source = torch.zeros(min(size, COPY_BYTES), dtype=torch.uint8, device=device)
    target = torch.zeros(source.shape, dtype=torch.uint8, pin_memory=device.type != "cpu")
    times = math.ceil(size / len(source))

    def copy() -> None:
        for _ in range(times):
            target.copy_(source, non_blocking=True)

    copy()
    return timed(copy, synchronize=synchronize, repeats=3)() * size / (times * len(source))


@dataclass(kw_only=True)
class Bench:
    """What all tables of one model share."""

    report: Report
    trainee: Trainee
    libraries: Mapping[str, Make]
    every: tuple[int, ...]
    rounds: int
    folder: Path | None

    def __post_init__(self) -> None:
        self.device = self.trainee.device
        self.synchronize = synchronizer(self.device)
        self.elements = models.averaged_elements(self.trainee.model)
        tensors = models.averaged_tensors(self.trainee.model)
        shown = f"{self.elements / 1e6:.1f} M" if self.elements >= 1e6 else f"{self.elements}"
        self.described = f"{self.trainee.workload.name}, {shown} elements in {tensors} tensors"

    def step_seconds(self) -> float:
        """Of training without EMA."""
        steps = self.trainee.workload.steps
        self.trainee.steps(2)()
        run = timed(self.trainee.steps(steps), synchronize=self.synchronize, repeats=3, divide_by=steps)
        return run()


def bytes_shown(size: float) -> str:
    """Bytes with a fitting unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"
