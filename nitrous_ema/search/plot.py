"""Pictures of sweeps and profiles, drawn with matplotlib (extra ``plot``) without changing its global state.

Each function draws on the given axes or on a new figure, and returns the figure. A notebook shows the figure;
``figure.savefig(path)`` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema.errors import MissingExtraError
from nitrous_ema.search.table import Row, SweepTable
from nitrous_ema.synthesis import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AVERAGE, _RAW, _PALE = "#1764ab", "#c2571a", "0.45"
_MARKERS = "os^Dv<>p"
_MOST_NAMED = 10
_TIMES = 1000


def plot_sweep(table: SweepTable, axes: Axes | None = None, *, baseline: tuple[str, float] | None = None) -> Figure:
    """Draw a sweep's values against the EMA length, one line per step, with a mark at the best result.

    Args:
        table: The table that ``sweep`` or ``read_table`` has returned.
        axes: Axes to draw on; a new figure by default.
        baseline: Name and value of a reference, such as the raw weights; drawn as a dashed line.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    axes = axes or _new_axes((6.4, 3.6))[0]
    if baseline is not None:
        axes.axhline(baseline[1], color=_RAW, linewidth=1.5, linestyle=(0, (5, 3)))
        axes.annotate(baseline[0], (1, baseline[1]), xycoords=("axes fraction", "data"), color=_RAW,
                      xytext=(-4, -5), textcoords="offset points", ha="right", va="top")  # fmt: skip
    for step, color in zip(table.steps, _colors(len(table.steps)), strict=True):
        _line(axes, [(row.sigma_rel, row.value) for row in table.of_step(step)], color, f"step {step}")
    if any(np.isfinite(row.value) for row in table.rows):
        best = table.best
        change = f"{best.value / baseline[1] - 1:+.1%}" if baseline and baseline[1] else f"{best.value:.4g}"
        _mark(axes, best, best.sigma_rel, f"σ_rel = {best.sigma_rel:g}: {change}")
    axes.set_xlabel("EMA length σ_rel")
    axes.set_xlim(left=0)
    return _finish(axes, table.rows[0].metric, named=len(table.steps))


def plot_sweep_steps(table: SweepTable, axes: Axes | None = None) -> Figure:
    """Draw a sweep's values against the step, one line per length that was evaluated at several steps.

    Args:
        table: The table that ``sweep`` or ``read_table`` has returned.
        axes: Axes to draw on; a new figure by default.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    axes = axes or _new_axes((6.4, 3.6))[0]
    lengths: dict[float, list[Row]] = {}
    for row in table.rows:
        lengths.setdefault(row.sigma_rel, []).append(row)
    shared = {length: rows for length, rows in sorted(lengths.items()) if len(rows) > 1 or len(table.steps) == 1}
    for (length, rows), color in zip(shared.items(), _colors(len(shared)), strict=True):
        _line(axes, [(row.step, row.value) for row in rows], color, f"σ_rel = {length:g}")
    if any(np.isfinite(row.value) for row in table.rows):
        _mark(axes, table.best, table.best.step, f"σ_rel = {table.best.sigma_rel:g}: {table.best.value:.4g}")
    axes.set_xlabel("step at which the average ends")
    return _finish(axes, table.rows[0].metric, named=len(shared))


def plot_profiles(plan: Plan, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw the requested profiles, the profiles that the plan's snapshots give, and their difference.

    Args:
        plan: The plan that ``plan_from_store`` has returned.
        axes: Two axes, for the profiles and for the differences; a new figure by default.

    Raises:
        MissingExtraError: matplotlib is not installed.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 121 (profiles).
    """
    above, below = _new_axes((6.4, 5.2), rows=2) if axes is None else axes
    t, requested, obtained = profiles_of(plan)
    for output, (length, color) in enumerate(zip(plan.sigma_rels, _colors(len(plan.sigma_rels)), strict=True)):
        error = f"{plan.report.profile_error[output]:.1e}"
        above.plot(t, requested[:, output], color=_PALE, linewidth=2.5, alpha=0.5)
        above.plot(t, obtained[:, output], color=color, linewidth=1.2, label=f"σ_rel = {length:g} (error {error})")
        below.plot(t, obtained[:, output] - requested[:, output], color=color, linewidth=0.8)
    for each, name in ((above, "weight, mean = 1"), (below, "obtained − requested")):
        each.set_xlabel("training time")
        _finish(each, name, named=len(plan.sigma_rels) if each is above else 0)
    return _figure_of(above)


