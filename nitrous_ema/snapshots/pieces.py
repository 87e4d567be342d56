"""The flat array of a section, in pieces that lie in the files of several ranks.

A rank's box of a tensor is one or several pieces: matrices with some columns of some rows of the tensor, which lie back
to back in the rank's file. A reader of the flat array reads, for each piece in the requested range, one range of a
file, and copies its rows to their places. Tiles and sums of ``synthesis.streaming`` are those of the flat array, so no
bit of an output depends on how its snapshots were sharded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.snapshots.boxes import Box
from nitrous_ema.snapshots.reading import FileSource, OpenFiles, Reader, Source

# Columns of a table of pieces. A piece is a matrix: some rows of one tensor, of each the same range. Tensors are seen
# as matrices whose rows are ``_PITCH`` bytes long. All are in bytes, except for _FIRST_ROW, _ROWS and _FILE.
_BEGIN, _END, _BASE, _PITCH, _FIRST_ROW, _ROWS, _COLUMN, _WIDTH, _PLACE, _FILE = range(10)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Where the bytes of a section lie in the files of the ranks: the same for all profiles and snapshots of a run."""

    begins: NDArray[np.int64]
    """Position of each tensor in the section, ascending."""
    first: NDArray[np.int64]
    """Index of each tensor's first piece, and behind the last tensor the number of pieces."""
    table: NDArray[np.int64]
    """The pieces, shape [pieces, 10]."""

    @property
    def held_bytes(self) -> int:
        """Memory of the table."""
        return self.begins.nbytes + self.first.nbytes + self.table.nbytes

    def in_range(self, begin: int, end: int) -> Iterator[list[int]]:
        """Yield the pieces that have bytes of a range of the section."""
        tensor = max(0, int(np.searchsorted(self.begins, begin, side="right")) - 1)
        last = int(np.searchsorted(self.begins, end, side="left"))
        some = self.table[self.first[tensor] : self.first[last]]
        yield from some[(some[:, _BEGIN] < end) & (some[:, _END] > begin)].tolist()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardedSource:
    """A flat array of numbers in the files of several ranks; see ``reading.Source``."""

    files: Sequence[FileSource]
    """The section of each rank's file."""
    pieces: Pieces
    """Where its bytes lie in them."""
    num_bytes: int
    dtype: str
    chunk_bytes: int = 1  # a range is verified by reading the rest of its chunks: ``finish``

    @property
    def path(self) -> Path:
        """The file of the first rank."""
        return self.files[0].path

    @property
    def held_bytes(self) -> int:
        """Upper bound of the memory for the checksums, without the table that all sources of a run share."""
        return sum(file.held_bytes for file in self.files)

    def reader(self, files: OpenFiles) -> Reader:
        """Return a reader at the first byte."""
        return _ShardedReader(self, files)


