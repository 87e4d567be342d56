"""The averages of one plan after the other: written, kept where they are there already, or foretold.

stdout gets one JSON object for each average, in the order in which they were asked for; others parse these.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import format_bytes
from nitrous_ema._base.dtypes import dtype_code
from nitrous_ema._base.processes import process_state
from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.disk_space import remedy
from nitrous_ema.synthesis.outputs.reuse import ExpectedOutput, expected_outputs
from nitrous_ema.synthesis.outputs.writer import check_outputs, write_outputs, write_shard
from nitrous_ema.synthesis.plan import Plan
from nitrous_ema.synthesis.streaming import available_cores
from nitrous_ema.synthesis.worker.output_record import RecordWriter
from nitrous_ema.synthesis.worker.partition import WorkPartition
from nitrous_ema.synthesis.worker.reporting import log, log_plan, progress_of

_NICENESS = 10
_LOWEST_BEST_EFFORT = 7  # of ionice; the idle class could wait for ever beside a busy trainer


class SynthesisRunner:
    """Makes averages as the command line says.

    Args:
        options: The command line.
        part: Which part of them.
    """

    def __init__(self, options: argparse.Namespace, part: WorkPartition) -> None:
        self._options = options
        self._part = part
        self._began = time.monotonic()
        self._dtype = dtype_code(options.dtype)
        self._threads: int | None = options.threads
        if self._threads is None and part.on_this_machine > 1:
            self._threads = max(1, available_cores() // part.on_this_machine)

    def make(self, plan: Plan, paths: Sequence[Path]) -> None:
        """Make the averages of a plan, but for those that are to be kept.

        Raises:
            UsageError: They cannot be made as asked.
            NitrousError: As ``write_outputs``.
        """
        options = self._options
        memory, expected = self._checked(plan, paths), self._expected(plan, paths)
        condition = plan.condition()
        lines = RecordWriter(plan, self._part, expected, memory, condition, self._began)
        missing = [index for index, each in enumerate(expected) if not (options.skip_existing and each.is_there)]
        if len(missing) < len(paths):
            log(f"step {plan.target.step}: {len(paths) - len(missing)} of {len(paths)} averages are there already")
        if missing:
            log_plan(plan.only(missing), condition)
        if options.dry_run:
            size = sum(expected[index].num_bytes for index in missing)
            log(f"dry run: {format_bytes(size)} to write, at most {format_bytes(memory)} of memory; nothing is written")
            for index in missing:
                lines.add(index, "planned")
        elif missing:
            self._write(plan, paths, missing, lines)
        lines.end()

    def _checked(self, plan: Plan, paths: Sequence[Path]) -> int:
        """The memory that it will take at most, if it can be done."""
        with exit_status.usage_errors():
            if self._part.parts > 1 and any(path.suffix != ".safetensors" for path in paths):
                raise ValueError("--format: only .safetensors files are written in parts; choose that, or one process.")
            return check_outputs(
                plan,
                paths,
                dtype=self._dtype,
                memory_bytes=self._options.memory,
                threads=self._threads,
                accumulate=self._options.accumulate,
            )

    def _expected(self, plan: Plan, paths: Sequence[Path]) -> list[ExpectedOutput]:
        part = self._part
        return expected_outputs(
            plan,
            paths,
            dtype=self._dtype,
            accumulate=self._options.accumulate,
            part=part.index,
            parts=part.parts,
            in_parts=part.parts > 1,
        )

    def _write(self, plan: Plan, paths: Sequence[Path], missing: Sequence[int], lines: RecordWriter) -> None:
        options, part = self._options, self._part
        _give_way(options.nice, plan.trainer)
        for folder in dict.fromkeys(paths[index].parent for index in missing):
            _make_folder(folder)
        progress = progress_of(plan.target.step, as_json=options.progress_json, as_text=options.progress)
        chosen = plan.only(missing), [paths[index] for index in missing]
        how = {
            "dtype": self._dtype,
            "memory_bytes": options.memory,
            "progress": progress,
            "committed": lambda index, path: lines.add(missing[index], "written"),
            "threads": self._threads,
            "accumulate": options.accumulate,
        }
        try:
            with _refusals_told():
                if part.parts > 1:
                    write_shard(*chosen, part=part.index, parts=part.parts, **how)
                else:
                    write_outputs(*chosen, **how)
        finally:
            if progress is not None:
                progress.end()


def _make_folder(folder: Path) -> None:
    try:
        with _refusals_told(but=(FileExistsError, NotADirectoryError)):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NitrousError(
            f"{folder} cannot be the folder of the averages: it, or what should hold it, is a file. "
            "Choose another --out."
        ) from error


@contextmanager
def _refusals_told(but: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """What the system refuses is told with a remedy; what concerns no file (stdout) passes."""
    try:
        yield
    except OSError as error:
        if error.filename is None or isinstance(error, but):
            raise
        raise NitrousError(f"{error.filename} cannot be written: {error.strerror}. {remedy(error)}") from error


def _give_way(when: str, trainer: Mapping[str, str | int | float]) -> None:
    """Lower this process's priority, so that a training on the same machine does not notice it."""
    if when == "never" or (when == "auto" and process_state(trainer) != "alive"):
        return
    import psutil

    process = psutil.Process()
    with suppress(psutil.Error, OSError):
        process.nice(max(_NICENESS, process.nice()))
        if hasattr(process, "ionice"):
            process.ionice(psutil.IOPRIO_CLASS_BE, _LOWEST_BEST_EFFORT)
