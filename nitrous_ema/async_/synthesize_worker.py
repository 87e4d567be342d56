"""The synthesis process: reads a snapshot folder, writes averages of any length, needs no trainer and no GPU.

    python -m nitrous_ema.async_.synthesize_worker SNAPSHOTS --sigma-rel 0.05,0.06,...,0.15 --out DIR

stdout carries one JSON object per output, each on its own line, as soon as that output is durable, and nothing else.
Everything said to people goes to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such snapshot or run,
4 damaged snapshot, 130 interrupted (Ctrl-C or SIGTERM; nothing half-written stays behind).

Nothing heavy is imported before main() has read the arguments: numpy must find the thread limits that ``python -m``
sets, and torch is needed for ``.pt`` files only. Nor is what starts such a process, which is looked up when it is used.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback, nothing to clean up

from nitrous_ema._base import exit_status
from nitrous_ema._base.options import parse_lengths, unknown_exclusions
from nitrous_ema.synthesis.worker.arguments import parse_arguments
from nitrous_ema.synthesis.worker.output_names import OutputNames
from nitrous_ema.synthesis.worker.partition import WorkPartition, part_of_process
from nitrous_ema.synthesis.worker.reporting import log

if TYPE_CHECKING:
    from nitrous_ema.snapshots.snapshot import Snapshot
    from nitrous_ema.synthesis.worker.inputs import LegacySnapshots, RequestedAverages, StoredSnapshots
    from nitrous_ema.synthesis.worker.job import Job
    from nitrous_ema.synthesis.worker.launch import launch
    from nitrous_ema.synthesis.worker.output_record import Output
    from nitrous_ema.synthesis.worker.runner import SynthesisRunner
else:
    _HOMES = {"Job": "job", "Output": "job", "launch": "launch"}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"nitrous_ema.synthesis.worker.{_HOMES[name]}"), name)


__all__ = ["Job", "Output", "launch", "main", "parse_lengths"]

_UNDISTURBED_SECONDS = 5.0
_UNCLAIMED = (signal.default_int_handler, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker.

    Args:
        argv: Command line arguments without the program's name; those of the process by default.

    Returns:
        The exit status, as the module says.
    """
    with _interruptible():
        return exit_status.run_program(
            lambda: _run(parse_arguments(argv)),
            lambda why: log(f"error: {why}"),
            interrupted="interrupted; outputs that are not listed on stdout were not written.",
            unread="stdout was closed before all outputs were written.",
        )


def _run(options: argparse.Namespace) -> int:
    from nitrous_ema.synthesis.plan import lengths_of
    from nitrous_ema.synthesis.worker.inputs import RequestedAverages
    from nitrous_ema.synthesis.worker.runner import SynthesisRunner

    with exit_status.usage_errors():
        names = OutputNames(options.out, options.format)
        part = options.part or part_of_process(os.environ)
        lengths = lengths_of(options.gamma, options.sigma_rel)
        wanted = RequestedAverages(
            sigma_rels=options.sigma_rel, gammas=options.gamma, exclude=options.exclude, tolerance=options.tolerance
        )
        folder = _folder(options, wanted)
        _check_parts(options, part)
    maker = SynthesisRunner(options, part)
    if options.follow:
        options.skip_existing = True
        _follow(options, folder, names, lengths, maker)
    else:
        _make_all(options, folder, names, lengths, maker, part)
    return exit_status.DONE


def _make_all(
    options: argparse.Namespace,
    folder: StoredSnapshots | LegacySnapshots,
    names: OutputNames,
    lengths: Sequence[tuple[float, float]],
    maker: SynthesisRunner,
    part: WorkPartition,
) -> None:
    """The averages that end at snapshots which are there."""
    with exit_status.usage_errors():
        targets: Sequence[Any] = folder.targets(options.step)
        if part.parts > 1 and options.step in (None, "all") and not folder.is_closed:
            raise ValueError(
                "--step: while training goes on, processes that share the work may find different snapshots to be the "
                "newest; say at which steps the averages end."
            )
        paths = names.of_all(targets, lengths)
    if unrelated := folder.unrelated_runs():
        log(f"left out unrelated runs (--run takes one of them): {', '.join(unrelated)}")
    if options.exclude and (unknown := unknown_exclusions(options.exclude, folder.steps())):
        log(unknown)
    for target, paths_there in zip(targets, paths, strict=True):
        with exit_status.usage_errors():
            plan = folder.plan(target)
        maker.make(plan, paths_there)


def _folder(options: argparse.Namespace, wanted: RequestedAverages) -> StoredSnapshots | LegacySnapshots:
    from nitrous_ema.synthesis.worker.inputs import LegacySnapshots, StoredSnapshots

    if options.sigma_rels or options.gammas:
        return LegacySnapshots(options.snapshots, wanted, sigma_rels=options.sigma_rels, gammas=options.gammas)
    return StoredSnapshots(options.snapshots, wanted, options.run)


def _check_parts(options: argparse.Namespace, part: WorkPartition) -> None:
    if part.parts > 1 and options.follow:
        raise ValueError(
            "--follow: each process would follow at its own pace, and read other snapshots where some are dropped "
            "meanwhile. Follow with one process, or start several for steps that are there."
        )


def _follow(
    options: argparse.Namespace,
    folder: StoredSnapshots | LegacySnapshots,
    names: OutputNames,
    lengths: Sequence[tuple[float, float]],
    maker: SynthesisRunner,
) -> None:
    from nitrous_ema.synthesis.worker.follow import RunFollower
    from nitrous_ema.synthesis.worker.inputs import StoredSnapshots

    if not isinstance(folder, StoredSnapshots):
        raise RuntimeError("an old folder is followed; this is a bug of nitrous_ema, please report it.")
    stored = folder
    with exit_status.usage_errors():
        if names.fields and not {"step", "t"} & set(names.fields):
            raise ValueError(f"--out {options.out!r}: with --follow every step needs a name of its own; use {{step}}.")

    def make(target: Snapshot) -> None:
        with exit_status.usage_errors():
            (paths,) = names.of_all([target], lengths)
            plan = stored.plan(target)
        maker.make(plan, paths)

    RunFollower(
        snapshots=stored,
        steps=options.step,
        make=make,
        idle_seconds=options.idle,
        look_every_seconds=options.look_every,
    ).follow()


@contextmanager
def _interruptible(clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """SIGTERM ends the work the way Ctrl-C does. More of either, right after, do not disturb the cleaning up.

    A terminal and torchrun, say, both signal the same processes. Later ones count again: an interrupt that comes while
    Python runs a destructor is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may ask for signals
        return
    last = -_UNDISTURBED_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if (now := clock()) - last >= _UNDISTURBED_SECONDS:
            last = now
            raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) in _UNCLAIMED:  # jobs in the background ignore it
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def use_one_thread_per_product() -> None:
    """Make results independent of the number of cores. To be called before numpy is imported, which reads this."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")


if __name__ == "__main__":
    use_one_thread_per_product()
    status = main()
    if status == exit_status.INTERRUPTED:  # nothing is left to be ended but threads
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
    sys.exit(status)
