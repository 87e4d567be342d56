"""Averages of 1, 8 and 32 lengths from one folder of snapshots: how long it takes, and how much memory.

Three tables:
  lengths   all columns of 32 snapshots (16 steps, two profiles) are read; outputs on disk, durable. Next to the peers,
            each with a folder that it has written itself, and to a plain loop of read, checksum, convert, matrix
            product and write over blocks of 32 Ki elements
  memory    how far each one's memory grew meanwhile, above that of its process with everything imported
  sparse    500 snapshots of a small model: with the default tolerance only a few of them are read

Every sample is a process of its own, which takes the time without its start and its imports. All contestants read
from the page cache: the folders were just written, and are read once before. All files lie in ``--folder`` (14 GB).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import contestants, models, synthesizers
from bench.harness import Comparison, Measure, Report, compare, parser, start
from bench.savers import EMA_PYTORCH_HALF
from bench.synthesizers import LOOP, LOOP_SINGLE, OURS, OURS_SINGLE, OURS_TOLERANT
from nitrous_ema import PostHocEMA
from nitrous_ema.synthesis import DEFAULT_MEMORY_BYTES, plan_from_store

NITROUS_001_FULL = f"{contestants.NITROUS_001}, float32 files"
MANY_LENGTHS = 8  # of the table with a tolerance
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is synthesized, and how often."""

    model: str
    """Its name in ``synthesizers.MODELS``."""
    steps: int
    lengths: tuple[int, ...]
    """How many averages."""
    rounds: tuple[int, ...]
    """For each of these."""
    small_model: str
    small_steps: int
    small_rounds: int


FULL = Size(
    model="transformer",
    steps=16,
    lengths=(1, 8, 32),
    rounds=(7, 3, 2),
    small_model="small_transformer",
    small_steps=500,
    small_rounds=3,
)
_BRIEF = {"steps": 4, "lengths": (2,), "rounds": (1,), "small_steps": 12, "small_rounds": 1}
QUICK = replace(FULL, model="tiny", small_model="tiny", **_BRIEF)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="where files are written; default: where temporary files are")
    options.add_argument("--tables", nargs="+", choices=("lengths", "sparse"), default=["lengths", "sparse"])
    chosen = options.parse_args()
    size = QUICK if chosen.quick else FULL
    if chosen.rounds:
        size = replace(size, rounds=(chosen.rounds,) * len(size.lengths), small_rounds=chosen.rounds)
    report = start("bench_synthesis", chosen)
    if chosen.folder:
        chosen.folder.mkdir(parents=True, exist_ok=True)
    for name, reason in contestants.makers()[1].items():
        print(f"left out: {name}: {reason}")
    for table, run in (("lengths", lengths), ("sparse", sparse)):
        if table in chosen.tables:
            with tempfile.TemporaryDirectory(prefix="nitrous-ema-bench-", dir=chosen.folder) as folder:
                run(report, size, Path(folder), chosen.threads)
    report.write(chosen.json)


def lengths(report: Report, size: Size, folder: Path, threads: int | None) -> None:
    """All columns, for several numbers of lengths."""
    snapshots = fill(folder, size.model, size.steps)
    names = [LOOP, LOOP_SINGLE, OURS, OURS_SINGLE, *(name for name in snapshots if name != OURS)]
    runs = {name: Run(name, snapshots.get(name, snapshots[OURS]), folder / "out", threads) for name in names}
    memory: dict[str, dict[str, float]] = {name: {} for name in names}
    for count, rounds in zip(size.lengths, size.rounds, strict=True):
        comparison = _compared(runs, count, rounds)
        report.add(
            f"{count} averages from {2 * size.steps} snapshots of {_described(size.model)}",
            comparison,
            floor=LOOP,
            baseline=_best_peer(comparison, list(snapshots)),
            note="The baseline is the faster peer. All columns are read.",
        )
        for name, run in runs.items():
            memory[name][f"{count} averages"] = run.peak_bytes
    report.add_list(
        "memory above a process with everything imported",
        {column: lambda value: f"{value / 2**20:.0f} MiB" for column in memory[OURS]},
        memory,
        note=f"The most of all rounds. The budget of nitrous_ema is its default, {DEFAULT_MEMORY_BYTES >> 20} MiB.",
    )


