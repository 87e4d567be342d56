"""Other runs that write into the folder while this one does: what they need, and what the user should know.

A job may be requeued while its old process lives on, or branch on purpose: then two runs that live share ancestors, and
what one drops may be the history of the other. Reading clocks or process ids would not decide which runs live, because
the other run may be on another machine. The names in the folder do: a run lives, or ended by itself, if it has added a
name since this run began. A predecessor that was killed has not, so nothing is spared for it.
"""

from __future__ import annotations

import threading

from nitrous_ema.errors import SnapshotError
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.names import parse_closed_note_name, parse_folder_name
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore


class OtherRuns:
    """The runs that have written into the folder, or were closed, since this run first looked.

    Args:
        store: The folder.
    """

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self._own: set[str] = set()  # this object's run, and the runs it had before it loaded a state
        self._known: frozenset[str] | None = None  # the names in the folder when this run began
        self._lineages: dict[str, dict[str, int | None]] = {}
        self._has_warned = False
        self._lock = threading.Lock()  # several threads may write snapshots at once

    def begin(self) -> str:
        """Begin a run: remember the names in the folder, since names that are added later belong to runs that live.

        Returns:
            The id of the newest run among these names, "" without one.

        Raises:
            OSError: The folder cannot be listed.
        """
        # New lineages too: a run that wrote before may have been killed since. Replaced, not changed, because
        # a writer thread may be looking at it.
        self._known, self._lineages = frozenset(self._store.files.list(self._store.root)), {}
        return max((known[1] for known in map(parse_folder_name, self._known) if known), default="")

    def look(self, run: str) -> str | None:
        """List the folder before a write of ``run``. Returns a warning the first time that one is due.

        Raises:
            OSError: The folder cannot be listed.
        """
        with self._lock:
            return self._look(run)

    def _look(self, run: str) -> str | None:
        self._own.add(run)
        names = frozenset(self._store.files.list(self._store.root))
        known = self._known = names if self._known is None else self._known
        steps: dict[str, int] = {}
        for name in names - known:
            step, other = parse_folder_name(name) or (0, parse_closed_note_name(name) or "")
            if other and other not in self._own:
                steps[other] = max(step, steps.get(other, 0))
        for other in steps.keys() - self._lineages.keys():
            if (lineage := self._lineage_of(other)) is not None:
                self._lineages[other] = dict(lineage)
        writing = [other for other, step in steps.items() if step]
        if not writing or self._has_warned:
            return None
        self._has_warned = True
        other = max(writing)
        return (
            f"{self._store.root}: run {other} has written a snapshot of step {steps[other]} since this run, {run}, "
            f"began. Readers select the newest run, which is {max(other, run)}. If the same job was started twice, or "
            "was requeued while its old process lives on, stop one of the two; else pass run= to readers, or give each "
            "run a folder of its own."
        )

    def need(self, snapshot: Snapshot) -> bool:
        """Return whether the lineage of another run that lives, or has ended by itself, contains a snapshot."""
        return any(
            snapshot.run in lineage and ((left_at := lineage[snapshot.run]) is None or snapshot.step <= left_at)
            for lineage in self._lineages.values()
        )

    def _lineage_of(self, run: str) -> Lineage | None:
        """Return the lineage that a run's snapshots record; None if it has no readable snapshot (yet)."""
        try:
            return self._store.get(run=run).stamp.lineage
        except SnapshotError:
            return None
