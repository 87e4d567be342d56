"""Many snapshots in, many averages out, in one pass and in constant memory.

The flat element space is walked in blocks. Of each block the columns are read in groups: while one group is multiplied,
the next is being read. All arithmetic is done on tiles of one size (the tail of the last one is zeros) and always in
the same order, so no bit of a result depends on the memory budget: results of BLAS depend on the shape of a product.

who          touches                                        ordered by
main thread  the sums of the block; the group that arrived  waits for all reads of a group before it uses it
reader       one column of the group that is under way      a column's next read is submitted after its last one was
                                                            waited for, so its running checksum sees the bytes in order
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.synthesis.numbers import widen
from nitrous_ema.synthesis.plan import Column, Plan
from nitrous_ema.synthesis.sources import OpenFiles, Reader, element_bytes

DEFAULT_MEMORY_BYTES = 1 << 30

TILE_ELEMENTS = (
    1 << 14
)  # with 32 columns the float64 tile is 4 MiB; 8 Ki to 32 Ki were equally fast, 2 Ki up to 25 % slower
GROUP_COLUMNS = 32
_MAX_BLOCK_ELEMENTS = 1 << 16  # measured with 32 columns: 256 Ki was 1.3 times slower, 1 Mi up to twice
_FIXED_BYTES = 4 << 20  # conversions, pieces being written
_COPY_BYTES = 1 << 20
_MAX_READERS = 4

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes there are to read."""


class Consumer(Protocol):
    """Takes one output, block after block."""

    def __call__(self, begin_element: int, block: NDArray[np.float64], /) -> None:
        """Take elements from ``begin_element`` on. The array is reused as soon as this returns."""


def stream(
    plan: Plan,
    consumers: Sequence[Consumer],
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress | None = None,
) -> None:
    """Read every column of a plan once, verify it, and hand each output to its consumer in float64.

    Args:
        plan: What to read, with which weights.
        consumers: One per output, called on this thread with consecutive blocks that cover the flat space, each of
            TILE_ELEMENTS elements but the last.
        memory_bytes: Memory to stay within, whatever the model and the number of columns.
        progress: Told of the bytes read.

    Raises:
        ValueError: The number of consumers is wrong, or the budget is too small for this many outputs.
        SnapshotDamaged: A chunk's checksum is wrong. What was handed out before is to be thrown away.
    """
    if len(consumers) != len(plan.gammas):
        raise ValueError(f"consumers: {len(consumers)} for {len(plan.gammas)} outputs; one per output is expected.")
    block_elements = block_size(plan, memory_bytes)
    multiply = _TileProduct(plan, block_elements)
    with closing(_read_ahead(plan, block_elements, progress)) as arrived:
        for unit, raw in arrived:
            multiply.add(unit, raw)
            if unit.group == multiply.last_group:
                multiply.hand_out(unit, consumers)


def stream_copied(plan: Plan, take: Callable[[int, memoryview], None]) -> None:
    """Read the target's copied tensors once, verified, and hand them on in order.

    Args:
        plan: Its target's snapshot is read.
        take: Called with the offset in the copied section and the bytes from there on, consecutively; no number lies
            across two calls. The memory is reused as soon as it returns.

    Raises:
        SnapshotDamaged: A chunk's checksum is wrong.
    """
    source = plan.target.copied
    if source is None:
        return
    # Tensors are aligned to their first one, which comes after up to 7 bytes of padding.
    first_piece = _COPY_BYTES + min((begin for begin, _ in plan.target.copied_spans.values()), default=0) % 8
    buffer = memoryview(bytearray(first_piece))
    with OpenFiles([source.path]) as files:
        reader = source.reader(files)
        begin, end = 0, min(first_piece, source.num_bytes)
        while begin < end:
            reader.read_into(buffer[: end - begin])
            take(begin, buffer[: end - begin])
            begin, end = end, min(end + _COPY_BYTES, source.num_bytes)


