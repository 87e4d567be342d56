"""The command line of the synthesis process, and the config that it becomes.

argparse's Namespace ends in this module: everything inside the process takes a ``WorkerConfig`` or some of its fields.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import parse_bytes
from nitrous_ema._base.dtypes import STORED_CODES, parse_dtype
from nitrous_ema._base.options import (
    Steps,
    add_choice_options,
    add_lengths,
    add_old_profiles,
    parse_number,
    parse_steps,
    path_option,
)
from nitrous_ema.synthesis.worker.partition import WorkPartition, parse_part

if TYPE_CHECKING:
    from nitrous_ema.synthesis.streaming import Accumulate  # loads numpy, which must wait for its thread limits


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """Parsed and checked command line of one synthesis process."""

    snapshots: Path
    """The snapshot folder."""
    out: str
    """Folder of the outputs, or a template of their names."""
    sigma_rels: tuple[float, ...] | None = None
    """Requested lengths as fractions of the training time; None where ``gammas`` has them."""
    gammas: tuple[float, ...] | None = None
    """Requested lengths as exponents; None where ``sigma_rels`` has them."""
    steps: tuple[int | str, ...] | Literal["all"] | None = None
    """Target steps, numbers or ``nearest:1234``, without repetitions; None is the newest snapshot."""
    run: str | None = None
    """Run whose lineage is read; None is the newest run."""
    exclude: tuple[int, ...] = ()
    """Steps of snapshots that are ignored."""
    tolerance: float = 1e-3
    """Relative profile error that reading fewer snapshots may add; 0 reads all."""
    tracked_sigma_rels: tuple[float, ...] | None = None
    """Tracked profiles of a folder of ``{i}.{step}.pt`` files, in their order; None for a folder of this format."""
    tracked_gammas: tuple[float, ...] | None = None
    """The same profiles as exponents."""
    dtype: str | None = None
    """Type of the floating tensors, by torch's name; None is the type of each tensor in the model."""
    format: str | None = None
    """``"safetensors"`` or ``"pt"``; None follows the suffix of ``out``."""
    memory_bytes: int = 1 << 30
    """Memory budget for reading and computing, above the interpreter and its imports."""
    threads: int | None = None
    """At most this number of computing threads; None is one for each core of this process's share."""
    accumulate: Accumulate = "float64"
    """Type of products and sums."""
    skip_existing: bool = False
    """Reuse outputs that exist, are whole and have the same recipe. Always set with ``follow``."""
    dry_run: bool = False
    """Plan and report, but write nothing."""
    text_progress: bool = False
    """Print the progress as text, even if stderr is not a terminal."""
    json_progress: bool = False
    """Print the progress as lines of JSON."""
    as_json: bool = False
    """Print the outputs as lines of JSON, even if stdout is a terminal."""
    verbose: bool = False
    """Print condition, rounding and the bounds of the choice of snapshots, too."""
    nice: Literal["auto", "always", "never"] = "auto"
    """When to lower the priority of this process; ``"auto"``: while the trainer runs on this machine."""
    part: WorkPartition | None = None
    """The part of each output that this process writes; None takes it from torchrun's environment."""
    follow: bool = False
    """Wait for new snapshots and synthesize at each of them until training has ended."""
    idle_seconds: float | None = None
    """With ``follow``: end after this time without a new snapshot; None waits without a limit."""
    look_every_seconds: float = 2.0
    """With ``follow``: time between two polls of the snapshot folder."""

    @property
    def is_legacy(self) -> bool:
        """Whether the snapshots are ``{i}.{step}.pt`` files (nitrous-ema 0.0.1, ema-pytorch)."""
        return self.tracked_sigma_rels is not None or self.tracked_gammas is not None


