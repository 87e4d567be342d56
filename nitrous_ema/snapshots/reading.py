"""What synthesis reads: flat arrays on disk, each byte once and checked as it comes.

A source is one profile of one snapshot (or the tensors that a snapshot copied from the model). Several threads may read
different parts of it at once. A chunk's checksum is put together from those of its parts, in whatever order they come;
it is compared when the last of them is there.

what                         guarded by
checksums of parts           the reader's lock                test_checksum_is_put_together_in_any_order
descriptors                  nothing: they are opened before  test_no_bit_depends_on_threads_memory_or_open_files
                             the threads start, then only read

Longer than the house's 300 lines because what a snapshot is to synthesis, and how its bytes are checked, belong
on one page.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Protocol
from zlib import crc32

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.errors import SnapshotError, SnapshotNotFound
from nitrous_ema.snapshots.names import damaged, places

_MAX_KEPT_OPEN = 128  # of the 1024 that a process usually may; with more files each read opens its own
_PIECE_BYTES = 1 << 19  # checksummed while it is still in the core's cache
_HELD_OF_CHUNK_BYTES = 64  # a number and its place in a tuple take 40
_AHEAD_BYTES = 1 << 20  # of each file, that the system is asked to read before they are wanted


class Reader(Protocol):
    """Hands out the bytes of one source. Raises SnapshotDamaged if they are not what was written."""

    def read_into(self, out: memoryview) -> None:
        """Fill ``out`` with the next bytes; one thread at a time."""

    def read_at(self, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``begin`` on; any thread, each byte once."""


class Source(Protocol):
    """A flat array of numbers on disk."""

    @property
    def path(self) -> Path:
        """The file, for messages and for opening it."""

    @property
    def num_bytes(self) -> int:
        """Its length."""

    @property
    def dtype(self) -> str:
        """Stored type, as a safetensors code."""

    @property
    def chunk_bytes(self) -> int:
        """What has to be read as a whole to be checked, a power of two; 1 where any part can be."""

    @property
    def held_bytes(self) -> int:
        """Memory that is held of it while it is read, beside the bytes that are asked for; not less than that."""

    def reader(self, files: OpenFiles) -> Reader:
        """A reader at the first byte."""


