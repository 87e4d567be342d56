from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from nitrous_ema.search.table import Row, SweepTable
from tests.support.search_rows import row

ROWS = (row(0.05, 3.0), row(0.1, 1.0), row(0.2, math.nan), row(0.05, -math.inf, 200), row(0.1, 2.0, 200))


def test_best_is_the_lowest_finite_value():
    assert SweepTable(ROWS).best is ROWS[1]
    assert SweepTable(ROWS).best_of(200) is ROWS[4]


def test_best_is_the_highest_where_higher_is_better():
    rows = [row(0.05, 3.0, maximize=True), row(0.1, 1.0, maximize=True), row(0.2, math.inf, maximize=True)]
    assert SweepTable(tuple(rows)).best is rows[0]


def test_without_a_finite_value_there_is_no_best():
    table = SweepTable((row(0.05, math.nan), row(0.1, math.inf)))
    with pytest.raises(ValueError, match="none of 2 results has a finite value"):
        _ = table.best
    assert "best" not in str(table)


def test_rows_are_found_by_step():
    table = SweepTable(ROWS)
    assert table.steps == (100, 200)
    assert table.of_step(200) == ROWS[3:]


def test_text_has_a_line_per_row_the_best_marked_and_the_notes():
    lines = str(SweepTable(ROWS, ("A note.",))).splitlines()
    assert lines[0].split() == ["step", "sigma_rel", "loss", "profile", "error"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["100", "0.05", "3", "1.0e-03"],
        ["100", "0.1", "1", "1.0e-03"],
    ]
    assert [number for number, line in enumerate(lines) if "<- best" in line] == [2]
    assert lines[3].split()[2] == "nan"
    assert lines[-1] == "A note."
    assert repr(SweepTable(ROWS)) == str(SweepTable(ROWS))  # what a notebook shows


def test_records_and_csv_have_every_field_of_every_row(tmp_path):
    rows = (row(0.05, 3.0, excluded=(7, 9), path=Path("/a/b")), row(0.1, math.nan))
    table = SweepTable(rows)
    assert Row(**table.records()[0]) == rows[0]
    table.to_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["sigma_rel"], first["value"], first["excluded"], first["path"]) == ("0.05", "3.0", "7 9", "/a/b")
    assert (second["value"], second["excluded"], second["path"]) == ("nan", "", "")


def test_table_is_iterated_by_row_and_shown_as_html():
    table = SweepTable((row(0.05, 3.0, metric="<b>"), row(0.1, 1.0, profile_error=0.2, metric="<b>")), ("A & B.",))
    assert [each.value for each in table] == [3.0, 1.0]
    assert len(table) == 2
    html = table._repr_html_()
    assert html.count("<tr>") == 3
    assert "<th>&lt;b&gt;</th>" in html
    assert "<td>1</td><td>2.0e-01</td><td>&lt;- best, profile error above 5%</td>" in html
    assert html.endswith("</table><p>A &amp; B.</p>")
