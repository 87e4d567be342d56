"""The command ``nitrous-ema``: the options of every subcommand, and a table of the modules that run them.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such folder or snapshot, 4 damaged snapshot, 130 interrupted. The
requested result goes to stdout, everything else to stderr.

A module is imported only when its command runs. So ``--help`` is fast, and only the commands that need torch import
it. No module imported here may import numpy either: numpy reads its thread limits once, when it is loaded, and
``synthesize`` sets them first. Each module of the table has ``configure``, which turns the parsed options into a frozen
configuration, and ``run``, which takes it and returns the exit status.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from nitrous_ema import __version__
from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import parse_bytes
from nitrous_ema._base.dtypes import STORED_CODES, parse_dtype
from nitrous_ema._base.options import (
    add_choice_options,
    add_exclude,
    add_lengths,
    add_old_profiles,
    parse_step_list,
    parse_steps,
    path_option,
)
from nitrous_ema.cli.terminal import log

_MODULES = {
    "verify": "nitrous_ema.cli.verify",
    "inspect": "nitrous_ema.cli.inspect",
    "import": "nitrous_ema.cli.import_command",
    "prune": "nitrous_ema.cli.prune",
    "plot": "nitrous_ema.cli.plot",
}
"""Module of each command whose options are defined here."""

_INSPECT = (
    "List the runs, snapshots, profiles and sizes in a folder, and the EMA lengths that the snapshots support. Only "
    "file headers are read; `nitrous-ema verify` also finds damage in tensor data. With --sigma-rel or --gamma, "
    "predict the error of averages of these lengths, and what a synthesis would read."
)
_VERIFY = (
    "Read every byte of every snapshot of all runs and compare checksums. Each damaged file is printed on one line, "
    "with its remedy. Exit status: 0 all snapshots are intact, 3 no snapshot, 4 damage found."
)
_IMPORT = (
    "Convert a folder of {i}.{step}.pt files (nitrous-ema 0.0.1 or ema-pytorch) into a new folder of snapshots of one "
    "run. The old folder is only read. After an interruption, run the same command again: it writes only the missing "
    "snapshots. Damaged files are reported and skipped. Exit status: 0 done, 4 damaged files found."
)
_PRUNE = (
    "Keep the snapshots that matter most for the lengths you want, and delete the others. Only the newest run (or "
    "--run) and the runs that it continues are pruned. The newest snapshot and pinned snapshots are always kept. "
    "Errors are profile errors: the distance between the obtained and the requested profile, relative to the norm of "
    "the requested one. On a terminal, prune prints the plan and asks before it deletes; --dry-run only prints it."
)
_PLOT = (
    "Draw a file of sweep results: values against the length and, if there are several steps, against the step. Or "
    "draw a snapshot folder: requested and obtained profiles, their difference, and the weight of each snapshot. "
    "Needs matplotlib: pip install 'nitrous-ema[plot]'."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Command line arguments without the program's name; those of the process by default.

    Returns:
        The exit status, one of those in the module's docstring.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_status.run_program(lambda: _run(arguments), lambda message: log(f"error: {message}"))


def _run(arguments: list[str]) -> int:
    # These two commands parse their own arguments, some of which argparse would take for options defined here.
    if arguments[:1] == ["synthesize"]:
        return _synthesize(arguments[1:])
    if arguments[:1] == ["demo"]:
        return _demo(arguments[1:])
    options = _parser().parse_args(arguments)
    command = import_module(_MODULES[options.command])
    status: int = command.run(command.configure(options))
    return status


def _demo(arguments: Sequence[str]) -> int:
    from nitrous_ema.cli import demo

    return demo.main(arguments)


def _synthesize(arguments: Sequence[str]) -> int:
    from nitrous_ema.cli import synthesize

    return synthesize.main(arguments)


# ---- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nitrous-ema",
        description="Post-hoc EMA: average while training, choose the EMA length afterwards.",
        epilog="Run `nitrous-ema COMMAND --help` for the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nitrous-ema {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    commands.add_parser("demo", help="train on handwritten digits, then choose an EMA length (about two minutes)")
    commands.add_parser("synthesize", help="write averages of any length from a folder of snapshots")

    def command(
        name: str, help: str, description: str, *, folder: str | None = "the snapshot folder"
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=description, allow_abbrev=False)
        if folder is not None:
            added.add_argument("folder", type=path_option("DIR"), metavar="DIR", help=folder)
        return added

    verify = command("verify", "check every byte of a folder's snapshots against the checksums", _VERIFY)
    _add_json(verify)
    inspect = command("inspect", "list the runs and snapshots in a folder, and the lengths they support", _INSPECT)
    inspect.add_argument("--run", metavar="ID", help="run that the others are compared with (default: the newest)")
    inspect.add_argument("--all", action="store_true", help="list every snapshot of long runs")
    _add_verbose(inspect, "print condition numbers, amplification and how few snapshots suffice, too")
    _add_json(inspect)
    add_lengths(inspect, help="predict the errors of averages of these lengths")
    inspect.add_argument(
        "--step",
        type=exit_status.argument(parse_steps),
        metavar="STEPS",
        help="target steps, at which the averages end: 1000,2000,...,10000, or 'all' (default: the newest snapshot)",
    )
    add_choice_options(inspect)
    add_old_profiles(inspect)
    old = "folder of {i}.{step}.pt files"
    _add_import_options(command("import", "convert a folder of nitrous-ema 0.0.1 or ema-pytorch", _IMPORT, folder=old))
    _add_prune_options(command("prune", "delete the snapshots that matter least", _PRUNE))
    plot = command("plot", "draw a sweep's results, or the profiles that snapshots give", _PLOT, folder=None)
    _add_plot_options(plot)
    return parser


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _add_verbose(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("--verbose", action="store_true", help=help)


def _add_import_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "new",
        type=path_option("NEW"),
        metavar="NEW",
        help="folder of the snapshots; created if it does not exist",
    )
    add_old_profiles(command, required=True)
    add(
        "--dtype",
        type=parse_dtype,
        choices=list(STORED_CODES),
        help="type in which averages are stored (default: the type of the old files)",
    )
    add_exclude(command)
    add("--dry-run", action="store_true", help="print what would be written, and write nothing")
    _add_json(command)


def _add_plot_options(plot: argparse.ArgumentParser) -> None:
    add = plot.add_argument
    add(
        "source",
        type=path_option("DIR"),
        metavar="DIR|FILE",
        help="a snapshot folder, or a file of sweep results",
    )
    add(
        "--out",
        type=path_option("--out"),
        required=True,
        metavar="FILE",
        help="the picture; its suffix is .png, .svg or .pdf",
    )
    add_lengths(plot, help="lengths to draw (snapshot folders only, and required there)")
    add("--step", type=int, help="target step, at which the averages end (default: the newest snapshot)")
    add("--run", metavar="ID", help="run to read, with its ancestors (default: the newest)")
    add_choice_options(plot)
    # None means "not given": for a file of results these options are errors.
    plot.set_defaults(exclude=None, tolerance=None)


def _add_prune_options(prune: argparse.ArgumentParser) -> None:
    _add_amount_options(prune)
    add = prune.add_argument
    add("--run", metavar="ID", help="last run of the lineage to prune (default: the newest)")
    _add_pin_options(prune)
    add_exclude(prune, help="ignore these steps (for example damaged snapshots): neither delete them nor rely on them")
    add(
        "--grace",
        type=exit_status.argument(_seconds),
        default=0.0,
        metavar="SECONDS",
        help="wait this long before hidden snapshots are deleted, so that running readers can finish (default: 0)",
    )
    add("--dry-run", action="store_true", help="print the plan, and change nothing")
    add("--yes", action="store_true", help="delete without asking; only a terminal is asked")
    _add_verbose(prune, "print the bound that proves how good the choice is, too")
    _add_json(prune)


def _add_amount_options(prune: argparse.ArgumentParser) -> None:
    amount = prune.add_mutually_exclusive_group()
    amount.add_argument("--keep", type=exit_status.argument(_count), metavar="N", help="keep the N best snapshots")
    amount.add_argument(
        "--budget",
        type=exit_status.argument(parse_bytes),
        metavar="BYTES",
        help="keep as many snapshots as fit into this size, such as 100GB",
    )
    amount.add_argument(
        "--error",
        type=exit_status.argument(_positive),
        metavar="E",
        help="keep the fewest snapshots with errors of at most E in the range, such as 0.01 for 1 %%",
    )
    add_lengths(
        prune,
        help="wanted lengths, of which the shortest and the longest count (by default from the shortest tracked length "
        "to 2.5 times the longest, at most 0.25)",
    )


def _add_pin_options(prune: argparse.ArgumentParser) -> None:
    steps: dict[str, Any] = {
        "type": exit_status.argument(parse_step_list),
        "action": "extend",
        "default": [],
        "metavar": "STEP,...",
    }
    prune.add_argument(
        "--pin",
        **steps,
        help="pin these steps: never prune them or the snapshots they depend on (may be used without "
        "--keep/--budget/--error)",
    )
    prune.add_argument("--unpin", **steps, help="unpin these steps (may be used without --keep/--budget/--error)")


# ---- values of options


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise ValueError(f"{text!r}: expected a number of snapshots, at least 1")
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


if __name__ == "__main__":
    sys.exit(main())
