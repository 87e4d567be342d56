"""The commit protocol: a snapshot is written so that a crash leaves all of it, or nothing that a reader lists.

Writing a file takes seconds, and the process or the machine may stop at any moment. A snapshot is therefore written
under a temporary name, which no reader opens. One fsync makes its bytes durable; only then does a rename give the file
its final name. So a reader that finds a final name can rely on every byte of the file. A file that could not be written
is written once more, as a new file. Each rank does this with its own file, and no step waits for another rank.

step of ``write``                                  a reader after a crash here finds
check that the file fits on the disk               nothing
make the snapshot's folder                         an empty folder: incomplete
create a name that starts with a dot (O_EXCL)      the same; readers do not open such names
preallocate, write chunks, write header            the same, whichever of these bytes reached the disk
fsync the file, once, and close it                 the same
rename to the final name                           nothing yet, or a whole file: its bytes are durable already
fsync the snapshot's folder, then ROOT             a whole file
return                                             a whole file: this is the promise

COMMIT-1  A file gets its final name after its bytes are durable.  test_file_is_durable_before_it_has_its_name
COMMIT-2  A write is acknowledged after its name is durable.       test_write_returns_after_both_folders_are_durable
COMMIT-3  A descriptor is never fsynced twice, and no byte of a    test_failed_call_is_answered_by_one_whole_new_file
    failed file is used: after a failed fsync the system may have
    dropped the bytes and mark its cache as clean. The file is
    written again, once, under a new temporary name.
COMMIT-4  A final name is never overwritten, not by a race either: test_name_taken_during_the_write_is_not_overwritten
    the rename itself refuses (``renameat2``). Where a file system
    lacks ``renameat2``, the name is looked up just before the
    rename. Run ids are random, so only a second writer of this run
    could take the name in between. A hard link would refuse as
    well, but fewer file systems have them, and a crash between
    link and unlink leaves a second name.
COMMIT-5  A file that does not fit is refused before any byte of   test_snapshot_that_does_not_fit_leaves_nothing_behind
    it is on disk.

COMMIT-6  A file that is written in one pass is listed when it    test_file_in_one_pass_is_listed_with_its_last_byte
    has the size that its header states. Of several files of a    test_failed_pass_is_never_read_once_another_began
    rank only the newest counts.

Some file systems refuse renames or writes at offsets: object stores that are mounted, for example. ``prepare`` tries
both, and then all snapshots are written in one pass: checksums first, then the header and the chunks in their order,
under a name of its own kind, which is never used twice. No rename states that the file is whole, so readers compare its
size with its header. A crash may leave a file that is shorter, which no reader lists, and which stays until the user
deletes it. On a file system that stores sizes before bytes, a power cut may leave bytes that are wrong; then checksums
name the file when it is read.

The kernel is asked to start writing each chunk to the disk while the next chunk is prepared (``start_writeback``), so
that the fsync finds little left to do. The request is a hint: it makes no byte durable. Where it is not supported, it
is not repeated for that file. ``EIO`` and ``ENOSPC`` from this call do mean that data was lost, so they are handled
like a failed write.

Longer than 300 lines: the two ways to write a file are one protocol, and its page should stand next to it.
"""

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nitrous_ema._base.temporary_files import temporary_name
from nitrous_ema.errors import SnapshotError, SnapshotWriteError, bug
from nitrous_ema.snapshots.disk_space import DiskSpace, explained, remedy
from nitrous_ema.snapshots.filesystem import (
    NO_SPACE,
    ONE_PASS,
    ONLY_ONE_PASS,
    FileSystem,
    hint_writeback,
    reason,
    rename_to_new,
    reserve,
    sync_folder,
    write_fully,
)
from nitrous_ema.snapshots.header import Header, Stamp, encode_header, header_bytes
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.names import closed_note_name, folder_name, one_pass_file_name, rank_file_name
from nitrous_ema.snapshots.nonfinite import NonFiniteCounter
from nitrous_ema.snapshots.snapshot import Snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log = logging.getLogger(__name__)

_Filled = TypeVar("_Filled")

_PROBE = b"probe"


