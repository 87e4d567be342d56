"""The journal in which the processes of a soak or a campaign record which snapshots they write, pin and hide.

As a command, ``python -m tests.crash.journal JOURNAL prune ...``, it is ``nitrous-ema`` with a record of what it hides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from pathlib import Path
from unittest import mock

from nitrous_ema.snapshots.filesystem import FileSystem


class Journal:
    """One file that all processes append to, and read on from where they were. A killed process loses no line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writes = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._read, self._rest = 0, b""
        self.hidden: set[str] = set()
        """Folders that were hidden, or were about to be when a process was killed."""
        self.pinned: set[str] = set()
        """Folders that are certainly pinned, since pin() has returned."""
        self.durable: set[str] = set()
        """Folders that were acknowledged."""
        self._runs: dict[str, tuple[int, int]] = {}

    def note(self, line: str) -> None:
        os.write(self._writes, f"{line}\n".encode())  # one call: lines of two processes are never mixed

    def close(self) -> None:
        os.close(self._writes)

    def read(self) -> Journal:
        """Read the new lines, and return this journal."""
        with self.path.open("rb") as journal:
            journal.seek(self._read)
            piece = journal.read()
        self._read += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            what, *words = line.decode().split(" ")
            getattr(self, f"_{what}")(*words)
        return self

    def _hiding(self, folder: str) -> None:
        self.hidden.add(folder)

    def _pinned(self, folder: str) -> None:
        self.pinned.add(folder)

    def _unpinning(self, folder: str) -> None:
        self.pinned.discard(folder)

    def _began(self, run: str, step: str, every: str) -> None:
        """A run goes on from this step and takes a snapshot every ``every`` steps."""
        self._runs[run] = int(step), int(every)

    def _durable(self, run: str, last: str) -> None:
        """All snapshots that the run took up to this step are on disk."""
        step, every = self._runs[run]
        self.durable |= {folder(own, run) for own in range((step // every + 1) * every, int(last) + 1, every)}


def folder(step: int, run: str) -> str:
    """Return the name of a snapshot's folder, as the design defines it."""
    return f"step-{step:012d}-{run}"


@contextmanager
def record_hiding(note: Callable[[str], None]) -> Iterator[None]:
    """In this block, this process and its forks record each folder that they are about to hide."""
    with ExitStack() as patches:
        for name in ("rename", "rename_new"):
            call = partialmethod(_noted, note, getattr(FileSystem, name))
            patches.enter_context(mock.patch.object(FileSystem, name, call))
        yield


def _noted(
    files: FileSystem, note: Callable[[str], None], call: Callable[..., None], source: Path, target: Path
) -> None:
    if target.name.startswith(".trash-"):
        note(f"hiding {source.name}")
    call(files, source, target)


if __name__ == "__main__":
    from nitrous_ema.cli.program import main

    with record_hiding(Journal(Path(sys.argv[1])).note):
        sys.exit(main(sys.argv[2:]))
