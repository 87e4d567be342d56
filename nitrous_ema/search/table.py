"""The results of a sweep: one row per length and step."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from nitrous_ema.search.fingerprint import differences

__all__ = ["Row", "SweepTable"]

LARGE_PROFILE_ERROR = 0.05
"""Profile error above which a row is marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result of one average."""

    metric: str
    """Name of the value."""
    run: str
    """Run of the target snapshot; for an old folder, which has no runs, the folder's path."""
    lineage: tuple[tuple[str, int | None], ...]
    """Ancestors of the run, each with the step at which it was left, oldest first; then the run itself with None."""
    step: int
    """Target step, at which the average ends."""
    t: float
    """Training time at the target step."""
    sigma_rel: float
    """Length, as a fraction of the training time."""
    value: float
    """The number that ``evaluate`` returned."""
    maximize: bool
    """Whether higher values are better."""
    profile_error: float
    """Distance of the obtained from the requested profile, relative to the norm of the latter."""
    rounding: float
    """Expected rms rounding error of a weight, relative to its size, from the stored type of the snapshots."""
    tolerance: float
    """Relative profile error that was allowed to be added to read fewer snapshots."""
    excluded: tuple[int, ...]
    """Steps that the caller has excluded."""
    dtype: str
    """Type of the average's floating-point numbers; "model" if each tensor has its type in the model."""
    snapshots_read: int
    """Snapshots read, for all lengths of the pass together."""
    bytes_read: int
    """Bytes read, for all lengths of the pass together."""
    seconds: float
    """Duration of ``evaluate``."""
    path: Path | None = None
    """File of the average; None if it was not stored."""
    evaluate: tuple[tuple[str, str], ...] = ()
    """Fingerprint of the evaluation function: name and digest of each part (see ``fingerprint``)."""

    @property
    def recipe(self) -> tuple[object, ...]:
        """Everything besides step and length that identifies a result."""
        return (self.run, *self._recipe_without_run)

    @property
    def identity(self) -> tuple[object, ...]:
        """Everything that distinguishes a result from others of the same evaluation function."""
        return (*self.recipe, self.step, self.sigma_rel)

    @property
    def is_inaccurate(self) -> bool:
        """Whether the average differs so much from the requested one that its value is of little use."""
        return self.profile_error > LARGE_PROFILE_ERROR

    @property
    def _recipe_without_run(self) -> tuple[object, ...]:
        return (self.metric, self.tolerance, self.excluded, self.dtype)

    def is_alike(self, other: Row) -> bool:
        """Return whether two results belong in one table: same recipe except for the run, and one training history."""
        return (
            self._recipe_without_run == other._recipe_without_run
            and not differences(dict(self.evaluate), dict(other.evaluate))
            and (self._is_before(other) or other._is_before(self))
        )

    def _is_before(self, other: Row) -> bool:
        """Return whether the snapshot of this result is part of the history of another result."""
        left_at = dict(other.lineage).get(self.run, -1)  # None: the history ends with this run
        return left_at is None or self.step <= left_at

    @property
    def loss(self) -> float:
        """The value, with the sign that makes lower values better."""
        return -self.value if self.maximize else self.value


@dataclass(frozen=True, slots=True, repr=False)
class SweepTable:
    """The rows of a sweep, ascending by step and length. Iterating yields the rows; notebooks show a table in HTML."""

    rows: tuple[Row, ...]
    """At least one row."""
    notes: tuple[str, ...] = ()
    """Sentences on unusual results, for the reader of the table."""

    @property
    def best(self) -> Row:
        """The best row of all steps. A value that is not finite is never the best.

        Raises:
            ValueError: No value is finite.
        """
        return _best(self.rows)

    def best_of(self, step: int) -> Row:
        """Return the best row of one step.

        Raises:
            ValueError: The step has no row with a finite value.
        """
        return _best([row for row in self.rows if row.step == step])

    @property
    def steps(self) -> tuple[int, ...]:
        """All steps, ascending."""
        return tuple(dict.fromkeys(row.step for row in self.rows))

    def of_step(self, step: int) -> tuple[Row, ...]:
        """Return the rows of one step, ascending by length."""
        return tuple(row for row in self.rows if row.step == step)

    def records(self) -> list[dict[str, Any]]:
        """Return one dict per row, for ``pandas.DataFrame``."""
        return [asdict(row) for row in self.rows]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as comma-separated values after a header line; an existing file is replaced."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            for record in self.records():
                excluded = " ".join(map(str, record["excluded"]))
                lineage = " ".join(run for run, _ in record["lineage"])
                texts = {"excluded": excluded, "lineage": lineage, "path": record["path"] or ""}
                writer.writerow({**record, **texts, "evaluate": json.dumps(dict(record["evaluate"]))})

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _cells(self) -> list[list[str]]:
        """Return the table as text: a header, then four numbers and a mark per row."""
        best = min(_finite(self.rows), key=lambda row: row.loss, default=None)
        lines = [["step", "sigma_rel", self.rows[0].metric, "profile error", ""]]
        for row in self.rows:
            numbers = [str(row.step), f"{row.sigma_rel:g}", f"{row.value:.6g}", f"{row.profile_error:.1e}"]
            large = f"profile error above {LARGE_PROFILE_ERROR:.0%}" if row.is_inaccurate else ""
            lines.append([*numbers, ", ".join(filter(None, ("<- best" if row is best else "", large)))])
        return lines

    def _repr_html_(self) -> str:
        header, *rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self._cells()]
        header = header.replace("td>", "th>")
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def __str__(self) -> str:
        lines = self._cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["   ".join(map(str.rjust, line[:-1], widths)) + f"   {line[-1]}" for line in lines]
        return "\n".join(line.rstrip() for line in [*text, *self.notes])

    __repr__ = __str__


def _finite(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if math.isfinite(row.value)]


def _best(rows: Sequence[Row]) -> Row:
    finite = _finite(rows)
    if not finite:
        raise ValueError(f"none of {len(rows)} results has a finite value, so there is no best result.")
    return min(finite, key=lambda row: row.loss)
