from __future__ import annotations

import tracemalloc

import pytest

from nitrous_ema.snapshots.bounded_json import brief, parse_json


def test_text_and_bytes_are_parsed_exactly():
    text = '{"a":[1,-9223372036854775808,2.2250738585072014e-308,"é",null,true]}'
    expected = {"a": [1, -(2**63), 2.2250738585072014e-308, "é", None, True]}
    assert parse_json(text, max_values=5) == parse_json(text.encode(), max_values=5) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1" * 41, "number of 41 digits"),
        ("-" + "9" * 5_000_000, "number of 5000001 digits"),
        ("0." + "1" * 50, "number of 52 digits"),
        ("1e400", "1e400 is not a finite number"),
        ("[-0]", "the number -0"),
        ("[NaN]", "NaN is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ('{"a":1,"b":2,"a":1}', "duplicate name 'a'"),
        ("[1,2,3,4,5,6,7]", "more than 5 values"),
        (b'"\xff"', "can't decode"),
        (b'"\xed\xa0\x80"', "can't decode"),
        ("[1".encode("utf-16"), "can't decode"),
        ("\ufeff1", "Expecting value"),
        ('"a\0b"', "control character"),
        ("1 2", "Extra data"),
        ("", "Expecting value"),
    ],
)
def test_any_other_text_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text, max_values=5)


def test_many_values_are_refused_before_they_are_parsed():
    text = "[" + "[]," * 1_000_000 + "[]]"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 1000 values"):
            parse_json(text, max_values=1000)
        assert tracemalloc.get_traced_memory()[1] < len(text)
    finally:
        tracemalloc.stop()


def test_long_text_is_shortened_for_a_message():
    assert brief("short") == "short"
    assert len(brief("x" * 10**6)) < 450
