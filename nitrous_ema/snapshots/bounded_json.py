"""Parse JSON of untrusted files in bounded time and memory, and write JSON as it stands in file headers.

Python's own parser has no such bounds. It recurses as deep as the text nests, and needs minutes for a number of
10 MB. A text of brackets grows to thirty times its size. The parser turns ``1e400`` into infinity, and of two fields
with one name it returns only the last. Here, each of these is a ValueError. Every value that is returned is exact: any
other JSON reader finds the same value.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_HEADER_VALUES = 2_000_000  # bounds the memory for a hostile header; enough for 50 000 tensors in four profiles

_MAX_DIGITS = 40  # no 64-bit integer and no repr of a float is longer


def parse_json(text: str | bytes, *, max_values: int) -> Any:
    """Parse a JSON text in time and memory that are a small multiple of its length.

    Args:
        text: The text; bytes are decoded as UTF-8.
        max_values: Upper limit for its number of values. Commas are counted, including commas inside strings.

    Returns:
        The value, in Python's own types.

    Raises:
        ValueError: The text is not JSON, exceeds a limit, or has a duplicate name or a number without an exact value.
    """
    # Counted before parsing: a list of empty lists is thirty times its text once it is made of Python objects.
    num_values = text.count(",") if isinstance(text, str) else text.count(b",")
    if num_values > max_values:
        raise ValueError(f"more than {max_values} values")
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_header_json(text: str | bytes) -> Any:
    """Parse the JSON of a file header, or a text inside of it that is JSON again.

    The limit on values is checked for each text. A JSON text inside a string may have its commas escaped, so that they
    cannot be counted in the outer text.

    Raises:
        ValueError: As ``parse_json``.
    """
    return parse_json(text, max_values=MAX_HEADER_VALUES)


json_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""Return a value as JSON text, without spaces: the form that file headers have."""


def json_bytes(value: Any) -> bytes:
    """Return a value as the bytes of its JSON text, in UTF-8 and without spaces."""
    return json_text(value).encode()


def check_encodable(texts: Iterable[str]) -> None:
    """Check that every value is a string that UTF-8 can encode.

    Raises:
        TypeError: A value is not a string.
        ValueError: A string holds a lone surrogate.
    """
    for text in texts:
        if type(text) is not str:
            raise TypeError(f"{text!r} is not a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{text!r} is not valid Unicode and cannot be written as UTF-8") from None


def brief(text: str) -> str:
    """Return at most the first 400 characters of a text for a message; a text in a file may be as long as the file."""
    return text if len(text) <= 400 else f"{text[:400]}... ({len(text)} characters)"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        duplicate = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate name {brief(repr(duplicate))}")
    return found


def _integer(digits: str) -> int:
    if digits == "-0":
        raise ValueError("the number -0, which some JSON readers do not return as an integer")
    return int(_short(digits))


def _float(digits: str) -> float:
    value = float(_short(digits))
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not a finite number")
    return value


def _constant(name: str) -> float:
    # Python's parser accepts NaN and Infinity; the JSON standard (RFC 8259, section 6) has neither.
    raise ValueError(f"{name} is not JSON")


def _short(digits: str) -> str:
    if len(digits) > _MAX_DIGITS:  # int() of n digits takes time proportional to n squared
        raise ValueError(f"a number of {len(digits)} digits, expected at most {_MAX_DIGITS}")
    return digits


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
