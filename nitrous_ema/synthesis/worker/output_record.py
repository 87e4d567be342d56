"""One JSON object for each average: what the worker prints and what a job parses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from nitrous_ema._base import exit_status
from nitrous_ema.synthesis.outputs.reuse import ExpectedOutput
from nitrous_ema.synthesis.plan import Plan
from nitrous_ema.synthesis.worker.partition import WorkPartition

State = Literal["written", "kept", "planned"]


class RecordWriter:
    """What stdout says of the averages of a plan."""

    def __init__(
        self,
        plan: Plan,
        part: WorkPartition,
        expected: Sequence[ExpectedOutput],
        memory: int,
        condition: float,
        began: float,
    ) -> None:
        self._plan = plan
        self._part = part
        self._expected = expected
        self._memory = memory
        self._condition = condition if math.isfinite(condition) else None  # JSON has nothing else
        self._began = began
        self._next = 0

    def add(self, index: int, state: State) -> None:
        """Tell one that is made, and before it those that are kept."""
        while self._next < index:
            self._tell(self._next, "kept")
        self._tell(index, state)

    def end(self) -> None:
        """Tell those that are kept after the last one that was made."""
        while self._next < len(self._expected):
            self._tell(self._next, "kept")

    def _tell(self, index: int, state: State) -> None:
        exit_status.to_stdout(json.dumps(self._result(index, state)) + "\n")
        self._next = index + 1

    def _result(self, index: int, state: State) -> dict[str, object]:
        plan, report, expected = self._plan, self._plan.report, self._expected[index]
        is_made = state == "written"
        return {
            "sigma_rel": plan.sigma_rels[index],
            "gamma": plan.gammas[index],
            "step": plan.target.step,
            "t": plan.target.t,
            "run": plan.target.run,
            "path": str(expected.path),
            "state": state,
            "part": self._part.index + 1,
            "parts": self._part.parts,
            "profile_error": float(report.profile_error[index]),
            "weight_l1": float(report.weight_l1[index]),
            "weight_l2": float(report.weight_l2[index]),
            "rounding": float(report.rounding[index]),
            "condition": self._condition,
            "columns": len(plan.columns),
            "steps_read": list(plan.steps),
            "lower_bound": plan.lower_bound,
            "tolerance": plan.tolerance,
            "excluded": list(plan.excluded),
            "bytes_read": 0 if state == "kept" else plan.bytes_to_read,
            "file_bytes": expected.path.stat().st_size if is_made else expected.num_bytes,
            "memory_bytes": 0 if state == "kept" else self._memory,
            "seconds": round(time.monotonic() - self._began, 6),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One average: written, kept as it was, or foretold."""

    sigma_rel: float
    """Its length, as a fraction of the training time."""
    gamma: float
    """The same as an exponent."""
    step: int
    """Step at which it ends."""
    t: float
    """Training time at which it ends."""
    run: str
    """Run of that snapshot."""
    path: Path
    """The file; of a part, if several processes share the work."""
    state: Literal["written", "kept", "planned"]
    """"kept": it was there already; "planned": it would be written (a dry run)."""
    part: int
    """Which part of the average it is, counted from 1."""
    parts: int
    """Of how many."""
    profile_error: float
    """Distance of its profile from the one asked for, relative to the norm of the latter."""
    weight_l1: float
    """Sum of the absolute weights."""
    weight_l2: float
    """Root of the sum of the squared weights."""
    rounding: float
    """Expected rms rounding error of a weight, relative to its size, from how the snapshots are stored."""
    condition: float | None
    """How nearly the profiles that were read depend on each other, at least 1; None for more than 1024."""
    columns: int
    """Profiles of snapshots that were read."""
    steps_read: tuple[int, ...]
    """Steps of the snapshots that were read for all outputs of this step together, ascending."""
    lower_bound: int
    """No fewer snapshots give all outputs within the tolerance; 1 where that is not known."""
    tolerance: float
    """Relative profile error that reading few snapshots was allowed to add."""
    excluded: tuple[int, ...]
    """Steps left out on request."""
    bytes_read: int
    """Bytes read for all outputs of this step, and all parts, together; 0 if this one was kept."""
    file_bytes: int
    """Size of the file; of a ``.pt`` file that is only planned, of its numbers."""
    memory_bytes: int
    """What reading and computing takes at most; 0 if it was kept."""
    seconds: float
    """Seconds from the worker's start of work until this file was durable."""

    @classmethod
    def parse(cls, line: str) -> Output:
        """Read one line of the worker's stdout."""
        found = json.loads(line)
        known = {field.name: found[field.name] for field in fields(cls)}
        steps = {name: tuple(known[name]) for name in ("excluded", "steps_read")}
        return cls(**{**known, **steps, "path": Path(known["path"])})
