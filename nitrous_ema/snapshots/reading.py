"""Flat arrays on disk, read by several threads at once and verified while they are read.

A source is one profile of one snapshot, or the tensors that a snapshot copied from the model. Synthesis reads every
byte of a source once, so checksums are computed during this read. A thread mostly reads a part of a chunk, and the
parts arrive in any order. The checksum of a chunk is combined from the checksums of its parts, and is compared when the
last part has been read.

state                        guarded by
checksums of parts           the lock of the reader           test_checksum_is_put_together_in_any_order
open descriptors             no lock: ``OpenFiles`` opens     test_no_bit_depends_on_threads_memory_or_open_files
                             them before threads start, and
                             threads only read them
"""

from __future__ import annotations

import functools
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Protocol
from zlib import crc32

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.errors import SnapshotError, SnapshotNotFound
from nitrous_ema.snapshots.disk_space import explained
from nitrous_ema.snapshots.filesystem import UNAVAILABLE, FileSystem, read_fully, repeated
from nitrous_ema.snapshots.header import Header
from nitrous_ema.snapshots.names import candidate_paths, damaged, unreadable

_MAX_OPEN_FILES = 128  # of the 1024 that a process usually may open; further files are opened for each read
_PIECE_BYTES = 1 << 19  # checksummed while it is still in the core's cache
_HELD_OF_CHUNK_BYTES = 8  # of which the checksum takes 4
_AHEAD_BYTES = 1 << 20  # of each file, requested from the system before they are read


