"""Pictures are checked by the objects drawn, not by pixels."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from nitrous_ema.errors import MissingExtraError
from nitrous_ema.search.plot import new_figure, plot_images, plot_profiles, plot_sweep, plot_sweep_steps, plot_weights
from nitrous_ema.search.table import SweepTable
from nitrous_ema.synthesis import plan_from_store
from tests.support.search_rows import row
from tests.support.snapshot_folders import layout_of, record, write_run

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

GRID = SweepTable(
    (row(0.05, 3.0, 100), row(0.1, 2.0, 100), row(0.2, math.nan, 100), row(0.05, 2.5, 200), row(0.1, 1.5, 200))
)
LENGTHS = (0.05, 0.08, 0.15)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    root = tmp_path_factory.mktemp("plot") / "snapshots"
    write_run(root, layout_of([record("w", (4,))]), range(20, 420, 20))
    return plan_from_store(root, sigma_rels=LENGTHS, tolerance=1e-2)


def lines(axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def texts(axes) -> list[str]:
    return [each.get_text() for each in axes.texts]


# A sweep


def test_sweep_is_a_line_per_step_and_a_mark_at_the_best():
    (axes,) = plot_sweep(GRID).axes
    first, second, mark = lines(axes)
    np.testing.assert_equal(first, ([0.05, 0.1, 0.2], [3.0, 2.0, math.nan]))
    assert second == ([0.05, 0.1], [2.5, 1.5])
    assert mark == ([0.1], [1.5])
    assert texts(axes) == ["σ_rel = 0.1: 1.5"]
    assert [each.get_text() for each in axes.get_legend().get_texts()] == ["step 100", "step 200"]
    assert axes.get_ylabel() == "loss"


def test_baseline_is_a_line_that_the_best_is_compared_with():
    (axes,) = plot_sweep(GRID, baseline=("raw weights", 2.0)).axes
    assert lines(axes)[0][1] == [2.0, 2.0]
    assert texts(axes) == ["raw weights", "σ_rel = 0.1: -25.0%"]


def test_sweep_against_the_step_is_a_line_per_length_of_several_steps():
    (axes,) = plot_sweep_steps(GRID).axes
    assert lines(axes) == [([100, 200], [3.0, 2.5]), ([100, 200], [2.0, 1.5]), ([200], [1.5])]
    assert [each.get_text() for each in axes.get_legend().get_texts()] == ["σ_rel = 0.05", "σ_rel = 0.1"]


@pytest.mark.parametrize("draw", [plot_sweep, plot_sweep_steps])
def test_sweep_without_a_finite_value_has_no_mark(draw):
    (axes,) = draw(SweepTable((row(0.05, math.nan), row(0.1, math.nan)))).axes
    assert texts(axes) == []


# A plan


def profile(t, end, gamma):
    """Return Eq. 121, times ``end``; 0 after its end."""
    t = np.asarray(t)
    return np.where(t <= end, (gamma + 1) * (np.minimum(t, end) / end) ** gamma / end, 0)


def integral(x, y):
    """Integrate by trapezoids over times of uneven distance."""
    return float(np.sum(np.diff(x) * (np.asarray(y)[1:] + np.asarray(y)[:-1]) / 2))


def test_profile_asked_for_obtained_and_their_difference_are_drawn(plan):
    above, below = plot_profiles(plan).axes
    drawn = lines(above)
    for output, gamma in enumerate(plan.gammas):
        (t, asked), (_, obtained) = drawn[2 * output : 2 * output + 2]
        np.testing.assert_allclose(asked, 400 * profile(t, 400, gamma), rtol=1e-12)
        parts = [400 * w[output] * profile(t, c.t, c.gamma) for c, w in zip(plan.columns, plan.weights, strict=True)]
        np.testing.assert_allclose(obtained, np.sum(parts, axis=0), atol=1e-12)
        t_below, difference = lines(below)[output]
        assert t_below == t
        np.testing.assert_allclose(difference, np.subtract(obtained, asked), atol=1e-12)


def test_drawn_profiles_have_the_mean_one_and_the_error_that_the_report_tells(plan):
    above, below = plot_profiles(plan).axes
    after = [np.nextafter(column.t, math.inf) for column in plan.columns if column.t < 400]
    assert set(after) <= set(lines(above)[0][0])  # the obtained one has a step there
    for output, error in enumerate(plan.report.profile_error):
        (t, asked), (_, obtained) = lines(above)[2 * output : 2 * output + 2]
        assert integral(t, obtained) / 400 == pytest.approx(1, abs=1e-3)
        difference = np.square(lines(below)[output][1])
        relative = math.sqrt(integral(t, difference) / integral(t, np.square(asked)))
        assert relative == pytest.approx(error, rel=0.05, abs=1e-9)


def test_weights_are_drawn_at_the_steps_of_their_snapshots(plan):
    (axes,) = plot_weights(plan).axes
    points = {
        (step, round(weight, 12)) for line in lines(axes)[1:] for step, weight in zip(*line, strict=True) if weight
    }
    expected = {
        (column.step, round(float(weight), 12))
        for column, weights in zip(plan.columns, plan.weights, strict=True)
        for weight in weights
        if weight
    }
    assert points == expected
    assert len(points) > len(plan.columns)


# All of them


def test_given_axes_are_drawn_on_and_their_figure_comes_back(plan):
    figure = new_figure((6, 9))
    axes = figure.subplots(5, 1)
    drawn = [plot_sweep(GRID, axes[0]), plot_sweep_steps(GRID, axes[1])]
    drawn += [plot_profiles(plan, axes[2:4]), plot_weights(plan, axes[4])]
    assert all(each is figure for each in drawn)
    assert figure.axes == list(axes)
    assert all(each.get_lines() for each in axes)


def test_pyplot_is_not_touched(plan):
    before = "matplotlib.pyplot" in sys.modules
    plot_sweep(GRID)
    plot_profiles(plan)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_images_stand_in_a_grid_under_their_title(tmp_path):
    images = np.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    (left, right) = plot_images({"one": images, "two": -images}).axes
    assert (left.get_title(), right.get_title()) == ("one", "two")
    (drawn,) = left.get_images()
    assert np.array_equal(drawn.get_array()[7:11, 13:17], images[1, 2])  # a gap of one around each


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nitrous-ema\[plot\]'"):
        plot_sweep(GRID)
