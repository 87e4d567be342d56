"""Which run an EMA belongs to, and what came before it.

A run is one uninterrupted line of averages. Loading a state that was saved at step s continues that state's run: its
snapshots up to s are this run's ancestors, later ones are somebody's abandoned future. A run that has already written
snapshots and then loads a state goes on under a new name, since what it wrote is itself a future that was left.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import psutil

from nitrous_ema.schedule import Schedule
from nitrous_ema.snapshots.format import Lineage, Stamp, new_run_id


class History:
    """Run id, ancestors, and the steps that were given to the sink."""

    def __init__(self) -> None:
        self.run = new_run_id()
        self.ancestors: Lineage = ()
        self.written: set[int] = set()

    @property
    def lineage(self) -> Lineage:
        """Ancestors with the step at which each was left, then this run with None."""
        return (*self.ancestors, (self.run, None))

    def stamp(self, schedule: Schedule) -> Stamp:
        """What a snapshot taken now says of itself."""
        return Stamp(
            step=schedule.step,
            t=schedule.t,
            t_first=schedule.t_first,
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
        if self.written:
            self.run = new_run_id()
            self.written = set()
        links = [(str(run), None if left is None else int(left)) for run, left in lineage]
        # Ancestors that were left later than this step did not lead to it.
        inherited = tuple((run, min(step, left or step)) for run, left in links if run != self.run)
        self.ancestors = inherited if step > 0 else ()


@cache
def _this_process(pid: int) -> dict[str, str | int | float]:
    return {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}
