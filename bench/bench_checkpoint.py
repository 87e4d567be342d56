"""One checkpoint of two averages: how long the training thread is held by it, and how fast it gets to durable disk.

Four tables:
  held       from the call of checkpoint() until it returns, which is when the training thread goes on. The rest of the
             work, in the background, is waited for before the next sample, untimed
  training   by how much a checkpoint lengthens some training steps: as long as they go on, what is left to the
             background competes with them for cores and memory
  durable    until the bytes are durable, next to one plain write and fsync of as many bytes from host memory
  checked    what a writer computes from the bytes of a snapshot: checksums, and whether every value is finite

Files are removed between samples, untimed, with whatever of them is not written yet. All files are on one disk: that of
``--folder``, which should be the one that snapshots will be on.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from bench import models, savers
from bench.contestants import NITROUS_001, SYNC
from bench.harness import Measure, Report, added_by, compare, parser, start, synchronizer, timed
from bench.savers import Saver, clear
from nitrous_ema import PostHocEMA
from nitrous_ema.snapshots import Layout, SnapshotStore, Stamp, new_run_id
from nitrous_ema.snapshots.nonfinite import NonFiniteCounter

MEMORY_COPY = "one copy in memory"
PLAIN = "plain write and fsync"
STORE = "SnapshotStore.write, from host memory"
CHECKSUMS = "checksums"
FINITE = "is every value finite?"
PIECE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model whose averages are saved, and how long to look at it."""

    name: str
    make: Callable[[], nn.Module]
    rounds: int
    steps: int
    """Training steps per sample: enough for the slowest background work to end within them."""
    products: int
    """Matrix products per training step."""
    warm_up_rounds: int = 1
    """Rounds that do not count: host memory is touched for the first time in these."""


FULL = Size(name="ViT-B/16", make=models.vit, rounds=9, steps=16, products=20)
QUICK = Size(name="tiny MLP", make=models.tiny, rounds=3, steps=4, products=1, warm_up_rounds=0)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="where files are written; default: where temporary files are")
    options.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES], help="only some of the tables")
    chosen = options.parse_args()
    size = QUICK if chosen.quick else FULL
    if chosen.rounds:
        size = replace(size, rounds=chosen.rounds)
    report = start("bench_checkpoint", chosen)
    device = torch.device(chosen.device)
    torch.manual_seed(0)
    model = size.make().to(device)
    libraries, absent = savers.makers()
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}")
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nitrous-ema-bench-", dir=chosen.folder)))
        rivals: dict[str, Saver] = {}
        for make in libraries:
            rivals.update(make(model, stack, parent))
        for table in chosen.tables:
            TABLES[table](report, size, model, rivals, parent)
    report.write(chosen.json)


def held(report: Report, size: Size, model: nn.Module, rivals: dict[str, Saver], parent: Path) -> None:
    """Until the call returns."""
    synchronize = synchronizer(_device(model))
    measures = {MEMORY_COPY: timed(memory_copy(model), synchronize=synchronize)}
    for name, rival in rivals.items():
        rival.settle()
        measures[name] = timed(rival.save, settle=rival.settle, synchronize=synchronize, until="return")
    comparison = compare(measures, rounds=size.rounds, warm_up_rounds=size.warm_up_rounds)
    report.add(
        f"held by one checkpoint: {_described(size, model, parent)}",
        comparison,
        floor=MEMORY_COPY,
        baseline=_baseline(rivals),
        note="Who has made anything durable, and after how long, is in the last table.",
    )


def training(report: Report, size: Size, model: nn.Module, rivals: dict[str, Saver], parent: Path) -> None:
    """What a checkpoint adds to the steps around it. Each step writes every weight and updates the averages."""
    steps = Steps(model=model, size=size)
    measures, late = {}, {}
    for name, rival in rivals.items():
        late[name] = rushed = Rushed(rival)
        measures[name] = added_by(
            rival.save, steps.around(rival), settle=rushed.settle, synchronize=synchronizer(_device(model))
        )
    comparison = compare(measures, rounds=size.rounds, warm_up_rounds=size.warm_up_rounds)
    unfinished = {name: rushed.times for name, rushed in late.items() if rushed.times}
    report.add(
        f"added by one checkpoint to {size.steps} training steps: {_described(size, model, parent)}",
        comparison,
        note=(
            f"A step is {size.products} products of matrices, an SGD step and update(); the checkpoint comes in the "
            f"second of {size.steps}. With the checkpoint less without, in the same round. "
            f"Background work that outlasted its steps: {unfinished or 'none'}."
        ),
        facts={"outlasted": unfinished},
    )


def durable(report: Report, size: Size, model: nn.Module, rivals: dict[str, Saver], parent: Path) -> None:
    """Until the bytes are durable."""
    synchronize = synchronizer(_device(model))
    memory = HostMemory(model, parent)
    measures: dict[str, Measure] = {
        PLAIN: timed(memory.write_plainly, settle=memory.settle),
        STORE: timed(memory.write_snapshot, settle=memory.settle),
    }
    for name, rival in rivals.items():
        if rival.save_durably is not None:
            rival.settle()
            label = {savers.DCP: savers.DCP.replace("async_save", "save"), savers.TORCH_SAVE: "torch.save and fsync"}
            shown = label.get(name, f"{name}.checkpoint()" if name == SYNC else f"{name}.checkpoint() and flush()")
            measures[shown] = timed(rival.save_durably, settle=rival.settle, synchronize=synchronize)
    comparison = compare(measures, rounds=size.rounds, warm_up_rounds=size.warm_up_rounds)
    report.add(
        f"until durable: {_described(size, model, parent)}",
        comparison,
        floor=PLAIN,
        sample_bytes=memory.layout.data_bytes,
        note="Ours and torch.save compute checksums on the way; the plain write does not.",
    )


