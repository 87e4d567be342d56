from __future__ import annotations

import pytest

from nitrous_ema.cli.terminal import columns, elide_rows, log, percent, show, step_ranges


def test_printed_text_cannot_control_the_terminal_or_forge_a_line(capsys):
    show("host \x1b[2Jx", "a\nrun forged \u202e")
    log("caf\udce9\r")
    out, err = capsys.readouterr()
    assert out == "host \\x1b[2Jx\na\\nrun forged \\u202e\n"
    assert err == "nitrous-ema: caf\\udce9\\r\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0.0, "< 0.0001 %"),
        (9e-7, "< 0.0001 %"),
        (1.234567e-6, "0.000123 %"),
        (0.00012345, "0.0123 %"),
        (0.0123, "1.23 %"),
        (0.1679, "16.8 %"),
        (0.99999, "100.0 %"),
        (1.5, "150 %"),
        (12.345, "1230 %"),
    ],
)
def test_errors_are_percentages_of_three_digits(error, text):
    assert percent(error) == text


@pytest.mark.parametrize("error", [0.01239, 1e-6, 0.9999, 0.0])
def test_bound_is_never_printed_larger_than_it_is(error):
    assert float(percent(error, rounded_down=True).removesuffix(" %")) <= 100 * error


def test_columns_are_aligned():
    first, second = columns([["a", "bbb", "note"], ["ccc", "d", ""]])
    assert (first, second) == ("    a   bbb   note", "  ccc     d")


def test_long_tables_show_their_ends_and_the_number_of_omitted_rows():
    rows = [[str(number), "x"] for number in range(10)]
    assert elide_rows(rows, most=10, hint="more") == rows
    short = elide_rows(rows, most=4, hint="(--all)")
    assert [row[0] for row in short] == ["0", "1", "...", "8", "9"]
    assert short[2][1] == "6 more (--all)"


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({1, 5}, "1, 5"),
        ({1, 2, 5}, "1, 2, 5"),
        ({2, 3, 5}, "2 to 5 (3)"),
        (set(), "none"),
        ({1, 3, 5, 8}, "1, 3 to 8 (3)"),
    ],
)
def test_consecutive_steps_are_joined(chosen, text):
    assert step_ranges([1, 2, 3, 5, 8], frozenset(chosen)) == text
