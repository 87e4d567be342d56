"""What averaging costs on an accelerator: time, memory and stalls, for a large and a small model.

Tables:
  bytes    what an update moves, how long that takes at the rate of a flat lerp_ here, and what part of a training step
           that is: the least possible cost, to compare the rest with
  update   one update alone, until the averages have moved and until the call returns
  step     a training step with update() after it, next to the same without, for several update_every; the column
           "+ baseline" is the time added per step
  memory   the most that tensors hold on the device while training
  stall    what a checkpoint adds to the training steps around it, and the longest of them; the large model's batch is
           made small enough for the copy of the snapshot to take longer than three steps, if it is not already

A contestant is set up when it is its turn and is gone before the next: in each round it meets only the floor or the
training without EMA. One that fails, for example for want of memory, is reported below its table. The rest goes on, and
the command then ends with 1. With --json, everything so far is written after each table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench import contestants
from bench.contestants import FLOOR, SIDE_STREAM, Averaging, Make
from bench.harness import (
    Budget,
    Comparison,
    Duels,
    Measure,
    Report,
    compare,
    described,
    duration,
    parser,
    start,
    timed,
)
from bench.stalls import stall
from bench.training import (
    NO_TIME,
    QUICK,
    VIT_H,
    VIT_TI,
    Bench,
    Trainee,
    Workload,
    bytes_shown,
    peak_bytes,
    release,
)

NO_EMA = "no EMA"
FLOOR_BYTES = 24  # per element: two lerp_ read and write an average and read the parameter
WAYS = {
    "one launch for both averages": 20,
    "one lerp_ per average (the floor)": FLOOR_BYTES,
    "multiply, then add, per average": 40,
}


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    libraries, absent = contestants.makers()
    libraries[SIDE_STREAM] = contestants.side_stream
    report = start("bench_device", options)
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}")
    budget = Budget(60 * options.minutes)
    chosen = [QUICK] if options.quick else [MODELS[name] for name in options.models]
    for index, workload in enumerate(chosen):
        workload = replace(workload, batch=options.batch or workload.batch)
        # The first model is the large one: three quarters of the time, then all that is left.
        share = budget.part(4 / 3 if index + 1 < len(chosen) else 1.0)
        try:
            _all_tables(report, workload, device, libraries, options, share)
        except Exception as error:  # training itself has failed
            report.add_list(f"{workload.name}, nothing more", {}, {}, failed={NO_EMA: described(error)})
        release(device)
    report.write(options.json)
    sys.exit(bool(report.failures))


def _all_tables(
    report: Report,
    workload: Workload,
    device: torch.device,
    libraries: Mapping[str, Make],
    options: argparse.Namespace,
    budget: Budget,
) -> None:
    bench = Bench(
        report=report,
        trainee=Trainee(workload, device, compiled=options.compile),
        libraries=libraries,
        every=tuple(options.every),
        rounds=options.rounds or workload.rounds,
        folder=options.folder,
    )
    for index, table in enumerate(options.tables):
        weights = [SHARES[name] for name in options.tables[index:]]
        TABLES[table](bench, budget.part(sum(weights) / weights[0]))
        release(device)


def bytes_moved(bench: Bench, budget: Budget) -> None:
    """The least time that each way to update takes, from the rate that is measured here."""
    floor = contestants.floor(bench.elements, bench.device)
    floor.update()
    seconds = timed(floor.update, synchronize=bench.synchronize, repeats=5)()
    rate, step = FLOOR_BYTES * bench.elements / seconds, bench.step_seconds()
    columns: dict[str, Callable[[float], str]] = {"bytes per element": lambda n: f"{n:.0f}"}
    columns |= {"bytes per update": bytes_shown, "at the floor's rate": duration}
    columns |= {f"of a step, every {every}": lambda part: f"{part:.2%}" for every in bench.every}
    rows = {}
    for name, width in WAYS.items():
        size = width * bench.elements
        parts = {f"of a step, every {every}": size / rate / every / step for every in bench.every}
        row = {"bytes per element": width, "bytes per update": size, "at the floor's rate": size / rate}
        rows[name] = {**row, **parts}
    note = (
        f"The floor moves {rate / 1e9:.0f} GB/s here; a training step without EMA takes {duration(step)} "
        f"({bench.trainee.described}). Parameters and averages are float32."
    )
    bench.report.add_list(f"bytes: two averages of {bench.described}", columns, rows, note=note)


def update(bench: Bench, budget: Budget) -> None:
    """One update alone."""
    floor = contestants.floor(bench.elements, bench.device)

    def measures(name: str, averaging: Averaging) -> dict[str, Measure]:
        found = {name: timed(averaging.update_and_fence, synchronize=bench.synchronize, repeats=3)}
        if bench.synchronize is not None or averaging.fence is not None:
            found[f"{name}, until it returns"] = timed(
                averaging.update, settle=averaging.fence, synchronize=bench.synchronize, until="return", repeats=3
            )
        return found

    base = timed(floor.update, synchronize=bench.synchronize, repeats=3)
    comparison, failed = _duels(bench, budget, (FLOOR, base), measures)
    note = f"Rates count the {FLOOR_BYTES} bytes per element that the floor moves, whatever a contestant moves."
    bench.report.add(
        f"one update of two averages: {bench.described}",
        comparison,
        floor=FLOOR,
        sample_bytes=FLOOR_BYTES * bench.elements,
        note=note,
        failed=failed,
    )


def step(bench: Bench, budget: Budget) -> None:
    """Training steps, for each update_every."""
    least = bench.trainee.workload.steps

    def measure(count: int, averaging: Averaging | None) -> Measure:
        return timed(bench.trainee.steps(count, averaging), synchronize=bench.synchronize, divide_by=count)

    bench.trainee.steps(2)()
    counts = [math.ceil(least / every) * every for every in bench.every]  # each sample has the same number of updates
    for index, (every, count) in enumerate(zip(bench.every, counts, strict=True)):
        alone = min(count, 2 * least)
        share = budget.part(sum(counts[index:]) / count)
        comparison, failed = _duels(
            bench,
            share,
            (NO_EMA, measure(alone, None)),
            lambda name, averaging, count=count: {name: measure(count, averaging)},
            every,
        )
        note = (
            f"{bench.trainee.described}. A sample is {count} steps in a row until all averaging is done "
            f"({alone} without EMA), per step."
        )
        title = f"one training step, update_every {every}: {bench.described}"
        bench.report.add(title, comparison, baseline=NO_EMA, note=note, failed=failed, facts={"update_every": every})


def memory(bench: Bench, budget: Budget) -> None:
    """The peak while training, each contestant by itself."""
    rows, failed = {}, {}
    steps = 3
    with peak_bytes(bench.device) as peak:
        bench.trainee.steps(steps)()
        alone = peak()
    rows[NO_EMA] = {"peak": alone, "more than without": 0, "of two averages": 0.0}
    for name, make in bench.libraries.items():
        try:
            with ExitStack() as stack, peak_bytes(bench.device) as peak:
                bench.trainee.steps(steps, make(bench.trainee.model, stack))()
                more = peak() - alone
            rows[name] = {"peak": more + alone, "more than without": more, "of two averages": more / bench.elements / 8}
        except Exception as error:
            failed[name] = described(error)
        release(bench.device)
    columns = {"peak": bytes_shown, "more than without": bytes_shown, "of two averages": "{:.3f}".format}
    note = (
        f"Bytes of tensors on the device, the most in {steps} training steps and in setting up "
        f"({bench.trainee.described}). The last column is in units of two float32 averages."
    )
    bench.report.add_list(f"device memory: {bench.described}", columns, rows, note=note, failed=failed)


def _duels(
    bench: Bench,
    budget: Budget,
    base: tuple[str, Measure],
    measures: Callable[[str, Averaging], dict[str, Measure]],
    every: int = 1,
) -> tuple[Duels, dict[str, str]]:
    """Each contestant in turn against the base; and why some have no row."""
    failed: dict[str, str] = {}
    comparisons = []
    for index, (name, make) in enumerate(bench.libraries.items()):
        share = budget.part(len(bench.libraries) - index)
        if budget.left:
            try:
                comparisons.append(_duel(bench, share, base, partial(measures, name), make, every))
            except Exception as error:
                failed[name] = described(error)
        else:
            failed[name] = NO_TIME
        release(bench.device)
    return Duels.of(base[0], comparisons), failed


def _duel(
    bench: Bench,
    budget: Budget,
    base: tuple[str, Measure],
    measures: Callable[[Averaging], dict[str, Measure]],
    make: Make,
    every: int,
) -> Comparison:
    """One contestant, and nothing of it when this returns."""
    with ExitStack() as stack:
        averaging = make(bench.trainee.model, stack, every)
        for _ in range(every + 1):  # the first update copies, the second may still allocate
            averaging.update_and_fence()
        bench.trainee.steps(2, averaging)()
        rivals = {base[0]: base[1], **measures(averaging)}
        return compare(rivals, rounds=bench.rounds, warm_up_rounds=0, seconds_at_most=budget.left)


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=5.5, help="take about so long at most (default 5.5)")
    options.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES], help="only some of the tables")
    options.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="only one of the models")
    options.add_argument("--every", nargs="+", type=int, default=[1, 10, 100], help="update_every of the steps")
    options.add_argument("--batch", type=int, help="images per training step (default 8 and 32)")
    options.add_argument("--compile", action="store_true", help="train with torch.compile")
    options.add_argument("--folder", type=Path, help="where snapshots are written; default: where temporary files are")
    options.set_defaults(device="cuda")
    chosen = options.parse_args()
    if chosen.device == "cpu" and not chosen.quick:
        options.error("this is a bench for accelerators; --device cpu needs --quick, to see that it runs")
    return chosen


TABLES = {"bytes": bytes_moved, "update": update, "step": step, "memory": memory, "stall": stall}
SHARES = {"bytes": 1, "update": 3, "step": 14, "memory": 1, "stall": 10}
"""Of the time there is, by table."""
MODELS = {"vit-h": VIT_H, "vit-ti": VIT_TI}

if __name__ == "__main__":
    main()
