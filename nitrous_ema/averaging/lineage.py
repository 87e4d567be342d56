"""Which run an EMA belongs to, and what came before it.

A run is one uninterrupted line of averages. Loading a state that was saved at step s continues that state's run: its
snapshots up to s are this run's ancestors, later ones are somebody's abandoned future. A run that has already written
snapshots and then loads a state goes on under a new name, since what it wrote is itself a future that was left.

Readers take the run with the newest name, so a run that continues another one always has the newer name of the two.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import cache
from typing import Any

import psutil

from nitrous_ema.averaging.schedule import Schedule, Time
from nitrous_ema.snapshots.header import Lineage, Stamp
from nitrous_ema.snapshots.names import new_run_id


class RunLineage:
    """Run id, ancestors, and the steps that were given to the sink."""

    def __init__(self) -> None:
        self.run = new_run_id()
        self.ancestors: Lineage = ()
        self.written: set[int] = set()
        self.is_fresh = True
        """Neither was a state taken up, nor has it begun: at its first update one may be told of other runs."""

    @property
    def lineage(self) -> Lineage:
        """Ancestors with the step at which each was left, then this run with None."""
        return (*self.ancestors, (self.run, None))

    def stamp(self, schedule: Schedule) -> Stamp:
        """What a snapshot taken now says of itself."""
        return self._stamp(schedule.step, schedule.t, schedule.t_first)

    def first_stamp(self) -> Stamp:
        """What one of the first step would say: headers of this run are all as large as with this one."""
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
        """The lineage in plain lists."""
        return [list(link) for link in self.lineage]

    def continue_from(self, lineage: Sequence[Sequence[Any]], step: int) -> None:
        """Take up a state of another run (or an earlier one of this run) that was saved at ``step``."""
        self.is_fresh = False
        links = [(str(run), None if left is None else int(left)) for run, left in lineage if step > 0]
        newest = max((run for run, _ in links), default="")
        if self.written or newest > self.run:
            self.run = _run_after(newest)
            self.written = set()
        # Ancestors that were left later than this step did not lead to it.
        self.ancestors = tuple((run, min(step, left or step)) for run, left in links if run != self.run)


def _run_after(ancestor: str) -> str:
    """A new name that sorts after another one, also where the clock has gone back since, or is another machine's."""
    run = new_run_id()
    with suppress(ValueError, OverflowError):  # not a name of ours
        if run <= ancestor:
            started = datetime.strptime(ancestor.partition("-")[0], "%Y%m%dT%H%M%S.%f")
            run = new_run_id(started.replace(tzinfo=timezone.utc) + timedelta(microseconds=1))
    return run


@cache
def _this_process(pid: int) -> dict[str, str | int | float]:
    return {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}
