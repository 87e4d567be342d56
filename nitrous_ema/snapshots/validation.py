"""Validate one snapshot folder: it holds a complete snapshot, an unfinished one, or a damaged one.

Listing reads and validates headers only; ``verify_file`` also reads the data and compares every checksum. Another
process may hide or remove the folder meanwhile. Each name is therefore also looked up under its hidden name, and only a
folder that has neither name counts as removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nitrous_ema.errors import SnapshotError, SnapshotUnreadable
from nitrous_ema.snapshots.disk_space import explained
from nitrous_ema.snapshots.filesystem import UNAVAILABLE, FileSystem, read_fully, reason, repeated
from nitrous_ema.snapshots.header import Header, ShortFile, decode_header, header_end
from nitrous_ema.snapshots.names import (
    all_rank_files,
    candidate_paths,
    damaged,
    dropped_note_name,
    folder_name,
    hidden_name,
    is_merged_file_name,
    is_one_pass_name,
    parse_folder_name,
    parse_rank_file_name,
    pin_note_name,
    rank_file_name,
    unreadable,
    without_one_pass,
)
from nitrous_ema.snapshots.snapshot import Incomplete, Snapshot, VerificationFailure, rank_files

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_READ_BYTES = 4 * 2**20
# Errors of the process (too many open files, no memory): they are no evidence about a snapshot, and would be the same
# for each. All other errors are those of one snapshot, and must not keep a reader from the others.
_PROCESS_ERRORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))


class FolderGone(Exception):
    """A folder that was listed has been removed since: it exists under neither of its names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder


