"""``nitrous-ema demo``: train, take snapshots while training, synthesize averages afterwards, choose the EMA length.

A small diffusion model (Karras et al. 2022, arXiv:2206.00364, "EDM") learns the handwritten digits that scikit-learn
ships. ``train`` and ``_choose`` use this library; the rest is the model and its evaluation. Everything runs on the CPU.

This file is somewhat longer than 300 lines because an example is read from top to bottom, in one file.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn

from nitrous_ema import AsyncPostHocEMA, SnapshotStore, sweep
from nitrous_ema._base.options import path_option
from nitrous_ema.errors import MissingExtraError, NitrousWarning
from nitrous_ema.search.plot import plot_images, plot_sweep
from nitrous_ema.search.table import SweepTable

SIGMA_RELS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25)
"""Lengths to compare."""
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2
"""Noise levels for training: log-normal (EDM's P_mean and P_std)."""
EVALUATION_SEED = 20220601
"""Seed of the evaluation's noise, equal for all models and seeds of the training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Folder and sizes of the demo. The defaults give a clear result in about two minutes on two cores."""

    out: Path
    """Folder for all files."""
    steps: int = 3600
    """Optimizer steps."""
    snapshots: int = 40
    """Number of snapshots, evenly spaced."""
    seed: int = 0
    """Seed of the split, the weights and the training noise."""
    batch: int = 32
    """Digits per step."""
    learning_rate: float = 6e-3
    """Learning rate of Adam, constant and high: an average removes the noise that this leaves in the weights."""
    channels: int = 32
    """Width of the network."""
    blocks: int = 2
    """Residual blocks of the network."""
    draws: int = 4
    """Noise samples per held-out digit in the evaluation."""
    samples_per_digit: int = 4
    """Images of each of the ten digits that each of two networks samples."""

    def quick(self) -> DemoConfig:
        """Return a configuration that takes a few seconds and tests the installation; lengths hardly differ then."""
        return replace(self, steps=62, snapshots=12, channels=8, blocks=1, draws=1, samples_per_digit=1)


@dataclass(frozen=True, slots=True)
class Images:
    """Images of digits."""

    pixels: Tensor
    """Pixels in [-1, 1], shape [images, 1, 8, 8]."""
    labels: Tensor
    """The digit in each image, shape [images]."""


# ---- the model


class ResidualBlock(nn.Module):
    """Residual block of two convolutions; the noise level and the digit are added between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1))
        self.condition = nn.Linear(64, channels)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return features of the same shape."""
        change: Tensor = self.second(self.first(x) + self.condition(condition)[:, :, None, None])
        return x + change


class Denoiser(nn.Module):
    """D(x; sigma): estimates the clean image from an image with Gaussian noise of standard deviation sigma.

    Source:
        Karras et al. 2022, arXiv:2206.00364, Eq. 7 and Table 1 (preconditioning).
    """

    def __init__(self, channels: int, blocks: int, sigma_data: float) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.noise_level = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64))
        self.digit = nn.Embedding(10, 64)
        self.enter = nn.Conv2d(1, channels, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(channels, 8, 8))
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        self.leave = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Return the estimated clean images; ``sigma`` has the shape [images, 1, 1, 1]."""
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        return c_skip * noisy + c_out * self.network(c_in * noisy, c_noise, labels)

    def network(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        """Return F of Eq. 7, whose input and output have unit variance at every noise level."""
        condition = self.noise_level(c_noise.flatten(1)) + self.digit(labels)
        x = self.enter(x) + self.place
        for block in self.blocks:
            x = block(x, condition)
        output: Tensor = self.leave(x)
        return output


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return c_skip, c_out, c_in and c_noise (Karras et al. 2022, Table 1)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def edm_loss(model: nn.Module, images: Images, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """Return losses, shape [images] (Karras et al. 2022, Eq. 2; weight lambda = 1 / c_out ** 2, Table 1)."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised: Tensor = model(images.pixels + sigma * noise, sigma, images.labels)
    return (weight * (denoised - images.pixels) ** 2).mean((1, 2, 3))