def block_size(plan: Plan, memory_bytes: int) -> int:
    """Elements per block under a memory budget: a multiple of the tile.

    Raises:
        ValueError: Not even one tile fits; the message says how much is needed.
    """
    group, outputs = min(GROUP_COLUMNS, len(plan.columns)), len(plan.gammas)
    fixed = _FIXED_BYTES + (group + outputs) * TILE_ELEMENTS * 8
    per_element = 2 * group * _widest(plan.columns) + outputs * 8
    tiles = (memory_bytes - fixed) // (per_element * TILE_ELEMENTS)
    if tiles < 1:
        needed = fixed + per_element * TILE_ELEMENTS
        raise ValueError(
            f"memory: {memory_bytes} bytes are too few for {outputs} outputs of {len(plan.columns)} columns; "
            f"at least {needed} bytes ({-(-needed >> 20)} MiB) are needed. Allow more memory, or ask for fewer at once."
        )
    whole = -(-plan.elements // TILE_ELEMENTS)
    return max(1, min(tiles, whole, _MAX_BLOCK_ELEMENTS // TILE_ELEMENTS)) * TILE_ELEMENTS


@dataclass(frozen=True, slots=True)
class _Unit:
    """One group's share of one block."""

    begin: int
    num_elements: int
    group: int


class _TileProduct:
    """Weights times columns of one block, tile by tile, summed over the groups."""

    def __init__(self, plan: Plan, block_elements: int) -> None:
        self._groups = [
            (plan.columns[begin : begin + GROUP_COLUMNS], plan.weights[begin : begin + GROUP_COLUMNS].T.copy())
            for begin in range(0, len(plan.columns), GROUP_COLUMNS)
        ]
        self.last_group = len(self._groups) - 1
        self._wide = np.zeros((min(GROUP_COLUMNS, len(plan.columns)), TILE_ELEMENTS), dtype=np.float64)
        self._product = np.empty((len(plan.gammas), TILE_ELEMENTS), dtype=np.float64)
        # [tiles, outputs, elements]: the product of a tile is one piece of memory
        self._sums = np.empty((block_elements // TILE_ELEMENTS, *self._product.shape), dtype=np.float64)

    def add(self, unit: _Unit, raw: NDArray[np.uint8]) -> None:
        """Add what a group contributes to its block; the first group starts the sums."""
        columns, weights = self._groups[unit.group]
        wide = self._wide[: len(columns)]
        for begin, sums in zip(range(0, unit.num_elements, TILE_ELEMENTS), self._sums, strict=False):
            end = min(begin + TILE_ELEMENTS, unit.num_elements)
            for row, column, stored in zip(wide, columns, raw, strict=False):
                width = element_bytes(column.source)
                widen(stored[begin * width : end * width], column.source.dtype, row[: end - begin])
                row[end - begin :] = 0.0
            with np.errstate(invalid="ignore", over="ignore"):  # weights that diverged give what they give
                np.matmul(weights, wide, out=sums if unit.group == 0 else self._product)
                if unit.group > 0:
                    sums += self._product

    def hand_out(self, unit: _Unit, consumers: Sequence[Consumer]) -> None:
        """Give the finished block to the consumers."""
        for begin, sums in zip(range(0, unit.num_elements, TILE_ELEMENTS), self._sums, strict=False):
            count = min(TILE_ELEMENTS, unit.num_elements - begin)
            for consumer, row in zip(consumers, sums, strict=True):
                consumer(unit.begin + begin, row[:count])


def _units(plan: Plan, block_elements: int) -> Iterator[_Unit]:
    for begin in range(0, plan.elements, block_elements):
        for group in range(-(-len(plan.columns) // GROUP_COLUMNS)):
            yield _Unit(begin, min(block_elements, plan.elements - begin), group)


def _read_ahead(
    plan: Plan, block_elements: int, progress: Progress | None
) -> Generator[tuple[_Unit, NDArray[np.uint8]], None, None]:
    """Yield the units with their bytes [columns of the group, bytes]; the next unit is read meanwhile."""
    rows, width = min(GROUP_COLUMNS, len(plan.columns)), block_elements * _widest(plan.columns)
    buffers = [np.empty((rows, width), dtype=np.uint8) for _ in range(2)]
    num_threads = min(_MAX_READERS, rows, os.cpu_count() or 1)
    total = sum(column.source.num_bytes for column in plan.columns)
    done = 0
    with (
        OpenFiles(column.source.path for column in plan.columns) as files,
        ThreadPoolExecutor(num_threads, thread_name_prefix="synthesis-read") as pool,
    ):
        readers = [column.source.reader(files) for column in plan.columns]

        def submit(unit: _Unit, raw: NDArray[np.uint8]) -> list[Future[int]]:
            first = unit.group * GROUP_COLUMNS
            group = list(zip(plan.columns, readers, strict=True))[first : first + GROUP_COLUMNS]
            return [pool.submit(_read, *pair, unit, row) for pair, row in zip(group, raw, strict=False)]

        units = list(_units(plan, block_elements))
        pending = submit(units[0], buffers[0]) if units else []
        try:
            for index, unit in enumerate(units):
                done += sum(future.result() for future in pending)
                raw = buffers[index % 2]
                pending = submit(units[index + 1], buffers[(index + 1) % 2]) if index + 1 < len(units) else []
                if progress is not None:
                    progress(done, total)
                yield unit, raw
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # the files are closed next


def _read(column: Column, reader: Reader, unit: _Unit, row: NDArray[np.uint8]) -> int:
    num_bytes = unit.num_elements * element_bytes(column.source)
    reader.read_into(row[:num_bytes].data)
    return num_bytes


def _widest(columns: Sequence[Column]) -> int:
    return max((element_bytes(column.source) for column in columns), default=1)
