"""The synthesis process: reads a snapshot folder, writes averages of any length, needs no trainer and no GPU.

    python -m nitrous_ema.async_.synthesize_worker SNAPSHOTS --sigma-rel 0.05,0.06,...,0.15 --out DIR

stdout carries one JSON object per output, each on its own line, as soon as that output is durable, and nothing else.
Everything said to people goes to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such snapshot or run,
4 damaged snapshot, 130 interrupted (Ctrl-C or SIGTERM; nothing half-written stays behind).

Nothing heavy is imported before main() has read the arguments: numpy must find the thread limits that ``python -m``
sets, and torch is needed for ``.pt`` files only.

Longer than the house's 300 lines because the command line, what it says and how it ends belong on one page.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nitrous_ema.async_.launch import EXIT_DAMAGED, WARNING, Job, Output, launch
from nitrous_ema.errors import NitrousError, SnapshotDamaged, SnapshotNotFound

if TYPE_CHECKING:
    from nitrous_ema.synthesis.plan import Plan

__all__ = ["Job", "Output", "launch", "main", "parse_bytes", "parse_lengths"]

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 1, 2, 3, 130

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MAX_LENGTHS = 10_000  # of one list: a typing mistake in an ellipsis should not fill the disk
_NICENESS = 10
_LOWEST_BEST_EFFORT = 7  # of ionice; the idle class could wait for ever beside a busy trainer
_SAME_START_SECONDS = 2.0  # the system's boot time, from which start times are computed, is rounded
_PROGRESS_SECONDS = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker.

    Args:
        argv: Command line arguments without the program's name; those of the process by default.

    Returns:
        The exit status, as the module says.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or has printed the help
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    with _sigterm_interrupts():
        try:
            _run(options)
        except KeyboardInterrupt:
            return _failed("interrupted; outputs that are not listed on stdout were not written.", EXIT_INTERRUPTED)
        except _UsageError as error:
            return _failed(str(error), EXIT_USAGE)
        except SnapshotNotFound as error:
            return _failed(str(error), EXIT_NOT_FOUND)
        except SnapshotDamaged as error:
            return _failed(str(error), EXIT_DAMAGED)
        except BrokenPipeError:
            # Whoever read our output is gone; without this the interpreter complains once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _failed("stdout was closed before all outputs were written.", EXIT_FAILED)
        except (NitrousError, OSError) as error:
            return _failed(str(error), EXIT_FAILED)
    return 0


def parse_lengths(text: str) -> list[float]:
    """Read a list of numbers in which ``a,b,...,c`` stands for a, b and so on in equal steps up to c.

    Computed in decimals: ``0.05,0.06,...,0.15`` holds 0.07 itself, not its neighbour.

    Raises:
        ValueError: Not such a list; also where the steps miss c.
    """
    lengths: list[Decimal] = []
    words = [word.strip() for word in text.split(",")]
    for index, word in enumerate(words):
        if word != "...":
            lengths.append(_decimal(word, text))
        elif len(lengths) < 2 or index + 1 == len(words) or words[index + 1] == "...":
            raise ValueError(f"{text!r}: '...' needs two numbers before it and one after it, as in 0.05,0.06,...,0.15")
        else:
            lengths += _between(lengths[-2], lengths[-1], _decimal(words[index + 1], text), text)
    return list(dict.fromkeys(float(length) for length in lengths))


def parse_bytes(text: str) -> int:
    """Read an amount of memory: ``1GiB``, ``500 MB``, ``1073741824``.

    Raises:
        ValueError: Not such an amount.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no amount of memory; expected one such as 1GiB, 500MB or 1073741824")
    return int(Decimal(found[1]) * _UNITS[found[2].upper()])


class _UsageError(Exception):
    """The command line asks for something that cannot be."""


def _run(options: argparse.Namespace) -> None:
    from nitrous_ema.outputs import check_outputs, write_outputs

    began = time.monotonic()
    with _usage_errors():
        plan = _plan(options)
        paths = _paths(options, plan)
        dtype = DTYPES[options.dtype] if options.dtype else None
        check_outputs(plan, paths, dtype=dtype, memory_bytes=options.memory)
    _tell_plan(options, plan)
    _give_way(options.nice, plan.trainer)
    options.out.mkdir(parents=True, exist_ok=True)

    def committed(index: int, path: Path) -> None:
        line = json.dumps(_result(plan, index, path, time.monotonic() - began))
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    progress = _Progress() if options.progress or sys.stderr.isatty() else None
    try:
        write_outputs(plan, paths, dtype=dtype, memory_bytes=options.memory, progress=progress, committed=committed)
    finally:
        if progress is not None:
            progress.end()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nitrous_ema.async_.synthesize_worker",
        description="Synthesize averages of any length from a folder of snapshots.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    lengths = parser.add_mutually_exclusive_group(required=True)
    add("snapshots", type=Path, metavar="SNAPSHOTS", help="the snapshot folder")
    lengths.add_argument(
        "--sigma-rel",
        type=_argument(parse_lengths),
        help="lengths, as fractions of the training time: 0.05,0.06,...,0.15",
    )
    lengths.add_argument("--gamma", type=_argument(parse_lengths), help="lengths, as exponents of the profile")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the outputs; made if it is not there")
    add("--step", type=int, help="step at which the averages end; the newest snapshot by default")
    add("--run", help="run whose snapshots are read, with its ancestors; the newest by default")
    add("--exclude", type=int, nargs="+", action="extend", default=[], metavar="STEP", help="steps to leave out")
    add("--dtype", choices=list(DTYPES), help="type of floating tensors; by default as in the model")
    add("--format", choices=("safetensors", "pt"), default="safetensors", help="kind of file (default: safetensors)")
    add("--memory", type=_argument(parse_bytes), default=1 << 30, metavar="SIZE", help="to stay within (default: 1GiB)")
    add("--progress", action="store_true", help="tell the progress also where stderr is no terminal")
    add(
        "--nice",
        choices=("auto", "always", "never"),
        default="auto",
        help="low CPU and I/O priority; by default while the trainer lives on this machine",
    )
    profiles = parser.add_mutually_exclusive_group()
    profiles.add_argument(
        "--sigma-rels", type=_argument(parse_lengths), help="the tracked profiles of a folder of {i}.{step}.pt files"
    )
    profiles.add_argument("--gammas", type=_argument(parse_lengths), help="the same, as exponents")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    lengths = {"sigma_rels": options.sigma_rel, "gammas": options.gamma}
    if options.sigma_rels or options.gammas:
        from nitrous_ema.snapshots.legacy import LegacyFolder
        from nitrous_ema.synthesis.plan import plan_synthesis

        if options.run is not None:
            raise ValueError("--run: folders of {i}.{step}.pt files know no runs; leave it out.")
        folder = LegacyFolder(options.snapshots, sigma_rels=options.sigma_rels, gammas=options.gammas)
        moments = folder.snapshots(exclude=options.exclude)
        target = folder.get(options.step, exclude=options.exclude)
        return plan_synthesis(moments, target=target, excluded=options.exclude, **lengths)

    from nitrous_ema.synthesis.plan import plan_from_store

    return plan_from_store(options.snapshots, step=options.step, run=options.run, exclude=options.exclude, **lengths)


