"""The whole way on real data: train, snapshot while training, synthesize afterwards, choose the EMA length.

A small diffusion model (Karras et al. 2022, arXiv:2206.00364, "EDM") learns the handwritten digits that scikit-learn
ships. What it does with this library is in ``train`` and ``_choose``; all else is the model and its
evaluation. Everything runs on the CPU.

Somewhat longer than the house's 300 lines: an example is read from top to bottom, in one file.
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

from nitrous_ema import AsyncPostHocEMA, SnapshotStore, load_average, sweep
from nitrous_ema.errors import MissingExtraError, NitrousWarning
from nitrous_ema.search.plot import plot_images, plot_sweep
from nitrous_ema.search.table import SweepTable

SIGMA_RELS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25)
"""Lengths that are compared."""
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2
"""Noise levels to train on: log-normal (EDM's P_mean and P_std)."""
EVALUATION_SEED = 20220601


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Sizes that give a clear answer in about two minutes on two cores."""

    steps: int = 3600
    """Optimizer steps."""
    snapshots: int = 40
    """Snapshots, evenly spaced."""
    seed: int = 0
    """Of the split, the weights and the training noise. The evaluation's noise is always the same."""
    batch: int = 32
    """Digits per step."""
    learning_rate: float = 6e-3
    """Of Adam; constant and high, because the average takes the noise out that this leaves in the weights."""
    channels: int = 32
    """Width of the network."""
    blocks: int = 2
    """Residual blocks of the network."""
    draws: int = 4
    """Noises that each held-out digit is evaluated with."""
    samples_per_digit: int = 4
    """Images drawn of each of the ten digits, by each of two networks."""

    def quick(self) -> DemoSettings:
        """The same in a few seconds, to see that everything works; the lengths hardly differ then."""
        return replace(self, steps=62, snapshots=12, channels=8, blocks=1, draws=1, samples_per_digit=1)


@dataclass(frozen=True, slots=True)
class Images:
    """Images of digits: pixels in [-1, 1], shape [images, 1, 8, 8], and which digit each one shows, [images]."""

    pixels: Tensor
    labels: Tensor


# ---- the model


class ResidualBlock(nn.Module):
    """Residual block of two convolutions, with the noise level and the digit added in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1))
        self.condition = nn.Linear(64, channels)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Features of the same shape."""
        change: Tensor = self.second(self.first(x) + self.condition(condition)[:, :, None, None])
        return x + change


class Denoiser(nn.Module):
    """D(x; sigma): the expected clean image, given an image with Gaussian noise of standard deviation sigma.

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
        """Clean images; sigma has the shape [images, 1, 1, 1]."""
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        return c_skip * noisy + c_out * self.network(c_in * noisy, c_noise, labels)

    def network(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        """F of Eq. 7: input and output have unit variance at every noise level."""
        condition = self.noise_level(c_noise.flatten(1)) + self.digit(labels)
        x = self.enter(x) + self.place
        for block in self.blocks:
            x = block(x, condition)
        output: Tensor = self.leave(x)
        return output


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in and c_noise (Karras et al. 2022, Table 1)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def edm_loss(model: nn.Module, images: Images, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """Loss of each image, shape [images] (Karras et al. 2022, Eq. 2; weight lambda = 1 / c_out ** 2, Table 1)."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised: Tensor = model(images.pixels + sigma * noise, sigma, images.labels)
    return (weight * (denoised - images.pixels) ** 2).mean((1, 2, 3))


def random_sigma(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Noise levels to train on, shape [count, 1, 1, 1]."""
    return (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.randn(count, 1, 1, 1, generator=generator)).exp()


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, labels: Tensor, steps: int = 18) -> Tensor:
    """Draw images by the deterministic Heun sampler (Karras et al. 2022, Alg. 1 with the times of Eq. 5)."""
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
    """The digits, four fifths to train on and one fifth held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    training, held_out = order[len(order) // 5 :], order[: len(order) // 5]
    return Images(pixels[training], labels[training]), Images(pixels[held_out], labels[held_out])


def train(model: Denoiser, images: Images, settings: DemoSettings, snapshots: Path) -> str:
    """Train, with snapshots of averages written in the background; returns the run's id."""
    from tqdm import trange

    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, betas=(0.9, 0.99))
    every = settings.steps // settings.snapshots
    with AsyncPostHocEMA(model, checkpoint_every_num_steps=every, checkpoint_folder=snapshots) as ema:
        for _ in trange(settings.steps, desc="training", unit="step", leave=False):
            chosen = torch.randint(len(images.labels), (settings.batch,))
            batch = Images(images.pixels[chosen], images.labels[chosen])
            noise = torch.randn_like(batch.pixels)
            loss = edm_loss(model, batch, random_sigma(settings.batch), noise, model.sigma_data).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            ema.update()
        ema.checkpoint()  # of the last step, unless it has one already
        return ema.run


@torch.no_grad()
def evaluate(model: Denoiser, images: Images, draws: int) -> Tensor:
    """Mean loss of each image, shape [images]; every model meets the same noise, so that differences mean something."""
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
        stdout: Where the report goes.

    Returns:
        Exit status 0.

    Raises:
        MissingExtraError: What the demo needs beside the library is not installed.
    """
    settings, out = _options(argv)
    missing = [name for name in ("sklearn", "matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"The demo needs {', '.join(missing)}: pip install 'nitrous-ema[demo]'")
    with _reproducible(settings.seed):
        for line in _run(settings, out):
            (stdout or sys.stdout).write(line + "\n")
            (stdout or sys.stdout).flush()
    return 0


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch, and have it compute in one thread; both are undone at the end.

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


def _run(settings: DemoSettings, out: Path) -> Iterator[str]:
    """All four stages; yields the report, line by line, as it comes."""
    training, held_out = load_images()
    model = Denoiser(settings.channels, settings.blocks, float(training.pixels.std()))
    size = sum(parameter.numel() for parameter in model.parameters())
    yield f"Training a denoiser of {size:,} parameters on {len(training.labels):,} digits, {settings.steps:,} steps."
    snapshots = out / "snapshots"
    if snapshots.exists() and SnapshotStore(snapshots).runs():
        yield f"{snapshots} has earlier runs; this one begins anew beside them."
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This run.* begins anew", NitrousWarning)  # it does so on purpose
        run = train(model, training, settings, snapshots)
    yield f"Trained in {time.monotonic() - began:.0f} s, with snapshots written to {snapshots} meanwhile."

    yield from _choose(model, held_out, settings, out, run)


def _choose(model: Denoiser, held_out: Images, settings: DemoSettings, out: Path, run: str) -> Iterator[str]:
    """Evaluate every length, compare the best with the raw weights, and draw both."""
    noise = torch.randn(10 * settings.samples_per_digit, 1, 8, 8)
    labels = torch.arange(10).repeat(settings.samples_per_digit)
    raw = evaluate(model, held_out, settings.draws)
    pictures = {"raw weights": sample(model, noise, labels)}

    # An evaluation job does the same, on any machine that sees the folder, while training goes on.
    table = sweep(
        out / "snapshots",
        lambda model: evaluate(model, held_out, settings.draws).mean(),
        sigma_rels=SIGMA_RELS,
        model=model,
        refine=0,  # these lengths are close enough already
        metric="loss on held-out digits",
        results=out / "sweep.jsonl",
        averages=out / "averages",
        run=run,
    )
    last, best = table.rows[-1], table.best
    yield (
        f"Synthesized {len(table.rows)} averages that end at step {last.step:,}, in one pass over "
        f"{last.bytes_read / 1e6:.1f} MB of {last.snapshots_read} snapshots.\n"
    )
    if best.path is not None:  # it is where ``averages`` says
        load_average(model, best.path)
    yield from _table(table, raw, evaluate(model, held_out, settings.draws))

    pictures[f"average, σ_rel = {best.sigma_rel:g}"] = sample(model, noise, labels)
    drawn = {
        "loss": plot_sweep(table, baseline=("raw weights", float(raw.mean()))),
        "samples": plot_images({title: images.view(-1, 10, 8, 8).numpy() for title, images in pictures.items()}),
    }
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
    yield f"\nPictures: {', '.join(str(out / f'{name}.png') for name in drawn)}"


def _table(table: SweepTable, raw: Tensor, best_losses: Tensor) -> Iterator[str]:
    """Loss of every length beside that of the raw weights, and the verdict."""
    base, best = float(raw.mean()), table.best
    yield "  sigma_rel   held-out loss   against raw   profile error"
    yield f"  raw weights        {base:.4f}"
    for row in table.rows:
        mark = "  <- best" if row is best else ""
        yield (
            f"  {row.sigma_rel:<9g}          {row.value:.4f}      {row.value / base - 1:+7.1%}         "
            f"{row.profile_error:.1e}{mark}"
        )
    gain = raw - best_losses  # of each held-out digit, which the same noise makes far surer than the two losses are
    error = float(gain.std()) / len(gain) ** 0.5
    name = f"sigma_rel {best.sigma_rel:g}"
    share = float(gain.mean()) / base
    yield ""
    if share > 0:
        yield f"{name} won: {share:.1%} below the loss of the raw weights ({float(gain.mean()):.4f} ± {error:.4f})."
    else:
        yield f"The raw weights won: {name} comes next, {-share:.1%} above ({-float(gain.mean()):.4f} ± {error:.4f})."


def _options(argv: Sequence[str] | None) -> tuple[DemoSettings, Path]:
    parser = argparse.ArgumentParser(
        prog="nitrous-ema demo", description="Train on handwritten digits and choose the EMA length afterwards."
    )
    parser.add_argument("--out", type=Path, default=Path("nitrous-demo"), help="folder for all files (./nitrous-demo)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps ({DemoSettings().steps})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (0)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    options = parser.parse_args(argv)
    settings = DemoSettings(seed=options.seed)
    settings = settings.quick() if options.quick else settings
    if options.steps is not None:
        settings = replace(settings, steps=options.steps)
    if settings.steps < settings.snapshots:
        parser.error(f"argument --steps: {settings.steps}; expected {settings.snapshots} or more, one per snapshot")
    if not 0 <= settings.seed < 2**63:
        parser.error(f"argument --seed: {settings.seed}; expected a number from 0 to 2**63 - 1")
    return settings, options.out
