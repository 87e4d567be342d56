"""Run the plans of the synthesis process one after the other: write, reuse or (in a dry run) list their outputs.

Each plan is checked before anything is written. Outputs that exist already are reused with ``--skip-existing``. stdout
gets a record of each output, in the order of the requested lengths: a JSON object, which other programs parse, or for
people a row of a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import format_bytes
from nitrous_ema._base.dtypes import dtype_code
from nitrous_ema._base.processes import process_state
from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.disk_space import remedy
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.synthesis.outputs.reuse import ExpectedOutput, expected_outputs
from nitrous_ema.synthesis.outputs.writer import check_outputs, write_outputs, write_shard
from nitrous_ema.synthesis.plan import Plan
from nitrous_ema.synthesis.streaming import available_cores
from nitrous_ema.synthesis.worker.arguments import WorkerConfig
from nitrous_ema.synthesis.worker.output_record import Output, RecordWriter, print_json
from nitrous_ema.synthesis.worker.partition import WorkPartition
from nitrous_ema.synthesis.worker.reporting import log, log_plan, progress_of

_NICENESS = 10
# The lowest level of ionice's best-effort class. The idle class could wait forever beside a busy trainer.
_LOWEST_BEST_EFFORT = 7


class SynthesisRunner:
    """Synthesizes the averages of plans into files, as a config requests.

    Args:
        config: The command line.
        part: The part of each output that this process writes.
        show: Prints the record of one output.
    """

    def __init__(self, config: WorkerConfig, part: WorkPartition, show: Callable[[Output], None] = print_json) -> None:
        self._config = config
        self._part = part
        self._show = show
        self._began = time.monotonic()
        self._dtype = dtype_code(config.dtype)
        self._threads = config.threads
        if self._threads is None and part.on_this_machine > 1:
            self._threads = max(1, available_cores() // part.on_this_machine)

    def run(self, plan: Plan, paths: Sequence[Path]) -> None:
        """Write the averages of a plan that cannot be reused, and print a record of every output.

        Args:
            plan: Averages of one target step.
            paths: The file of each average.

        Raises:
            UsageError: The averages cannot be written as requested.
            NitrousError: As ``write_outputs``.
        """
        memory_bytes, expected = self._check(plan, paths), self._expected(plan, paths)
        condition = plan.condition()
        records = RecordWriter(plan, self._part, expected, memory_bytes, condition, self._began, self._show)
        reuses = self._config.skip_existing
        missing = [index for index, output in enumerate(expected) if not (reuses and output.is_reusable)]
        if len(missing) < len(paths):
            log(f"step {plan.target.step}: reusing {len(paths) - len(missing)} of {len(paths)} averages")
        if missing:
            log_plan(plan.only(missing), condition, verbose=self._config.verbose)
        if self._config.dry_run:
            size = sum(expected[index].num_bytes for index in missing)
            log(
                f"dry run: would write {format_bytes(size)}, using at most {format_bytes(memory_bytes)} of memory; "
                "nothing was written"
            )
            for index in missing:
                records.add(index, "planned")
        elif missing:
            self._write(plan, paths, missing, records)
        records.end()

    def _check(self, plan: Plan, paths: Sequence[Path]) -> int:
        """Return an upper bound of the memory that the outputs need; raise if they cannot be written as requested."""
        with exit_status.usage_errors():
            if self._part.parts > 1 and any(path.suffix != ".safetensors" for path in paths):
                raise ValueError(
                    "--format: only .safetensors files can be written in parts. Choose safetensors, or one process."
                )
            return check_outputs(
                plan,
                paths,
                dtype=self._dtype,
                memory_bytes=self._config.memory_bytes,
                threads=self._threads,
                accumulate=self._config.accumulate,
            )

    def _expected(self, plan: Plan, paths: Sequence[Path]) -> list[ExpectedOutput]:
        part = self._part
        return expected_outputs(
            plan,
            paths,
            dtype=self._dtype,
            accumulate=self._config.accumulate,
            part=part.index,
            parts=part.parts,
            in_parts=part.parts > 1,
        )

    def _write(self, plan: Plan, paths: Sequence[Path], missing: Sequence[int], records: RecordWriter) -> None:
        config, part = self._config, self._part
        _lower_priority(config.nice, plan.trainer)
        for folder in dict.fromkeys(paths[index].parent for index in missing):
            _make_folder(folder)
        progress = progress_of(plan.target.step, as_json=config.json_progress, as_text=config.text_progress)
        write: Callable[..., None] = write_outputs
        if part.parts > 1:
            write = partial(write_shard, part=part.index, parts=part.parts)
        try:
            with _with_remedy():
                write(
                    plan.only(missing),
                    [paths[index] for index in missing],
                    dtype=self._dtype,
                    memory_bytes=config.memory_bytes,
                    progress=progress,
                    committed=lambda index, path: records.add(missing[index], "written"),
                    threads=self._threads,
                    accumulate=config.accumulate,
                )
        finally:
            if progress is not None:
                progress.end()


def _make_folder(folder: Path) -> None:
    try:
        with _with_remedy(except_for=(FileExistsError, NotADirectoryError)):
            FileSystem().make_folders(folder)
    except (FileExistsError, NotADirectoryError) as error:
        raise NitrousError(
            f"{folder} cannot be the output folder: this path, or one of its parents, is a file. Choose another --out."
        ) from error


@contextmanager
def _with_remedy(except_for: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """Turn an OSError about a file into a NitrousError with a remedy.

    Errors without a file name pass: they come from stdout, whose closed pipe has an exit status of its own.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or isinstance(error, except_for):
            raise
        raise NitrousError(f"{error.filename} cannot be written: {error.strerror}. {remedy(error)}") from error


def _lower_priority(when: str, trainer: Mapping[str, str | int | float]) -> None:
    """Lower the CPU and I/O priority of this process, so that it does not slow down training on the same machine."""
    if when == "never" or (when == "auto" and process_state(trainer) != "alive"):
        return
    import psutil

    process = psutil.Process()
    with suppress(psutil.Error, OSError):  # an optional courtesy: synthesis continues where the system refuses it
        process.nice(max(_NICENESS, process.nice()))
        if hasattr(process, "ionice"):
            process.ionice(psutil.IOPRIO_CLASS_BE, _LOWEST_BEST_EFFORT)
