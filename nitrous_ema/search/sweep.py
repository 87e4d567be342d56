"""Sweep: synthesize and evaluate averages of many lengths, and return the best one.

Averages are written to files, ``at_once`` lengths in one pass over the snapshots, and evaluated one after the other. So
memory does not depend on the number of lengths, and the evaluated averages are those that the synthesis process writes.

An interrupted sweep continues with the same numbers, to the bit. Which snapshots a pass reads depends on all of its
lengths, so an average depends on the lengths that share its pass. Therefore a pass always covers the same lengths, even
if some of them were evaluated before the interruption.

This file is longer than 300 lines because of the docstring of ``sweep``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nitrous_ema._base.arguments import check_sequence, nearest_to
from nitrous_ema._base.dtypes import dtype_code
from nitrous_ema._base.paths import local_path
from nitrous_ema.profile import checked_lengths
from nitrous_ema.search.known_results import KnownResults
from nitrous_ema.search.progress import sweep_progress
from nitrous_ema.search.results import ResultsFile
from nitrous_ema.search.source import SnapshotSource, open_source
from nitrous_ema.search.step_search import StepSearch
from nitrous_ema.search.table import LARGE_PROFILE_ERROR, Row, SweepTable
from nitrous_ema.search.temporary_folder import temporary_folder
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis import DEFAULT_MEMORY_BYTES, DEFAULT_TOLERANCE

if TYPE_CHECKING:
    import torch

    from nitrous_ema.averaging.ema import PostHocEMA
    from nitrous_ema.averaging.model_loan import ModelLoan
    from nitrous_ema.snapshots.legacy.folder import LegacyFolder, LegacySnapshot
    from nitrous_ema.snapshots.snapshot import Snapshot

__all__ = ["sweep"]


def sweep(
    snapshots: SnapshotStore | LegacyFolder | PostHocEMA | str | os.PathLike[str],
    evaluate: Callable[[Any], Any],
    *,
    sigma_rels: Sequence[float],
    steps: Sequence[int | str] | None = None,
    model: torch.nn.Module | None = None,
    restore: Literal["original", "best"] = "original",
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
    tolerance, exclusions and dtype, and by the code of ``evaluate`` with the plain values that it uses (numbers, text
    and collections of them). If only its data or the architecture changes, pass another ``metric``. A warning
    (NitrousWarning) reports that results were read instead of evaluated.

    Args:
        snapshots: The snapshot folder, a store opened on it, a ``LegacyFolder``, or the EMA itself, which is flushed
            first. Training may continue meanwhile.
        evaluate: Called with the model or, without ``model``, with a ``state_dict`` of CPU tensors; returns one number.
        sigma_rels: Lengths to evaluate, as fractions of the training time, in (0, 12 ** -0.5).
        steps: Target steps, each with a committed snapshot; all lengths are evaluated at each. ``"nearest:1234"`` is
            the step nearest to 1234, which a note of the table names. Default: the newest.
        model: Every average is loaded into it, in place and strictly, as ``load_average`` does, and evaluated in eval
            mode without gradients. Its own values are copied to host memory before, and put back at the end, also if
            the sweep raises; so are its modes.
        restore: What the model holds at the end of a sweep that succeeds: ``"original"`` values, or the ``"best"``
            average of the table.
        maximize: Whether higher values are better.
        refine: Largest number of evaluations, per step, of lengths between the best one and its neighbors; 0 for none.
        metric: Name of the value, in the results and in pictures.
        results: The file of results, one JSON object per line; created if it does not exist. Sweeps may share a file.
        averages: Folder in which the averages are stored. Averages of other sweeps are not replaced: if a file name is
            taken, a digest is added to it. By default averages are in a hidden folder beside ``results`` until they
            are evaluated.
        run: Run whose snapshots are read, with its ancestors; by default the newest, or that of the EMA.
        exclude: Steps to ignore, for example damaged ones.
        tolerance: Relative profile error that may be added to read fewer snapshots; 0 reads all.
        dtype: Type to which floating-point numbers are rounded, by name ("float32", "bf16") or as a ``torch.dtype``. By
            default each tensor has its type in the model.
        at_once: Lengths per pass over the snapshots; each needs a file of the model's size on disk.
        memory_bytes: Memory limit for reading snapshots.
        ``told``: Called with each new result.

    Returns:
        The results of these lengths and steps, and of the lengths that the refinement added. Its notes name results
        that were read from the file, and steps that differ from those requested or are not the newest.

    Raises:
        ValueError: A length or number is outside its domain, a sequence is empty, or the type is unknown.
        TypeError: An argument is a single number or text instead of a sequence, or ``snapshots`` is something else.
        SnapshotError: A snapshot does not exist, is damaged, or does not fit the model. The model is checked even if
            all results are known.
        EvaluationError: ``evaluate`` raised, or did not return a number. The message names the length; the cause is
            chained.
        ResultsError: ``results`` is not a file of results.
    """
    # All checks come first: an error must not be raised only after averages were synthesized and evaluated.
    lengths = _checked_lengths(sigma_rels)
    target_steps, excluded_steps = _checked_steps("steps", steps), _checked_steps("exclude", exclude)
    _check_names(evaluate, metric, restore, model)
    _check_counts(refine, at_once)
    code, exclusions = dtype_code(dtype), tuple(sorted(int(step) for step in excluded_steps or ()))
    source = open_source(snapshots, run, exclusions, float(tolerance))
    targets = source.targets(target_steps)
    loan = _checked_loan(model, targets, code)
    known = KnownResults(ResultsFile(results), evaluate, maximize=maximize)
    warnings: list[str] = []
    best_file: Path | None = None
    with temporary_folder(known.file.path) if averages is None else _created(averages) as out:
        try:
            with sweep_progress(len(lengths) * len(targets)) as progress:
                make = partial(
                    StepSearch,
                    source=source,
                    evaluate=evaluate,
                    loan=loan,
                    maximize=maximize,
                    metric=metric,
                    known=known,
                    dtype=code,
                    memory_bytes=memory_bytes,
                    told=told,
                    progress=progress,
                    out=out,
                    stores_averages=averages is not None,
                    warnings=warnings,
                )
                searches = {target.step: make(target=target, passes={}) for target in targets}
                rows = tuple(row for each in searches.values() for row in each.run_all(lengths, refine, at_once))
            table = SweepTable(rows, tuple(_all_notes(source, target_steps, targets, rows, warnings, known)))
            _record_direction(known.file, rows[-1])
            if loan is not None and restore == "best":
                best_file = searches[table.best.step].best_file(table.best)
        finally:
            if loan is not None:
                loan.give_back(best_file)
    return table


