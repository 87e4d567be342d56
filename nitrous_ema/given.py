"""What users give, made fit for use or told: timeouts that threads can wait for, sequences and steps that are none."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable


def at_most(timeout_seconds: float | None) -> float | None:
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


def unknown_exclusions(exclude: Collection[int], there: Collection[int]) -> str:
    """What is said of steps to leave out that are not there; empty if all are."""
    unknown = sorted({*exclude}.difference(there))
    return f"--exclude: there is no snapshot of step {', '.join(map(str, unknown))} to leave out" if unknown else ""
