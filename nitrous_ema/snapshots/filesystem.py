"""The file system calls on folders of snapshots, outputs and results; one method each.

``FileSystem`` decides nothing: its caller decides what an error means and what happens next. So a test can record the
calls of a whole run, or let any one of them fail, by overriding a method. Errors are the operating system's own
(``OSError`` with its ``errno``). The functions below ``FileSystem`` combine its calls: whole reads and writes from
partial ones, and fallbacks for file systems that lack a call.

FILES-1  Every call on a folder of snapshots, outputs or results    test_only_one_module_calls_the_file_system
    goes through this object.
FILES-2  A call that changes something inside a snapshot's folder   test_nothing_is_changed_through_a_link
    or a temporary folder enters that folder without following a
    link: others who may write to the folder around it cannot lead
    the call elsewhere. Links in the path of the folder around it
    are followed: the user chose that path.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)

# Folders of snapshots, hidden or not, and temporary folders: the only ones with names of ours that hold our files.
_OUR_FOLDER = re.compile(r"(?:\.trash-)?step-[0-9]{12,18}-[0-9]{8}T.*|\..+-[0-9a-f]{16}", re.DOTALL)
_ENTER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_AT_FDCWD = -100  # linux/fcntl.h: a relative path starts at the working directory
_RENAME_NOREPLACE = 1  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h

UNSUPPORTED = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))
"""Errors of a call that the kernel or the file system does not support."""
CANNOT_RENAME = UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.EMFILE}
"""Errors of a rename that the file system does not support; ``EMFILE`` comes from object stores for full folders."""
ONE_PASS = CANNOT_RENAME | {errno.ESPIPE}
"""Errors of a rename, or of a write at an offset, on a file system where files must be written in one pass."""
_NO_FOLDER_FSYNC = UNSUPPORTED | {errno.EBADF}  # fsync(2) may refuse a descriptor that is not open for writing
NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT))
"""Errors of a full disk, or of a user whose quota is used up."""
UNAVAILABLE = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN", "ECONNRESET", "ECONNABORTED"),
        *("ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EPROTO", "ENODEV", "EAGAIN"),
    )
    if hasattr(errno, name)
)
"""Errors of a disk or a server that fails: no evidence about the file that was to be read."""
FORBIDDEN = frozenset((errno.EACCES, errno.EPERM))
"""Errors of a user without permission: no evidence about the file either."""
_WAITS_SECONDS = (0.1, 1.0, 5.0)  # before each further attempt: a remount takes seconds, a stale handle nothing
_BYTES_LOST = NO_SPACE | {errno.EIO}

NO_FOLDER_FSYNC = "its file system has no fsync of folders, so after a power cut the newest names may be missing"
"""What a user should know about such a file system."""
ONLY_ONE_PASS = (
    "its file system refuses renames or writes at offsets, so each snapshot is written in one pass under its final name"
)
"""What a user should know about such a file system."""
_noted_devices: set[int] = set()  # file systems for which this was logged: once is enough


def reason(error: OSError, path: Path) -> str:
    """Return why a call about a path failed, for a message that names the path already.

    The text of an ``OSError`` repeats its error number and its path; another path is kept.
    """
    text = error.strerror or str(error)
    other = error.filename is not None and os.fspath(error.filename) != os.fspath(path)
    return f"{text} ({error.filename})" if other else text


class FileSystem:
    """The calls of the operating system that the snapshot store makes; tests override single methods."""

    def open_exclusive(self, path: Path) -> int:
        """Create a file for writing and return its descriptor; the name must be new (``O_EXCL``)."""
        with _reached(path) as [(name, folder)]:
            return os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666, dir_fd=folder)

    def open_read(self, path: Path) -> int:
        """Open for positioned reads. Never blocks, not even on a pipe that has the name of a snapshot."""
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def open_lines(self, path: Path) -> int:
        """Open a file for reads and for writes at its end, as ``open_read``; make an empty one if the name is new.

        A link whose target is missing is refused (``FileNotFoundError``): nothing is made elsewhere.
        """
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        return os.open(path, flags)

    def lock_file(self, descriptor: int) -> None:
        """Wait until no other process has a lock on this file, and lock it until it is closed."""
        import fcntl  # here, because most processes need no lock

        fcntl.flock(descriptor, fcntl.LOCK_EX)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        """Remove the bytes of an open file from this size on."""
        os.ftruncate(descriptor, size_bytes)

    def stat(self, descriptor: int) -> os.stat_result:
        """Return size and kind of an open file."""
        return os.fstat(descriptor)

    def will_need(self, descriptor: int, offset: int, size_bytes: int) -> None:
        """Ask the kernel to read a part of a file, without waiting for it; does nothing where there is no such call."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_WILLNEED)

    def preallocate(self, descriptor: int, size_bytes: int) -> None:
        """Reserve disk blocks and set the size, by ``fallocate(2)``; ``ENOSYS`` where there is no such call.

        ``os.posix_fallocate`` is not used: where the file system cannot reserve blocks, it writes zeros instead.
        """
        _check(_c_function("fallocate64", "fallocate")(descriptor, 0, _c_int64(0), _c_int64(size_bytes)))

    def free_bytes(self, path: Path) -> int:
        """Return the bytes that this user may still write to the file system that holds ``path``.

        ``ENOTSUP`` where the file system does not report them: some network file systems report zero blocks in all.
        """
        status = os.statvfs(path)
        if status.f_blocks == 0:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), os.fspath(path))
        return status.f_bavail * status.f_frsize

    def start_writeback(self, descriptor: int, offset: int, size_bytes: int) -> None:
        """Ask the kernel to start writing a part of a file to disk, by ``sync_file_range(2)``.

        Makes no byte durable; ``ENOSYS`` where there is no such call. It does not wait for the disk: a wait would
        consume the error of a failed write, and ``fsync`` would not report it.
        """
        part = (_c_int64(offset), _c_int64(size_bytes))
        _check(_c_function("sync_file_range")(descriptor, *part, _SYNC_FILE_RANGE_WRITE))

    def write_at(self, descriptor: int, buffer: ReadableBuffer, offset: int) -> int:
        """Write at a position; return the number of bytes written, which may be fewer than those passed."""
        return os.pwrite(descriptor, buffer, offset)

    def read_at(self, descriptor: int, buffer: WriteableBuffer, offset: int) -> int:
        """Fill ``buffer`` from a position; return the number of bytes read, 0 at the end of the file."""
        return os.preadv(descriptor, [buffer], offset)

    def fsync(self, descriptor: int) -> None:
        """Make the file's bytes and size durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close; the descriptor is gone afterwards even when this raises."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file its final name; replaces a file that has this name."""
        with _reached(source, target) as [(old, from_folder), (new, to_folder)]:
            os.rename(old, new, src_dir_fd=from_folder, dst_dir_fd=to_folder)

    def rename_new(self, source: Path, target: Path) -> None:
        """Give a file its final name, or raise ``FileExistsError`` and change nothing if the name is taken.

        Atomic, by ``renameat2(2)``; ``ENOSYS`` or ``EINVAL`` where the kernel or the file system does not support it.
        """
        with _reached(source, target) as places:
            arguments = [
                each for name, folder in places for each in (_AT_FDCWD if folder is None else folder, os.fsencode(name))
            ]
            _check(_c_function("renameat2")(*arguments, _RENAME_NOREPLACE), source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file's name."""
        with _reached(path) as [(name, folder)]:
            os.unlink(name, dir_fd=folder)

    def make_folder(self, path: Path) -> None:
        """Create one folder; ``FileExistsError`` if the name is taken."""
        with _reached(path) as [(name, folder)]:
            os.mkdir(name, dir_fd=folder)

    def make_folders(self, path: Path) -> None:
        """Create a folder and its parents, where they are missing."""
        path.mkdir(parents=True, exist_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all that it holds, without following a link; what cannot be removed stays."""
        shutil.rmtree(path, ignore_errors=True)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder; ``ENOTEMPTY`` if it holds anything."""
        with _reached(path) as [(name, folder)]:
            os.rmdir(name, dir_fd=folder)

    def fsync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def wait(self, seconds: float) -> None:
        """Wait before a call is repeated."""
        time.sleep(seconds)

    def list(self, path: Path) -> list[str]:
        """Return the names in a folder, in no particular order."""
        return os.listdir(path)

    def lstat(self, path: Path) -> os.stat_result:
        """Return kind, size and times of the entry with this name; of a link itself, not of its target."""
        return os.lstat(path)

    def status(self, path: Path) -> os.stat_result:
        """Return kind, size and times of the file or folder at a path; of a link's target, not of the link."""
        return os.stat(path)

    def exists(self, path: Path) -> bool:
        """Return whether the name is taken; a dangling link takes it too."""
        return os.path.lexists(path)


@contextlib.contextmanager
def _reached(*paths: Path) -> Iterator[list[tuple[str, int | None]]]:
    """Yield name and folder (its descriptor, or None) by which a call reaches each path: see FILES-2."""
    with contextlib.ExitStack() as opened:
        places: list[tuple[str, int | None]] = []
        for path in paths:
            is_ours = _OUR_FOLDER.fullmatch(path.parent.name) is not None
            folder = opened.enter_context(_entered(path.parent)) if is_ours else None
            places.append((os.fspath(path) if folder is None else path.name, folder))
        try:
            yield places
        except OSError as error:  # the system knows the names as they were passed
            error.filename = os.fspath(paths[0])
            error.filename2 = os.fspath(paths[1]) if len(paths) > 1 else None
            raise


@contextlib.contextmanager
def _entered(folder: Path) -> Iterator[int]:
    """Yield the descriptor of a folder; ``NotADirectoryError`` if a link has its name."""
    try:
        descriptor = os.open(folder, _ENTER)
    except NotADirectoryError as error:
        what = "Not a folder, or a symbolic link, which is not followed"
        raise NotADirectoryError(errno.ENOTDIR, what, os.fspath(folder)) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def repeated(call: Callable[[], _Result], wait: Callable[[float], None]) -> _Result:
    """Return what a call that reads returns. It is repeated up to three times if the file system fails (UNAVAILABLE).

    A descriptor may be what has become stale, so the call must open its file itself.

    Args:
        call: The call.
        wait: Waits for a number of seconds.

    Raises:
        OSError: The error of the last call.
    """
    for seconds in _WAITS_SECONDS:
        try:
            return call()
        except OSError as error:
            if error.errno not in UNAVAILABLE:
                raise
            _log.info("reading failed (%s); trying again in %g seconds", error, seconds)
        wait(seconds)
    return call()


def rename_to_new(files: FileSystem, source: Path, target: Path) -> None:
    """Rename, or raise ``FileExistsError`` and change nothing if the name is taken.

    Where the system has no rename that refuses a taken name, the name is looked up just before the rename.
    """
    try:
        files.rename_new(source, target)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if files.exists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target)) from error
        files.rename(source, target)


