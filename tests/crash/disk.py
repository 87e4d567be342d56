"""A disk in memory that the store writes to. It logs what a later crash may lose, and fails calls on request."""

from __future__ import annotations

import errno
import functools
import os
import random
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from nitrous_ema.snapshots.filesystem import FileSystem

TOP = 0  # inode of the folder "/"
LONG_AGO, NOW = 0.0, 1e6
"""Times of change, in seconds: of the files that a disk starts with, and of all others."""


class Violation(AssertionError):
    """A promise that was not kept."""


class Linked(NamedTuple):
    """A name in a folder now leads to an inode, or is gone (None). A rename is two of these."""

    folder: int
    name: str
    inode: int | None
    is_folder: bool = False


class Moved(NamedTuple):
    """A folder has a new name in its parent. One change: no file system leaves a folder with two names, or without."""

    folder: int
    name: str
    new_name: str
    inode: int


class Written(NamedTuple):
    """Bytes at a position of a file. Preallocation writes nothing at its end."""

    inode: int
    offset: int
    content: bytes


class Synced(NamedTuple):
    """fsync of a file or of a folder returned."""

    inode: int


class Failed(NamedTuple):
    """A call on a file returned an error; bytes that were written to the file before are never durable."""

    inode: int
    call: str


class Promised(NamedTuple):
    """A call returned that promises that a file is durable; or, with ``content=b""``, that its name is."""

    path: str
    content: bytes


class Withdrawn(NamedTuple):
    """The caller asks for the removal of a path: promises about it, and about files in it, hold no more."""

    path: str


class PromisedGone(NamedTuple):
    """A call returned that promises that a path is gone."""

    path: str


class Killed(BaseException):
    """The process has ended, as after SIGKILL: none of its calls has an effect. The machine goes on."""


class Crashed(NamedTuple):
    """A disk as a machine finds it at its next start: inodes of folders and files."""

    folders: Mapping[int, Mapping[str, int]]
    contents: Mapping[int, bytes]

    def walk(self, inode: int = TOP, path: str = "") -> list[tuple[str, bytes | None]]:
        """Return path and content of every file and folder, by name; a folder has ``None`` as its content."""
        found: list[tuple[str, bytes | None]] = []
        for name, child in sorted(self.folders[inode].items()):
            if child in self.folders:
                found.append((f"{path}/{name}", None))
                found += self.walk(child, f"{path}/{name}")
            else:
                found.append((f"{path}/{name}", self.contents[child]))
        return found


EMPTY = Crashed({TOP: {}}, {})


