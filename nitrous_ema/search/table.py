"""What a sweep found: one row per length and step."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Row", "SweepTable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One average and what it is worth."""

    metric: str
    """Name of the value."""
    run: str
    """Run of the snapshot at which the average ends; the folder where snapshots know no runs."""
    lineage: tuple[tuple[str, int | None], ...]
    """That run's ancestors, each with the step at which it was left, oldest first; then the run itself with None."""
    step: int
    """Step at which the average ends."""
    t: float
    """Training time at which it ends."""
    sigma_rel: float
    """Its length, as a fraction of the training time."""
    value: float
    """What ``evaluate`` returned."""
    maximize: bool
    """Whether higher is better."""
    profile_error: float
    """Distance of its profile from the one asked for, relative to the norm of the latter."""
    rounding: float
    """Expected rms rounding error of a weight, relative to its size, from how the snapshots are stored."""
    tolerance: float
    """Relative profile error that reading few snapshots was allowed to add."""
    excluded: tuple[int, ...]
    """Steps left out on request."""
    dtype: str
    """Type that the floating numbers of the average were rounded to; "model" if each tensor had the model's own."""
    snapshots_read: int
    """Snapshots that were read, for all lengths of the pass together."""
    bytes_read: int
    """Bytes that were read for all lengths of the pass together."""
    seconds: float
    """Seconds that ``evaluate`` took."""
    path: Path | None = None
    """The average's file, where it was kept."""

    @property
    def recipe(self) -> tuple[object, ...]:
        """What must agree for two results to be the same one, apart from step and length."""
        return (self.run, *self._way)

    @property
    def _way(self) -> tuple[object, ...]:
        """The same, whatever the run."""
        return (self.metric, self.tolerance, self.excluded, self.dtype)

    def is_alike(self, other: Row) -> bool:
        """Whether two results belong into one table: made in the same way, of one history of training."""
        return self._way == other._way and (self._is_before(other) or other._is_before(self))

    def _is_before(self, other: Row) -> bool:
        """Whether the other one's history has this result's snapshot."""
        left_at = dict(other.lineage).get(self.run, -1)
        return left_at is None or self.step <= left_at

    @property
    def loss(self) -> float:
        """The value with the sign that makes lower better."""
        return -self.value if self.maximize else self.value


@dataclass(frozen=True, slots=True, repr=False)
class SweepTable:
    """The rows of a sweep, ascending by step and length. ``str()`` is a text table, and so is what a notebook shows."""

    rows: tuple[Row, ...]
    """At least one."""
    notes: tuple[str, ...] = ()
    """Sentences on what may surprise."""

    @property
    def best(self) -> Row:
        """The best row of all steps. Values that are not finite never are.

        Raises:
            ValueError: No value is finite.
        """
        return _best(self.rows)

    def best_of(self, step: int) -> Row:
        """The best row of one step.

        Raises:
            ValueError: It has none with a finite value.
        """
        return _best([row for row in self.rows if row.step == step])

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps, ascending."""
        return tuple(dict.fromkeys(row.step for row in self.rows))

    def of_step(self, step: int) -> tuple[Row, ...]:
        """The rows of one step, ascending by length."""
        return tuple(row for row in self.rows if row.step == step)

    def records(self) -> list[dict[str, Any]]:
        """One dict per row, as ``pandas.DataFrame`` takes them."""
        return [asdict(row) for row in self.rows]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as comma-separated values, with a line of names; replaces a file of that name."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            for record in self.records():
                excluded = " ".join(map(str, record["excluded"]))
                lineage = " ".join(run for run, _ in record["lineage"])
                writer.writerow({**record, "excluded": excluded, "lineage": lineage, "path": record["path"] or ""})

    def __str__(self) -> str:
        best = min(_finite(self.rows), key=lambda row: row.loss, default=None)
        lines = [["step", "sigma_rel", self.rows[0].metric, "profile error", ""]]
        for row in self.rows:
            numbers = [str(row.step), f"{row.sigma_rel:g}", f"{row.value:.6g}", f"{row.profile_error:.1e}"]
            lines.append([*numbers, "<- best" if row is best else ""])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["   ".join(map(str.rjust, line[:-1], widths)) + f"   {line[-1]}" for line in lines]
        return "\n".join(line.rstrip() for line in [*text, *self.notes])

    __repr__ = __str__


def _finite(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if math.isfinite(row.value)]


def _best(rows: Sequence[Row]) -> Row:
    finite = _finite(rows)
    if not finite:
        raise ValueError(f"none of {len(rows)} results has a finite value, so none is the best.")
    return min(finite, key=lambda row: row.loss)
