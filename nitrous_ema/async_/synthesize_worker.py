"""The synthesis process: reads a snapshot folder and writes averages of any length, without a trainer or a GPU.

    python -m nitrous_ema.async_.synthesize_worker SNAPSHOTS --sigma-rel 0.05,0.06,...,0.15 --out DIR

stdout gets one JSON object per output, each on its own line, as soon as that output is durable, and nothing else. All
messages for users go to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such snapshot or run, 4 damaged
snapshot, 130 interrupted (Ctrl-C or SIGTERM; no half-written file remains).

This module imports neither numpy nor torch before ``main`` has parsed the arguments. numpy reads the thread limits that
``python -m`` sets once, when it is loaded; torch is needed for ``.pt`` files only. ``Job``, ``Output`` and ``launch``
are looked up when they are first used, because the process itself does not need them.
"""

from __future__ import annotations

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
    # Ctrl-C during the imports ends the process without a traceback; there is nothing to clean up yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from nitrous_ema._base import exit_status
from nitrous_ema._base.options import parse_lengths, unknown_exclusions
from nitrous_ema.errors import bug
from nitrous_ema.synthesis.worker.arguments import WorkerConfig, parse_arguments
from nitrous_ema.synthesis.worker.output_names import OutputNames
from nitrous_ema.synthesis.worker.partition import WorkPartition, part_of_process
from nitrous_ema.synthesis.worker.reporting import log, log_warning

if TYPE_CHECKING:
    from nitrous_ema.snapshots.snapshot import Snapshot
    from nitrous_ema.synthesis.worker.inputs import LegacySnapshots, StoredSnapshots
    from nitrous_ema.synthesis.worker.job import Job
    from nitrous_ema.synthesis.worker.launch import launch
    from nitrous_ema.synthesis.worker.output_record import Output
    from nitrous_ema.synthesis.worker.runner import SynthesisRunner
else:
    _HOMES = {"Job": "job", "Output": "output_record", "launch": "launch"}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"nitrous_ema.synthesis.worker.{_HOMES[name]}"), name)


__all__ = ["Job", "Output", "launch", "main", "parse_lengths"]

_CLEANUP_SECONDS = 5.0  # after an interrupt; further interrupts within this time are ignored
_DEFAULT_HANDLERS = (signal.default_int_handler, signal.SIG_DFL)


def main(
    argv: Sequence[str] | None = None,
    *,
    program: str = "python -m nitrous_ema.async_.synthesize_worker",
    show: Callable[[Output], None] | None = None,
) -> int:
    """Run the worker.

    Args:
        argv: Command line arguments without the program's name; None takes those of the process.
        program: How the user has called it, for the help.
        show: Prints each output instead of its JSON object, unless ``--json`` is among the arguments.

    Returns:
        The exit status, as listed in the docstring of this module.
    """
    with _interruptible():
        return exit_status.run_program(
            lambda: _run(parse_arguments(argv, program), show),
            lambda message: log(f"error: {message}"),
            interrupted="interrupted; outputs that are not listed on stdout were not written.",
            unread="stdout was closed before all outputs were written.",
        )


def _run(config: WorkerConfig, show: Callable[[Output], None] | None) -> int:
    from nitrous_ema.synthesis.requested_lengths import lengths_of
    from nitrous_ema.synthesis.worker.inputs import open_inputs
    from nitrous_ema.synthesis.worker.output_record import print_json
    from nitrous_ema.synthesis.worker.runner import SynthesisRunner

    with exit_status.usage_errors():
        names = OutputNames(config.out, config.format)
        part = config.part or part_of_process(os.environ)
        lengths = lengths_of(config.gammas, config.sigma_rels, ("--gamma", "--sigma-rel"))
        inputs = open_inputs(config)
        _check_parts(config, part)
    if part.parts > 1:
        log(f"writing part {part.index + 1} of {part.parts} of each average")
    runner = SynthesisRunner(config, part, print_json if show is None or config.as_json else show)
    if config.follow:
        _follow(config, inputs, names, lengths, runner)
    else:
        _run_existing(config, inputs, names, lengths, runner, part)
    return exit_status.DONE


