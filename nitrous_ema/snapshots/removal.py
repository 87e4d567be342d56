"""How a snapshot leaves its folder: it is hidden first and unlinked later; and what dead processes left.

step of ``hide``                                   after a crash here, a reader finds
look whether it is pinned                          the snapshot
rename its folder to .trash-<name>                 the snapshot or nothing of it: a folder has one name, and is whole
(all that are asked for)                           the same of each
fsync ROOT                                         nothing of them
return                                             nothing of them: this is the promise; all of their bytes are there

step of ``remove_hidden``
list .trash-*, look which are pinned               nothing of them, or (a rename was lost) whole snapshots
rename pinned ones back                            those the same, or whole
rename the others to .trash-<name>.<random>        the same; nobody brings these back
fsync ROOT                                         nothing of them, whatever happens from now on
unlink their files, remove their folders           the same

R1  Nothing is unlinked before the name that hides it is durable, test_nothing_is_unlinked_before_it_is_durably_hidden
    whoever gave it that name, and whether they lived to fsync it.
R2  Only what is in a folder called .trash-<a snapshot's folder>  test_only_hidden_snapshots_are_removed
    is unlinked, and temporary files of the dead (R6).
R3  The newest snapshot is not hidden. Nor is a pinned one; one   test_pinned_and_newest_snapshots_are_not_hidden
    that is pinned just when it is hidden comes back with the     test_pin_that_came_too_late_brings_the_snapshot_back
    next ``remove_hidden`` (each run and each ``prune`` calls it):
    pin() leaves its note first and then looks for the snapshot;
    whoever unlinks looks for hidden folders first and then for
    notes; one rename decides whether a folder comes back or is
    unlinked. So what a pin() names that has returned is never
    unlinked, and what comes back is whole. (Not excluded: a
    network file system on which one machine sees late what
    another one renames.)
R4  A name that is gone already was somebody else's work, and     test_two_processes_that_do_the_same_do_no_harm
    is passed over: any number of processes may do the same.
R5  Who has listed a snapshot finds its files in .trash-* as long test_reader_finds_what_was_hidden_since_it_listed
    as they are there. So what others have hidden is left alone
    for ten minutes when a run starts.
R6  A temporary file is removed only if there is proof that its   test_temporary_files_of_the_provably_dead_are_removed
    writer is dead; its folder with it, if it holds nothing else.
R7  Cleaning up never keeps a run from starting.                  test_failure_to_clean_up_is_logged_and_nothing_else

Longer than the house's 300 lines: a sixth of it is this page, which should stand next to what it describes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nitrous_ema._base.temporary_files import writer_state
from nitrous_ema.errors import SnapshotError
from nitrous_ema.snapshots.commit import Committer
from nitrous_ema.snapshots.disk_space import remedy
from nitrous_ema.snapshots.filesystem import rename_to_new, sync_folder
from nitrous_ema.snapshots.names import folder_name, hidden_name, parse_folder_name, parse_hidden_name
from nitrous_ema.snapshots.snapshot import Snapshot, TemporaryFile

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 600.0  # for readers of what was hidden before a run starts
_IN_USE = frozenset((errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY))  # NFS keeps what is open under a name of its own


class SnapshotRemover:
    """The calls of ``SnapshotStore`` that take something out of its folder; what they promise stands there.

    Args:
        committer: Whose folder it is, and who writes notes there.
    """

    def __init__(self, committer: Committer) -> None:
        self.root = committer.root
        self.files = committer.files
        self._committer = committer

    # Pins

    def pin(self, step: int, run: str, is_there: Callable[[], bool]) -> bool:
        """Leave the note, then look; a hidden snapshot is brought back. False, and no new note, if there is none."""
        note = self._pin(step, run)
        is_new = not self.files.exists(note)
        self._committer.write_note(note)
        hidden = self.root / hidden_name(folder_name(step, run))
        if is_there() or self._bring_back(hidden) or is_there():  # the last one: somebody else has brought it back
            return True
        if is_new:
            self.unpin(step, run)
        return False

    def unpin(self, step: int, run: str) -> None:
        """Remove the note, durably."""
        note = self._pin(step, run)
        try:
            with contextlib.suppress(FileNotFoundError):
                self.files.unlink(note)
            sync_folder(self.files, self.root)
        except OSError as error:
            raise _failed(note, f"{note} could not be removed", error) from error

    def pins(self, names: Iterable[str]) -> frozenset[tuple[int, str]]:
        """Step and run of the notes among these names."""
        known = (parse_folder_name(f"step-{name[4:]}") for name in names if name.startswith("pin-"))
        return frozenset(filter(None, known))

    def _pin(self, step: int, run: str) -> Path:
        folder = folder_name(step, run)
        if parse_folder_name(folder) is None:
            raise ValueError(f"step {step!r} and run {run!r}: no snapshot can have these. Take them from a listing.")
        return self.root / folder.replace("step-", "pin-", 1)

    # Hiding

    def hide(self, snapshots: Iterable[Snapshot], newest: Snapshot | None) -> int:
        """Rename the folders of snapshots, then make that durable. Returns the bytes of those renamed here."""
        chosen = list(snapshots)
        for snapshot in chosen:
            self._refuse_what_stays(snapshot, newest)
        hidden = 0
        try:
            for snapshot in chosen:
                self._refuse_what_stays(snapshot, newest)  # somebody may have pinned it meanwhile
                hidden += self._hide_folder(snapshot)
        finally:
            if chosen:
                self._sync_root("Hidden snapshots may come back if the machine stops")
        return hidden

    def _refuse_what_stays(self, snapshot: Snapshot, newest: Snapshot | None) -> None:
        path = self.root / folder_name(snapshot.step, snapshot.run)
        if newest is not None and (newest.step, newest.run) == (snapshot.step, snapshot.run):
            raise SnapshotError(f"{path} is the newest snapshot of its folder, and that one always stays.", path=path)
        if self.files.exists(self._pin(snapshot.step, snapshot.run)):
            raise SnapshotError(f"{path} is pinned. Take the pin away with unpin() before it is dropped.", path=path)

    def _hide_folder(self, snapshot: Snapshot) -> int:
        folder = self.root / folder_name(snapshot.step, snapshot.run)
        hidden = folder.with_name(hidden_name(folder.name))
        try:
            rename_to_new(self.files, folder, hidden)
        except OSError as error:
            if not self.files.exists(folder):
                return 0  # somebody else has hidden it
            raise _failed(folder, f"{folder} could not be hidden", error) from error
        return snapshot.bytes

    # Removing

    def hidden(self) -> list[Path]:
        """Folders of hidden snapshots, by name."""
        try:
            names = self.files.list(self.root)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise SnapshotError(f"{self.root} cannot be listed: {error}", path=self.root) from error
        return [self.root / name for name in sorted(names) if parse_hidden_name(name)]

    def remove_hidden(self, older_than_seconds: float = 0.0) -> int:
        """Bring back what is pinned, make names durable, unlink the rest. Returns the bytes unlinked here."""
        going = []
        for folder in self.hidden():
            if _is_claimed(folder):  # by somebody who died, or who does the same at this moment
                going.append(folder)
            elif self._is_pinned(folder):
                self._bring_back(folder)
            elif self._is_older(folder, older_than_seconds) and (claimed := self._claim(folder)):
                going.append(claimed)
        if not going:
            return 0
        self._sync_root("Nothing was removed")
        freed, failure = 0, None
        for folder in going:
            try:
                freed += self._remove(folder)
            except OSError as error:
                failure = failure or _failed(folder, f"{folder} could not be removed", error)
        if failure is not None:
            raise failure
        return freed

    def _is_pinned(self, hidden: Path) -> bool:
        return self.files.exists(self._pin(*_step_and_run(hidden)))

    def _bring_back(self, hidden: Path) -> bool:
        folder = self.root / folder_name(*_step_and_run(hidden))
        try:
            rename_to_new(self.files, hidden, folder)
            sync_folder(self.files, self.root)
        except FileNotFoundError:  # somebody else was faster
            return False
        except OSError as error:
            _log.warning("%s is pinned and could not be brought back: %s", hidden, error)
            return False
        _log.info("brought back %s, which is pinned", folder)
        return True

    def _claim(self, hidden: Path) -> Path | None:
        """Give it the name of what is being unlinked; None if somebody else has renamed it."""
        claimed = hidden.with_name(f"{hidden.name}.{secrets.token_hex(4)}")
        try:
            rename_to_new(self.files, hidden, claimed)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed(hidden, f"{hidden} could not be removed", error) from error
        return claimed

    def _is_older(self, path: Path, seconds: float) -> bool:
        """Whether nothing has happened to it for so long. Renaming a folder counts on the file systems that we know."""
        try:
            return seconds <= 0 or self._untouched_seconds(path) >= seconds
        except OSError:
            return False

    def _untouched_seconds(self, path: Path) -> float:
        return time.time() - self.files.lstat(path).st_ctime

    def _remove(self, folder: Path) -> int:
        """Unlink what is in a hidden folder, then the folder; returns the bytes of the files."""
        freed = 0
        with contextlib.suppress(FileNotFoundError):  # somebody else does the same
            if not stat.S_ISDIR(self.files.lstat(folder).st_mode):
                self.files.unlink(folder)  # a link; what it leads to is not ours
                return 0
            for name in self.files.list(folder):
                freed += self._unlink(folder / name)
            self._remove_folder(folder)
        return freed

    def _unlink(self, path: Path) -> int:
        try:
            size_bytes = self.files.lstat(path).st_size
            self.files.unlink(path)
        except FileNotFoundError:
            return 0
        except OSError as error:
            if error.errno in _IN_USE:
                return 0
            raise
        return size_bytes

    def _remove_folder(self, folder: Path) -> None:
        try:
            self.files.remove_folder(folder)
        except OSError as error:
            if error.errno not in _IN_USE and not isinstance(error, FileNotFoundError):
                raise

    def _sync_root(self, otherwise: str) -> None:
        try:
            sync_folder(self.files, self.root)
        except OSError as error:
            raise _failed(self.root, f"{otherwise}: the names in {self.root} are not durable", error) from error

    # What dead processes left

    def temporary(self) -> list[TemporaryFile]:
        """Files under temporary names, with what became of their writers."""
        found = []
        for folder in self._folders():
            for name in sorted(self._names(folder)):
                if name.startswith((".rank-", ".probe")):
                    with contextlib.suppress(FileNotFoundError):
                        found.append(self._temporary(folder / name))
        return found

    def clean_up(self) -> None:
        """Remove the temporary files of the dead, and what was hidden long ago. What goes wrong is logged."""
        with self._only_logged():
            for temporary in self.temporary():
                if temporary.writer == "gone":
                    with self._only_logged():
                        self._unlink(temporary.path)
                        _log.info("removed %s, left by a process that died", temporary.path)
                        if temporary.path.parent != self.root:
                            self._remove_folder(temporary.path.parent)
        with self._only_logged():
            self.remove_hidden(_GRACE_SECONDS)

    @contextlib.contextmanager
    def _only_logged(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SnapshotError) as error:
            _log.warning("%s could not be cleaned up: %s", self.root, error)

    def _temporary(self, path: Path) -> TemporaryFile:
        status = self.files.lstat(path)
        untouched_seconds = time.time() - status.st_ctime
        writer = writer_state(path.name, untouched_seconds=untouched_seconds)
        return TemporaryFile(path, status.st_size, writer)

    def _folders(self) -> list[Path]:
        """ROOT, and the snapshots' folders in it."""
        return [self.root, *(self.root / name for name in sorted(self._names(self.root)) if parse_folder_name(name))]

    def _names(self, folder: Path) -> list[str]:
        try:
            return self.files.list(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []


def _step_and_run(hidden: Path) -> tuple[int, str]:
    known = parse_hidden_name(hidden.name)
    if known is None:
        raise RuntimeError(f"{hidden} is no hidden snapshot. This is a bug in nitrous_ema, please report it.")
    return known


def _is_claimed(hidden: Path) -> bool:
    return hidden.name != hidden_name(folder_name(*_step_and_run(hidden)))


def _failed(path: Path, what: str, error: OSError) -> SnapshotError:
    failure = SnapshotError(f"{what}: {error}. {remedy(error)}", path=path)
    failure.__cause__ = error
    return failure
