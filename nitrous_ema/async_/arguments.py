"""The command line of the synthesis process."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal

from nitrous_ema import exits
from nitrous_ema.async_.parts import parse_part
from nitrous_ema.dtypes import DTYPES, parse_dtype
from nitrous_ema.sizes import parse_bytes

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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: It makes no sense, which was told; or help was asked for.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nitrous_ema.async_.synthesize_worker",
        description="Synthesize averages of any length from a folder of snapshots.",
        epilog="Under torchrun each process writes its part of every average.",
        allow_abbrev=False,
    )
    _add_what(parser)
    _add_how(parser)
    _add_when(parser)
    options = parser.parse_args(argv)
    options.step = _merged(options.step)
    is_old = options.sigma_rels is not None or options.gammas is not None
    for is_wrong, message in (
        (is_old and options.run is not None, "--run: folders of {i}.{step}.pt files know no runs; leave it out."),
        (is_old and options.follow, "--follow: nothing tells when a folder of {i}.{step}.pt files is complete."),
        (options.follow and options.dry_run, "--dry-run: snapshots to come are not known; leave out --follow."),
        (options.idle is not None and not options.follow, "--idle: only with --follow."),
    ):
        if is_wrong:
            parser.error(message)
    return options


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    lengths = parser.add_mutually_exclusive_group(required=True)
    add("snapshots", type=Path, metavar="SNAPSHOTS", help="the snapshot folder")
    lengths.add_argument(
        "--sigma-rel",
        type=exits.argument(parse_lengths),
        help="lengths, as fractions of the training time: 0.05,0.06,...,0.15",
    )
    lengths.add_argument("--gamma", type=exits.argument(parse_lengths), help="lengths, as exponents of the profile")
    add(
        "--out",
        required=True,
        help="folder of the outputs; or a template of their names, with {run}, {step}, {t}, {sigma_rel}, {gamma}",
    )
    add(
        "--step",
        type=exits.argument(parse_steps),
        action="append",
        metavar="STEPS",
        help="steps at which averages end: 1000,2000,...,10000, or 'all'; the newest snapshot by default",
    )
    add("--run", help="run whose snapshots are read, with its ancestors; the newest by default")
    add_choice_options(parser)
    add_old_profiles(parser)


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
    listed = exits.argument(parse_step_list)
    parser.add_argument("--exclude", type=listed, action="extend", default=[], metavar="STEP,...", help=help)


def add_old_profiles(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--sigma-rels`` or ``--gammas``, which name the profiles of an old folder."""
    listed, profiles = exits.argument(parse_profiles), parser.add_mutually_exclusive_group(required=required)
    profiles.add_argument(
        "--sigma-rels", type=listed, help="the tracked profiles of a folder of {i}.{step}.pt files, in their order"
    )
    profiles.add_argument("--gammas", type=listed, help="the same, as exponents")


def _add_how(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", type=parse_dtype, choices=list(DTYPES), help="type of floating tensors; by default as in the model")
    add("--format", choices=("safetensors", "pt"), help="kind of file (default: as --out ends, else safetensors)")
    size = exits.argument(parse_bytes)
    add("--memory", type=size, default=1 << 30, metavar="SIZE", help="to stay within (default: 1GiB)")
    add("--threads", type=int, metavar="N", help="at most so many; by default the cores there are for this process")
    add("--accumulate", choices=("float64", "float32"), default="float64", help="type of sums (default: float64)")
    add("--skip-existing", action="store_true", help="leave outputs that are there, whole and of the same recipe")
    add("--dry-run", action="store_true", help="tell what would be read and written, and how good it would be")
    add("--progress", action="store_true", help="tell the progress also where stderr is no terminal")
    add("--progress-json", action="store_true", help="tell it as lines of JSON, for programs")
    add(
        "--nice",
        choices=("auto", "always", "never"),
        default="auto",
        help="low CPU and I/O priority; by default while the trainer lives on this machine",
    )
    add(
        "--part",
        type=exits.argument(parse_part),
        metavar="K/N",
        help="write the K-th of N parts of each average; torchrun says it by itself",
    )


def _add_when(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--follow",
        action="store_true",
        help="go on with new snapshots until the run is closed or its trainer, a process of this machine, is gone",
    )
    positive = exits.argument(_positive)
    add("--idle", type=positive, metavar="SECONDS", help="with --follow: end when nothing new has come for so long")
    add("--look-every", type=positive, default=2.0, metavar="SECONDS", help="for new snapshots (default: 2)")


def _merged(given: list[Steps] | None) -> Steps | None:
    """All that was said by several ``--step``."""
    if given is None or "all" in given:
        return None if given is None else "all"
    return list(dict.fromkeys(step for steps in given for step in steps if steps != "all"))  # type: ignore[misc]


def _positive(text: str) -> float:
    number = float(_decimal(text, text))
    if number <= 0:
        raise ValueError(f"{text!r}: expected a number above 0")
    return number


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
