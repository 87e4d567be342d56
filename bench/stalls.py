"""What a checkpoint does to the training steps around it: the last table of ``bench_device``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import savers
from bench.contestants import Averaging
from bench.harness import Budget, Comparison, added_by, compare, described, duration
from bench.savers import Saver
from bench.training import NO_TIME, Bench, Marks, bytes_shown, copy_seconds, release

LONG_COPY_STEPS = 3  # a copy that is longer must not stop training, though averages are written at each step
WITH, WITHOUT = "with a checkpoint", "without one"


def stall(bench: Bench, budget: Budget) -> None:
    """What a checkpoint adds to the steps around it, and the longest of these steps."""
    size = 8 * bench.elements
    copied = copy_seconds(size, bench.device, bench.synchronize)
    seconds = bench.step_seconds()
    wants_long_copy = bench.trainee.workload.wants_long_copy
    while wants_long_copy and bench.trainee.batch > 1 and copied <= LONG_COPY_STEPS * seconds:
        bench.trainee.batch //= 2
        seconds = bench.step_seconds()
    count = min(60, max(8, 2 * math.ceil(copied / seconds) + 2))
    verdict = "longer than three of them" if copied > LONG_COPY_STEPS * seconds else "not longer than three of them"
    note = (
        f"A snapshot is {bytes_shown(size)}; copying that to host memory, alone, takes {duration(copied)}, which is "
        f"{copied / seconds:.2f} training steps of {duration(seconds)} ({bench.trainee.described}): {verdict}. "
        f"update() after every step; the checkpoint in the second of {count}."
    )
    comparison, failed, longest = _checkpoints(bench, budget, count)
    facts = {"copy_seconds": copied, "step_seconds": seconds, "copy_per_step": copied / seconds}
    title = f"added by one checkpoint to {count} training steps: {bench.described}"
    bench.report.add(title, comparison, note=note, failed=failed, facts=facts)
    both = {f"{name}, {kind}": spread for name, kinds in longest.items() for kind, spread in kinds.items()}
    bench.report.add(
        f"longest of these {count} steps: {bench.described}", Comparison(both), note="In the same runs.", facts=facts
    )
    bench.trainee.batch = bench.trainee.workload.batch


def _checkpoints(
    bench: Bench, budget: Budget, count: int
) -> tuple[Comparison, dict[str, str], dict[str, dict[str, list[float]]]]:
    """One library after the other, each with a disk for itself."""
    makers, _ = savers.makers()
    seconds: dict[str, Any] = {}
    longest: dict[str, dict[str, list[float]]] = {}
    failed: dict[str, str] = {}
    for index, make in enumerate(makers):
        share = budget.part(len(makers) - index)
        name = getattr(make, "func", make).__name__.strip("_")
        try:
            if budget.left:
                done, kinds = _checkpoints_of(make, bench, share, count, failed)
                seconds |= done.seconds
                longest |= {name: kinds[name] for name in done.seconds}
            else:
                failed[name] = NO_TIME
        except Exception as error:
            failed[name] = described(error)
        release(bench.device)
    return Comparison(seconds), failed, longest


def _checkpoints_of(
    make: savers.Make, bench: Bench, budget: Budget, count: int, failed: dict[str, str]
) -> tuple[Comparison, dict[str, dict[str, list[float]]]]:
    """What one library's checkpoints add, and its longest steps; nothing of it is left when this returns."""
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="nitrous-ema-bench-", dir=bench.folder)
        rivals = make(bench.trainee.model, stack, Path(stack.enter_context(made)))
        stretches = {name: Stretch(bench, rival, count) for name, rival in rivals.items()}
        measures = {
            name: added_by(rivals[name].save, each.run, settle=each.settle, synchronize=bench.synchronize)
            for name, each in stretches.items()
        }
        # One round to warm up: host memory is touched, and pinned, for the first time in it.
        done = compare(measures, rounds=bench.rounds, warm_up_rounds=1, seconds_at_most=budget.left, failed=failed)
        longest = {
            name: {kind: values[-len(done.seconds[name]) :] for kind, values in stretches[name].longest.items()}
            for name in done.seconds
        }
    return done, longest


@dataclass
class Stretch:
    """Training steps in a row, with or without a checkpoint in the second; keeps the longest step of each."""

    bench: Bench
    saver: Saver
    count: int
    longest: dict[str, list[float]] = field(default_factory=lambda: {WITH: [], WITHOUT: []}, init=False)
    _under_way: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._averaging = Averaging(self.saver.update, self.saver.fence)
        self._marks = Marks(self.bench.device)

    def run(self, save: Callable[[], Any] | None) -> None:
        self._under_way = WITH if save is not None else WITHOUT
        self._marks.add()
        for step in range(self.count):
            self.bench.trainee.step(self._averaging)
            if save is not None and step == 1:
                save()
            self._marks.add()
        if self.saver.fence is not None:
            self.saver.fence()

    def settle(self) -> None:
        """After the device is through."""
        if self._under_way is not None:
            self.longest[self._under_way].append(max(self._marks.intervals()))
            self._under_way = None
        self.saver.settle()
