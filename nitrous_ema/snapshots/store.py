"""The folder of snapshots: what is in it, and which of it belongs together.

What a reader finds at each moment of a write stands in ``commit``, what one of a removal in ``retire``; what a single
folder holds is the matter of ``examine``.

S5  Readers only read: no call of theirs creates or changes a name.  test_reading_changes_nothing_on_disk

Longer than the house's 300 lines: what counts as a snapshot, and what belongs together, is one rule.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotMismatch, SnapshotNotFound
from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.snapshots.commit import Committer
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.header import Lineage, Stamp
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.names import folder_name, parse_folder_name, parse_old_file_name, parse_rank_file_name
from nitrous_ema.snapshots.removal import SnapshotRemover
from nitrous_ema.snapshots.snapshot import Incomplete, Listing, Snapshot, TemporaryFile, VerificationFailure
from nitrous_ema.snapshots.validation import FolderGone, FolderInspector

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_Folders = dict[str, dict[int, Path]]  # by run and step
_Answer = TypeVar("_Answer")


class SnapshotStore:
    """A folder of snapshots. Making one of these touches nothing; only a writer's calls change the folder.

    Args:
        root: The folder.
        files: The file system; tests put a recording or a failing one here.
    """

    def __init__(self, root: str | os.PathLike[str], *, files: FileSystem | None = None) -> None:
        self.root = Path(root).absolute()  # stays the same folder when the process changes its own
        self.files = files or FileSystem()
        self._examiner = FolderInspector(self.files)
        self._committer = Committer(self.root, self.files, make_room=lambda: self.remove_hidden())
        self._retirer = SnapshotRemover(self._committer)

    # Reading

    def runs(self) -> list[str]:
        """Runs that own a committed snapshot, oldest first; damaged ones count, since they were committed."""
        return self._ask(lambda folders: [run for run in sorted(folders) if self._owned(folders[run]) is not None])

    def snapshots(self, run: str | None = None, *, exclude: Collection[int] = ()) -> list[Snapshot]:
        """Committed snapshots of one training history, ascending by step.

        That is: those of ``run``, and those of its ancestors up to the step at which each was left. Abandoned
        futures and unrelated runs are left out, incomplete snapshots are passed over.

        Args:
            run: The last run of the history; by default the newest run that owns a snapshot.
            exclude: Steps to leave out, damaged or not.

        Returns:
            The snapshots; an empty list if the folder has none.

        Raises:
            SnapshotNotFound: No such folder, or ``run`` owns no snapshot.
            SnapshotDamaged: One of them has a wrong size or header. Its data is not read here.
            SnapshotMismatch: One of them tells another history.
        """

        def listed(folders: _Folders) -> list[Snapshot]:
            lineage = self._lineage(run, folders, exclude)
            found: dict[int, Snapshot] = {}
            for step, folder in _members(lineage, folders):
                if step not in found and step not in exclude and (snapshot := self._committed(folder, lineage)):
                    found[step] = snapshot
            return [found[step] for step in sorted(found)]

        return self._ask(listed)

    def get(self, step: int | None = None, run: str | None = None, *, exclude: Collection[int] = ()) -> Snapshot:
        """One committed snapshot of a training history, as ``snapshots`` defines it.

        Args:
            step: Its step; by default the last one.
            run: The last run of the history; by default the newest run that owns a snapshot.
            exclude: Steps to leave out.

        Raises:
            SnapshotNotFound: No such folder, run or step; names the runs or the nearest steps that are there.
            SnapshotDamaged: This snapshot has a wrong size or header. Its data is not read here.
            SnapshotMismatch: It tells another history.
        """
        return self._ask(lambda folders: self._get(step, run, exclude, folders))

    def _get(self, step: int | None, run: str | None, exclude: Collection[int], folders: _Folders) -> Snapshot:
        lineage = self._lineage(run, folders, exclude)
        members = [member for member in _members(lineage, folders) if member[0] not in exclude]
        # Stable: of several snapshots of one step the youngest run's comes first.
        for _, folder in sorted((m for m in members if step in (None, m[0])), key=lambda member: -member[0]):
            if snapshot := self._committed(folder, lineage):
                return snapshot
        nearest = self._nearest(step, members)
        if step is None:
            what = "holds no snapshot to read" + ("" if folders else self._old_files())
        else:
            elsewhere = [other for other in sorted(folders) if step in folders[other] and other not in dict(lineage)]
            there = f"; run {', '.join(elsewhere)} has that step (choose with run=)" if elsewhere else ""
            steps = " and ".join(map(str, nearest)) if nearest else "none"
            of_run = f" of run {lineage[-1][0]}" if lineage else ""
            what = f"has no snapshot of step {step}{of_run}; nearest steps there: {steps}{there}"
        left_out = f". Left out by exclude: {sorted(exclude)}" if exclude else ""
        raise SnapshotNotFound(f"{self.root} {what}{left_out}.", path=self.root, nearest=nearest)

    def _old_files(self) -> str:
        """What else the folder holds, if that is what was meant."""
        if not any(parse_old_file_name(name) for name in self.files.list(self.root)):
            return ""
        return (
            ", but {profile}.{step}.pt files of nitrous-ema 0.0.1 or ema-pytorch. Name the profiles that they track: "
            "--sigma-rels or --gammas on the command line, nitrous_ema.LegacyFolder in Python; or rewrite "
            "them with nitrous-ema import"
        )

    def examine(self, run: str | None = None) -> Listing:
        """The same for tools: what cannot be believed is listed too, and raises nothing.

        Args:
            run: The last run of the history; by default the newest run that owns a snapshot, be it a damaged one.

        Raises:
            SnapshotNotFound: No such folder, or ``run`` owns no snapshot.
        """
        return self._ask(lambda folders: self._list(run, folders))

    def _list(self, run: str | None, folders: _Folders) -> Listing:
        try:
            lineage = self._lineage(run, folders, ())
        except SnapshotDamaged as error:  # and it has no other
            known = parse_folder_name(error.path.parent.name)
            lineage = ((known[1], None),) if known else ()
        found: dict[int, Snapshot] = {}
        damaged: dict[int, SnapshotDamaged | SnapshotMismatch] = {}
        for step, folder in _members(lineage, folders):
            if step in found or step in damaged:
                continue
            try:
                if snapshot := self._committed(folder, lineage):
                    found[step] = snapshot
            except (SnapshotDamaged, SnapshotMismatch) as error:
                damaged[step] = error
        return Listing(
            lineage=lineage,
            snapshots=tuple(found[step] for step in sorted(found)),
            damaged=tuple(damaged[step] for step in sorted(damaged)),
        )

    def unrelated_runs(self, run: str | None = None) -> list[str]:
        """Runs that own a snapshot but have no part in the history of ``run`` (default: the newest), oldest first."""
        related = dict(self._ask(lambda folders: self._lineage(run, folders, ())))
        return [other for other in self.runs() if other not in related]

    def incomplete(self) -> list[Incomplete]:
        """Folders of all runs that hold no snapshot (yet), by step, with the reason."""
        return self._ask(
            lambda folders: [
                examined
                for folder in _all(folders)
                if isinstance(examined := self._examiner.examine(folder), Incomplete)
            ]
        )

    def verify(self) -> list[VerificationFailure]:
        """Read every byte under a final name, also of runs and snapshots that a listing leaves out.

        Returns:
            What is wrong: one problem for a file that cannot be read or whose header is wrong, else one for each chunk
            whose checksum is wrong. Empty if all is well.

        Raises:
            SnapshotNotFound: No such folder.
        """
        problems: list[VerificationFailure] = []
        for folder in _all(self._folders()):
            for name in sorted(self._examiner.names(folder)[0]):
                if parse_rank_file_name(name):
                    problems += self._examiner.verify_file(folder / name)
        return problems

    # Writing

    def prepare(self) -> None:
        """Create the folder with its parents, durably, and prove that files can be written there.

        Before that it cleans up, as far as it can: temporary files of processes that are provably dead are removed, and
        what was hidden more than ten minutes ago.

        Raises:
            SnapshotError: It cannot be done; says why, and what to do.
        """
        self._retirer.clean_up()  # first: the disk may be full of it
        self._committer.prepare()

    def write(self, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]) -> Snapshot:
        """Write one rank's file and return when it is durable under its final name. Blocks; safe from any thread.

        Args:
            layout: Where everything lies in the data.
            stamp: What is particular to this snapshot.
            chunks: Called to get the data: C-contiguous buffers, each one of ``layout.chunks`` or a part of it, in
                order. Called a second time, for the same data, if the first attempt fails.

        Returns:
            The snapshot, with the file of this rank only.

        Raises:
            SnapshotWriteError: Two attempts failed, or the name is taken; the cause is chained. No file was left under
                a temporary name, as far as the disk allowed.
            RuntimeError: ``chunks`` does not give what the layout says (our bug).
        """
        return self._committer.write(layout, stamp, chunks)

    def close_run(self, run: str) -> None:
        """Note durably that this run writes no more snapshots. Doing it again changes nothing.

        Raises:
            SnapshotError: The note could not be written.
        """
        self._committer.close_run(run)

    def free_bytes(self) -> int | None:
        """Bytes that may still be written to the disk of the folder; None where that is not told, or there is none."""
        return self._committer.space.free_bytes()

    # What leaves the folder

    def pin(self, step: int, run: str, *, must_exist: bool = True) -> None:
        """Leave a durable note that a snapshot must stay. Doing it again changes nothing.

        A hidden snapshot comes back, if nobody has begun to remove it.

        Args:
            step: Its step.
            run: The run that wrote it.
            must_exist: False for one that is still being written.

        Raises:
            SnapshotNotFound: There is no such snapshot (any more), and no note was left.
            SnapshotError: The note could not be written.
        """

        def is_there() -> bool:
            return not must_exist or not isinstance(
                self._examiner.examine_anew(self.root / folder_name(step, run)), Incomplete
            )

        if not self._retirer.pin(step, run, is_there):
            nearest = self._ask(lambda folders: self._nearest(step, sorted(folders.get(run, {}).items())))
            there = " and ".join(map(str, nearest)) or "none"
            raise SnapshotNotFound(
                f"{self.root} has no snapshot of step {step} of run {run} to pin; nearest steps there: {there}.",
                path=self.root,
                nearest=nearest,
            )

    def unpin(self, step: int, run: str) -> None:
        """Remove that note, durably; nothing happens if there is none.

        Raises:
            SnapshotError: The note could not be removed.
        """
        self._retirer.unpin(step, run)

    def pins(self) -> frozenset[tuple[int, str]]:
        """Step and run of all notes."""
        return self._retirer.pins(self._root_names())

    def hide(self, snapshots: Iterable[Snapshot]) -> int:
        """Have snapshots listed no more; their bytes stay until ``remove_hidden``. One that is gone is passed over.

        Args:
            snapshots: Of this folder; all ranks of each go at once.

        Returns:
            Bytes hidden by this call.

        Raises:
            SnapshotError: One of them is pinned, or the newest of the folder (nothing was hidden then, unless it was
                pinned just now); or the system refuses.
        """
        chosen = tuple(snapshots)
        newest = None
        with contextlib.suppress(SnapshotError):  # a damaged newest one cannot be asked to be hidden
            newest = self.get() if chosen else None
        return self._retirer.hide(chosen, newest)

    def hidden(self) -> list[Path]:
        """Folders of hidden snapshots, by name; removal of some may have begun."""
        return self._retirer.hidden()

    def remove_hidden(self, *, older_than_seconds: float = 0.0) -> int:
        """Unlink what was hidden; of several processes that do this each does a part. A pinned one is brought back.

        Args:
            older_than_seconds: Leave alone what was hidden later than that ago: somebody may be reading it.

        Returns:
            Bytes freed by this call.

        Raises:
            SnapshotError: The system refuses. What could be removed was.
        """
        return self._retirer.remove_hidden(older_than_seconds)

    def temporary(self) -> list[TemporaryFile]:
        """Files that are being written, or that processes left when they died."""
        return self._retirer.temporary()

    # Looking at folders

    def _ask(self, question: Callable[[_Folders], _Answer]) -> _Answer:
        """The answer to a question about the folders, asked again when one of them is removed meanwhile."""
        gone: set[Path] = set()
        while True:
            folders = self._folders()
            for steps in folders.values():
                for step in [step for step, folder in steps.items() if folder in gone]:
                    del steps[step]
            try:
                return question(folders)
            except FolderGone as error:
                gone.add(error.folder)

    def _root_names(self) -> list[str]:
        try:
            return self.files.list(self.root)
        except (FileNotFoundError, NotADirectoryError) as error:
            message = f"{self.root} is not a folder of snapshots: {error.strerror}. Check the path."
            raise SnapshotNotFound(message, path=self.root, nearest=()) from error
        except OSError as error:
            raise SnapshotError(f"{self.root} cannot be listed: {error}", path=self.root) from error

    def _folders(self) -> _Folders:
        """Folders with a snapshot's name, by run and step."""
        folders: _Folders = {}
        for name in self._root_names():
            if parsed := parse_folder_name(name):
                step, run = parsed
                folders.setdefault(run, {})[step] = self.root / name
        return folders

    def _committed(self, folder: Path, lineage: Lineage) -> Snapshot | None:
        examined = self._examiner.examine(folder)
        if isinstance(examined, SnapshotDamaged):
            raise examined
        if isinstance(examined, Incomplete):
            return None
        runs = [run for run, _ in lineage]
        if examined.stamp.lineage[:-1] != lineage[: runs.index(examined.run)]:
            raise SnapshotMismatch(
                f"{folder} has the lineage {brief(str(examined.stamp.lineage))}, but run {runs[-1]} has "
                f"{brief(str(lineage))}. "
                f"Leave it out with exclude=[{examined.step}].",
                path=folder,
                step=examined.step,
            )
        return examined

    def _owned(self, steps: dict[int, Path]) -> Snapshot | SnapshotDamaged | None:
        """The last committed snapshot of one run; a damaged one if it has no other."""
        damage = None
        for step in sorted(steps, reverse=True):
            examined = self._examiner.examine(steps[step])
            if isinstance(examined, Snapshot):
                return examined
            if isinstance(examined, SnapshotDamaged):
                damage = damage or examined
        return damage

    def _lineage(self, run: str | None, folders: _Folders, exclude: Collection[int]) -> Lineage:
        """History of a run as its snapshots tell it; empty if ``run`` is None and the folder has no snapshot."""
        for candidate in sorted(folders, reverse=True) if run is None else [run]:
            owned = self._owned(folders.get(candidate, {}))
            if isinstance(owned, Snapshot):
                return owned.stamp.lineage
            if owned is not None and owned.step in exclude:
                raise SnapshotNotFound(
                    f"{self.root}: run {candidate} has damaged snapshots only, so its history is not known. "
                    f"Choose another run with run=: {', '.join(sorted(folders))}.",
                    path=self.root,
                    nearest=(),
                ) from owned
            if owned is not None:
                raise owned
        if run is None:
            return ()
        there = ", ".join(self.runs()) or "none"
        raise SnapshotNotFound(
            f"{self.root} has no snapshot of run {run}; runs there: {there}.", path=self.root, nearest=()
        )

    def _nearest(self, step: int | None, members: list[tuple[int, Path]]) -> tuple[int, ...]:
        """Committed steps next to ``step``: one before and one after, where there are any."""
        if step is None:
            return ()
        before = sorted((member for member in members if member[0] < step), reverse=True)
        after = sorted(member for member in members if member[0] > step)
        nearest = (
            next((near for near in side if isinstance(self._examiner.examine(near[1]), Snapshot)), None)
            for side in (before, after)
        )
        return tuple(near[0] for near in nearest if near)


def _all(folders: _Folders) -> list[Path]:
    return sorted(folder for steps in folders.values() for folder in steps.values())


def _members(lineage: Lineage, folders: _Folders) -> list[tuple[int, Path]]:
    """Steps and folders of a history, the youngest run first."""
    return [
        (step, folder)
        for run, left_at in reversed(lineage)
        for step, folder in sorted(folders.get(run, {}).items())
        if left_at is None or step <= left_at
    ]
