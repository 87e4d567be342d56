"""Many snapshots in, many averages out, in one pass and in constant memory, on all cores.

The flat element space is cut into tiles on one fixed grid, the tail of the last one filled with zeros. A tile is the
work of one thread from the first byte to the last, and of one order of operations: the columns in groups of
GROUP_COLUMNS, the outputs in groups of GROUP_OUTPUTS, one product of matrices for each two groups, their sums in
float64 (or float32). So for the same columns, lengths and type of sums no bit depends on threads, memory budget, or on
which part of the model is computed: results of BLAS depend on the shape of a product, and nothing else is left that
could differ. Outputs that the budget does not allow at once take another pass over the snapshots, in whole groups.

Threads get blocks of neighbouring tiles, so that each read is long enough. The system is asked to read ahead of them
(``sources``); the first block of a new part of a file may wait for the disk, the others find it in memory.

who           touches                                        ordered by
calling       progress; blocks, where it wants them itself   takes finished blocks in their order
one thread    a workspace; the tiles of one block; its       claims the workspace from a queue, for a block
              stretch of each output
all threads   descriptors, checksums                         ``sources``

Longer than the house's 300 lines because the order of operations that the bits depend on belongs on one page.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nitrous_ema._base.arguments import pluralize
from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.snapshots.reading import OpenFiles, element_bytes
from nitrous_ema.synthesis.blas_threads import one_thread_per_product
from nitrous_ema.synthesis.float_conversion import widen
from nitrous_ema.synthesis.plan import Column, Plan

DEFAULT_MEMORY_BYTES = 1 << 30

TILE_ELEMENTS = (
    1 << 14
)  # with 32 columns the float64 tile is 4 MiB; 8 Ki to 32 Ki were equally fast, 2 Ki up to 25 % slower
GROUP_COLUMNS = 32
GROUP_OUTPUTS = 32
_OUTPUTS_PER_PASS = 4 * GROUP_OUTPUTS  # at most: each has an open file
_MAX_BLOCK_ELEMENTS = 1 << 16  # measured with 32 columns: 256 Ki was 1.3 times slower, 1 Mi up to twice
_FIXED_BYTES = 4 << 20  # copied tensors, running checksums
# For each name of a tensor: its places in files, as text and as objects. Measured were 1.9 kB, 0.7 kB for each profile
# and 8 (1 + profiles) copies of the name, the most of it while headers are read (bench.tables_memory).
_TENSOR_BYTES, _PROFILE_BYTES, _NAME_COPIES = 2048, 768, 9
_CONSUMER_BYTES = 3 << 20  # per thread: what outputs.py rounds and writes at a time, packed matrices of BLAS
_COPY_BYTES = 1 << 20

Accumulate = Literal["float64", "float32"]
"""Type of sums and products."""

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes there are to read, on the calling thread."""


class Consumer(Protocol):
    """Takes all outputs, tile after tile."""

    def __call__(self, begin_element: int, block: NDArray[np.floating], /) -> None:
        """Take the elements from ``begin_element`` on, shape [outputs, elements].

        Called by several threads at once and in no order, each element once, unless ``stream`` is told otherwise. The
        array is reused as soon as this returns.
        """


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """What a memory budget allows."""

    threads: int
    """Blocks computed at a time."""
    block_elements: int
    """Elements per block; a multiple of TILE_ELEMENTS."""
    memory_bytes: int
    """What these take at most."""


def stream(
    plan: Plan,
    consumer: Consumer,
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress | None = None,
    threads: int | None = None,
    accumulate: Accumulate = "float64",
    elements: tuple[int, int] | None = None,
    on_calling_thread: bool = False,
) -> None:
    """Read every column of a plan once, verify it, and hand the outputs to a consumer.

    Args:
        plan: What to read, with which weights.
        consumer: Gets tiles that cover the flat space without gaps, in the type of the sums.
        memory_bytes: Memory to stay within, whatever the model and the number of columns.
        progress: Told of the bytes read.
        threads: At most so many; by default one for each core this process may use.
        accumulate: Type of products and sums.
        elements: Only the tiles that hold some of this half-open range; all of them by default. Read is what is
            needed to verify these.
        on_calling_thread: Call the consumer on this thread, in order.

    Raises:
        ValueError: The budget is too small for this many outputs, or threads is less than 1.
        SnapshotDamaged: A chunk's checksum is wrong. What was handed out before is to be thrown away.
    """
    sizes = engine_sizes(plan, memory_bytes, threads=threads, accumulate=accumulate)
    units = _units(plan, sizes.block_elements, elements or (0, plan.elements))
    row_bytes = sum(element_bytes(column.source) for column in plan.columns)
    total, done = sum(unit.num_elements for unit in units) * row_bytes, 0
    with (
        one_thread_per_product(),
        OpenFiles(column.source.path for column in plan.columns) as files,
        ThreadPoolExecutor(sizes.threads, thread_name_prefix="synthesis") as pool,
    ):
        engine = _Engine(plan, sizes, files, accumulate, None if on_calling_thread else consumer)
        waiting: deque[tuple[_Unit, Future[list[_Tile]]]] = deque()
        left = iter(units)
        try:
            while True:
                while len(waiting) < 2 * sizes.threads and (unit := next(left, None)) is not None:
                    waiting.append((unit, pool.submit(engine.compute, unit)))
                if not waiting:
                    break
                unit, future = waiting.popleft()
                for begin, tile in future.result():
                    consumer(begin, tile)
                done += unit.num_elements * row_bytes
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # the files are closed next


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


