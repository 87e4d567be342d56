"""Sweep: synthesize and evaluate averages of many lengths, and return the best one.

Averages are written to files, ``at_once`` lengths in one pass over the snapshots, and evaluated one after the other. So
memory does not depend on the number of lengths, and the evaluated averages are those that the synthesis process writes.

An interrupted sweep continues with the same numbers, to the bit. Which snapshots a pass reads depends on all of its
lengths, so an average depends on the lengths that share its pass. Therefore a pass always covers the same lengths, even
if some of them were evaluated before the interruption.

This file is longer than 300 lines because of the docstring of ``sweep``.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitrous_ema._base.arguments import check_sequence
from nitrous_ema._base.dtypes import dtype_code
from nitrous_ema._base.paths import local_path
from nitrous_ema.averaging.load_average import load_tensors
from nitrous_ema.errors import EvaluationError
from nitrous_ema.profile import checked_lengths
from nitrous_ema.search.refinement import next_length
from nitrous_ema.search.results import ResultsFile
from nitrous_ema.search.table import Row, SweepTable
from nitrous_ema.search.temporary_folder import temporary_folder
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis import (
    DEFAULT_MEMORY_BYTES,
    DEFAULT_TOLERANCE,
    Plan,
    SnapshotView,
    plan_from_store,
    plan_synthesis,
)
from nitrous_ema.synthesis.outputs.reader import read_average
from nitrous_ema.synthesis.outputs.reuse import expected_outputs
from nitrous_ema.synthesis.outputs.writer import output_name, write_outputs

if TYPE_CHECKING:
    import torch

    from nitrous_ema.snapshots.legacy.folder import LegacyFolder

__all__ = ["sweep"]

_MODEL_DTYPES = "model"  # value of Row.dtype if no dtype is requested


def sweep(
    snapshots: SnapshotStore | LegacyFolder | str | os.PathLike[str],
    evaluate: Callable[[Any], Any],
    *,
    sigma_rels: Sequence[float],
    steps: Sequence[int] | None = None,
    model: torch.nn.Module | None = None,
    maximize: bool = False,
    refine: int = 3,
    metric: str = "value",
    results: str | os.PathLike[str] = "sweep.jsonl",
    averages: str | os.PathLike[str] | None = None,
    run: str | None = None,
    exclude: Collection[int] = (),
    tolerance: float = DEFAULT_TOLERANCE,
    dtype: str | torch.dtype | None = None,
    at_once: int = 16,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    told: Callable[[Row], object] | None = None,
) -> SweepTable:
    """Evaluate averages of many lengths and refine the search around the best one.

    Every result is written to ``results``, durably, before the next evaluation begins. After an interruption the same
    call continues from there and evaluates nothing twice. A result is identified by metric, run, step, length,
    tolerance, exclusions and dtype, not by the code of ``evaluate``: if that changes, pass another ``metric``.

    Args:
        snapshots: The snapshot folder, a store opened on it, or a ``LegacyFolder``. Training may continue meanwhile.
        evaluate: Called with the model or, without ``model``, with a ``state_dict`` of CPU tensors; returns one number.
        sigma_rels: Lengths to evaluate, as fractions of the training time, in (0, 12 ** -0.5).
        steps: Target steps, each with a committed snapshot; all lengths are evaluated at each. Default: the newest.
        model: Every average is loaded into it, in place and strictly, as ``load_average`` does. At the end it holds the
            average that was evaluated last.
        maximize: Whether higher values are better.
        refine: Largest number of evaluations, per step, of lengths between the best one and its neighbors; 0 for none.
        metric: Name of the value, in the results and in pictures.
        results: The file of results, one JSON object per line; created if it does not exist. Sweeps may share a file.
        averages: Folder in which the averages are stored. Averages of other sweeps are not replaced: if a file name is
            taken, a digest is added to it. By default averages are in a hidden folder beside ``results`` until they
            are evaluated.
        run: Run whose snapshots are read, with its ancestors; the newest by default.
        exclude: Steps to ignore, for example damaged ones.
        tolerance: Relative profile error that may be added to read fewer snapshots; 0 reads all.
        dtype: Type to which floating-point numbers are rounded, by name ("float32", "bf16") or as a ``torch.dtype``. By
            default each tensor has its type in the model.
        at_once: Lengths per pass over the snapshots; each needs a file of the model's size on disk.
        memory_bytes: Memory limit for reading snapshots.
        ``told``: Called with each new result.

    Returns:
        The results of these lengths and steps, and of the lengths that the refinement added.

    Raises:
        ValueError: A length or number is outside its domain, a sequence is empty, or the type is unknown.
        TypeError: An argument is a single number or text instead of a sequence.
        SnapshotError: A snapshot does not exist, is damaged, or does not fit the model.
        EvaluationError: ``evaluate`` raised, or did not return a number. The message names the length; the cause is
            chained.
        ResultsError: ``results`` is not a file of results.
    """
    # All checks come first: an error must not be raised only after averages were synthesized and evaluated.
    lengths = _checked_lengths(sigma_rels)
    target_steps, excluded_steps = _checked_steps("steps", steps), _checked_steps("exclude", exclude)
    _check_names(evaluate, metric)
    _check_counts(refine, at_once)
    store = SnapshotStore(snapshots) if isinstance(snapshots, (str, os.PathLike)) else snapshots
    folder = _Folder(store, run, tuple(sorted(excluded_steps or ())), float(tolerance))
    code = dtype_code(dtype)
    targets, file = folder.targets(target_steps), ResultsFile(results)
    known = {_identity(row): replace(row, maximize=maximize) for row in file.read()}
    before = set(known)
    warnings: list[str] = []
    with temporary_folder(file.path) if averages is None else _created(averages) as out:
        search = partial(
            _SweepSearch,
            folder=folder,
            evaluate=evaluate,
            model=model,
            maximize=maximize,
            metric=metric,
            file=file,
            dtype=code,
            memory_bytes=memory_bytes,
            told=told,
            out=out,
            stores_averages=averages is not None,
            known=known,
            warnings=warnings,
        )
        found = [search(step=step, run=target_run).run_all(lengths, refine, at_once) for step, target_run in targets]
    rows = tuple(row for at_step in found for row in at_step)
    _record_direction(file, rows[-1])
    return SweepTable(rows, (*_notes(rows), *dict.fromkeys(warnings), *_reused(rows, before, file.path)))


def _check_names(evaluate: object, metric: object) -> None:
    """Check arguments that would otherwise fail only after a synthesis or an evaluation."""
    if not callable(evaluate):
        raise TypeError(f"evaluate is {evaluate!r}; expected a function of a model or a state_dict.")
    if not isinstance(metric, str):
        raise TypeError(f"metric is {metric!r}; expected a name, as text.")


def _checked_steps(name: str, value: Iterable[int] | None) -> list[int] | None:
    if value is None:
        return None
    items = "steps, such as [10_000, 20_000]"
    check_sequence(name, value, items)
    steps = list(value)
    if not all(isinstance(step, Real) for step in steps):
        raise TypeError(f"{name} is {value!r}; expected a sequence of {items}.")
    return steps


def _check_counts(refine: int, at_once: int) -> None:
    for name, number, least in (("refine", refine, 0), ("at_once", at_once, 1)):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name} is {number!r}; expected a whole number, {least} or more.")


def _record_direction(file: ResultsFile, row: Row) -> None:
    """Add a row again if the last line of its kind has the other value of ``maximize``.

    ``read_table`` takes the direction from the last line. A sweep that evaluates nothing new has not added one.
    """
    last = [known for known in file.read() if known.is_alike(row)][-1]
    if last.maximize != row.maximize:
        file.add(row)


def _identity(row: Row) -> tuple[object, ...]:
    return (*row.recipe, row.step, row.sigma_rel)


@dataclass(frozen=True, slots=True)
class _Folder:
    """The snapshots of a sweep, and how to read them."""

    snapshots: SnapshotStore | LegacyFolder
    run: str | None
    exclude: tuple[int, ...]
    tolerance: float

    def targets(self, steps: Sequence[int] | None) -> list[tuple[int, str]]:
        """Return step and run of each target snapshot. A missing one raises here, before anything is evaluated."""
        wanted = [None] if steps is None else sorted(set(steps))
        if not wanted:
            raise ValueError("steps is empty; pass steps that have a snapshot, or None for the newest.")
        found = [self._get(step) for step in wanted]
        return [(each.step, each.run) for each in found]

    def _get(self, step: int | None) -> Any:
        if isinstance(self.snapshots, SnapshotStore):
            return self.snapshots.get(step, self.run, exclude=self.exclude)
        if self.run is not None:
            raise ValueError(f"run is {self.run!r}, but a folder of {{i}}.{{step}}.pt files has no runs; omit run=.")
        return self.snapshots.get(step, exclude=self.exclude)

    def plan(self, step: int, run: str, sigma_rels: Sequence[float]) -> Plan:
        """Return the plan of averages of some lengths at one target step."""
        if isinstance(self.snapshots, SnapshotStore):
            return plan_from_store(
                self.snapshots,
                sigma_rels=sigma_rels,
                step=step,
                run=run,
                exclude=self.exclude,
                tolerance=self.tolerance,
            )
        snapshots: list[SnapshotView] = list(self.snapshots.snapshots(exclude=self.exclude))
        return plan_synthesis(
            snapshots,
            target=self.snapshots.get(step),
            sigma_rels=sigma_rels,
            excluded=self.exclude,
            tolerance=self.tolerance,
        )

    def name_of(self, run: str) -> str:
        """Return the name under which results store a run: its id, or the folder's path for an old folder."""
        return run if isinstance(self.snapshots, SnapshotStore) else str(self.snapshots.root.absolute())

    def lineage_of(self, plan: Plan) -> Lineage:
        """Return the lineage of a plan's target, by these names."""
        return tuple((self.name_of(run), left_at) for run, left_at in plan.target.lineage)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SweepSearch:
    """The search for the best length at one target step."""

    folder: _Folder
    evaluate: Callable[[Any], Any]
    model: torch.nn.Module | None
    maximize: bool
    metric: str
    file: ResultsFile
    dtype: str | None
    memory_bytes: int
    told: Callable[[Row], object] | None
    step: int
    run: str
    out: Path
    """Folder of the averages."""
    stores_averages: bool
    """Whether averages stay in ``out`` after their evaluation."""
    known: dict[tuple[object, ...], Row]
    """Every result by its identity; grows."""
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
            rows.update(self._one_pass([closer]))
        return [rows[length] for length in sorted(rows)]

    def _one_pass(self, lengths: Sequence[float]) -> dict[float, Row]:
        """Return the results of some lengths; evaluate unknown ones, synthesized in one pass with all the others."""
        missing = [length for length in lengths if self._key(length) not in self.known]
        if missing or self.stores_averages:
            # All lengths, not only the missing ones: the choice of snapshots, and so the bits, depend on all of them.
            plan = self.folder.plan(self.step, self.run, lengths)
            paths = self._paths(plan)
            self._write(plan, paths, is_due=bool(missing))
            for index, (length, path) in enumerate(zip(lengths, paths, strict=True)):
                if length in missing:
                    self._evaluate_one(plan, index, path)
                if self.stores_averages:
                    # A known result may come from a sweep that stored no file.
                    self.known[self._key(length)] = replace(self.known[self._key(length)], path=path.absolute())
                else:
                    path.unlink()
        return {length: self.known[self._key(length)] for length in lengths}

    def _paths(self, plan: Plan) -> list[Path]:
        """Return a path for each average of a plan.

        An average that was evaluated before stays at its path. Any other average gets its plain name, or a longer name
        if the plain one is taken. The longer name has a digest of everything that the average depends on, so it is the
        same in each call.

        Raises:
            ValueError: The longer name is taken, too.
        """
        plain = [self.out / output_name(self.step, length) for length in plan.sigma_rels]
        if not self.stores_averages:
            return plain  # the temporary folder is empty
        recipe = (self.run, self.folder.tolerance, self.folder.exclude, self.dtype, plan.steps)
        digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
        longer = [path.with_name(f"{path.stem}-{digest}{path.suffix}") for path in plain]
        names = (expected_outputs(plan, paths, dtype=self.dtype) for paths in (plain, longer))
        paths: list[Path] = []
        for length, *both in zip(plan.sigma_rels, *names, strict=True):
            free = (each.path for each in both if each.is_reusable or not os.path.lexists(each.path))
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
        row = self.known.get(self._key(length))
        path = row.path if row else None
        return path if path and path.parent == self.out.absolute() and path.exists() else None

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
            places = [place for place in places if expected[place].is_reusable or not paths[place].exists()]
            is_due = is_due or not all(expected[place].is_reusable for place in places)
        if is_due:
            self.warnings.extend(plan.report.warnings)
            self.out.mkdir(exist_ok=True)
            write_outputs(
                plan.only(places), [paths[place] for place in places], dtype=self.dtype, memory_bytes=self.memory_bytes
            )

    def _key(self, length: float) -> tuple[object, ...]:
        folder, dtype = self.folder, self.dtype or _MODEL_DTYPES
        run = folder.name_of(self.run)
        return (run, self.metric, folder.tolerance, folder.exclude, dtype, self.step, length)

    def _evaluate_one(self, plan: Plan, index: int, path: Path) -> None:
        """Evaluate one average and record the result."""
        length = plan.sigma_rels[index]
        subject = self._load(path, length)
        began = time.monotonic()
        value = self._value(subject, length)
        row = Row(
            metric=self.metric,
            run=self.folder.name_of(self.run),
            lineage=self.folder.lineage_of(plan),
            step=self.step,
            t=float(plan.target.t),
            sigma_rel=length,
            value=value,
            maximize=self.maximize,
            profile_error=float(plan.report.profile_error[index]),
            rounding=float(plan.report.rounding[index]),
            tolerance=self.folder.tolerance,
            excluded=self.folder.exclude,
            dtype=self.dtype or _MODEL_DTYPES,
            snapshots_read=len(plan.steps),
            bytes_read=plan.bytes_to_read,
            seconds=round(time.monotonic() - began, 6),
            path=path.absolute() if self.stores_averages else None,
        )
        self.file.add(row)  # on disk before the caller sees the result or the next evaluation begins
        self.known[self._key(length)] = row
        if self.told is not None:
            self.told(row)

    def _load(self, path: Path, length: float) -> torch.nn.Module | dict[str, torch.Tensor]:
        if self.model is None:
            return read_average(path)
        from nitrous_ema.averaging.model.tracking import canonical_tensors, check_module

        check_module(self.model)
        load_tensors(
            canonical_tensors(self.model),
            path,
            # Not the path: the file may be a temporary one, which is removed when this is read.
            subject=f"The average of sigma_rel {length:g} at step {self.step}",
            remedy="Pass as model= the architecture that was trained.",
        )
        return self.model

    def _value(self, subject: torch.nn.Module | dict[str, torch.Tensor], length: float) -> float:
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
                f"{length:g} at step {self.step}. Earlier results are in {self.file.path}; the same call continues "
                "from there.",
                step=self.step,
                sigma_rel=length,
            ) from error