class OpenFiles:
    """Descriptors of the files being read: the first ones are kept, further ones are opened for each read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._to_keep = tuple(islice(dict.fromkeys(paths), _MAX_KEPT_OPEN))
        self._kept: dict[Path, int] = {}  # filled by __enter__, then only read: threads share it without a lock

    def __enter__(self) -> OpenFiles:
        try:
            for path in self._to_keep:
                self._kept[path] = _open(path)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def read_into(self, path: Path, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset`` on; returns the bytes read, fewer than asked where the file ends."""
        kept = self._kept.get(path)
        if kept is not None:
            return _read_into(path, kept, offset, out)
        own = _open(path)
        try:
            return _read_into(path, own, offset, out)
        finally:
            os.close(own)

    def will_need(self, path: Path, offset: int, num_bytes: int) -> None:
        """Have the system read a part of a file that is kept open, without waiting for it."""
        kept = self._kept.get(path)
        if kept is not None and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a wish
                os.posix_fadvise(kept, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def _close(self) -> None:
        while self._kept:
            os.close(self._kept.popitem()[1])


def _open(path: Path) -> int:
    for place in places(path):
        try:
            return os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe of that name is not waited for
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SnapshotError(f"{path} cannot be opened: {error}", path=path) from error
    raise SnapshotNotFound(
        f"{path}: listed a moment ago, gone now; snapshots were removed while this ran. Synthesize again.",
        path=path,
        nearest=(),
    )


def _read_into(path: Path, descriptor: int, offset: int, out: memoryview) -> int:
    done = 0
    while done < len(out):
        try:
            count = os.preadv(descriptor, [out[done:]], offset + done)
        except OSError as error:
            raise damaged(path, f"it cannot be read: {error}") from error
        if count == 0:
            break
        done += count
    return done


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
    crc32: tuple[int, ...]
    """One checksum per chunk."""
    first_chunk: int
    """Index of the first chunk in the file, for messages."""

    @property
    def held_bytes(self) -> int:
        """Checksums."""
        return _HELD_OF_CHUNK_BYTES * len(self.crc32)

    def reader(self, files: OpenFiles) -> Reader:
        """A reader at the first byte."""
        return _CheckedReader(self, files)


class _CheckedReader:
    def __init__(self, source: FileSource, files: OpenFiles) -> None:
        self._source = source
        self._files = files
        self._position = 0  # of read_into()
        self._lock = threading.Lock()
        self._sums: dict[int, _RunningSum] = {}  # of chunks that are read in part; guarded by _lock

    def read_into(self, out: memoryview) -> None:
        self.read_at(self._position, out)
        self._position += len(out)

    def read_at(self, begin: int, out: memoryview) -> None:
        source = self._source
        if begin % _AHEAD_BYTES < len(out):
            ahead = min(_AHEAD_BYTES, source.num_bytes - begin - len(out))
            if ahead > 0:
                self._files.will_need(source.path, source.begin + begin + len(out), ahead)
        while out:
            piece = out[:_PIECE_BYTES]
            count = self._files.read_into(source.path, source.begin + begin, piece)
            if count < len(piece):
                end = source.begin + begin + count
                raise damaged(source.path, f"it ends at byte {end}, in the middle of its tensors")
            self._check(begin, piece)
            begin, out = begin + len(piece), out[len(piece) :]

    def _check(self, begin: int, piece: memoryview) -> None:
        source = self._source
        while piece:
            chunk, inside = divmod(begin, source.chunk_bytes)
            chunk_bytes = min(source.chunk_bytes, source.num_bytes - chunk * source.chunk_bytes)
            part = piece[: chunk_bytes - inside]
            crc = crc32(part)
            with self._lock:
                running = self._sums.setdefault(chunk, _RunningSum())
                running.add(inside, len(part), crc)
                is_whole = running.num_bytes == chunk_bytes
                if is_whole:
                    del self._sums[chunk]
            if is_whole and running.crc != source.crc32[chunk]:
                found = f"its bytes have the checksum {running.crc:08x}, expected {source.crc32[chunk]:08x}"
                raise damaged(source.path, found, chunk=source.first_chunk + chunk)
            begin, piece = begin + len(part), piece[len(part) :]


@dataclass(slots=True)
class _RunningSum:
    """The checksum of a chunk's first bytes, and of parts that came before their turn."""

    num_bytes: int = 0
    crc: int = 0
    early: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, begin: int, num_bytes: int, crc: int) -> None:
        self.early[begin] = (num_bytes, crc)
        while (part := self.early.pop(self.num_bytes, None)) is not None:
            self.crc = joined_crc32(self.crc, part[1], part[0])
            self.num_bytes += part[0]


def joined_crc32(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two pieces back to back, from those of each.

    Args:
        first: Of the first piece.
        second: Of the second piece.
        second_bytes: Length of the second piece.

    Source:
        zlib, crc32_combine(): what zeros make of a checksum is linear in its bits.
    """
    for bit, moved in enumerate(_bits_after_zeros(second_bytes)):
        if first >> bit & 1:
            second ^= moved
    return second


@functools.lru_cache(maxsize=64)
def _bits_after_zeros(num_bytes: int) -> tuple[int, ...]:
    """What becomes of each bit of a checksum when so many zeros follow."""
    zeros = bytes(num_bytes)
    of_nothing = crc32(zeros)
    return tuple(crc32(zeros, 1 << bit) ^ of_nothing for bit in range(32))


def element_bytes(source: Source) -> int:
    """Bytes of one number of a source."""
    return DTYPE_BYTES[source.dtype]
