"""Writing runs, recorded: what the store did to a disk, and what its callers were told."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nitrous_ema.errors import SnapshotError, SnapshotWriteError
from tests.crash.disk import EMPTY, Crashed, Disk, Killed, Turns
from tests.crash.subject import Subject

ROOT = Path("/run/snapshots")
A, B, C, D = (f"2026112{day}T101530.123456-1a2b3c4d" for day in range(1, 5))

# Which runs each continued, and the step at which it left them. D is what a restart after a crash writes; its history
# is that of what it finds.
LINEAGES = {A: ((A, None),), B: ((A, 20), (B, None)), C: ((C, None),)}


@dataclass(frozen=True)
class Recording:
    """What is known about a run."""

    name: str
    start: Crashed
    disk: Disk
    lineages: Mapping[str, tuple[tuple[str, int | None], ...]]
    world_size: int
    failures: Sequence[SnapshotError]
    """What callers were told."""
    num_told: int = 0
    """How many failures there were to tell."""
    is_clean: bool = True
    """Nobody was killed, so no temporary file may be left."""


class Player:
    """Writes to a disk and notes what it is told.

    Args:
        subject: The store to use.
        disk: What it writes to.
        world_size: Files of a snapshot.
        lineages: The history of each run.
    """

    def __init__(self, subject: Subject, disk: Disk, world_size: int = 1, lineages: Mapping = LINEAGES) -> None:
        self.subject, self.disk, self.world_size, self.lineages = subject, disk, world_size, lineages
        self.store = subject.store.SnapshotStore(ROOT, files=disk)
        self.layout = layout(subject)
        self.failures: list[SnapshotError] = []

    def prepare(self) -> None:
        """As at construction of an EMA."""
        self.store.prepare()
        self.disk.promise(str(ROOT), b"")

    def write(self, step: int, run: str = A, rank: int = 0, variant: int = 0) -> None:
        """One snapshot, or the error that tells that there is none."""
        bytes_ = content(self.layout.data_bytes, step, run, rank, variant)
        stamp = self.subject.format.Stamp(
            step=step,
            t=step,
            t_first=1,
            run=run,
            lineage=self.lineages[run],
            rank=rank,
            world_size=self.world_size,
            trainer={"host": "here", "pid": 1},
            created_ns=variant,
        )
        try:
            snapshot = self.store.write(self.layout, stamp, lambda: [bytes_[b:e] for b, e in self.layout.chunks])
        except SnapshotWriteError as error:
            self.failures.append(error)
            return
        path = str(snapshot.paths[0])
        meant = [whole for whole in self.disk.finished.get(path, ()) if whole.endswith(bytes_)]
        self.disk.promise(path, meant[-1] if meant else b"never written")

    def close(self, run: str = A) -> None:
        """As at the end of training."""
        self.store.close_run(run)
        self.disk.promise(f"{ROOT}/closed-{run}", b"")


def content(size_bytes: int, step: int, run: str, rank: int, variant: int = 0) -> bytes:
    """What a rank's file holds: like nothing else's."""
    return hashlib.shake_128(f"{step} {run} {rank} {variant}".encode()).digest(size_bytes)


def layout(subject: Subject) -> object:
    """Two profiles of 100 numbers and a counter: 824 bytes in three chunks, 4920 with the header."""
    record = subject.format.TensorRecord
    return subject.format.Layout(
        records=(
            record(name="w", keys=("w",), dtype="F32", shape=(10, 10), role="averaged"),
            record(name="n", keys=("n",), dtype="I64", shape=(3,), role="copied"),
        ),
        gammas=(6.94, 16.97),
        sigma_rels=(0.10, 0.05),
        chunk_bytes=512,
    )


def _one_rank(player: Player, seed: int) -> None:
    player.prepare()
    for step in (10, 20, 30):
        player.write(step)
    player.close()


def _resumed(player: Player, seed: int) -> None:
    """B continues A at step 20, so A's snapshot of step 30 is an abandoned future; then somebody forgets to resume."""
    player.prepare()
    for step in (10, 20, 30):
        player.write(step, A)
    player.prepare()
    for step in (25, 35):
        player.write(step, B)
    player.close(B)
    player.prepare()
    player.write(10, C)


def _ranks(player: Player, seed: int) -> None:
    def rank(number: int) -> Callable[[], None]:
        return lambda: [player.write(step, rank=number) for step in (10, 20)]

    player.prepare()
    _together(player, seed, *map(rank, range(player.world_size)))


