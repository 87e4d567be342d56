"""Waits with a timeout that counts only the time in which this process runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_SLICE_SECONDS = 1.0


def wait_for(
    condition: threading.Condition,
    predicate: Callable[[], bool],
    timeout_seconds: float | None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Wait until a predicate holds; return False if it does not hold in time.

    A process may be stopped for longer than the timeout, by SIGSTOP or by a scheduler that suspends jobs. The threads
    that it waits for are stopped then, too, so a stop counts as one second at most.

    Args:
        condition: Its lock is held by the caller; it is notified whenever the predicate may have changed.
        predicate: Called with the lock held.
        timeout_seconds: Seconds to wait at most; None for no limit.
        clock: Returns seconds; tests replace it.
    """
    if timeout_seconds is None:
        return condition.wait_for(predicate)
    left = timeout_seconds
    while not predicate():
        if left <= 0:
            return False
        step, started = min(left, _SLICE_SECONDS), clock()
        condition.wait(step)
        left -= min(clock() - started, step)
    return True