class Disk(FileSystem):
    """A file system in memory.

    Args:
        start: The initial content.
        faults: Calls that fail: (method, number of earlier calls of it) -> errno. A failed write has written half.
        turns: Serializes the calls of several threads.
        turns_to_look: A call that changes nothing waits for its turn as well, so that other threads may act between a
            look and the call that follows from it.
        replaces_only: ``renameat2`` is not supported.
        keeps_folders: No folder can be renamed.
        one_pass: Nothing can be renamed, and bytes are written in their order only.
        most_bytes: The longest write or read that succeeds in one call.
    """

    def __init__(
        self,
        start: Crashed = EMPTY,
        *,
        faults: Mapping[tuple[str, int], int] | None = None,
        turns: Turns | None = None,
        replaces_only: bool = False,
        keeps_folders: bool = False,
        one_pass: bool = False,
        most_bytes: int = 1 << 30,
        turns_to_look: bool = False,
    ) -> None:
        self.folders = {inode: dict(names) for inode, names in start.folders.items()}
        self.contents: dict[int, bytes | bytearray] = dict(start.contents)
        self.log: list[NamedTuple] = []
        self.open: dict[int, tuple[int, str]] = {}  # descriptor: inode, path
        self.was_read: set[str] = set()
        self.finished: dict[str, set[bytes]] = {}  # final path: contents that writers meant it to have
        self.meanwhile: dict[str, Callable[[], None]] = {}  # done by others just before the next call of a kind
        self.hurt: list[str] = []  # files that were unlinked while they were open
        self._changed_at: dict[int, float] = {}  # of inodes that are not LONG_AGO
        self._faults = dict(faults or {})
        self._counts: dict[str, int] = {}
        self.turns = turns
        self._replaces_only = replaces_only
        self._keeps_folders = keeps_folders
        self._one_pass = one_pass
        self._turns_to_look = turns_to_look
        self._calls_left: int | None = None  # until the process is killed
        self.most_bytes = most_bytes
        self.bytes_free = 1 << 50
        self._next = max((*self.folders, *self.contents)) + 1

    def now(self) -> Crashed:
        """The disk as it is, with everything durable."""
        return Crashed(self.folders, {inode: bytes(content) for inode, content in self.contents.items()})

    def promise(self, path: str, content: bytes) -> None:
        """Record the promise that a path is durable."""
        self._enter("promise")
        self.log.append(Promised(path, content))

    def withdraw(self, path: str) -> None:
        """Record that the writer asks for the removal of a path."""
        self._enter("withdraw")
        self.log.append(Withdrawn(path))

    def promise_gone(self, path: str) -> None:
        """Record the promise that a path is gone."""
        self._enter("promise_gone")
        self.log.append(PromisedGone(path))

    def kill_at(self, count: int) -> None:
        """Kill the process when it has made so many more calls that change something."""
        self._calls_left = count

    def start_process(self) -> None:
        """Let another process go on with the disk of a killed one; no byte was lost."""
        self._calls_left, self.open = None, {}

    # Calls that change something

    def open_exclusive(self, path: Path) -> int:
        self._enter("open_exclusive")
        folder, name = self._parent(path)
        if name in self.folders[folder]:
            raise _error(errno.EEXIST, path)
        inode = self._new()
        self.contents[inode] = bytearray()
        self._link(folder, name, inode)
        return self._descriptor(inode, path)

    def preallocate(self, descriptor: int, size_bytes: int) -> None:
        self._enter("preallocate")
        self._write(self.open[descriptor][0], size_bytes - 1, b"\0")

    def write_at(self, descriptor: int, buffer: bytes, offset: int) -> int:
        inode, path = self.open[descriptor]
        content = bytes(memoryview(buffer)[: self.most_bytes])
        if self._one_pass and offset != len(self.contents[inode]):
            raise _error(errno.EINVAL, descriptor)
        try:
            self._enter("write_at", inode)
        except OSError:
            self._write(inode, offset, content[: len(content) // 2])
            raise
        self._write(inode, offset, content)
        if self._one_pass:  # the last byte makes a file what it should be, whether or not it is closed
            self.finished.setdefault(path, set()).add(bytes(self.contents[inode]))
        return len(content)

    def start_writeback(self, descriptor: int, offset: int, size_bytes: int) -> None:
        self._fail("start_writeback")  # a hint: nothing is durable by it, and nothing is lost if it fails

    def fsync(self, descriptor: int) -> None:
        inode, _ = self.open[descriptor]
        self._enter("fsync", inode)
        self.log.append(Synced(inode))

    def close(self, descriptor: int) -> None:
        if self._calls_left is not None and self._calls_left <= 0:
            raise Killed
        inode, path = self.open.pop(descriptor)
        if is_final(path) and self.contents[inode]:
            self.finished.setdefault(path, set()).add(bytes(self.contents[inode]))
        self._enter("close", inode)

    def rename(self, source: Path, target: Path) -> None:
        self._enter("rename")
        if self._one_pass:
            raise _error(errno.ENOSYS, source)
        folder, name = self._parent(source)
        new_folder, new_name = self._parent(target)
        if name not in self.folders[folder]:
            raise _error(errno.ENOENT, source)
        inode = self.folders[folder][name]
        if inode in self.folders:
            if self._keeps_folders:
                raise _error(errno.EXDEV, source)
            self._move(folder, name, new_folder, new_name)
            return
        if is_final(str(target)):
            self.finished.setdefault(str(target), set()).add(bytes(self.contents[inode]))
        self._link(new_folder, new_name, inode)
        self._link(folder, name, None)

    def rename_new(self, source: Path, target: Path) -> None:
        if self._replaces_only:
            raise _error(errno.EINVAL, target)
        self._enter("rename_new")
        folder, name = self._parent(target)
        if self._find(str(source)) is not None and name in self.folders[folder]:
            raise _error(errno.EEXIST, target)
        turns, self.turns = self.turns, None  # one call, so one turn
        try:
            self.rename(source, target)
        finally:
            self.turns = turns

    def unlink(self, path: Path) -> None:
        self._enter("unlink")
        folder, name = self._parent(path)
        if name not in self.folders[folder]:
            raise _error(errno.ENOENT, path)
        inode = self.folders[folder][name]
        if inode in self.folders:
            raise _error(errno.EISDIR, path)
        if any(inode == other for other, _ in self.open.values()):
            self.hurt.append(str(path))
        self._link(folder, name, None)

    def make_folder(self, path: Path) -> None:
        self._enter("make_folder")
        folder, name = self._parent(path)
        if name in self.folders[folder]:
            raise _error(errno.EEXIST, path)
        inode = self._new()
        self.folders[inode] = {}
        self._link(folder, name, inode)

    def remove_folder(self, path: Path) -> None:
        self._enter("remove_folder")
        folder, name = self._parent(path)
        inode = self.folders[folder].get(name)
        if inode not in self.folders:
            raise _error(errno.ENOTDIR if inode is not None else errno.ENOENT, path)
        if self.folders[inode]:
            raise _error(errno.ENOTEMPTY, path)
        self._link(folder, name, None)

    def fsync_folder(self, path: Path) -> None:
        self._enter("fsync_folder")
        inode = self._find(str(path))
        if inode not in self.folders:
            raise _error(errno.ENOTDIR if inode is not None else errno.ENOENT, path)
        self.log.append(Synced(inode))

    # Calls that look

    def open_read(self, path: Path) -> int:
        self._look()
        inode = self._find(str(path))
        if inode is None:
            raise _error(errno.ENOENT, path)
        self.was_read.add(path.name)
        return self._descriptor(inode, path)

    def free_bytes(self, path: Path) -> int:
        self._fail("free_bytes")
        return self.bytes_free

    def stat(self, descriptor: int) -> os.stat_result:
        inode, _ = self.open[descriptor]
        kind = stat.S_IFDIR if inode in self.folders else stat.S_IFREG
        return SimpleNamespace(st_mode=kind | 0o644, st_size=len(self.contents.get(inode, b"")))

    def read_at(self, descriptor: int, buffer: bytearray, offset: int) -> int:
        piece = self.contents[self.open[descriptor][0]][offset : offset + min(len(buffer), self.most_bytes)]
        memoryview(buffer)[: len(piece)] = piece
        return len(piece)

    def lstat(self, path: Path) -> os.stat_result:
        self._look()
        inode = self._find(str(path))
        if inode is None:
            raise _error(errno.ENOENT, path)
        kind = stat.S_IFDIR if inode in self.folders else stat.S_IFREG
        size_bytes = len(self.contents.get(inode, b""))
        changed_at = self._changed_at.get(inode, LONG_AGO)
        return SimpleNamespace(st_mode=kind | 0o644, st_size=size_bytes, st_ctime=changed_at, st_dev=1)

    def list(self, path: Path) -> list[str]:
        self._look()
        inode = self._find(str(path))
        if inode not in self.folders:
            raise _error(errno.ENOTDIR if inode is not None else errno.ENOENT, path)
        return list(self.folders[inode])

    def exists(self, path: Path) -> bool:
        self._look()
        return self._find(str(path)) is not None

    # Inside

    def _look(self) -> None:
        if self._turns_to_look and self.turns is not None:
            self.turns.wait()

    def _enter(self, call: str, inode: int | None = None) -> None:
        """Begin a call: wait for its turn, and fail if a fault is set for it."""
        if others := self.meanwhile.pop(call, None):
            others()
        if self.turns is not None:
            self.turns.wait()
        if self._calls_left is not None:
            self._calls_left -= 1
            if self._calls_left < 0:
                raise Killed
        self._fail(call, inode)

    def _fail(self, call: str, inode: int | None = None) -> None:
        count = self._counts[call] = self._counts.get(call, -1) + 1
        number = self._faults.get((call, count))
        if number is not None:
            if inode is not None:
                self.log.append(Failed(inode, call))
            raise _error(number, call)

    def _write(self, inode: int, offset: int, content: bytes) -> None:
        put(self.contents[inode], offset, content)
        self.log.append(Written(inode, offset, content))

    def _link(self, folder: int, name: str, inode: int | None) -> None:
        self.log.append(Linked(folder, name, inode, inode in self.folders))
        if inode is None:
            del self.folders[folder][name]
        else:
            self.folders[folder][name] = inode
            self._changed_at[inode] = NOW

    def _move(self, folder: int, name: str, new_folder: int, new_name: str) -> None:
        if new_folder != folder or new_name in self.folders[folder]:
            raise NotImplementedError("our code renames folders within their parent, to new names")
        inode = self.folders[folder].pop(name)
        self.folders[folder][new_name] = inode
        self._changed_at[inode] = NOW
        self.log.append(Moved(folder, name, new_name, inode))

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _descriptor(self, inode: int, path: Path) -> int:
        descriptor = max(self.open, default=2) + 1
        self.open[descriptor] = (inode, str(path))
        return descriptor

    def _find(self, path: str) -> int | None:
        inode = TOP
        for name in _parts(path):
            names = self.folders.get(inode)
            if names is None or name not in names:
                return None
            inode = names[name]
        return inode

    def _parent(self, path: Path) -> tuple[int, str]:
        folder = self._find(str(path.parent))
        if folder not in self.folders:
            raise _error(errno.ENOTDIR if folder is not None else errno.ENOENT, path)
        return folder, path.name


class Turns:
    """Lets several threads make one file system call at a time, in an order drawn from a seed.

    A thread runs alone between two of its calls, so a seed always results in the same log.
    """

    TIMEOUT_SECONDS = 30

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._stay = (0.0, 0.5, 0.9, 0.97)[seed % 4]  # some faults need one thread to be far ahead
        self._last: int | None = None
        self._changed = threading.Condition()
        self._order: dict[int, int] = {}  # thread: its number, for a draw that does not depend on thread ids
        self._waiting: set[int] = set()
        self._chosen: int | None = None

    def run(self, *works: Callable[[], object]) -> None:
        """Run all of these at once; return when all have ended."""
        failures: list[BaseException] = []

        def run_one(number: int, work: Callable[[], object]) -> None:
            try:
                self.wait(number)
                work()
            except BaseException as error:
                failures.append(error)
            finally:
                self._leave()

        self._expected = len(works)
        threads = [threading.Thread(target=run_one, args=each, daemon=True) for each in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.TIMEOUT_SECONDS)
        if failures:
            raise failures[0]

    def wait(self, number: int | None = None) -> None:
        """Block until it is this thread's turn. A thread that ``run`` did not start always has it."""
        me = threading.get_ident()
        with self._changed:
            if number is not None:
                self._order[me] = number
            if me not in self._order:
                return
            self._waiting.add(me)
            self._choose()
            if not self._changed.wait_for(lambda: self._chosen == me, self.TIMEOUT_SECONDS):
                raise TimeoutError("no turn: a thread is stuck between two calls")
            self._chosen = None
            self._waiting.remove(me)

    def _leave(self) -> None:
        with self._changed:
            del self._order[threading.get_ident()]
            self._expected -= 1
            self._choose()

    def _choose(self) -> None:
        if self._waiting and len(self._waiting) == self._expected:
            if self._last not in self._waiting or self._random.random() >= self._stay:
                self._last = self._random.choice(sorted(self._waiting, key=self._order.__getitem__))
            self._chosen = self._last
            self._changed.notify_all()


def put(content: bytearray, offset: int, piece: bytes) -> None:
    """Write a piece into a file, which grows by zeros where needed."""
    content.extend(bytes(max(0, offset + len(piece) - len(content))))
    content[offset : offset + len(piece)] = piece


def is_final(path: str) -> bool:
    """Return whether this is the final name of a rank's file."""
    return path.rpartition("/")[2].startswith("rank-")


@functools.lru_cache(maxsize=4096)
def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def _error(number: int, what: object) -> OSError:
    return OSError(number, os.strerror(number), str(what))
