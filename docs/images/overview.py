"""Draw docs/images/overview.svg: two tracked averages, snapshots over training, any length synthesized.

python docs/images/overview.py [--png FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nitrous_ema.profile import decay, sigma_rel_to_gamma

STEPS, EVERY = 2000, 100
TRACKED = {0.05: "#1f77b4", 0.10: "#d62728"}
SYNTHESIZED = {0.03: "#9467bd", 0.08: "#2ca02c", 0.15: "#ff7f0e", 0.20: "#8c564b"}
GREY = "#888888"


def draw_averages(axes: Axes) -> None:
    """One weight of a model over training, and its two averages with their real profiles."""
    steps = np.arange(1, STEPS + 1)
    noise = np.convolve(np.random.default_rng(1).normal(size=STEPS + 20), np.ones(21) / 21, "valid")
    weight = 1 - np.exp(-steps / 350) + noise
    axes.plot(steps[::4], weight[::4], color="#cccccc", linewidth=0.8)
    axes.text(STEPS * 0.5, 0.28, "a weight of the model", color=GREY, fontsize=9)
    for row, (sigma_rel, color) in enumerate(TRACKED.items()):
        average, averages = 0.0, []
        for step, value in zip(steps, weight, strict=True):
            kept = decay(sigma_rel_to_gamma(sigma_rel), step, 1)
            average = kept * average + (1 - kept) * value
            averages.append(average)
        axes.plot(steps[::4], averages[::4], color=color, linewidth=2)
        axes.text(STEPS * 0.5, 0.14 - 0.14 * row, f"its average, sigma_rel {sigma_rel:g}", color=color, fontsize=9)
    axes.set_title("1  Training tracks two averages", loc="left", fontsize=11)


def draw_snapshots(axes: Axes) -> None:
    """A row of marks for each tracked average: one in every snapshot."""
    times = np.arange(EVERY, STEPS + 1, EVERY)
    for row, (sigma_rel, color) in enumerate(TRACKED.items()):
        axes.scatter(times, np.full(len(times), 1.0 - row), marker="s", s=34, color=color)
        axes.text(EVERY / 2, 1.16 - row, f"sigma_rel {sigma_rel:g}", color=color, fontsize=9)
    for time in times:
        axes.plot([time, time], [0, 1], color="#dddddd", linewidth=1, zorder=0)
    axes.set_ylim(-0.75, 1.6)
    axes.text(EVERY / 2, -0.5, "one snapshot on disk holds both averages", color=GREY, fontsize=9)
    axes.set_title("2  Snapshots of both go to disk", loc="left", fontsize=11)


def draw_profiles(axes: Axes) -> None:
    """Profiles of averages that end at the last step: the share of each training time."""
    time = np.linspace(0, 1, 500)
    for sigma_rel, color in {**SYNTHESIZED, **TRACKED}.items():
        gamma = sigma_rel_to_gamma(sigma_rel)
        tracked = sigma_rel in TRACKED
        label = f"{sigma_rel:g} (tracked)" if tracked else f"{sigma_rel:g}"
        style = "--" if tracked else "-"
        axes.plot(time * STEPS, (gamma + 1) * time**gamma, color=color, linestyle=style, linewidth=1.8, label=label)
    handles, labels = axes.get_legend_handles_labels()
    order = np.argsort([float(label.split()[0]) for label in labels])
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        title="sigma_rel",
        frameon=False,
        loc="upper left",
        fontsize=9,
        title_fontsize=9,
    )
    axes.set_ylim(0, 20)
    axes.set_title("3  Any length is synthesized from them", loc="left", fontsize=11)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, help="write this file as well")
    options = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "overview"  # the same file from the same drawing
    figure = Figure(figsize=(12, 3.1), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 3), (draw_averages, draw_snapshots, draw_profiles), strict=True):
        draw(axes)
        axes.set_xlim(0, STEPS * 1.03)
        axes.set_xlabel("training step")
        axes.set_yticks([])
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
    figure.axes[2].set_ylabel("share in the average")
    figure.savefig(Path(__file__).with_suffix(".svg"), facecolor="white", metadata={"Date": None})
    if options.png:
        figure.savefig(options.png, dpi=90, facecolor="white")


if __name__ == "__main__":
    main()
