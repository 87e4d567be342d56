"""Read many snapshots and compute many averages in one pass, in constant memory, on all cores.

The flat element space is cut into tiles on one fixed grid; the tail of the last tile is filled with zeros. One thread
computes a whole tile, always in the same order of operations: the columns in groups of GROUP_COLUMNS, the outputs in
groups of GROUP_OUTPUTS, one matrix product for each pair of groups, their sums in float64 (or float32). So for the same
columns, lengths and type of sums, no bit depends on the threads, on the memory budget, or on the part of the model that
is computed. BLAS results depend on the shape of a product, and all products have the same shape. Outputs that do not
fit into the memory budget take another pass over the snapshots, in whole groups.

Threads get blocks of neighboring tiles, so that each read is long enough. The system is asked to read ahead of them
(``snapshots.reading``): the first block of a new part of a file may wait for the disk, the following blocks do not.

thread        touches                                        ordered by
calling       progress; tiles, with ``on_calling_thread``    takes finished blocks in their order
one worker    a workspace; the tiles of one block; its       claims the workspace from a queue, for one block
              range of each output
all workers   descriptors, checksums                         locks of ``snapshots.reading``

Longer than 300 lines because the order of operations that the bits depend on belongs on one page.
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
from nitrous_ema._base.threads import thread_errors
from nitrous_ema.snapshots.pieces import ShardedSource, source_paths
from nitrous_ema.snapshots.reading import OpenFiles, element_bytes
from nitrous_ema.synthesis.blas_threads import one_thread_per_product
from nitrous_ema.synthesis.float_conversion import widen
from nitrous_ema.synthesis.plan import Column, Plan

DEFAULT_MEMORY_BYTES = 1 << 30

# With 32 columns the float64 tile is 4 MiB. Measured: 8 Ki to 32 Ki were equally fast, 2 Ki up to 25 % slower.
TILE_ELEMENTS = 1 << 14
GROUP_COLUMNS = 32
GROUP_OUTPUTS = 32
_OUTPUTS_PER_PASS = 4 * GROUP_OUTPUTS  # at most: each output is an open file
_MAX_BLOCK_ELEMENTS = 1 << 16  # measured with 32 columns: 256 Ki was 1.3 times slower, 1 Mi up to twice
_FIXED_BYTES = 4 << 20  # copied tensors, running checksums
# For each tensor name: its positions in files, as text and as objects. Measured: 1.9 kB, plus 0.7 kB for each profile,
# plus 8 (1 + profiles) times the name's length, most of it while headers are read (bench.tables_memory).
_TENSOR_BYTES, _PROFILE_BYTES, _NAME_COPIES = 2048, 768, 9
_CONSUMER_BYTES = 3 << 20  # per thread: values that the writer rounds and writes at a time, packed matrices of BLAS
_COPY_BYTES = 1 << 20  # of copied tensors, read in one piece

Accumulate = Literal["float64", "float32"]
"""Type of sums and products."""

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes to read, on the calling thread."""


