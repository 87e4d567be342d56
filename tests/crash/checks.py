"""The conditions that must hold on every disk that a crash may leave, and campaigns that check them on all disks.

The oracle reads names and bytes from the disk by itself. It knows what each file was meant to hold, and which run
continued which. The store must return exactly what the oracle finds.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotNotFound, SnapshotWriteError
from tests.crash import runs
from tests.crash.disk import (
    Crashed,
    Disk,
    Failed,
    Linked,
    Promised,
    PromisedGone,
    Synced,
    Violation,
    Withdrawn,
    is_final,
)
from tests.crash.runs import ROOT, D, Player, Recording
from tests.crash.states import CrashPoint, crash_points, states
from tests.crash.subject import Subject

_IN_TRASH = re.compile(r"/\.trash-(step-[0-9]+-[0-9T]+\.[0-9]+-[0-9a-f]+)(\.[0-9a-f]+)?/")


@dataclass
class Tally:
    """Counts of what a campaign has checked."""

    crash_points: int = 0
    built: int = 0
    """Disks that were built."""
    distinct: int = 0
    """Disks that differ in a name or a byte; readers were run on each."""
    restarts: int = 0
    """Disks that differ in a name, or in bytes under a final name; a writer was restarted on each."""
    second: int = 0
    """Distinct disks after a second crash, of the restarted writer."""

    def add(self, other: Tally) -> None:
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Depth:
    """How far a campaign goes."""

    subsets: int = 1024
    samples: int = 4
    second_crash_of: int = 40
    """One restarted writer in so many crashes as well."""


@dataclass
class _Truth:
    """The findings of the oracle on one disk."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Files with final names, by path."""
    folders: list[Path] = field(default_factory=list)
    committed: set[tuple[int, str]] = field(default_factory=set)
    hidden: dict[str, bytes] = field(default_factory=dict)
    """Files of hidden snapshots, by the paths that they had."""
    unlinking: dict[str, bytes] = field(default_factory=dict)
    """Files of snapshots that are being removed, by the paths that they had."""
    trash: list[Path] = field(default_factory=list)
    pins: set[tuple[int, str]] = field(default_factory=set)
    dropped: set[tuple[int, str]] = field(default_factory=set)
    """Snapshots that a note hides, unless they are pinned."""


def check_crashes(recording: Recording, subject: Subject, depth: Depth | None = None) -> Tally:
    """Check every disk that a crash of this run may leave. Raises ``Violation``."""
    depth = depth or Depth()
    tally, seen, restarted = Tally(), set(), set()
    for point in crash_points(recording.disk.log, recording.start):
        tally.crash_points += 1
        for state in states(point, subsets=depth.subsets, samples=depth.samples):
            tally.built += 1
            listing = state.walk()
            key = (len(point.promises), *listing)
            if key in seen:
                continue
            seen.add(key)
            try:
                check_state(state, listing, point.promises, recording, subject)
                seen_by_a_writer = (len(point.promises), *map(_as_a_writer_sees, listing))
                if seen_by_a_writer not in restarted:
                    restarted.add(seen_by_a_writer)
                    again = len(restarted) % depth.second_crash_of == 0
                    tally.second += _check_restart(state, point.promises, recording, subject, again)
            except Violation as violation:
                raise _described(violation, recording, point, listing) from violation
    tally.distinct, tally.restarts = len(seen), len(restarted)
    check_trace(recording)
    check_failures(recording)
    return tally


def check_end(recording: Recording, subject: Subject) -> None:
    """Check the disk as it is when the run has ended, without a crash. Raises ``Violation``."""
    promises = [entry for entry in recording.disk.log if isinstance(entry, (Promised, Withdrawn, PromisedGone))]
    state = recording.disk.now()
    check_state(state, state.walk(), promises, recording, subject)
    check_trace(recording)
    check_failures(recording)


def _as_a_writer_sees(entry: tuple[str, bytes | None]) -> tuple[str, bytes | None]:
    """Blank the content of temporary files: no process opens one (see ``check_state``), but its name may matter."""
    return (entry[0], b"") if "/." in entry[0] else entry


