"""The folder of snapshots: which snapshots it holds, and which of them belong to one training history.

The tables in ``snapshots.commit`` and ``snapshots.removal`` list what a reader finds at each moment of a write and of a
removal. ``snapshots.validation`` decides whether a single folder holds a snapshot.

STORE-1  Readers only read: none of their calls creates or changes a name.  test_reading_changes_nothing_on_disk

Longer than 300 lines: which folders count as snapshots, and which snapshots belong together, is one rule.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nitrous_ema._base.arguments import nearest_to, pluralize
from nitrous_ema._base.paths import local_path
from nitrous_ema.errors import (
    SnapshotError,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotUnavailable,
    SnapshotUnreadable,
)
from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.snapshots.commit import Committer
from nitrous_ema.snapshots.disk_space import explained
from nitrous_ema.snapshots.filesystem import NO_FOLDER_FSYNC, FileSystem, repeated, sync_folder
from nitrous_ema.snapshots.header import Lineage, Stamp
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.names import (
    closed_note_name,
    exclusion_hint,
    folder_name,
    is_note_name,
    is_snapshot_file_name,
    listed_folders,
    parse_folder_name,
    parse_legacy_file_name,
)
from nitrous_ema.snapshots.removal import SnapshotRemover
from nitrous_ema.snapshots.sharded import compare_replicas
from nitrous_ema.snapshots.snapshot import Incomplete, Listing, Snapshot, TemporaryFile, VerificationFailure
from nitrous_ema.snapshots.validation import FolderGone, FolderInspector, RememberingInspector
from nitrous_ema.snapshots.wrong_folder import right_folder

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log = logging.getLogger(__name__)

_Folders = dict[str, dict[int, Path]]  # by run and step
_Result = TypeVar("_Result")


class SnapshotStore:
    """A folder of snapshots. Constructing a store touches nothing on disk; only a writer's methods change the folder.

    Args:
        root: The folder.
        files: The file system; tests pass a recording or a failing one.
    """

    def __init__(self, root: str | os.PathLike[str], *, files: FileSystem | None = None) -> None:
        self.root = local_path(
            "root", root
        ).absolute()  # the same folder after the process has changed its working directory
        self.files = files or FileSystem()
        self._inspector: FolderInspector = FolderInspector(self.files)
        self._committer = Committer(self.root, self.files, reclaim=lambda: self.remove_hidden())
        self._remover = SnapshotRemover(self._committer)

    def __repr__(self) -> str:
        return f"SnapshotStore({str(self.root)!r})"

    def remembering(self) -> SnapshotStore:
        """Return a store of the same folder that reads each header once, for one report on the folder.

        It does not notice later changes of a folder that it has read; new folders are found.
        """
        store = SnapshotStore(self.root, files=self.files)
        store._inspector = RememberingInspector(self.files)
        return store

    # Reading

    def runs(self) -> list[str]:
        """Return the runs that own a committed snapshot, oldest first; damaged snapshots count as committed."""
        return self._query(
            lambda folders: [run for run in sorted(folders) if self._last_committed(folders[run]) is not None]
        )

    def snapshots(self, run: str | None = None, *, exclude: Collection[int] = ()) -> list[Snapshot]:
        """Return the committed snapshots of one training history, ascending by step.

        The history holds the snapshots of ``run``, and those of its ancestors up to the step at which each was left.
        Abandoned futures and unrelated runs are left out; incomplete snapshots are skipped.

        Args:
            run: The last run of the history; by default the newest run that owns a snapshot which this user may read.
            exclude: Steps to leave out, damaged or not.

        Returns:
            The snapshots; an empty list if the folder has none.

        Raises:
            SnapshotNotFound: There is no such folder, or ``run`` owns no snapshot.
            SnapshotDamaged: A snapshot has a wrong size or header. Its data is not read here.
            SnapshotMismatch: A snapshot has another lineage than ``run``.
        """

        def listed(folders: _Folders) -> list[Snapshot]:
            lineage = self._lineage(run, folders, exclude)
            found: dict[int, Snapshot] = {}
            for step, folder in _members(lineage, folders):
                if step not in found and step not in exclude and (snapshot := self._committed(folder, lineage)):
                    found[step] = snapshot
            return [found[step] for step in sorted(found)]

        return self._query(listed)

    def get(self, step: int | str | None = None, run: str | None = None, *, exclude: Collection[int] = ()) -> Snapshot:
        """Return one committed snapshot of a training history, as ``snapshots`` defines it.

        Args:
            step: Step of the snapshot; by default the last step. ``"nearest:1234"`` is the step nearest to 1234.
            run: The last run of the history; by default the newest run that owns a snapshot which this user may read.
            exclude: Steps to leave out.

        Raises:
            SnapshotNotFound: There is no such folder, run or step; names the existing runs or the nearest steps.
            SnapshotDamaged: This snapshot has a wrong size or header. Its data is not read here.
            SnapshotMismatch: This snapshot has another lineage than ``run``.
        """
        return self._query(lambda folders: self._get(step, run, exclude, folders))

    def _get(self, step: int | str | None, run: str | None, exclude: Collection[int], folders: _Folders) -> Snapshot:
        lineage, near = self._lineage(run, folders, exclude), nearest_to(step)
        members = [member for member in _members(lineage, folders) if member[0] not in exclude]
        # The sort is stable: of several snapshots of one step, the youngest run's comes first.
        for _, folder in sorted(
            (member for member in members if near is not None or step in (None, member[0])),
            key=lambda member: (-member[0], 0) if near is None else (abs(member[0] - near), member[0]),
        ):
            if snapshot := self._committed(folder, lineage):
                return snapshot
        nearest = () if isinstance(step, str) else self._nearest(step, members)
        if step is None or isinstance(step, str):
            what = "holds no snapshot to read" + ("" if folders else self._legacy_hint() or self.location_hint())
        else:
            elsewhere = [other for other in sorted(folders) if step in folders[other] and other not in dict(lineage)]
            other_runs = f"; run {', '.join(elsewhere)} has that step (choose with run=, or --run)" if elsewhere else ""
            steps = f"{' and '.join(map(str, nearest))} (choose with step=, or --step)" if nearest else "none"
            of_run = f" of run {lineage[-1][0]}" if lineage else ""
            what = f"has no snapshot of step {step}{of_run}; nearest steps there: {steps}{other_runs}"
            what += "" if folders else self._legacy_hint() or self.location_hint()
        excluded = f". Excluded steps: {sorted(exclude)}" if exclude else ""
        raise SnapshotNotFound(f"{self.root} {what}{excluded}.", path=self.root, nearest=nearest)

    def _legacy_hint(self) -> str:
        """Return the end of a message for a folder that holds legacy files only; "" for any other folder."""
        if not any(parse_legacy_file_name(name) for name in self.names()):
            return ""
        return (
            ", but {profile}.{step}.pt files of nitrous-ema 0.0.1 or ema-pytorch. Name the profiles that they track: "
            "--tracked-sigma-rel or --tracked-gamma on the command line, nitrous_ema.LegacyFolder in Python; or "
            "rewrite them with nitrous-ema import"
        )

    def location_hint(self) -> str:
        """Return the end of a message for a folder without snapshots: which folder to give instead, or to check it."""
        return f". {right_folder(self.files, self.root) or 'Check the path.'}".removesuffix(".")

    def legacy_note(self) -> str:
        """Return a note on legacy files beside the snapshots, which no reader of the snapshots reads; "" without any.

        Raises:
            SnapshotNotFound: There is no such folder.
        """
        files = sum(parse_legacy_file_name(name) is not None for name in self.names())
        if not files:
            return ""
        return (
            f"{self.root} also holds {pluralize(files, 'file')} of nitrous-ema 0.0.1 or ema-pytorch "
            "({profile}.{step}.pt). They are not read together with the snapshots. LegacyFolder (on the command line: "
            "--tracked-sigma-rel or --tracked-gamma) reads them alone, and `nitrous-ema import` converts them into a "
            "folder of their own. Move them away if they are not needed."
        )

    def examine(self, run: str | None = None) -> Listing:
        """List one training history for tools: damaged snapshots are listed as well, and raise nothing.

        Args:
            run: The last run of the history; by default the newest run that owns a snapshot, damaged or not.

        Raises:
            SnapshotNotFound: There is no such folder, or ``run`` owns no snapshot.
        """
        return self._query(lambda folders: self._examine(run, folders))

    def _examine(self, run: str | None, folders: _Folders) -> Listing:
        try:
            lineage = self._lineage(run, folders, ())
        except SnapshotUnreadable as error:  # the run has unreadable snapshots only, so its ancestors are not known
            known = parse_folder_name(error.path.parent.name) or parse_folder_name(error.path.name)
            lineage = ((known[1], None),) if known else ()
        found: dict[int, Snapshot] = {}
        damaged: dict[int, SnapshotUnreadable | SnapshotMismatch] = {}
        for step, folder in _members(lineage, folders):
            if step in found or step in damaged:
                continue
            try:
                if snapshot := self._committed(folder, lineage):
                    found[step] = snapshot
            except (SnapshotUnreadable, SnapshotMismatch) as error:
                damaged[step] = error
        return Listing(
            lineage=lineage,
            snapshots=tuple(found[step] for step in sorted(found)),
            damaged=tuple(damaged[step] for step in sorted(damaged)),
        )

    def examine_runs(self) -> list[Listing]:
        """List every run with the snapshots that it wrote itself, oldest run first; else as ``examine``.

        The cost grows with the number of snapshots, and not with that of the runs that each run continues.
        """
        return self._query(
            lambda folders: [
                self._examine(run, {run: folders[run]})
                for run in sorted(folders)
                if self._last_committed(folders[run]) is not None
            ]
        )

    def unrelated_runs(self, run: str | None = None) -> list[str]:
        """Return the runs that own a snapshot outside the history of ``run`` (default: the newest), oldest first."""
        related = dict(self._query(lambda folders: self._lineage(run, folders, ())))
        return [other for other in self.runs() if other not in related]

    def incomplete(self) -> list[Incomplete]:
        """Return the folders of all runs that hold no whole snapshot (yet), by step, with the reason."""
        return self._query(
            lambda folders: [
                examined
                for folder in _all_folders(folders)
                if isinstance(examined := self._inspector.examine(folder), Incomplete)
            ]
        )

    def verify(self) -> list[VerificationFailure]:
        """Read and check every byte under a final name, also of runs and snapshots that a listing leaves out.

        Returns:
            The failures: one for a file that cannot be read or whose header is wrong, else one for each chunk whose
            checksum is wrong. For a snapshot of several ranks also where their files contradict each other. Empty if
            all files are whole.

        Raises:
            SnapshotNotFound: There is no such folder.
        """
        failures: list[VerificationFailure] = []
        for folder in _all_folders(self._folders()):
            try:
                names = self._inspector.names(folder)[0]
            except SnapshotUnreadable as error:
                failures.append(VerificationFailure(folder, error.step or 0, None, str(error)))
                continue
            for name in sorted(names):
                if is_snapshot_file_name(name):
                    failures += self._inspector.verify_file(folder / name)
            failures += self._verify_ranks(folder)
        return failures

    def _verify_ranks(self, folder: Path) -> Iterator[VerificationFailure]:
        """Compare the files of several ranks with one another."""
        with contextlib.suppress(FolderGone):
            examined = self._inspector.examine(folder)
            if isinstance(examined, Snapshot) and len(examined.paths) > 1:
                with contextlib.suppress(SnapshotUnreadable):  # each file was verified alone
                    for path, what in compare_replicas(examined, self.files):
                        yield VerificationFailure(path, examined.step, None, what)

    # Writing

    def prepare(self) -> None:
        """Create the folder with its parents, durably, and prove that files can be written there.

        First it removes temporary files of processes that are provably dead, and snapshots that were hidden more than
        ten minutes ago. A failure to remove any of them is logged.

        Raises:
            SnapshotError: The folder cannot be created or written to; names the reason and a remedy.
        """
        self._remover.clean_up()  # first, because these files may fill the disk
        self._committer.prepare()

    def write(self, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]) -> Snapshot:
        """Write one rank's file and return when it is durable under its final name. Blocks; safe from any thread.

        Args:
            layout: Positions of all tensors in the data.
            stamp: Step, time, run and rank of this snapshot.
            chunks: Called to get the data: C-contiguous buffers in order, each a chunk of ``layout.chunks`` or a part
                of a chunk. Called again, for the same data, if the first attempt fails, or to write in one pass.

        Returns:
            The snapshot, with the file of this rank only.

        Raises:
            SnapshotWriteError: Two attempts failed, or the name is taken; the cause is chained. Temporary files have
                been removed, as far as the disk allowed.
            RuntimeError: The buffers of ``chunks`` do not match the layout (a bug of this package).
        """
        return self._committer.write(layout, stamp, chunks)

    def close_run(self, run: str) -> None:
        """Record durably that this run writes no more snapshots. A second call changes nothing.

        Raises:
            SnapshotError: The note could not be written.
        """
        self._committer.close_run(run)

    def is_closed(self, run: str) -> bool:
        """Return whether ``close_run`` was called for a run."""
        return self.files.exists(self.root / closed_note_name(run))

    def notes(self) -> list[Path]:
        """Return the notes on runs that are closed, and on snapshots that are pinned or hidden, by name."""
        return [self.root / name for name in sorted(self.names()) if is_note_name(name)]

    def names(self) -> list[str]:
        """Return the names in the folder, in no particular order.

        Raises:
            SnapshotNotFound: There is no such folder.
            SnapshotError: The folder cannot be listed.
        """
        try:
            return repeated(functools.partial(self.files.list, self.root), self.files.wait)
        except (FileNotFoundError, NotADirectoryError) as error:
            message = f"{self.root} is not a folder of snapshots: {error.strerror}{self.location_hint()}."
            raise SnapshotNotFound(message, path=self.root, nearest=()) from error
        except OSError as error:
            raise SnapshotError(
                f"{self.root} cannot be listed: {explained(error, self.root)}", path=self.root
            ) from error

    def free_bytes(self) -> int | None:
        """Return the bytes that may still be written to the folder's disk.

        None if the file system does not report them, or if the folder does not exist.
        """
        return self._committer.space.free_bytes()

    def missing_operations(self) -> list[str]:
        """Return a sentence for each operation that the folder's file system lacks, as far as a reader can try them."""
        with contextlib.suppress(OSError):
            return [] if sync_folder(self.files, self.root) else [NO_FOLDER_FSYNC]
        return []

    # Pinning and removing

    def pin(self, step: int, run: str, *, must_exist: bool = True) -> None:
        """Write a durable note that protects a snapshot from being dropped. A second call changes nothing.

        A hidden snapshot is listed again, unless its removal has begun. Where folders cannot be renamed, hiding a
        snapshot is the beginning of its removal.

        Args:
            step: Step of the snapshot.
            run: The run that wrote it.
            must_exist: False for a snapshot that is still being written.

        Raises:
            SnapshotNotFound: The snapshot does not exist (any more), and no note was left.
            SnapshotError: The note could not be written.
        """

        def exists() -> bool:
            return not must_exist or not isinstance(
                self._inspector.examine_unlisted(self.root / folder_name(step, run)), Incomplete
            )

        if not self._remover.pin(step, run, exists):
            nearest = self._query(lambda folders: self._nearest(step, sorted(folders.get(run, {}).items())))
            steps = " and ".join(map(str, nearest)) or "none"
            raise SnapshotNotFound(
                f"{self.root} has no snapshot of step {step} of run {run} to pin; nearest steps there: {steps}.",
                path=self.root,
                nearest=nearest,
            )

    def unpin(self, step: int, run: str) -> None:
        """Remove the note of a pin, durably. Does nothing if the snapshot is not pinned.

        Raises:
            SnapshotError: The note could not be removed.
        """
        self._remover.unpin(step, run)

    def pins(self) -> frozenset[tuple[int, str]]:
        """Return step and run of all pinned snapshots."""
        return self._remover.pins(self.names())

    def hide(self, snapshots: Iterable[Snapshot]) -> int:
        """Hide snapshots from every listing, durably; their bytes stay on disk until ``remove_hidden``.

        A snapshot that is gone already is skipped.

        Args:
            snapshots: Snapshots of this folder. The files of all ranks of a snapshot are hidden at once.

        Returns:
            Bytes hidden by this call.

        Raises:
            SnapshotError: A snapshot is pinned, or is the newest of the folder. Then nothing was hidden, unless the pin
                was set during this call. Or a rename or an fsync failed.
        """
        chosen = tuple(snapshots)
        newest = None
        # A damaged newest snapshot is not listed, so it cannot be among ``chosen``.
        with contextlib.suppress(SnapshotError):
            newest = self.get() if chosen else None
        return self._remover.hide(chosen, newest)

    def hidden(self) -> list[Path]:
        """Return the folders of hidden snapshots, by name; the removal of some may have begun."""
        return self._remover.hidden()

    def remove_hidden(self, *, older_than_seconds: float = 0.0) -> int:
        """Unlink hidden snapshots; a pinned one is listed again instead. Several processes may do this at once.

        Args:
            older_than_seconds: Skip snapshots that were hidden more recently than this: readers may still read them.

        Returns:
            Bytes freed by this call.

        Raises:
            SnapshotError: The operating system refuses. All snapshots that could be removed were removed.
        """
        return self._remover.remove_hidden(older_than_seconds)

    def temporary(self) -> list[TemporaryFile]:
        """Return the files that are being written, and those that processes left when they died."""
        return self._remover.temporary()

    # Looking at folders

    def _query(self, query: Callable[[_Folders], _Result]) -> _Result:
        """Return the result of a query over the listed folders; run it again if one of them is removed meanwhile."""
        # A folder that is gone is left out from then on: each repetition has fewer folders, so the loop ends.
        gone: set[Path] = set()
        while True:
            folders = self._folders()
            for steps in folders.values():
                for step in [step for step, folder in steps.items() if folder in gone]:
                    del steps[step]
            try:
                return query(folders)
            except FolderGone as error:
                gone.add(error.folder)

    def _folders(self) -> _Folders:
        """Return the folders that have a snapshot's name and are not hidden, by run and step."""
        folders: _Folders = {}
        for step, run in listed_folders(self.names()):
            folders.setdefault(run, {})[step] = self.root / folder_name(step, run)
        return folders

    def _committed(self, folder: Path, lineage: Lineage) -> Snapshot | None:
        """Return the snapshot in a folder of this history; None if it is incomplete. Raises if it is damaged."""
        examined = self._inspector.examine(folder)
        if isinstance(examined, SnapshotUnreadable):
            raise examined
        if isinstance(examined, Incomplete):
            return None
        runs = [run for run, _ in lineage]
        if examined.stamp.lineage[:-1] != lineage[: runs.index(examined.run)]:
            raise SnapshotMismatch(
                f"{folder} has the lineage {brief(str(examined.stamp.lineage))}, but run {runs[-1]} has "
                f"{brief(str(lineage))}. {exclusion_hint(examined.step)}",
                path=folder,
                step=examined.step,
            )
        return examined

    def _last_committed(self, steps: dict[int, Path]) -> Snapshot | SnapshotUnreadable | None:
        """Return the last committed snapshot of one run; a damaged one only if it has no other."""
        damage = None
        for step in sorted(steps, reverse=True):
            examined = self._inspector.examine(steps[step])
            if isinstance(examined, Snapshot):
                return examined
            if isinstance(examined, SnapshotUnreadable):
                damage = damage or examined
        return damage

    def _lineage(self, run: str | None, folders: _Folders, exclude: Collection[int]) -> Lineage:
        """Return the lineage that a run's snapshots record; empty if the folder has no snapshot and no run is named."""
        # Run ids begin with the time at which a run began, so their order is that of the runs.
        forbidden: SnapshotUnavailable | None = None
        for candidate in sorted(folders, reverse=True) if run is None else [run]:
            last = self._last_committed(folders.get(candidate, {}))
            if run is None and isinstance(last, SnapshotUnavailable) and isinstance(last.__cause__, PermissionError):
                # Another user's run: it would be of no use as the default, and ``unrelated_runs`` returns it.
                _log.info("run %s is not the default, because this user may not read it: %s", candidate, last)
                forbidden = forbidden or last
                continue
            if isinstance(last, Snapshot):
                return last.stamp.lineage
            if last is not None and last.step in exclude:
                raise SnapshotNotFound(
                    f"{self.root}: run {candidate} has damaged snapshots only, so its lineage is not known. "
                    f"Choose another run with run=: {', '.join(sorted(folders))}.",
                    path=self.root,
                    nearest=(),
                ) from last
            # Damage in the newest run must not make an older run the default without notice.
            if last is not None:
                raise last
        if forbidden is not None:
            raise forbidden
        if run is None:
            return ()
        existing = f"{', '.join(runs)}. Choose one with run=." if (runs := self.runs()) else "none. Check the path."
        raise SnapshotNotFound(
            f"{self.root} has no snapshot of run {run}; runs there: {existing}", path=self.root, nearest=()
        )

    def _nearest(self, step: int | None, members: list[tuple[int, Path]]) -> tuple[int, ...]:
        """Return the committed steps next to ``step``: at most one before and one after."""
        if step is None:
            return ()
        before = sorted((member for member in members if member[0] < step), reverse=True)
        after = sorted(member for member in members if member[0] > step)
        nearest = (
            next((near for near in side if isinstance(self._inspector.examine(near[1]), Snapshot)), None)
            for side in (before, after)
        )
        return tuple(near[0] for near in nearest if near)


def _all_folders(folders: _Folders) -> list[Path]:
    return sorted(folder for steps in folders.values() for folder in steps.values())


def _members(lineage: Lineage, folders: _Folders) -> list[tuple[int, Path]]:
    """Return steps and folders of a history, the youngest run first."""
    return [
        (step, folder)
        for run, left_at in reversed(lineage)
        for step, folder in sorted(folders.get(run, {}).items())
        if left_at is None or step <= left_at
    ]