def random_sigma(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample noise levels for training, shape [count, 1, 1, 1]."""
    return (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.randn(count, 1, 1, 1, generator=generator)).exp()


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, labels: Tensor, steps: int = 18) -> Tensor:
    """Sample images with the deterministic Heun sampler (Karras et al. 2022, Alg. 1 with the times of Eq. 5)."""
    sigma_max, sigma_min, rho = 80.0, 0.002, 7
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    times = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    x = noise * sigma_max

    def slope(x: Tensor, t: float) -> Tensor:
        denoised: Tensor = model(x, torch.full((len(x), 1, 1, 1), t), labels)
        return (x - denoised) / t

    for t, t_next in zip(times.tolist(), [*times[1:].tolist(), 0.0], strict=True):
        d = slope(x, t)
        euler = x + (t_next - t) * d
        x = x + (t_next - t) * (d + slope(euler, t_next)) / 2 if t_next > 0 else euler
    return x


# ---- the four stages


def load_images() -> tuple[Images, Images]:
    """Return the digits, split at random: four fifths for training, one fifth held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    training, held_out = order[len(order) // 5 :], order[: len(order) // 5]
    return Images(pixels[training], labels[training]), Images(pixels[held_out], labels[held_out])


def train(model: Denoiser, images: Images, config: DemoConfig) -> str:
    """Train the model while snapshots are written in the background; return the run's id."""
    from tqdm import trange

    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate, betas=(0.9, 0.99))
    every = config.steps // config.snapshots
    with AsyncPostHocEMA(model, checkpoint_every_num_steps=every, checkpoint_folder=config.out / "snapshots") as ema:
        for _ in trange(config.steps, desc="training", unit="step", leave=False):
            chosen = torch.randint(len(images.labels), (config.batch,))
            batch = Images(images.pixels[chosen], images.labels[chosen])
            noise = torch.randn_like(batch.pixels)
            loss = edm_loss(model, batch, random_sigma(config.batch), noise, model.sigma_data).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            ema.update()
        ema.checkpoint()  # of the last step; does nothing if that step has a snapshot
        return ema.run


@torch.no_grad()
def evaluate(model: Denoiser, images: Images, draws: int) -> Tensor:
    """Return the mean loss of each image, shape [images]; equal noise for all models makes them comparable."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    total = torch.zeros(len(images.labels))
    for _ in range(draws):
        sigma = random_sigma(len(images.labels), generator)
        noise = torch.randn(images.pixels.shape, generator=generator)
        total += edm_loss(model, images, sigma, noise, model.sigma_data)
    return total / draws


# ---- the command


def main(argv: Sequence[str] | None = None, stdout: TextIO | None = None) -> int:
    """Run the demo.

    Args:
        argv: Command line arguments without the program's name; those of the process by default.
        stdout: File for the report; ``sys.stdout`` by default.

    Returns:
        Exit status 0.

    Raises:
        MissingExtraError: A package of the extra ``demo`` is not installed.
    """
    config = _configure(argv)
    missing = [name for name in ("sklearn", "matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"The demo needs {', '.join(missing)}: pip install 'nitrous-ema[demo]'")
    with _reproducible(config.seed):
        for line in _run(config):
            (stdout or sys.stdout).write(line + "\n")
            (stdout or sys.stdout).flush()
    return 0


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch and limit it to one thread; restore both at the end.

    On two busy cores a second thread for a network this small made a step six times slower (measured).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _run(config: DemoConfig) -> Iterator[str]:
    """Run all stages; yield the report line by line while they run."""
    training, held_out = load_images()
    model = Denoiser(config.channels, config.blocks, float(training.pixels.std()))
    size = sum(parameter.numel() for parameter in model.parameters())
    yield f"Training a denoiser of {size:,} parameters on {len(training.labels):,} digits, {config.steps:,} steps."
    snapshots = config.out / "snapshots"
    if snapshots.exists() and SnapshotStore(snapshots).runs():
        yield f"{snapshots} contains earlier runs; this run does not continue them."
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This run.* begins anew", NitrousWarning)  # intended here
        run = train(model, training, config)
    yield f"Trained in {time.monotonic() - began:.0f} s; snapshots were written to {snapshots} meanwhile."

    yield from _choose(model, held_out, config, run)


def _choose(model: Denoiser, held_out: Images, config: DemoConfig, run: str) -> Iterator[str]:
    """Evaluate every length, compare the best with the raw weights, and sample images with both."""
    noise = torch.randn(10 * config.samples_per_digit, 1, 8, 8)
    labels = torch.arange(10).repeat(config.samples_per_digit)
    raw = evaluate(model, held_out, config.draws)
    pictures = {"raw weights": sample(model, noise, labels)}

    # An evaluation job can do the same on any machine that can read the folder, even while training runs.
    table = sweep(
        config.out / "snapshots",
        lambda model: evaluate(model, held_out, config.draws).mean(),
        sigma_rels=SIGMA_RELS,
        model=model,
        restore="best",
        refine=0,  # the given lengths are close enough to each other
        metric="loss on held-out digits",
        results=config.out / "sweep.jsonl",
        averages=config.out / "averages",
        run=run,
    )
    last, best = table.rows[-1], table.best
    yield (
        f"Synthesized {len(table.rows)} averages at step {last.step:,} in one pass over {last.snapshots_read} "
        f"snapshots ({last.bytes_read / 1e6:.1f} MB).\n"
    )
    yield from _table(table, raw, evaluate(model, held_out, config.draws))

    pictures[f"average, σ_rel = {best.sigma_rel:g}"] = sample(model, noise, labels)
    drawn = {
        "loss": plot_sweep(table, baseline=("raw weights", float(raw.mean()))),
        "samples": plot_images({title: images.view(-1, 10, 8, 8).numpy() for title, images in pictures.items()}),
    }
    for name, figure in drawn.items():
        figure.savefig(config.out / f"{name}.png", dpi=150, bbox_inches="tight")
    yield f"\nPictures: {', '.join(str(config.out / f'{name}.png') for name in drawn)}"


def _table(table: SweepTable, raw: Tensor, best_losses: Tensor) -> Iterator[str]:
    """Yield a table of the losses of the raw weights and of all lengths, then which of them is best."""
    base, best = float(raw.mean()), table.best
    yield "  sigma_rel   held-out loss   against raw   profile error"
    yield f"  raw weights        {base:.4f}"
    for row in table.rows:
        mark = "  <- best" if row is best else ""
        yield (
            f"  {row.sigma_rel:<9g}          {row.value:.4f}      {row.value / base - 1:+7.1%}         "
            f"{row.profile_error:.1e}{mark}"
        )
    # Per digit, because equal noise makes the difference far more certain than either loss is.
    gain = raw - best_losses
    error = float(gain.std()) / len(gain) ** 0.5
    name = f"sigma_rel {best.sigma_rel:g}"
    share, difference = float(gain.mean()) / base, f"{abs(float(gain.mean())):.4f} ± {error:.4f}"
    yield ""
    if share > 0:
        yield f"{name} is best: its loss is {share:.1%} below that of the raw weights ({difference})."
    else:
        yield f"The raw weights are best: the loss of {name} is {-share:.1%} above theirs ({difference})."


def _configure(argv: Sequence[str] | None) -> DemoConfig:
    parser = argparse.ArgumentParser(
        prog="nitrous-ema demo",
        description="Train a small diffusion model on handwritten digits, then choose the EMA length.",
    )
    parser.add_argument(
        "--out",
        type=path_option("--out"),
        default=Path("nitrous-demo"),
        help="folder for all files (default: ./nitrous-demo)",
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {DemoConfig(out=Path()).steps})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: 0)")
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only, to test the installation")
    options = parser.parse_args(argv)
    config = DemoConfig(out=options.out, seed=options.seed)
    config = config.quick() if options.quick else config
    if options.steps is not None:
        config = replace(config, steps=options.steps)
    if config.steps < config.snapshots:
        parser.error(f"argument --steps: {config.steps}; expected {config.snapshots} or more, one per snapshot")
    if not 0 <= config.seed < 2**63:
        parser.error(f"argument --seed: {config.seed}; expected a number from 0 to 2**63 - 1")
    return config
