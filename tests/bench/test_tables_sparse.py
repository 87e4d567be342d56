"""The tables of docs/synthesis.md say what the library chooses, and the page has what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import tables_sparse

PAGE = Path(__file__).resolve().parents[2] / "docs" / "synthesis.md"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few of the cases: these take a second."""
    monkeypatch.setattr(tables_sparse, "CASES", tables_sparse.CASES[:3])
    monkeypatch.setattr(tables_sparse, "BOUGHT", tables_sparse.BOUGHT[1:2])


def test_columns_of_2000_even_steps_are_those_of_an_independent_search():
    """6 / 20 / 62 and 20 / 72 / 236 without the condition that weights sum to 1, which costs one step at 1e-2."""
    eighth, upper, together = (row.split("|")[3:6] for row in tables_sparse.table_of_columns()[2:5])
    assert [cell.strip() for cell in eighth] == ["6 (6)", "20 (20)", "62 (62)"]
    assert [cell.strip() for cell in upper] == ["22 (20)", "72 (72)", "236 (236)"]
    assert upper == together


@pytest.mark.parametrize("table", [tables_sparse.table_of_columns, tables_sparse.table_of_amplification])
def test_page_has_the_rows_that_the_command_prints(table):
    page = PAGE.read_text().splitlines()
    assert [row for row in table() if row not in page] == []


def test_tolerance_buys_less_amplification_in_every_row():
    rows = [row.split("|")[5:7] for row in tables_sparse.table_of_amplification(300)[2:]]
    for least, bought in rows:
        error, norm = (float(word) for word in least.split(","))
        error_then, norm_then = (float(word) for word in bought.split(","))
        assert norm_then <= norm
        assert error_then >= error


def test_plot_is_the_same_file_each_time(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tables_sparse, "CASES", (tables_sparse.CASES[2],) * 6)
    for name in ("one.svg", "two.svg"):
        tables_sparse.plot(tmp_path / name, steps=100, points=3)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (PAGE.parent / "images" / "sparse.svg").stat().st_size < 60_000
