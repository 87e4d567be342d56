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

from nitrous_ema import exits
from nitrous_ema.async_.arguments import parse_arguments, parse_lengths
from nitrous_ema.async_.output_names import OutputNames
from nitrous_ema.async_.parts import Part, part_of_process
from nitrous_ema.async_.telling import say
from nitrous_ema.given import unknown_exclusions

if TYPE_CHECKING:
    from nitrous_ema.async_.folders import OldSnapshots, StoredSnapshots, Wanted
    from nitrous_ema.async_.job import Job, Output
    from nitrous_ema.async_.launch import launch
    from nitrous_ema.async_.making import Maker
    from nitrous_ema.snapshots.snapshot import Snapshot
else:
    _HOMES = {"Job": "job", "Output": "job", "launch": "launch"}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"nitrous_ema.async_.{_HOMES[name]}"), name)


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
        return exits.status_of(
            lambda: _run(parse_arguments(argv)),
            lambda why: say(f"error: {why}"),
            interrupted="interrupted; outputs that are not listed on stdout were not written.",
            unread="stdout was closed before all outputs were written.",
        )


def _run(options: argparse.Namespace) -> int:
    from nitrous_ema.async_.folders import Wanted
    from nitrous_ema.async_.making import Maker
    from nitrous_ema.synthesis.plan import lengths_of

    with exits.usage_errors():
        names = OutputNames(options.out, options.format)
        part = options.part or part_of_process(os.environ)
        lengths = lengths_of(options.gamma, options.sigma_rel)
        wanted = Wanted(
            sigma_rels=options.sigma_rel, gammas=options.gamma, exclude=options.exclude, tolerance=options.tolerance
        )
        folder = _folder(options, wanted)
        _check_parts(options, part)
    maker = Maker(options, part)
    if options.follow:
        options.skip_existing = True
        _follow(options, folder, names, lengths, maker)
    else:
        _make_all(options, folder, names, lengths, maker, part)
    return exits.DONE


def _make_all(
    options: argparse.Namespace,
    folder: StoredSnapshots | OldSnapshots,
    names: OutputNames,
    lengths: Sequence[tuple[float, float]],
    maker: Maker,
    part: Part,
) -> None:
    """The averages that end at snapshots which are there."""
    with exits.usage_errors():
        targets: Sequence[Any] = folder.targets(options.step)
        if part.parts > 1 and options.step in (None, "all") and not folder.is_closed:
            raise ValueError(
                "--step: while training goes on, processes that share the work may find different snapshots to be the "
                "newest; say at which steps the averages end."
            )
        paths = names.of_all(targets, lengths)
    if unrelated := folder.unrelated_runs():
        say(f"left out unrelated runs (--run takes one of them): {', '.join(unrelated)}")
    if options.exclude and (unknown := unknown_exclusions(options.exclude, folder.steps())):
        say(unknown)
    for target, paths_there in zip(targets, paths, strict=True):
        with exits.usage_errors():
            plan = folder.plan(target)
        maker.make(plan, paths_there)


def _folder(options: argparse.Namespace, wanted: Wanted) -> StoredSnapshots | OldSnapshots:
    from nitrous_ema.async_.folders import OldSnapshots, StoredSnapshots

    if options.sigma_rels or options.gammas:
        return OldSnapshots(options.snapshots, wanted, sigma_rels=options.sigma_rels, gammas=options.gammas)
    return StoredSnapshots(options.snapshots, wanted, options.run)


def _check_parts(options: argparse.Namespace, part: Part) -> None:
    if part.parts > 1 and options.follow:
        raise ValueError(
            "--follow: each process would follow at its own pace, and read other snapshots where some are dropped "
            "meanwhile. Follow with one process, or start several for steps that are there."
        )


def _follow(
    options: argparse.Namespace,
    folder: StoredSnapshots | OldSnapshots,
    names: OutputNames,
    lengths: Sequence[tuple[float, float]],
    maker: Maker,
) -> None:
    from nitrous_ema.async_.folders import StoredSnapshots
    from nitrous_ema.async_.following_runs import Follower

    if not isinstance(folder, StoredSnapshots):
        raise RuntimeError("an old folder is followed; this is a bug of nitrous_ema, please report it.")
    stored = folder
    with exits.usage_errors():
        if names.fields and not {"step", "t"} & set(names.fields):
            raise ValueError(f"--out {options.out!r}: with --follow every step needs a name of its own; use {{step}}.")

    def make(target: Snapshot) -> None:
        with exits.usage_errors():
            (paths,) = names.of_all([target], lengths)
            plan = stored.plan(target)
        maker.make(plan, paths)

    Follower(
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
    exit_status = main()
    if exit_status == exits.INTERRUPTED:  # nothing is left to be ended but threads
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
    sys.exit(exit_status)