def _run_existing(
    config: WorkerConfig,
    inputs: StoredSnapshots | LegacySnapshots,
    names: OutputNames,
    lengths: Sequence[tuple[float, float]],
    runner: SynthesisRunner,
    part: WorkPartition,
) -> None:
    """Synthesize the averages that end at snapshots which exist now."""
    with exit_status.usage_errors():
        targets: Sequence[Any] = inputs.targets(config.steps)
        if part.parts > 1 and config.steps in (None, "all") and not inputs.is_closed:
            raise ValueError(
                "--step is required for processes that share the work during training, because each process may find "
                "a different newest snapshot. Pass the target steps."
            )
        paths = names.of_all(targets, lengths)
    if note := inputs.legacy_note():
        log_warning(note)
    if unrelated := inputs.unrelated_runs():
        log(f"ignoring unrelated runs (select one with --run): {', '.join(unrelated)}")
    if config.exclude and (unknown := unknown_exclusions(config.exclude, inputs.steps())):
        log(unknown)
    for target, target_paths in zip(targets, paths, strict=True):
        with exit_status.usage_errors():
            plan = inputs.plan(target)
        runner.run(plan, target_paths)


def _check_parts(config: WorkerConfig, part: WorkPartition) -> None:
    if part.parts > 1 and config.follow:
        raise ValueError(
            "--follow cannot be combined with several processes: each process would follow at its own pace and read "
            "other snapshots if some are dropped meanwhile. Follow with one process, or pass existing steps (--step)."
        )


def _follow(
    config: WorkerConfig,
    inputs: StoredSnapshots | LegacySnapshots,
    names: OutputNames,
    lengths: Sequence[tuple[float, float]],
    runner: SynthesisRunner,
) -> None:
    """Synthesize at new snapshots until training has ended."""
    from nitrous_ema.synthesis.worker.follow import RunFollower
    from nitrous_ema.synthesis.worker.inputs import StoredSnapshots

    if not isinstance(inputs, StoredSnapshots):
        raise bug("a legacy folder cannot be followed")
    stored = inputs
    with exit_status.usage_errors():
        if names.fields and not {"step", "t"} & set(names.fields):
            raise ValueError(f"--out {config.out!r}: with --follow each step needs its own file name. Add {{step}}.")
        if near := [step for step in config.steps or () if isinstance(step, str) and config.steps != "all"]:
            raise ValueError(f"--step {near[0]} has no meaning with --follow, which waits for steps. Pass a number.")

    def synthesize(target: Snapshot) -> None:
        with exit_status.usage_errors():
            (paths,) = names.of_all([target], lengths)
            plan = stored.plan(target)
        runner.run(plan, paths)

    RunFollower(
        snapshots=stored,
        steps=config.steps,
        synthesize=synthesize,
        idle_seconds=config.idle_seconds,
        look_every_seconds=config.look_every_seconds,
    ).follow()


@contextmanager
def _interruptible(clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Handle SIGTERM and SIGINT by a KeyboardInterrupt, at most one in ``_CLEANUP_SECONDS``.

    A terminal and torchrun, for example, may both signal the same process, and the second signal must not interrupt the
    removal of temporary files. Signals after that time raise again, because Python drops a KeyboardInterrupt that is
    raised while it runs a destructor.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install signal handlers
        return
    last = -_CLEANUP_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if (now := clock()) - last >= _CLEANUP_SECONDS:
            last = now
            raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) in _DEFAULT_HANDLERS:  # a shell starts background jobs with SIGINT ignored
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def use_one_thread_per_product() -> None:
    """Limit BLAS to one thread, so that results do not depend on the number of cores. Must precede numpy's import."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")


if __name__ == "__main__":
    use_one_thread_per_product()
    status = main()
    if status == exit_status.INTERRUPTED:
        # The interpreter only joins threads from here on; another signal would replace the exit status.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
