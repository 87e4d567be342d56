"""An evaluation job beside a running training: find the best EMA length at every new snapshot.

    python examples/follow_training.py --out follow

The training is a process of its own, as on a cluster. The evaluation shares nothing with it but the snapshot folder.
Every result is in follow/sweep.jsonl; an evaluation that was killed continues from there with --attach.

    nitrous-ema plot follow/sweep.jsonl --out follow.png
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from nitrous_ema import AsyncPostHocEMA, SnapshotStore, sweep
from nitrous_ema.errors import SnapshotNotFound

SIGMA_RELS = (0.03, 0.05, 0.08, 0.12, 0.2)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))


def make_batch(count: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(count, 1, generator=generator) - 1
    return x, torch.sin(5 * x) + noise * torch.randn(count, 1, generator=generator)


# ---- the training process, which is independent of the evaluation


def train(snapshots: Path, steps: int, every: int) -> None:
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with AsyncPostHocEMA(model, checkpoint_folder=snapshots, checkpoint_every_num_steps=every) as ema:
        for step in range(steps):
            x, y = make_batch(64, step, noise=1.0)
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update()


# ---- the evaluation process, which needs the folder and the architecture


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Return the mean squared error on held-out inputs, the same ones for every average."""
    x, y = make_batch(2000, seed=10**9, noise=0.0)
    return nn.functional.mse_loss(model(x), y).item()


def newest(snapshots: Path) -> tuple[str, int] | None:
    """Return run and step of the newest snapshot, None if there is no snapshot yet."""
    try:
        found = SnapshotStore(snapshots).get()
    except SnapshotNotFound:
        return None
    return found.run, found.step


def follow(out: Path, training: subprocess.Popen[bytes] | None, done: tuple[str, int] | None = None) -> None:
    model = make_model()
    while True:
        # Polled before the folder is listed: a snapshot that is written in between is then seen in the next turn.
        is_over = training is None or training.poll() is not None
        found = newest(out / "snapshots")
        if found is not None and found != done:
            done = found  # if an evaluation takes longer than the time between two snapshots, some are skipped
            run, step = found
            table = sweep(
                out / "snapshots",
                evaluate,
                sigma_rels=SIGMA_RELS,
                steps=[step],
                run=run,
                model=model,
                refine=2,
                metric="mean squared error",
                results=out / "sweep.jsonl",
            )
            best = table.best
            print(f"step {step}: best sigma_rel {best.sigma_rel:g}, {best.metric} {best.value:.5f}", flush=True)
        elif is_over:
            return
        else:
            wait(training)


def wait(training: subprocess.Popen[bytes], seconds: float = 0.5) -> None:
    with suppress(subprocess.TimeoutExpired):  # the training is still running
        training.wait(timeout=seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("follow"), help="folder for all files (./follow)")
    parser.add_argument("--steps", type=int, default=4000, help="steps to train (4000)")
    parser.add_argument("--every", type=int, default=100, help="steps between snapshots (100)")
    parser.add_argument("--attach", action="store_true", help="evaluate the newest snapshot; train nothing")
    parser.add_argument("--train", action="store_true", help="train only (the evaluation starts this process)")
    options = parser.parse_args()
    snapshots = options.out / "snapshots"
    if options.train:
        train(snapshots, options.steps, options.every)
        return 0
    if options.attach:
        follow(options.out, None)
        return 0
    earlier = newest(snapshots)  # of an earlier training in the same folder
    command = [sys.executable, __file__, "--train", f"--out={options.out}"]
    command += [f"--steps={options.steps}", f"--every={options.every}"]
    with subprocess.Popen(command) as training:
        try:
            follow(options.out, training, earlier)
        except BaseException:
            training.terminate()
            raise
    return training.returncode


if __name__ == "__main__":
    sys.exit(main())
