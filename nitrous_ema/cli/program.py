"""The command ``nitrous-ema``.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such folder or snapshot, 4 damaged snapshot, 130 interrupted. What
was asked for goes to stdout, all else to stderr. Only the subcommands that need torch import it, and none imports numpy
before the synthesis has set its thread limits.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nitrous_ema import __version__
from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import parse_bytes
from nitrous_ema._base.dtypes import AVERAGE_CODES, dtype_code, parse_dtype
from nitrous_ema._base.options import (
    add_choice_options,
    add_exclude,
    add_old_profiles,
    parse_lengths,
    parse_step_list,
    parse_steps,
)
from nitrous_ema.cli.terminal import log

_PRUNE = (
    "Keeps the snapshots that matter for the lengths that are wanted, of the newest run (or --run) and of what it "
    "continues, and removes the others. The newest snapshot and pinned ones always stay. Errors are distances between "
    "the profile that a synthesis gives and the one asked for, relative to the latter."
)
_VERIFY = (
    "Reads every byte of every snapshot, whatever run it belongs to. One line per damaged file, which says what to do; "
    "exit status 4 if there is one, 3 if there is no snapshot, else 0."
)
_IMPORT = (
    "Writes the averages of files named {i}.{step}.pt into another folder, as snapshots of one run. The old folder is "
    "only read. Call it again to go on after an interruption. Damaged files are named and the rest is taken over; exit "
    "status 4 if there is one, else 0."
)
_PLOT = (
    "Of a file of a sweep's results: the values against the length, and against the step if there are several. Of a "
    "snapshot folder: the profiles asked for and obtained, their difference, and the weight of each snapshot. Needs "
    "matplotlib: pip install 'nitrous-ema[plot]'."
)
_INSPECT = (
    "Lists runs, snapshots, profiles and sizes by the files' headers, and which lengths the snapshots can give; damage "
    "in the data is seen by verify only. With --sigma-rel or --gamma: how well those would come out, and from what."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Command line arguments without the program's name; those of the process by default.

    Returns:
        The exit status, as the module says.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return exit_status.run_program(lambda: _run(given), lambda why: log(f"error: {why}"))


def _run(given: list[str]) -> int:
    # These two read the rest by themselves, also what argparse would take for an option of ours.
    if given[:1] == ["synthesize"]:
        return _synthesize(given[1:])
    if given[:1] == ["demo"]:
        return _demo(given[1:])
    options = _parser().parse_args(given)
    run: Callable[[argparse.Namespace], int] = options.run_command
    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nitrous-ema",
        description="Post-hoc EMA: average while training, choose the EMA length afterwards.",
        epilog="nitrous-ema COMMAND --help tells more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nitrous-ema {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("demo", help="train on handwritten digits, then choose an EMA length (about two minutes)")
    commands.add_parser("synthesize", help="write averages of any length from a folder of snapshots")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str, more: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=more, allow_abbrev=False)
        added.add_argument("folder", type=Path, metavar="DIR", help="the snapshot folder")
        added.set_defaults(run_command=run)
        return added

    command("verify", _verify, "read every byte of a folder's snapshots and compare checksums", _VERIFY)
    inspect = command("inspect", _inspect, "list the runs and snapshots in a folder", _INSPECT)
    inspect.add_argument("--run", metavar="ID", help="run that the others are seen from; the newest by default")
    inspect.add_argument("--all", action="store_true", help="every snapshot, however many there are")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of text")
    _add_length_options(inspect)
    _add_import_options(
        command("import", _import, "rewrite a folder of nitrous-ema 0.0.1 or ema-pytorch as snapshots", _IMPORT)
    )
    _add_prune_options(command("prune", _prune, "remove the snapshots that matter least", _PRUNE))
    plot = commands.add_parser("plot", help="draw a sweep's results, or the profiles that snapshots give",
                               description=_PLOT, allow_abbrev=False)  # fmt: skip
    plot.set_defaults(run_command=_plot)
    _add_plot_options(plot)
    return parser


def _add_length_options(inspect: argparse.ArgumentParser) -> None:
    listed, lengths = exit_status.argument(parse_lengths), inspect.add_mutually_exclusive_group()
    lengths.add_argument("--sigma-rel", type=listed, metavar="LENGTHS", help="lengths wanted: 0.05,0.06,...,0.15")
    lengths.add_argument("--gamma", type=listed, metavar="LENGTHS", help="the same, as exponents of the profile")
    inspect.add_argument(
        "--step",
        type=exit_status.argument(parse_steps),
        metavar="STEPS",
        help="steps at which averages end: 1000,2000,...,10000, or 'all'; the newest snapshot by default",
    )
    add_choice_options(inspect)
    add_old_profiles(inspect)


def _add_import_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("new", type=Path, metavar="NEW", help="folder of the snapshots, made if need be")
    add_old_profiles(command, required=True)
    add(
        "--dtype",
        type=parse_dtype,
        choices=list(AVERAGE_CODES),
        help="type in which averages are stored; by default that of the old files",
    )
    add_exclude(command)
    add("--dry-run", action="store_true", help="say what would be done, and write nothing")
    add("--json", action="store_true", help="one JSON object instead of text")


def _add_plot_options(plot: argparse.ArgumentParser) -> None:
    add = plot.add_argument
    add("source", type=Path, metavar="DIR|FILE", help="the snapshot folder, or the file of a sweep's results")
    add("--out", type=Path, required=True, metavar="FILE", help="the picture, as .png, .svg or .pdf")
    add(
        "--sigma-rel",
        type=exit_status.argument(parse_lengths),
        metavar="LENGTHS",
        help="lengths to draw: 0.05,0.06,...,0.15",
    )
    add("--step", type=int, help="step at which the averages end; the newest snapshot by default")
    add("--run", metavar="ID", help="run whose snapshots are read, with its ancestors; the newest by default")
    add_choice_options(plot)
    plot.set_defaults(exclude=None, tolerance=None)  # so that a file of results can refuse them


def _add_prune_options(prune: argparse.ArgumentParser) -> None:
    steps: dict[str, Any] = {
        "type": exit_status.argument(parse_step_list),
        "action": "extend",
        "default": [],
        "metavar": "STEP,...",
    }
    amount = prune.add_mutually_exclusive_group()
    amount.add_argument("--keep", type=exit_status.argument(_count), metavar="N", help="snapshots that stay")
    amount.add_argument(
        "--budget",
        type=exit_status.argument(parse_bytes),
        metavar="BYTES",
        help="bytes that stay at most, such as 100GB",
    )
    amount.add_argument(
        "--error",
        type=exit_status.argument(_positive),
        metavar="E",
        help="largest error in the range, such as 0.01 for 1 %%",
    )
    add = prune.add_argument
    add(
        "--sigma-rel",
        type=exit_status.argument(_range),
        metavar="LO-HI",
        help="lengths wanted later; by default from the shortest tracked one to 2.5 times the longest, at most 0.25",
    )
    add("--run", metavar="ID", help="last run of the history to prune; the newest by default")
    add("--pin", **steps, help="steps that stay from now on, with what they need as targets; may be all that is asked")
    add("--unpin", **steps, help="steps that need not stay any longer")
    add_exclude(prune, help="steps to leave alone and not to count on, damaged ones for example")
    add(
        "--grace",
        type=exit_status.argument(_seconds),
        default=0.0,
        metavar="SECONDS",
        help="wait before what is hidden is removed",
    )
    add("--dry-run", action="store_true", help="say what would be done, and change nothing")
    add("--json", action="store_true", help="one JSON object instead of text")


# ---- the commands


def _demo(arguments: Sequence[str]) -> int:
    from nitrous_ema.cli import demo

    return demo.main(arguments)


def _synthesize(arguments: Sequence[str]) -> int:
    from nitrous_ema.async_ import synthesize_worker

    synthesize_worker.use_one_thread_per_product()
    return synthesize_worker.main(arguments)


def _verify(options: argparse.Namespace) -> int:
    from nitrous_ema.cli import verify

    return verify.run(options)


def _inspect(options: argparse.Namespace) -> int:
    from nitrous_ema.cli import inspect

    return inspect.run(options)


def _prune(options: argparse.Namespace) -> int:
    from nitrous_ema.cli import prune

    return prune.run(options)


def _import(options: argparse.Namespace) -> int:
    from nitrous_ema.cli import import_command as importing

    options.dtype = dtype_code(options.dtype)
    return importing.run(options)


def _plot(options: argparse.Namespace) -> int:
    from nitrous_ema.cli import plot

    return plot.run(options)


# ---- what options say


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise ValueError(f"{text!r}: expected how many snapshots stay, at least 1")
    return int(text)


def _number(text: str, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{text!r}: expected {expected}")
    return number


def _positive(text: str) -> float:
    number = _number(text, what := "a relative error above 0, such as 0.01 for 1 %")
    if number == 0:
        raise ValueError(f"{text!r}: expected {what}")
    return number


def _seconds(text: str) -> float:
    return _number(text, "seconds, 0 or more")


def _range(text: str) -> tuple[float, float]:
    number = r"([0-9]*\.?[0-9]+(?:[eE]-?[0-9]+)?)"
    found = re.fullmatch(rf"{number}-{number}", text)
    if found is None:
        raise ValueError(f"{text!r} is no range; expected the shortest and the longest length, such as 0.03-0.25")
    low, high = float(found[1]), float(found[2])
    if low > high:
        raise ValueError(f"{text!r}: expected the shorter length first, as in {found[2]}-{found[1]}")
    if low <= 0 or high >= 12**-0.5:
        raise ValueError(f"{text!r}: lengths lie between 0 and 12 ** -0.5 = 0.2887, without these two")
    return low, high


if __name__ == "__main__":
    sys.exit(main())
