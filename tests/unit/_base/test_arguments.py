"""Argument checks, and amounts of bytes in and out."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from nitrous_ema._base.arguments import (
    check_sequence,
    choose_step,
    clamp_timeout,
    deadline_after,
    format_bytes,
    nearest_note,
    parse_bytes,
    pluralize,
)


def test_endless_timeout_becomes_one_that_threads_accept():
    threading.Lock().acquire(timeout=clamp_timeout(math.inf))
    assert (clamp_timeout(None), clamp_timeout(3.5)) == (None, 3.5)


@pytest.mark.parametrize("value", [5, 0.1, "0.1,0.2", b"5", None])
def test_value_that_is_not_a_sequence_is_refused_with_what_is_expected(value):
    with pytest.raises(TypeError, match=r"lengths is .*; expected a sequence of steps, such as \[1\]\."):
        check_sequence("lengths", value, "steps, such as [1]")


@pytest.mark.parametrize("value", [[], (1,), range(2), np.zeros(3), {0.1}])
def test_any_iterable_of_values_is_accepted(value):
    check_sequence("lengths", value)


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
        ("2.01KB", 2010),
    ],
)
def test_amounts_are_parsed_in_the_usual_units(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1 XB", "-1", "1e9", "1GiB1", "1,5GB", "٣GB"])
def test_text_that_is_not_an_amount_is_refused(text):
    with pytest.raises(ValueError, match="is not an amount of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.00 GiB")],
)
def test_amounts_are_shown_in_the_unit_that_fits(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_number_of_one_has_a_singular_noun():
    assert [pluralize(number, "snapshot") for number in (0, 1, 2)] == ["0 snapshots", "1 snapshot", "2 snapshots"]


def test_a_deadline_is_the_remainder_of_a_timeout():
    assert deadline_after(None)() is None
    assert 0 < deadline_after(100)() <= 100
    assert deadline_after(0)() == 0


def test_timeout_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"timeout is 'x'; expected seconds as a number, or None"):
        clamp_timeout("x")


@pytest.mark.parametrize(
    ("step", "chosen"),
    [(None, 30), (20, 20), (25, None), ("nearest:25", 20), ("nearest:26", 30), ("nearest:0", 10), ("nearest:30", 30)],
)
def test_step_is_chosen_among_the_existing_ones(step, chosen):
    assert choose_step(step, [30, 10, 20]) == chosen
    assert choose_step(step, []) is None


@pytest.mark.parametrize("step", ["25", "nearest", "nearest:", "nearest:x", "nearest:-1", "nearest:1.5", "nearest: 5"])
def test_other_text_is_not_a_step(step):
    with pytest.raises(ValueError, match=f"step is {step!r}; expected the step of a snapshot"):
        choose_step(step, [10])


def test_note_names_a_step_that_differs():
    assert nearest_note("nearest:25", 20) == "Step 20 is taken for 'nearest:25'."
    assert nearest_note("nearest:20", 20) == nearest_note(20, 20) == nearest_note(None, 20) == ""
