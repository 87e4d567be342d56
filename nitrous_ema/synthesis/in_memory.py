"""Synthesize averages into arrays in memory, for callers that need no files."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nitrous_ema.synthesis.plan import Plan, plan_from_store
from nitrous_ema.synthesis.snapshot_selection import DEFAULT_TOLERANCE
from nitrous_ema.synthesis.streaming import DEFAULT_MEMORY_BYTES, Accumulate, stream, stream_copied

if TYPE_CHECKING:
    from nitrous_ema.snapshots.store import SnapshotStore


@dataclass(frozen=True, slots=True, eq=False)
class Synthesized:
    """Averages of one target step, in memory."""

    plan: Plan
    """The plan that they were computed from."""
    flats: tuple[NDArray[np.floating], ...]
    """One flat array per output, with its tensors back to back as in ``plan.target.average_spans``."""
    copied: bytes
    """The target's copied tensors, each at its place in ``plan.target.copied_spans``."""

    def averaged(self, output: int) -> dict[str, NDArray[np.generic]]:
        """Return the averaged tensors of one output by canonical name, as views in the model's shapes.

        Complex tensors are complex. All others have the type of the flat array, not that of the model.

        Args:
            output: Index of the output.
        """
        flat = self.flats[output]
        records = [record for record in self.plan.target.records if record.role == "averaged"]
        tensors: dict[str, NDArray[np.generic]] = {}
        for record, (begin, end) in zip(records, self.plan.target.average_spans, strict=True):
            numbers: NDArray[np.generic] = flat[begin:end]
            if record.dtype == "C64":
                numbers = numbers.view(np.result_type(flat.dtype, np.complex64))
            tensors[record.name] = numbers.reshape(record.shape)
        return tensors


def synthesize(
    snapshots: SnapshotStore | str | os.PathLike[str],
    *,
    gammas: Sequence[float] | None = None,
    sigma_rels: Sequence[float] | None = None,
    step: int | str | None = None,
    run: str | None = None,
    exclude: Collection[int] = (),
    tolerance: float = DEFAULT_TOLERANCE,
    dtype: DTypeLike = np.float32,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int | None = None,
    accumulate: Accumulate = "float64",
) -> Synthesized:
    """Synthesize averages that end at a committed snapshot, in memory.

    Args:
        snapshots: The snapshot folder, or a store opened on it.
        gammas: Requested lengths as exponents, or
        sigma_rels: as fractions of the training time, in (0, 12 ** -0.5). Exactly one of the two.
        step: The target step, which must have a committed snapshot; by default the newest. ``"nearest:1234"`` is the
            step nearest to 1234; a warning names it.
        run: The run whose lineage is read; by default the newest.
        exclude: Steps of snapshots to ignore, for example damaged ones.
        tolerance: Relative profile error that may be added to read fewer snapshots; 0 reads all.
        dtype: Type of the arrays, float32 or float64.
        memory_bytes: Memory budget for reading and computing, in bytes; the result is not counted.
        threads: Maximum number of threads; by default one for each core this process may use.
        accumulate: Type of products and sums, "float64" or "float32".

    Raises:
        ValueError: A length is outside its domain, or the budget is too small.
        SnapshotError: There is no such snapshot, one is damaged, or snapshots do not belong together.
    """
    plan = plan_from_store(
        snapshots, gammas=gammas, sigma_rels=sigma_rels, step=step, run=run, exclude=exclude, tolerance=tolerance
    )
    return synthesize_plan(plan, dtype=dtype, memory_bytes=memory_bytes, threads=threads, accumulate=accumulate)


def synthesize_plan(
    plan: Plan,
    *,
    dtype: DTypeLike = np.float32,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    threads: int | None = None,
    accumulate: Accumulate = "float64",
) -> Synthesized:
    """Synthesize the averages of a plan in memory; arguments and errors as in synthesize()."""
    flats = tuple(np.empty(plan.elements, dtype=dtype) for _ in plan.gammas)

    def take(begin_element: int, block: NDArray[np.floating], /) -> None:
        for flat, row in zip(flats, block, strict=True):
            flat[begin_element : begin_element + len(row)] = row

    stream(plan, take, memory_bytes=memory_bytes, threads=threads, accumulate=accumulate)
    copied = bytearray()
    stream_copied(plan, lambda _, piece: copied.extend(piece))
    return Synthesized(plan, flats, bytes(copied))