def reserve(files: FileSystem, descriptor: int, size_bytes: int) -> None:
    """Preallocate where the file system supports it. Raises ``OSError`` only if there is not enough space."""
    try:
        files.preallocate(descriptor, size_bytes)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise


def hint_writeback(files: FileSystem, descriptor: int, offset: int, size_bytes: int) -> bool:
    """Return whether the kernel accepted the hint of ``start_writeback``. Raises ``OSError`` if bytes were lost."""
    try:
        files.start_writeback(descriptor, offset, size_bytes)
    except OSError as error:
        if error.errno in _BYTES_LOST:
            raise
        return False
    return True


def sync_folder(files: FileSystem, folder: Path) -> bool:
    """Make the names in a folder durable; return False where the file system has no such operation."""
    try:
        files.fsync_folder(folder)
    except OSError as error:
        # Names on some network file systems are durable when the call that makes them returns, or never; in both cases
        # nothing more can be done.
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
        device = files.lstat(folder).st_dev
        if device not in _noted_devices:
            _noted_devices.add(device)
            _log.info("%s: %s", folder, NO_FOLDER_FSYNC)
        return False
    return True


def write_fully(files: FileSystem, descriptor: int, buffer: ReadableBuffer, offset: int) -> None:
    """Write all of a C-contiguous buffer at a position, in as many calls as it takes."""
    view = memoryview(buffer).cast("B")
    while view:
        try:
            written = files.write_at(descriptor, view, offset)
        except InterruptedError:
            continue
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote 0 bytes and reported no error")
        view, offset = view[written:], offset + written


