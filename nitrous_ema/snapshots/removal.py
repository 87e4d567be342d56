"""How snapshots are dropped: each is hidden first and unlinked later. Files that dead processes left are removed, too.

Other processes may list or read a snapshot while it is being dropped, and the machine may stop at any moment. So a
snapshot is hidden first: one rename gives its folder a name that no listing shows. Its files are unlinked later, when
the new name is durable; a crash leaves the snapshot whole or not listed, never a part of it. A reader that had listed
the snapshot finds its files under the hidden name. A pin is a note in the folder of snapshots; a snapshot that is
pinned while it is being hidden is renamed back. All steps are renames and unlinks, which any number of processes may
do at once.

step of ``hide``                                   a reader after a crash here finds
check that it is not pinned                        the snapshot
rename its folder to .trash-<name>                 the snapshot or nothing of it: a folder has one name, and is whole
(for each snapshot to hide)                        the same of each
fsync ROOT                                         nothing of them
return                                             nothing of them: this is the promise; all of their bytes are there

step of ``remove_hidden``
list .trash-*, check which are pinned              nothing of them, or (a rename was lost) whole snapshots
rename the pinned ones back                        the pinned ones: the same, or whole
rename the others to .trash-<name>.<random>        the same; no process renames these back
fsync ROOT                                         nothing of them, whatever happens from now on
unlink their files, remove their folders           the same

REMOVE-1  Nothing is unlinked before the name that hides it is    test_nothing_is_unlinked_before_it_is_durably_hidden
    durable: also if another process gave it that name, and may
    have died before its fsync.
REMOVE-2  Files are unlinked in folders called                    test_only_hidden_snapshots_are_removed
    .trash-<a snapshot's folder>, and nowhere else, except for
    temporary files of dead processes (REMOVE-6) and for
    snapshots that a note hides (REMOVE-8).
REMOVE-3  The newest snapshot and pinned ones are not hidden. A   test_pinned_and_newest_snapshots_are_not_hidden
    snapshot that is pinned while it is being hidden comes back   test_pin_that_came_too_late_brings_the_snapshot_back
    with the next ``remove_hidden``, which each run and each
    ``prune`` calls. For pin() writes its note first and then
    looks for the snapshot, while ``remove_hidden`` lists hidden
    folders first and then looks for notes; and one rename
    decides whether a folder comes back or is unlinked. So a
    snapshot is never unlinked once its pin() has returned, and
    a snapshot that comes back is whole. (Not excluded: a
    network file system on which one machine sees the renames of
    another one late.)
REMOVE-4  A name that is gone already was removed by another      test_two_processes_that_do_the_same_do_no_harm
    process, which is not an error: any number of processes may
    hide and remove the same snapshots.
REMOVE-5  A reader that has listed a snapshot finds its files in  test_reader_finds_what_was_hidden_since_it_listed
    .trash-* as long as they are there. So a run that starts
    removes only snapshots that were hidden ten minutes before.
REMOVE-6  A temporary file is removed only if there is proof that test_temporary_files_of_the_provably_dead_are_removed
    its writer is dead; its folder is removed with it if the
    folder holds nothing else.
REMOVE-7  A failure to clean up never stops a run from starting.  test_failure_to_clean_up_is_logged_and_nothing_else
REMOVE-8  Where a folder cannot be renamed (an object store,      test_pin_and_a_note_exclude_each_other
    mounted), a note hides it: dropped-<step>-<run>. Its files    test_files_are_removed_one_by_one_behind_a_note
    are unlinked one by one, and the note goes when the folder
    is durably gone. A pin overrides a note: such a snapshot is
    listed and never unlinked. ``pin`` and ``hide`` each write
    a note first and then look for that of the other, and each
    fails if it finds it; no note is withdrawn before its folder
    is gone. So a pin that has returned was there before any
    look for pins by which a removal was decided.

Longer than 300 lines: a fifth of them is this page, which should stand next to the code that it describes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nitrous_ema._base.temporary_files import writer_state
from nitrous_ema.errors import SnapshotError, bug
from nitrous_ema.snapshots.commit import Committer
from nitrous_ema.snapshots.disk_space import explained
from nitrous_ema.snapshots.filesystem import CANNOT_RENAME, rename_to_new, sync_folder
from nitrous_ema.snapshots.names import (
    dropped,
    dropped_note_name,
    folder_name,
    hidden_name,
    parse_dropped_note_name,
    parse_folder_name,
    parse_hidden_name,
    parse_pin_note_name,
    pin_note_name,
)
from nitrous_ema.snapshots.snapshot import Snapshot, TemporaryFile

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 600.0  # for readers of snapshots that were hidden before a run starts
# NFS gives an open file another name instead of removing it, so its folder is not empty yet.
_IN_USE = frozenset((errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY))


class SnapshotRemover:
    """The methods of ``SnapshotStore`` that remove something from its folder. Their contracts are documented there.

    Args:
        committer: Writes the notes; its folder and file system are used.
    """

    def __init__(self, committer: Committer) -> None:
        self.root = committer.root
        self.files = committer.files
        self._committer = committer

    # Pins

    def pin(self, step: int, run: str, exists: Callable[[], bool]) -> bool:
        """Pin a snapshot, see ``SnapshotStore.pin``. Returns False, and leaves no new note, if it does not exist."""
        note = self._note(step, run)
        is_new = not self.files.exists(note)
        # The note comes first: a process that removes the snapshot later than this finds the note (REMOVE-3).
        self._committer.write_note(note)
        hidden = self.root / hidden_name(folder_name(step, run))
        is_dropped = self.files.exists(self.root / dropped_note_name(step, run))  # looked for after the note: REMOVE-8
        # Checked twice: another process may have renamed the snapshot back between the first check and this rename.
        if not is_dropped and (exists() or self._unhide(hidden) or exists()):
            return True
        if is_new:
            self.unpin(step, run)
        return False

    def unpin(self, step: int, run: str) -> None:
        """Remove the note of a pin; see ``SnapshotStore.unpin``."""
        note = self._note(step, run)
        try:
            with contextlib.suppress(FileNotFoundError):
                self.files.unlink(note)
            sync_folder(self.files, self.root)
        except OSError as error:
            raise _failed(note, f"{note} could not be removed", error) from error

    def pins(self, names: Iterable[str]) -> frozenset[tuple[int, str]]:
        """Return step and run of each pin's note among these names."""
        return frozenset(filter(None, map(parse_pin_note_name, names)))

    def _note(self, step: int, run: str) -> Path:
        # The run becomes a part of a path: a name with "/" or ".." must not lead out of the folder.
        if parse_folder_name(folder_name(step, run)) is None:
            raise ValueError(
                f"step={step!r} and run={run!r}: these are not the step and run of a snapshot. Take both from a "
                "listing of the folder."
            )
        return self.root / pin_note_name(step, run)

    # Hiding

    def hide(self, snapshots: Iterable[Snapshot], newest: Snapshot | None) -> int:
        """Hide snapshots; see ``SnapshotStore.hide``. ``newest`` is the snapshot that is not hidden in any case."""
        chosen = list(snapshots)
        # All snapshots are checked before any is renamed, so that a refused call has changed nothing.
        for snapshot in chosen:
            self._check_may_be_hidden(snapshot, newest)
        hidden_bytes = 0
        try:
            for snapshot in chosen:
                # Once more: another process may have pinned the snapshot since the first check.
                self._check_may_be_hidden(snapshot, newest)
                hidden_bytes += self._hide_folder(snapshot)
        finally:
            # Even if this call renamed nothing: another process may have renamed the folders and died before its fsync.
            if chosen:
                self._sync_root("hidden snapshots may come back if the machine stops")
        return hidden_bytes

    def _check_may_be_hidden(self, snapshot: Snapshot, newest: Snapshot | None) -> None:
        path = self.root / folder_name(snapshot.step, snapshot.run)
        if newest is not None and (newest.step, newest.run) == (snapshot.step, snapshot.run):
            raise SnapshotError(f"{path} is the newest snapshot of its folder, which is never dropped.", path=path)
        if self.files.exists(self._note(snapshot.step, snapshot.run)):
            raise _pinned(path)

    def _hide_folder(self, snapshot: Snapshot) -> int:
        folder = self.root / folder_name(snapshot.step, snapshot.run)
        hidden = folder.with_name(hidden_name(folder.name))
        try:
            rename_to_new(self.files, folder, hidden)
        except OSError as error:
            if not self.files.exists(folder):
                return 0  # another process has hidden it
            if error.errno not in CANNOT_RENAME:
                raise _failed(folder, f"{folder} could not be hidden", error) from error
            _log.info("%s cannot be renamed (%s): a note hides it instead", folder, error)
            self._committer.write_note(self.root / dropped_note_name(snapshot.step, snapshot.run))
            if self.files.exists(self._note(snapshot.step, snapshot.run)):  # looked for after the note: REMOVE-8
                raise _pinned(folder) from error
        return snapshot.bytes

    # Removing

    def hidden(self) -> list[Path]:
        """Return the folders of hidden snapshots; see ``SnapshotStore.hidden``."""
        return self._hidden(self._root_names())

    def _hidden(self, names: list[str]) -> list[Path]:
        noted = {folder_name(*known) for known in dropped(names)}
        return [self.root / name for name in sorted(names) if parse_hidden_name(name) or name in noted]

    def _root_names(self) -> list[str]:
        try:
            return self._names(self.root)
        except OSError as error:
            raise SnapshotError(
                f"{self.root} cannot be listed: {explained(error, self.root)}", path=self.root
            ) from error

    def remove_hidden(self, older_than_seconds: float = 0.0) -> int:
        """Unlink hidden snapshots; see ``SnapshotStore.remove_hidden``."""
        claimed, names = [], self._root_names()
        failures: list[SnapshotError] = []
        for folder in self._hidden(names):
            if known := parse_folder_name(folder.name):  # hidden by a note
                # A pin may have been missing when the first names were listed, and the note there with the last ones.
                is_pinned = self.files.exists(self._note(*known))
                if not is_pinned and self._is_older(self.root / dropped_note_name(*known), older_than_seconds):
                    claimed.append(folder)
            # Claimed already, by a process that died or is still unlinking: no pin can bring this snapshot back.
            elif _is_claimed(folder):
                claimed.append(folder)
            elif self._is_pinned(folder):
                self._unhide(folder)
            elif self._is_older(folder, older_than_seconds):
                try:
                    claimed += self._claim(folder)
                except OSError as error:
                    self._collect(folder, error, failures)
        freed_bytes = self._remove_claimed(claimed, failures) if claimed else 0
        if any(map(parse_dropped_note_name, names)):
            self._remove_dropped_notes()
        if failures:
            raise failures[0]
        return freed_bytes

    def _collect(self, folder: Path, error: OSError, failures: list[SnapshotError]) -> None:
        """Collect a failure to remove a folder. The first is raised when all were tried: the others must not stay.

        Where only another user may remove the folder, this is left to that user.
        """
        if isinstance(error, PermissionError) and self._is_of_another_user(folder):
            _log.info("%s is another user's, and was not removed: %s", folder, error)
        else:
            failures.append(_failed(folder, f"{folder} could not be removed", error))

    def _is_of_another_user(self, folder: Path) -> bool:
        try:
            return self.files.lstat(folder).st_uid != os.geteuid()
        except OSError:
            return False

    def _remove_claimed(self, claimed: list[Path], failures: list[SnapshotError]) -> int:
        # Needed for folders of other processes as well: they may have died between rename and fsync (REMOVE-1).
        self._sync_root("nothing was removed")
        freed_bytes = 0
        for folder in claimed:
            try:
                freed_bytes += self._remove(folder)
            except OSError as error:
                self._collect(folder, error, failures)
        return freed_bytes

    def _remove_dropped_notes(self) -> None:
        """Unlink the notes of hidden snapshots whose folders are gone, durably."""
        names = self._root_names()
        notes = [
            name for name in names if (known := parse_dropped_note_name(name)) and folder_name(*known) not in names
        ]
        if not notes:
            return
        self._sync_root("notes of removed snapshots stay")  # a folder that came back would be listed
        for name in notes:
            try:
                self._unlink(self.root / name)
            except OSError as error:
                raise _failed(self.root / name, f"{self.root / name} could not be removed", error) from error

    def _is_pinned(self, hidden: Path) -> bool:
        return self.files.exists(self._note(*_step_and_run(hidden)))

    def _unhide(self, hidden: Path) -> bool:
        """Give a hidden snapshot its name back. Return False if the folder is gone or the rename fails (logged)."""
        folder = self.root / folder_name(*_step_and_run(hidden))
        try:
            rename_to_new(self.files, hidden, folder)
            sync_folder(self.files, self.root)
        except FileNotFoundError:  # another process was faster
            return False
        except OSError as error:
            _log.warning("%s is pinned, but could not be renamed back: %s", hidden, error)
            return False
        _log.info("renamed the hidden snapshot %s back, since it is pinned", folder)
        return True

    def _claim(self, hidden: Path) -> list[Path]:
        """Rename a hidden folder to the name under which it is unlinked; empty if another process has renamed it.

        The rename decides between this process and a pin: a folder with the new name is never renamed back.
        """
        claimed = hidden.with_name(f"{hidden.name}.{secrets.token_hex(4)}")
        try:
            rename_to_new(self.files, hidden, claimed)
        except FileNotFoundError:
            return []
        return [claimed]

    def _is_older(self, path: Path, seconds: float) -> bool:
        """Return whether a folder has not changed for this many seconds. Hiding it was its last change.

        On common file systems a rename updates the ``ctime`` of the renamed folder.
        """
        try:
            return seconds <= 0 or self._untouched_seconds(path) >= seconds
        except OSError:
            return False

    def _untouched_seconds(self, path: Path) -> float:
        return time.time() - self.files.lstat(path).st_ctime

    def _remove(self, folder: Path) -> int:
        """Unlink the files in a hidden folder, then the folder; return the bytes of the files."""
        freed_bytes = 0
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if not stat.S_ISDIR(self.files.lstat(folder).st_mode):
                self.files.unlink(folder)  # a link: its target may be outside the folder of snapshots
                return 0
            for name in self.files.list(folder):
                freed_bytes += self._unlink(folder / name)
            self._remove_folder(folder)
        return freed_bytes

    def _unlink(self, path: Path) -> int:
        try:
            size_bytes = self.files.lstat(path).st_size
            self.files.unlink(path)
        except FileNotFoundError:
            return 0
        except OSError as error:
            # The file stays; the next ``remove_hidden``, or the next run that starts, tries again.
            if error.errno in _IN_USE:
                return 0
            raise
        return size_bytes

    def _remove_folder(self, folder: Path) -> None:
        try:
            self.files.remove_folder(folder)
        except OSError as error:
            # Not empty: a file is still open, or another process writes or has written to the folder (REMOVE-6).
            if error.errno not in _IN_USE and not isinstance(error, FileNotFoundError):
                raise

    def _sync_root(self, consequence: str) -> None:
        try:
            sync_folder(self.files, self.root)
        except OSError as error:
            what = f"{self.root}: {consequence}, since its names could not be made durable"
            raise _failed(self.root, what, error) from error

    # Files of dead processes

    def temporary(self) -> list[TemporaryFile]:
        """Return the files under temporary names; see ``SnapshotStore.temporary``."""
        found = []
        for folder in self._folders():
            # Its writer has renamed a file since; or a folder, such as another user's, cannot be looked at.
            with contextlib.suppress(OSError):
                for name in sorted(self._names(folder)):
                    if name.startswith((".rank-", ".probe")):
                        with contextlib.suppress(OSError):
                            found.append(self._temporary_file(folder / name))
        return found

    def clean_up(self) -> None:
        """Remove temporary files of dead processes, and snapshots hidden long ago. Failures are logged."""
        with self._log_failures():
            for temporary in self.temporary():
                if temporary.writer == "gone":
                    with self._log_failures():  # of one file, so that the other files are still removed
                        self._unlink(temporary.path)
                        _log.info("removed %s, left by a process that died", temporary.path)
                        if temporary.path.parent != self.root:
                            self._remove_folder(temporary.path.parent)
        with self._log_failures():
            self.remove_hidden(_GRACE_SECONDS)

    @contextlib.contextmanager
    def _log_failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SnapshotError) as error:
            _log.warning("%s could not be cleaned up: %s", self.root, error)

    def _temporary_file(self, path: Path) -> TemporaryFile:
        status = self.files.lstat(path)
        untouched_seconds = time.time() - status.st_ctime
        writer = writer_state(path.name, untouched_seconds=untouched_seconds)
        return TemporaryFile(path, status.st_size, writer)

    def _folders(self) -> list[Path]:
        """Return ROOT, and the snapshots' folders in it."""
        return [self.root, *(self.root / name for name in sorted(self._names(self.root)) if parse_folder_name(name))]

    def _names(self, folder: Path) -> list[str]:
        try:
            return self.files.list(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []


def _step_and_run(hidden: Path) -> tuple[int, str]:
    known = parse_hidden_name(hidden.name)
    if known is None:
        raise bug(f"{hidden} is not a hidden snapshot")
    return known


def _is_claimed(hidden: Path) -> bool:
    return hidden.name != hidden_name(folder_name(*_step_and_run(hidden)))


def _pinned(path: Path) -> SnapshotError:
    return SnapshotError(f"{path} is pinned, so it cannot be dropped. Call unpin() first.", path=path)


def _failed(path: Path, what: str, error: OSError) -> SnapshotError:
    failure = SnapshotError(f"{what}: {explained(error, path)}", path=path)
    failure.__cause__ = error
    return failure