def plot_weights(plan: Plan, axes: Axes | None = None) -> Figure:
    """Draw the weight of each snapshot in each average, with one marker per tracked profile.

    Args:
        plan: The plan that ``plan_from_store`` has returned.
        axes: Axes to draw on; a new figure by default.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    axes = axes or _new_axes((6.4, 3.2))[0]
    tracked = sorted({column.gamma for column in plan.columns}, reverse=True)
    axes.axhline(0, color="0.8", linewidth=0.8)
    for output, (length, color) in enumerate(zip(plan.sigma_rels, _colors(len(plan.sigma_rels)), strict=True)):
        for place, gamma in enumerate(tracked):
            chosen = [index for index, column in enumerate(plan.columns) if column.gamma == gamma]
            steps = [plan.columns[index].step for index in chosen]
            axes.plot(
                steps,
                plan.weights[chosen, output],
                color=color,
                linestyle="none",
                markersize=4,
                marker=_MARKERS[place % len(_MARKERS)],
                label=f"σ_rel = {length:g}, from γ = {gamma:.4g}",
            )
    axes.set_xlabel("step of the snapshot")
    return _finish(axes, "weight", named=len(plan.sigma_rels) * len(tracked))


def profiles_of(plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return times and the profiles at these times, scaled to mean 1.

    An obtained profile drops at the time of every snapshot; the times contain both sides of each drop.

    Returns:
        Times, shape [times]; the requested and the obtained profiles, shape [times, outputs] each.
    """
    end = plan.target.t
    edges = np.unique([column.t for column in plan.columns])
    # nextafter(edges): just after its time a snapshot has no weight, so both sides of each drop are sampled.
    t = np.unique(np.concatenate([np.linspace(0, end, _TIMES)[1:], edges, np.nextafter(edges, np.inf)]))
    t = t[t <= end]
    requested = np.stack([_profile(t, end, gamma) for gamma in plan.gammas], axis=1)
    obtained = np.zeros_like(requested)
    for column, weights in zip(plan.columns, plan.weights, strict=True):
        obtained += _profile(t, column.t, column.gamma)[:, None] * weights
    return t, end * requested, end * obtained


def _profile(t: NDArray[np.float64], end: float, gamma: float) -> NDArray[np.float64]:
    """Return a power-function profile (Eq. 121) at some times; 0 after its end."""
    return np.where(t <= end, (gamma + 1) / end * np.minimum(t / end, 1.0) ** gamma, 0.0)


def plot_images(groups: Mapping[str, NDArray[Any]]) -> Figure:
    """Draw grids of gray images side by side, each below its title.

    Args:
        groups: Images by title: values in [-1, 1], shape [rows, columns, height, width].

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows, columns = next(iter(groups.values())).shape[:2]
    figure = new_figure((0.42 * columns * len(groups), 0.42 * rows + 0.4))
    for axes, (title, images) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)  # a gap between neighbors
        height, width = framed.shape[2:]
        axes.imshow(
            framed.transpose(0, 2, 1, 3).reshape(rows * height, columns * width),
            cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest",
        )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(_PALE)
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, float]], color: Any, label: str) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=color, marker="o", markersize=4, linewidth=1.5, label=label)


def _mark(axes: Axes, best: Row, x: float, text: str) -> None:
    """Draw a larger marker at the best result, with a label."""
    axes.plot(x, best.value, color=_AVERAGE, marker="o", markersize=9)
    axes.annotate(text, (x, best.value), color=_AVERAGE, xytext=(0, 12), textcoords="offset points",
                  ha="center", va="bottom")  # fmt: skip


def _finish(axes: Axes, name: str, *, named: int) -> Figure:
    axes.set_ylabel(name)
    axes.margins(y=0.12)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < named <= _MOST_NAMED:
        axes.legend(fontsize=8, frameon=False)
    return _figure_of(axes)


def _colors(count: int) -> Sequence[Any]:
    """Return one color per line, from dark to light; blue for a single line."""
    if count == 1:
        return [_AVERAGE]
    from matplotlib import colormaps

    shades: ArrayLike = colormaps["viridis"](np.linspace(0, 0.9, count))
    return list(np.asarray(shades))


def _figure_of(axes: Axes) -> Figure:
    """Return the figure or subfigure that contains the axes."""
    return axes.figure  # type: ignore[return-value]


def _new_axes(size_inches: tuple[float, float], *, rows: int = 1) -> Sequence[Axes]:
    return list(new_figure(size_inches).subplots(rows, 1, squeeze=False)[:, 0])


def new_figure(size_inches: tuple[float, float]) -> Figure:
    """Return an empty figure that pyplot does not manage.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtraError("Pictures need matplotlib: pip install 'nitrous-ema[plot]'") from missing
    return Figure(figsize=size_inches, layout="constrained")
