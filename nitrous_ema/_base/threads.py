"""Threads and processes that the system may refuse to start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nitrous_ema.errors import NitrousError

LIMIT_REMEDY = "Raise the limit (`ulimit -u`, or pids.max of the container), or end other processes."
"""What the user can do where the system starts no more threads or processes."""


@contextmanager
def thread_errors() -> Iterator[None]:
    """Turn Python's error about a thread that the system did not start into a NitrousError with a remedy.

    The block should start threads and do nothing else.
    """
    try:
        yield
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise NitrousError(
            f"A thread could not be started: the system's limit of threads or memory is reached. {LIMIT_REMEDY}"
        ) from error