def sparse(report: Report, size: Size, folder: Path, threads: int | None) -> None:
    """Fewer columns, within the default tolerance."""
    snapshots = fill(folder, size.small_model, size.small_steps, with_nitrous_001=False)
    snapshots[OURS_TOLERANT] = snapshots[OURS]
    runs = {name: Run(name, path, folder / "out", threads) for name, path in snapshots.items()}
    comparison = _compared(runs, MANY_LENGTHS, size.small_rounds)
    report.add(
        f"{MANY_LENGTHS} averages from {size.small_steps} steps of {_described(size.small_model)}",
        comparison,
        baseline=OURS,
        note="nitrous_ema reads all snapshots, and with a tolerance those that it needs.",
    )
    read = {OURS: _bytes_read(snapshots[OURS], 0.0), OURS_TOLERANT: _bytes_read(snapshots[OURS], 1e-3)}
    for name in snapshots.keys() - read.keys():
        read[name] = MANY_LENGTHS * sum(path.stat().st_size for path in snapshots[name].iterdir())
    report.add_list(
        "bytes read for these", {"read": lambda value: f"{value / 1e6:.1f} MB"}, {n: {"read": read[n]} for n in runs}
    )


class Run:
    """Samples of one contestant, and the most memory that one of them took."""

    def __init__(self, name: str, snapshots: Path, out: Path, threads: int | None) -> None:
        self.peak_bytes = 0
        self._command = [sys.executable, "-m", "bench.synthesizers", _short(name), str(snapshots)]
        self._out, self._threads = out, [str(threads)] if threads else []

    def measure(self, count: int) -> Measure:
        """So many averages."""
        sigma_rels = ",".join(f"{0.05 + 0.1 * place / max(count - 1, 1):.4f}" for place in range(count))
        if count == 1:
            sigma_rels = "0.08"

        def once() -> float:
            command = [*self._command, str(self._out), sigma_rels, *self._threads]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=REPOSITORY)
            shutil.rmtree(self._out, ignore_errors=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
            *_, peak, seconds = done.stdout.split()
            self.peak_bytes = max(self.peak_bytes, int(peak))
            return float(seconds)

        return once


def _short(name: str) -> str:
    """As ``synthesizers`` has it: a peer's files decide on their type."""
    return name.removesuffix(", float16 files").removesuffix(", float32 files")


def _compared(runs: dict[str, Run], count: int, rounds: int) -> Comparison:
    for run in runs.values():
        run.peak_bytes = 0
    return compare({name: run.measure(count) for name, run in runs.items()}, rounds=rounds, warm_up_rounds=0)


def fill(folder: Path, model_name: str, steps: int, *, with_nitrous_001: bool = True) -> dict[str, Path]:
    """Folders of snapshots of one training, each written by the library that is to read it; ours is in float16."""
    torch.manual_seed(0)
    (folder / "model").write_text(model_name)
    model = synthesizers.MODELS[model_name]()
    absent = contestants.makers()[1]
    peers = {EMA_PYTORCH_HALF: "ema-pytorch"} | ({NITROUS_001_FULL: "nitrous-ema 0.0.1"} if with_nitrous_001 else {})
    writers: dict[str, Any] = {}
    for name, short in peers.items():
        if short not in absent:
            peer = synthesizers.peer_of(_short(name))
            writers[name] = synthesizers.make_peer(peer, model, folder / short)
    with PostHocEMA(
        model,
        contestants.SIGMA_RELS,
        checkpoint_every_num_steps="manual",
        checkpoint_folder=folder / "nitrous_ema",
        checkpoint_dtype=torch.float16,
        update_every=1,
    ) as ours:
        for _ in range(steps):
            _train(model)
            for writer in (ours, *writers.values()):
                writer.update()
                writer.checkpoint()
    paths = {OURS: folder / "nitrous_ema"} | {name: folder / peers[name] for name in writers}
    for path in (file for each in paths.values() for file in each.rglob("*") if file.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return paths


def _train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)


def _best_peer(comparison: Comparison, names: Sequence[str]) -> str | None:
    peers = [name for name in names if name != OURS]
    return min(peers, key=lambda name: comparison.spread(name).median, default=None)


def _bytes_read(snapshots: Path, tolerance: float) -> int:
    sigma_rels = [0.05 + 0.1 * place / (MANY_LENGTHS - 1) for place in range(MANY_LENGTHS)]
    return plan_from_store(snapshots, sigma_rels=sigma_rels, tolerance=tolerance).bytes_to_read


def _described(model_name: str) -> str:
    return f"{model_name} ({models.averaged_elements(synthesizers.MODELS[model_name]()) / 1e6:.1f} M parameters)"


if __name__ == "__main__":
    main()
