"""Averages in memory, for callers that want arrays rather than files."""

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
    """What they are made of."""
    flats: tuple[NDArray[np.floating], ...]
    """One flat array per output; tensors back to back as in ``plan.target.average_spans``."""
    copied: bytes
    """The target's copied tensors; ``plan.target.copied_spans`` says where each one lies."""

    def averaged(self, output: int) -> dict[str, NDArray[np.generic]]:
        """The averaged tensors of one output, as views in the model's shapes, by canonical name.

        Complex tensors are complex; other types of the model are not restored.
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
    step: int | None = None,
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
        gammas: Exponents of the averages wanted, or
        sigma_rels: their lengths as fractions of the training time, in (0, 12 ** -0.5).
        step: The target, a step with a committed snapshot; by default the newest.
        run: The run whose lineage is read; by default the newest.
        exclude: Steps to leave out, damaged ones for example.
        tolerance: Relative profile error that may be added to save reading; 0 reads all snapshots.
        dtype: Type of the arrays, float32 or float64.
        memory_bytes: Memory to stay within while reading, beside the result.
        threads: At most so many; by default one for each core this process may use.
        accumulate: Type of products and sums, "float64" or "float32".

    Raises:
        ValueError: A length is outside its domain, or the budget is too small.
        SnapshotError: No such snapshot, a damaged one, or snapshots that do not belong together.
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
    """Synthesize the averages of a plan in memory; arguments and errors are those of synthesize()."""
    flats = tuple(np.empty(plan.elements, dtype=dtype) for _ in plan.gammas)

    def take(begin_element: int, block: NDArray[np.floating], /) -> None:
        for flat, row in zip(flats, block, strict=True):
            flat[begin_element : begin_element + len(row)] = row

    stream(plan, take, memory_bytes=memory_bytes, threads=threads, accumulate=accumulate)
    copied = bytearray()
    stream_copied(plan, lambda _, piece: copied.extend(piece))
    return Synthesized(plan, flats, bytes(copied))
