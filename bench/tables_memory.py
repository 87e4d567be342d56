"""Memory of a synthesis beside its blocks: two tables of docs/synthesis.md (python -m bench.tables_memory).

The first, for models of many tensors: the worker's own estimate of the most memory, and what it took. The second, for
folders of many snapshots of a small model: what it took, most of it while it listed and chose among them. Each row is a
worker of its own; counted is the most that it held beyond everything imported (VmHWM of Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SIGMA_RELS = (0.05, 0.10, 0.15, 0.20)
TENSORS = ((1000, 2, 24), (20_000, 1, 24), (20_000, 2, 24), (20_000, 4, 24), (20_000, 2, 70))
SNAPSHOTS = ((500, 8), (2000, 8), (4000, 21))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="few tensors and snapshots: to see that it runs")
    options.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        measure(chosen.measure)
        return
    for row in table_of_tensors([(30, 2, 24)] if chosen.quick else TENSORS):
        print(row)
    print()
    for row in table_of_snapshots([(20, 2)] if chosen.quick else SNAPSHOTS):
        print(row)


def table_of_tensors(cases: Sequence[tuple[int, int, int]]) -> list[str]:
    """The memory that many names take, beside the estimate."""
    rows = ["| tensors | profiles | letters of a name | estimated | taken |", "|---|---|---|---|---|"]
    for tensors, profiles, letters in cases:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), tensors, letters, profiles, snapshots=5)
            estimated, taken = run(Path(folder), outputs=8)
        rows.append(f"| {tensors} | {profiles} | {letters} | {estimated:.0f} MiB | {taken:.0f} MiB |")
    return rows


def table_of_snapshots(cases: Sequence[tuple[int, int]]) -> list[str]:
    """What many snapshots take."""
    rows = ["| snapshots | lengths | taken |", "|---|---|---|"]
    for snapshots, outputs in cases:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), 1, 24, 2, snapshots)
            rows.append(f"| {snapshots} | {outputs} | {run(Path(folder), outputs)[1]:.0f} MiB |")
    return rows


def write(folder: Path, tensors: int, letters: int, profiles: int, snapshots: int) -> None:
    """Snapshots of a model of tensors of three numbers."""
    import torch

    from nitrous_ema import PostHocEMA

    model = torch.nn.Module()
    for place in range(tensors):
        model.register_parameter(f"{place:0{letters}}", torch.nn.Parameter(torch.zeros(3)))
    with PostHocEMA(
        model,
        SIGMA_RELS[:profiles],
        checkpoint_every_num_steps=1,
        checkpoint_folder=folder / "snapshots",
        update_every=1,
    ) as ema:
        for _ in range(snapshots):
            ema.update()


def run(folder: Path, outputs: int) -> tuple[float, float]:
    """MiB that a worker estimates at most, and that it took."""
    lengths = ",".join(f"{0.05 + 0.2 * place / outputs:.4f}" for place in range(outputs))
    command = [sys.executable, "-m", "bench.tables_memory", "--measure", str(folder / "snapshots")]
    command += ["--sigma-rel", lengths, "--out", str(folder / "out")]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    *lines, taken = done.stdout.splitlines()
    return json.loads(lines[0])["memory_bytes"] / 2**20, int(taken) / 2**10


def measure(arguments: Sequence[str]) -> None:
    """Run a worker in this process, and print how many KiB it took beyond its imports."""
    import concurrent.futures  # noqa: F401

    import nitrous_ema.synthesis.worker.runner  # noqa: F401
    from nitrous_ema.async_ import synthesize_worker

    Path("/proc/self/clear_refs").write_text("5")  # forgets the most so far
    before = most_kib()
    status = synthesize_worker.main(arguments)
    print(most_kib() - before)
    sys.exit(status)


def most_kib() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