def check_state(
    state: Crashed,
    listing: Sequence[tuple[str, bytes | None]],
    promises: Sequence[Promised],
    recording: Recording,
    subject: Subject,
) -> list[tuple[int, str]]:
    """Check that promises are kept and that readers find what is there. Returns the default listing."""
    truth = _look(listing, recording)
    _expect_promises_kept(dict(listing), truth, promises)
    for path, content in truth.files.items():
        if content not in recording.disk.finished.get(path, ()):
            raise Violation(f"{path} has its final name and is not whole")
    for path, content in (*truth.hidden.items(), *truth.unlinking.items()):
        if content not in recording.disk.finished.get(path, ()):
            raise Violation(f"{path} is hidden and not whole")
    disk = Disk(state, most_bytes=recording.disk.most_bytes)
    store = subject.store.SnapshotStore(ROOT, files=disk)
    try:
        return _expect_right_readers(store, truth, recording)
    except SnapshotNotFound:
        if str(ROOT) in dict(listing):
            raise
        return []
    except SnapshotError as error:
        raise Violation(f"a reader raises {error!r}") from error
    finally:
        if disk.open:
            raise Violation(f"readers left descriptors open: {disk.open}")
        if any(name.startswith(".") for name in disk.was_read):
            raise Violation(f"readers opened temporary files: {disk.was_read}")


def _look(listing: Sequence[tuple[str, bytes | None]], recording: Recording) -> _Truth:
    truth, present = _Truth(), Counter()
    for path, content in listing:
        name = path.rpartition("/")[2]
        if content is None and name.startswith("step-"):
            truth.folders.append(Path(path))
        elif content is None and name.startswith(".trash-"):
            truth.trash.append(Path(path))
        elif name.startswith("dropped-"):
            truth.dropped.add(_step_and_run(path))
        elif name.startswith("pin-"):
            truth.pins.add(_step_and_run(path))
        elif content is not None and (trash := _IN_TRASH.search(path)):
            hidden = truth.unlinking if trash[2] else truth.hidden
            hidden[path.replace(trash[0], f"/{trash[1]}/")] = content
        elif content is not None and is_final(path) and (".one-pass-" not in name or _has_its_size(content)):
            truth.files[path] = content
            present[path.rpartition("/")[0]] += 1
    for folder, count in present.items():
        if count == recording.world_size:
            truth.committed.add(_step_and_run(folder))
    for folder in [each for each in truth.folders if _step_and_run(str(each)) in truth.dropped - truth.pins]:
        truth.folders.remove(folder)
        truth.trash.append(folder)
        truth.committed.discard(_step_and_run(str(folder)))
        for path in [path for path in truth.files if path.startswith(f"{folder}/")]:
            truth.unlinking[path] = truth.files.pop(path)
    return truth


