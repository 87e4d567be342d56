"""The JSON object of each output: the worker prints one per line on stdout, and a job parses them.

``Output`` is the whole contract: its fields are the keys of the object, in their order. ``RecordWriter`` builds an
``Output`` and prints it; ``Job`` parses the line back into one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nitrous_ema._base import exit_status
from nitrous_ema.snapshots.filesystem import FileSystem

if TYPE_CHECKING:
    from nitrous_ema.synthesis.outputs.reuse import ExpectedOutput
    from nitrous_ema.synthesis.plan import Plan
    from nitrous_ema.synthesis.worker.partition import WorkPartition

State = Literal["written", "kept", "planned"]
"""``"kept"``: the output existed and was reused; ``"planned"``: it would be written (a dry run)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One average that the worker wrote, reused or planned."""

    sigma_rel: float
    """Its length, as a fraction of the training time."""
    gamma: float
    """The same length as an exponent."""
    step: int
    """Its target step."""
    t: float
    """Training time at the target step."""
    run: str
    """Run of the target snapshot."""
    path: Path
    """The file; the file of one part if several processes share the work."""
    state: State
    """``"kept"``: the output existed and was reused; ``"planned"``: it would be written (a dry run)."""
    part: int
    """Which part of the average the file holds, counted from 1."""
    parts: int
    """Number of parts of the average."""
    profile_error: float
    """L2 distance between its profile and the requested one, relative to the norm of the requested one."""
    weight_l1: float
    """Sum of the absolute weights."""
    weight_l2: float
    """Root of the sum of the squared weights."""
    rounding: float
    """Expected rms rounding error of a weight of the model, relative to its size, from the stored type."""
    condition: float | None
    """Condition number of the profiles that were read together, at least 1; None for more than 1024 of them."""
    columns: int
    """Number of columns (profiles of snapshots) that were read."""
    steps_read: tuple[int, ...]
    """Steps of the snapshots that were read for all outputs of this step together, ascending."""
    lower_bound: int
    """Proven minimum of snapshots for all outputs of this step within the tolerance; 1 where no bound is known."""
    tolerance: float
    """Relative profile error that reading few snapshots was allowed to add."""
    excluded: tuple[int, ...]
    """Steps that were ignored on request."""
    nonfinite: tuple[int, ...]
    """Steps that were read and have stored averages with values that are not finite: then the output has them, too."""
    bytes_read: int
    """Bytes read for all outputs and all parts of this step together; 0 if this output was reused."""
    file_bytes: int
    """Size of the file; for a ``.pt`` file that is only planned, the size of its numbers."""
    memory_bytes: int
    """Upper bound of the memory for reading and computing; 0 if this output was reused."""
    seconds: float
    """Seconds from the start of the worker's work until this file was durable."""

    def to_json(self) -> str:
        """Return the JSON object of this output, on one line."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({**values, "path": str(self.path)})

    @classmethod
    def parse(cls, line: str) -> Output:
        """Parse one line of the worker's stdout. Keys that this version does not know are ignored."""
        found = json.loads(line)
        known = {field.name: found[field.name] for field in fields(cls)}
        steps = {name: tuple(known[name]) for name in ("excluded", "nonfinite", "steps_read")}
        return cls(**{**known, **steps, "path": Path(known["path"])})


def print_json(output: Output) -> None:
    """Print the JSON object of an output to stdout.

    Raises:
        BrokenPipeError: The reader of stdout has closed it.
        NitrousError: stdout cannot be written, for example on a full disk.
    """
    exit_status.to_stdout(output.to_json() + "\n")


class RecordWriter:
    """Prints the outputs of one plan, in the order of the requested lengths.

    Args:
        plan: The averages, all of one target step.
        part: The part that this process writes.
        expected: The file of each average.
        memory_bytes: Upper bound of the memory for reading and computing.
        condition: Condition number of the plan's columns; NaN where it is not computed.
        began: ``time.monotonic()`` at the start of the worker's work.
        show: Prints one output.
    """

    def __init__(
        self,
        plan: Plan,
        part: WorkPartition,
        expected: Sequence[ExpectedOutput],
        memory_bytes: int,
        condition: float,
        began: float,
        show: Callable[[Output], None],
    ) -> None:
        self._plan = plan
        self._part = part
        self._expected = expected
        self._memory_bytes = memory_bytes
        self._condition = condition if math.isfinite(condition) else None  # JSON has no NaN
        self._began = began
        self._show = show
        self._next = 0

    def add(self, index: int, state: State) -> None:
        """Print one output, after the reused outputs that precede it; raises as ``print_json``."""
        while self._next < index:
            self._print(self._next, "kept")
        self._print(index, state)

    def end(self) -> None:
        """Print the reused outputs that follow the last one that was added; raises as ``add``."""
        while self._next < len(self._expected):
            self._print(self._next, "kept")

    def _print(self, index: int, state: State) -> None:
        self._show(self._output(index, state))
        self._next = index + 1

    def _output(self, index: int, state: State) -> Output:
        plan, report, expected = self._plan, self._plan.report, self._expected[index]
        return Output(
            sigma_rel=plan.sigma_rels[index],
            gamma=plan.gammas[index],
            step=plan.target.step,
            t=plan.target.t,
            run=plan.target.run,
            path=expected.path,
            state=state,
            part=self._part.index + 1,
            parts=self._part.parts,
            profile_error=float(report.profile_error[index]),
            weight_l1=float(report.weight_l1[index]),
            weight_l2=float(report.weight_l2[index]),
            rounding=float(report.rounding[index]),
            condition=self._condition,
            columns=len(plan.columns),
            steps_read=plan.steps,
            lower_bound=plan.lower_bound,
            tolerance=plan.tolerance,
            excluded=plan.excluded,
            nonfinite=plan.nonfinite_steps,
            bytes_read=0 if state == "kept" else plan.bytes_to_read,
            file_bytes=FileSystem().status(expected.path).st_size if state == "written" else expected.num_bytes,
            memory_bytes=0 if state == "kept" else self._memory_bytes,
            seconds=round(time.monotonic() - self._began, 6),
        )
