"""How the commands talk: what was asked for goes to stdout, all else to stderr."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone

from nitrous_ema._base.exit_status import to_stderr, to_stdout

_WIDTH = 120


def show(text: str) -> None:
    """Write to stdout, now: whoever reads along sees it before the next long thing begins."""
    to_stdout(text + "\n")


def log(line: str) -> None:
    """Write to stderr, with the program's name."""
    to_stderr(f"nitrous-ema: {line}\n")


def columns(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> list[str]:
    """Rows as aligned lines: cells to the right, but for the last one of each row, which may have any length."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append((indent + "   ".join([*cells, row[-1]])).rstrip())
    return lines


def elided(rows: Sequence[Sequence[str]], *, most: int, word: str) -> list[Sequence[str]]:
    """The first and last of too many rows; a row in between says how many of what ``word`` says are not shown."""
    if len(rows) <= most:
        return list(rows)
    half = most // 2
    gap = ["..."] + [""] * (len(rows[0]) - 2) + [f"{len(rows) - 2 * half} more {word}"]
    return [*rows[:half], gap, *rows[-half:]]


def paragraph(title: str, text: str) -> list[str]:
    """Text behind a title, in lines of readable length."""
    indent = " " * (len(title) + 1)
    return textwrap.wrap(
        f"{title} {text}", _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def percent(error: float, *, rounded_down: bool = False) -> str:
    """A relative error for people: three digits, never more than it is if ``rounded_down``."""
    hundredths = 100 * error
    if hundredths < 1e-4:
        return "0 %" if rounded_down else "< 0.0001 %"
    unit = 10.0 ** (math.floor(math.log10(hundredths)) - 2)
    digits = (math.floor if rounded_down else round)(hundredths / unit)
    return f"{digits * unit:.{max(0, -round(math.log10(unit)))}f} %"


def moment(nanoseconds: int) -> str:
    """A time since 1970 as a date."""
    return datetime.fromtimestamp(nanoseconds / 1e9, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def segments(steps: Sequence[int], chosen: frozenset[int]) -> str:
    """The chosen ones of some ascending steps, neighbours drawn together: ``100, 300 to 900 (7)``."""
    words: list[str] = []
    together: list[int] = []
    for step in [*steps, None]:
        if step is not None and step in chosen:
            together.append(step)
        elif together:
            words += [f"{together[0]} to {together[-1]} ({len(together)})"] if len(together) > 2 else map(str, together)
            together = []
    return ", ".join(words) or "none"
