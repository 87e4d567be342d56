"""Options that several programs of this package have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from typing import Literal

from nitrous_ema._base import exit_status

_MAX_NUMBERS = 10_000  # of one list: a typing mistake in an ellipsis should not fill the disk


Steps = list[int] | Literal["all"]


def parse_lengths(text: str) -> list[float]:
    """Read a list of numbers in which ``a,b,...,c`` stands for a, b and so on in equal steps up to c.

    Computed in decimals: ``0.05,0.06,...,0.15`` holds 0.07 itself, not its neighbour.

    Raises:
        ValueError: Not such a list; also where the steps miss c.
    """
    return list(dict.fromkeys(float(each) for each in _numbers(text, "0.05,0.06,...,0.15")))


def parse_profiles(text: str) -> list[float]:
    """Read a list of numbers in the same way, each as often as it is named: the trainer was told so.

    Raises:
        ValueError: As parse_lengths().
    """
    return [float(each) for each in _numbers(text, "0.05,0.10")]


def parse_steps(text: str) -> Steps:
    """Read a list of steps, in the same way, or the word ``all``.

    Raises:
        ValueError: Not such a list, or a number that is no step.
    """
    if text.strip() == "all":
        return "all"
    steps = _numbers(text, "1000,2000,...,10000")
    for step in steps:
        if step < 0 or step != step.to_integral_value():
            raise ValueError(f"{text!r}: {step} is not a step; expected whole numbers, or 'all'")
    return list(dict.fromkeys(int(step) for step in steps))


def parse_step_list(text: str) -> list[int]:
    """Read a list of steps: ``5000,10000``.

    Raises:
        ValueError: Not such a list.
    """
    steps = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,18}", step) for step in steps):
        raise ValueError(f"{text!r} is no list of steps; expected one such as 5000 or 5000,10000")
    return [int(step) for step in steps]


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    """Which snapshots may be read: ``--exclude`` and ``--tolerance``."""
    add_exclude(parser)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="E",
        help="relative profile error that may be added to read fewer snapshots (default: 0.001); 0 reads all",
    )


def add_exclude(parser: argparse.ArgumentParser, help: str = "steps to leave out") -> None:
    """``--exclude``, a list of steps."""
    listed = exit_status.argument(parse_step_list)
    parser.add_argument("--exclude", type=listed, action="extend", default=[], metavar="STEP,...", help=help)


def add_old_profiles(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--sigma-rels`` or ``--gammas``, which name the profiles of an old folder."""
    listed, profiles = exit_status.argument(parse_profiles), parser.add_mutually_exclusive_group(required=required)
    profiles.add_argument(
        "--sigma-rels", type=listed, help="the tracked profiles of a folder of {i}.{step}.pt files, in their order"
    )
    profiles.add_argument("--gammas", type=listed, help="the same, as exponents")


def _numbers(text: str, example: str) -> list[Decimal]:
    numbers: list[Decimal] = []
    words = [word.strip() for word in text.split(",")]
    for index, word in enumerate(words):
        if word != "...":
            numbers.append(_decimal(word, text))
        elif len(numbers) < 2 or index + 1 == len(words) or words[index + 1] == "...":
            raise ValueError(f"{text!r}: '...' needs two numbers before it and one after it, as in {example}")
        else:
            numbers += _between(numbers[-2], numbers[-1], _decimal(words[index + 1], text), text)
    return numbers


def _decimal(word: str, text: str) -> Decimal:
    try:
        number = Decimal(word)
    except InvalidOperation:
        raise ValueError(f"{text!r}: {word!r} is not a number") from None
    if not number.is_finite():
        raise ValueError(f"{text!r}: {word!r} is not a finite number")
    return number


def _between(first: Decimal, second: Decimal, last: Decimal, text: str) -> list[Decimal]:
    """The numbers after ``second`` and before ``last``."""
    step = second - first
    if step == 0 or (last - second) / step <= 0:
        raise ValueError(f"{text!r}: steps of {step} from {second} do not lead to {last}")
    count = (last - second) / step
    if count != count.to_integral_value():
        raise ValueError(f"{text!r}: steps of {step} from {second} miss {last}")
    if count > _MAX_NUMBERS:
        raise ValueError(f"{text!r}: {count} numbers; at most {_MAX_NUMBERS} are taken")
    return [second + step * index for index in range(1, int(count))]


def unknown_exclusions(exclude: Collection[int], there: Collection[int]) -> str:
    """What is said of steps to leave out that are not there; empty if all are."""
    unknown = sorted({*exclude}.difference(there))
    return f"--exclude: there is no snapshot of step {', '.join(map(str, unknown))} to leave out" if unknown else ""
