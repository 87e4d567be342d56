"""Argument checks and amounts of bytes shared by several modules."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterable
from decimal import Decimal
from numbers import Real

_NEAREST = re.compile("nearest:([0-9]{1,18})")
_BINARY_UNITS = {f"{letter}IB": 1 << 10 * power for power, letter in enumerate("KMGT", 1)}
_DECIMAL_UNITS = {f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", 1)}
_UNIT_BYTES = {"": 1, "B": 1, **_BINARY_UNITS, **_DECIMAL_UNITS}


def clamp_timeout(timeout_seconds: float | None) -> float | None:
    """Return a timeout that ``threading`` accepts: at most ``TIMEOUT_MAX / 2``; None stays None.

    So ``float("inf")`` becomes the longest wait that threads support.

    Raises:
        TypeError: The timeout is not a number.
    """
    if not isinstance(timeout_seconds, Real | None):
        raise TypeError(f"timeout is {timeout_seconds!r}; expected seconds as a number, or None for no limit.")
    return None if timeout_seconds is None else min(timeout_seconds, threading.TIMEOUT_MAX / 2)


def deadline_after(timeout_seconds: float | None) -> Callable[[], float | None]:
    """Return a function that returns the seconds which remain of a timeout; None for no limit."""
    if timeout_seconds is None:
        return lambda: None
    deadline = time.monotonic() + timeout_seconds
    return lambda: max(deadline - time.monotonic(), 0.0)


def check_sequence(name: str, value: object, items: str = "numbers") -> None:
    """Check that an argument is a sequence, not a single number or a string.

    Args:
        name: Name of the argument.
        value: Its value.
        items: What the sequence should contain, for the message.

    Raises:
        TypeError: ``value`` is not iterable, or is a str or bytes.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}; expected a sequence of {items}.")


def nearest_to(step: object) -> int | None:
    """Return N of a step that was passed as the text ``nearest:N``; None for a step that is a number, or None.

    Raises:
        ValueError: The step is any other text.
    """
    if not isinstance(step, str):
        return None
    found = _NEAREST.fullmatch(step)
    if found is None:
        raise ValueError(f"step is {step!r}; expected the step of a snapshot, or a text such as 'nearest:1234'.")
    return int(found[1])


def choose_step(step: int | str | None, existing: Collection[int]) -> int | None:
    """Return the existing step that ``step`` selects: the nearest, the same, or for None the last one; None if none is.

    Of two steps that are equally near, the earlier one is selected.
    """
    near = nearest_to(step)
    if near is not None:
        return min(existing, key=lambda each: (abs(each - near), each), default=None)
    return max(existing, default=None) if step is None else next((each for each in existing if each == step), None)


def check_not_excluded(step: int | str | None, exclude: Collection[int]) -> None:
    """Raise ValueError for a target step that is excluded as well."""
    if nearest_to(step) is None and step in exclude:
        raise ValueError(
            f"step {step} is the target step and is excluded. Choose another target step, or do not exclude it."
        )


def nearest_note(step: object, chosen: int) -> str:
    """Return a sentence that names the step chosen for ``nearest:N``; an empty text if it is N, or was not chosen."""
    return f"Step {chosen} is taken for {step!r}." if nearest_to(step) not in (None, chosen) else ""


def parse_bytes(text: str) -> int:
    """Parse an amount of bytes: ``1GiB``, ``500 MB``, ``1.5TiB``, ``1073741824``. Fractions of a byte are dropped.

    Raises:
        ValueError: The text is not an amount of bytes.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNIT_BYTES:
        raise ValueError(f"{text!r} is not an amount of bytes; expected for example 1GiB, 500MB or 1073741824")
    # Decimal, because 2.01KB computed in float64 truncates to 2009 bytes.
    return int(Decimal(match[1]) * _UNIT_BYTES[match[2].upper()])


def format_bytes(num_bytes: float) -> str:
    """Return an amount of bytes as text, in the largest unit up to GiB that gives at least 1: ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 snapshot``, ``3 snapshots``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
