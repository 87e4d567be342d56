"""Writing the snapshots of a training run, and dropping the snapshots that a rule (``keep=``) no longer keeps.

Several threads write snapshots, and each new snapshot may make the rule drop older ones. Which ones it drops depends on
the snapshots that are there, so the rule must see them in the order in which they were taken. Therefore, under a rule
that drops anything, snapshots are written one at a time, each in its turn. A dropped snapshot is hidden at once and
unlinked in the next turn, so that a reader that has listed it can read it to its end in between. Without such a rule,
writers do not wait for each other.

in a turn                                           on disk, of this history
hide excess snapshots (the first time only, where   the snapshots that the rule keeps, and the hidden ones
a byte budget or the disk has no space for one more)
remove the hidden snapshots                         the snapshots that the rule keeps
write the new snapshot                              one more
hide the snapshots that the rule drops now          the same; no listing shows the hidden ones

The list of kept snapshots is read from the folder when a history is first written to, since a resumed run continues
with its ancestors' snapshots. From then on the list is updated in memory.

RETAIN-1  A rule sees all older snapshots when it is applied to   test_rule_is_applied_in_the_order_snapshots_were_taken
    a new one. Its result does not depend on how writer threads
    are scheduled.
RETAIN-2  No snapshot is unlinked before the next one is written, test_dropped_snapshot_stays_until_the_next_is_written
    or training is closed.
RETAIN-3  A byte budget is not exceeded at any moment.            test_budget_of_bytes_holds_at_every_moment
RETAIN-4  A failure to drop snapshots costs no snapshot. It is    test_failure_to_drop_costs_no_snapshot_and_warns_once
    reported once, as a warning on the caller's thread.
RETAIN-5  The rule respects every pin that was set before it is   test_pin_waits_until_the_rule_was_applied
    applied: pinning and applying the rule exclude each other.
RETAIN-6  No rule drops what another run needs that writes while  test_history_of_a_run_that_branched_off_is_spared
    this one does, or was closed since this one began.
RETAIN-7  No rule prefers a snapshot with values that are not     test_finite_snapshots_are_kept_before_others
    finite to a finite one, or one of other tensors than the      test_snapshots_of_other_tensors_are_dropped_first
    newest to one of the same.

Longer than 300 lines: the order of writing, asking the rule and hiding is one protocol.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from nitrous_ema._base.arguments import format_bytes
from nitrous_ema.errors import NitrousError, NonFiniteError, SnapshotNotFound, SnapshotUnreadable, warn
from nitrous_ema.posthoc.keep_rules import KeepAll, KeepBytes, KeepRule
from nitrous_ema.snapshots.disk_space import check_disk_space
from nitrous_ema.snapshots.header import Lineage, Stamp, header_bytes
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.names import closed_note_name, listed_folders
from nitrous_ema.snapshots.nonfinite import has_nan, nonfinite_error
from nitrous_ema.snapshots.other_runs import OtherRuns
from nitrous_ema.snapshots.readable_snapshot import with_same_tensors
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.stats import Ledger
from nitrous_ema.snapshots.store import SnapshotStore

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log = logging.getLogger(__name__)

_KEEP_ALL = KeepAll()


class RetainingWriter:
    """Writes snapshots to a store, and drops the snapshots that a rule does not keep.

    Args:
        store: The store to write to.
        rule: Decides which snapshots are kept.
        raises_nonfinite: Whether values that are not finite are reported as an error, not as a warning.
    """

    def __init__(self, store: SnapshotStore, rule: KeepRule = _KEEP_ALL, *, raises_nonfinite: bool = False) -> None:
        self.store = store
        self.ledger = Ledger()
        """Counts written and dropped snapshots; a sink adds the other counts."""
        self._rule = rule
        self._may_drop = not isinstance(rule, KeepAll)
        self._failures: queue.SimpleQueue[str | NonFiniteError] = queue.SimpleQueue()
        self._raises_nonfinite = raises_nonfinite
        self._nonfinite_runs: set[str] = set()  # whose first values that are not finite were reported; under _lock
        # A lock of its own: a Condition's __enter__ is Python, and Ctrl-C inside it would leave it held for ever.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._in_flight: list[tuple[str, int]] = []  # run and step, in the order they were taken; guarded by _lock
        self._rule_lock = threading.Lock()  # held from reading the pins to the end of hiding; never taken under _lock
        # The history of _kept_snapshots; None if both must be read from the folder. Only the thread whose turn it is
        # uses them.
        self._others = OtherRuns(store)
        self._has_warned = False  # that a budget of bytes cannot be held
        self._lineage: Lineage | None = None
        self._kept_snapshots: list[Snapshot] = []  # ascending by step

    def move(self, store: SnapshotStore) -> None:
        """Write to another store from now on. No snapshot may be in flight."""
        with self._rule_lock:
            self.store, self._others, self._lineage = store, OtherRuns(store), None
        self.begin()

    def check(self, layout: Layout, stamp: Stamp) -> None:
        """Raise ValueError if the rule is invalid for snapshots of this size."""
        self._rule.check(layout.gammas, header_bytes(layout, stamp) + layout.data_bytes)

    def check_disk_space(self, layout: Layout, stamp: Stamp) -> None:
        """Check how many snapshots of this size fit on the disk; see ``check_disk_space``, which raises and warns."""
        snapshot_bytes = header_bytes(layout, stamp) + layout.data_bytes
        store, most = self.store, self._rule.most_snapshots(snapshot_bytes)
        check_disk_space(store.root, store.files, store.names, snapshot_bytes, most)

    def begin(self) -> str:
        """Begin a run: what other runs write from now on, they write while this one lives.

        Returns:
            The id of the newest run that has snapshots in the folder; "" without one, or where the folder cannot be
            listed.
        """
        with suppress(OSError):  # the first write lists the folder again
            return self._others.begin()
        return ""

    def expect(self, stamp: Stamp) -> None:
        """Register a snapshot that was taken. A later call writes it, or forgets it."""
        with self._lock:
            self._in_flight.append((stamp.run, stamp.step))

    def forget(self, stamp: Stamp) -> None:
        """Remove a registered snapshot that will not be written, so that later ones do not wait for it."""
        with self._lock:
            if (stamp.run, stamp.step) in self._in_flight:
                self._in_flight.remove((stamp.run, stamp.step))
                self._changed.notify_all()

    def write(self, layout: Layout, stamp: Stamp, chunks: Callable[[], Iterable[ReadableBuffer]]) -> Snapshot:
        """Write a snapshot in its turn, then hide the snapshots that the rule drops. Blocks; safe from any thread.

        For arguments and errors see ``SnapshotStore.write``. A failure to drop snapshots raises nothing here; see
        ``report_failures``.
        """
        with self._turn(stamp):
            self._look_at_other_runs(stamp.run)
            if self._may_drop:
                # A resumed run may find more snapshots than a byte budget or the disk allows: it drops them before it
                # writes. An error is not reported here, since the call after the write succeeds or fails in the same
                # way. Otherwise the first snapshot does not wait until thousands of headers have been read.
                needed_bytes = header_bytes(layout, stamp) + layout.data_bytes
                if self._lineage != stamp.lineage and self._must_drop_first(needed_bytes):
                    self._apply_rule(stamp, layout, needed_bytes)
                self._remove_hidden()
            started = time.monotonic()
            snapshot = self.store.write(layout, stamp, chunks)
            seconds = time.monotonic() - started
            self.ledger.add(snapshots=1, bytes_written=snapshot.bytes, seconds_writing=seconds)
            if not snapshot.is_finite:
                self._report_nonfinite(snapshot, chunks)
            if self._may_drop and (error := self._apply_rule(stamp, layout, snapshot.bytes, snapshot)) is not None:
                self._report("snapshots that keep= drops could not be hidden", error)
            return snapshot

    def _must_drop_first(self, needed_bytes: int) -> bool:
        """Return whether snapshots must be dropped before one of this size is written."""
        free_bytes = self.store.free_bytes()
        return isinstance(self._rule, KeepBytes) or (free_bytes is not None and free_bytes < 2 * needed_bytes)

    def end(self) -> None:
        """Remove the snapshots that were hidden last: no more will be written. A failure is a warning."""
        if self._may_drop:
            self._remove_hidden()
            self.report_failures()

    @contextmanager
    def paused(self, run: str) -> Iterator[list[int]]:
        """Drop nothing in this block. Yields the steps of a run that are not on disk yet, in the order taken."""
        with self._rule_lock:
            with self._lock:
                in_flight = [step for owner, step in self._in_flight if owner == run]
            yield in_flight

    def note_skipped(self, step: int, num_skipped: int) -> None:
        """Note how many updates were skipped before the snapshot of a step was taken; log it if it has become more."""
        if num_skipped > self.ledger.read().updates_skipped:
            _log.warning("%d updates were skipped up to step %d: tensors were not finite", num_skipped, step)
            self.ledger.raise_to(updates_skipped=num_skipped)

    def report_failures(self) -> None:
        """Report what writing has found since the last call: as a ``NitrousWarning``, if it is no error.

        Raises:
            NonFiniteError: Once per run, with ``raises_nonfinite``.
        """
        while not self._failures.empty():
            failure = self._failures.get()
            if isinstance(failure, NonFiniteError):
                raise failure
            warn(failure)

    @contextmanager
    def _turn(self, stamp: Stamp) -> Iterator[None]:
        key = stamp.run, stamp.step
        with self._lock:
            if key not in self._in_flight:
                self._in_flight.append(key)
            if self._may_drop:
                # By the order in which snapshots were taken, not by that in which threads arrive here (RETAIN-1).
                self._changed.wait_for(lambda: self._in_flight[0] == key)
        try:
            yield
        finally:
            self.forget(stamp)

    def _apply_rule(
        self, stamp: Stamp, layout: Layout, snapshot_bytes: int, new: Snapshot | None = None
    ) -> Exception | None:
        """Hide the snapshots that the rule drops. Returns the error if that failed, else None."""
        with self._rule_lock:
            try:
                self._refresh(stamp.lineage, new)
                dropped = self._select_dropped(layout, snapshot_bytes)
                if dropped:
                    self.store.hide([self._kept_snapshots[index] for index in dropped])
                    _log.info("dropped snapshots of steps %s", [self._kept_snapshots[index].step for index in dropped])
                    self._kept_snapshots = [
                        snapshot for index, snapshot in enumerate(self._kept_snapshots) if index not in dropped
                    ]
                    self.ledger.add(dropped=len(dropped))
            # Any exception: the rule may be user code, and its mistake must not cost a snapshot (RETAIN-4).
            except Exception as error:
                self._lineage = None  # some may be hidden now: read the folder again before the rule is next applied
                return error
        return None

    def _refresh(self, lineage: Lineage, new: Snapshot | None) -> None:
        """Update ``_kept_snapshots``: read a new history from the folder, else add ``new`` and remove missing ones."""
        if self._lineage != lineage:
            self._kept_snapshots = _droppable_history(self.store, lineage)
            self._lineage = lineage
            return
        # Other processes may have dropped snapshots. One listing of names shows it; no header has to be read again.
        existing = frozenset(listed_folders(self.store.names()))
        kept = [*self._kept_snapshots, new] if new is not None else self._kept_snapshots
        self._kept_snapshots = [snapshot for snapshot in kept if (snapshot.step, snapshot.run) in existing]

    def _select_dropped(self, layout: Layout, snapshot_bytes: int) -> frozenset[int]:
        """Return the indices in ``_kept_snapshots`` that the rule drops; never the newest snapshot or a pinned one."""
        kept = self._kept_snapshots
        if len(kept) < 2:
            return frozenset()
        pins = self.store.pins()
        pinned = {index for index, snapshot in enumerate(kept) if (snapshot.step, snapshot.run) in pins}
        needed = {index for index, snapshot in enumerate(kept[:-1]) if self._others.need(snapshot)}
        # Snapshots that other runs need take space, so they count towards a budget of bytes. They do not count towards
        # a number of snapshots, which is what this run wants for itself.
        if isinstance(self._rule, KeepBytes):
            pinned |= needed
        chosen_from = [index for index in range(len(kept)) if index in pinned or index not in needed]
        # Ancestors of this run may have written larger snapshots, with another dtype, and they count at their size.
        snapshot_bytes = max(snapshot_bytes, *(snapshot.bytes for snapshot in kept))
        stay = pinned
        if not kept[-1].is_finite:
            # Behind the newest finite one no average can end, and training cannot be restored.
            stay = stay | set([index for index in chosen_from if kept[index].is_finite][-1:])
        dropped: set[int] = set()
        grades = self._grades(pinned)
        for grade in sorted({grades[index] for index in chosen_from}):
            # As if there were only these; what is left of them then stays.
            among = [index for index in chosen_from if grades[index] <= grade and index not in dropped]
            dropped |= self._ask_rule(among, stay, layout, snapshot_bytes)
            stay = stay | set(among) - dropped
        if needed:
            self._warn_of_budget(sum(each.bytes for i, each in enumerate(kept) if i not in dropped) + snapshot_bytes)
        return frozenset(dropped)

    def _grades(self, pinned: Collection[int]) -> list[int]:
        """Return a grade for each of ``_kept_snapshots``; lower ones are kept first.

        0: averages at the newest snapshot can be made from it, or it stays anyway; 1: its tensors are others, those of
        a shorter vocabulary for example; 2: it has values that are not finite.
        """
        kept = self._kept_snapshots
        same = set(map(id, with_same_tensors(kept[-1], kept)[0]))
        # Averages at a pinned snapshot of other tensors need such snapshots.
        if not all(id(kept[index]) in same for index in pinned):
            same = set(map(id, kept))
        grades = [int(id(each) not in same) if each.is_finite else 2 for each in kept]
        return [0 if index in pinned or index == len(kept) - 1 else grade for index, grade in enumerate(grades)]

    def _ask_rule(self, indices: list[int], pinned: set[int], layout: Layout, snapshot_bytes: int) -> set[int]:
        """Return which of the snapshots with these indices in ``_kept_snapshots``, ascending, the rule drops."""
        kept = self._kept_snapshots
        places = self._rule.drop(
            [kept[index].t for index in indices],
            gammas=layout.gammas,
            snapshot_bytes=snapshot_bytes,
            pinned={place for place, index in enumerate(indices) if index in pinned},
        )
        # A rule may be user code: indices of the newest and of pinned snapshots, and invalid indices, are ignored.
        valid = frozenset(places).intersection(range(len(indices)))
        return {indices[place] for place in valid} - pinned - {len(kept) - 1}

    def _warn_of_budget(self, needed_bytes: int) -> None:
        """Report once that a budget of bytes cannot hold what other runs need."""
        if isinstance(self._rule, KeepBytes) and needed_bytes > self._rule.budget_bytes and not self._has_warned:
            self._has_warned = True
            self._failures.put(
                f"{self.store.root}: keep= has a budget of {format_bytes(self._rule.budget_bytes)}, but "
                f"{format_bytes(needed_bytes)} are in use, with snapshots that another run in this folder "
                "resumed from. They are kept while that run lives. Raise the budget, or stop the other run and prune "
                "the folder."
            )

    def _look_at_other_runs(self, run: str) -> None:
        try:
            if (message := self._others.look(run)) is not None:
                self._failures.put(message)
        except OSError as error:  # the write that follows fails as well, and reports it
            _log.info("%s could not be listed: %s", self.store.root, error)

    def _remove_hidden(self) -> None:
        try:
            self.ledger.add(bytes_freed=self.store.remove_hidden())
        except Exception as error:  # the new snapshot is written all the same (RETAIN-4)
            self._report("snapshots that keep= has dropped could not be removed", error)

    def _report_nonfinite(self, snapshot: Snapshot, chunks: Callable[[], Iterable[ReadableBuffer]]) -> None:
        """Count a snapshot with values that are not finite, and report the first one of each run."""
        self.ledger.add(nonfinite=1)
        with self._lock:
            if snapshot.run in self._nonfinite_runs:
                return
            self._nonfinite_runs.add(snapshot.run)
        error = nonfinite_error(snapshot, has_nan=has_nan(snapshot.layout, chunks))
        self._failures.put(error if self._raises_nonfinite else str(error))

    def _report(self, what: str, error: Exception) -> None:
        cause = str(error) if isinstance(error, (NitrousError, OSError)) else repr(error)
        # Queued and not raised: this thread may be a writer's, and warnings belong to the caller's (RETAIN-4).
        self._failures.put(
            f"{self.store.root}: {what} ({cause}). Training goes on; the next snapshot or prune command tries again."
        )


def _droppable_history(store: SnapshotStore, lineage: Lineage) -> list[Snapshot]:
    """Return the snapshots of a history that a rule may drop, ascending by step.

    Damaged snapshots are left out, so they stay on disk. Snapshots that the history shares with a finished run are left
    out as well, because averages at the end of that run may still be wanted. A finished run was closed, and has
    snapshots after the step at which this history left it. (A run that was killed and resumed from an earlier step was
    not closed.)
    """
    names = store.names()
    # In ascending order, so that a later step of a run replaces the earlier ones in the dictionary.
    last_step = {run: step for step, run in sorted(listed_folders(names))}
    finished = [
        position
        for position, (run, left_at) in enumerate(lineage)
        if left_at is not None
        and closed_note_name(run) in names
        and last_step.get(run, 0) > left_at
        and _last_snapshot(store, run) > left_at  # not a folder that a failed write has left
    ]
    # Ancestors of a finished run are shared with it, too.
    bounds = dict(lineage[max(finished, default=-1) + 1 :])
    # The youngest run may own no snapshot yet. Then the listing is that of the youngest ancestor that owns one.
    for run, _ in reversed(lineage):
        try:
            found = store.examine(run).snapshots
        except SnapshotNotFound:
            continue
        own = [snapshot for snapshot in found if snapshot.run in bounds]
        droppable = [each for each in own if (left_at := bounds[each.run]) is None or each.step <= left_at]
        if droppable:
            return droppable
    return []


def _last_snapshot(store: SnapshotStore, run: str) -> int:
    """Return the step of the last snapshot of a run or its ancestors, damaged or not; 0 without any."""
    try:
        return store.get(run=run).step
    except SnapshotNotFound:
        return 0
    except SnapshotUnreadable as error:
        return error.step or 0
