"""What users give, made fit for use or told: timeouts that threads can wait for, sequences and steps that are none."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from decimal import Decimal


def clamp_timeout(timeout_seconds: float | None) -> float | None:
    """A time that threads can wait for: float("inf") is as long as there is."""
    return None if timeout_seconds is None else min(timeout_seconds, threading.TIMEOUT_MAX / 2)


def check_sequence(name: str, given: object, of: str = "numbers") -> None:
    """Refuse a single number, or text, where several things belong.

    Args:
        name: Of the argument.
        given: Its value.
        of: What it should be a sequence of, for the message.

    Raises:
        TypeError: It is none.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(f"{name} is {given!r}; expected a sequence of {of}.")


_BINARY = {f"{letter}IB": 1 << 10 * power for power, letter in enumerate("KMGT", 1)}


_DECIMAL = {f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", 1)}


_UNITS = {"": 1, "B": 1, **_BINARY, **_DECIMAL}


def parse_bytes(text: str) -> int:
    """Read an amount of bytes: ``1GiB``, ``500 MB``, ``1.5TiB``, ``1073741824``. Fractions of a byte are left out.

    Raises:
        ValueError: Not such an amount.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no amount of bytes; expected one such as 1GiB, 500MB or 1073741824")
    return int(Decimal(found[1]) * _UNITS[found[2].upper()])


def pluralize(number: int, noun: str) -> str:
    """A number of things: ``1 snapshot``, ``3 snapshots``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_bytes(num_bytes: float) -> str:
    """An amount in the largest unit that it has at least one of, up to GiB: ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
