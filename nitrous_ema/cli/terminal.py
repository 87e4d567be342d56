"""Output of the commands: the requested result goes to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from nitrous_ema._base.exit_status import to_stderr, to_stdout
from nitrous_ema.errors import printable

_WIDTH = 120


def show(*lines: str) -> None:
    """Write lines to stdout and flush them, so that they are visible before the next slow operation begins.

    Each line stays one line: line breaks and control characters in it are escaped.
    """
    to_stdout("".join(f"{printable(line)}\n" for line in lines))


def show_json(value: Mapping[str, Any]) -> None:
    """Write an object to stdout as JSON."""
    to_stdout(f"{json.dumps(value, indent=2)}\n")


def log(line: str) -> None:
    """Write a line to stderr, after the program's name, with control characters escaped."""
    to_stderr(f"nitrous-ema: {printable(line)}\n")


def confirm(question: str) -> bool:
    """Ask a question on a terminal and return whether the answer is yes; where stdin is no terminal, return True.

    Scripts and scheduled jobs have no terminal, so they need no option that answers for them.
    """
    if not sys.stdin.isatty():
        return True
    to_stderr(f"{printable(question)} [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def columns(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> list[str]:
    """Return rows as aligned lines. Cells are right-aligned, except the last cell of each row, which may be long."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        # Not strict: the last cell has no width.
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append((indent + "   ".join([*cells, row[-1]])).rstrip())
    return lines


def elide_rows(rows: Sequence[Sequence[str]], *, most: int, hint: str) -> list[Sequence[str]]:
    """Return the first and the last rows of a long table, with a row in between for the omitted ones.

    Args:
        rows: Rows of equally many cells.
        most: Largest number of rows that are returned unchanged.
        hint: Text after the number of omitted rows, such as the option that shows them.
    """
    if len(rows) <= most:
        return list(rows)
    half = most // 2
    gap = ["..."] + [""] * (len(rows[0]) - 2) + [f"{len(rows) - 2 * half} more {hint}"]
    return [*rows[:half], gap, *rows[-half:]]


def paragraph(title: str, text: str) -> list[str]:
    """Return text after a title as lines of readable length; later lines are indented below the text."""
    indent = " " * (len(title) + 1)
    # Steps, sizes and paths must stay searchable: no word is broken, not even at a hyphen.
    return textwrap.wrap(
        f"{title} {text}", _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def percent(error: float, *, rounded_down: bool = False) -> str:
    """Return a relative error as a percentage of three digits; with ``rounded_down`` never more than the error."""
    hundredths = 100 * error
    if hundredths < 1e-4:
        return "0 %" if rounded_down else "< 0.0001 %"
    unit = 10.0 ** (math.floor(math.log10(hundredths)) - 2)
    digits = (math.floor if rounded_down else round)(hundredths / unit)
    return f"{digits * unit:.{max(0, -round(math.log10(unit)))}f} %"


def format_time(nanoseconds: int) -> str:
    """Return a time, in nanoseconds since 1970, as date and time in UTC."""
    return datetime.fromtimestamp(nanoseconds / 1e9, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def step_ranges(steps: Sequence[int], chosen: frozenset[int]) -> str:
    """Return the chosen steps as text, with consecutive ones joined: ``100, 300 to 900 (7)``.

    Args:
        steps: All steps, ascending: they define which steps are consecutive.
        chosen: Some of them.
    """
    words: list[str] = []
    together: list[int] = []
    for step in [*steps, None]:  # None ends the last range
        if step is not None and step in chosen:
            together.append(step)
        elif together:
            words += [f"{together[0]} to {together[-1]} ({len(together)})"] if len(together) > 2 else map(str, together)
            together = []
    return ", ".join(words) or "none"
