"""A library that lets file system calls of a process fail, as a network file system or an object store does.

It is built from ``faulty_disk.c`` with the C compiler that is installed, and preloaded: a process that was started with
``LD_PRELOAD`` chooses its faults with ``set_faults``.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".c")
BUILDS = Path(__file__).parents[2] / "build" / "faulty_disk"  # git ignores build/
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class Fault(NamedTuple):
    """Calls of one kind that fail."""

    call: str
    """One of ``CALLS``."""
    error: str
    """Name of the error, such as ``"EIO"``."""
    after: int = 0
    """Number of calls that succeed first."""
    times: int = 10**9
    """Number of calls that fail then."""

    def __str__(self) -> str:
        calls = "always" if self.times >= 10**9 else "once" if self.times == 1 else f"{self.times} times"
        return f"{self.call} {self.error}, {calls}{f' after {self.after}' if self.after else ''}"


CALLS = (
    *("create", "preallocate", "write", "write-at", "fsync", "close", "rename", "fsync-folder", "mkdir", "free-space"),
    *("rename-folder", "unlink", "rmdir", "list", "open", "read"),
)
"""Calls that may fail; ``write-at`` is a write that is not at the end of its file."""


def library() -> Path:
    """Return the library to preload; it is built if it does not exist. Safe for several processes at once."""
    if COMPILER is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc, clang) to build tests/crash/faulty_disk.c with")
    built = BUILDS / f"{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not built.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", str(SOURCE), "-o", str(unfinished), "-ldl"]
        subprocess.run(command, check=True, timeout=300)
        unfinished.replace(built)
    return built


def set_faults(root: Path, *faults: Fault) -> None:
    """Let calls below a folder fail from now on, in this process and in those that it forks. No fault: none fails.

    Raises:
        AttributeError: The process was started without the library.
    """
    text = " ".join(f"{each.call}:{getattr(errno, each.error)}:{each.after}:{each.times}" for each in faults)
    ctypes.CDLL(None).set_faults(os.fsencode(root), text.encode())


def calls_failed() -> int:
    """Return how many calls have failed since ``set_faults``."""
    count = ctypes.CDLL(None).calls_failed
    count.restype = ctypes.c_long
    return int(count())
