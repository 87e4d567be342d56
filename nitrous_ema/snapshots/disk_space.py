"""Checks of disk space before training and before each write, and the advice in messages about failed calls.

Before training, ``check_disk_space`` refuses a disk on which not even one snapshot fits, and warns if the disk will be
full soon. Before each write, ``DiskSpace.require`` checks that the file fits. If it does not fit, dropped snapshots are
removed first. A snapshot that still does not fit is refused before any of its bytes are on disk. ``remedy`` ends the
message of every failed call.

A write that meets a full disk is repeated once (``Committer._write_file`` in ``commit``). If it fails again, the
synchronous sink raises at once, and the background sink at the next call, or it warns (``on_error``).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema.errors import SnapshotError, warn
from nitrous_ema.snapshots.filesystem import NO_SPACE, FileSystem, reason
from nitrous_ema.snapshots.names import parse_folder_name

_log = logging.getLogger(__name__)

_FEW = 20
"""Without a bound from ``keep``, a disk with space for fewer snapshots than this will soon be full."""

_REMEDY = (
    "Free space on that disk, choose another folder (checkpoint_folder=), keep fewer snapshots (keep=), or store "
    "averages in half the bytes (checkpoint_dtype=torch.float16)."
)


class DiskSpace:
    """The free space of one folder's disk.

    Args:
        root: The folder, as an absolute path.
        files: The file system.
        reclaim: Removes snapshots that were dropped already; called when a file does not fit.
    """

    def __init__(self, root: Path, files: FileSystem, reclaim: Callable[[], object] = lambda: None) -> None:
        self._root = root
        self._files = files
        self._reclaim = reclaim

    def free_bytes(self) -> int | None:
        """Return the bytes that may still be written; None where the file system does not report them."""
        try:
            return self._files.free_bytes(self._root)
        except OSError:
            return None

    def require(self, needed_bytes: int) -> None:
        """Check that a file of this size fits; remove dropped snapshots first if it does not.

        Raises:
            OSError: ``ENOSPC``: the file does not fit even then.
        """
        free_bytes = self.free_bytes()
        # A disk that does not report its free space is written to: a failed write then shows that it is full.
        if free_bytes is not None and free_bytes < needed_bytes:
            self.reclaim()
            free_bytes = self.free_bytes()
        if free_bytes is not None and free_bytes < needed_bytes:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {format_bytes(needed_bytes)} needed, {format_bytes(free_bytes)} free",
            )

    def reclaim(self) -> None:
        """Remove snapshots that were dropped already. A failure is logged."""
        try:
            self._reclaim()
        except (OSError, SnapshotError) as error:
            _log.warning("%s is full, and dropped snapshots could not be removed: %s", self._root, error)


def check_disk_space(
    root: Path, files: FileSystem, names: Callable[[], list[str]], snapshot_bytes: int, most_snapshots: int | None
) -> None:
    """Check before training how many snapshots fit on the disk; warn if fewer fit than the run will write.

    Nothing is checked where the file system does not report its free space.

    Args:
        root: The snapshot folder, which exists. With a bound from ``keep``, the snapshots in it count as free space,
            since the rule drops them as new ones are written.
        files: The file system.
        names: Returns the names in the folder; called only if they matter.
        snapshot_bytes: Bytes of one snapshot, on the disk of this process.
        most_snapshots: How many snapshots ``keep`` allows on disk at once; None if it sets no bound.

    Raises:
        SnapshotError: Not even one snapshot fits, or ``names`` raises it.
    """
    free_bytes = DiskSpace(root, files).free_bytes()
    if free_bytes is None:
        _log.info("a snapshot takes %s; %s does not report its free space", format_bytes(snapshot_bytes), root)
        return
    fitting = free_bytes // snapshot_bytes
    _log.info("a snapshot takes %s; there is space for %d in %s", format_bytes(snapshot_bytes), fitting, root)
    facts = f"{root}: a snapshot needs {format_bytes(snapshot_bytes)}, and {format_bytes(free_bytes)} are free"
    if not fitting:
        raise SnapshotError(f"{facts}: not even one fits. {_REMEDY}", path=root)
    if most_snapshots is None and fitting < _FEW:
        warn(f"{facts}: there is space for {pluralize(fitting, 'snapshot')}, and keep= sets no bound. {_REMEDY}")
    elif most_snapshots is not None and fitting < most_snapshots:
        existing = sum(parse_folder_name(name) is not None for name in names())
        if fitting + existing >= most_snapshots:
            return
        warn(
            f"{facts}: there is space for {fitting} more snapshots in addition to the {existing} already in the "
            f"folder, but keep= allows {most_snapshots}. {_REMEDY}"
        )


def explained(error: OSError, path: Path) -> str:
    """Return why a call about a path failed and what the user can do: the end of a message that names the path."""
    return f"{reason(error, path)}. {remedy(error)}"


def remedy(error: OSError) -> str:
    """Return a sentence that states what the user can do about a failed file system call."""
    if error.errno in NO_SPACE:
        return "Free space on that disk (and files, if df -i shows that it can hold no more), or choose another folder."
    if error.errno == errno.EFBIG:
        return "Raise this process's limit on the size of a file (ulimit -f), or choose another file system."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Give this user access to it, or choose another folder."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "Something that is not a folder has this name: choose another folder."
    if error.errno == errno.EISDIR:
        return "A folder has this name: choose another name."
    if error.errno == errno.ENAMETOOLONG:
        return "Choose a shorter name."
    return "Check the disk and the folder, or choose another folder."
