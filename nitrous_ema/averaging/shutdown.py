"""How everything that an EMA has started comes to its end: closed, dropped, or with the interpreter."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack

from nitrous_ema.averaging.execution.dispatch import UpdateDispatcher
from nitrous_ema.averaging.execution.interfaces import BackgroundThread, Lane
from nitrous_ema.averaging.execution.write_guard import WriteGuard

_log = logging.getLogger(__name__)


class DrainRequest:
    """Somebody wants everything on disk and training to end; answered by the training thread at its next update().

    ``ask`` may come at any bytecode of any thread, from a signal handler too: it sets a flag and nothing else.
    """

    def __init__(self) -> None:
        self._is_asked = False  # set by anybody, cleared by the training thread alone
        self._is_answered = False  # the training thread's

    def ask(self) -> None:
        """Ask for it."""
        self._is_asked = True

    def take(self) -> bool:
        """Whether it was asked for since the last time; the caller is going to do it."""
        if not self._is_asked:
            return False
        self._is_asked = False  # one that is asked for right here is answered too: nothing has been done yet
        return True

    def answer(self) -> None:
        """It was done."""
        self._is_answered = True

    @property
    def is_answered(self) -> bool:
        """Whether it was done, and not asked for again since."""
        return self._is_answered and not self._is_asked


def shut_down(
    dispatch: UpdateDispatcher, guard: WriteGuard | None, remove_hooks: Callable[[], None], process: int
) -> None:
    """End everything that an engine had started; runs when it is closed, dropped, or the interpreter exits.

    Args:
        dispatch: Its lanes are closed, then the sink.
        guard: Kept alive, and with it the order of optimizers after the lanes, until they have ended.
        remove_hooks: To be called in between.
        process: Which one the engine was made in.
    """
    if process != os.getpid():
        return  # a forked child has none of the threads
    if isinstance(threading.current_thread(), BackgroundThread):
        # The garbage collector runs on any thread, and one of ours cannot wait for itself; exit waits for this one.
        arguments = (dispatch, guard, remove_hooks, process)
        threading.Thread(target=shut_down, args=arguments, name="nitrous-ema-ending", daemon=False).start()
        return
    with ExitStack() as ending:  # last in, first out; each, whatever the others raise
        for sink in dispatch.sinks:
            ending.callback(sink.close)
        ending.callback(remove_hooks)
        for lane in dispatch.lanes():
            ending.callback(_log_untold, lane)
            ending.callback(lane.close)
        ending.callback(dispatch.flush_deferred)


def _log_untold(lane: Lane) -> None:
    error = lane.take_error()
    if error is not None:
        _log.error("averaging failed, and nobody asked for this failure any more", exc_info=error)