class Committer:
    """The methods of ``SnapshotStore`` that write into its folder. Their contracts are documented there.

    Args:
        root: The folder, as an absolute path.
        files: The file system.
        reclaim: Called when the disk is full, to remove snapshots that were dropped already.
    """

    def __init__(self, root: Path, files: FileSystem, reclaim: Callable[[], object] = lambda: None) -> None:
        self.root = root
        self.files = files
        self.space = DiskSpace(root, files, reclaim)
        self._in_one_pass = False  # set by prepare()

    def prepare(self) -> None:
        """Create the folder; see ``SnapshotStore.prepare``."""
        try:
            self._make_root()
            self._probe()
        except OSError as error:
            raise SnapshotError(
                f"Snapshots cannot be written to {self.root}: {explained(error, self.root)}",
                path=self.root,
            ) from error

    def write(self, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]) -> Snapshot:
        """Write one rank's file; see ``SnapshotStore.write``."""
        final = self.root / folder_name(stamp.step, stamp.run) / rank_file_name(stamp.rank, stamp.world_size)
        try:
            # The rename refuses a taken name as well, but only after the whole file has been written.
            if self.files.exists(final):
                raise _taken(final, stamp.step)
            self.space.require(header_bytes(layout, stamp) + layout.data_bytes)
            path, header = self._write_file(final, layout, stamp, chunks)
        except OSError as error:
            raise _write_error(final, stamp.step, f"was not written: {reason(error, final)}", error) from error
        # No second attempt after a failure here: the file is whole, and a new file would find its name taken.
        try:
            sync_folder(self.files, final.parent)
            sync_folder(self.files, self.root)
        except OSError as error:
            what = f"is complete, but its name may be lost if the machine stops: {reason(error, final)}"
            raise _write_error(final, stamp.step, what, error) from error
        return Snapshot(paths=(path,), headers=(header,))

    def close_run(self, run: str) -> None:
        """Write the note that a run has ended; see ``SnapshotStore.close_run``."""
        self.write_note(self.root / closed_note_name(run))

    def write_note(self, note: Path) -> None:
        """Make an empty file in ROOT, durably; its name is its content. A note that exists is left as it is.

        Raises:
            SnapshotError: The note could not be written.
        """
        try:
            # ROOT is synced in either case: the process that made an existing note may have died before its fsync.
            with contextlib.suppress(FileExistsError):
                descriptor = self.files.open_exclusive(note)
                self._finish(descriptor, lambda: None)
            sync_folder(self.files, self.root)
        except OSError as error:
            raise SnapshotError(f"{note} could not be written: {explained(error, note)}", path=note) from error

    def _probe(self) -> None:
        """Write a probe as snapshots are written, and find out whether they must be written in one pass."""
        try:
            self._write_probe(offset=len(_PROBE), is_renamed=True)
        except OSError as error:
            if error.errno not in ONE_PASS:
                raise
            self._write_probe(offset=0, is_renamed=False)
            self._in_one_pass = True
            _log.info("%s: %s (%s)", self.root, ONLY_ONE_PASS, error)

    def _write_probe(self, *, offset: int, is_renamed: bool) -> None:
        probe = self.root / temporary_name("probe")
        descriptor = self.files.open_exclusive(probe)
        try:
            self._finish(descriptor, lambda: write_fully(self.files, descriptor, _PROBE, offset))
            if is_renamed:
                renamed = probe.with_name(probe.name.replace("probe", "probe-renamed", 1))
                rename_to_new(self.files, probe, renamed)
                probe = renamed
        finally:
            self.files.unlink(probe)

    def _write_file(
        self, final: Path, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> tuple[Path, Header]:
        """Write a file, in two attempts if necessary; return the name that it has, and its header."""
        try:
            return self._attempt(final, layout, stamp, chunks)
        except OSError as error:
            _log.info("%s could not be written (%s); retrying once, with a new file", final, error)
            first = error
        # Readers may still read dropped snapshots, so these are removed early only if the disk is full.
        if first.errno in NO_SPACE:
            self.space.reclaim()
        try:
            return self._attempt(final, layout, stamp, chunks)
        except OSError as error:
            what = f"was not written: {reason(error, final)}; the first attempt failed too: {reason(first, final)}"
            raise _write_error(final, stamp.step, what, error) from error

    def _attempt(
        self, final: Path, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> tuple[Path, Header]:
        # In each attempt: a process that cleans up may have removed the folder while it was empty.
        self._make_folder(final.parent)
        if self._in_one_pass:
            return self._attempt_in_one_pass(final, layout, stamp, chunks)
        temporary = final.with_name(temporary_name(final.name))
        descriptor = self.files.open_exclusive(temporary)
        try:
            header = self._finish(descriptor, lambda: self._fill(descriptor, layout, stamp, chunks))
            self._publish(temporary, final, stamp.step)
        # After Ctrl-C as well: other processes remove a temporary file only once its writer is dead.
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.unlink(temporary)
            raise
        return final, header

    def _attempt_in_one_pass(
        self, final: Path, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> tuple[Path, Header]:
        sums = _Sums(layout)
        for chunk, begin, view in _matched(layout, chunks()):
            sums.add(chunk, begin, view)
        header = sums.header(stamp)

        def fill() -> None:
            # Nothing is preallocated: the file would have its size before it has its bytes.
            write_fully(self.files, descriptor, sums.encoded(stamp), 0)
            for _, begin, view in _matched(layout, chunks()):
                write_fully(self.files, descriptor, view, header.data_begin + begin)

        path = final.with_name(one_pass_file_name(stamp.rank, stamp.world_size, time.time_ns()))
        descriptor = self.files.open_exclusive(path)
        try:
            self._finish(descriptor, fill)
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.unlink(path)
            raise
        return path, header

    def _finish(self, descriptor: int, fill: Callable[[], _Filled]) -> _Filled:
        """Fill, fsync and close a file, in this order, and return what ``fill`` returns. It is closed in any case."""
        try:
            filled = fill()
            self.files.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.close(descriptor)
            raise
        # Not suppressed: an error of an earlier write may be reported by close alone (close(2): NFS, disk quotas).
        self.files.close(descriptor)
        return filled

    def _fill(
        self, descriptor: int, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]
    ) -> Header:
        # The size of the header does not depend on the checksums, so the data can be written first.
        data_begin = header_bytes(layout, stamp)
        file_bytes = data_begin + layout.data_bytes
        # A full disk is then noticed before any byte is written.
        reserve(self.files, descriptor, file_bytes)
        # The hint of ``hint_writeback`` is repeated only while the kernel accepts it.
        sums, is_paced = _Sums(layout), True
        for chunk, begin, view in _matched(layout, chunks()):
            sums.add(chunk, begin, view)
            write_fully(self.files, descriptor, view, data_begin + begin)
            is_paced = is_paced and hint_writeback(self.files, descriptor, data_begin + begin, len(view))
        # Last, because it holds the checksums, and because a disk that loses its latest writes then loses the header
        # too: no reader lists such a file.
        write_fully(self.files, descriptor, sums.encoded(stamp), 0)
        return sums.header(stamp)

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        try:
            rename_to_new(self.files, temporary, final)
        # Converted here, because ``_write_file`` answers an OSError with a second attempt, which would fail as well.
        except FileExistsError as error:
            raise _taken(final, step) from error

    def _make_folder(self, folder: Path) -> None:
        with contextlib.suppress(FileExistsError):
            self.files.make_folder(folder)

    def _make_root(self) -> None:
        """Make ROOT and its parents where they are missing, and make their names durable in any case."""
        folders = (*reversed(self.root.parents), self.root)
        existing = [folder for folder in folders if self.files.exists(folder)]
        for folder in folders[len(existing) :]:
            self._make_folder(folder)
            sync_folder(self.files, folder.parent)
        for folder in existing[1:]:
            # The process that made a folder may have been killed before its fsync, or be a rank that has not reached it
            # yet. A failure is ignored: most folders are much older, and this user may not be allowed to open their
            # parents.
            with contextlib.suppress(OSError):
                self.files.fsync_folder(folder.parent)


class _Sums:
    """What a header contains about the data: checksums, and values that are not finite.

    Args:
        layout: Positions of the tensors in the data.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._crc32 = [0] * len(layout.chunks)
        self._nonfinite = NonFiniteCounter(layout)

    def add(self, chunk: int, begin: int, view: memoryview) -> None:
        """Count the next bytes of a chunk, which begin at a position in the data."""
        self._crc32[chunk] = zlib.crc32(view, self._crc32[chunk])
        self._nonfinite.add(begin, view)

    def encoded(self, stamp: Stamp) -> bytes:
        """Return the bytes of the file before the data."""
        return encode_header(self._layout, stamp, self._crc32, self._nonfinite.result())

    def header(self, stamp: Stamp) -> Header:
        """Return the header."""
        data_begin = header_bytes(self._layout, stamp)
        return Header(
            layout=self._layout,
            stamp=stamp,
            crc32=tuple(self._crc32),
            data_begin=data_begin,
            file_bytes=data_begin + self._layout.data_bytes,
            nonfinite=self._nonfinite.result(),
        )


def _matched(layout: Layout, buffers: Iterable[ReadableBuffer]) -> Iterator[tuple[int, int, memoryview]]:
    """Yield each buffer, checked: its chunk's number, the position in the data at which it begins, and its bytes."""
    ends = [chunk.end for chunk in layout.chunks]
    index = begin = 0
    for buffer in buffers:
        view = memoryview(buffer)
        remaining = ends[index] - begin if index < len(ends) else 0
        if not view.c_contiguous or not 0 < view.nbytes <= remaining:
            raise bug(
                f"a buffer for byte {begin} of the data has {view.nbytes} bytes, {view.c_contiguous=}; expected "
                f"1 to {remaining} contiguous bytes"
            )
        yield index, begin, view.cast("B")
        begin += view.nbytes
        index += begin == ends[index]
    if begin != layout.data_bytes:
        raise bug(f"the buffers have {begin} bytes in total, expected {layout.data_bytes}")


def _write_error(final: Path, step: int, what: str, cause: OSError) -> SnapshotWriteError:
    return SnapshotWriteError(f"{final} {what}. {remedy(cause)}", path=final, step=step)


def _taken(final: Path, step: int) -> SnapshotWriteError:
    return SnapshotWriteError(
        f"{final} already exists, and a snapshot is never overwritten. Each run has its own file names: two objects "
        "appear to write with the same run id.",
        path=final,
        step=step,
    )
