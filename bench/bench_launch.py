"""From launch() to the first average: where the time goes.

One average of a small model from 32 snapshots, in a process of its own, as a training or a notebook would ask for it.
Each contestant does what the one before it does, and a part more; all are processes, timed from outside. The second
table has what each part adds, round by round. Modules are compiled once, before, as where a package is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch

from bench.harness import Measure, compare, duration, parser, start, timed
from nitrous_ema import PostHocEMA
from nitrous_ema.synthesis.worker.launch import launch

REPOSITORY = Path(__file__).resolve().parents[1]
MODULE = "nitrous_ema.async_.synthesize_worker"
LENGTH = 0.07
STEPS = 16  # of two profiles
ROUNDS = 15
INTERPRETER, NUMPY, MODULES = "interpreter", "and numpy", "and the worker's modules"
WORKER, LAUNCHED = "and plan, read, write, fsync", "launch().result()"


def main() -> None:
    chosen = parser(__doc__).parse_args()
    report = start("bench_launch", chosen)
    rounds = chosen.rounds or (1 if chosen.quick else ROUNDS)
    with tempfile.TemporaryDirectory(prefix="nitrous-ema-bench-") as folder:
        snapshots = fill(Path(folder) / "snapshots", width=16 if chosen.quick else 512)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "bytecode")
        comparison = compare(contestants(snapshots, Path(folder) / "out"), rounds=rounds, warm_up_rounds=1)
    report.add("one average of a small model from 32 snapshots", comparison, baseline=INTERPRETER)
    names = list(comparison.seconds)
    parts = {names[0]: {"median": comparison.spread(names[0]).median}}
    for before, name in pairwise(names):
        parts[name] = {"median": comparison.difference(name, before).median}
    report.add_list("what each part adds", {"median": duration}, parts)
    report.write(chosen.json)


def fill(folder: Path, width: int) -> Path:
    """Snapshots of a model that changes with each step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(width, width)
    ema = PostHocEMA(model, checkpoint_every_num_steps=10, update_every=1, checkpoint_folder=folder)
    for _ in range(10 * STEPS):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight), alpha=0.01)
        ema.fence()
        ema.update()
    ema.close()
    return folder


def contestants(snapshots: Path, out: Path) -> Mapping[str, Measure]:
    """By name, from the least to all of it."""
    modules = f"from nitrous_ema.synthesis.worker import inputs, runner; import {MODULE}"
    worker = ["-m", MODULE, str(snapshots), f"--sigma-rel={LENGTH}", f"--out={out}"]
    return {
        INTERPRETER: _process("-c", "pass"),
        NUMPY: _process("-c", "import numpy"),
        MODULES: _process("-c", modules),
        WORKER: _process(*worker),
        LAUNCHED: timed(lambda: launch(snapshots, sigma_rels=[LENGTH], out=out).result(timeout=600)),
    }


def _process(*arguments: str) -> Measure:
    command = [sys.executable, *arguments]
    return timed(lambda: subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True))


if __name__ == "__main__":
    main()
