"""The search for the best length at one target step of a sweep."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitrous_ema.errors import EvaluationError
from nitrous_ema.search.known_results import KnownResults
from nitrous_ema.search.progress import SweepProgress
from nitrous_ema.search.refinement import next_length
from nitrous_ema.search.source import SnapshotSource
from nitrous_ema.search.table import Row
from nitrous_ema.snapshots.filesystem import FileSystem, is_there
from nitrous_ema.synthesis import Plan
from nitrous_ema.synthesis.outputs.reader import read_average
from nitrous_ema.synthesis.outputs.reuse import expected_outputs
from nitrous_ema.synthesis.outputs.writer import output_name, write_outputs

if TYPE_CHECKING:
    from nitrous_ema.averaging.model_loan import ModelLoan
    from nitrous_ema.snapshots.legacy.folder import LegacySnapshot
    from nitrous_ema.snapshots.snapshot import Snapshot

_MODEL_DTYPES = "model"  # value of Row.dtype if no dtype is requested


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSearch:
    """The search for the best length at one target step."""

    source: SnapshotSource
    evaluate: Callable[[Any], Any]
    loan: ModelLoan | None
    """Holds the averages; None if ``evaluate`` takes a state_dict."""
    maximize: bool
    metric: str
    known: KnownResults
    dtype: str | None
    memory_bytes: int
    told: Callable[[Row], object] | None
    progress: SweepProgress
    target: Snapshot | LegacySnapshot
    out: Path
    """Folder of the averages."""
    stores_averages: bool
    """Whether averages stay in ``out`` after their evaluation."""
    passes: dict[float, tuple[float, ...]]
    """For each length, the lengths that are synthesized in one pass with it; grows."""
    warnings: list[str]
    """Warnings of the plans; grows."""

    def run_all(self, lengths: Sequence[float], refine: int, at_once: int) -> list[Row]:
        """Return the rows of all lengths, and of the lengths that the refinement adds, ascending by length."""
        rows: dict[float, Row] = {}
        for begin in range(0, len(lengths), at_once):
            rows.update(self._one_pass(lengths[begin : begin + at_once]))
        for _ in range(refine):
            # The proposal depends on the losses alone, so a repeated call proposes the same lengths again.
            closer = next_length({length: row.loss for length, row in rows.items()})
            if closer is None:
                break
            rows.update(self._one_pass([closer], planned=False))
        return [rows[length] for length in sorted(rows)]

    def best_file(self, row: Row) -> Path:
        """Return the file of an average that was evaluated. Without a stored file it is synthesized again."""
        if row.path is not None:
            return row.path
        # In the plan of its pass, which gives the bits that were evaluated.
        lengths = self.passes[row.sigma_rel]
        path = self.out / output_name(row.step, row.sigma_rel)
        FileSystem().make_folders(self.out)
        plan = self.source.plan(self.target, lengths).only([lengths.index(row.sigma_rel)])
        write_outputs(plan, [path], dtype=self.dtype, memory_bytes=self.memory_bytes)
        return path

    def _one_pass(self, lengths: Sequence[float], *, planned: bool = True) -> dict[float, Row]:
        """Return the results of some lengths; evaluate unknown ones, synthesized in one pass with all the others."""
        self.passes.update(dict.fromkeys(lengths, tuple(lengths)))
        known = {length: self.known.get(self._identity(length)) for length in lengths}
        rows = {length: row for length, row in known.items() if row is not None}
        self.known.reuse([row.identity for row in rows.values()])
        for row in rows.values():
            self.progress.add(row, planned=planned)
        if len(rows) < len(lengths) or self.stores_averages:
            # All lengths, not only the missing ones: the choice of snapshots, and so the bits, depend on all of them.
            plan = self.source.plan(self.target, lengths)
            paths = self._paths(plan)
            self._write(plan, paths, is_due=len(rows) < len(lengths))
            for index, (length, path) in enumerate(zip(lengths, paths, strict=True)):
                if length not in rows:
                    rows[length] = self._evaluate_one(plan, index, path)
                    self.progress.add(rows[length], planned=planned)
                if self.stores_averages:
                    # A known result may come from a sweep that stored no file.
                    rows[length] = replace(rows[length], path=path.absolute())
                    self.known.replace(rows[length])
                else:
                    FileSystem().unlink(path)
        return rows

    def _paths(self, plan: Plan) -> list[Path]:
        """Return a path for each average of a plan.

        An average that was evaluated before stays at its path. Any other average gets its plain name, or a longer name
        if the plain one is taken. The longer name has a digest of everything that the average depends on, so it is the
        same in each call.

        Raises:
            ValueError: The longer name is taken, too.
        """
        plain = [self.out / output_name(self.target.step, length) for length in plan.sigma_rels]
        if not self.stores_averages:
            return plain  # the temporary folder is empty
        recipe = (self.target.run, self.source.tolerance, self.source.exclude, self.dtype, plan.steps)
        digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
        longer = [path.with_name(f"{path.stem}-{digest}{path.suffix}") for path in plain]
        names = (expected_outputs(plan, paths, dtype=self.dtype) for paths in (plain, longer))
        paths: list[Path] = []
        for length, *both in zip(plan.sigma_rels, *names, strict=True):
            free = (each.path for each in both if each.is_reusable or not FileSystem().exists(each.path))
            path = self._evaluated(length) or next(free, None)
            if path is None:
                raise ValueError(
                    f"averages: {both[-1].path} exists and is not an average of this sweep; move it, or pass another "
                    "folder."
                )
            paths.append(path)
        return paths

    def _evaluated(self, length: float) -> Path | None:
        """Return the stored average of a known result; None if the file does not exist any more."""
        row = self.known.get(self._identity(length))
        path = row.path if row else None
        return path if path and path.parent == self.out.absolute() and is_there(path) else None

    def _write(self, plan: Plan, paths: Sequence[Path], *, is_due: bool) -> None:
        """Write the averages of a plan.

        Args:
            plan: The plan.
            paths: The path of each average.
            is_due: Whether to write them in any case. Otherwise they are written only if a stored one is missing.
        """
        places: Sequence[int] = range(len(paths))
        if self.stores_averages:
            expected = expected_outputs(plan, paths, dtype=self.dtype)
            # A file that exists but is not the expected one was evaluated when the plan read other snapshots. It is not
            # replaced, because its result belongs to it.
            places = [place for place in places if expected[place].is_reusable or not is_there(paths[place])]
            is_due = is_due or not all(expected[place].is_reusable for place in places)
        if is_due:
            self.warnings.extend(plan.report.warnings)
            FileSystem().make_folders(self.out)
            write_outputs(
                plan.only(places), [paths[place] for place in places], dtype=self.dtype, memory_bytes=self.memory_bytes
            )

    def _identity(self, length: float) -> tuple[object, ...]:
        """Return the ``Row.identity`` of a length."""
        source, dtype = self.source, self.dtype or _MODEL_DTYPES
        run = source.name_of(self.target.run)
        return (run, self.metric, source.tolerance, source.exclude, dtype, self.target.step, length)

    def _evaluate_one(self, plan: Plan, index: int, path: Path) -> Row:
        """Evaluate one average; record the result and return it."""
        began = time.monotonic()
        value = self._value(path, plan.sigma_rels[index])
        row = Row(
            metric=self.metric,
            run=self.source.name_of(self.target.run),
            lineage=self.source.lineage_of(plan),
            step=self.target.step,
            t=float(plan.target.t),
            sigma_rel=plan.sigma_rels[index],
            value=value,
            maximize=self.maximize,
            profile_error=float(plan.report.profile_error[index]),
            rounding=float(plan.report.rounding[index]),
            tolerance=self.source.tolerance,
            excluded=self.source.exclude,
            dtype=self.dtype or _MODEL_DTYPES,
            snapshots_read=len(plan.steps),
            bytes_read=plan.bytes_to_read,
            seconds=round(time.monotonic() - began, 6),
            path=path.absolute() if self.stores_averages else None,
            evaluate=self.known.fingerprint_after(),
        )
        self.known.add(row)  # on disk before the caller sees the result or the next evaluation begins
        if self.told is not None:
            self.told(row)
        return row

    def _value(self, path: Path, length: float) -> float:
        if self.loan is None:
            return self._number(read_average(path), length)
        subject = f"The average of sigma_rel {length:g} at step {self.target.step}"
        with self.loan.holding(path, subject=subject) as model:
            return self._number(model, length)

    def _number(self, subject: Any, length: float) -> float:
        failure = "raised"
        try:
            returned = self.evaluate(subject)
            failure = f"returned {type(returned).__name__}, not one number:"
            if isinstance(returned, (str, bytes)):
                raise TypeError("text is not a number")  # float() would parse it
            return float(returned.detach() if hasattr(returned, "detach") else returned)  # torch warns of gradients
        except Exception as error:
            raise EvaluationError(
                f"evaluate() {failure} {type(error).__name__}: {error}. Its argument was the average of sigma_rel "
                f"{length:g} at step {self.target.step}. Earlier results are in {self.known.file.path}; the same call "
                "continues from there.",
                step=self.target.step,
                sigma_rel=length,
            ) from error