class FolderInspector:
    """Validates snapshot folders. It only reads.

    Args:
        files: The file system.
    """

    def __init__(self, files: FileSystem) -> None:
        self.files = files

    def names(self, folder: Path) -> tuple[list[str], bool]:
        """Return the names in a snapshot's folder, and whether the folder still has its own name (is not hidden).

        Raises:
            SnapshotUnavailable: The folder cannot be listed.
        """
        for place in (folder, folder.with_name(hidden_name(folder.name))):
            try:
                return repeated(partial(self.files.list, place), self.files.wait), place == folder
            except FileNotFoundError:
                if place == folder and self.files.exists(folder):
                    return [], True  # a broken symbolic link
            except NotADirectoryError:
                return [], True  # a file with the name of a folder
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return [], True  # a link to itself
                if error.errno in _PROCESS_ERRORS:
                    what = f"{folder} cannot be listed: {explained(error, folder)}"
                    raise SnapshotError(what, path=folder) from error
                raise unreadable(folder, error, "listed") from error
        return [], False

    def examine(self, folder: Path) -> Snapshot | Incomplete | SnapshotUnreadable:
        """Return what a listed folder holds, also if the folder has been hidden since it was listed.

        Raises:
            FolderGone: The folder has been removed since it was listed.
        """
        # Twice: between listing the names and opening a file, another process may have removed the folder, or hidden
        # and restored it. The second listing distinguishes the two.
        for _ in range(2):
            try:
                names, is_listed = self.names(folder)
            except SnapshotUnreadable as error:
                return error
            committed = all_rank_files(names) or self._committed(names)
            if not committed and not is_listed:
                raise FolderGone(folder)
            if not committed:
                if self._is_being_removed(folder):
                    raise FolderGone(folder)
                return Incomplete(folder, _missing_files(_ranks(names)))
            try:
                headers = tuple(self.read_header(folder / name) for name in _read_at_listing(committed))
            except FileNotFoundError:
                continue
            except SnapshotUnreadable as error:
                return Incomplete(folder, f"a file is not complete: {error}") if _is_unfinished(error) else error
            return Snapshot(paths=rank_files(folder, committed), headers=headers[:1])
        if self._is_being_removed(folder):
            raise FolderGone(folder)
        return Incomplete(folder, "its files were removed while it was read")

    def _committed(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the files of the snapshot that a folder with these names holds; empty if one is missing."""
        ranks = _ranks(names)
        complete = [world_size for world_size in sorted(ranks) if len(ranks[world_size]) == world_size]
        if complete:
            return tuple(ranks[complete[0]][rank] for rank in range(complete[0]))
        # A newer version of the library may have left only files that it merged; their headers name what they need.
        return tuple(sorted(filter(is_merged_file_name, names)))

    def _is_being_removed(self, folder: Path) -> bool:
        """Return whether a folder that was listed is gone, or a note hides it whose removal has unlinked files."""
        known = parse_folder_name(folder.name)
        if known and self.files.exists(folder.with_name(dropped_note_name(*known))):
            return not self.files.exists(folder.with_name(pin_note_name(*known)))
        return not self.files.exists(folder)  # last, because the note is removed after the folder

    def examine_unlisted(self, folder: Path) -> Snapshot | Incomplete | SnapshotUnreadable:
        """Return what a folder holds that was not listed before; a hidden or removed folder counts as incomplete."""
        if self.files.exists(folder):
            with contextlib.suppress(FolderGone):
                return self.examine(folder)
        return Incomplete(folder, "the folder does not exist")

    def read_header(self, path: Path) -> Header:
        """Return the header of a file, after validating it against the file's size and name.

        Raises:
            SnapshotDamaged: The header is invalid, or belongs to a file of another name.
            SnapshotUnavailable: The file system fails.
            SnapshotUnsupported: The file needs a newer version of this library.
            FileNotFoundError: The file does not exist (any more).
        """
        with self._reading(path) as file:
            return self._header(path, file)

    def _header(self, path: Path, file: _OpenFile) -> Header:
        # The length alone first: header_end() checks it before a buffer of this length is allocated.
        prefix = bytes(file.read(bytearray(8), 0))
        end = header_end(prefix, path=path, file_bytes=file.num_bytes)
        blob = bytes(file.read(bytearray(end), 0))
        header = decode_header(blob, path=path, file_bytes=file.num_bytes)
        stamp = header.stamp
        # A file that was copied or renamed to another step, run or rank is valid in itself, but not this snapshot's.
        own = (folder_name(stamp.step, stamp.run), rank_file_name(stamp.rank, stamp.world_size))
        if own != (path.parent.name, without_one_pass(path.name)):
            raise damaged(path, f"it was written as {'/'.join(own)}")
        return header

    def verify_file(self, path: Path) -> Iterator[VerificationFailure]:
        """Read a whole file, and yield its failures: an invalid header, or each chunk whose checksum is wrong."""
        known = parse_folder_name(path.parent.name)
        step = known[0] if known else 0
        try:
            with self._reading(path) as file:
                header = self._header(path, file)
                for chunk, (span, expected) in enumerate(zip(header.layout.chunks, header.crc32, strict=True)):
                    found = _crc32(file, header.data_begin + span.begin, span.end - span.begin)
                    if found != expected:
                        message = f"checksum mismatch: found {found:08x}, expected {expected:08x}"
                        yield VerificationFailure(path, step, chunk, str(damaged(path, message, chunk=chunk)))
        except FileNotFoundError:
            return  # removed since it was listed: nothing to verify
        except SnapshotError as error:
            if not _is_unfinished(error):
                yield VerificationFailure(path, step, None, str(error))

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[_OpenFile]:
        """Yield an open file. ``FileNotFoundError`` passes, other errors become SnapshotUnreadable."""
        file = _OpenFile(self.files, path, lambda: self._open(path))
        try:
            file.read(bytearray(0), 0)
            yield file
        except FileNotFoundError:
            raise
        except OSError as error:
            raise unreadable(path, error) from error
        finally:
            file.close()

    def _open(self, path: Path) -> int:
        for place in candidate_paths(path):
            try:
                return self.files.open_read(place)
            except FileNotFoundError:
                if self.files.exists(place):
                    raise damaged(path, "it is a broken symbolic link") from None
            except OSError as error:
                if error.errno in UNAVAILABLE:
                    raise
                if error.errno in _PROCESS_ERRORS:
                    raise SnapshotError(
                        f"{path} cannot be opened: {reason(error, path)}. The file may be intact: check this "
                        "process's limit of open files, then try again.",
                        path=path,
                    ) from error
                raise unreadable(path, error, "opened") from error
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))


class _OpenFile:
    """A file that is opened again where its file system fails.

    Args:
        files: The file system.
        path: The file, for messages.
        open_path: Opens it, and returns the descriptor.
    """

    def __init__(self, files: FileSystem, path: Path, open_path: Callable[[], int]) -> None:
        self.num_bytes = 0
        """Size of the file when it was last opened."""
        self._files = files
        self._path = path
        self._open_path = open_path
        self._descriptor: int | None = None

    def read(self, buffer: WriteableBuffer, offset: int) -> memoryview:
        """Fill a buffer from a position; return its filled part, as ``read_fully``."""
        return repeated(lambda: self._read(buffer, offset), self._files.wait)

    def close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._files.close(self._descriptor)
            self._descriptor = None

    def _read(self, buffer: WriteableBuffer, offset: int) -> memoryview:
        try:
            if self._descriptor is None:
                self._descriptor = self._open_path()
                status = self._files.stat(self._descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise damaged(self._path, "it is not a regular file")
                self.num_bytes = status.st_size
            return read_fully(self._files, self._descriptor, buffer, offset)
        except OSError:
            self.close()
            raise


def _crc32(file: _OpenFile, offset: int, size_bytes: int) -> int:
    crc32, buffer = 0, bytearray(min(size_bytes, _READ_BYTES))
    for begin in range(0, size_bytes, _READ_BYTES):
        crc32 = zlib.crc32(file.read(memoryview(buffer)[: size_bytes - begin], offset + begin), crc32)
    return crc32


class RememberingInspector(FolderInspector):
    """Examines each folder once and returns what it found then: for one report, which reads a folder several times."""

    def __init__(self, files: FileSystem) -> None:
        super().__init__(files)
        self._found: dict[Path, Snapshot | Incomplete | SnapshotUnreadable] = {}

    def examine(self, folder: Path) -> Snapshot | Incomplete | SnapshotUnreadable:
        """Return what a folder held when it was first examined."""
        if folder not in self._found:
            self._found[folder] = super().examine(folder)
        return self._found[folder]


def _is_unfinished(error: SnapshotError) -> bool:
    """Return whether a file is still being written in one pass, or was left by a writer that died (COMMIT-6)."""
    return isinstance(error.__cause__, ShortFile) and is_one_pass_name(error.path.name)


def _read_at_listing(names: Sequence[str]) -> list[str]:
    """Return the files whose headers a listing reads: the first, and those whose names do not state they are whole."""
    return [*names[:1], *filter(is_one_pass_name, names[1:])]


def _ranks(names: Sequence[str]) -> dict[int, dict[int, str]]:
    """Return the names of finished files by number of ranks and rank."""
    ranks: dict[int, dict[int, str]] = {}
    # In ascending order, so that of several files of a rank that were written in one pass the newest is left.
    for name in sorted(names):
        if parsed := parse_rank_file_name(without_one_pass(name)):
            ranks.setdefault(parsed[1], {})[parsed[0]] = name
    return ranks


def _missing_files(ranks: dict[int, dict[int, str]]) -> str:
    if not ranks:
        return "it holds no finished file"
    # The folder may hold files of several world sizes: the size with most files is reported.
    world_size = max(ranks, key=lambda size: len(ranks[size]))
    first = next(rank for rank in range(world_size) if rank not in ranks[world_size])
    return f"it holds {len(ranks[world_size])} of {world_size} files; {rank_file_name(first, world_size)} is missing"
