"""Recorded writing runs: what the store did to a disk, and the errors that its callers received."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nitrous_ema.errors import SnapshotError, SnapshotNotFound, SnapshotWriteError
from tests.crash.disk import EMPTY, Crashed, Disk, Killed, Turns, Violation
from tests.crash.subject import Subject

ROOT = Path("/run/snapshots")
A, B, C, D = (f"2026112{day}T101530.123456-1a2b3c4d" for day in range(1, 5))

# Which runs each continued, and the step at which it left them. D is what a restart after a crash writes; its history
# is that of what it finds.
LINEAGES = {A: ((A, None),), B: ((A, 20), (B, None)), C: ((C, None),)}


@dataclass(frozen=True)
class Recording:
    """The facts about a run."""

    name: str
    start: Crashed
    disk: Disk
    lineages: Mapping[str, tuple[tuple[str, int | None], ...]]
    world_size: int
    failures: Sequence[SnapshotError]
    """Errors that callers received."""
    num_failures: int = 0
    """Number of errors that callers must receive."""


class Player:
    """Writes to a disk, and records promises and errors.

    Args:
        subject: The store to use.
        disk: The disk to write to.
        world_size: Files of a snapshot.
        lineages: The history of each run.
    """

    def __init__(self, subject: Subject, disk: Disk, world_size: int = 1, lineages: Mapping = LINEAGES) -> None:
        self.subject, self.disk, self.world_size, self.lineages = subject, disk, world_size, lineages
        self.store = subject.store.SnapshotStore(ROOT, files=disk)
        self.layout = layout(subject, world_size)
        self.failures: list[SnapshotError] = []
        subject.processes.start()

    def start_process(self) -> None:
        """Another process goes on with the disk of one that was killed."""
        self.disk.start_process()
        self.subject.processes.start()

    def prepare(self) -> None:
        """Prepare the store, as the construction of an EMA does."""
        self.store.prepare()
        self.disk.promise(str(ROOT), b"")

    def write(self, step: int, run: str = A, rank: int = 0, variant: int = 0) -> None:
        """Write one snapshot, or record the error."""
        bytes_ = content(self.layout.data_bytes, step, run, rank, variant)
        stamp = self.subject.header.Stamp(
            step=step,
            t=step,
            t_first=1,
            run=run,
            lineage=self.lineages[run],
            rank=rank,
            world_size=self.world_size,
            offsets=offsets(rank, self.world_size),
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

    def hide(self, *steps: int) -> None:
        """Hide snapshots of A that are still there."""
        existing = [each for each in self.store.examine(A).snapshots if each.step in steps]
        for each in existing:
            self.disk.withdraw(str(each.paths[0].parent))
        try:
            self.store.hide(existing)
        except SnapshotError as error:
            self.failures.append(error)
            return
        for each in existing:
            self.disk.promise_gone(str(each.paths[0].parent))

    def pin(self, step: int) -> None:
        """Pin a snapshot of A, if it is there."""
        with contextlib.suppress(SnapshotNotFound):
            self.store.pin(step, A)
            self.disk.promise(note_of(step), b"")

    def unpin(self, step: int) -> None:
        self.disk.withdraw(note_of(step))
        self.store.unpin(step, A)
        self.disk.promise_gone(note_of(step))

    def expect_hidden(self, count: int) -> None:
        """Check the number of hidden snapshots."""
        found = self.store.hidden()
        if len(found) != count:
            raise Violation(f"hidden are {[path.name for path in found]}, expected {count} of them")

    def close(self, run: str = A) -> None:
        """Close the run, as the end of training does."""
        self.store.close_run(run)
        self.disk.promise(f"{ROOT}/closed-{run}", b"")


def note_of(step: int) -> str:
    """Return the path of the note that pins a snapshot of A."""
    return f"{ROOT}/pin-{step:012d}-{A}"


def content(size_bytes: int, step: int, run: str, rank: int, variant: int = 0) -> bytes:
    """Return the data of a rank's file, which differs from that of every other file."""
    return hashlib.shake_128(f"{step} {run} {rank} {variant}".encode()).digest(size_bytes)


def offsets(rank: int, world_size: int) -> tuple[tuple[int, ...], ...] | None:
    """Return where the parts of a rank begin, in the order of the tensors of ``layout``."""
    return None if world_size == 1 else ((10 * rank, 0), (3 * rank,))