def _checked_lengths(sigma_rels: Sequence[float]) -> list[float]:
    """Return the lengths, ascending, without duplicates."""
    check_sequence("sigma_rels", sigma_rels)
    lengths = list(sigma_rels)
    if not lengths:
        raise ValueError("sigma_rels is empty; pass at least one length.")
    checked_lengths("sigma_rels", lengths)
    return sorted({float(each) for each in lengths})


def _reused(rows: Sequence[Row], before: Collection[tuple[object, ...]], path: Path) -> Iterator[str]:
    count = sum(_identity(row) in before for row in rows)
    if count:
        yield f"{count} of {len(rows)} results were read from {path} instead of evaluated again."


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield notes on results that a reader of the table should not overlook."""
    not_finite = [f"{row.sigma_rel:g} at step {row.step}" for row in rows if not math.isfinite(row.value)]
    if not_finite:
        yield f"Results that are not finite are never the best: {', '.join(not_finite)}."
    for step in dict.fromkeys(row.step for row in rows):
        finite = [row for row in rows if row.step == step and math.isfinite(row.value)]
        best = min(finite, key=lambda row: row.loss, default=None)
        if best is None or len(finite) < 2:
            continue
        if best in (finite[0], finite[-1]):
            end, beyond = ("shortest", "shorter") if best is finite[0] else ("longest", "longer")
            yield f"The best length at step {step} is the {end} one evaluated; {beyond} lengths may be better."


@contextmanager
def _created(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Create the folder of stored averages and yield it. In contrast to ``temporary_folder``, the folder stays."""
    path = local_path("out", folder)
    path.mkdir(parents=True, exist_ok=True)
    yield path
