"""What every bench here is made of: contestants that take turns, paired statistics, a table and a JSON file.

A *contestant* is a name and a function that returns one sample in seconds: ``timed`` makes one from code in this
process, ``from_process`` from a command, for contestants that cannot live in one process. In each *round* every
contestant gives one sample, in a new random order. Ratios and differences are taken within a round and only then
summarized, so that what slows the machine down for a while slows both sides of a ratio.

Medians, quartiles and the fastest round are reported; nothing is left out. Garbage is collected before a comparison
and not during it. A bench that runs unattended gives ``compare`` somewhere to note failures, and a time to stop at.

Longer than 300 lines because the author of a bench needs to read this file only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

Measure = Callable[[], float]

WARM_UP_ROUNDS = 3  # the first update of every library copies, and its second one may still allocate
LEAST_ROUNDS = 2  # however little time there is


# ---- one sample


def timed(
    call: Callable[[], Any],
    *,
    settle: Callable[[], Any] | None = None,
    synchronize: Callable[[], Any] | None = None,
    until: str = "done",
    repeats: int = 1,
    divide_by: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Measure:
    """A contestant in this process. Its sample is the median of several timed calls.

    Args:
        call: What is timed.
        settle: Called after each, untimed: brings everything back to where the next call may start.
        synchronize: Waits for the accelerator; always called before the clock starts.
        until: ``"done"``: the clock stops when the accelerator has finished; ``"return"``: when the call returns.
        repeats: Timed calls per sample.
        divide_by: How many equal things one call does.
        clock: Seconds.
    """
    if until not in ("done", "return"):
        raise ValueError(f"until is {until!r}; expected 'done' or 'return'.")
    wait = synchronize or _nothing

    def once() -> float:
        wait()
        begin = clock()
        call()
        if until == "done":
            wait()
        seconds = clock() - begin
        if settle is not None:
            settle()
        return seconds / divide_by

    return lambda: statistics.median(once() for _ in range(repeats))


def added_by(
    extra: Callable[[], Any],
    work: Callable[[Callable[[], Any] | None], Any],
    *,
    settle: Callable[[], Any] | None = None,
    synchronize: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measure:
    """A contestant whose sample is how much longer some work takes when something else is done during it.

    Args:
        extra: What is done besides; given to ``work`` every other time, which calls it in its midst.
        work: What is timed; with None it calls nothing.
        settle: As for ``timed``; also called before the first.
        synchronize: As for ``timed``.
        clock: Seconds.
    """
    turns = 0

    def once() -> float:
        nonlocal turns
        turns += 1
        seconds = {}
        for is_extra in (False, True) if turns % 2 else (True, False):  # neither always comes first
            given = extra if is_extra else None
            (settle or _nothing)()
            seconds[is_extra] = timed(partial(work, given), synchronize=synchronize, clock=clock)()
        (settle or _nothing)()
        return seconds[True] - seconds[False]

    return once


def from_process(command: Sequence[str], *, timeout_seconds: float = 600, cwd: Path | None = None) -> Measure:
    """A contestant in a process of its own, started anew for each sample.

    Its last line on stdout is the sample in seconds: it times itself, after its own warm-up.
    """

    def once() -> float:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, cwd=cwd)
        lines = done.stdout.split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        try:
            if done.returncode == 0:
                return float(last)
        except ValueError:
            pass
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode} and last line {last!r}; expected 0 and a number of "
            f"seconds.\n{done.stderr}"
        )

    return once


# ---- taking turns


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Summary of one value per round."""

    median: float
    q1: float
    q3: float
    min: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return Spread(median=median, q1=q1, q3=q3, min=min(values))


@dataclass(frozen=True)
class Comparison:
    """Seconds of every contestant in every round."""

    seconds: Mapping[str, Sequence[float]]

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """Times as long as ``base``, round by round."""
        return Spread.of([a / b for a, b in self._pairs(name, base)])

    def difference(self, name: str, base: str) -> Spread:
        """Seconds more than ``base``, round by round."""
        return Spread.of([a - b for a, b in self._pairs(name, base)])

    def _pairs(self, name: str, base: str) -> list[tuple[float, float]]:
        return list(zip(self.seconds[name], self.seconds[base], strict=True))


@dataclass(frozen=True)
class Duels(Comparison):
    """Contestants that met only one of them, each in rounds of its own."""

    met: Mapping[tuple[str, str], Sequence[tuple[float, float]]]
    """Seconds of a contestant, and of the other one that it met in the same rounds."""

    @staticmethod
    def of(base: str, comparisons: Sequence[Comparison]) -> Duels:
        """All of these; the rounds of ``base`` are put together."""
        mine = [each for each in comparisons if base in each.seconds]
        seconds = {base: [sample for each in mine for sample in each.seconds[base]]}
        met = {(base, base): [(sample, sample) for sample in seconds[base]]}
        for each in mine:
            for name, samples in each.seconds.items():
                if name != base:
                    seconds[name] = list(samples)
                    met[name, base] = list(zip(samples, each.seconds[base], strict=True))
                    met[base, name] = [(b, a) for a, b in met[name, base]]
        return Duels({name: samples for name, samples in seconds.items() if samples}, met)

    def _pairs(self, name: str, base: str) -> list[tuple[float, float]]:
        return list(self.met[name, base])


