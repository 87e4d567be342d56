"""Follow a training run: synthesize at each snapshot as it is committed, until training has ended.

The follower polls the snapshot folder, because the trainer may run on another machine and does not know about it. It
follows one lineage: that of the requested run, or of the newest run when the first snapshot is found. A later run whose
lineage contains the followed run takes its place. An unrelated later run is logged once and ignored. The invariants
make polling cheap, and make sure that no snapshot that was committed before the end is missed.

FOLLOW-1  Whether training has ended is checked before the folder is listed, so a snapshot that was committed before the
    end is listed.                           test_snapshot_committed_and_run_closed_while_another_is_synthesized
FOLLOW-2  Unchanged files are not read again: between changes, names are listed and no file is opened.
                                             test_nothing_is_opened_while_nothing_changes
FOLLOW-3  Names are listed before the lineage, so a commit between the two changes the names of the next poll.
                                             test_snapshot_committed_during_a_poll_is_synthesized_at_the_next
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from nitrous_ema.errors import SnapshotNotFound
from nitrous_ema.snapshots.filesystem import repeated
from nitrous_ema.snapshots.names import is_one_pass_name, parse_folder_name, parse_rank_file_name
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.wrong_folder import right_folder
from nitrous_ema.synthesis.worker.inputs import StoredSnapshots
from nitrous_ema.synthesis.worker.reporting import log, log_warning

# Retention may drop a snapshot between its listing and its reading. After three failures in a row the error is raised
# instead of trying forever.
_ATTEMPTS = 3


@dataclass(kw_only=True)
class RunFollower:
    """Follows one lineage and synthesizes at its snapshots.

    Args:
        snapshots: The folder; only the follower lists it while it runs.
        steps: Target steps; "all" includes every snapshot that exists already, None the newest of them and all later
            ones.
        synthesize: Called with each target snapshot, ascending by step.
        idle_seconds: End after this time without a new snapshot; None waits without a limit.
        look_every_seconds: Time between two polls.
        wait: Waits for a number of seconds; tests replace it.
        clock: Returns seconds; tests replace it.
    """

    snapshots: StoredSnapshots
    steps: Sequence[int | str] | Literal["all"] | None
    synthesize: Callable[[Snapshot], None]
    idle_seconds: float | None = None
    look_every_seconds: float = 2.0
    wait: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _done: set[tuple[str, int]] = field(default_factory=set)
    """Run and step of the snapshots that need no more work."""
    _names: frozenset[str] = frozenset()
    """Names in the folder at the last listing of the lineage."""
    _unrelated: set[str] = field(default_factory=set)
    """Runs that do not continue the followed run; each is logged once."""
    _failures: int = 0
    """Snapshots in a row that were dropped before they were read."""

    def follow(self) -> None:
        """Synthesize until training has ended, or until all listed steps are done.

        Raises:
            SnapshotNotFound: Training ended without a snapshot, or without a snapshot of a listed step.
            NitrousError: As ``synthesize``; also a damaged snapshot that is not excluded.
        """
        last_news = self.clock()
        store = self.snapshots.store
        missing = "" if store.files.exists(store.root) else " (the folder does not exist yet)"
        log(f"waiting for snapshots in {store.root}{missing}")
        if hint := right_folder(store.files, store.root):
            log(hint)
        while True:
            end = self._why_ended(last_news)  # before the poll: FOLLOW-1
            # A poll that found work is repeated even after the end: more may have been committed during the work.
            if self._poll():
                last_news = self.clock()
            elif end is None and not self._has_all():
                self.wait(self.look_every_seconds)
            else:
                break
        log(f"stopped following: {end or 'all requested steps are done'}")
        self._check_complete(end)

    def _why_ended(self, last_news: float) -> str | None:
        """Return why no more snapshots are expected; None while more are expected."""
        listed = self.snapshots.listed
        if self.snapshots.is_closed:
            return f"run {self.snapshots.lineage[-1][0]} is closed"
        if listed and listed[-1].trainer_state() == "gone":
            return f"the trainer (process {listed[-1].stamp.trainer['pid']} of this machine) has ended"
        if self.idle_seconds is not None and self.clock() - last_news >= self.idle_seconds:
            return f"no new snapshot for {self.idle_seconds:g} seconds (--idle)"
        return None

    def _poll(self) -> bool:
        """Synthesize at new snapshots. Return False if there is no new one, and none has to be tried again."""
        names = self._list_names()  # before the lineage: FOLLOW-3
        if self._without_listed(names) == self._without_listed(self._names):
            return False
        self._names = names
        self._list_lineage()
        due = self._due()
        for target in due:
            try:
                self.synthesize(target)
            except SnapshotNotFound as error:  # retention dropped it, or a snapshot that it needs
                self._failures += 1
                if self._failures == _ATTEMPTS:
                    raise
                log(f"{error} Listing the folder again.")
                self._names = frozenset()  # the next poll sees a change, and plans with the snapshots that remain
                return True
            self._failures = 0
            self._done.add((target.run, target.step))
        return bool(due)

    def _list_lineage(self) -> None:
        """List the followed lineage again, or that of a run which continues it."""
        snapshots = self.snapshots
        followed = snapshots.lineage[-1][0] if snapshots.lineage else None
        with suppress(SnapshotNotFound):  # the folder does not exist yet, or no snapshot in it is complete
            if followed is None:
                snapshots.refresh()
                self._begin()
                return
            if snapshots.requested_run is None:
                followed = self._find_continuation(followed)
            snapshots.refresh(followed)

    def _begin(self) -> None:
        """Mark the existing snapshots that need no work, at the first listing that found any."""
        listed = self.snapshots.listed
        if not listed:
            return
        if self.steps is None:
            self._done.update((each.run, each.step) for each in listed[:-1])
        if note := self.snapshots.legacy_note():
            log_warning(note)
        log(f"following run {self.snapshots.lineage[-1][0]} from step {listed[-1].step} on")

    def _find_continuation(self, followed: str) -> str:
        """Return the newest run whose lineage contains the followed run; the followed run if there is no such run."""
        runs = {known[1] for name in self._names if "/" not in name and (known := parse_folder_name(name))}
        for run in sorted(runs - self._unrelated, reverse=True):
            if run <= followed:  # run ids sort by their start, and only a later run can continue this one
                break
            with suppress(SnapshotNotFound):  # the run has no complete snapshot yet
                lineage = max((each.stamp.lineage for each in self.snapshots.store.snapshots(run)), key=len)
                if followed in dict(lineage):
                    log(f"run {run} continues run {followed}; following run {run}")
                    return run
                self._unrelated.add(run)
                log(f"run {run} does not continue run {followed}; ignoring run {run}")
        return followed

    def _due(self) -> list[Snapshot]:
        """Return the listed snapshots at which averages are requested and not done, ascending by step."""
        steps = self._listed_steps
        return [
            each
            for each in self.snapshots.listed
            if (each.run, each.step) not in self._done and (steps is None or each.step in steps)
        ]

    def _list_names(self) -> frozenset[str]:
        """Return the names in the folder, and those of the rank files in folders that are not listed yet."""
        files, root = self.snapshots.store.files, self.snapshots.store.root
        names: set[str] = set()
        with suppress(SnapshotNotFound):
            names.update(self.snapshots.store.names())
        listed = {each.paths[0].parent.name for each in self.snapshots.listed}
        # A snapshot is committed by the name of its file, so the names of folders alone would not show the commit.
        for name in [name for name in names if name not in listed and parse_folder_name(name)]:
            with suppress(OSError):  # it was removed, or is a bad one: another user's, or a link to itself
                inside = repeated(partial(files.list, root / name), files.wait)
                names.update(self._committed_names(name, inside))
        return frozenset(names)

    def _committed_names(self, folder: str, inside: Sequence[str]) -> list[str]:
        """Return what changes in a folder when a snapshot is committed."""
        store = self.snapshots.store
        found = [f"{folder}/{file}" for file in inside if parse_rank_file_name(file)]
        for file in inside:
            if is_one_pass_name(file):  # committed by its size
                found.append(f"{folder}/{file} {store.files.lstat(store.root / folder / file).st_size}")
        return found

    def _without_listed(self, names: frozenset[str]) -> set[str]:
        """Return the names without the files of listed snapshots, which ``_list_names`` leaves out as well."""
        listed = {each.paths[0].parent.name for each in self.snapshots.listed}
        return {name for name in names if name.partition("/")[0] not in listed or "/" not in name}

    @property
    def _listed_steps(self) -> Sequence[int] | None:
        """The target steps if they were listed one by one; None otherwise."""
        # A text among them, such as nearest:1234, is refused before.
        return None if isinstance(self.steps, str) or self.steps is None else [int(step) for step in self.steps]

    def _has_all(self) -> bool:
        return self._listed_steps is not None and not self._missing_steps()

    def _missing_steps(self) -> list[int]:
        """Return the listed target steps that are not done, ascending."""
        return sorted({*(self._listed_steps or ())}.difference(step for _, step in self._done))

    def _check_complete(self, end: str | None) -> None:
        root = self.snapshots.store.root
        if not self.snapshots.listed:
            raise SnapshotNotFound(f"{root}: no snapshot was found; {end}.", path=root, nearest=())
        if missing := self._missing_steps():
            raise SnapshotNotFound(
                f"{root}: no snapshot of step {', '.join(map(str, missing))} was found; {end}.",
                path=root,
                nearest=(),
            )
