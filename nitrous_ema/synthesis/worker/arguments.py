"""The command line of the synthesis process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import parse_bytes
from nitrous_ema._base.dtypes import AVERAGE_CODES, parse_dtype
from nitrous_ema._base.options import Steps, _decimal, add_choice_options, add_old_profiles, parse_lengths, parse_steps
from nitrous_ema.synthesis.worker.partition import parse_part


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
        type=exit_status.argument(parse_lengths),
        help="lengths, as fractions of the training time: 0.05,0.06,...,0.15",
    )
    lengths.add_argument(
        "--gamma", type=exit_status.argument(parse_lengths), help="lengths, as exponents of the profile"
    )
    add(
        "--out",
        required=True,
        help="folder of the outputs; or a template of their names, with {run}, {step}, {t}, {sigma_rel}, {gamma}",
    )
    add(
        "--step",
        type=exit_status.argument(parse_steps),
        action="append",
        metavar="STEPS",
        help="steps at which averages end: 1000,2000,...,10000, or 'all'; the newest snapshot by default",
    )
    add("--run", help="run whose snapshots are read, with its ancestors; the newest by default")
    add_choice_options(parser)
    add_old_profiles(parser)


def _add_how(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--dtype",
        type=parse_dtype,
        choices=list(AVERAGE_CODES),
        help="type of floating tensors; by default as in the model",
    )
    add("--format", choices=("safetensors", "pt"), help="kind of file (default: as --out ends, else safetensors)")
    size = exit_status.argument(parse_bytes)
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
        type=exit_status.argument(parse_part),
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
    positive = exit_status.argument(_positive)
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