class Reader(Protocol):
    """Reads the bytes of one source. Raises SnapshotDamaged if they are not the bytes that were written."""

    def read_into(self, out: memoryview) -> None:
        """Fill ``out`` with the next bytes; one thread at a time."""

    def read_at(self, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from position ``begin`` on; any thread, each byte once."""

    def finish(self) -> None:
        """Verify what was read, as far as this needs bytes that were not asked for. Once, after the last read."""


class Source(Protocol):
    """A flat array of numbers on disk."""

    @property
    def path(self) -> Path:
        """The file, for messages and for opening it."""

    @property
    def num_bytes(self) -> int:
        """Length of the array."""

    @property
    def dtype(self) -> str:
        """Stored type, as a safetensors code."""

    @property
    def chunk_bytes(self) -> int:
        """Unit of verification, a power of two; 1 where each part can be verified alone."""

    @property
    def held_bytes(self) -> int:
        """Upper bound of the memory that a reader holds, without the bytes that it returns."""

    def reader(self, files: OpenFiles) -> Reader:
        """Return a reader at the first byte."""


class OpenFiles:
    """Open descriptors of the files that are read: up to 128 stay open, other files are opened for each read.

    Args:
        paths: The files, of which the first 128 are opened on entry and closed on exit.
        files: The file system.
    """

    def __init__(self, paths: Iterable[Path], *, files: FileSystem | None = None) -> None:
        self._files = files or FileSystem()
        self._paths = tuple(islice(dict.fromkeys(paths), _MAX_OPEN_FILES))
        self._descriptors: dict[Path, int] = {}  # filled by __enter__, then only read: threads share it without a lock

    def __enter__(self) -> OpenFiles:
        try:
            for path in self._paths:
                self._descriptors[path] = self._named(path, functools.partial(_open, self._files, path))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def read_into(self, path: Path, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset`` on, and return the number of bytes read: fewer where the file ends.

        Raises:
            SnapshotUnreadable: The file, or its file system, fails.
            SnapshotNotFound: The file was deleted.
        """
        descriptor = self._descriptors.get(path)
        if descriptor is not None:
            try:
                return len(read_fully(self._files, descriptor, out, offset))
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise unreadable(path, error) from error
                # The file is opened again for this read alone: other threads may be reading from this descriptor.
        return self._named(path, functools.partial(_read_once, self._files, path, offset, out))

    def _named(self, path: Path, call: Callable[[], int]) -> int:
        """Return what a call returns that opens the file; it is repeated where the file system fails."""
        try:
            return repeated(call, self._files.wait)
        except OSError as error:
            raise unreadable(path, error) from error

    def will_need(self, path: Path, offset: int, num_bytes: int) -> None:
        """Ask the system to read a part of a file that stays open, without waiting for it."""
        descriptor = self._descriptors.get(path)
        if descriptor is not None:
            with suppress(OSError):  # only a hint: the read itself reports an error
                self._files.will_need(descriptor, offset, num_bytes)

    def _close(self) -> None:
        while self._descriptors:
            self._files.close(self._descriptors.popitem()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """A range of bytes in one snapshot file, with the checksum of each of its chunks."""

    path: Path
    """The file."""
    begin: int
    """Offset of the first byte in the file."""
    num_bytes: int
    """Length."""
    dtype: str
    """Stored type, as a safetensors code."""
    chunk_bytes: int
    """Length of a chunk; the last one may be shorter."""
    crc32: Sequence[int]
    """One checksum per chunk."""
    first_chunk: int
    """Index of the first chunk in the file, for messages."""

    @property
    def held_bytes(self) -> int:
        """Upper bound of the memory for the checksums."""
        return _HELD_OF_CHUNK_BYTES * len(self.crc32)

    def reader(self, files: OpenFiles) -> Reader:
        """Return a reader at the first byte."""
        return _CheckedReader(self, files)


def file_sections(path: Path, header: Header) -> list[FileSource]:
    """Return one source per section of a file: the profiles, then the copied tensors if there are any."""
    layout = header.layout
    sources = []
    # No chunk lies across two sections, so each section has consecutive checksums of its own.
    first_chunk = 0
    for section, (begin, end) in enumerate(layout.sections):
        num_chunks = -(-(end - begin) // layout.chunk_bytes)
        sources.append(
            FileSource(
                path=path,
                begin=header.data_begin + begin,
                num_bytes=end - begin,
                dtype=layout.checkpoint_dtype if section < len(layout.gammas) else "U8",
                chunk_bytes=layout.chunk_bytes,
                crc32=array("I", header.crc32[first_chunk : first_chunk + num_chunks]),
                first_chunk=first_chunk,
            )
        )
        first_chunk += num_chunks
    return sources


def element_bytes(source: Source) -> int:
    """Return the bytes of one number of a source."""
    return DTYPE_BYTES[source.dtype]


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two pieces back to back, from the CRC-32 of each.

    Args:
        first: CRC-32 of the first piece.
        second: CRC-32 of the second piece.
        second_bytes: Length of the second piece.

    Source:
        zlib, crc32_combine(): the effect of appended zeros on a checksum is linear in its bits.
    """
    # crc32(second piece, start value) ^ crc32(second piece) is linear in the start value, which here is the checksum of
    # the first piece. It depends on the length of the second piece alone, so zeros of this length give it bit by bit.
    for bit, effect in enumerate(_bits_after_zeros(second_bytes)):
        if first >> bit & 1:
            second ^= effect
    return second


def _open(files: FileSystem, path: Path) -> int:
    for place in candidate_paths(path):
        try:
            return files.open_read(place)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in UNAVAILABLE:
                raise
            raise SnapshotError(f"{path} cannot be opened: {explained(error, path)}", path=path) from error
    raise SnapshotNotFound(
        f"{path} was deleted after it was listed (pruning?). Run the synthesis or the restore again.",
        path=path,
        nearest=(),
    )


def _read_once(files: FileSystem, path: Path, offset: int, out: memoryview) -> int:
    descriptor = _open(files, path)
    try:
        return len(read_fully(files, descriptor, out, offset))
    finally:
        files.close(descriptor)


class _CheckedReader:
    def __init__(self, source: FileSource, files: OpenFiles) -> None:
        self._source = source
        self._files = files
        self._position = 0  # of read_into()
        self._lock = threading.Lock()
        self._sums: dict[int, _ChunkChecksum] = {}  # of chunks that are read in part; guarded by _lock

    def read_into(self, out: memoryview) -> None:
        self.read_at(self._position, out)
        self._position += len(out)

    def read_at(self, begin: int, out: memoryview) -> None:
        source = self._source
        # True for about one read per _AHEAD_BYTES, so that the hint does not cost a system call for every read.
        if begin % _AHEAD_BYTES < len(out):
            ahead = min(_AHEAD_BYTES, source.num_bytes - begin - len(out))
            if ahead > 0:
                self._files.will_need(source.path, source.begin + begin + len(out), ahead)
        while out:
            piece = out[:_PIECE_BYTES]
            count = self._files.read_into(source.path, source.begin + begin, piece)
            # Possible although the header's size was right: the file may have been truncated since.
            if count < len(piece):
                end = source.begin + begin + count
                raise damaged(source.path, f"it ends at byte {end}, in the middle of its tensors")
            self._check(begin, piece)
            begin, out = begin + len(piece), out[len(piece) :]

    def finish(self) -> None:
        """Read the rest of the chunks that were read in part, which completes their checksums."""
        for chunk, running in sorted(self._sums.items()):
            begin = chunk * self._source.chunk_bytes
            end = min(begin + self._source.chunk_bytes, self._source.num_bytes)
            for gap_begin, gap_end in running.gaps(end - begin):
                self.read_at(begin + gap_begin, memoryview(bytearray(gap_end - gap_begin)))

    def _check(self, begin: int, piece: memoryview) -> None:
        source = self._source
        while piece:
            chunk, inside = divmod(begin, source.chunk_bytes)
            chunk_bytes = min(source.chunk_bytes, source.num_bytes - chunk * source.chunk_bytes)
            part = piece[: chunk_bytes - inside]
            crc = crc32(part)  # outside of the lock: it releases the GIL above 5 KiB (CPython, zlibmodule.c)
            with self._lock:
                running = self._sums.setdefault(chunk, _ChunkChecksum())
                running.add(inside, len(part), crc)
                is_whole = running.num_bytes == chunk_bytes
                if is_whole:
                    del self._sums[chunk]
            if is_whole and running.crc != source.crc32[chunk]:
                found = f"checksum mismatch: found {running.crc:08x}, expected {source.crc32[chunk]:08x}"
                raise damaged(source.path, found, chunk=source.first_chunk + chunk)
            begin, piece = begin + len(part), piece[len(part) :]


@dataclass(slots=True)
class _ChunkChecksum:
    """The checksum of a chunk's first ``num_bytes`` bytes, and the checksums of parts that lie behind a gap."""

    num_bytes: int = 0
    crc: int = 0
    early: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Length and checksum of parts behind the gap, by their position in the chunk."""

    def add(self, begin: int, num_bytes: int, crc: int) -> None:
        self.early[begin] = (num_bytes, crc)
        while (part := self.early.pop(self.num_bytes, None)) is not None:
            self.crc = combine_crc32(self.crc, part[1], part[0])
            self.num_bytes += part[0]

    def gaps(self, chunk_bytes: int) -> list[tuple[int, int]]:
        """Return the ranges of the chunk that were not added."""
        parts = [(begin, begin + num_bytes) for begin, (num_bytes, _) in sorted(self.early.items())]
        ends = [self.num_bytes, *(end for _, end in parts)]
        begins = [*(begin for begin, _ in parts), chunk_bytes]
        return [(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]


@functools.lru_cache(maxsize=64)
def _bits_after_zeros(num_bytes: int) -> tuple[int, ...]:
    """Return the effect of each bit of a checksum on the checksum after ``num_bytes`` more zeros."""
    zeros = bytes(num_bytes)
    of_zeros = crc32(zeros)
    return tuple(crc32(zeros, 1 << bit) ^ of_zeros for bit in range(32))