def read_fully(files: FileSystem, descriptor: int, buffer: WriteableBuffer, offset: int) -> memoryview:
    """Fill a C-contiguous buffer from a position; return its filled part: all of it unless the file ends before."""
    view, filled = memoryview(buffer).cast("B"), 0
    while filled < len(view):
        try:
            count = files.read_at(descriptor, view[filled:], offset + filled)
        except InterruptedError:
            continue
        if count <= 0:
            break
        filled += count
    return view[:filled]


@functools.cache
def _c_function(*names: str) -> Callable[..., int]:
    """Return the first of these functions that the C library has, else a function that fails with ``ENOSYS``."""
    import ctypes  # here, because most processes only read

    library = ctypes.CDLL(None, use_errno=True)  # releases the interpreter lock during calls
    for name in names:
        if hasattr(library, name):
            return getattr(library, name)  # type: ignore[no-any-return]
    return _unavailable


def _unavailable(*_: Any) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _c_int64(value: int) -> Any:
    import ctypes

    return ctypes.c_int64(value)


def _check(result: int, source: Path | None = None, target: Path | None = None) -> None:
    """Raise the exception that ``os`` would have raised if a C function returned -1."""
    import ctypes

    if result != 0:
        number = ctypes.get_errno()
        if source is None:
            raise OSError(number, os.strerror(number))
        raise OSError(number, os.strerror(number), os.fspath(source), None, os.fspath(target or source))


