"""Command-line options that several programs share, and the parsers of their values: lengths, steps, profiles."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Literal

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import nearest_to
from nitrous_ema._base.exit_status import argument
from nitrous_ema._base.paths import local_path

Steps = list[int | str] | Literal["all"]
"""Requested steps; a text is ``nearest:1234``."""

# Numbers in one list: a typing mistake before or after an ellipsis must not request outputs that fill the disk.
_MAX_NUMBERS = 10_000


def path_option(name: str) -> Callable[[str], object]:
    """Return the ``type=`` of an option or argument that is a path of this machine."""
    return argument(partial(local_path, name))


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose which snapshots a synthesis reads: ``--exclude`` and ``--tolerance``."""
    add_exclude(parser)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="E",
        help="relative profile error that may be added to read fewer snapshots (default: 0.001); 0 reads all",
    )


def add_lengths(
    parser: argparse.ArgumentParser, *, required: bool = False, help: str = "lengths as fractions of the training time"
) -> None:
    """Add ``--sigma-rel`` and ``--gamma``, the wanted lengths; at most one of the two may be given."""
    numbers, lengths = exit_status.argument(parse_lengths), parser.add_mutually_exclusive_group(required=required)
    lengths.add_argument("--sigma-rel", type=numbers, metavar="LENGTHS", help=f"{help}: 0.05,0.06,...,0.15")
    lengths.add_argument(
        "--gamma", type=numbers, metavar="LENGTHS", help="the same, as exponents of the power-function profile"
    )


def add_exclude(parser: argparse.ArgumentParser, help: str = "ignore these steps") -> None:
    """Add ``--exclude``, a list of steps; several of these options add up."""
    steps = exit_status.argument(parse_step_list)
    parser.add_argument("--exclude", type=steps, action="extend", default=[], metavar="STEP,...", help=help)


def add_old_profiles(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add ``--tracked-sigma-rel`` and ``--tracked-gamma``: the profiles of {i}.{step}.pt files."""
    numbers, profiles = exit_status.argument(parse_profiles), parser.add_mutually_exclusive_group(required=required)
    profiles.add_argument(
        "--tracked-sigma-rel",
        type=numbers,
        metavar="LENGTHS",
        help="the tracked profiles of a folder of {i}.{step}.pt files, in their order",
    )
    profiles.add_argument("--tracked-gamma", type=numbers, metavar="LENGTHS", help="the same profiles, as exponents")


def parse_lengths(text: str) -> list[float]:
    """Parse a list of numbers in which ``a,b,...,c`` stands for a, b and so on in equal steps up to c.

    Steps are computed in decimals: ``0.05,0.06,...,0.15`` contains 0.07 itself, not a neighboring float. A number that
    is repeated counts once.

    Raises:
        ValueError: The text is not such a list, or equal steps from a and b miss c.
    """
    return list(dict.fromkeys(float(number) for number in _parse_numbers(text, "0.05,0.06,...,0.15")))


def parse_profiles(text: str) -> list[float]:
    """Parse a list of numbers as ``parse_lengths`` does, but with repetitions: a profile is known by its position.

    Raises:
        ValueError: As ``parse_lengths``.
    """
    return [float(number) for number in _parse_numbers(text, "0.05,0.10")]


def parse_steps(text: str) -> Steps:
    """Parse a list of steps, with ``...`` as in ``parse_lengths`` and ``nearest:1234`` as a step; or the word ``all``.

    Raises:
        ValueError: The text is not such a list, or a number is not a whole number of at least 0.
    """
    if text.strip() == "all":
        return "all"
    words = [word.strip() for word in text.split(",")]
    near: list[int | str] = [word for word in words if word.startswith("nearest:") and nearest_to(word) is not None]
    plain = ",".join(word for word in words if word not in near)
    numbers = _parse_numbers(plain, "1000,2000,...,10000") if plain or not near else []
    for number in numbers:
        if number < 0 or number != number.to_integral_value():
            raise ValueError(f"{text!r}: {number} is not a step; expected whole numbers, 'nearest:1234' or 'all'")
    return list(dict.fromkeys([*(int(number) for number in numbers), *near]))


def parse_step_list(text: str) -> list[int]:
    """Parse a plain list of steps: ``5000,10000``.

    Raises:
        ValueError: The text is not such a list.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
        raise ValueError(f"{text!r} is not a list of steps; expected for example 5000 or 5000,10000")
    return [int(word) for word in words]


def unknown_exclusions(exclude: Collection[int], existing: Collection[int]) -> str:
    """Return a warning that names the excluded steps without a snapshot; an empty text if all have one."""
    unknown = sorted({*exclude}.difference(existing))
    return f"--exclude: there is no snapshot of step {', '.join(map(str, unknown))}" if unknown else ""


def parse_number(word: str, text: str) -> Decimal:
    """Parse one finite number.

    Args:
        word: The number.
        text: The whole argument that contains it, for the message.

    Raises:
        ValueError: ``word`` is not a number, or not a finite one.
    """
    try:
        number = Decimal(word)
    except InvalidOperation:
        raise ValueError(f"{text!r}: {word!r} is not a number") from None
    if not number.is_finite():
        raise ValueError(f"{text!r}: {word!r} is not a finite number")
    return number


def _parse_numbers(text: str, example: str) -> list[Decimal]:
    numbers: list[Decimal] = []
    words = [word.strip() for word in text.split(",")]
    for index, word in enumerate(words):
        if word != "...":
            numbers.append(parse_number(word, text))
        elif len(numbers) < 2 or index + 1 == len(words) or words[index + 1] == "...":
            raise ValueError(f"{text!r}: '...' needs two numbers before it and one after it, as in {example}")
        else:
            numbers += _between(numbers[-2], numbers[-1], parse_number(words[index + 1], text), text)
    return numbers


def _between(first: Decimal, second: Decimal, last: Decimal, text: str) -> list[Decimal]:
    """Return the numbers after ``second`` and before ``last``."""
    step = second - first
    if step == 0 or (last - second) / step <= 0:
        raise ValueError(f"{text!r}: steps of {step} from {second} do not lead to {last}")
    count = (last - second) / step
    if count != count.to_integral_value():
        raise ValueError(f"{text!r}: steps of {step} from {second} miss {last}")
    if count > _MAX_NUMBERS:
        raise ValueError(f"{text!r} contains {count} numbers; expected at most {_MAX_NUMBERS}")
    return [second + step * index for index in range(1, int(count))]
