"""Averages of a training that goes on: made as its snapshots are committed, until it has ended.

One history is followed: that of the newest run in the folder when its first snapshot is found, or of the one that was
asked for. A later run that continues it (its lineage says so) takes its place; an unrelated one does not, and is told.

W1  Whether training has ended is asked before the folder is looked at, so what was committed before its end is seen.
                                    test_snapshot_committed_and_run_closed_while_another_is_made
W2  What has not changed is not read again: between looks, names are listed and nothing is opened.
                                                  test_nothing_is_opened_while_nothing_changes
W3  A listing that raced with a commit differs from the next one, since it was taken of the names before.
                                                  test_snapshot_committed_during_a_look_is_made_at_the_next
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from nitrous_ema._base.processes import process_state
from nitrous_ema.errors import SnapshotNotFound
from nitrous_ema.snapshots.names import parse_folder_name, parse_rank_file_name
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.synthesis.worker.inputs import StoredSnapshots
from nitrous_ema.synthesis.worker.reporting import log

_ATTEMPTS = 3  # at reading snapshots that are removed meanwhile


@dataclass(kw_only=True)
class RunFollower:
    """Follows one history.

    Args:
        snapshots: The folder; only looked at from here.
        steps: Steps that are wanted; all, also those that are there already; or the newest and all that come.
        make: Called with each snapshot at which averages end, ascending by step.
        idle_seconds: End when nothing new has come for so long.
        look_every_seconds: Wait so long between looks.
        wait: Waits; tests put a gate here.
        clock: Seconds.
    """

    snapshots: StoredSnapshots
    steps: Sequence[int] | Literal["all"] | None
    make: Callable[[Snapshot], None]
    idle_seconds: float | None = None
    look_every_seconds: float = 2.0
    wait: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _done: set[tuple[str, int]] = field(default_factory=set)
    """Run and step of what needs no more work."""
    _names: frozenset[str] = frozenset()
    """What stood in the folder when it was listed last."""
    _unrelated: set[str] = field(default_factory=set)
    _failures: int = 0

    def follow(self) -> None:
        """Make averages until training has ended, or all steps that were listed are there.

        Raises:
            SnapshotNotFound: It has ended without any snapshot, or without some of the listed steps.
            NitrousError: Whatever ``make`` raises; also a damaged snapshot that is not excluded.
        """
        heard = self.clock()
        store = self.snapshots.store
        yet = "" if store.files.exists(store.root) else ", which is not there yet"
        log(f"waiting for snapshots in {store.root}{yet}")
        while True:
            over = self._why_over(heard)
            if self._look():
                heard = self.clock()
            elif over is None and not self._has_all():
                self.wait(self.look_every_seconds)
            else:
                break
        log(f"ended: {over or 'all steps that were asked for are there'}")
        self._check_complete(over)

    def _why_over(self, heard: float) -> str | None:
        """Why no more snapshots are expected, if so."""
        listed = self.snapshots.listed
        if self.snapshots.is_closed:
            return f"run {self.snapshots.lineage[-1][0]} is closed"
        if listed and process_state(trainer := listed[-1].stamp.trainer) == "gone":
            return f"the trainer, process {trainer['pid']} of this machine, is gone"
        if self.idle_seconds is not None and self.clock() - heard >= self.idle_seconds:
            return f"nothing new has come for {self.idle_seconds:g} seconds"
        return None

    def _look(self) -> bool:
        """Make what is new; False if there is nothing, and nothing that may have to be tried again."""
        names = self._listed_names()
        if self._without_known(names) == self._without_known(self._names):
            return False
        self._names = names
        self._list()
        due = self._due()
        for target in due:
            try:
                self.make(target)
            except SnapshotNotFound as error:  # dropped by whoever writes there
                self._failures += 1
                if self._failures == _ATTEMPTS:
                    raise
                log(f"{error} Looking again.")
                self._names = frozenset()
                return True
            self._failures = 0
            self._done.add((target.run, target.step))
        return bool(due)

    def _list(self) -> None:
        """List the history again, or that of a run which continues it."""
        snapshots = self.snapshots
        followed = snapshots.lineage[-1][0] if snapshots.lineage else None
        with suppress(SnapshotNotFound):
            if followed is None:
                snapshots.look()
                self._begin()
                return
            if snapshots.asked_run is None:
                followed = self._continued(followed)
            snapshots.look(followed)

    def _begin(self) -> None:
        """Decide what of the snapshots that are there already is wanted."""
        listed = self.snapshots.listed
        if not listed:
            return
        if self.steps is None:
            self._done.update((each.run, each.step) for each in listed[:-1])
        log(f"following run {self.snapshots.lineage[-1][0]} from step {listed[-1].step} on")

    def _continued(self, followed: str) -> str:
        """The newest run that continues the one that was followed; that one itself if there is none."""
        runs = {known[1] for name in self._names if "/" not in name and (known := parse_folder_name(name))}
        for run in sorted(runs - self._unrelated, reverse=True):
            if run <= followed:
                break
            with suppress(SnapshotNotFound):  # it has nothing whole yet
                lineage = max((each.stamp.lineage for each in self.snapshots.store.snapshots(run)), key=len)
                if followed in dict(lineage):
                    log(f"run {run} continues run {followed}; following it")
                    return run
                self._unrelated.add(run)
                log(f"run {run} does not continue run {followed} and is not followed")
        return followed

    def _due(self) -> list[Snapshot]:
        wanted = self.steps if isinstance(self.steps, list) else None
        return [
            each
            for each in self.snapshots.listed
            if (each.run, each.step) not in self._done and (wanted is None or each.step in wanted)
        ]

    def _listed_names(self) -> frozenset[str]:
        """Names in the folder, and of the files of each snapshot."""
        files, root = self.snapshots.store.files, self.snapshots.store.root
        names: set[str] = set()
        with suppress(FileNotFoundError, NotADirectoryError):
            names.update(files.list(root))
        known = {each.paths[0].parent.name for each in self.snapshots.listed}
        for name in [name for name in names if name not in known and parse_folder_name(name)]:
            with suppress(FileNotFoundError, NotADirectoryError):
                names.update(f"{name}/{file}" for file in files.list(root / name) if parse_rank_file_name(file))
        return frozenset(names)

    def _without_known(self, names: frozenset[str]) -> set[str]:
        """Names but for the files of snapshots that were listed."""
        known = {each.paths[0].parent.name for each in self.snapshots.listed}
        return {name for name in names if name.partition("/")[0] not in known or "/" not in name}

    def _has_all(self) -> bool:
        return isinstance(self.steps, list) and set(self.steps) <= {step for _, step in self._done}

    def _check_complete(self, over: str | None) -> None:
        root = self.snapshots.store.root
        if not self.snapshots.listed:
            raise SnapshotNotFound(f"{root}: {over}, and there is no snapshot at all.", path=root, nearest=())
        if not self._has_all() and isinstance(self.steps, list):
            missing = sorted(set(self.steps) - {step for _, step in self._done})
            raise SnapshotNotFound(
                f"{root}: {over}, and there is no snapshot of step {', '.join(map(str, missing))}.",
                path=root,
                nearest=(),
            )
