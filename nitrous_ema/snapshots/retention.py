"""Writing the snapshots of a training, and dropping those that a rule (``keep=``) no longer keeps.

Under a rule that drops anything, snapshots are written one at a time, in the order in which they were taken, and each
write is one turn:

in a turn                                           on disk, of this history
hide what is too much (the first time only)         what the rule keeps, and what was hidden
remove what was hidden before                       what the rule keeps
write the snapshot                                  one more
hide what the rule drops now, the new one in it     the same; no listing shows what was hidden

So a reader that has listed a snapshot has from one snapshot to the next to read it to its end, and a budget of bytes
holds at every moment. What is kept is read from the folder when a history is first written to (a resumed run goes on
with its ancestors' snapshots), and remembered from then on.

K1  A rule sees all older snapshots when it judges one, and its  test_snapshots_are_judged_in_the_order_they_were_taken
    judgement does not depend on how writers are scheduled.
K2  Nothing is unlinked before the next snapshot is written, or  test_what_was_dropped_stays_until_the_next_snapshot
    training is closed.
K3  A byte budget is never exceeded, at no moment.               test_budget_of_bytes_holds_at_every_moment
K4  Whatever goes wrong in dropping costs no snapshot, and is    test_failure_to_drop_costs_no_snapshot_and_is_told_once
    told once, on the caller's thread.
K5  A pin that was set is seen: pinning and judging exclude      test_pin_waits_for_a_judgement
    each other.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nitrous_ema.errors import NitrousError, SnapshotNotFound, warn
from nitrous_ema.posthoc.keep_rules import KeepAll, KeepRule
from nitrous_ema.snapshots.disk_space import check_disk_space
from nitrous_ema.snapshots.header import Lineage, Stamp, header_bytes
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.names import parse_folder_name
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.stats import Ledger
from nitrous_ema.snapshots.store import SnapshotStore

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log = logging.getLogger(__name__)

_KEEP_ALL = KeepAll()


class RetainingWriter:
    """Writes snapshots to a store and drops what a rule does not keep.

    Args:
        store: Where to.
        rule: What to keep.
    """

    def __init__(self, store: SnapshotStore, rule: KeepRule = _KEEP_ALL) -> None:
        self.store = store
        self.ledger = Ledger()
        """Counts what is written and dropped; a sink adds the rest."""
        self._rule = rule
        self._drops = not isinstance(rule, KeepAll)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        # A lock of its own: a Condition's __enter__ is Python, and Ctrl-C inside it would leave it held for ever.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._coming: list[tuple[str, int]] = []  # run and step, in the order they were taken; guarded by _lock
        self._judging = threading.Lock()  # from reading the pins to the end of hiding; never taken under _lock
        # Whose snapshots _kept are, None if that must be looked up; both belong to the one whose turn it is.
        self._lineage: Lineage | None = None
        self._kept: list[Snapshot] = []  # ascending by step

    def check(self, layout: Layout, stamp: Stamp) -> None:
        """Raise ValueError if the rule makes no sense for snapshots of this size."""
        self._rule.check(layout.gammas, header_bytes(layout, stamp) + layout.data_bytes)

    def check_disk_space(self, layout: Layout, stamp: Stamp) -> None:
        """Say how many snapshots of this size fit on the disk; see ``room``, whose errors and warnings these are."""
        snapshot_bytes = header_bytes(layout, stamp) + layout.data_bytes
        check_disk_space(self.store.root, self.store.files, snapshot_bytes, self._rule.most_snapshots(snapshot_bytes))

    def expect(self, stamp: Stamp) -> None:
        """A snapshot was taken and will be written later, or forgotten."""
        with self._lock:
            self._coming.append((stamp.run, stamp.step))

    def forget(self, stamp: Stamp) -> None:
        """An expected snapshot will not be written."""
        with self._lock:
            if (stamp.run, stamp.step) in self._coming:
                self._coming.remove((stamp.run, stamp.step))
                self._changed.notify_all()

    def write(self, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]) -> Snapshot:
        """Write a snapshot in its turn, then drop what the rule no longer keeps. Blocks; safe from any thread.

        Args and Raises as those of ``SnapshotStore.write``. That something could not be dropped raises nothing here.
        """
        with self._turn(stamp):
            if self._drops:
                if self._lineage != stamp.lineage:  # there may be more than there should be; a failure is told below
                    self._thin(stamp, layout, header_bytes(layout, stamp) + layout.data_bytes)
                self._remove_hidden()
            started = time.monotonic()
            snapshot = self.store.write(layout, stamp, chunks)
            seconds = time.monotonic() - started
            self.ledger.add(snapshots=1, bytes_written=snapshot.bytes, seconds_writing=seconds)
            if self._drops and (error := self._thin(stamp, layout, snapshot.bytes, snapshot)) is not None:
                self._failed("What keep= drops could not be hidden", error)
            return snapshot

    def end(self) -> None:
        """No more snapshots will be written: remove what was hidden last. A failure is told as a warning."""
        if self._drops:
            self._remove_hidden()
            self.warn_of_failures()

    @contextmanager
    def paused(self, run: str) -> Iterator[list[int]]:
        """Nothing is dropped in this block. Gives the steps of a run that are on their way to disk, as taken."""
        with self._judging:
            with self._lock:
                coming = [step for of, step in self._coming if of == run]
            yield coming

    def warn_of_failures(self) -> None:
        """Tell what could not be dropped since the last call, as a ``NitrousWarning`` each."""
        while not self._failures.empty():
            warn(self._failures.get())

    @contextmanager
    def _turn(self, stamp: Stamp) -> Iterator[None]:
        key = stamp.run, stamp.step
        with self._lock:
            if key not in self._coming:
                self._coming.append(key)
            if self._drops:
                self._changed.wait_for(lambda: self._coming[0] == key)
        try:
            yield
        finally:
            self.forget(stamp)

    def _thin(
        self, stamp: Stamp, layout: Layout, snapshot_bytes: int, arrived: Snapshot | None = None
    ) -> Exception | None:
        """Hide what the rule drops. Returns what stood in the way."""
        with self._judging:
            try:
                self._look(stamp.lineage, arrived)
                places = self._judge(layout, snapshot_bytes)
                if places:
                    self.store.hide([self._kept[place] for place in places])
                    _log.info("dropped the snapshots of steps %s", [self._kept[place].step for place in places])
                    self._kept = [each for place, each in enumerate(self._kept) if place not in places]
                    self.ledger.add(dropped=len(places))
            except Exception as error:  # a rule may be the user's own; whatever it raises, the snapshots are safe
                self._lineage = None  # look at the folder again before the next judgement
                return error
        return None

    def _look(self, lineage: Lineage, arrived: Snapshot | None) -> None:
        """Bring ``_kept`` up to date: with the folder if this is another history, else without what is gone."""
        if self._lineage != lineage:
            self._kept = _of_history(self.store, lineage)
            self._lineage = lineage
            return
        there = frozenset(self.store.files.list(self.store.root))
        kept = [*self._kept, arrived] if arrived is not None else self._kept
        self._kept = [snapshot for snapshot in kept if snapshot.paths[0].parent.name in there]

    def _judge(self, layout: Layout, snapshot_bytes: int) -> frozenset[int]:
        """Places in ``_kept`` of what goes; never the newest or a pinned one, whatever a rule says."""
        kept = self._kept
        if len(kept) < 2:
            return frozenset()
        pins = self.store.pins()
        pinned = {place for place, snapshot in enumerate(kept) if (snapshot.step, snapshot.run) in pins}
        places = self._rule.drop(
            [snapshot.t for snapshot in kept],
            gammas=layout.gammas,
            snapshot_bytes=max(snapshot_bytes, *(snapshot.bytes for snapshot in kept)),
            pinned=pinned,
        )
        return frozenset(places).intersection(range(len(kept) - 1)) - pinned

    def _remove_hidden(self) -> None:
        try:
            self.ledger.add(bytes_freed=self.store.remove_hidden())
        except Exception as error:  # as in _thin
            self._failed("What keep= has dropped could not be removed", error)

    def _failed(self, what: str, error: Exception) -> None:
        cause = str(error) if isinstance(error, (NitrousError, OSError)) else repr(error)
        told = f"{self.store.root}: {what} ({cause}). Training goes on; the next snapshot, or prune, tries again."
        self._failures.put(told)


def _of_history(store: SnapshotStore, lineage: Lineage) -> list[Snapshot]:
    """Whole snapshots of a history, ascending by step; its youngest run may own none yet. Damaged ones stay as is.

    So does what it shares with a run that was closed after this history had left it: that one is finished, and somebody
    may want averages of its end. (A run that was killed and resumed from an earlier step was not closed.)
    """
    names = store.files.list(store.root)
    last_step = {run: step for step, run in sorted(filter(None, map(parse_folder_name, names)))}
    finished = [
        place
        for place, (run, left) in enumerate(lineage)
        if left is not None and f"closed-{run}" in names and last_step.get(run, 0) > left
    ]
    left_at = dict(lineage[max(finished, default=-1) + 1 :])
    for run, _ in reversed(lineage):
        try:
            found = store.examine(run).snapshots
        except SnapshotNotFound:
            continue
        own = [snapshot for snapshot in found if snapshot.run in left_at]
        kept = [each for each in own if (left := left_at[each.run]) is None or each.step <= left]
        if kept:
            return kept
    return []