def source_paths(source: Source) -> Iterator[Path]:
    """Yield the files of a source, in the order of the ranks that wrote them."""
    if isinstance(source, ShardedSource):
        yield from (file.path for file in source.files)
    else:
        yield source.path


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor in the file of one rank."""

    box: Box
    file: int
    """Index of the file."""
    place: int
    """Position of its first byte in the section of the file."""


def pieces_of(tensors: Sequence[tuple[int, tuple[int, ...], int, Sequence[Part]]]) -> Pieces:
    """Return the pieces of a section.

    Args:
        tensors: Of each tensor its first byte in the section, ascending; its shape; the bytes of an element; and the
            parts that make it whole.
    """
    begins, first, rows = [], [0], []
    for base, shape, item_bytes, parts in tensors:
        found = [piece for part in parts for piece in _matrices(shape, part, item_bytes, base)]
        rows += sorted(found)
        begins.append(base)
        first.append(len(rows))
    table = np.array(rows, dtype=np.int64).reshape(-1, 10)
    return Pieces(np.array(begins, dtype=np.int64), np.array(first, dtype=np.int64), table)


def _matrices(shape: tuple[int, ...], part: Part, item_bytes: int, base: int) -> Iterator[tuple[int, ...]]:
    """Yield the pieces of one box, as rows of the table."""
    (offset, sizes), file, place = part.box, part.file, part.place
    # The dimensions behind the last divided one are contiguous in the box as well, so they belong to the columns.
    last = max((dim for dim in range(len(shape)) if sizes[dim] != shape[dim]), default=None)
    if last is None:
        num_bytes = math.prod(shape) * item_bytes
        yield base, base + num_bytes, base, num_bytes, 0, 1, 0, num_bytes, place, file
        return
    inner = math.prod(shape[last + 1 :]) * item_bytes
    pitch, column, width = shape[last] * inner, offset[last] * inner, sizes[last] * inner
    # The dimensions before it are the rows. Those in front of the next divided one are one run of rows for each index.
    outer = max((dim for dim in range(last) if sizes[dim] != shape[dim]), default=0)
    rows_per_index = math.prod(shape[outer + 1 : last])
    begin, count = (offset[outer] * rows_per_index, sizes[outer] * rows_per_index) if last else (0, 1)
    run_rows = shape[outer] * rows_per_index if last else 1
    strides = [math.prod(shape[dim + 1 : outer]) for dim in range(outer)]
    runs = itertools.product(*(range(offset[dim], offset[dim] + sizes[dim]) for dim in range(outer)))
    for number, index in enumerate(runs):
        first_row = sum(i * stride for i, stride in zip(index, strides, strict=True)) * run_rows + begin
        begin_byte = base + first_row * pitch + column
        end_byte = begin_byte + (count - 1) * pitch + width
        yield begin_byte, end_byte, base, pitch, first_row, count, column, width, place + number * count * width, file


class _ShardedReader:
    def __init__(self, source: ShardedSource, files: OpenFiles) -> None:
        self._pieces = source.pieces
        self._readers = [each.reader(files) for each in source.files]
        self._position = 0  # of read_into()

    def read_into(self, out: memoryview) -> None:
        self.read_at(self._position, out)
        self._position += len(out)

    def read_at(self, begin: int, out: memoryview) -> None:
        target = np.frombuffer(out, dtype=np.uint8)
        for piece in self._pieces.in_range(begin, begin + len(out)):
            self._read_piece(piece, begin, target)

    def finish(self) -> None:
        for reader in self._readers:
            reader.finish()

    def _read_piece(self, piece: list[int], begin: int, target: NDArray[np.uint8]) -> None:
        """Read what one piece has of the range that ``target`` holds, which begins at ``begin``."""
        end, reader = begin + len(target), self._readers[piece[_FILE]]
        base, pitch, width = piece[_BASE], piece[_PITCH], piece[_WIDTH]
        if width == pitch:  # whole rows are contiguous, in the section and in the file
            low, high = max(begin, piece[_BEGIN]), min(end, piece[_END])
            reader.read_at(piece[_PLACE] + low - piece[_BEGIN], target[low - begin : high - begin].data)
            return
        first_row = piece[_FIRST_ROW]
        row = max(first_row, (begin - base) // pitch)
        last_row = min(first_row + piece[_ROWS], -(-(end - base) // pitch))
        while row < last_row:
            place = piece[_PLACE] + (row - first_row) * width
            row_begin = base + row * pitch
            # Rows that lie in the range with all of their pitch: one read and one strided copy for all of them.
            num_whole = min(last_row, (end - base) // pitch) - row if row_begin >= begin else 0
            if num_whole > 0:
                local = np.empty(num_whole * width, dtype=np.uint8)
                reader.read_at(place, local.data)
                rows = target[row_begin - begin :][: num_whole * pitch].reshape(num_whole, pitch)
                rows[:, piece[_COLUMN] : piece[_COLUMN] + width] = local.reshape(num_whole, width)
                row += num_whole
                continue
            low = max(begin, row_begin + piece[_COLUMN])
            high = min(end, row_begin + piece[_COLUMN] + width)
            if low < high:
                inside = low - row_begin - piece[_COLUMN]
                reader.read_at(place + inside, target[low - begin : high - begin].data)
            row += 1