def _ranks_that_start_together(player: Player, seed: int) -> None:
    def rank(number: int) -> Callable[[], None]:
        return lambda: [player.prepare(), player.write(10, rank=number)]

    _together(player, seed, *map(rank, range(player.world_size)))


def _killed(player: Player, seed: int) -> None:
    """The process is killed, at its call number ``seed``; another starts. The machine has not stopped so far."""
    player.disk.kill_at(seed)
    with contextlib.suppress(Killed):
        player.prepare()
        player.write(10)
        player.write(20)
    player.disk.start_process()
    player.prepare()
    player.write(10, C)


def _threads(player: Player, seed: int) -> None:
    player.prepare()
    _together(player, seed, *(lambda step=step: player.write(step) for step in (10, 20, 30)))


def _twins(player: Player, seed: int) -> None:
    """Two copies of one process write under one name, not the same bytes."""
    player.prepare()
    _together(player, seed, *(lambda variant=variant: player.write(10, variant=variant) for variant in (0, 1)))


def _together(player: Player, seed: int, *works: Callable[[], object]) -> None:
    player.disk.turns = turns = Turns(seed)
    turns.run(*works)
    player.disk.turns = None


class _Plan(NamedTuple):
    play: Callable[[Player, int], None]
    options: Mapping[str, Any] = {}
    """Of the disk. For its faults: prepare() makes one write, fsync and close; a snapshot 4 writes, and one of each."""
    world_size: int = 1
    num_told: int = 0
    """Failures that callers must be told."""
    is_clean: bool = True
    """Nothing is killed, so no temporary file may be left."""


_EIO, _ENOSPC = errno.EIO, errno.ENOSPC
_PLANS = {
    "one rank": _Plan(_one_rank),
    "resumed, later forgotten": _Plan(_resumed),
    "two ranks": _Plan(_ranks, world_size=2),
    "three ranks": _Plan(_ranks, world_size=3),
    "three writer threads": _Plan(_threads),
    "ranks that start together": _Plan(_ranks_that_start_together, world_size=2),
    "killed and started again": _Plan(_killed, is_clean=False),
    "fsync fails once": _Plan(_one_rank, {"faults": {("fsync", 2): _EIO}}),
    "fsync fails twice": _Plan(_one_rank, {"faults": {("fsync", 2): _EIO, ("fsync", 3): _EIO}}, num_told=1),
    "close fails once": _Plan(_one_rank, {"faults": {("close", 2): _EIO}}),
    "disk full for one write": _Plan(_one_rank, {"faults": {("write_at", 7): _ENOSPC}}),
    "disk full for two": _Plan(_one_rank, {"faults": {("write_at", 7): _ENOSPC, ("write_at", 9): _ENOSPC}}, num_told=1),
    "no preallocation": _Plan(_one_rank, {"faults": {("preallocate", n): errno.ENOTSUP for n in range(9)}}),
    "rename fails once": _Plan(_one_rank, {"faults": {("rename_new", 1): _EIO}}),
    "fsync of a snapshot's folder fails": _Plan(_one_rank, {"faults": {("fsync_folder", 4): _EIO}}, num_told=1),
    "fsync of ROOT fails": _Plan(_one_rank, {"faults": {("fsync_folder", 5): _EIO}}, num_told=1),
    "short writes and reads": _Plan(_one_rank, {"most_bytes": 1500}),
    "twins": _Plan(_twins, num_told=1),
    "twins without renameat2": _Plan(_twins, {"replaces_only": True}, num_told=1),
}

NAMES = tuple(_PLANS)
KILLED = "killed and started again"
NUM_KILLS = 32
"""Moments at which that one can be killed: the seeds of its runs."""
SEEDED = tuple(n for n in NAMES if _PLANS[n].play in (_ranks, _ranks_that_start_together, _threads, _twins))
"""Those in which several write at once: a seed decides whose turn it is."""


def record(name: str, subject: Subject, seed: int = 0) -> Recording:
    """Have a run write to a disk in memory.

    Args:
        name: One of ``NAMES``.
        subject: The store to use.
        seed: Decides whose turn it is where several write at once.
    """
    plan = _PLANS[name]
    disk = Disk(**plan.options)
    player = Player(subject, disk, plan.world_size)
    plan.play(player, seed)
    return Recording(name, EMPTY, disk, LINEAGES, plan.world_size, player.failures, plan.num_told, plan.is_clean)