def checked(report: Report, size: Size, model: nn.Module, rivals: dict[str, Saver], parent: Path) -> None:
    """What a writer computes."""
    memory = HostMemory(model, parent)
    measures = {CHECKSUMS: timed(memory.checksum), FINITE: timed(memory.look_for_nonfinite)}
    report.add(
        f"computed by a writer: {_described(size, model, parent)}",
        compare(measures, rounds=size.rounds, warm_up_rounds=size.warm_up_rounds),
        baseline=CHECKSUMS,
        sample_bytes=memory.layout.data_bytes,
        note="Both are done on a writer's thread, from the same memory.",
    )


def memory_copy(model: nn.Module) -> Callable[[], None]:
    """The least wait of a training loop that goes on with a copy."""
    source = torch.rand(2 * models.averaged_elements(model), device=_device(model))
    target = torch.zeros(source.shape)

    def copy() -> None:
        target.copy_(source)

    return copy


@dataclass(kw_only=True)
class Steps:
    """Training steps of fixed work, which write all weights of a model as an optimizer does."""

    model: nn.Module
    size: Size
    side: int = 512

    def __post_init__(self) -> None:
        device = _device(self.model)
        self._factors = [torch.rand(self.side, self.side, device=device) for _ in range(3)]
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)

    def around(self, saver: Saver) -> Callable[[Callable[[], Any] | None], None]:
        """The steps, with a call in the second one."""

        def run(save: Callable[[], Any] | None) -> None:
            for step in range(self.size.steps):
                for _ in range(self.size.products):
                    torch.mm(self._factors[0], self._factors[1], out=self._factors[2])
                self._optimizer.step()
                saver.update()
                if save is not None and step == 1:
                    save()
            if saver.fence is not None:
                saver.fence()

        return run


@dataclass
class Rushed:
    """Settles a saver, and counts how often its background work was not done by then."""

    saver: Saver
    times: int = field(default=0, init=False)

    def settle(self) -> None:
        if self.saver.is_saving():
            self.times += 1
        self.saver.settle()


class HostMemory:
    """As many bytes as a snapshot of two averages has, in host memory, and two ways to make them durable."""

    def __init__(self, model: nn.Module, parent: Path) -> None:
        self.layout = _layout(model, parent)
        self._memory = memoryview(mmap.mmap(-1, self.layout.data_bytes))  # page-aligned, as buffers for I/O should be
        noise = torch.frombuffer(self._memory, dtype=torch.uint8)
        numbers = torch.rand(1 << 18).view(torch.uint8)  # finite, as averages are
        noise.copy_(numbers.repeat(-(-len(noise) >> 20))[: len(noise)])
        self._plain, root = parent / "plain", parent / "store"
        self._plain.mkdir(exist_ok=True)  # there may be another one of these
        self._store = SnapshotStore(root)
        self._store.prepare()
        self._root, self._run, self._steps = root, new_run_id(), count(1)

    def write_plainly(self) -> None:
        """The least work that puts these bytes on disk."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        descriptor = os.open(self._plain / f"{next(self._steps)}", flags, 0o666)
        try:
            begin = 0
            while begin < len(self._memory):
                begin += os.write(descriptor, self._memory[begin : begin + PIECE_BYTES])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_snapshot(self) -> None:
        """The same bytes as a snapshot: checksummed, under a final name, which is durable as well."""
        step = next(self._steps)
        stamp = Stamp(step=step, t=step, t_first=1, run=self._run, lineage=((self._run, None),))
        self._store.write(self.layout, stamp, lambda: [self._memory[begin:end] for begin, end in self.layout.chunks])

    def checksum(self) -> None:
        """The checksums of a snapshot."""
        for begin, end in self.layout.chunks:
            zlib.crc32(self._memory[begin:end])

    def look_for_nonfinite(self) -> None:
        """The search for values that are not finite."""
        counter = NonFiniteCounter(self.layout)
        for begin, end in self.layout.chunks:
            counter.add(begin, self._memory[begin:end])

    def settle(self) -> None:
        """Remove what was written."""
        clear(self._plain)
        clear(self._root)


def _layout(model: nn.Module, parent: Path) -> Layout:
    """Of the snapshots of a model's averages, from one that was written and is removed again."""
    root = parent / "layout"
    with PostHocEMA(model, checkpoint_every_num_steps="manual", checkpoint_folder=root, update_every=1) as ema:
        ema.update()
        ema.checkpoint()
        layout = ema.snapshots.get().headers[0].layout
    clear(root)
    return layout


def _baseline(rivals: dict[str, Saver]) -> str:
    return NITROUS_001 if NITROUS_001 in rivals else savers.TORCH_SAVE


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _described(size: Size, model: nn.Module, parent: Path) -> str:
    elements = models.averaged_elements(model)
    return f"{size.name}, two averages of {elements / 1e6:.1f} M float32 elements each, on {_file_system(parent)}"


def _file_system(path: Path) -> str:
    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "an unknown file system"


TABLES = {"held": held, "training": training, "durable": durable, "checked": checked}

if __name__ == "__main__":
    main()
