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
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nitrous_ema import exits
from nitrous_ema.async_.launch import WARNING, Job, Output, launch
from nitrous_ema.processes import fate
from nitrous_ema.sizes import amount, parse_bytes

if TYPE_CHECKING:
    from nitrous_ema.synthesis.plan import Plan

__all__ = ["Job", "Output", "launch", "main", "parse_lengths"]

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_MAX_LENGTHS = 10_000  # of one list: a typing mistake in an ellipsis should not fill the disk
_NICENESS = 10
_LOWEST_BEST_EFFORT = 7  # of ionice; the idle class could wait for ever beside a busy trainer
_PROGRESS_SECONDS = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker.

    Args:
        argv: Command line arguments without the program's name; those of the process by default.

    Returns:
        The exit status, as the module says.
    """
    with _sigterm_interrupts():
        return exits.status_of(
            lambda: _run(_parser().parse_args(argv)),
            _tell_error,
            interrupted="interrupted; outputs that are not listed on stdout were not written.",
            unread="stdout was closed before all outputs were written.",
        )


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


def _run(options: argparse.Namespace) -> int:
    from nitrous_ema.outputs import check_outputs, write_outputs

    began = time.monotonic()
    with exits.usage_errors():
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
    return exits.DONE


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
        type=exits.argument(parse_lengths),
        help="lengths, as fractions of the training time: 0.05,0.06,...,0.15",
    )
    lengths.add_argument("--gamma", type=exits.argument(parse_lengths), help="lengths, as exponents of the profile")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the outputs; made if it is not there")
    add("--step", type=int, help="step at which the averages end; the newest snapshot by default")
    add("--run", help="run whose snapshots are read, with its ancestors; the newest by default")
    add("--exclude", type=int, nargs="+", action="extend", default=[], metavar="STEP", help="steps to leave out")
    add(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="E",
        help="relative profile error that may be added to read fewer snapshots (default: 0.001); 0 reads all",
    )
    add("--dtype", choices=list(DTYPES), help="type of floating tensors; by default as in the model")
    add("--format", choices=("safetensors", "pt"), default="safetensors", help="kind of file (default: safetensors)")
    size = exits.argument(parse_bytes)
    add("--memory", type=size, default=1 << 30, metavar="SIZE", help="to stay within (default: 1GiB)")
    add("--progress", action="store_true", help="tell the progress also where stderr is no terminal")
    add(
        "--nice",
        choices=("auto", "always", "never"),
        default="auto",
        help="low CPU and I/O priority; by default while the trainer lives on this machine",
    )
    profiles = parser.add_mutually_exclusive_group()
    listed = exits.argument(parse_lengths)
    profiles.add_argument("--sigma-rels", type=listed, help="the tracked profiles of a folder of {i}.{step}.pt files")
    profiles.add_argument("--gammas", type=listed, help="the same, as exponents")
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
        return plan_synthesis(moments, target=target, excluded=options.exclude, tolerance=options.tolerance, **lengths)

    from nitrous_ema.synthesis.plan import plan_from_store

    return plan_from_store(
        options.snapshots,
        step=options.step,
        run=options.run,
        exclude=options.exclude,
        tolerance=options.tolerance,
        **lengths,
    )


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
        "rounding": float(report.rounding[index]),
        "columns": len(plan.columns),
        "steps_read": list(plan.steps),
        "lower_bound": plan.lower_bound,
        "tolerance": plan.tolerance,
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
    _say(
        f"step {target.step} of run {target.run}: {len(plan.gammas)} averages from {len(plan.columns)} columns of "
        f"{len(plan.steps)} snapshots, {amount(plan.bytes_to_read)} to read"
    )
    if plan.tolerance > 0:
        _say(
            f"tolerance {plan.tolerance:g}: {len(plan.steps)} of {plan.candidates} snapshots, not less than "
            f"{plan.lower_bound} give all averages so well; profile error {max(plan.report.profile_error):.2g}, with "
            f"all {max(plan.profile_error_of_all):.2g}; rounding times {max(plan.report.weight_l2):.3g}, at the least "
            f"error {max(plan.least_error_l2):.3g}"
        )
    if unrelated:
        _say(f"left out unrelated runs (--run takes one of them): {', '.join(unrelated)}")
    for warning in plan.report.warnings:
        sys.stderr.write(f"{WARNING}{warning}\n")


def _give_way(when: str, trainer: Mapping[str, str | int | float]) -> None:
    """Lower this process's priority, so that a training on the same machine does not notice it."""
    if when == "never" or (when == "auto" and fate(trainer) != "alive"):
        return
    import psutil

    process = psutil.Process()
    with suppress(psutil.Error, OSError):
        process.nice(max(_NICENESS, process.nice()))
        if hasattr(process, "ionice"):
            process.ionice(psutil.IOPRIO_CLASS_BE, _LOWEST_BEST_EFFORT)


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
        line = f"read {amount(done)} of {amount(total)} ({done / total:.0%}), {amount(rate)}/s, {left}"
        sys.stderr.write(f"\r{line}\x1b[K" if self._on_terminal else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._on_terminal:
            sys.stderr.write("\n")


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


def _say(line: str) -> None:
    sys.stderr.write(f"synthesize: {line}\n")


def _tell_error(why: str) -> None:
    _say(f"error: {why}")


def use_one_thread_per_product() -> None:
    """Make results independent of the number of cores. To be called before numpy is imported, which reads this."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")


if __name__ == "__main__":
    use_one_thread_per_product()
    sys.exit(main())