def layout(subject: Subject, world_size: int = 1) -> object:
    """Return a layout of two profiles of 100 numbers and a counter: 824 bytes in three chunks, 4920 with the header.

    Several ranks have as many numbers each, as parts of larger tensors.
    """
    record = subject.header.TensorRecord

    def part(shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if world_size == 1 else shape

    return subject.header.Layout(
        records=(
            record(
                name="w", keys=("w",), dtype="F32", shape=(10 * world_size, 10), role="averaged", part=part((10, 10))
            ),
            record(name="n", keys=("n",), dtype="I64", shape=(3 * world_size,), role="copied", part=part((3,))),
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
    """B continues A at step 20, so A's snapshot of step 30 is an abandoned future; then C forgets to resume."""
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
    player.start_process()
    player.prepare()
    player.write(10, C)


def _thinned(player: Player, seed: int) -> None:
    """As ``keep=`` does it: superfluous snapshots are hidden after a new one, and removed before the next one."""
    player.prepare()
    for step in (10, 20, 30, 40):
        player.store.remove_hidden()
        for rank in range(player.world_size):
            player.write(step, rank=rank)
        if step == 20:
            player.pin(20)
        if step == 30:
            player.hide(10)
            player.hide(20)  # refused
            player.unpin(20)
    player.hide(20, 30)
    player.hide(40)  # refused: the newest
    player.prepare()  # another process starts
    player.expect_hidden(2)
    player.close()


def _thinned_by_two(player: Player, seed: int) -> None:
    _write_all(player, 10, 20)
    _together(player, seed, *(lambda: [player.hide(10), player.store.remove_hidden()] for _ in range(2)))


def _pinned_meanwhile(player: Player, seed: int) -> None:
    """A pin that comes too late for hide() may fail, or bring the snapshot back."""
    _write_all(player, 10, 20)
    remove, look = player.store.remove_hidden, player.store.get
    works = (
        lambda: [*(look() for _ in range(4)), player.pin(10)],
        lambda: [player.hide(10), remove()],
        lambda: [look(), look(), remove()],
    )
    _together(player, seed, *works)
    remove()
    player.failures.clear()  # hide() may refuse


def _pinned_too_late(player: Player, seed: int) -> None:
    """A pin is set after hide() has looked for it, before hide() renames."""
    _write_all(player, 10, 20)
    player.disk.meanwhile["rename_new"] = lambda: player.pin(10)
    player.hide(10)
    player.store.remove_hidden()


def _killed_while_thinning(player: Player, seed: int) -> None:
    """The process is killed at its call ``seed`` since it began to hide; another process does the same again."""
    _write_all(player, 10, 20)
    player.disk.kill_at(seed)
    with contextlib.suppress(Killed):
        player.hide(10)
        player.store.remove_hidden()
    player.start_process()
    player.prepare()
    player.hide(10)
    player.store.remove_hidden()


def _swept_while_writing(player: Player, seed: int) -> None:
    """Files of a dead process and their folder are removed while another process of the run begins to write there."""
    player.prepare()
    player.disk.kill_at(4)
    with contextlib.suppress(Killed):
        player.write(10)
    player.start_process()
    _together(player, seed, lambda: player.prepare(), lambda: player.write(10))


def _write_all(player: Player, *steps: int) -> None:
    player.prepare()
    for step in steps:
        for rank in range(player.world_size):
            player.write(step, rank=rank)


def _threads(player: Player, seed: int) -> None:
    player.prepare()
    _together(player, seed, *(lambda step=step: player.write(step) for step in (10, 20, 30)))


def _twins(player: Player, seed: int) -> None:
    """Two copies of one process write different bytes under one name."""
    player.prepare()
    _together(player, seed, *(lambda variant=variant: player.write(10, variant=variant) for variant in (0, 1)))


def _together(player: Player, seed: int, *works: Callable[[], object]) -> None:
    player.disk.turns = turns = Turns(seed)
    turns.run(*works)
    player.disk.turns = None


class _Plan(NamedTuple):
    play: Callable[[Player, int], None]
    options: Mapping[str, Any] = {}
    """Options of the disk. To count its faults: prepare() makes one write, fsync and close; a snapshot makes 4 writes,
    one fsync and one close."""
    world_size: int = 1
    num_failures: int = 0
    """Number of errors that callers must receive."""


_EIO, _ENOSPC = errno.EIO, errno.ENOSPC
_PLANS = {
    "one rank": _Plan(_one_rank),
    "resumed, later forgotten": _Plan(_resumed),
    "two ranks": _Plan(_ranks, world_size=2),
    "three ranks": _Plan(_ranks, world_size=3),
    "three writer threads": _Plan(_threads),
    "ranks that start together": _Plan(_ranks_that_start_together, world_size=2),
    "killed and started again": _Plan(_killed),
    "killed in one pass": _Plan(_killed, {"one_pass": True}),
    "thinned": _Plan(_thinned, num_failures=2),
    "thinned by two at once": _Plan(_thinned_by_two, {"turns_to_look": True}, world_size=2),
    "pinned meanwhile": _Plan(_pinned_meanwhile, {"turns_to_look": True}, world_size=2),
    "pinned too late": _Plan(_pinned_too_late, world_size=2),
    "killed while thinning": _Plan(_killed_while_thinning, world_size=2),
    "thinned file by file": _Plan(_thinned, {"keeps_folders": True}, num_failures=2),
    "thinned file by file by two at once": _Plan(
        _thinned_by_two, {"keeps_folders": True, "turns_to_look": True}, world_size=2
    ),
    "pinned meanwhile, file by file": _Plan(
        _pinned_meanwhile, {"keeps_folders": True, "turns_to_look": True}, world_size=2
    ),
    "killed while thinning file by file": _Plan(_killed_while_thinning, {"keeps_folders": True}, world_size=2),
    "swept while writing": _Plan(_swept_while_writing, {"turns_to_look": True}),
    "fsync fails once": _Plan(_one_rank, {"faults": {("fsync", 2): _EIO}}),
    "fsync fails twice": _Plan(_one_rank, {"faults": {("fsync", 2): _EIO, ("fsync", 3): _EIO}}, num_failures=1),
    "close fails once": _Plan(_one_rank, {"faults": {("close", 2): _EIO}}),
    "disk full for one write": _Plan(_one_rank, {"faults": {("write_at", 7): _ENOSPC}}),
    "disk full for two": _Plan(
        _one_rank, {"faults": {("write_at", 7): _ENOSPC, ("write_at", 9): _ENOSPC}}, num_failures=1
    ),
    "no preallocation": _Plan(_one_rank, {"faults": {("preallocate", n): errno.ENOTSUP for n in range(9)}}),
    "rename fails once": _Plan(_one_rank, {"faults": {("rename_new", 1): _EIO}}),
    "fsync of a snapshot's folder fails": _Plan(_one_rank, {"faults": {("fsync_folder", 4): _EIO}}, num_failures=1),
    "fsync of ROOT fails": _Plan(_one_rank, {"faults": {("fsync_folder", 5): _EIO}}, num_failures=1),
    "short writes and reads": _Plan(_one_rank, {"most_bytes": 1500}),
    "twins": _Plan(_twins, num_failures=1),
    "twins without renameat2": _Plan(_twins, {"replaces_only": True}, num_failures=1),
}

KILLED_IN_ONE_PASS = "killed in one pass"
NAMES = tuple(name for name in _PLANS if name != KILLED_IN_ONE_PASS)
"""Runs after which a machine may stop. Files that are written in one pass are as safe then as their file system."""
KILLED, KILLED_THINNING = "killed and started again", "killed while thinning"
KILLED_BY_FILES = "killed while thinning file by file"
KILLS = {KILLED: range(32), KILLED_THINNING: range(4, 18), KILLED_BY_FILES: range(4, 24)}
"""Moments at which these can be killed: the seeds of their runs."""
_AT_ONCE = (
    _ranks,
    _ranks_that_start_together,
    _threads,
    _twins,
    _thinned_by_two,
    _pinned_meanwhile,
    _swept_while_writing,
)
RACES = (
    *("thinned by two at once", "thinned file by file by two at once"),
    *("pinned meanwhile", "pinned meanwhile, file by file"),
    "swept while writing",
)
"""Runs that depend much on whose turn it is, and little on when the machine stops."""
SEEDED = tuple(n for n in NAMES if _PLANS[n].play in _AT_ONCE)
"""Runs in which several write at once: a seed decides whose turn it is."""


def record(name: str, subject: Subject, seed: int = 0) -> Recording:
    """Record a run that writes to a disk in memory.

    Args:
        name: One of ``NAMES``.
        subject: The store to use.
        seed: Decides whose turn it is in runs where several write at once.
    """
    plan = _PLANS[name]
    disk = Disk(**plan.options)
    player = Player(subject, disk, plan.world_size)
    plan.play(player, seed)
    return Recording(name, EMPTY, disk, LINEAGES, plan.world_size, player.failures, plan.num_failures)
