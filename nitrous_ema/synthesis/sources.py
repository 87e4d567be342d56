"""What synthesis reads: flat arrays on disk, front to back, each byte once and checked as it comes.

A source is one profile of one snapshot (or the tensors that a snapshot copied from the model). Its reader hands out
the next bytes; it is used by one thread at a time, so its running checksum needs no lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol
from zlib import crc32

from nitrous_ema.errors import SnapshotError, SnapshotNotFound
from nitrous_ema.snapshots.format import DTYPE_BYTES, Lineage, TensorRecord, damaged, places

_MAX_KEPT_OPEN = 128  # of the 1024 that a process usually may; with more files each read opens its own
_PIECE_BYTES = 1 << 19  # checksummed while it is still in the core's cache


class Reader(Protocol):
    """Hands out the bytes of one source, in order."""

    def read_into(self, out: memoryview) -> None:
        """Fill ``out`` with the next bytes. Raises SnapshotDamaged if they are not what was written."""


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

    def reader(self, files: OpenFiles) -> Reader:
        """A reader at the first byte."""


class Moment(Protocol):
    """A snapshot, as far as synthesis needs to know it: the weights' averages at one time of training."""

    @property
    def step(self) -> int:
        """Number of update() calls."""

    @property
    def t(self) -> float:
        """Training time."""

    @property
    def t_first(self) -> float | None:
        """Training time of the run's first update; None where nobody wrote it down."""

    @property
    def run(self) -> str:
        """Id of the run that wrote it."""

    @property
    def lineage(self) -> Lineage:
        """That run's ancestors and itself."""

    @property
    def path(self) -> Path:
        """Its first file."""

    @property
    def records(self) -> Sequence[TensorRecord]:
        """The model's tensors, in file order."""

    @property
    def average_spans(self) -> Sequence[tuple[int, int]]:
        """Per averaged record its (begin, end) in a profile's flat space, in elements."""

    @property
    def gammas(self) -> Sequence[float]:
        """The tracked profiles."""

    @property
    def averages(self) -> Sequence[Source]:
        """One source per profile."""

    @property
    def copied(self) -> Source | None:
        """The copied tensors back to back, as bytes."""

    @property
    def copied_spans(self) -> Mapping[str, tuple[int, int]]:
        """Where each copied tensor lies in ``copied``, in bytes, by name."""


class OpenFiles:
    """Descriptors of the files being read: kept while there are few, reopened for each read where there are many."""

    def __init__(self, paths: Iterable[Path]) -> None:
        distinct = set(paths)
        self._to_keep = distinct if len(distinct) <= _MAX_KEPT_OPEN else set()
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

    def reader(self, files: OpenFiles) -> Reader:
        """A reader at the first byte."""
        return _CheckedReader(self, files)


class _CheckedReader:
    def __init__(self, source: FileSource, files: OpenFiles) -> None:
        self._source = source
        self._files = files
        self._position = 0
        self._chunk = 0
        self._crc = 0

    def read_into(self, out: memoryview) -> None:
        while out:
            piece = out[:_PIECE_BYTES]
            count = self._files.read_into(self._source.path, self._source.begin + self._position, piece)
            if count < len(piece):
                end = self._source.begin + self._position + count
                raise damaged(self._source.path, f"it ends at byte {end}, in the middle of its tensors")
            self._check(piece)
            out = out[len(piece) :]

    def _check(self, piece: memoryview) -> None:
        source = self._source
        while piece:
            chunk_end = min((self._chunk + 1) * source.chunk_bytes, source.num_bytes)
            inside = piece[: chunk_end - self._position]
            self._crc = crc32(inside, self._crc)
            self._position += len(inside)
            piece = piece[len(inside) :]
            if self._position == chunk_end:
                if self._crc != source.crc32[self._chunk]:
                    found = f"its bytes have the checksum {self._crc:08x}, expected {source.crc32[self._chunk]:08x}"
                    raise damaged(source.path, found, chunk=source.first_chunk + self._chunk)
                self._chunk, self._crc = self._chunk + 1, 0


def element_bytes(source: Source) -> int:
    """Bytes of one number of a source."""
    return DTYPE_BYTES[source.dtype]