def engine_sizes(
    plan: Plan, memory_bytes: int, *, threads: int | None = None, accumulate: Accumulate = "float64"
) -> BlockSizes:
    """How many threads compute blocks of which size within a memory budget.

    Raises:
        ValueError: Not even one tile fits; the message says how much is needed. Or threads or accumulate is wrong.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: {threads}; expected 1 or more.")
    if accumulate not in ("float64", "float32"):
        raise ValueError(f"accumulate: {accumulate!r}; expected 'float64' or 'float32'.")
    most_tiles = max(1, min(-(-plan.elements // TILE_ELEMENTS), _MAX_BLOCK_ELEMENTS // TILE_ELEMENTS))
    wanted = threads or available_cores()
    wanted = max(1, min(wanted, -(-plan.elements // (most_tiles * TILE_ELEMENTS))))
    fixed = _fixed_bytes(plan)
    smallest, per_tile = _workspace_bytes(plan, len(plan.gammas), accumulate)
    needed = fixed + smallest + per_tile
    if memory_bytes < needed:
        raise ValueError(
            f"memory: {memory_bytes} bytes are too few for {pluralize(len(plan.gammas), 'output')} of "
            f"{pluralize(len(plan.columns), 'column')} at once and the names of "
            f"{pluralize(len(plan.target.records), 'tensor')}; at least {needed} bytes ({-(-needed >> 20)} MiB) are "
            "needed. Allow more memory, or ask for fewer averages at once."
        )
    used = min(wanted, (memory_bytes - fixed) // (smallest + per_tile))
    tiles = min(most_tiles, ((memory_bytes - fixed) // used - smallest) // per_tile)
    return BlockSizes(used, tiles * TILE_ELEMENTS, fixed + used * (smallest + tiles * per_tile))


def passes(plan: Plan, memory_bytes: int, *, accumulate: Accumulate = "float64") -> list[range]:
    """The outputs that are made while the snapshots are read once, for as few readings as a memory budget allows.

    No bit depends on it: all but the last consist of whole groups of GROUP_OUTPUTS.
    """
    total, fixed = len(plan.gammas), _fixed_bytes(plan)
    at_once = GROUP_OUTPUTS
    for more in range(2 * GROUP_OUTPUTS, _OUTPUTS_PER_PASS + 1, GROUP_OUTPUTS):
        if fixed + sum(_workspace_bytes(plan, min(more, total), accumulate)) <= memory_bytes:
            at_once = more
    return [range(first, min(first + at_once, total)) for first in range(0, total, at_once)]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fixed_bytes(plan: Plan) -> int:
    """Memory whatever is computed at a time: what there is once, and what is known of each tensor and column."""
    profiles, sources = len(plan.target.gammas), [column.source for column in plan.columns]
    keys = [key for record in plan.target.records for key in record.keys]
    named = _TENSOR_BYTES + profiles * _PROFILE_BYTES
    names = len(keys) * named + _NAME_COPIES * (1 + profiles) * sum(map(len, keys))
    return _FIXED_BYTES + names + sum(source.held_bytes for source in sources)


def _workspace_bytes(plan: Plan, outputs: int, accumulate: Accumulate) -> tuple[int, int]:
    """Memory of one thread: whatever the size of its blocks, and for each tile of them."""
    group, item = min(GROUP_COLUMNS, len(plan.columns)), np.dtype(accumulate).itemsize
    fixed = group * TILE_ELEMENTS * (item + 4) + min(outputs, GROUP_OUTPUTS) * TILE_ELEMENTS * item + _CONSUMER_BYTES
    # Sums of the block while its groups come; and finished ones, of which two per thread wait for the calling thread.
    return fixed, TILE_ELEMENTS * (group * _widest(plan.columns) + 3 * outputs * item)


_Tile = tuple[int, NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class _Unit:
    """A block: what is read of it, and which of that is computed."""

    begin: int
    num_elements: int
    tiles: range
    """First elements of the tiles that are wanted."""


def _units(plan: Plan, block_elements: int, wanted: tuple[int, int]) -> list[_Unit]:
    """Blocks that cover the wanted tiles and whole chunks around them."""
    whole = max(TILE_ELEMENTS, *(each.source.chunk_bytes // element_bytes(each.source) for each in plan.columns))
    begin, end = wanted[0] // whole * whole, min(-(-wanted[1] // whole) * whole, plan.elements)
    units: list[_Unit] = []
    for first in range(begin, end if wanted[0] < wanted[1] else begin, block_elements):
        last = min(first + block_elements, end)
        tiles = range(max(first, wanted[0] // TILE_ELEMENTS * TILE_ELEMENTS), min(last, wanted[1]), TILE_ELEMENTS)
        units.append(_Unit(first, last - first, tiles))
    return units


class _Workspace:
    """Memory of one thread."""

    def __init__(self, plan: Plan, sizes: BlockSizes, accumulate: Accumulate) -> None:
        group, outputs = min(GROUP_COLUMNS, len(plan.columns)), len(plan.gammas)
        tiles = sizes.block_elements // TILE_ELEMENTS if len(plan.columns) > GROUP_COLUMNS else 1
        self.raw = np.empty((group, sizes.block_elements * _widest(plan.columns)), dtype=np.uint8)
        self.wide = np.empty((group, TILE_ELEMENTS), dtype=accumulate)
        self.scratch = np.empty((group, TILE_ELEMENTS), dtype=np.uint32)
        self.product = np.empty((min(outputs, GROUP_OUTPUTS), TILE_ELEMENTS), dtype=accumulate)
        self.sums = np.empty((tiles, outputs, TILE_ELEMENTS), dtype=accumulate)  # one will do where no group follows


class _Engine:
    """What the threads share. Only read once they run, but for the queue and what ``sources`` guards."""

    def __init__(
        self, plan: Plan, sizes: BlockSizes, files: OpenFiles, accumulate: Accumulate, consumer: Consumer | None
    ) -> None:
        self._consumer = consumer
        readers = [column.source.reader(files) for column in plan.columns]
        self._groups = [
            (
                list(zip(plan.columns, readers, strict=True))[begin : begin + GROUP_COLUMNS],
                list(_runs(plan.columns[begin : begin + GROUP_COLUMNS])),
                np.ascontiguousarray(plan.weights[begin : begin + GROUP_COLUMNS].T, dtype=accumulate),
            )
            for begin in range(0, len(plan.columns), GROUP_COLUMNS)
        ]
        self._free: SimpleQueue[_Workspace] = SimpleQueue()
        for _ in range(sizes.threads):
            self._free.put(_Workspace(plan, sizes, accumulate))

    def compute(self, unit: _Unit) -> list[_Tile]:
        """Hand a block's tiles to the consumer; or return them, where there is none."""
        space = self._free.get()
        finished: list[_Tile] = []
        try:
            for group, (columns, runs, weights) in enumerate(self._groups):
                for row, (column, reader) in zip(space.raw, columns, strict=False):
                    width = element_bytes(column.source)
                    reader.read_at(unit.begin * width, row[: unit.num_elements * width].data)
                for begin in unit.tiles:
                    sums = space.sums[(begin - unit.begin) // TILE_ELEMENTS % len(space.sums)]
                    inside, end = begin - unit.begin, min(begin - unit.begin + TILE_ELEMENTS, unit.num_elements)
                    _widen_tile(runs, space, inside, end)
                    _multiply(weights, space, sums, is_first=group == 0)
                    if group + 1 < len(self._groups):
                        continue
                    if self._consumer is not None:
                        self._consumer(begin, sums[:, : end - inside])
                    else:
                        finished.append((begin, sums[:, : end - inside].copy()))
        finally:
            self._free.put(space)
        return finished


def _widen_tile(runs: Sequence[tuple[str, int, int]], space: _Workspace, begin: int, end: int) -> None:
    """Convert one tile of a group, stretches of columns of one type at a time."""
    for dtype, first, last in runs:
        width, count = DTYPE_BYTES[dtype], end - begin
        stored = space.raw[first:last, begin * width : end * width]
        widen(stored, dtype, space.wide[first:last, :count], scratch=space.scratch[first:last, :count])
    space.wide[:, end - begin :] = 0.0


def _multiply(weights: NDArray[np.floating], space: _Workspace, sums: NDArray[np.floating], *, is_first: bool) -> None:
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):  # weights that diverged give what they give
        for first in range(0, len(weights), GROUP_OUTPUTS):
            some, summed = weights[first : first + GROUP_OUTPUTS], sums[first : first + GROUP_OUTPUTS]
            product = summed if is_first else space.product[: len(some)]
            np.matmul(some, space.wide[: some.shape[1]], out=product)
            if not is_first:
                summed += product


def _runs(columns: Sequence[Column]) -> Iterator[tuple[str, int, int]]:
    """Neighbours of one stored type: the type, the first one, the one after the last."""
    first = 0
    for dtype, run in groupby(columns, key=lambda column: column.source.dtype):
        last = first + sum(1 for _ in run)
        yield dtype, first, last
        first = last


def _widest(columns: Sequence[Column]) -> int:
    return max((element_bytes(column.source) for column in columns), default=1)
