"""Many snapshots and many runs in one folder: the table of docs/benchmarks.md (python -m bench.tables_scale).

Each cell is a process of its own: seconds of the work after its imports, and the most memory that it held beyond them
(VmHWM of Linux). The snapshots are of a model with 50 small tensors and two profiles, so that names and headers are all
that counts; they are written without fsync. The folder is on ``--folder``; each table row needs 4 KiB and two
names per snapshot there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from bench.tables_memory import most_kib
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.snapshots.header import Lineage, Stamp, encode_header
from nitrous_ema.snapshots.layout import Layout, TensorRecord
from nitrous_ema.snapshots.names import folder_name, rank_file_name

REPOSITORY = Path(__file__).resolve().parents[1]
CASES = ((1000, 1), (1000, 10), (1000, 150), (10_000, 1), (10_000, 10), (10_000, 150), (100_000, 1), (100_000, 150))
"""(snapshots, runs): each run continues the one before it."""
SIGMA_RELS = (0.05, 0.10)
KEEP = 0.3  # of the snapshots
TENSORS = 50


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="few snapshots: to see that it runs")
    options.add_argument("--most", type=int, default=10_000, help="leave out rows of more snapshots (default: 10000)")
    options.add_argument("--folder", type=Path, help="where the snapshots go (default: the folder for temporary files)")
    options.add_argument("--measure", nargs=2, metavar=("WORK", "DIR"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        measure(chosen.measure[0], Path(chosen.measure[1]))
        return
    cases = [(30, 1), (30, 3)] if chosen.quick else [case for case in CASES if case[0] <= chosen.most]
    print(f"| snapshots | runs | {' | '.join(WORKS)} |")
    print(f"|---|---|{'---|' * len(WORKS)}")
    for snapshots, runs in cases:
        with tempfile.TemporaryDirectory(prefix="nitrous-ema-bench-", dir=chosen.folder) as folder:
            write(Path(folder) / "snapshots", snapshots, runs)
            cells = [measured(work, Path(folder)) for work in WORKS]
        print(f"| {snapshots} | {runs} | {' | '.join(cells)} |", flush=True)


def write(root: Path, snapshots: int, runs: int) -> None:
    """Write a folder in which each run continues the one before it."""
    names = [f"blocks.{place:02}.weight" for place in range(TENSORS)]
    layout = Layout(
        records=tuple(
            TensorRecord(name=name, keys=(name,), dtype="F32", shape=(2, 2), role="averaged") for name in names
        ),
        gammas=tuple(float(sigma_rel_to_gamma(each)) for each in SIGMA_RELS),
        sigma_rels=SIGMA_RELS,
        checkpoint_dtype="F32",
        chunk_bytes=1 << 16,
    )
    data = [bytes(end - begin) for begin, end in layout.chunks]
    crc32 = [zlib.crc32(each) for each in data]
    root.mkdir()
    lineage: Lineage = ()
    for number in range(runs):
        run = f"20260101T{number // 3600:02}{number // 60 % 60:02}{number % 60:02}.000000-{number:08x}"
        first, last = (snapshots * each // runs for each in (number, number + 1))
        for step in range(first + 1, last + 1):
            stamp = Stamp(step=step, t=step, t_first=1, run=run, lineage=(*lineage, (run, None)))
            folder = root / folder_name(step, run)
            folder.mkdir()
            content = b"".join([encode_header(layout, stamp, crc32), *data])
            (folder / rank_file_name(0, 1)).write_bytes(content)
        lineage = (*lineage, (run, last))


def measured(work: str, folder: Path) -> str:
    """Seconds and MiB of one work, in a process of its own, as a cell of the table."""
    command = [sys.executable, "-m", "bench.tables_scale", "--measure", work, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=3600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    seconds, kib = json.loads(done.stdout.splitlines()[-1])
    return f"{seconds:.2f} s, {kib / 1024:.0f} MiB"


def measure(work: str, folder: Path) -> None:
    """Do one work in this process, and print its seconds and KiB."""
    call = WORKS[work](folder / "snapshots", folder)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most so far
    before, began = most_kib(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        kept = call()  # an EMA that is dropped would be closed, and its history pruned, within the time
    print(json.dumps([time.perf_counter() - began, most_kib() - before]))
    del kept


# ---- the works; each imports what it needs, then returns what is timed


def listing(root: Path, _: Path) -> Callable[[], object]:
    from nitrous_ema import SnapshotStore

    return SnapshotStore(root).snapshots


def planning(root: Path, _: Path) -> Callable[[], object]:
    from nitrous_ema.synthesis import plan_from_store

    return lambda: plan_from_store(root, sigma_rels=[0.05, 0.07, 0.1, 0.15])


def resuming(root: Path, _: Path) -> Callable[[], object]:
    """From the constructor, by way of the state of the last snapshot, until the next one is on disk.

    ``keep=`` drops most of the history afterwards, in the background.
    """
    import torch
    import torch._dynamo  # loaded by any optimizer at its first step

    from nitrous_ema import AsyncPostHocEMA

    blocks = {f"{place:02}": torch.nn.Linear(2, 2, bias=False) for place in range(TENSORS)}
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict(blocks)})
    last = len(list(root.glob("step-*")))

    def call() -> AsyncPostHocEMA:
        ema = AsyncPostHocEMA(
            model,
            SIGMA_RELS,
            checkpoint_folder=root,
            checkpoint_every_num_steps=1,
            update_every=1,
            keep=max(3, int(KEEP * last)),
        )
        ema.restore()
        ema.update()
        while not ema.stats().snapshots:
            time.sleep(0.001)
        return ema

    return call


def command(name: str, *arguments: str) -> Callable[[Path, Path], Callable[[], object]]:
    def prepare(root: Path, _: Path) -> Callable[[], object]:
        from nitrous_ema.cli import inspect, prune, verify  # noqa: F401
        from nitrous_ema.cli import main as run

        return lambda: run([name, str(root), *arguments])

    return prepare


WORKS: dict[str, Callable[[Path, Path], Callable[[], object]]] = {
    "listing": listing,
    "planning 4 lengths": planning,
    "`inspect`": command("inspect"),
    "`verify`": command("verify"),
    "`prune --keep 32 --dry-run`": command("prune", "--keep", "32", "--dry-run"),
    "resume with `keep=`": resuming,
}

if __name__ == "__main__":
    main()
