"""The run that an EMA belongs to, and its lineage: the runs that it continues.

A run is one uninterrupted sequence of averages. An EMA that loads a state saved at step s continues the run of that
state. The snapshots of the earlier run up to s then belong to the lineage of this run; later ones are an abandoned
future. A run that has already written snapshots and then loads a state continues under a new name, because its own
snapshots have become an abandoned future as well.

Readers select the run with the newest name. So a run takes a name that is newer than that of the run that it continues,
and than those of all runs that are in the folder when it begins: clocks of other machines may be ahead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import cache
from typing import Any

from nitrous_ema._base.processes import identity
from nitrous_ema.averaging.schedule import Schedule, Time
from nitrous_ema.snapshots.header import Lineage, Stamp
from nitrous_ema.snapshots.names import new_run_id


class RunLineage:
    """Run id, ancestors, and the steps whose snapshots were passed to the sink."""

    def __init__(self) -> None:
        self.run = new_run_id()
        self.agree: Callable[[str], str] = lambda run: run
        """Returns the id that all ranks of the model take, given the one that this rank would take."""
        self.ancestors: Lineage = ()
        self.written: set[int] = set()
        self.is_fresh = True
        """True until the first update() or until a state is loaded: the first update of a fresh run may warn of a run
        that could have been resumed."""

    @property
    def lineage(self) -> Lineage:
        """Ancestors with the step at which each was left, then this run with None."""
        return (*self.ancestors, (self.run, None))

    def stamp(self, schedule: Schedule) -> Stamp:
        """Return the stamp of a snapshot that is taken now."""
        return self._stamp(schedule.step, schedule.t, schedule.t_first)

    def first_stamp(self) -> Stamp:
        """Return the stamp of a snapshot of step 1. Every header of this run is as large as with this stamp."""
        return self._stamp(1, 1, 1)

    def _stamp(self, step: int, t: Time, t_first: Time) -> Stamp:
        return Stamp(
            step=step,
            t=t,
            t_first=t_first,
            run=self.run,
            lineage=self.lineage,
            trainer=_this_process(os.getpid()),
            created_ns=time.time_ns(),
        )

    def state(self) -> list[list[Any]]:
        """Return the lineage in plain lists, for a state_dict."""
        return [list(link) for link in self.lineage]

    def begin_after(self, newest: str) -> None:
        """Take a name that is newer than that of another run, unless this run has written snapshots under its name.

        All ranks of the model take the same name, whatever they have found in the folder.
        """
        if newest > self.run and not self.written:
            self.run = _run_after(newest)
        self.run = self.agree(self.run)

    def continue_from(self, lineage: Sequence[Sequence[Any]], step: int) -> None:
        """Continue a state of another run, or an earlier state of this run.

        Args:
            lineage: The lineage of that state: run ids, each with the step at which it was left (None: not left).
            step: The step at which the state was saved.
        """
        self.is_fresh = False
        # A state of step 0 has no ancestors: no run has a snapshot of step 0.
        links = [(str(run), None if left_at is None else int(left_at)) for run, left_at in lineage if step > 0]
        newest = max((run for run, _ in links), default="")
        # A new name, because this run's own snapshots are an abandoned future, or its name is older than the state's.
        if self.written or newest > self.run:
            self.run = _run_after(newest)
            self.written = set()
        # An ancestor may have been left at a later step than this one; only its snapshots up to this step count.
        self.ancestors = tuple((run, min(step, left_at or step)) for run, left_at in links if run != self.run)


def _run_after(ancestor: str) -> str:
    """Return a new run id that sorts after another one, also if this machine's clock is behind the other's."""
    run = new_run_id()
    with suppress(ValueError, OverflowError):  # not an id that this library made
        if run <= ancestor:
            started = datetime.strptime(ancestor.partition("-")[0], "%Y%m%dT%H%M%S.%f")
            run = new_run_id(started.replace(tzinfo=timezone.utc) + timedelta(microseconds=1))
    return run


@cache
def _this_process(pid: int) -> dict[str, str | int | float]:
    """Return the record of this process. ``pid`` is the key of the cache, because a forked child has another record."""
    return identity(pid)
