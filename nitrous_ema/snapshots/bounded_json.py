"""JSON from files that nobody vouches for.

Python's parser recurses as deep as the text nests, turns a 10 MB number into an integer in minutes, a text of brackets
into thirty times its size, ``1e400`` into infinity, and of two equal names keeps the last. All of that is one kind of
error here. Names and numbers that pass are exact: what is parsed is what any other reader of JSON finds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

_MAX_DIGITS = 40  # no 64-bit integer and no repr of a float is longer


def parse_json(text: str | bytes, *, max_values: int) -> Any:
    """Parse a JSON text in time and memory that are a small multiple of its own.

    Args:
        text: The text; bytes are UTF-8.
        max_values: Most values it may have, counted by its commas, those in strings too.

    Raises:
        ValueError: Not JSON, or not in these bounds, or with a name twice in one object, or a number that is none.
    """
    num_values = text.count(",") if isinstance(text, str) else text.count(b",")
    if num_values > max_values:
        raise ValueError(f"it has more than {max_values} values")
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("it nests too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {brief(repr(twice))} twice")
    return found


def _integer(digits: str) -> int:
    if digits == "-0":
        raise ValueError("it has the number -0, which is no integer to some readers")
    return int(_short(digits))


def _float(digits: str) -> float:
    value = float(_short(digits))
    if not math.isfinite(value):
        raise ValueError(f"{digits} is no finite number")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _short(digits: str) -> str:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return digits


def brief(text: str) -> str:
    """Enough of a text for a message: what a file holds may be as long as the file."""
    return text if len(text) <= 400 else f"{text[:400]}... ({len(text)} characters)"


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)


MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package


MAX_HEADER_VALUES = 2_000_000  # bounds what a hostile header makes of memory; some 50 000 tensors in four profiles


def as_json(value: Any) -> bytes:
    """JSON as it stands in headers."""
    return _text(value).encode()


_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _parse(text: str) -> Any:
    return parse_json(text, max_values=MAX_HEADER_VALUES)  # counted again: the outer text may escape its commas
