"""The end of an EMA: drained on request, closed, dropped, or ended with the interpreter.

An EMA has threads, hooks on optimizers and queued work. They must end in one order whichever way the EMA ends, and
queued work must be done first. ``shut_down`` is the finalizer of the engine, so it runs exactly once. It refers to the
engine's parts and never to the engine, because that reference would keep the engine alive.

END-1  The end takes at most ``wait_timeout`` where a lane's work    test_interpreter_ends_beside_work_that_never_ends
    never ends, as on a device whose stream waits for a collective
    that another rank never joins.
END-2  Memory that such work may still use is never freed.           test_memory_of_work_that_never_ends_is_held
END-3  After the end nothing is held but the averages: neither       test_closed_ema_holds_only_the_averages
    slots, nor stashes, nor storages of parameters.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack

from nitrous_ema._base.arguments import clamp_timeout, deadline_after
from nitrous_ema.averaging.execution.background_thread import BackgroundThread
from nitrous_ema.averaging.execution.dispatch import UpdateDispatcher
from nitrous_ema.averaging.execution.interfaces import Lane, SnapshotSink
from nitrous_ema.averaging.execution.write_guard import WriteGuard

_unfinished: list[object] = []  # whatever lanes may still use that did not end in time (END-2)

_log = logging.getLogger(__name__)


class DrainRequest:
    """A request that everything be written to disk, which the training thread carries out at its next update().

    ``request`` may run at any bytecode of any thread, also in a signal handler. It therefore sets a flag, and takes no
    lock: the interrupted code might hold that lock.
    """

    def __init__(self) -> None:
        self._is_requested = False  # set by any thread, cleared by the training thread alone
        self._is_done = False  # written by the training thread alone

    def request(self) -> None:
        """Request a drain."""
        self._is_requested = True

    def take(self) -> bool:
        """Return whether a drain was requested since the last call. The caller carries it out."""
        if not self._is_requested:
            return False
        # A request that arrives between the two lines is covered by the same drain, which has not begun yet.
        self._is_requested = False
        return True

    def mark_done(self) -> None:
        """Record that the drain was carried out."""
        self._is_done = True

    @property
    def is_done(self) -> bool:
        """Whether a drain was carried out and no other drain was requested since."""
        return self._is_done and not self._is_requested


def shut_down(
    dispatch: UpdateDispatcher,
    guard: WriteGuard | None,
    remove_hooks: Callable[[], None],
    process: int,
    timeout_seconds: float | None,
) -> None:
    """End everything that an engine started; runs when it is closed or dropped, or when the interpreter exits.

    Args:
        dispatch: Its lanes are closed, then the sink.
        guard: Referenced only: while it lives, optimizers are ordered after the lanes.
        remove_hooks: Called after the lanes have ended and before the sink is closed.
        process: Id of the process in which the engine was made.
        timeout_seconds: For everything together; None: no limit.
    """
    if process != os.getpid():
        return  # a forked child has none of the threads
    if isinstance(threading.current_thread(), BackgroundThread):
        # The garbage collector may drop the EMA on any thread. A thread of ours cannot join itself, so a new thread
        # does the work; it is no daemon, so that the interpreter's exit waits for it.
        arguments = (dispatch, guard, remove_hooks, process, timeout_seconds)
        threading.Thread(target=shut_down, args=arguments, name="nitrous-ema-shutdown", daemon=False).start()
        return
    remaining_seconds = deadline_after(clamp_timeout(timeout_seconds))
    # Callbacks run in reverse order, and each one runs whatever the others raise: deferred updates, lanes, hooks, sink.
    with ExitStack() as stack:
        for sink in dispatch.sinks:
            stack.callback(_close_sink, sink, remaining_seconds)
        stack.callback(remove_hooks)
        stack.callback(_close_lanes, dispatch, remaining_seconds)
        stack.callback(dispatch.flush_deferred)


def _close_sink(sink: SnapshotSink, remaining_seconds: Callable[[], float | None]) -> None:
    sink.close(remaining_seconds())


def _close_lanes(dispatch: UpdateDispatcher, remaining_seconds: Callable[[], float | None]) -> None:
    have_ended = True
    for lane in dispatch.lanes():
        try:
            lane.close(remaining_seconds())
        except TimeoutError as error:
            _log.error("timeout at the end of the EMA: %s", error)
            have_ended = False
        _log_unreported_error(lane)
    if have_ended:
        dispatch.release()
    else:
        _unfinished.append(dispatch)


def _log_unreported_error(lane: Lane) -> None:
    error = lane.take_error()
    if error is not None:
        _log.error("averaging failed after the last chance to report it", exc_info=error)