def compare(
    contestants: Mapping[str, Measure],
    *,
    rounds: int,
    warm_up_rounds: int = WARM_UP_ROUNDS,
    seed: int = 0,
    seconds_at_most: float | None = None,
    failed: dict[str, str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Let contestants take turns.

    Args:
        contestants: By name.
        rounds: Samples per contestant.
        warm_up_rounds: Rounds before these that do not count.
        seed: Of the order.
        seconds_at_most: No round begins after these, but for the least number of them.
        failed: Takes the error of a contestant that raises one, which is then left out; by default it is raised.
        clock: Seconds.
    """
    order, chance, begin = list(contestants), random.Random(seed), clock()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(warm_up_rounds + rounds):
            is_late = seconds_at_most is not None and clock() - begin > seconds_at_most
            if is_late and turn >= warm_up_rounds + LEAST_ROUNDS:
                break
            chance.shuffle(order)
            for name in tuple(order):
                sample = _sample(name, contestants[name], failed)
                if sample is None:
                    order.remove(name)
                    del seconds[name]
                elif turn >= warm_up_rounds:
                    seconds[name].append(sample)
    finally:
        if was_enabled:
            gc.enable()
    return Comparison(seconds)


def _sample(name: str, measure: Measure, failed: dict[str, str] | None) -> float | None:
    try:
        return measure()
    except Exception as error:
        if failed is None:
            raise
        failed[name] = described(error)
        return None


def described(error: BaseException) -> str:
    """An error in one line, which keeps nothing alive."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


class Budget:
    """Time that can be dealt out."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds; 0 if it is over."""
        return max(0.0, self._end - self._clock())

    def part(self, of: float) -> Budget:
        """One of so many equal parts of what is left."""
        return Budget(self.left / of, self._clock)


# ---- the report


@dataclass(kw_only=True)
class Report:
    """Prints each table as it is done, and keeps it for the JSON file."""

    bench: str
    options: Mapping[str, Any]
    machine: Mapping[str, Any]
    path: Path | None = None
    """Everything is written here after each table, so that a run that is cut short has stored all results so far."""
    tables: list[dict[str, Any]] = field(default_factory=list)

    def begin(self) -> None:
        facts = [f"{key} {value}" for key, value in self.machine.items()]
        print(f"{self.bench}\n{' | '.join(facts)}\n{_LEGEND}", flush=True)
        if self.machine["load"] > self.machine["cores"] / 2:
            # A preempted thread holds up the others of its operation for whole time slices.
            print("\nThis machine is busy: expect wide spreads; --threads 1 is steadier.", flush=True)

    def add(
        self,
        title: str,
        comparison: Comparison,
        *,
        floor: str | None = None,
        baseline: str | None = None,
        sample_bytes: int | None = None,
        note: str = "",
        facts: Mapping[str, Any] | None = None,
        failed: Mapping[str, str] | None = None,
    ) -> None:
        """Summarize a comparison.

        Args:
            title: What one sample is.
            comparison: The samples.
            floor: The contestant that does the least that must be done.
            baseline: The contestant to set the others against.
            sample_bytes: What one sample moves, for rates.
            note: What a reader must know of the rows.
            facts: More about the table, for the JSON file.
            failed: Why others have no row.
        """
        floor, baseline = (base if base in comparison.seconds else None for base in (floor, baseline))
        rows = [_row(comparison, name, floor, baseline, sample_bytes) for name in comparison.seconds]
        bases = {"floor": floor, "baseline": baseline, "bytes": sample_bytes}
        self._put({"title": title, "note": note, **bases, **(facts or {}), "rows": rows, "failed": dict(failed or {})})

    def add_list(
        self,
        title: str,
        columns: Mapping[str, Callable[[float], str]],
        rows: Mapping[str, Mapping[str, float]],
        *,
        note: str = "",
        failed: Mapping[str, str] | None = None,
    ) -> None:
        """Add a table of other values than seconds per round.

        Args:
            title: What it is of.
            columns: How each is shown, by name.
            rows: The values of each contestant, by column.
            note: What a reader must know of the rows.
            failed: Why others have no row.
        """
        shown = [
            {"name": name, **row, "shown": [show(row[column]) for column, show in columns.items()]}
            for name, row in rows.items()
        ]
        table = {"title": title, "note": note, "columns": list(columns), "rows": shown, "failed": dict(failed or {})}
        self._put(table)

    def write(self, path: Path | None) -> None:
        """Write everything as JSON: to a file, or into a folder under the bench's name."""
        file = self._save(path)
        if file is not None:
            print(f"\nwritten: {file}")

    @property
    def failures(self) -> list[str]:
        """What has no row because it failed."""
        return [f"{table['title']}: {name}" for table in self.tables for name in table["failed"]]

    def _put(self, table: dict[str, Any]) -> None:
        self.tables.append(table)
        print(render(table), flush=True)
        self._save(self.path)

    def _save(self, path: Path | None) -> Path | None:
        if path is None:
            return None
        file = path / f"{self.bench}.json" if path.is_dir() else path
        content = {"bench": self.bench, "options": self.options, "machine": self.machine, "tables": self.tables}
        half = file.with_name(f".{file.name}.half")
        half.write_text(json.dumps(content, indent=1) + "\n")
        half.replace(file)  # a reader never finds half a file, not even after a run that was killed
        return file


_LEGEND = """
median      middle of the rounds' samples           q1-q3   their quartiles         min   the fastest
x floor     times as long as the floor: median [q1-q3] of the ratios within each round
x baseline  the same to the baseline                + baseline   seconds more than it, likewise
rate        bytes per second, at the median         of floor     percent of the floor's rate, likewise"""


def render(table: Mapping[str, Any]) -> str:
    """A table as text."""
    bases: list[str] = []
    if "columns" in table:
        lines = [["", *table["columns"]], *([row["name"], *row["shown"]] for row in table["rows"])]
    else:
        lines = _spreads(table)
        bases = [f"{kind}: {table[kind]}" for kind in ("floor", "baseline") if table[kind]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    above = [f"\n== {table['title']}", *([table["note"]] if table["note"] else []), *bases]
    return "\n".join([*above, *text, *(f"no row: {name}: {why}" for name, why in table["failed"].items())])


def _spreads(table: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of a table of seconds per round."""
    floor, baseline = table["floor"], table["baseline"]
    header = ["", "median", "q1-q3", "min"]
    header += ["x floor"] if floor else []
    header += ["x baseline"] if baseline else []
    header += ["+ baseline"] if baseline and not floor else []
    header += ["rate"] if table.get("bytes") else []
    header += ["of floor"] if table.get("bytes") and floor else []
    lines = [header]
    for row in table["rows"]:
        own = row["seconds"]
        line = [row["name"], duration(own["median"]), _range(own, duration), duration(own["min"])]
        line += [_ratio(row["to_floor"])] if floor else []
        line += [_ratio(row["to_baseline"])] if baseline else []
        line += [_added(row["over_baseline"])] if baseline and not floor else []
        line += [_rate(row["bytes_per_second"])] if table.get("bytes") else []
        line += [_percent(row["rate_to_floor"])] if table.get("bytes") and floor else []
        lines.append(line)
    return lines


def duration(seconds: float) -> str:
    """Seconds with a fitting unit, three digits or more."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f} {unit}"
    return f"{seconds * 1e6:.2f} us"


def _row(
    comparison: Comparison, name: str, floor: str | None, baseline: str | None, sample_bytes: int | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "seconds": asdict(comparison.spread(name))}
    if floor:
        row["to_floor"] = asdict(comparison.ratio(name, floor))
    if baseline:
        row["to_baseline"] = asdict(comparison.ratio(name, baseline))
        row["over_baseline"] = asdict(comparison.difference(name, baseline))
    if sample_bytes:
        row["bytes_per_second"] = sample_bytes / comparison.spread(name).median
        if floor:
            row["rate_to_floor"] = asdict(comparison.ratio(floor, name))  # the same bytes: the inverse ratio of times
    return {**row, "samples": list(comparison.seconds[name])}


def _range(spread: Mapping[str, float], show: Callable[[float], str]) -> str:
    return f"{show(spread['q1'])} - {show(spread['q3'])}"


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{_times(spread['median'])} [{_times(spread['q1'])}-{_times(spread['q3'])}]"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.095 else f"{ratio:.4f}"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3f} GB/s"


def _percent(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.1%} [{spread['q1']:.1%}-{spread['q3']:.1%}]"


def _added(spread: Mapping[str, float]) -> str:
    return f"{duration(spread['median'])} [{_range(spread, duration)}]"


# ---- options and the machine


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", help="cpu (default), cuda, xpu, ...")
    options.add_argument("--rounds", type=int, help="rounds of every comparison; default by model size")
    options.add_argument("--quick", action="store_true", help="small models, few rounds: to see that it runs")
    options.add_argument("--large", action="store_true", help="also what takes minutes or many gigabytes")
    options.add_argument("--threads", type=int, help="torch's threads per operation")
    options.add_argument("--json", type=Path, metavar="PATH", help="write the results to a file, or into a folder")
    return options


def start(bench: str, options: argparse.Namespace) -> Report:
    """Apply the common options, and print what is measured on which machine."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = Report(bench=bench, options=shown, machine=machine(torch.device(options.device)), path=options.json)
    report.begin()
    return report


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    name = "" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": f"{device.type} {name}".strip(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def synchronizer(device: torch.device) -> Callable[[], None] | None:
    """What waits for everything that was queued on a device; None where nothing is queued."""
    return None if device.type == "cpu" else torch.accelerator.synchronize


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _nothing() -> None:
    pass