def _paths(options: argparse.Namespace, plan: Plan) -> list[Path]:
    from nitrous_ema.outputs import output_name

    return [options.out / output_name(plan.target.step, each, f".{options.format}") for each in plan.sigma_rels]


def _result(plan: Plan, index: int, path: Path, seconds: float) -> dict[str, object]:
    """What stdout says of one output; others parse these fields."""
    report = plan.report
    return {
        "sigma_rel": plan.sigma_rels[index],
        "gamma": plan.gammas[index],
        "step": plan.target.step,
        "t": plan.target.t,
        "run": plan.target.run,
        "path": str(path),
        "profile_error": float(report.profile_error[index]),
        "weight_l1": float(report.weight_l1[index]),
        "weight_l2": float(report.weight_l2[index]),
        "columns": len(plan.columns),
        "excluded": list(plan.excluded),
        "bytes_read": plan.bytes_to_read,
        "seconds": round(seconds, 6),
    }


def _tell_plan(options: argparse.Namespace, plan: Plan) -> None:
    target = plan.target
    unrelated: list[str] = []
    if not (options.sigma_rels or options.gammas):
        from nitrous_ema.snapshots.store import SnapshotStore

        unrelated = SnapshotStore(options.snapshots).unrelated_runs(options.run)
    steps = len({column.step for column in plan.columns})
    _say(
        f"step {target.step} of run {target.run}: {len(plan.gammas)} averages from {len(plan.columns)} columns of "
        f"{steps} snapshots, {_amount(plan.bytes_to_read)} to read"
    )
    if unrelated:
        _say(f"left out unrelated runs (--run takes one of them): {', '.join(unrelated)}")
    for warning in plan.report.warnings:
        sys.stderr.write(f"{WARNING}{warning}\n")


def _give_way(when: str, trainer: Mapping[str, str | int | float]) -> None:
    """Lower this process's priority, so that a training on the same machine does not notice it."""
    if when == "never" or (when == "auto" and not _lives_here(trainer)):
        return
    import psutil

    process = psutil.Process()
    with suppress(psutil.Error, OSError):
        process.nice(max(_NICENESS, process.nice()))
        if hasattr(process, "ionice"):
            process.ionice(psutil.IOPRIO_CLASS_BE, _LOWEST_BEST_EFFORT)


def _lives_here(trainer: Mapping[str, str | int | float]) -> bool:
    if trainer.get("host") != socket.gethostname():
        return False
    import psutil

    try:
        started = float(psutil.Process(int(trainer["pid"])).create_time())
        return abs(started - float(trainer["started"])) < _SAME_START_SECONDS
    except (psutil.Error, KeyError, ValueError):
        return False


class _Progress:
    """Bytes read, rate and time left, on stderr: one line that is written over on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()
        self._on_terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._told < _PROGRESS_SECONDS:
            return
        self._told = now
        rate = done / max(now - self._began, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if done < total else f"{now - self._began:.1f} s"
        line = f"read {_amount(done)} of {_amount(total)} ({done / total:.0%}), {_amount(rate)}/s, {left}"
        sys.stderr.write(f"\r{line}\x1b[K" if self._on_terminal else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._on_terminal:
            sys.stderr.write("\n")


@contextmanager
def _usage_errors() -> Iterator[None]:
    """A ValueError in here is the user's; elsewhere it would be a bug, and keeps its traceback."""
    try:
        yield
    except ValueError as error:
        raise _UsageError(str(error)) from error


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the work the way Ctrl-C does, with its cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may ask for signals
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """For argparse, which shows the message of its own error class only."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


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
    if count > _MAX_LENGTHS:
        raise ValueError(f"{text!r}: {count} numbers; at most {_MAX_LENGTHS} are taken")
    return [second + step * index for index in range(1, int(count))]


def _amount(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def _say(line: str) -> None:
    sys.stderr.write(f"synthesize: {line}\n")


def _failed(why: str, status: int) -> int:
    _say(f"error: {why}")
    return status


def use_one_thread_per_product() -> None:
    """Make results independent of the number of cores. To be called before numpy is imported, which reads this."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")


if __name__ == "__main__":
    use_one_thread_per_product()
    sys.exit(main())
