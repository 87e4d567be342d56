"""Training, reading and starting again on a disk whose calls fail: ``python -m tests.crash.faults``.

One process imports torch, with a library that lets calls fail (``faulty_disk``), and forks a process for each part of a
case. In most cases a trainer takes a snapshot at every step while calls fail. It may be refused at its construction, or
lose snapshots, which it reports. Then nothing fails any more, and another trainer goes on in the folder. In the other
cases calls fail while a sound folder is listed, verified and read.

The fixed cases state what happens. Random ones must keep the promises: what was acknowledged is there and whole,
everything else was reported with its path, nothing is called damaged that is not, and the next run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

import nitrous_ema.snapshots.filesystem
from nitrous_ema import AsyncPostHocEMA, SnapshotStore
from nitrous_ema.errors import NitrousError, SnapshotError
from nitrous_ema.synthesis import synthesize
from tests.crash.faulty_disk import CALLS, Fault, calls_failed, library, set_faults
from tests.crash.kills import data_of, expect, fork, one_step, run_undisturbed, wait

nitrous_ema.snapshots.filesystem._WAITS_SECONDS = (0.0,) * 3  # no file system recovers here by waiting
TIMEOUT_SECONDS = 60
STEPS, MORE_STEPS = 6, 3
KEPT = 3
_ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINVAL", "ENOTSUP", "ESTALE", "ETIMEDOUT", "EPERM", "EXDEV", "EMFILE", "EBADF")
_READING = ("list", "open", "read")


class Case(NamedTuple):
    """Calls that fail, and what happens."""

    faults: tuple[Fault, ...]
    expected: str | None
    """What the trainer, or the reader, reports; None where that is left to chance."""
    keep: int | str = "all"
    is_reading: bool = False
    """Whether the calls fail while the folder is read, and not in training."""

    def __str__(self) -> str:
        options = [f"keep={self.keep}"] * (self.keep != "all") + ["reader"] * self.is_reading
        return "; ".join(map(str, self.faults)) + (f" ({', '.join(options)})" if options else "")


def _case(call: str, error: str, expected: str, after: int = 0, times: int = 10**9, keep: int | str = "all") -> Case:
    return Case((Fault(call, error, after, times),), expected, keep)


def _reader(call: str, error: str, expected: str, after: int = 0, times: int = 10**9) -> Case:
    return Case((Fault(call, error, after, times),), expected, is_reading=True)


REFUSED, SAME = "refused at construction", "no difference"
CASES = (
    # A file system that lacks a call.
    _case("fsync-folder", "EINVAL", SAME),
    _case("fsync-folder", "EBADF", SAME),
    _case("fsync-folder", "ENOTSUP", SAME),
    _case("preallocate", "EOPNOTSUPP", SAME),
    _case("free-space", "ENOSYS", SAME),
    _case("rename-folder", "EXDEV", SAME, keep=KEPT),
    _case("rename-folder", "EMFILE", SAME, keep=KEPT),
    _case("write-at", "EINVAL", SAME),
    _case("write-at", "ESPIPE", SAME),
    Case((Fault("rename", "ENOSYS"), Fault("write-at", "EINVAL"), Fault("rename-folder", "ENOSYS")), SAME, KEPT),
    # Calls that fail once are healed by a new file.
    _case("create", "EIO", SAME, after=1, times=1),
    _case("write", "EIO", SAME, after=5, times=1),
    _case("fsync", "EIO", SAME, after=2, times=1),
    _case("close", "EIO", SAME, after=20, times=1),
    _case("rename", "EIO", SAME, after=2, times=1),
    # A disk that is full, or fails, for a while.
    _case("write", "ENOSPC", "1 of 6 snapshots lost", after=5, times=2),
    _case("preallocate", "EDQUOT", "1 of 6 snapshots lost", after=1, times=2),
    _case("mkdir", "ENOSPC", "2 of 6 snapshots lost", after=1, times=4),
    _case("create", "ENOSPC", "5 of 6 snapshots lost", after=2),
    _case("fsync", "EIO", "6 of 6 snapshots lost", after=1),
    _case("fsync-folder", "EIO", "1 of 6 snapshots lost", after=9, times=1),
    _case("create", "ENOSPC", REFUSED),
    _case("write", "EIO", REFUSED),
    _case("mkdir", "EROFS", REFUSED),
    _case("fsync", "ESTALE", REFUSED),
    # What cannot be removed stays, and is removed later.
    _case("unlink", "EIO", SAME, after=1, keep=KEPT),
    _case("rename-folder", "EIO", SAME, keep=KEPT),
    # Readers.
    _reader("list", "ESTALE", SAME, times=2),
    _reader("open", "ETIMEDOUT", SAME, times=3),
    _reader("read", "ENOTCONN", SAME, after=7, times=3),
    _reader("read", "EIO", SAME, after=1, times=1),
    _reader("list", "ETIMEDOUT", "SnapshotError"),
    _reader("open", "ESTALE", "SnapshotUnavailable"),
    _reader("read", "EIO", "SnapshotUnavailable"),
)


def random_cases(chance: random.Random) -> Iterator[Case]:
    """Yield cases without an end: one or two kinds of calls fail, some of the time."""
    while True:
        is_reading = chance.random() < 0.25
        calls = chance.sample(_READING if is_reading else CALLS, k=chance.randrange(1, 3))
        faults = (
            Fault(call, chance.choice(_ERRORS), chance.randrange(12), chance.choice((1, 1, 2, 3, 10**9)))
            for call in calls
        )
        yield Case(tuple(faults), None, "all" if is_reading else chance.choice(("all", KEPT)), is_reading)


def check(case: Case, root: Path, sound: Path, expected: dict[int, bytes]) -> str:
    """Check one case. Returns what happened, or raises AssertionError.

    Args:
        case: The case.
        root: A folder that does not exist.
        sound: A folder of snapshots, for readers.
        expected: Data of the snapshot of each step.
    """
    if case.is_reading:
        whole, found = in_child(read, sound), in_child(read, sound, case.faults)
        expect(case.expected is None or found["failed"], "no call has failed")
        if found["error"] is None:
            expect(found == whole | {"failed": found["failed"]}, f"readers find {found} instead of {whole}")
            return SAME
        expect(str(sound) in found["message"], f"a message does not name the folder: {found['message']}")
        return str(found["error"])
    found = in_child(train, root, case.faults, case.keep, STEPS)
    expect(case.expected is None or found["failed"], "no call has failed")
    reported, acknowledged = found["reported"], found["acknowledged"]
    for message in reported:
        expect(str(root) in message, f"a message does not name the folder: {message}")
    if not root.exists():
        return REFUSED
    listed = _listed(root, expected)
    if case.keep == "all":
        expect(set(acknowledged) <= set(listed), f"acknowledged {acknowledged}, listed {listed}")
    elif acknowledged:
        expect(acknowledged[-1] in listed, f"the newest, {acknowledged[-1]}, is not listed: {listed}")
    expect(found["refused"] or reported or len(acknowledged) == STEPS, f"only {acknowledged} and no report")
    again = in_child(train, root, (), case.keep, MORE_STEPS)
    last = max(listed, default=0)
    expect(again["acknowledged"] == [*range(last + 1, last + 1 + MORE_STEPS)], f"the next run reports {again}")
    after = _listed(root, expected)
    expect(after[-1] == last + MORE_STEPS, f"the next run leaves {after}")
    if case.keep == "all":
        expect(after[:-MORE_STEPS] == listed, f"the next run changes {listed} to {after}")
    else:
        expect(len(after) == KEPT, f"keep={KEPT} leaves {after}")
        store = SnapshotStore(root)
        expect(not store.hidden(), f"hidden snapshots are left: {store.hidden()}")
    if found["refused"]:
        return REFUSED
    lost = STEPS - len(acknowledged)
    return f"{lost} of {STEPS} snapshots lost" if lost else SAME


def _listed(root: Path, expected: dict[int, bytes]) -> list[int]:
    """Return the steps that are listed, after checking every file."""
    store = SnapshotStore(root)
    expect(store.verify() == [], f"verify() returns {store.verify()}")
    snapshots = store.snapshots()
    for snapshot in snapshots:
        expect(data_of(snapshot) == expected[snapshot.step], f"{snapshot.paths[0]} has other bits")
    return [snapshot.step for snapshot in snapshots]


def train(root: Path, faults: Sequence[Fault], keep: int | str, steps: int) -> dict[str, Any]:
    """Train for some steps, from the newest snapshot on. Returns steps acknowledged, and messages."""
    reported: list[str] = []
    set_faults(root, *faults)
    model = torch.nn.Linear(20, 10)
    options = {"checkpoint_every_num_steps": 1, "checkpoint_folder": root, "keep": keep, "on_error": "warn"}
    try:
        ema = AsyncPostHocEMA(model, **options)
    except SnapshotError as error:
        return {"refused": True, "acknowledged": [], "reported": [str(error)]}
    if not faults and ema.snapshots.runs():
        ema.restore()
    acknowledged = []
    for step in range(ema.step + 1, ema.step + 1 + steps):
        before = ema.stats().snapshots
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one_step(ema, model, step)
            ema.flush(TIMEOUT_SECONDS)
        reported += [str(each.message) for each in caught]
        if ema.stats().snapshots > before:
            acknowledged.append(step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(SnapshotError):  # the note that the run is closed
            ema.close(TIMEOUT_SECONDS)
    reported += [str(each.message) for each in caught]
    return {"refused": False, "acknowledged": acknowledged, "reported": reported}


def read(root: Path, faults: Sequence[Fault] = ()) -> dict[str, Any]:
    """List, verify and read a folder. Returns what was found, or the error."""
    set_faults(root, *faults)
    store = SnapshotStore(root)
    try:
        steps = [snapshot.step for snapshot in store.snapshots()]
        average = synthesize(root, sigma_rels=[0.07], tolerance=0).flats[0].sum()
        problems = [problem.message for problem in store.verify()]
    except NitrousError as error:
        return {"error": type(error).__name__, "message": str(error)}
    if problems:
        return {"error": "VerificationFailure", "message": problems[0]}
    return {"error": None, "steps": steps, "average": float(average)}


def in_child(work: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Return what a function returns in a process of its own; raise AssertionError where that process fails."""
    read_end, write_end = os.pipe()

    def report() -> None:
        os.close(read_end)
        found = work(*arguments)
        os.write(write_end, json.dumps(found | {"failed": calls_failed()}).encode())

    child = fork(report)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        found = pipe.read()
    expect(wait(child) == 0, f"{work.__name__}() ended with an exception")
    return json.loads(found)  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.faults", description=__doc__)
    parser.add_argument("--random", type=int, default=300, help="random cases after the fixed ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args(argv)
    preloaded = str(library())
    if os.environ.get("LD_PRELOAD") != preloaded:
        command = [sys.executable, "-m", "tests.crash.faults", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env={**os.environ, "LD_PRELOAD": preloaded}, check=False).returncode
    torch.set_num_threads(1)
    torch.compiler.disable(lambda: None)  # imports for seconds when first used: here, once, and not in every run
    wrong = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        sound = Path(parent) / "sound"
        expected = run_undisturbed(sound, most_steps=STEPS + MORE_STEPS, every_steps=1)
        random_ones = itertools.islice(random_cases(random.Random(options.seed)), options.random)
        for number, case in enumerate((*CASES, *random_ones)):
            try:
                found = check(case, Path(parent) / f"folder-{number}", sound, expected)
                is_right = case.expected in (None, found)
            except AssertionError as error:
                found, is_right = str(error), False
            wrong += not is_right
            if case.expected is not None or not is_right:
                print(f"{'' if is_right else 'WRONG '}| {case} | {found} |", flush=True)
    print(f"{len(CASES)} fixed and {options.random} random cases (seed {options.seed}), {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