def _check_names(evaluate: object, metric: object, restore: object, model: object) -> None:
    """Check arguments that would otherwise fail only after a synthesis or an evaluation."""
    if not callable(evaluate):
        raise TypeError(f"evaluate is {evaluate!r}; expected a function of a model or a state_dict.")
    if not isinstance(metric, str):
        raise TypeError(f"metric is {metric!r}; expected a name, as text.")
    if restore not in ("original", "best"):
        raise ValueError(f"restore is {restore!r}; expected 'original' or 'best'.")
    if restore == "best" and model is None:
        raise ValueError("restore is 'best', and there is no model to hold the best average; pass model=.")


def _checked_steps(name: str, value: Iterable[int | str] | None) -> list[int | str] | None:
    if value is None:
        return None
    items = "steps, such as [10_000, 20_000]"
    check_sequence(name, value, items)
    steps = list(value)
    is_near = [name == "steps" and isinstance(step, str) and step.startswith("nearest:") for step in steps]
    if not all(near or isinstance(step, Real) for near, step in zip(is_near, steps, strict=True)):
        raise TypeError(f"{name} is {value!r}; expected a sequence of {items}.")
    for step in steps:
        nearest_to(step)  # raises for a text without a number
    return steps


def _checked_loan(
    model: torch.nn.Module | None, targets: Sequence[Snapshot | LegacySnapshot], dtype: str | None
) -> ModelLoan | None:
    """Return the loan of a model that averages of all targets fit; None without a model."""
    if model is None:
        return None
    from nitrous_ema.averaging.model_loan import ModelLoan

    loan = ModelLoan(model)
    for target in targets:
        loan.check(target.records, target.path, dtype=dtype, subject=f"An average at step {target.step}")
    return loan


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


def _checked_lengths(sigma_rels: Sequence[float]) -> list[float]:
    """Return the lengths, ascending, without duplicates."""
    check_sequence("sigma_rels", sigma_rels)
    lengths = list(sigma_rels)
    if not lengths:
        raise ValueError("sigma_rels is empty; pass at least one length.")
    checked_lengths("sigma_rels", lengths)
    return sorted({float(each) for each in lengths})


def _all_notes(
    source: SnapshotSource,
    steps: Sequence[int | str] | None,
    targets: Sequence[Snapshot | LegacySnapshot],
    rows: Sequence[Row],
    warnings: Iterable[str],
    known: KnownResults,
) -> list[str]:
    return [*source.notes(steps, targets), *_notes(rows), *dict.fromkeys(warnings), *known.notes(rows)]


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
        if best.is_inaccurate:
            yield (
                f"The best length at step {step} has a profile error above {LARGE_PROFILE_ERROR:.0%}: the snapshots "
                "cannot reconstruct it, and its value is that of another profile."
            )


@contextmanager
def _created(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Create the folder of stored averages and yield it. In contrast to ``temporary_folder``, the folder stays."""
    path = local_path("out", folder)
    FileSystem().make_folders(path)
    yield path
