"""How a snapshot gets into its folder: the commit protocol.

A snapshot's life on disk, per rank; no step waits for another rank:

step of ``write``                                  after a crash here, a reader finds
look whether there is room for it                  nothing
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
S6  What does not fit is refused before anything of it is on     test_snapshot_that_does_not_fit_leaves_nothing_behind
    disk.

The disk is told to begin with each chunk while the next one is prepared (``start_writeback``), so that the fsync finds
little left to do. It is a hint: it makes nothing durable, and where it is missing it is not tried again for that file.
Its ``EIO`` or ``ENOSPC`` is the disk's word about the bytes, though, and costs the file as that of a write would.
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nitrous_ema._base.temporary_files import temporary_name
from nitrous_ema.errors import SnapshotError, SnapshotWriteError
from nitrous_ema.snapshots.disk_space import DiskSpace, remedy
from nitrous_ema.snapshots.filesystem import (
    NO_SPACE,
    FileSystem,
    hint_writeback,
    rename_to_new,
    reserve,
    sync_folder,
    write_fully,
)
from nitrous_ema.snapshots.header import Header, Stamp, encode_header, header_bytes
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.names import folder_name, rank_file_name
from nitrous_ema.snapshots.snapshot import Snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log = logging.getLogger(__name__)

_Filled = TypeVar("_Filled")


class Committer:
    """The calls of ``SnapshotStore`` that write into its folder; what they promise stands there.

    Args:
        root: The folder, as an absolute path.
        files: The file system.
        make_room: Called when the disk is full, to remove what is of no use any more.
    """

    def __init__(self, root: Path, files: FileSystem, make_room: Callable[[], object] = lambda: None) -> None:
        self.root = root
        self.files = files
        self.space = DiskSpace(root, files, make_room)

    def prepare(self) -> None:
        """Create the folder with its parents, durably, and prove that files can be written there."""
        try:
            self._make_root()
            probe = self.root / temporary_name("probe")
            descriptor = self.files.open_exclusive(probe)
            try:
                self._finish(descriptor, lambda: write_fully(self.files, descriptor, b"probe", 0))
            finally:
                self.files.unlink(probe)
        except OSError as error:
            raise SnapshotError(
                f"Snapshots cannot be written to {self.root}: {error}. {remedy(error)}", path=self.root
            ) from error

    def write(self, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]) -> Snapshot:
        """Write one rank's file and return when it is durable under its final name."""
        final = self.root / folder_name(stamp.step, stamp.run) / rank_file_name(stamp.rank, stamp.world_size)
        try:
            if self.files.exists(final):
                raise _taken(final, stamp.step)
            self.space.require(header_bytes(layout, stamp) + layout.data_bytes)
            header = self._write_file(final, layout, stamp, chunks)
        except OSError as error:
            raise _write_error(final, stamp.step, f"was not written: {error}", error) from error
        try:
            sync_folder(self.files, final.parent)
            sync_folder(self.files, self.root)
        except OSError as error:
            what = f"is whole, but its name may be lost if the machine stops: {error}"
            raise _write_error(final, stamp.step, what, error) from error
        return Snapshot(paths=(final,), headers=(header,))

    def close_run(self, run: str) -> None:
        """Note durably that this run writes no more snapshots."""
        self.write_note(self.root / f"closed-{run}")

    def write_note(self, note: Path) -> None:
        """Make an empty file in ROOT, durably; what it says is its name. Doing it again changes nothing.

        Raises:
            SnapshotError: It could not be written.
        """
        try:
            with contextlib.suppress(FileExistsError):
                descriptor = self.files.open_exclusive(note)
                self._finish(descriptor, lambda: None)
            sync_folder(self.files, self.root)
        except OSError as error:
            raise SnapshotError(f"{note} could not be written: {error}. {remedy(error)}", path=note) from error

    def _write_file(
        self, final: Path, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> Header:
        try:
            return self._attempt(final, layout, stamp, chunks)
        except OSError as error:
            _log.info("%s could not be written (%s); writing it once more, as a new file", final, error)
            first = error
        if first.errno in NO_SPACE:
            self.space.make_room()
        try:
            return self._attempt(final, layout, stamp, chunks)
        except OSError as error:
            what = f"was not written: {error}; nor the first time: {first}"
            raise _write_error(final, stamp.step, what, error) from error

    def _attempt(
        self, final: Path, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> Header:
        self._make_folder(final.parent)  # here, so that it is made again if somebody has removed it while it was empty
        temporary = final.with_name(temporary_name(final.name))
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
        reserve(self.files, descriptor, file_bytes)
        crc32, is_paced = [0] * len(layout.chunks), True
        for chunk, begin, view in _matched(layout, chunks()):
            crc32[chunk] = zlib.crc32(view, crc32[chunk])
            write_fully(self.files, descriptor, view, data_begin + begin)
            is_paced = is_paced and hint_writeback(self.files, descriptor, data_begin + begin, len(view))
        write_fully(self.files, descriptor, encode_header(layout, stamp, crc32), 0)
        return Header(layout=layout, stamp=stamp, crc32=tuple(crc32), data_begin=data_begin, file_bytes=file_bytes)

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        try:
            rename_to_new(self.files, temporary, final)
        except FileExistsError as error:
            raise _taken(final, step) from error

    def _make_folder(self, folder: Path) -> None:
        with contextlib.suppress(FileExistsError):
            self.files.make_folder(folder)

    def _make_root(self) -> None:
        """Make ROOT and its parents if need be, and their names durable in any case."""
        folders = (*reversed(self.root.parents), self.root)
        there = [folder for folder in folders if self.files.exists(folder)]
        for folder in folders[len(there) :]:
            self._make_folder(folder)
            sync_folder(self.files, folder.parent)
        for folder in there[1:]:
            # Whoever made it may have been killed before the fsync, or be a rank that has not come to it yet. Most are
            # much older, and not everybody may open what lies above them.
            with contextlib.suppress(OSError):
                self.files.fsync_folder(folder.parent)


def _matched(layout: Layout, buffers: Iterable[ReadableBuffer]) -> Iterator[tuple[int, int, memoryview]]:
    """The buffers, checked: the number of the chunk that each is a part of, and where it begins in the data."""
    ends = [chunk.end for chunk in layout.chunks]
    index = begin = 0
    for buffer in buffers:
        view = memoryview(buffer)
        left = ends[index] - begin if index < len(ends) else 0
        if not view.c_contiguous or not 0 < view.nbytes <= left:
            raise RuntimeError(
                f"A buffer for byte {begin} of the data has {view.nbytes} bytes, {view.c_contiguous=}; expected "
                f"1 to {left} contiguous bytes. This is a bug in nitrous_ema, please report it."
            )
        yield index, begin, view.cast("B")
        begin += view.nbytes
        index += begin == ends[index]
    if begin != layout.data_bytes:
        raise RuntimeError(
            f"Buffers of {begin} bytes for {layout.data_bytes} bytes of data. This is a bug in nitrous_ema, please "
            "report it."
        )


def _write_error(final: Path, step: int, what: str, cause: OSError) -> SnapshotWriteError:
    return SnapshotWriteError(f"{final} {what}. {remedy(cause)}", path=final, step=step)


def _taken(final: Path, step: int) -> SnapshotWriteError:
    return SnapshotWriteError(
        f"{final} exists already, and a snapshot is never overwritten. Every run has names of its own: "
        "two objects seem to write with one run id.",
        path=final,
        step=step,
    )
