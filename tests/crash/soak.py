"""Readers and a pruner beside a writer, for minutes: ``python -m tests.crash.soak --seconds 300``.

Training runs come and go in one folder: with ``keep=`` and without, resumed by a state, by restore() or not at all,
closed, left or killed; two at once at times. Meanwhile a process prunes, pins and unpins, by library and by command,
and is killed and started again. Other processes list, verify and synthesize in every way there is. What must hold:

no reader receives an error, except one that names a snapshot which a process has hidden, and which is gone
every read is right: each snapshot has the bits of an undisturbed run, each synthesized average is that of the
    definition
there is a newest snapshot at any time, and its step never decreases; pinned snapshots are there
at the end every acknowledged snapshot is there, or was hidden; every file is whole; and after one more prepare()
    there is no file of a process that died

A round is one folder. It ends when every process has done its share, so the amount of work does not depend on the speed
of the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import selectors
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nitrous_ema import SnapshotStore
from nitrous_ema.snapshots.names import parse_folder_name
from tests.crash import actors
from tests.crash.journal import Journal, record_hiding
from tests.crash.kills import data_of, expect, fork, run_undisturbed, wait

TIMEOUT_SECONDS = 120
"""The longest time without a report from any process, and until a process stops on request."""
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Share:
    """The least work of a round."""

    lives: int = 25
    rounds: int = 40
    syntheses: int = 10


@dataclass
class Actor:
    """A process that takes part."""

    name: str
    pid: int
    kill_after: int | None
    """Reports after which it is killed."""
    reports: int = 0


@dataclass
class Round:
    """One folder and the processes at work in it."""

    root: Path
    truth: actors.Truth
    chance: random.Random
    done: Counter[str] = field(default_factory=Counter)
    """Reports of each kind of process, lives that ended, and kills."""

    def __post_init__(self) -> None:
        self.journal = Journal(self.root.with_suffix(".journal"))
        self._actors = selectors.DefaultSelector()
        self._stop_read, self._stop_write = os.pipe()
        self._stop = selectors.DefaultSelector()
        self._stop.register(self._stop_read, selectors.EVENT_READ)

    def run(self, share: Share) -> None:
        """Run until every process has done its share; then stop all and check the folder."""
        try:
            self._begin("first", actors.write_some, kill=False)
            self._until(lambda: not self._alive("first"), begin=False)  # readers begin where there is something to read
            for name in ("reader", "reader 2"):
                self._begin(name, lambda *ends: actors.read(*ends, self.truth), kill=False)
            self._begin("worker", lambda *ends: actors.synthesize_by_worker(*ends, self.truth), kill=False)
            self._until(lambda: self._share_is_done(share))
            os.close(self._stop_write)
            self._until(lambda: not self._actors.get_map(), begin=False)
        finally:
            remaining = list(self._actors.get_map().values())  # after a failure
            for key in remaining:
                os.kill(key.data.pid, signal.SIGKILL)
            for key in remaining:
                wait(key.data.pid)
        self._check_folder()

    def _share_is_done(self, share: Share) -> bool:
        return (
            self.done["lives"] >= share.lives
            and min(self.done[name] for name in ("reader", "reader 2", "pruner")) >= share.rounds
            and self.done["worker"] >= share.syntheses
            and bool(self.journal.read().hidden)
        )

    def _alive(self, name: str) -> int:
        return sum(key.data.name == name for key in self._actors.get_map().values())

    def _begin(self, name: str, work: Callable[..., None], *, kill: bool) -> None:
        reports_read, reports_write = os.pipe()
        chance = random.Random(self.chance.random())

        def process() -> None:
            os.close(self._stop_write)
            self._actors.close()
            stopped = lambda: bool(self._stop.select(0))  # noqa: E731
            work(self.root, self.journal, chance, stopped, lambda word: os.write(reports_write, b"."))

        patience = self.chance.randrange(1, 60) if kill else None
        actor = Actor(name, fork(process), patience)
        os.close(reports_write)
        self._actors.register(reports_read, selectors.EVENT_READ, actor)

    def _until(self, done: Callable[[], bool], *, begin: bool = True) -> None:
        """Wait for reports of all processes; start another process for each that ends, and kill some."""
        while not done():
            if begin:
                while self._alive("writer") < 1 or (self._alive("writer") < 2 and self.chance.random() < 0.1):
                    self._begin("writer", actors.write, kill=self.chance.random() < 0.5)
                if not self._alive("pruner"):
                    self._begin("pruner", actors.prune, kill=self.chance.random() < 0.7)
            ready = self._actors.select(TIMEOUT_SECONDS)
            expect(bool(ready), f"no process reports any more: {self.done}")
            for key, _ in ready:
                self._take_reports(key)

    def _take_reports(self, key: selectors.SelectorKey) -> None:
        actor, reports = key.data, os.read(key.fd, 4096)
        if not reports:
            self._end(key)
            return
        actor.reports += len(reports)
        self.done[actor.name] += len(reports)
        if actor.kill_after is not None and actor.reports >= actor.kill_after:
            self._stop.select(self.chance.random() * 0.004)  # a moment later
            os.kill(actor.pid, signal.SIGKILL)
            actor.kill_after = None

    def _end(self, key: selectors.SelectorKey) -> None:
        self._actors.unregister(key.fd)
        os.close(key.fd)
        status = wait(key.data.pid)
        self.done["lives"] += key.data.name == "writer"
        self.done["killed"] += status == KILLED
        expect(status in (0, KILLED), f"{key.data.name} ended with status {status}")

    def _check_folder(self) -> None:
        root, store = self.root, SnapshotStore(self.root)
        store.prepare()  # as the next run would: it removes temporary files of dead processes
        store.remove_hidden()  # also those hidden just now; a snapshot that was pinned too late comes back
        journal = self.journal.read()
        existing = {path.name for path in root.iterdir()}
        whole = {path.parent.name for path in root.glob("step-*/rank-00000-of-00001.safetensors")}
        expect(journal.durable <= whole | journal.hidden, f"lost: {journal.durable - whole - journal.hidden}")
        expect(journal.pinned <= whole, f"pinned and lost: {journal.pinned - whole}")
        strange = {name for name in existing if not name.startswith(("step-", "closed-", "pin-"))}
        strange |= {str(path.relative_to(root)) for path in root.glob("*/*") if path.name[:5] != "rank-"}
        expect(not strange, f"left behind: {strange}")
        expect(store.verify() == [], f"verify() returns {store.verify()}")
        for run in store.runs():
            for snapshot in store.snapshots(run):
                expect(data_of(snapshot) == self.truth.expected[snapshot.step], f"{snapshot.paths[0]} has other bits")
        self.done["hidden"], self.done["kept"] = len(journal.hidden), len(whole)
        self.done["owners"] = len({parsed[1] for name in existing if (parsed := parse_folder_name(name))})
        journal.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="begin no further round after so long")
    parser.add_argument("--lives", type=int, default=Share.lives, help="training runs in a round, at least")
    parser.add_argument("--rounds", type=int, default=Share.rounds, help="turns of each reader and pruner in a round")
    parser.add_argument("--syntheses", type=int, default=Share.syntheses, help="runs of the worker in a round")
    parser.add_argument("--seed", type=int, default=None, help="of a soak to repeat (the order of events still varies)")
    options = parser.parse_args(argv)
    seed = random.randrange(10**9) if options.seed is None else options.seed
    chance, began, total, folders = random.Random(seed), time.monotonic(), Counter[str](), 0
    torch.set_num_threads(1)
    torch.compiler.disable(lambda: None)  # imports for seconds when first used: here, once, and not in every run
    with tempfile.TemporaryDirectory() as parent:
        truth = actors.Truth(run_undisturbed(Path(parent) / "undisturbed", actors.MOST_STEPS, 1))
        truth.check_snapshots()
        while not folders or time.monotonic() - began < options.seconds:
            one = Round(Path(parent) / f"folder-{folders}", truth, random.Random(chance.random()))
            try:
                with record_hiding(one.journal.note):
                    one.run(Share(options.lives, options.rounds, options.syntheses))
            except BaseException as error:
                error.args = (f"{error}\n[seed {seed}, folder {folders}, {dict(one.done)}]",)
                raise
            total += one.done
            folders += 1
    print(
        f"{folders} folders, seed {seed}: {total['lives']} training runs and {total['pruner']} turns of a pruner, "
        f"{total['killed']} of these processes killed; {total['kept']} snapshots kept, {total['hidden']} hidden; "
        f"{total['reader'] + total['reader 2']} turns of readers and {total['worker']} of the worker, no wrong answer"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
