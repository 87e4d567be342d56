"""Every disk that a crash may leave behind, made from the log of what was written before it.

Two things are certain after a crash: a file's bytes and size as of its last fsync that succeeded, and a folder's names
as of the folder's last fsync. All other changes may be there or not, independently of each other:

names    each link and unlink of a name since the folder's fsync, in order (as journals do it) or any subset of them
         (as POSIX allows it); a rename may leave both names or neither, or come before the data of its file; the rename
         of a folder may be lost, but leaves it one name
bytes    of a file since its fsync: nothing, all, any prefix, any sectors of 512 or 4096 bytes, any of the write calls,
         the new size with zeros, garbage wherever bytes were being written

After a failed fsync no byte that was written before it is certain any more, whatever succeeds later.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.crash.disk import (
    TOP,
    Crashed,
    Failed,
    Linked,
    Moved,
    Promised,
    PromisedGone,
    Synced,
    Withdrawn,
    Written,
    put,
)


@dataclass
class Fate:
    """The bytes of one file: durable ones, and those that a crash may lose."""

    durable: bytes = b""
    pending: list[Written] = field(default_factory=list)
    is_dead: bool = False  # an fsync of it failed
    made: list[bytes] | None = None  # the contents that it may have, once computed


@dataclass
class CrashPoint:
    """The moment after one entry of the log."""

    index: int
    last: NamedTuple | None
    names: dict[int, dict[str, int]]  # durable ones, by folder
    pending: list[Linked | Moved]
    fates: dict[int, Fate]
    promises: list[Promised | Withdrawn | PromisedGone]


def crash_points(log: Sequence[NamedTuple], start: Crashed, *, honest: bool = True) -> Iterator[CrashPoint]:
    """Yield all moments of a log; each is valid until the next is requested.

    Args:
        log: The log of a ``Disk``.
        start: The content of the disk before.
        honest: False for a disk that loses bytes after it has reported them durable.
    """
    point = CrashPoint(
        index=0,
        last=None,
        names={folder: dict(names) for folder, names in start.folders.items()},
        pending=[],
        fates={inode: Fate(bytes(content)) for inode, content in start.contents.items()},
        promises=[],
    )
    yield point
    for point.index, point.last in enumerate(log, start=1):
        _advance(point, point.last, honest)
        yield point


def _advance(point: CrashPoint, entry: NamedTuple, honest: bool) -> None:
    if isinstance(entry, (Linked, Moved)):
        point.pending.append(entry)
    elif isinstance(entry, Written):
        fate = point.fates.setdefault(entry.inode, Fate())
        fate.pending.append(entry)
        fate.made = None
    elif isinstance(entry, Failed):
        point.fates.setdefault(entry.inode, Fate()).is_dead = True
    elif isinstance(entry, (Promised, Withdrawn, PromisedGone)):
        point.promises.append(entry)
    elif isinstance(entry, Synced):
        fate = point.fates.get(entry.inode)
        if fate is not None and honest and not fate.is_dead:
            fate.durable, fate.pending, fate.made = _written(fate.durable, fate.pending), [], None
        _apply(point.names, [change for change in point.pending if change.folder == entry.inode])
        point.pending = [change for change in point.pending if change.folder != entry.inode]


def states(point: CrashPoint, *, subsets: int, samples: int, orderly: bool = False) -> Iterator[Crashed]:
    """Yield disks that a crash at this moment may leave.

    Args:
        point: The moment.
        subsets: The most subsets of the uncertain names to yield.
        samples: For names lost out of order: how many of the contents of uncertain files. For names in order: all.
        orderly: Bytes reach this disk in the order in which they were written.
    """
    chance = random.Random(point.index)
    for mask in _masks(len(point.pending), subsets, chance):
        names = {folder: dict(entries) for folder, entries in point.names.items()}
        _apply(names, [change for bit, change in enumerate(point.pending) if mask >> bit & 1])
        reached = _reached(names)
        certain = {inode: fate.durable for inode, fate in point.fates.items() if inode in reached}
        uncertain = [inode for inode in certain if point.fates[inode].pending]
        in_order = mask & (mask + 1) == 0
        folders = {folder: entries for folder, entries in names.items() if folder in reached}
        contents = [list(_contents(point.fates[inode], orderly)) for inode in uncertain]
        for inode in reached - names.keys() - certain.keys():
            certain[inode] = b""  # created, nothing written
        if not uncertain:
            yield Crashed(folders, certain)
            continue
        count = max(map(len, contents)) if in_order else samples
        for several in contents:
            chance.shuffle(several)
        for number in range(count):
            chosen = (several[number % len(several)] for several in contents)
            yield Crashed(folders, certain | dict(zip(uncertain, chosen, strict=True)))


def _masks(count: int, most: int, chance: random.Random) -> Iterator[int]:
    """Yield subsets as bits; those of the first n names, for each n, come first."""
    everything = (1 << count) - 1
    if everything < most:
        yield from range(everything + 1)
        return
    singles = [1 << bit for bit in range(count)]
    special = [(1 << bits) - 1 for bits in range(count + 1)] + singles + [everything ^ single for single in singles]
    drawn = [chance.randrange(everything + 1) for _ in range(max(0, most - len(special)))]
    yield from dict.fromkeys(special + drawn)


def _apply(names: dict[int, dict[str, int]], changes: Sequence[Linked | Moved]) -> None:
    for change in changes:
        entries = names.setdefault(change.folder, {})
        if isinstance(change, Moved):
            for name in [name for name, inode in entries.items() if inode == change.inode]:
                del entries[name]  # the last name, whichever of the earlier renames were lost
            entries[change.new_name] = change.inode
            names.setdefault(change.inode, {})
            continue
        _, name, inode, is_folder = change
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode
            if is_folder:
                names.setdefault(inode, {})


def _reached(names: dict[int, dict[str, int]]) -> set[int]:
    """Return the inodes that have a path."""
    reached, ahead = set(), [TOP]
    while ahead:
        inode = ahead.pop()
        reached.add(inode)
        ahead += names.get(inode, {}).values()
    return reached


def _written(content: bytes, pieces: Sequence[Written]) -> bytes:
    result = bytearray(content)
    for piece in pieces:
        put(result, piece.offset, piece.content)
    return bytes(result)


def _contents(fate: Fate, orderly: bool) -> list[bytes]:
    if orderly:
        return [_written(fate.durable, fate.pending[:count]) for count in range(len(fate.pending) + 1)]
    if fate.made is None:
        fate.made = list(dict.fromkeys(_possible(fate.durable, fate.pending)))
    return fate.made


def _possible(old: bytes, pieces: Sequence[Written]) -> Iterator[bytes]:
    new = _written(old, pieces)
    chance = random.Random(len(new) + len(pieces))
    yield from (old, new)
    edges = {0, len(new), *range(0, len(new), 512), *(p.offset for p in pieces), *(p.offset + 8 for p in pieces)}
    for end in sorted({edge + step for edge in edges for step in (-1, 0, 1)}):
        if 0 <= end <= len(new):
            yield new[:end] + old[end:]
    for chosen in _some_calls(pieces, chance):
        torn = _written(old, chosen)
        yield torn
        yield torn + bytes(len(new) - len(torn))
    extended = old + bytes(len(new) - len(old))
    for sector in (512, 4096):
        count = -(-len(new) // sector)
        for pattern in _patterns(count, chance):
            yield _mixed(extended, new, sector, pattern)
    noise = _noise(extended, new, pieces, chance)
    for pattern in _patterns(-(-len(new) // 512), chance):
        yield _mixed(noise, new, 512, pattern)
    yield noise[: len(new) // 2]


def _some_calls(pieces: Sequence[Written], chance: random.Random) -> Iterator[list[Written]]:
    if len(pieces) <= 6:
        for keep in itertools.product((False, True), repeat=len(pieces)):
            yield list(itertools.compress(pieces, keep))
        return
    for left_out in range(len(pieces)):
        yield [piece for number, piece in enumerate(pieces) if number != left_out]
    for _ in range(32):
        yield [piece for piece in pieces if chance.random() < 0.5]


def _patterns(count: int, chance: random.Random) -> Iterator[list[bool]]:
    """Yield which sectors reached the disk: none, one, all but one, every other, the last ones, some."""
    yield [False] * count
    for one in range(count):
        yield [number == one for number in range(count)]
        yield [number != one for number in range(count)]
        yield [number >= one for number in range(count)]
    yield [number % 2 == 0 for number in range(count)]
    for _ in range(4):
        yield [chance.random() < 0.5 for _ in range(count)]


def _mixed(old: bytes, new: bytes, sector: int, is_new: Sequence[bool]) -> bytes:
    return b"".join(
        (new if chosen else old)[number * sector : (number + 1) * sector] for number, chosen in enumerate(is_new)
    )


def _noise(old: bytes, new: bytes, pieces: Sequence[Written], chance: random.Random) -> bytes:
    """Return a file with garbage wherever bytes were being written."""
    result = bytearray(old)
    for piece in pieces:
        put(result, piece.offset, chance.randbytes(len(piece.content)))
    put(result, len(old), chance.randbytes(len(new) - len(old)))
    return bytes(result)
