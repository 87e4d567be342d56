"""How every program of this package ends: one table of exit statuses, and the one place where errors become them.

0 done, 1 failed, 2 wrong usage, 3 no such folder, snapshot or run, 4 damaged snapshot, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nitrous_ema.errors import NitrousError, SnapshotDamaged, SnapshotNotFound

DONE, FAILED, USAGE, NOT_FOUND, DAMAGED, INTERRUPTED = 0, 1, 2, 3, 4, 130


class UsageError(Exception):
    """The command line asks for something that cannot be."""


# The first that fits counts.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (UsageError, USAGE),
    (SnapshotNotFound, NOT_FOUND),
    (SnapshotDamaged, DAMAGED),
    (NitrousError, FAILED),
    (OSError, FAILED),
)


def run_program(
    work: Callable[[], int], tell: Callable[[str], None], *, interrupted: str = "interrupted.", unread: str = ""
) -> int:
    """Do the work of a program and turn how it ends into an exit status. Bugs keep their traceback.

    Args:
        work: Returns the exit status if nothing goes wrong.
        tell: Called with the message of an error that has a status.
        interrupted: What is told of Ctrl-C.
        unread: What is told if the reader of stdout has left; nothing by default: it has seen enough.
    """
    _open_missing()
    try:
        return work()
    except SystemExit as stop:  # argparse has said what is wrong, or has printed the help
        return stop.code if isinstance(stop.code, int) else USAGE
    except BrokenPipeError:
        _leave_stdout()
        if unread:
            tell(unread)
        return FAILED
    except KeyboardInterrupt:
        _forget_interrupt()
        tell(interrupted)
        return INTERRUPTED
    except tuple(kind for kind, _ in _STATUS) as error:
        tell(str(error))
        return next(status for kind, status in _STATUS if isinstance(error, kind))


def _forget_interrupt() -> None:
    """Have ``python -m`` end with the status that it is given.

    Where the interrupt came while text was executed (during imports the classes of dataclasses and namedtuple are made
    so), CPython notes it, and at the end kills the process by SIGINT. The next text that is executed removes that note
    (Python/pythonrun.c, run_eval_code_obj).
    """
    exec("")


def to_stdout(text: str) -> None:
    """Write to stdout, now.

    Raises:
        BrokenPipeError: Its reader has left.
        NitrousError: It cannot be written, on a full disk for example.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _leave_stdout()
        raise NitrousError(f"stdout cannot be written: {error.strerror}.") from error


def to_stderr(text: str) -> None:
    """Write to stderr, now. Where it cannot be written, on a full disk for example, the work goes on untold.

    Raises:
        BrokenPipeError: Its reader has left.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass


def _leave_stdout() -> None:
    """Without this the interpreter complains once more when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_missing() -> None:
    """Give stdout and stderr a place where the caller has closed them: else the next file that is opened gets it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


@contextmanager
def usage_errors() -> Iterator[None]:
    """A ValueError in here is the user's; elsewhere it would be a bug, and keeps its traceback."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """The same for an option's ``type=``: argparse shows the message of its own error class only."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed
