from __future__ import annotations

import sys

import numpy as np
import pytest

from nitrous_ema.cli import program as cli
from nitrous_ema.search.results import ResultsFile
from tests.support.search_rows import row
from tests.support.snapshot_folders import layout_of, record, write_run

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "snapshots"
    write_run(root, layout_of([record("w", (4,))]), range(20, 420, 20))
    return root


@pytest.fixture
def results(tmp_path):
    file = ResultsFile(tmp_path / "sweep.jsonl")
    for each in (row(0.05, 3.0), row(0.1, 2.0), row(0.05, 1.0, 200)):
        file.add(each)
    return file.path


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def saving(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saving)
    return figures


def test_results_are_drawn_against_length_and_step(results, saved, tmp_path):
    assert cli.main(["plot", str(results), "--out", str(tmp_path / "x.svg")]) == 0
    (tmp_path / "x.svg").read_text().index("<svg")
    assert [axes.get_xlabel() for axes in saved[0].axes] == ["EMA length σ_rel", "step at which the average ends"]


def test_profiles_and_weights_of_a_folder_are_drawn(folder, saved, tmp_path):
    options = ["--sigma-rel", "0.06,0.08,...,0.12", "--step", "200", "--out", str(tmp_path / "x.png")]
    assert cli.main(["plot", str(folder), *options]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    profiles, difference, weights = saved[0].axes
    assert len(profiles.get_lines()) == 2 * len(difference.get_lines()) == 8
    assert max(profiles.get_lines()[0].get_xdata()) == 200
    assert max(np.concatenate([line.get_xdata() for line in weights.get_lines()[1:]])) == 200


def test_length_that_the_snapshots_do_not_support_is_reported(folder, tmp_path, capsys):
    assert cli.main(["plot", str(folder), "--sigma-rel", "0.004", "--out", str(tmp_path / "x.png")]) == 0
    assert "0.004" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("of", "options", "status", "message"),
    [
        ("snapshots", [], 2, "--sigma-rel"),
        ("snapshots", ["--sigma-rel", "0.5"], 2, "--sigma-rel has 0.5"),
        ("snapshots", ["--sigma-rel", "0.1", "--step", "30"], 3, "nearest steps there: 20 and 40"),
        ("sweep.jsonl", ["--sigma-rel", "0.1"], 2, "--sigma-rel applies to snapshot folders"),
        ("sweep.jsonl", ["--step", "200"], 2, "--step applies to snapshot folders"),
        ("sweep.jsonl", ["--run", "mine"], 2, "--run applies to snapshot folders"),
        ("sweep.jsonl", ["--exclude", "20"], 2, "--exclude applies to snapshot folders"),
        ("sweep.jsonl", ["--tolerance", "0.001"], 2, "--tolerance applies to snapshot folders"),
        ("nothing", [], 3, "no such folder or file; pass a snapshot folder, or"),
        ("nothing", ["--sigma-rel", "0.1"], 3, "no such folder or file; pass a snapshot folder, or"),
    ],
)
def test_mistakes_are_reported_without_a_picture(folder, results, tmp_path, capsys, of, options, status, message):
    assert cli.main(["plot", str(tmp_path / of), *options, "--out", str(tmp_path / "x.png")]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_unknown_kind_of_picture_is_reported(results, tmp_path, capsys):
    assert cli.main(["plot", str(results), "--out", str(tmp_path / "x.frog")]) == 2
    assert "frog" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["plot", str(results), "--out", str(tmp_path / "x.png")]) == 1
    assert "pip install 'nitrous-ema[plot]'" in capsys.readouterr().err
