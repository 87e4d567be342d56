"""Exit statuses of every program in this package, and the one place where exceptions become exit statuses.

0 done, 1 failed, 2 wrong usage, 3 folder, snapshot or run not found, 4 damaged snapshot or one that needs a newer
version of this library, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nitrous_ema.errors import NitrousError, SnapshotNotFound, SnapshotUnavailable, SnapshotUnreadable

DONE, FAILED, USAGE, NOT_FOUND, DAMAGED, INTERRUPTED = 0, 1, 2, 3, 4, 130


class UsageError(Exception):
    """The command line requests something impossible."""


# The first class that matches decides: derived classes stand before NitrousError.
_STATUS_OF_ERROR: tuple[tuple[type[Exception], int], ...] = (
    (UsageError, USAGE),
    (SnapshotNotFound, NOT_FOUND),
    (SnapshotUnavailable, FAILED),
    (SnapshotUnreadable, DAMAGED),
    (NitrousError, FAILED),
    (OSError, FAILED),
)


def run_program(
    work: Callable[[], int], report: Callable[[str], None], *, interrupted: str = "interrupted.", unread: str = ""
) -> int:
    """Run the work of a program and return its exit status. An exception that is a bug propagates, with its traceback.

    Args:
        work: Returns the exit status if it raises nothing.
        report: Called with the message of an exception that has an exit status.
        interrupted: Message reported after Ctrl-C.
        unread: Message reported when the reader of stdout has closed it. Empty, the default, reports nothing: a reader
            such as ``head`` has all the lines it needs.
    """
    _prepare_streams()
    try:
        return work()
    except SystemExit as stop:  # argparse has printed the error or the help
        return stop.code if isinstance(stop.code, int) else USAGE
    except BrokenPipeError:
        _redirect_stdout_to_devnull()
        if unread:
            report(unread)
        return FAILED
    except KeyboardInterrupt:
        _clear_interpreter_interrupt()
        report(interrupted)
        return INTERRUPTED
    except tuple(kind for kind, _ in _STATUS_OF_ERROR) as error:
        report(str(error))
        return next(status for kind, status in _STATUS_OF_ERROR if isinstance(error, kind))


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError in this block into a UsageError. Elsewhere a ValueError is a bug, and propagates."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Return ``parse`` for an option's ``type=``, raising ArgumentTypeError in place of ValueError.

    argparse shows the message of its own exception class only.
    """

    def parse_argument(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


def to_stdout(text: str) -> None:
    """Write to stdout and flush.

    Raises:
        BrokenPipeError: The reader has closed the pipe.
        NitrousError: stdout cannot be written, on a full disk for example.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _redirect_stdout_to_devnull()
        raise NitrousError(f"stdout cannot be written: {error.strerror}.") from error


def to_stderr(text: str) -> None:
    """Write to stderr and flush. Where stderr cannot be written, on a full disk for example, the text is dropped.

    Raises:
        BrokenPipeError: The reader has closed the pipe.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass  # progress is not worth failing for: the outputs can still be written


def _prepare_streams() -> None:
    """Make stdout and stderr able to take every text; where the caller has closed one, it becomes /dev/null."""
    for name in ("stdout", "stderr"):
        # Otherwise the next file to be opened gets the descriptor 1 or 2, and messages end up in that file.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process runs
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack a letter of a file name


def _redirect_stdout_to_devnull() -> None:
    # Otherwise the interpreter reports the same error again when it flushes stdout at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _clear_interpreter_interrupt() -> None:
    """Let ``python -m`` exit with the returned status instead of killing itself by SIGINT.

    If the interrupt came while ``exec`` ran a string, CPython records the interrupt and kills the process by SIGINT at
    exit. ``dataclass`` and ``namedtuple`` call ``exec`` while modules are imported. A later ``exec`` of another string
    clears the record (Python/pythonrun.c, run_eval_code_obj).
    """
    exec("")