def open_regular(path: Path, files: FileSystem | None = None) -> BufferedReader:
    """Open a regular file for reading, without ever waiting.

    Raises:
        ValueError: The path is a pipe, a device or a folder.
        OSError: The file cannot be opened.
    """
    files = files or FileSystem()
    descriptor = files.open_read(path)
    if not stat.S_ISREG(files.stat(descriptor).st_mode):
        files.close(descriptor)
        raise ValueError("it is not a regular file")
    return open(descriptor, "rb")


def read_whole(path: Path, *, max_bytes: int, files: FileSystem | None = None) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: As ``open_regular``, or the file has more than ``max_bytes`` bytes.
        OSError: The file cannot be read.
    """
    with open_regular(path, files) as file:
        content = file.read(max_bytes + 1) if size_of(file, files) <= max_bytes else None
    if content is None or len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content


def size_of(file: BufferedReader, files: FileSystem | None = None) -> int:
    """Return the bytes of an open file."""
    return (files or FileSystem()).stat(file.fileno()).st_size


def is_folder(path: Path, files: FileSystem | None = None) -> bool:
    """Return whether there is a folder at this path, or at the end of a link that has this name."""
    try:
        return stat.S_ISDIR((files or FileSystem()).status(path).st_mode)
    except OSError:  # such as a link to itself
        return False


def is_there(path: Path, files: FileSystem | None = None) -> bool:
    """Return whether there is a file or a folder at this path; a link to nothing does not count."""
    try:
        (files or FileSystem()).status(path)
    except OSError:
        return False
    return True
