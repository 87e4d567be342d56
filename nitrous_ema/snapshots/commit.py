"""How a snapshot gets into its folder: the commit protocol.

A snapshot's life on disk, per rank; no step waits for another rank:

step of ``write``                                  after a crash here, a reader finds
make the snapshot's folder                         an empty folder: incomplete
create a name that starts with a dot (O_EXCL)      the same; nobody looks at such names
preallocate, write chunks, write header            the same, whatever part of it reached the disk
fsync the file, once, and close it                 the same
rename to the final name                           nothing yet, or a whole file: its bytes are durable already
fsync the snapshot's folder, then ROOT             a whole file
return                                             a whole file: this is the promise

S1  Nothing has its final name before its bytes are durable.     test_file_is_durable_before_it_has_its_name
S2  Nothing is acknowledged before its name is durable.          test_write_returns_after_both_folders_are_durable
S3  A descriptor is never fsynced twice, and nothing of a failed test_failed_call_is_answered_by_one_whole_new_file
    file is used: after a failed fsync the system may have dropped
    the bytes and call them clean. The file is written again, once,
    under a new temporary name.
S4  A final name is never overwritten, not by a race either: the test_name_taken_during_the_write_is_not_overwritten
    rename itself refuses (``renameat2``). Where a file system lacks
    that, the name is looked up just before the rename; run ids are
    random, so only a copy of the same process could step between.
    A hard link would refuse as well, but fewer file systems have
    them, and a crash between link and unlink leaves a second name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nitrous_ema.errors import SnapshotError, SnapshotWriteError
from nitrous_ema.snapshots.files import FileSystem, write_fully
from nitrous_ema.snapshots.format import (
    Header,
    Layout,
    Span,
    Stamp,
    encode_header,
    folder_name,
    header_bytes,
    rank_file_name,
)
from nitrous_ema.snapshots.snapshot import Snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log = logging.getLogger(__name__)

_Filled = TypeVar("_Filled")

_NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT))
_UNSUPPORTED = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))


class Committer:
    """Writes into one folder of snapshots. Making one of these touches nothing.

    Args:
        root: The folder, as an absolute path.
        files: The file system.
    """

    def __init__(self, root: Path, files: FileSystem) -> None:
        self.root = root
        self.files = files

    def prepare(self) -> None:
        """Create the folder with its parents, durably, and prove that files can be written there.

        Raises:
            SnapshotError: It cannot be done; says why, and what to do.
        """
        try:
            self._make_root()
            probe = self.root / f".probe-{os.getpid()}-{secrets.token_hex(8)}"
            descriptor = self.files.open_exclusive(probe)
            try:
                self._finish(descriptor, lambda: write_fully(self.files, descriptor, b"probe", 0))
            finally:
                self.files.unlink(probe)
        except OSError as error:
            raise SnapshotError(
                f"Snapshots cannot be written to {self.root}: {error}. {_remedy(error)}", path=self.root
            ) from error

    def write(self, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]) -> Snapshot:
        """Write one rank's file and return when it is durable under its final name. Blocks; safe from any thread.

        Args:
            layout: Where everything lies in the data.
            stamp: What is particular to this snapshot.
            chunks: Called to get the data: C-contiguous buffers, one for each of ``layout.chunks``, in order and of
                its size. Called a second time, for the same data, if the first attempt fails.

        Returns:
            The snapshot, with the file of this rank only.

        Raises:
            SnapshotWriteError: Two attempts failed, or the name is taken; the cause is chained. No file was left under
                a temporary name, as far as the disk allowed.
            RuntimeError: ``chunks`` does not give what the layout says (our bug).
        """
        final = self.root / folder_name(stamp.step, stamp.run) / rank_file_name(stamp.rank, stamp.world_size)
        try:
            self._make_folder(final.parent)
            if self.files.exists(final):
                raise _taken(final, stamp.step)
            header = self._write_file(final, layout, stamp, chunks)
        except OSError as error:
            raise _write_error(final, stamp.step, f"was not written: {error}", error) from error
        try:
            self._sync_folder(final.parent)
            self._sync_folder(self.root)
        except OSError as error:
            what = f"is whole, but its name may be lost if the machine stops: {error}"
            raise _write_error(final, stamp.step, what, error) from error
        return Snapshot(paths=(final,), headers=(header,))

    def close_run(self, run: str) -> None:
        """Note durably that this run writes no more snapshots. Doing it again changes nothing.

        Raises:
            SnapshotError: The note could not be written.
        """
        note = self.root / f"closed-{run}"
        try:
            with contextlib.suppress(FileExistsError):
                descriptor = self.files.open_exclusive(note)
                self._finish(descriptor, lambda: None)
            self._sync_folder(self.root)
        except OSError as error:
            raise SnapshotError(f"{note} could not be written: {error}. {_remedy(error)}", path=note) from error

    def _write_file(
        self, final: Path, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> Header:
        try:
            return self._attempt(final, layout, stamp, chunks)
        except OSError as error:
            _log.warning("%s could not be written (%s); writing it once more, as a new file", final, error)
            first = error
        try:
            return self._attempt(final, layout, stamp, chunks)
        except OSError as error:
            what = f"was not written: {error}; nor the first time: {first}"
            raise _write_error(final, stamp.step, what, error) from error

    def _attempt(
        self, final: Path, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> Header:
        temporary = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(8)}")
        descriptor = self.files.open_exclusive(temporary)
        try:
            header = self._finish(descriptor, lambda: self._fill(descriptor, layout, stamp, chunks))
            self._publish(temporary, final, stamp.step)
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.unlink(temporary)
            raise
        return header

    def _finish(self, descriptor: int, fill: Callable[[], _Filled]) -> _Filled:
        """Fill, fsync and close a file, in this order; it is closed in any case, and both may report its failure."""
        try:
            filled = fill()
            self.files.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.close(descriptor)
            raise
        self.files.close(descriptor)
        return filled

    def _fill(
        self, descriptor: int, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> Header:
        data_begin = header_bytes(layout, stamp)
        file_bytes = data_begin + layout.data_bytes
        try:
            self.files.preallocate(descriptor, file_bytes)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise
        crc32 = []
        for span, view in _matched(layout, chunks()):
            crc32.append(zlib.crc32(view))
            write_fully(self.files, descriptor, view, data_begin + span.begin)
        write_fully(self.files, descriptor, encode_header(layout, stamp, crc32), 0)
        return Header(layout=layout, stamp=stamp, crc32=tuple(crc32), data_begin=data_begin, file_bytes=file_bytes)

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        try:
            self.files.rename_new(temporary, final)
        except FileExistsError as error:
            raise _taken(final, step) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if self.files.exists(final):
                raise _taken(final, step) from error
            self.files.rename(temporary, final)

    def _make_folder(self, folder: Path) -> None:
        with contextlib.suppress(FileExistsError):
            self.files.make_folder(folder)

    def _make_root(self) -> None:
        """Make ROOT and its parents if need be, and their names durable in any case."""
        folders = (*reversed(self.root.parents), self.root)
        there = [folder for folder in folders if self.files.exists(folder)]
        for folder in folders[len(there) :]:
            self._make_folder(folder)
            self._sync_folder(folder.parent)
        for folder in there[1:]:
            # Whoever made it may have been killed before the fsync, or be a rank that has not come to it yet. Most are
            # much older, and not everybody may open what lies above them.
            with contextlib.suppress(OSError):
                self.files.fsync_folder(folder.parent)

    def _sync_folder(self, folder: Path) -> None:
        try:
            self.files.fsync_folder(folder)
        except OSError as error:
            # Some network file systems have no such operation: their names are durable when the call that makes them
            # returns, or never; either way nothing more can be done.
            if error.errno not in _UNSUPPORTED:
                raise


def _matched(layout: Layout, buffers: Iterable[ReadableBuffer]) -> Iterator[tuple[Span, memoryview]]:
    """The layout's chunks with their bytes, checked."""
    count = 0
    for count, buffer in enumerate(buffers, start=1):
        view = memoryview(buffer)
        span = layout.chunks[count - 1] if count <= len(layout.chunks) else Span(0, 0)
        if not view.c_contiguous or view.nbytes != span.end - span.begin:
            raise RuntimeError(
                f"Buffer {count - 1} of {len(layout.chunks)} has {view.nbytes} bytes, {view.c_contiguous=}; "
                f"expected {span.end - span.begin} contiguous bytes. This is a bug in nitrous_ema, please report it."
            )
        yield span, view.cast("B")
    if count != len(layout.chunks):
        raise RuntimeError(
            f"{count} buffers for {len(layout.chunks)} chunks. This is a bug in nitrous_ema, please report it."
        )


def _write_error(final: Path, step: int, what: str, cause: OSError) -> SnapshotWriteError:
    return SnapshotWriteError(f"{final} {what}. {_remedy(cause)}", path=final, step=step)


def _taken(final: Path, step: int) -> SnapshotWriteError:
    return SnapshotWriteError(
        f"{final} exists already, and a snapshot is never overwritten. Every run has names of its own: "
        "two objects seem to write with one run id.",
        path=final,
        step=step,
    )


def _remedy(error: OSError) -> str:
    if error.errno in _NO_SPACE:
        return "Free some space there, or choose another folder."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Allow this user to write there, or choose another folder."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "Something that is not a folder has this name: choose another folder."
    return "Check the disk and the folder, or choose another folder."