class Consumer(Protocol):
    """Receives all outputs, tile by tile."""

    def __call__(self, begin_element: int, block: NDArray[np.floating], /) -> None:
        """Take the elements from ``begin_element`` on, shape [outputs, elements].

        Several threads call this at once and in no order, each element once; ``stream`` has an option for one thread.
        The array is reused as soon as this returns.
        """


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Threads and blocks that fit into a memory budget."""

    threads: int
    """Number of blocks computed at a time."""
    block_elements: int
    """Elements per block; a multiple of TILE_ELEMENTS."""
    memory_bytes: int
    """Upper bound of the memory that they take."""


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
    """Read every column of a plan once, verify its checksums, and pass the outputs to a consumer.

    Args:
        plan: The columns and their weights.
        consumer: Receives tiles that cover the flat space without gaps, in the type of the sums.
        memory_bytes: Memory budget in bytes, whatever the sizes of the model and of the plan.
        progress: Called with the bytes read and the bytes to read.
        threads: Maximum number of threads; by default one for each core this process may use.
        accumulate: Type of products and sums.
        elements: Compute only the tiles that overlap this half-open range; all tiles by default. Whole chunks around
            them are read, which verifying them needs.
        on_calling_thread: Call the consumer on the calling thread, in order.

    Raises:
        ValueError: The budget is too small for the number of outputs, or threads is less than 1.
        SnapshotDamaged: A chunk's checksum does not match. The caller must discard all tiles that it received.
    """
    sizes = engine_sizes(plan, memory_bytes, threads=threads, accumulate=accumulate)
    blocks = _blocks(plan, sizes.block_elements, elements or (0, plan.elements))
    row_bytes = sum(element_bytes(column.source) for column in plan.columns)
    total, done = sum(block.num_elements for block in blocks) * row_bytes, 0
    with (
        one_thread_per_product(),
        OpenFiles(path for column in plan.columns for path in source_paths(column.source)) as files,
        ThreadPoolExecutor(sizes.threads, thread_name_prefix="synthesis") as pool,
    ):
        engine = _Engine(plan, sizes, files, accumulate, None if on_calling_thread else consumer)
        waiting: deque[tuple[_Block, Future[list[_Tile]]]] = deque()
        remaining = iter(blocks)
        try:
            while True:
                # Two blocks per thread: a thread that finishes a block has another while this thread consumes. More
                # blocks would hold finished tiles that the memory budget does not count.
                while len(waiting) < 2 * sizes.threads and (block := next(remaining, None)) is not None:
                    with thread_errors():
                        waiting.append((block, pool.submit(engine.compute, block)))
                if not waiting:
                    break
                block, future = waiting.popleft()
                for begin, tile in future.result():
                    consumer(begin, tile)
                done += block.num_elements * row_bytes
                if progress is not None:
                    progress(done, total)
            engine.finish()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # threads must not read from the files, which close next


def stream_copied(plan: Plan, take: Callable[[int, memoryview], None]) -> None:
    """Read the target's copied tensors once, verify their checksums, and pass them on in order.

    Args:
        plan: The plan whose target snapshot is read.
        take: Called with the offset in the copied section and the bytes from there on, consecutively. No number is
            divided between two calls. The memory is reused as soon as this returns.

    Raises:
        SnapshotDamaged: A chunk's checksum does not match.
    """
    source = plan.target.copied
    if source is None:
        return
    # The section begins with up to 7 bytes of padding, and tensors are aligned to the first of them. With a first piece
    # that is longer by the padding, no number of up to 8 bytes lies across two pieces.
    first_piece = _COPY_BYTES + min((begin for begin, _ in plan.target.copied_spans.values()), default=0) % 8
    buffer = memoryview(bytearray(first_piece))
    with OpenFiles(source_paths(source)) as files:
        reader = source.reader(files)
        begin, end = 0, min(first_piece, source.num_bytes)
        while begin < end:
            reader.read_into(buffer[: end - begin])
            take(begin, buffer[: end - begin])
            begin, end = end, min(end + _COPY_BYTES, source.num_bytes)
        reader.finish()


def engine_sizes(
    plan: Plan, memory_bytes: int, *, threads: int | None = None, accumulate: Accumulate = "float64"
) -> BlockSizes:
    """Return the threads and the block size that fit into a memory budget, more threads before longer blocks.

    Args:
        plan: The columns and outputs.
        memory_bytes: Memory budget, in bytes.
        threads: Maximum number of threads; by default one for each core this process may use.
        accumulate: Type of products and sums.

    Raises:
        ValueError: Not even one tile fits, and the message contains the bytes needed; or threads or accumulate is
            invalid.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: {threads}; expected 1 or more.")
    if accumulate not in ("float64", "float32"):
        raise ValueError(f"accumulate: {accumulate!r}; expected 'float64' or 'float32'.")
    most_tiles = max(1, min(-(-plan.elements // TILE_ELEMENTS), _MAX_BLOCK_ELEMENTS // TILE_ELEMENTS))
    most_threads = max(1, min(threads or available_cores(), -(-plan.elements // (most_tiles * TILE_ELEMENTS))))
    fixed = _fixed_bytes(plan)
    smallest, per_tile = _workspace_bytes(plan, len(plan.gammas), accumulate)
    needed = fixed + smallest + per_tile
    if memory_bytes < needed:
        outputs, columns = pluralize(len(plan.gammas), "output"), pluralize(len(plan.columns), "column")
        raise ValueError(
            f"memory budget too small: {outputs} from {columns} ({pluralize(len(plan.target.records), 'tensor')}) need "
            f"at least {needed} bytes ({-(-needed >> 20)} MiB), got {memory_bytes} bytes. "
            "Raise --memory (memory_bytes=) or request fewer lengths per run."
        )
    used = min(most_threads, (memory_bytes - fixed) // (smallest + per_tile))
    tiles = min(most_tiles, ((memory_bytes - fixed) // used - smallest) // per_tile)
    return BlockSizes(used, tiles * TILE_ELEMENTS, fixed + used * (smallest + tiles * per_tile))


def passes(plan: Plan, memory_bytes: int, *, accumulate: Accumulate = "float64") -> list[range]:
    """Divide the outputs into as few passes over the snapshots as a memory budget allows.

    No bit depends on the division: all passes but the last consist of whole groups of GROUP_OUTPUTS.

    Returns:
        The indices of the outputs of each pass.
    """
    total, fixed = len(plan.gammas), _fixed_bytes(plan)
    at_once = GROUP_OUTPUTS
    for more in range(2 * GROUP_OUTPUTS, _OUTPUTS_PER_PASS + 1, GROUP_OUTPUTS):
        if fixed + sum(_workspace_bytes(plan, min(more, total), accumulate)) <= memory_bytes:
            at_once = more
    return [range(first, min(first + at_once, total)) for first in range(0, total, at_once)]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fixed_bytes(plan: Plan) -> int:
    """Return the memory that does not depend on threads and blocks, most of it for tensor names and columns."""
    profiles, sources = len(plan.target.gammas), [column.source for column in plan.columns]
    keys = [key for record in plan.target.records for key in record.keys]
    named = _TENSOR_BYTES + profiles * _PROFILE_BYTES
    names = len(keys) * named + _NAME_COPIES * (1 + profiles) * sum(map(len, keys))
    # Columns of one run share their table of pieces.
    shared = {id(each.pieces): each.pieces.held_bytes for each in sources if isinstance(each, ShardedSource)}
    return _FIXED_BYTES + names + sum(source.held_bytes for source in sources) + sum(shared.values())


def _workspace_bytes(plan: Plan, outputs: int, accumulate: Accumulate) -> tuple[int, int]:
    """Return the memory of one thread: the part that does not depend on its blocks, and the part for each tile."""
    group, item = min(GROUP_COLUMNS, len(plan.columns)), np.dtype(accumulate).itemsize
    fixed = group * TILE_ELEMENTS * (item + 4) + min(outputs, GROUP_OUTPUTS) * TILE_ELEMENTS * item + _CONSUMER_BYTES
    # Three times the sums: one block is being computed and waits for its next group of columns, and two finished blocks
    # per thread wait for the calling thread.
    return fixed, TILE_ELEMENTS * (group * _widest(plan.columns) + 3 * outputs * item)


_Tile = tuple[int, NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighboring tiles: the elements to read, and the tiles of them to compute."""

    begin: int
    """First element."""
    num_elements: int
    """Number of elements that are read."""
    tiles: range
    """First elements of the tiles that are computed."""


def _blocks(plan: Plan, block_elements: int, requested: tuple[int, int]) -> list[_Block]:
    """Return blocks that cover the requested tiles, and the whole chunks around them."""
    # A checksum covers a whole chunk, so tiles are verified only if all bytes of their chunks are read. The lengths of
    # tiles and chunks are powers of two, so multiples of the longest are multiples of all.
    whole = max(TILE_ELEMENTS, *(each.source.chunk_bytes // element_bytes(each.source) for each in plan.columns))
    begin, end = requested[0] // whole * whole, min(-(-requested[1] // whole) * whole, plan.elements)
    blocks: list[_Block] = []
    for first in range(begin, end if requested[0] < requested[1] else begin, block_elements):
        last = min(first + block_elements, end)
        tiles = range(max(first, requested[0] // TILE_ELEMENTS * TILE_ELEMENTS), min(last, requested[1]), TILE_ELEMENTS)
        blocks.append(_Block(first, last - first, tiles))
    return blocks


class _Workspace:
    """Buffers of one thread, allocated once and reused for all its blocks."""

    def __init__(self, plan: Plan, sizes: BlockSizes, accumulate: Accumulate) -> None:
        group, outputs = min(GROUP_COLUMNS, len(plan.columns)), len(plan.gammas)
        # With several groups of columns, the sums of all tiles of a block wait for the next group. With one group,
        # each tile is finished at once, and one buffer is enough.
        tiles = sizes.block_elements // TILE_ELEMENTS if len(plan.columns) > GROUP_COLUMNS else 1
        self.raw = np.empty((group, sizes.block_elements * _widest(plan.columns)), dtype=np.uint8)
        self.wide = np.empty((group, TILE_ELEMENTS), dtype=accumulate)
        self.scratch = np.empty((group, TILE_ELEMENTS), dtype=np.uint32)
        self.product = np.empty((min(outputs, GROUP_OUTPUTS), TILE_ELEMENTS), dtype=accumulate)
        self.sums = np.empty((tiles, outputs, TILE_ELEMENTS), dtype=accumulate)


class _Engine:
    """State that the threads share. It is constant while they run, except for the queue and the readers, which lock.

    Args:
        plan: The columns and their weights.
        sizes: Threads and block size.
        files: The files of the columns.
        accumulate: Type of products and sums.
        consumer: Receives the tiles on the computing threads; None returns them from ``compute``.
    """

    def __init__(
        self, plan: Plan, sizes: BlockSizes, files: OpenFiles, accumulate: Accumulate, consumer: Consumer | None
    ) -> None:
        self._consumer = consumer
        readers = [column.source.reader(files) for column in plan.columns]
        self._groups = [
            (
                list(zip(plan.columns, readers, strict=True))[begin : begin + GROUP_COLUMNS],
                list(_dtype_ranges(plan.columns[begin : begin + GROUP_COLUMNS])),
                np.ascontiguousarray(plan.weights[begin : begin + GROUP_COLUMNS].T, dtype=accumulate),
            )
            for begin in range(0, len(plan.columns), GROUP_COLUMNS)
        ]
        self._free_workspaces: SimpleQueue[_Workspace] = SimpleQueue()
        for _ in range(sizes.threads):
            self._free_workspaces.put(_Workspace(plan, sizes, accumulate))

    def finish(self) -> None:
        """Verify what the blocks have read of chunks that they have not read whole."""
        for columns, _, _ in self._groups:
            for _, reader in columns:
                reader.finish()

    def compute(self, block: _Block) -> list[_Tile]:
        """Read a block and compute its tiles. Pass them to the consumer, or return them if there is no consumer."""
        space = self._free_workspaces.get()
        finished: list[_Tile] = []
        try:
            for group, (columns, dtype_ranges, weights) in enumerate(self._groups):
                for row, (column, reader) in zip(space.raw, columns, strict=False):
                    width = element_bytes(column.source)
                    reader.read_at(block.begin * width, row[: block.num_elements * width].data)
                for begin in block.tiles:
                    sums = space.sums[(begin - block.begin) // TILE_ELEMENTS % len(space.sums)]
                    inside, end = begin - block.begin, min(begin - block.begin + TILE_ELEMENTS, block.num_elements)
                    _widen_tile(dtype_ranges, space, inside, end)
                    _multiply(weights, space, sums, is_first=group == 0)
                    if group + 1 < len(self._groups):
                        continue
                    if self._consumer is not None:
                        self._consumer(begin, sums[:, : end - inside])
                    else:
                        finished.append((begin, sums[:, : end - inside].copy()))
        finally:
            self._free_workspaces.put(space)
        return finished


def _widen_tile(dtype_ranges: Sequence[tuple[str, int, int]], space: _Workspace, begin: int, end: int) -> None:
    """Convert one tile of a group of columns, neighboring columns of one type at a time."""
    for dtype, first, last in dtype_ranges:
        width, count = DTYPE_BYTES[dtype], end - begin
        stored = space.raw[first:last, begin * width : end * width]
        widen(stored, dtype, space.wide[first:last, :count], scratch=space.scratch[first:last, :count])
    space.wide[:, end - begin :] = 0.0  # the product always has a whole tile's shape, which its bits depend on


def _multiply(weights: NDArray[np.floating], space: _Workspace, sums: NDArray[np.floating], *, is_first: bool) -> None:
    """Add the products of one group of columns with all groups of outputs to the sums of a tile."""
    # A model that diverged has infinite or NaN weights, and so have its averages; that is not an error here.
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for first in range(0, len(weights), GROUP_OUTPUTS):
            some, summed = weights[first : first + GROUP_OUTPUTS], sums[first : first + GROUP_OUTPUTS]
            product = summed if is_first else space.product[: len(some)]
            np.matmul(some, space.wide[: some.shape[1]], out=product)
            if not is_first:
                summed += product


def _dtype_ranges(columns: Sequence[Column]) -> Iterator[tuple[str, int, int]]:
    """Yield ranges of neighboring columns of one stored type: the type, the first column, the column after the last."""
    first = 0
    for dtype, neighbors in groupby(columns, key=lambda column: column.source.dtype):
        last = first + sum(1 for _ in neighbors)
        yield dtype, first, last
        first = last


def _widest(columns: Sequence[Column]) -> int:
    """Return the bytes of one element in the widest stored type."""
    return max((element_bytes(column.source) for column in columns), default=1)
