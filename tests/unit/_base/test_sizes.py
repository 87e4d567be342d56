"""Amounts of bytes in and out."""

from __future__ import annotations

import pytest

from nitrous_ema._base.arguments import format_bytes, parse_bytes, pluralize


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1GiB", 1 << 30),
        ("500 MB", 500_000_000),
        ("1.5KiB", 1536),
        ("77", 77),
        ("8b", 8),
        ("1.5TiB", 3 << 39),
        (" 2tb ", 2 * 10**12),
        ("0.1GB", 10**8),
    ],
)
def test_amounts_are_read_in_the_usual_units(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1 XB", "-1", "1e9", "1GiB1", "1,5GB", "٣GB"])
def test_amounts_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="no amount of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.00 GiB")],
)
def test_amounts_are_shown_in_the_unit_that_fits(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_one_thing_is_no_plural():
    assert [pluralize(number, "snapshot") for number in (0, 1, 2)] == ["0 snapshots", "1 snapshot", "2 snapshots"]
