"""What one folder of a snapshot holds: a whole snapshot, an unfinished one, or damage.

Headers are read, and believed only after their checksum; data is read by ``verify_file`` alone. What is hidden while it
is being looked at is found under its hidden name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from nitrous_ema.errors import SnapshotDamaged, SnapshotError
from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.snapshots.filesystem import FileSystem, read_fully
from nitrous_ema.snapshots.header import Header, decode_header, header_end
from nitrous_ema.snapshots.names import (
    damaged,
    folder_name,
    hidden_name,
    parse_folder_name,
    parse_rank_file_name,
    places,
    rank_file_name,
)
from nitrous_ema.snapshots.snapshot import Incomplete, Snapshot, VerificationFailure

_READ_BYTES = 4 * 2**20
_NO_FAULT_OF_THE_FILE = frozenset((errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM))


class FolderGone(Exception):
    """A folder that was listed is there no more, under none of its names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder


class FolderInspector:
    """Looks into folders of snapshots. It only reads.

    Args:
        files: The file system.
    """

    def __init__(self, files: FileSystem) -> None:
        self.files = files

    def names(self, folder: Path) -> tuple[list[str], bool]:
        """Names in a snapshot's folder, which may be hidden by now; and whether it still has its own name."""
        for place in (folder, folder.with_name(hidden_name(folder.name))):
            try:
                return self.files.list(place), place == folder
            except FileNotFoundError:
                if place == folder and self.files.exists(folder):
                    return [], True  # a link to nothing
            except NotADirectoryError:
                return [], True  # never a folder
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return [], True  # a link to itself
                raise SnapshotError(f"{folder} cannot be listed: {error}", path=folder) from error
        return [], False

    def examine(self, folder: Path) -> Snapshot | Incomplete | SnapshotDamaged:
        """What a listed folder holds, also if it is hidden meanwhile. Raises ``FolderGone`` if it is removed meanwhile."""
        for _ in range(2):
            ranks: dict[int, set[int]] = {}
            names, is_listed = self.names(folder)
            for rank, world_size in filter(None, map(parse_rank_file_name, names)):
                ranks.setdefault(world_size, set()).add(rank)
            complete = [world_size for world_size in sorted(ranks) if len(ranks[world_size]) == world_size]
            if not complete and not is_listed:
                raise FolderGone(folder)
            if not complete:
                return Incomplete(folder, _what_is_missing(ranks))
            paths = tuple(folder / rank_file_name(rank, complete[0]) for rank in range(complete[0]))
            try:
                headers = tuple(map(self.read_header, paths))
            except FileNotFoundError:
                continue
            except SnapshotDamaged as error:
                return error
            disagreement = _disagreement(headers)
            return Incomplete(folder, disagreement) if disagreement else Snapshot(paths=paths, headers=headers)
        if not self.files.exists(folder):
            raise FolderGone(folder)
        return Incomplete(folder, "its files were removed while it was read")

    def examine_anew(self, folder: Path) -> Snapshot | Incomplete | SnapshotDamaged:
        """The same of a folder that nobody has listed: a hidden one is none."""
        if self.files.exists(folder):
            with contextlib.suppress(FolderGone):
                return self.examine(folder)
        return Incomplete(folder, "it is not there")

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[tuple[int, int]]:
        """Descriptor and size of a file. ``FileNotFoundError`` passes, all else is told as the file's damage."""
        descriptor = self._open(path)
        try:
            status = self.files.stat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise damaged(path, "it is not a regular file")
            yield descriptor, status.st_size
        except OSError as error:
            raise damaged(path, f"it cannot be read: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                self.files.close(descriptor)

    def _open(self, path: Path) -> int:
        for place in places(path):
            try:
                return self.files.open_read(place)
            except FileNotFoundError:
                if self.files.exists(place):
                    raise damaged(path, "it is a link to nothing") from None
            except OSError as error:
                if error.errno in _NO_FAULT_OF_THE_FILE:
                    raise SnapshotError(
                        f"{path} cannot be opened: {error}. It is not known to be damaged: let this user read it, or "
                        "this process open more files, and look again.",
                        path=path,
                    ) from error
                raise damaged(path, f"it cannot be opened: {error}") from error
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))

    def read_header(self, path: Path) -> Header:
        """What a file says about itself. Raises SnapshotDamaged, or FileNotFoundError if it is gone."""
        with self._reading(path) as (descriptor, file_bytes):
            prefix = bytes(read_fully(self.files, descriptor, bytearray(8), 0))
            end = header_end(prefix, path=path, file_bytes=file_bytes)
            blob = bytes(read_fully(self.files, descriptor, bytearray(end), 0))
        header = decode_header(blob, path=path, file_bytes=file_bytes)
        stamp = header.stamp
        own = (folder_name(stamp.step, stamp.run), rank_file_name(stamp.rank, stamp.world_size))
        if own != (path.parent.name, path.name):
            raise damaged(path, f"it was written as {'/'.join(own)}")
        return header

    def verify_file(self, path: Path) -> Iterator[VerificationFailure]:
        """Read all of a file. What is wrong with it: its header, or each chunk whose checksum is wrong."""
        known = parse_folder_name(path.parent.name)
        step = known[0] if known else 0
        try:
            header = self.read_header(path)
            with self._reading(path) as (descriptor, _):
                for chunk, (span, expected) in enumerate(zip(header.layout.chunks, header.crc32, strict=True)):
                    found = self._crc32(descriptor, header.data_begin + span.begin, span.end - span.begin)
                    if found != expected:
                        message = f"its checksum is {found:08x}, expected {expected:08x}"
                        yield VerificationFailure(path, step, chunk, str(damaged(path, message, chunk=chunk)))
        except FileNotFoundError:
            return  # removed meanwhile
        except SnapshotError as error:
            yield VerificationFailure(path, step, None, str(error))

    def _crc32(self, descriptor: int, offset: int, size_bytes: int) -> int:
        crc32, buffer = 0, bytearray(min(size_bytes, _READ_BYTES))
        for begin in range(0, size_bytes, _READ_BYTES):
            piece = memoryview(buffer)[: size_bytes - begin]
            crc32 = zlib.crc32(read_fully(self.files, descriptor, piece, offset + begin), crc32)
        return crc32


def _what_is_missing(ranks: dict[int, set[int]]) -> str:
    if not ranks:
        return "it holds no finished file"
    world_size = max(ranks, key=lambda size: len(ranks[size]))
    first = next(rank for rank in range(world_size) if rank not in ranks[world_size])
    return f"it holds {len(ranks[world_size])} of {world_size} files; {rank_file_name(first, world_size)} is missing"


def _disagreement(headers: tuple[Header, ...]) -> str | None:
    """Why the files of several ranks are no snapshot together. Step, run and number of ranks are in their names."""
    first = headers[0]
    for rank, other in enumerate(headers):
        facts = [("layout", other.layout.sha256, first.layout.sha256)]
        facts += [
            (name, getattr(other.stamp, name), getattr(first.stamp, name)) for name in ("t", "t_first", "lineage")
        ]
        for name, found, expected in facts:
            if found != expected:
                return f"ranks 0 and {rank} disagree on {name}: {brief(str(expected))} and {brief(str(found))}"
    return None
