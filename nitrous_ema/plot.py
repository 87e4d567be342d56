"""Pictures, drawn with matplotlib (extra ``plot``) without touching its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AVERAGE, _RAW, _PALE = "#1764ab", "#c2571a", "0.45"


def plot_losses(path: Path, sigma_rels: Sequence[float], losses: Sequence[float], raw_loss: float) -> None:
    """Draw loss against EMA length, with the raw weights' loss as a line, into an image file.

    Args:
        path: Its suffix says which kind of file; replaced if it is there.
        sigma_rels: Lengths, as fractions of the training time, ascending.
        losses: Loss of the average of each length.
        raw_loss: Loss of the weights that were not averaged.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure((6.4, 3.6))
    axes = figure.add_subplot()
    best = int(np.argmin(losses))
    axes.axhline(raw_loss, color=_RAW, linewidth=1.5, linestyle=(0, (5, 3)))
    axes.annotate("raw weights", (1, raw_loss), xycoords=("axes fraction", "data"), color=_RAW,
                  xytext=(-4, -5), textcoords="offset points", ha="right", va="top")  # fmt: skip
    axes.plot(sigma_rels, losses, color=_AVERAGE, marker="o", markersize=4, linewidth=1.5)
    axes.plot(sigma_rels[best], losses[best], color=_AVERAGE, marker="o", markersize=9)
    axes.annotate(f"σ_rel = {sigma_rels[best]:g}: {losses[best] / raw_loss - 1:+.1%}", (sigma_rels[best], losses[best]),
                  color=_AVERAGE, xytext=(0, 12), textcoords="offset points", ha="center", va="bottom")  # fmt: skip
    axes.set_xlabel("EMA length σ_rel, chosen after training")
    axes.set_ylabel("loss on held-out digits")
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_images(path: Path, groups: Mapping[str, NDArray[Any]]) -> None:
    """Draw grids of grey images side by side, each under its title, into an image file.

    Args:
        path: Its suffix says which kind of file; replaced if it is there.
        groups: By title, images with values in [-1, 1], shape [rows, columns, height, width].

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows, columns = next(iter(groups.values())).shape[:2]
    figure = _figure((0.42 * columns * len(groups), 0.42 * rows + 0.4))
    for axes, (title, images) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)  # a gap between neighbours
        height, width = framed.shape[2:]
        axes.imshow(
            framed.transpose(0, 2, 1, 3).reshape(rows * height, columns * width),
            cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest",
        )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(_PALE)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _figure(size_inches: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtraError("Pictures need matplotlib: pip install 'nitrous-ema[plot]'") from missing
    return Figure(figsize=size_inches, layout="constrained")
