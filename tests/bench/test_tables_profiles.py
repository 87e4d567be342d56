"""The tables of docs/retention.md on tracked profiles are what the command prints, and say what the solve gives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from bench import tables_profiles as tables
from nitrous_ema.posthoc import synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma

PAGE = Path(__file__).resolve().parents[2] / "docs" / "retention.md"


@pytest.mark.parametrize("table", [tables.table_of_errors, tables.table_of_coverage])
def test_page_has_the_rows_that_the_command_prints(table):
    page = [line.replace("**", "") for line in PAGE.read_text().splitlines()]
    assert [row for row in table()[2:] if not any(line.startswith(row) for line in page)] == []


@pytest.mark.parametrize("tracked", [(0.05, 0.1), (0.02, 0.07), (0.02, 0.05, 0.1)])
@pytest.mark.parametrize("cadence", tables.COVERED_AT)
def test_covered_lengths_keep_the_limit_at_the_ends_that_are_printed(tracked, cadence):
    t, gammas = tables.CADENCES[cadence], sigma_rel_to_gamma(tracked)
    cells = tables.covered(tracked, t)
    for cell, limit, norm in zip(cells, (0.01, 0.05, 0.01), (math.inf, math.inf, tables.QUIET), strict=True):
        ends = [float(end) for stretch in cell.split("; ") for end in stretch.split(" to ")]
        inputs = np.repeat(t, gammas.size), np.tile(gammas, t.size)
        report = synthesis_report(*inputs, np.full(len(ends), t[-1]), sigma_rel_to_gamma(ends))
        assert report.profile_error.max() <= limit
        assert report.weight_l2.max() <= norm


def test_cell_without_a_length_says_so():
    assert tables.covered((0.05, 0.1), np.array([1.0]))[0].count(";") == 1
