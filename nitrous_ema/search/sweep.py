"""Every length worth a look, synthesized and evaluated, and the best one found.

Lengths of one step are synthesized into files, some at once, in one pass over the snapshots; then they are evaluated
one after the other. So memory does not depend on their number, and what is synthesized is what the worker would write.
A pass is always made for the same lengths together, also where some of them were evaluated before it was interrupted:
the numbers are those of a sweep that nobody interrupted, to the bit.

Longer than the house's 300 lines by the docstring of ``sweep``.
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
from nitrous_ema.averaging.load_average import load_average
from nitrous_ema.errors import EvaluationError
from nitrous_ema.profile import sigma_rel_to_gamma
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

_OF_THE_MODEL = "model"  # as Row.dtype says


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
    """Evaluate averages of many lengths, look closer around the best, and tell which one it is.

    Every result goes to ``results``, durably, before the next evaluation. The same call goes on from there after an
    interruption, and evaluates nothing twice. Results are told apart by metric, run, step, length, tolerance, exclusion
    and dtype, not by what ``evaluate`` does: where that changes, give ``metric`` another name.

    Args:
        snapshots: The snapshot folder, or a store opened on it, or a ``LegacyFolder``. Training may go on in it.
        evaluate: Called with the model or, without ``model``, with a ``state_dict`` of tensors on the CPU; returns one
            number.
        sigma_rels: Lengths to evaluate, as fractions of the training time, in (0, 12 ** -0.5).
        steps: Steps at which averages end, each with a committed snapshot; all lengths at each. By default the newest.
        model: Every average is loaded into it, in place and strictly, as ``load_average`` does; it keeps the last one.
        maximize: Whether higher is better.
        refine: Evaluations at most, per step, of lengths between the best one and its neighbours; 0 for none.
        metric: Name of the value, in the results and in pictures.
        results: The file of results, one JSON object a line; made if it is not there. Sweeps may share one.
        averages: Folder in which the averages stay. What other sweeps have kept there is not replaced: then a name gets
            longer. By default they lie in a hidden folder beside ``results`` until they were evaluated.
        run: Run whose snapshots are read, with its ancestors; the newest by default.
        exclude: Steps to leave out, damaged ones for example.
        tolerance: Relative profile error that may be added to read fewer snapshots; 0 reads all.
        dtype: Type that floating numbers are rounded to, by name ("float32", "bf16") or as torch's; by default each
            tensor has the model's own.
        at_once: Lengths per pass over the snapshots, each a file of the model's size on disk.
        memory_bytes: Memory to stay within while reading.
        told: Called with each new result.

    Returns:
        The results of these lengths and steps and of those that the refinement added.

    Raises:
        ValueError: A length outside its domain, no length or step at all, a number below its least, or an unknown type.
        TypeError: A single length, or text, where a sequence belongs.
        SnapshotError: No such snapshot, a damaged one, or one that does not fit the model.
        EvaluationError: ``evaluate`` raised or returned no number; names the length, the cause is chained.
        ResultsError: ``results`` is a file of something else.
    """
    lengths = _lengths(sigma_rels)
    wanted_steps, left_out = _steps("steps", steps), _steps("exclude", exclude)
    _check_names(evaluate, metric)
    _check_counts(refine, at_once)
    store = SnapshotStore(snapshots) if isinstance(snapshots, (str, os.PathLike)) else snapshots
    folder = _Folder(store, run, tuple(sorted(left_out or ())), float(tolerance))
    code = dtype_code(dtype)
    targets, file = folder.targets(wanted_steps), ResultsFile(results)
    known = {_identity(row): replace(row, maximize=maximize) for row in file.read()}
    before = set(known)
    warnings: list[str] = []
    with temporary_folder(file.path) if averages is None else _kept(averages) as out:
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
            keeps=averages is not None,
            known=known,
            warnings=warnings,
        )
        found = [search(step=step, run=of_run).all(lengths, refine, at_once) for step, of_run in targets]
    rows = tuple(row for at_step in found for row in at_step)
    _say_direction(file, rows[-1])
    return SweepTable(rows, (*_notes(rows), *dict.fromkeys(warnings), *_reused(rows, before, file.path)))


def _check_names(evaluate: object, metric: object) -> None:
    """What would else be told when a length has been synthesized, or when its result is on disk."""
    if not callable(evaluate):
        raise TypeError(f"evaluate is {evaluate!r}; expected a function of a model or a state_dict.")
    if not isinstance(metric, str):
        raise TypeError(f"metric is {metric!r}; expected a name, as text.")


def _steps(name: str, given: Iterable[int] | None) -> list[int] | None:
    if given is None:
        return None
    of = "steps, such as [10_000, 20_000]"
    check_sequence(name, given, of)
    found = list(given)
    if not all(isinstance(step, Real) for step in found):
        raise TypeError(f"{name} is {given!r}; expected a sequence of {of}.")
    return found


def _check_counts(refine: int, at_once: int) -> None:
    for name, number, least in (("refine", refine, 0), ("at_once", at_once, 1)):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name} is {number!r}; expected a whole number, {least} or more.")


def _say_direction(file: ResultsFile, row: Row) -> None:
    """Let the file end with a line that says whether higher is better, where no evaluation has added one."""
    last = [known for known in file.read() if known.is_alike(row)][-1]
    if last.maximize != row.maximize:
        file.add(row)


def _identity(row: Row) -> tuple[object, ...]:
    return (*row.recipe, row.step, row.sigma_rel)


@dataclass(frozen=True, slots=True)
class _Folder:
    """Snapshots, and how to read them."""

    snapshots: SnapshotStore | LegacyFolder
    run: str | None
    exclude: tuple[int, ...]
    tolerance: float

    def targets(self, steps: Sequence[int] | None) -> list[tuple[int, str]]:
        """Step and run of the snapshots at which averages end; a wrong one is told before anything is evaluated."""
        wanted = [None] if steps is None else sorted(set(steps))
        if not wanted:
            raise ValueError("steps is empty; give steps with a snapshot, or None for the newest.")
        found = [self._get(step) for step in wanted]
        return [(each.step, each.run) for each in found]

    def _get(self, step: int | None) -> Any:
        if isinstance(self.snapshots, SnapshotStore):
            return self.snapshots.get(step, self.run, exclude=self.exclude)
        if self.run is not None:
            raise ValueError(f"run is {self.run!r}, but files of old folders know no runs; leave it out.")
        return self.snapshots.get(step, exclude=self.exclude)

    def plan(self, step: int, run: str, sigma_rels: Sequence[float]) -> Plan:
        if isinstance(self.snapshots, SnapshotStore):
            return plan_from_store(
                self.snapshots,
                sigma_rels=sigma_rels,
                step=step,
                run=run,
                exclude=self.exclude,
                tolerance=self.tolerance,
            )
        moments: list[SnapshotView] = list(self.snapshots.snapshots(exclude=self.exclude))
        return plan_synthesis(
            moments,
            target=self.snapshots.get(step),
            sigma_rels=sigma_rels,
            excluded=self.exclude,
            tolerance=self.tolerance,
        )

    def name_of(self, run: str) -> str:
        """What tells these snapshots from others: the run, or the folder where snapshots know no runs."""
        return run if isinstance(self.snapshots, SnapshotStore) else str(self.snapshots.root.absolute())

    def lineage_of(self, plan: Plan) -> Lineage:
        """The runs that led to a plan's target, by these names."""
        return tuple((self.name_of(run), left_at) for run, left_at in plan.target.lineage)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SweepSearch:
    """The search among averages that end at one step."""

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
    keeps: bool
    known: dict[tuple[object, ...], Row]
    """Every result by what identifies it; grows."""
    warnings: list[str]
    """Of the plans made; grows."""

    def all(self, lengths: Sequence[float], refine: int, at_once: int) -> list[Row]:
        """The rows of all lengths, then those that the refinement adds; ascending by length."""
        rows: dict[float, Row] = {}
        for begin in range(0, len(lengths), at_once):
            rows.update(self._one_pass(lengths[begin : begin + at_once]))
        for _ in range(refine):
            closer = next_length({length: row.loss for length, row in rows.items()})
            if closer is None:
                break
            rows.update(self._one_pass([closer]))
        return [rows[length] for length in sorted(rows)]

    def _one_pass(self, lengths: Sequence[float]) -> dict[float, Row]:
        """Results of some lengths: those that are not known are synthesized, together, and evaluated."""
        missing = [length for length in lengths if self._key(length) not in self.known]
        if missing or self.keeps:
            plan = self.folder.plan(self.step, self.run, lengths)
            paths = self._paths(plan)
            self._make(plan, paths, is_due=bool(missing))
            for index, (length, path) in enumerate(zip(lengths, paths, strict=True)):
                if length in missing:
                    self._add(plan, index, path)
                if self.keeps:  # also where the result is that of a sweep which kept no file
                    self.known[self._key(length)] = replace(self.known[self._key(length)], path=path.absolute())
                else:
                    path.unlink()
        return {length: self.known[self._key(length)] for length in lengths}

    def _paths(self, plan: Plan) -> list[Path]:
        """Names for the averages of a plan.

        An evaluated average keeps its own; another one gets a longer name where something else has the plain one.

        Raises:
            ValueError: Something else has the longer one too.
        """
        plain = [self.out / output_name(self.step, length) for length in plan.sigma_rels]
        if not self.keeps:
            return plain
        recipe = (self.run, self.folder.tolerance, self.folder.exclude, self.dtype, plan.steps)
        digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
        longer = [path.with_name(f"{path.stem}-{digest}{path.suffix}") for path in plain]
        names = (expected_outputs(plan, paths, dtype=self.dtype) for paths in (plain, longer))
        paths: list[Path] = []
        for length, *both in zip(plan.sigma_rels, *names, strict=True):
            free = (each.path for each in both if each.is_there or not os.path.lexists(each.path))
            path = self._evaluated(length) or next(free, None)
            if path is None:
                taken = both[-1].path
                raise ValueError(f"averages: {taken} is no average of this sweep; move it, or name another folder.")
            paths.append(path)
        return paths

    def _evaluated(self, length: float) -> Path | None:
        """The kept file of a known result, if it is still there."""
        row = self.known.get(self._key(length))
        path = row.path if row else None
        return path if path and path.parent == self.out.absolute() and path.exists() else None

    def _make(self, plan: Plan, paths: Sequence[Path], *, is_due: bool) -> None:
        """Write the averages of a plan if that is due, or if one that is to be kept lacks.

        An evaluated one stays, also where other snapshots would be read now.
        """
        made: Sequence[int] = range(len(paths))
        if self.keeps:
            expected = expected_outputs(plan, paths, dtype=self.dtype)
            made = [place for place in made if expected[place].is_there or not paths[place].exists()]
            is_due = is_due or not all(expected[place].is_there for place in made)
        if is_due:
            self.warnings.extend(plan.report.warnings)
            self.out.mkdir(exist_ok=True)
            chosen = plan.only(made), [paths[place] for place in made]
            write_outputs(*chosen, dtype=self.dtype, memory_bytes=self.memory_bytes)

    def _key(self, length: float) -> tuple[object, ...]:
        folder, dtype = self.folder, self.dtype or _OF_THE_MODEL
        run = folder.name_of(self.run)
        return (run, self.metric, folder.tolerance, folder.exclude, dtype, self.step, length)

    def _add(self, plan: Plan, index: int, path: Path) -> None:
        """Evaluate one average, and note the result."""
        length = plan.sigma_rels[index]
        subject = self._load(path)
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
            dtype=self.dtype or _OF_THE_MODEL,
            snapshots_read=len(plan.steps),
            bytes_read=plan.bytes_to_read,
            seconds=round(time.monotonic() - began, 6),
            path=path.absolute() if self.keeps else None,
        )
        self.file.add(row)
        self.known[self._key(length)] = row
        if self.told is not None:
            self.told(row)

    def _load(self, path: Path) -> torch.nn.Module | dict[str, torch.Tensor]:
        if self.model is None:
            return read_average(path)
        load_average(self.model, path)
        return self.model

    def _value(self, subject: torch.nn.Module | dict[str, torch.Tensor], length: float) -> float:
        what = "raised"
        try:
            returned = self.evaluate(subject)
            what = f"returned {type(returned).__name__}, not one number:"
            if isinstance(returned, (str, bytes)):
                raise TypeError("text is no number")
            return float(returned.detach() if hasattr(returned, "detach") else returned)  # torch warns of gradients
        except Exception as error:
            raise EvaluationError(
                f"evaluate() {what} {type(error).__name__}: {error}. It had the average of sigma_rel {length:g} at "
                f"step {self.step}. Results so far are in {self.file.path}; the same call "
                "goes on from there.",
                step=self.step,
                sigma_rel=length,
            ) from error


def _lengths(sigma_rels: Sequence[float]) -> list[float]:
    """The lengths, ascending, each once."""
    check_sequence("sigma_rels", sigma_rels)
    lengths = list(sigma_rels)
    if not lengths:
        raise ValueError("sigma_rels is empty; give at least one length.")
    sigma_rel_to_gamma(lengths)  # says what is no length
    return sorted({float(each) for each in lengths})


def _reused(rows: Sequence[Row], before: Collection[tuple[object, ...]], path: Path) -> Iterator[str]:
    count = sum(_identity(row) in before for row in rows)
    if count:
        yield f"{count} of {len(rows)} results were in {path} already."


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """What a reader of the table should know."""
    unfinished = [f"{row.sigma_rel:g} at step {row.step}" for row in rows if not math.isfinite(row.value)]
    if unfinished:
        yield f"Not finite, and so never the best: {', '.join(unfinished)}."
    for step in dict.fromkeys(row.step for row in rows):
        finite = [row for row in rows if row.step == step and math.isfinite(row.value)]
        best = min(finite, key=lambda row: row.loss, default=None)
        if best is None or len(finite) < 2:
            continue
        if best in (finite[0], finite[-1]):
            word = "shortest" if best is finite[0] else "longest"
            yield f"The best at step {step} is the {word} that was asked for; what lies beyond may be better."


@contextmanager
def _kept(folder: str | os.PathLike[str]) -> Iterator[Path]:
    Path(folder).mkdir(parents=True, exist_ok=True)
    yield Path(folder)