def parse_arguments(argv: Sequence[str] | None, program: str) -> WorkerConfig:
    """Parse and check the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
        program: How the user has called the program, for its help.

    Raises:
        SystemExit: The arguments are invalid, and the reason was printed to stderr; or help was printed.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Synthesize averages of any length from a folder of snapshots.",
        epilog="Under torchrun each process writes its part of every average.",
        allow_abbrev=False,  # an abbreviation could mean another option in a later version
    )
    _add_input_options(parser)
    _add_output_options(parser)
    _add_engine_options(parser)
    _add_follow_options(parser)
    config = _config(parser.parse_args(argv))
    for is_invalid, message in (
        (
            config.is_legacy and config.run is not None,
            "--run: a folder of {i}.{step}.pt files has no runs; omit --run.",
        ),
        (
            config.is_legacy and config.follow,
            "--follow: a folder of {i}.{step}.pt files does not record when it is complete; omit --follow.",
        ),
        (config.follow and config.dry_run, "--dry-run cannot plan future snapshots; omit --follow."),
        (config.idle_seconds is not None and not config.follow, "--idle requires --follow."),
    ):
        if is_invalid:
            parser.error(message)
    return config


def _config(options: argparse.Namespace) -> WorkerConfig:
    return WorkerConfig(
        snapshots=options.snapshots,
        out=options.out,
        sigma_rels=_tuple(options.sigma_rel),
        gammas=_tuple(options.gamma),
        steps=_merge_steps(options.step),
        run=options.run,
        exclude=tuple(options.exclude),
        tolerance=options.tolerance,
        tracked_sigma_rels=_tuple(options.tracked_sigma_rel),
        tracked_gammas=_tuple(options.tracked_gamma),
        dtype=options.dtype,
        format=options.format,
        memory_bytes=options.memory,
        threads=options.threads,
        accumulate=options.accumulate,
        skip_existing=options.skip_existing or options.follow,  # a follower that is restarted continues its outputs
        dry_run=options.dry_run,
        text_progress=options.progress,
        json_progress=options.progress_json,
        as_json=options.json,
        verbose=options.verbose,
        nice=options.nice,
        part=options.part,
        follow=options.follow,
        idle_seconds=options.idle,
        look_every_seconds=options.look_every,
    )


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "snapshots",
        type=path_option("SNAPSHOTS"),
        metavar="SNAPSHOTS",
        help="snapshot folder",
    )
    add_lengths(parser, required=True)
    add(
        "--step",
        type=exit_status.argument(parse_steps),
        action="append",
        metavar="STEPS",
        help="target steps: 1000,2000,...,10000, nearest:1234, or 'all' (default: the newest snapshot)",
    )
    add("--run", help="run whose snapshots are read, together with its ancestors (default: the newest run)")
    add_choice_options(parser)
    add_old_profiles(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--out",
        required=True,
        help="output folder, or a template of file names with the fields {run}, {step}, {t}, {sigma_rel}, {gamma}",
    )
    add(
        "--dtype",
        type=parse_dtype,
        choices=list(STORED_CODES),
        help="type of floating tensors (default: as in the model)",
    )
    add("--format", choices=("safetensors", "pt"), help="file format (default: the suffix of --out, else safetensors)")
    add("--skip-existing", action="store_true", help="reuse outputs that exist, are whole and have the same recipe")
    add(
        "--dry-run",
        action="store_true",
        help="print what would be read and written and the expected accuracy, then exit",
    )
    add(
        "--part",
        type=exit_status.argument(parse_part),
        metavar="K/N",
        help="write only part K of N (set automatically under torchrun)",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    size = exit_status.argument(parse_bytes)
    add("--memory", type=size, default=1 << 30, metavar="SIZE", help="memory limit (default: 1GiB)")
    count = exit_status.argument(_parse_count)
    add("--threads", type=count, metavar="N", help="maximum number of threads (default: the cores of this process)")
    add("--accumulate", choices=("float64", "float32"), default="float64", help="type of sums (default: float64)")
    add("--progress", action="store_true", help="print the progress even if stderr is not a terminal")
    add("--progress-json", action="store_true", help="print the progress as lines of JSON, for programs")
    add("--json", action="store_true", help="print one JSON object per average, even if stdout is a terminal")
    add("--verbose", action="store_true", help="print condition number, rounding and how few snapshots suffice, too")
    add(
        "--nice",
        choices=("auto", "always", "never"),
        default="auto",
        help="low CPU and I/O priority (default: auto, while the trainer runs on this machine)",
    )


def _add_follow_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--follow",
        action="store_true",
        help="wait for new snapshots until the run is closed or its trainer, a process of this machine, has ended",
    )
    positive = exit_status.argument(_parse_positive)
    add("--idle", type=positive, metavar="SECONDS", help="with --follow: end after this time without a new snapshot")
    add(
        "--look-every",
        type=positive,
        default=2.0,
        metavar="SECONDS",
        help="with --follow: time between two polls of the snapshot folder (default: 2)",
    )


def _merge_steps(options: list[Steps] | None) -> tuple[int | str, ...] | Literal["all"] | None:
    """Return the steps of all ``--step`` options together."""
    if options is None:
        return None
    steps: dict[int | str, None] = {}
    for option in options:
        if option == "all":
            return "all"
        steps.update(dict.fromkeys(option))
    return tuple(steps)


def _tuple(numbers: list[float] | None) -> tuple[float, ...] | None:
    return None if numbers is None else tuple(numbers)


def _parse_count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def _parse_positive(text: str) -> float:
    number = float(parse_number(text, text))
    if number <= 0:
        raise ValueError(f"{text!r}: expected a number above 0")
    return number