def _has_its_size(content: bytes) -> bool:
    """Return whether a safetensors file is as long as its header states."""
    end = 8 + int.from_bytes(content[:8], "little")
    if len(content) < max(end, 9) or end == 8:
        return False
    header = json.loads(content[8:end])
    return len(content) == end + max(entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__")


def _step_and_run(folder: str) -> tuple[int, str]:
    _, step, run = folder.rpartition("/")[2].split("-", 2)
    return int(step), run


@dataclass
class _Standing:
    """The promises that hold after all promises and withdrawals so far."""

    files: dict[str, bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    asked_to_go: set[str] = field(default_factory=set)
    pinned: dict[str, bytes] = field(default_factory=dict)
    """Files of pinned snapshots; each is where it was, or hidden for a while."""


def _standing(promises: Sequence[Promised | Withdrawn | PromisedGone]) -> _Standing:
    standing, ever = _Standing(), {}
    for each in promises:
        folder = each.path.replace("/pin-", "/step-")
        if isinstance(each, Promised):
            ever[each.path] = standing.files[each.path] = each.content
            standing.gone.discard(each.path)
            if folder != each.path:
                standing.gone.discard(folder)
                standing.pinned |= {path: held for path, held in ever.items() if path.startswith(f"{folder}/")}
        elif isinstance(each, Withdrawn):
            for path in [path for path in standing.files if f"{path}/".startswith(f"{each.path}/")]:
                del standing.files[path]
            standing.asked_to_go.add(each.path)
            if folder != each.path:
                standing.pinned = {path: held for path, held in standing.pinned.items() if not path.startswith(folder)}
        elif not any(path.startswith(f"{each.path}/") for path in standing.pinned):
            standing.gone.add(each.path)
    return standing


def _expect_promises_kept(
    listing: Mapping[str, bytes | None], truth: _Truth, promises: Sequence[Promised | Withdrawn | PromisedGone]
) -> None:
    standing = _standing(promises)
    for path, content in standing.files.items():
        if path not in listing:
            raise Violation(f"{path} was acknowledged and is lost")
        if content and listing[path] != content:
            raise Violation(f"{path} was acknowledged and holds something else")
    for path in standing.gone:
        is_hidden = Path(path) in truth.trash
        if path in listing and not is_hidden and path.replace("/step-", "/pin-") not in {*listing} - {path}:
            raise Violation(f"{path} was acknowledged to be gone and is there")
    for path, content in standing.pinned.items():
        if content not in (listing.get(path), truth.hidden.get(path)):
            raise Violation(f"{path} is pinned and lost")
    for folder in truth.folders:
        if str(folder) in standing.asked_to_go and _step_and_run(str(folder)) not in truth.committed:
            raise Violation(f"remains of {folder} are there")


def _expect_right_readers(store: object, truth: _Truth, recording: Recording) -> list[tuple[int, str]]:
    owners = sorted({run for _, run in truth.committed})
    _expect("runs()", store.runs(), owners)
    newest = _history(truth, recording, owners[-1]) if owners else []
    snapshots = store.snapshots()
    _expect("snapshots()", [(each.step, each.run) for each in snapshots], newest)
    for run in owners[:-1]:
        found = [(each.step, each.run) for each in store.snapshots(run)]
        _expect(f"snapshots({run!r})", found, _history(truth, recording, run))
    for snapshot in snapshots:
        for path in snapshot.paths:
            header = store._inspector.read_header(path)
            _expect("the size", header.file_bytes, len(truth.files[str(path)]))
            own = (header.stamp.step, header.stamp.t, header.stamp.run, header.stamp.lineage)
            _expect("the stamp", own, (snapshot.step, snapshot.step, snapshot.run, recording.lineages[snapshot.run]))
    if newest:
        last = store.get()
        _expect("get()", (last.step, last.run), newest[-1])
    else:
        try:
            raise Violation(f"get() finds {store.get()} where there is nothing")
        except SnapshotNotFound:
            pass
    incomplete = [folder for folder in truth.folders if _step_and_run(str(folder)) not in truth.committed]
    _expect("incomplete()", sorted(each.path for each in store.incomplete()), sorted(incomplete))
    _expect("verify()", store.verify(), [])
    _expect("hidden()", store.hidden(), sorted(truth.trash))
    _expect("pins()", store.pins(), truth.pins)
    return newest


def _history(truth: _Truth, recording: Recording, run: str) -> list[tuple[int, str]]:
    """Return the committed snapshots of a run and, up to where it left each, of the runs that it continued."""
    found: dict[int, str] = {}
    for ancestor, left_at in recording.lineages[run]:
        found |= {s: r for s, r in truth.committed if r == ancestor and (left_at is None or s <= left_at)}
    return sorted(found.items())


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Violation(f"{what} is {found}, expected {expected}")


def _check_restart(
    state: Crashed, promises: Sequence[Promised], recording: Recording, subject: Subject, crash_again: bool
) -> int:
    """Let a new process write to the same folder. Returns the number of disks after its own crash, if it has one."""
    disk = Disk(state)
    disk.finished = {path: set(contents) for path, contents in recording.disk.finished.items()}
    found = _look(state.walk(), recording)
    player = Player(subject, disk, recording.world_size)
    player.prepare()
    truth = _look(disk.now().walk(), recording)
    _expect_clean(found, truth, disk)
    owners = sorted({run for _, run in truth.committed})
    newest = _history(truth, recording, owners[-1]) if owners else []
    step, run = newest[-1] if newest else (0, "")  # go on from the last snapshot that is there
    past = tuple((name, min(left or step, step)) for name, left in recording.lineages.get(run, ()))
    lineages = {**recording.lineages, D: (*past, (D, None))}
    restarted = Recording(recording.name, state, disk, lineages, recording.world_size, ())
    player.lineages = lineages
    for rank in range(recording.world_size):
        player.write(step + 5, D, rank)
    player.close(D)
    if player.failures:
        raise Violation(f"a restarted writer fails: {player.failures[0]!r}") from player.failures[0]
    check_trace(restarted)
    after = disk.now()
    listing = after.walk()
    new = [promise for promise in disk.log if isinstance(promise, Promised)]
    # Snapshots that were there stay, also those that an earlier process had begun to hide.
    untouched = [Promised(path, content) for path, content in truth.files.items()]
    listed = check_state(after, listing, [*promises, *untouched, *new], restarted, subject)
    _expect("what is listed after a restart", listed, [*newest, (step + 5, D)])
    if not crash_again:
        return 0
    seen = set()
    for point in crash_points(disk.log, state):
        for crashed in states(point, subsets=64, samples=1):
            listing = crashed.walk()
            if (key := (len(point.promises), *listing)) not in seen:
                seen.add(key)
                check_state(crashed, listing, [*promises, *untouched, *point.promises], restarted, subject)
    return len(seen)


def _expect_clean(before: _Truth, after: _Truth, disk: Disk) -> None:
    """Check that a starting run changes no snapshot, unhides pinned ones, and removes hidden and temporary files."""
    pinned = {
        path: held
        for path, held in before.hidden.items()
        if _step_and_run(path.rpartition("/")[0]) in before.pins and Path(path).parent not in before.folders
    }
    _expect("the files after the start of a run", sorted(after.files), sorted(before.files | pinned))
    if after.files != before.files | pinned:
        raise Violation("a run that starts changes existing files")
    left = [
        path for path, _ in disk.now().walk() if path.rpartition("/")[2].startswith((".rank-", ".probe", ".trash-"))
    ]
    left += [str(folder) for folder in after.trash] + sorted(f"note on {each}" for each in after.dropped - after.pins)
    if left:
        raise Violation(f"a run has started and leaves {left}")


def check_trace(recording: Recording) -> None:
    """Check the rules that hold for the order of calls alone."""
    synced: Counter[int] = Counter()
    failed: set[int] = set()
    for entry in recording.disk.log:
        is_fsync = isinstance(entry, Failed) and entry.call == "fsync"
        if (isinstance(entry, Synced) or is_fsync) and entry.inode in recording.disk.contents:
            synced[entry.inode] += 1
            if synced[entry.inode] > 1:
                raise Violation(f"{recording.name}: a file was fsynced twice")
        if isinstance(entry, Failed):
            failed.add(entry.inode)
        if isinstance(entry, Linked) and is_final(entry.name) and entry.inode in failed:
            raise Violation(f"{recording.name}: a file on which a call failed got its final name")
    if recording.disk.open:
        raise Violation(f"{recording.name}: descriptors were left open: {recording.disk.open}")
    # A note has no bytes: one process may remove it, with its snapshot, before the one that made it has closed it.
    hurt = [path for path in recording.disk.hurt if not path.rpartition("/")[2].startswith("dropped-")]
    if hurt:
        raise Violation(f"{recording.name}: an open file was removed: {hurt}")
    before = {path for path, _ in recording.start.walk()}
    left = [
        path
        for path, _ in recording.disk.now().walk()
        if path.rpartition("/")[2].startswith((".rank-", ".probe")) and path not in before
    ]
    if left:
        raise Violation(f"{recording.name}: temporary files were left: {left}")


def check_failures(recording: Recording) -> None:
    """Check that every snapshot was acknowledged or reported as failed, unless one new file healed the failure."""
    _expect(f"{recording.name}: the number of reported failures", len(recording.failures), recording.num_failures)
    for failure in recording.failures:
        if failure.path is None or (isinstance(failure, SnapshotWriteError) and failure.step is None):
            raise Violation(f"{recording.name}: {failure!r} does not name the failed file or step") from failure


# Disks that lose durable bytes


def check_forgetful_disk(recording: Recording, subject: Subject, *, orderly: bool, every: int = 1) -> int:
    """Check that a disk that loses durable bytes costs snapshots at most, and makes no reader return wrong ones.

    Args:
        recording: A run of one rank.
        subject: The store to use.
        orderly: Bytes reach the disk in the order in which they were written. Then a listing, which reads headers
            only, lists whole snapshots only, since headers are written last.
        every: Check one of so many disks.
    """
    seen = set()
    number = 0
    for point in crash_points(recording.disk.log, recording.start, honest=False):
        for state in states(point, subsets=16, samples=2, orderly=orderly):
            listing = state.walk()
            if (key := tuple(entry for entry in listing if "/." not in entry[0])) in seen:
                continue
            seen.add(key)
            number += 1
            if number % every == 0:
                try:
                    check_detection(state, listing, recording, subject, listed_are_whole=orderly)
                except Violation as violation:
                    raise _described(violation, recording, point, listing) from violation
    return len(seen) // every


def check_detection(
    state: Crashed,
    listing: Sequence[tuple[str, bytes | None]],
    recording: Recording,
    subject: Subject,
    *,
    listed_are_whole: bool = False,
) -> None:
    """Check that ``verify()`` names each wrong file, and that a file with a wrong header or size is never listed."""
    truth = _look(listing, recording)
    if str(ROOT) not in dict(listing):
        return
    store = subject.store.SnapshotStore(ROOT, files=Disk(state))
    wrong = {path for path, found in truth.files.items() if found not in recording.disk.finished.get(path, ())}
    _expect("the files that verify() names", {str(problem.path) for problem in store.verify()}, wrong)
    for path in wrong:
        begin = _header_bytes(recording, subject)
        known = recording.disk.finished.get(path, set())
        has_header = any(truth.files[path][:begin] == right[:begin] for right in known)
        has_size = any(len(truth.files[path]) == len(right) for right in known)
        step, run = _step_and_run(path.rpartition("/")[0])
        try:
            store.get(step, run)
        except SnapshotDamaged:
            continue
        if not (has_header and has_size):
            raise Violation(f"{path} has a wrong header or size, and get() returns it")
        if listed_are_whole:
            raise Violation(f"{path} is not whole, though its header was written last, and get() returns it")


def check_rot(subject: Subject, *, every: int = 1) -> int:
    """Check files in which a bit is flipped, whose end is lost, or which have another snapshot's name."""
    recording = runs.record("one rank", subject)
    final = recording.disk.now()
    parent, inode = next(
        (folder, inode) for folder, names in final.folders.items() for name, inode in names.items() if is_final(name)
    )
    damaged = list(_rotten(final.contents[inode], random.Random(0), every))
    for rotten in damaged:
        state = Crashed(final.folders, {**final.contents, inode: rotten})
        check_detection(state, state.walk(), recording, subject)
    (root,) = (folder for folder, names in final.folders.items() if parent in names.values())
    moved = {name.replace("step-000000000010", "step-000000000011"): at for name, at in final.folders[root].items()}
    state = Crashed({**final.folders, root: moved}, final.contents)
    check_detection(state, state.walk(), recording, subject)
    return len(damaged) + 1


def _rotten(whole: bytes, chance: random.Random, every: int) -> Iterator[bytes]:
    for position in range(0, len(whole), every):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << chance.randrange(8)
        yield bytes(flipped)
    for size in (0, 7, 8, 4095, 4096, 4097, len(whole) - 1):
        yield whole[:size]
    for size in (1, 512, 4096):
        yield whole + bytes(size)


def check_disagreement(subject: Subject) -> None:
    """Check that two ranks with different times are noticed, although a listing reads the first header only."""
    disk = Disk()
    player = Player(subject, disk, 2)
    player.prepare()
    facts = {"step": 10, "run": runs.A, "lineage": runs.LINEAGES[runs.A], "world_size": 2, "t_first": 1}
    for rank in (0, 1):
        stamp = subject.header.Stamp(rank=rank, t=10 + rank, offsets=runs.offsets(rank, 2), **facts)
        bytes_ = runs.content(player.layout.data_bytes, 10, runs.A, rank)
        player.store.write(player.layout, stamp, lambda data=bytes_: [data[b:e] for b, e in player.layout.chunks])
    _expect("the number of snapshots", len(player.store.snapshots()), 1)
    _expect("the number of failures that verify() finds", len(player.store.verify()), 1)


def check_taken_name(subject: Subject, folder: Path) -> None:
    """Check, on a real disk, that another writer's file is not changed when its temporary name is drawn again."""
    folder.mkdir()
    player = Player(subject, Disk())
    player.store = subject.store.SnapshotStore(folder, files=subject.filesystem.FileSystem())
    names = iter("0011")
    subject.processes.random = lambda size_bytes: next(names)
    player.store.prepare()
    foreign = (
        folder / f"step-000000000010-{runs.A}" / f".rank-00000-of-00001.safetensors.{subject.processes.signature()}-0"
    )
    foreign.parent.mkdir()
    foreign.write_bytes(b"x" * 9000)
    bytes_ = runs.content(player.layout.data_bytes, 10, runs.A, 0)
    stamp = subject.header.Stamp(step=10, t=10, t_first=1, run=runs.A, lineage=runs.LINEAGES[runs.A])
    player.store.write(player.layout, stamp, lambda: [bytes_[b:e] for b, e in player.layout.chunks])
    if not foreign.exists() or foreign.read_bytes() != b"x" * 9000:
        raise Violation("another writer's file, under a temporary name that was taken, was written to")
    _expect("verify()", player.store.verify(), [])


def _header_bytes(recording: Recording, subject: Subject) -> int:
    (size,) = {len(whole) for wholes in recording.disk.finished.values() for whole in wholes}
    return size - runs.layout(subject).data_bytes


def _described(
    violation: Violation, recording: Recording, point: CrashPoint, listing: Sequence[tuple[str, bytes | None]]
) -> Violation:
    found = "\n".join(f"  {path}" + ("/" if held is None else f" ({len(held)} bytes)") for path, held in listing)
    return Violation(
        f"{violation}\nrun: {recording.name}, crash after entry {point.index} of its log: {point.last!r:.200}\n{found}"
    )
