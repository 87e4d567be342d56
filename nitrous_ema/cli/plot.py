"""``nitrous-ema plot``: a sweep's results, or what the snapshots of a folder give, as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nitrous_ema._base import exit_status
from nitrous_ema.cli.terminal import log
from nitrous_ema.errors import SnapshotNotFound
from nitrous_ema.search.plot import new_figure, plot_profiles, plot_sweep, plot_sweep_steps, plot_weights
from nitrous_ema.search.results import read_table
from nitrous_ema.synthesis import DEFAULT_TOLERANCE, plan_from_store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 6.4, 3.4  # inches, per picture


def run(options: argparse.Namespace) -> int:
    """Draw one picture, and say what there is to say about it."""
    with exit_status.usage_errors():  # also an unknown kind of picture
        figure, told = _profiles(options) if options.source.is_dir() else _results(options)
        figure.savefig(options.out, dpi=150, bbox_inches="tight")
    for line in told:
        log(line)
    return exit_status.DONE


def _results(options: argparse.Namespace) -> tuple[Figure, Sequence[str]]:
    """The values of a sweep."""
    if not options.source.exists():
        raise SnapshotNotFound(f"{options.source}: no such folder or file.", path=options.source, nearest=())
    for name in ("sigma-rel", "step", "run", "exclude", "tolerance"):
        if getattr(options, name.replace("-", "_")) is not None:
            raise ValueError(f"--{name} is for snapshot folders, and {options.source} is none; leave it out.")
    table = read_table(options.source)
    pictures = [plot_sweep, plot_sweep_steps] if len(table.steps) > 1 else [plot_sweep]
    figure = new_figure((_WIDTH, _HEIGHT * len(pictures)))
    for axes, draw in zip(figure.subplots(len(pictures), 1, squeeze=False)[:, 0], pictures, strict=True):
        draw(table, axes)
    return figure, table.notes


def _profiles(options: argparse.Namespace) -> tuple[Figure, Sequence[str]]:
    """Profiles and weights of what would be synthesized."""
    if options.sigma_rel is None:
        raise ValueError(f"{options.source} is a snapshot folder: say with --sigma-rel which lengths to draw.")
    plan = plan_from_store(
        options.source,
        sigma_rels=options.sigma_rel,
        step=options.step,
        run=options.run,
        exclude=options.exclude or (),
        tolerance=DEFAULT_TOLERANCE if options.tolerance is None else options.tolerance,
    )
    figure = new_figure((_WIDTH, 3 * _HEIGHT))
    above, middle, below = figure.subplots(3, 1)
    plot_profiles(plan, (above, middle))
    plot_weights(plan, below)
    return figure, plan.report.warnings
