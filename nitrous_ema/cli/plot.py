"""``nitrous-ema plot``: draw a sweep's results, or the profiles that a folder's snapshots give, into a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nitrous_ema._base import exit_status
from nitrous_ema.cli.terminal import log
from nitrous_ema.errors import SnapshotNotFound
from nitrous_ema.search.plot import new_figure, plot_profiles, plot_sweep, plot_sweep_steps, plot_weights
from nitrous_ema.search.results import read_table
from nitrous_ema.snapshots.filesystem import is_folder, is_there
from nitrous_ema.synthesis import DEFAULT_TOLERANCE, plan_from_store
from nitrous_ema.synthesis.requested_lengths import lengths_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 6.4, 3.4  # inches, per picture


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotConfig:
    """Configuration of ``nitrous-ema plot``. Fields that may be None apply to snapshot folders only."""

    source: Path
    """A snapshot folder, or a file of a sweep's results."""
    out: Path
    """The picture; its suffix is the format."""
    sigma_rels: tuple[float, ...] | None
    """Lengths to draw, or None where ``gammas`` has them; a folder needs one of the two."""
    gammas: tuple[float, ...] | None
    """The same lengths as exponents."""
    step: int | None
    """Target step; None for the newest snapshot."""
    run: str | None
    """Run to read; None for the newest."""
    exclude: tuple[int, ...] | None
    """Steps to ignore."""
    tolerance: float | None
    """Relative profile error that may be added to read fewer snapshots; None for the default."""


def configure(options: argparse.Namespace) -> PlotConfig:
    """Return the configuration that the parsed options state."""
    return PlotConfig(
        source=options.source,
        out=options.out,
        sigma_rels=None if options.sigma_rel is None else tuple(options.sigma_rel),
        gammas=None if options.gamma is None else tuple(options.gamma),
        step=options.step,
        run=options.run,
        exclude=None if options.exclude is None else tuple(options.exclude),
        tolerance=options.tolerance,
    )


def run(config: PlotConfig) -> int:
    """Save one picture and log the notes on it; return the exit status."""
    with exit_status.usage_errors():  # matplotlib raises ValueError for an unknown suffix of the picture's file
        figure, notes = _profiles(config) if is_folder(config.source) else _results(config)
        figure.savefig(config.out, dpi=150, bbox_inches="tight")
    for line in notes:
        log(line)
    return exit_status.DONE


def _results(config: PlotConfig) -> tuple[Figure, Sequence[str]]:
    """Return a figure of a sweep's values, and the notes on them."""
    if not is_there(config.source):
        raise SnapshotNotFound(
            f"{config.source}: no such folder or file; pass a snapshot folder, or the file of a sweep's results.",
            path=config.source,
            nearest=(),
        )
    folder_options = {
        "--sigma-rel": config.sigma_rels,
        "--gamma": config.gammas,
        "--step": config.step,
        "--run": config.run,
        "--exclude": config.exclude,
        "--tolerance": config.tolerance,
    }
    for name, value in folder_options.items():
        if value is not None:
            raise ValueError(f"{name} applies to snapshot folders, but {config.source} is a file; omit this option.")
    table = read_table(config.source)
    pictures = [plot_sweep, plot_sweep_steps] if len(table.steps) > 1 else [plot_sweep]
    figure = new_figure((_WIDTH, _HEIGHT * len(pictures)))
    for axes, draw in zip(figure.subplots(len(pictures), 1, squeeze=False)[:, 0], pictures, strict=True):
        draw(table, axes)
    return figure, table.notes


def _profiles(config: PlotConfig) -> tuple[Figure, Sequence[str]]:
    """Return a figure of the profiles and weights of a synthesis, and the warnings on them."""
    if config.sigma_rels is None and config.gammas is None:
        raise ValueError(f"{config.source} is a snapshot folder; pass --sigma-rel or --gamma with the lengths to draw.")
    lengths_of(config.gammas, config.sigma_rels, ("--gamma", "--sigma-rel"))  # its errors name the option
    plan = plan_from_store(
        config.source,
        sigma_rels=config.sigma_rels,
        gammas=config.gammas,
        step=config.step,
        run=config.run,
        exclude=config.exclude or (),
        tolerance=DEFAULT_TOLERANCE if config.tolerance is None else config.tolerance,
    )
    figure = new_figure((_WIDTH, 3 * _HEIGHT))
    above, middle, below = figure.subplots(3, 1)
    plot_profiles(plan, (above, middle))
    plot_weights(plan, below)
    return figure, plan.report.warnings
