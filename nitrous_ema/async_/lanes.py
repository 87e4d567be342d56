"""Lanes that run averaging in the background. The only file that makes streams, events or threads for such work.

``ThreadLane`` (CPU) is one worker thread and a bounded queue. ``AcceleratorLane`` is a side stream and a copy stream on
one device, written against torch's generic streams and events; its Python code runs on the caller's thread and only
queues work. Both run what they are given in order; what is queued holds no reference to the EMA that queued it.

Who waits for whom on an accelerator, and by which event:

L1  Averaging reads parameters after what the      _ready  test_update_reads_the_weights_of_its_own_step
    caller has queued before.
L2  The caller writes parameters after averaging   _read   test_optimizer_does_not_write_what_is_still_read
    has read them; it waits for no work that reads         test_optimizer_does_not_wait_for_a_snapshot_copy
    none of them.
L3  A snapshot copy reads averages after the last  _done   test_snapshot_holds_the_averages_of_its_step
    update wrote them, or the caller loaded them.  _ready
L4  Averages are written after the snapshot copy   marks   test_next_update_waits_for_the_snapshot_copy
    of that range has read them.
L5  The caller reads averages after the last       _done   test_averages_can_be_read_at_any_time
    update wrote them, and the next update writes  _ready
    them after that read.
L6  Averaging reads what the caller has kept for   _kept   test_kept_parameters_are_averaged_after_they_were_kept
    it after that was kept, and whoever writes             test_parameters_are_written_after_they_were_kept
    parameters does so after it too, on whatever
    stream either is.
L7  The stream and the device that were current            test_current_stream_and_device_are_left_alone
    stay so.

The current stream is asked for at every call: users run under other streams. Streams and events live as long as the
lane, and every tensor that queued work uses is held until then or outlives it, so no ``record_stream`` is needed.

Longer than the house's 300 lines: both lanes answer the same table.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nitrous_ema.async_.graph_capture import let_others_capture
from nitrous_ema.averaging.execution.inline import ReachedMark, attempt
from nitrous_ema.averaging.execution.interfaces import BackgroundThread, Mark, Work

_MAX_QUEUED = 16
_POLL_SECONDS = 0.001


class ThreadLane:
    """One worker thread; for averages that live in host memory.

    state of a piece of work   owner            leaves by
    QUEUED                     the queue        the worker takes it -> RUNNING, or passes it over after an error
    RUNNING                    worker thread    it returns or raises -> DONE
    """

    def __init__(self) -> None:
        # A lock of its own: a Condition's __enter__ is Python, and Ctrl-C inside it would leave it held for ever.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # All guarded by _lock:
        self._queue: deque[tuple[Work, Work | None] | None] = deque()
        self._queued = 0  # pieces of work ever queued
        self._done = 0  # of these, how many have ended
        self._last_run = 0  # the value of _queued right after the last run()
        self._last_read = 0  # the same of the last run() that reads parameters
        self._error: BaseException | None = None
        self._passed_over = 0  # work up to this one came after an error that was taken: it is not run either
        self._closed = False
        self._thread = BackgroundThread(self._work, "averaging")
        self._thread.start()

    def enqueue_write(self, work: Work, *, reads_parameters: bool = True, abandon: Work | None = None) -> None:
        """Queue averaging work."""
        with self._lock:
            self._put(work, abandon)
            self._last_run = self._queued
            if reads_parameters:
                self._last_read = self._queued

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        """Queue work that reads the averages; ``abandon`` is called if it cannot be run."""
        with self._lock:
            self._put(work, abandon)

    def stash(self, work: Work) -> None:
        """Do it now: what the caller has done is done."""
        work()

    def order_writer(self) -> None:
        """Block until every ``run`` that reads parameters is done; what was queued later is not waited for."""
        with self._lock:
            last = self._last_read
            self._changed.wait_for(lambda: self._done >= last)

    def order_reader(self) -> None:
        """Block until every ``run`` so far is done; a snapshot copy that was queued later is not waited for."""
        with self._lock:
            last = self._last_run
            self._changed.wait_for(lambda: self._done >= last)

    def is_capturing(self) -> bool:
        """Nothing is ever captured on the CPU."""
        return False

    def mark(self) -> Mark:
        """Work runs in order, so every mark is reached when work after it runs."""
        return ReachedMark()

    def take_error(self) -> BaseException | None:
        """What queued work raised since the last call."""
        if self._error is None:  # asked at every update; what is set a moment later is found at the next one
            return None
        with self._lock:
            error, self._error = self._error, None
            self._passed_over = self._queued
            return error

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Block until all queued work is done. Raises TimeoutError."""
        with self._lock:
            last = self._queued
            if not self._changed.wait_for(lambda: self._done >= last, timeout_seconds):
                raise TimeoutError(f"{last - self._done} pieces of averaging work are still queued.")

    def close(self, timeout_seconds: float | None = None) -> None:
        """Drain and end the thread. Raises TimeoutError."""
        self.drain(timeout_seconds)
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.append(None)
                self._changed.notify_all()
        self._thread.join(timeout_seconds)

    def _put(self, work: Work, abandon: Work | None) -> None:
        if self._closed:
            raise RuntimeError("work for a lane that was closed: this is a bug in nitrous_ema.")
        self._changed.wait_for(lambda: len(self._queue) < _MAX_QUEUED)
        self._queue.append((work, abandon))
        self._queued += 1
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: bool(self._queue))
                item = self._queue.popleft()
                failed = self._error is not None or self._done < self._passed_over
                self._changed.notify_all()
            if item is None:
                return
            error = _error_of(*item, failed=failed)
            del item  # what it holds must not live until the next one comes
            with self._lock:
                self._error = self._error or error
                self._done += 1
                self._changed.notify_all()


def _error_of(work: Work, abandon: Work | None, *, failed: bool) -> BaseException | None:
    """Run one piece of work, unless something before it failed. Returns what it raised."""
    if failed:
        if abandon is not None:
            abandon()
        return None
    try:
        with torch.no_grad():  # modes are the thread's own; this one starts with gradients on
            attempt(work, abandon)
    except BaseException as error:
        return error
    return None


class AcceleratorLane:
    """A side stream for averaging and one for copies to the host, on one device.

    Args:
        device: With its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._update_stream = torch.Stream(device=device)
        self._copy_stream = torch.Stream(device=device)
        self._ready = torch.Event(device)  # recorded after what the caller has queued
        self._read = torch.Event(device)  # recorded after the last averaging work that reads parameters
        self._kept = torch.Event(device)  # recorded after the last copies of parameters that the caller has made
        self._done = torch.Event(device)  # recorded after the last averaging work
        # Waiting for an event that was never recorded is no wait.
        self._has_read = self._has_kept = self._has_run = False

    def enqueue_write(self, work: Work, *, reads_parameters: bool = True, abandon: Work | None = None) -> None:
        """Queue averaging work on the side stream."""
        self._ready.record(_current_stream(self._device))
        self._update_stream.wait_event(self._ready)
        try:
            with _entered(self._update_stream):
                attempt(work, abandon)
        finally:
            self._done.record(self._update_stream)
            self._has_run = True
            if reads_parameters:
                self._read.record(self._update_stream)
                self._has_read = True

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        """Queue work that reads the averages on the copy stream."""
        self._ready.record(_current_stream(self._device))  # averages may have been loaded on the caller's stream
        self._copy_stream.wait_event(self._ready)
        if self._has_run:
            self._copy_stream.wait_event(self._done)
        with _entered(self._copy_stream):
            attempt(work, abandon)

    def stash(self, work: Work) -> None:
        """Queue it on the caller's current stream."""
        caller = _current_stream(self._device)
        if self._has_kept:
            caller.wait_event(self._kept)  # of another stream, maybe; the event speaks for both from now on
        work()
        self._kept.record(caller)
        self._has_kept = True
        self._update_stream.wait_event(self._kept)

    def order_writer(self) -> None:
        """The caller's current stream waits, on the device, until parameters were read; the host does not."""
        caller = _current_stream(self._device)
        if self._has_read:
            caller.wait_event(self._read)
        if self._has_kept:
            caller.wait_event(self._kept)

    def order_reader(self) -> None:
        """The caller's current stream waits, on the device, for all averaging so far; the host does not."""
        if self._has_run:
            _current_stream(self._device).wait_event(self._done)

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured into a graph; False where the backend has no graphs."""
        module = torch.get_device_module(self._device)
        is_capturing: Callable[[], bool] = getattr(module, "is_current_stream_capturing", _never)
        return is_capturing()

    def mark(self) -> Mark:
        """A mark backed by an event that a host thread can wait for without spinning."""
        return _DeviceMark(self._device)

    def take_error(self) -> BaseException | None:
        """Work is queued by the caller's own call, which raises."""
        return None

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Block until all queued work is done. Raises TimeoutError."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        for stream in (self._update_stream, self._copy_stream):
            if deadline is None:
                stream.synchronize()
            while deadline is not None and not stream.query():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"averaging work on {self._device} is still queued.")
                time.sleep(_POLL_SECONDS)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Drain; streams go back to torch with this object. Raises TimeoutError."""
        self.drain(timeout_seconds)


class _DeviceMark:
    """A point on whatever stream of the device is current when it is recorded."""

    def __init__(self, device: torch.device) -> None:
        # torch.Event(blocking=True) ignores the flag, and spinning would take a core from the trainer: host waits use
        # the device module's own events. These are another structure than torch.Event, and no check keeps a generic
        # stream from misreading one: they are recorded and waited for on the current stream only, never passed one.
        self._may_be_captured = device.type == "cuda"
        event_class: Callable[..., Any] = torch.get_device_module(device).Event
        try:
            self._event = event_class(enable_timing=False, blocking=True)
        except TypeError:
            self._event = event_class(enable_timing=False)

    def record(self) -> None:
        """Place it here."""
        self._event.record()

    def wait_on_device(self) -> None:
        """What is queued from here comes after it, on the device."""
        self._event.wait()

    def wait(self) -> None:
        """Block this thread until it is reached; other threads run meanwhile."""
        if self._may_be_captured and isinstance(threading.current_thread(), BackgroundThread):
            let_others_capture()
        self._event.synchronize()

    def is_reached(self) -> bool:
        """Ask the driver; nobody waits."""
        return bool(self._event.query())


def _never() -> bool:
    return False


def _current_stream(device: torch.device) -> torch.Stream:
    return torch.accelerator.current_stream(device)


@contextmanager
def _entered(stream: torch.Stream) -> Iterator[None]:
    """Make a stream current. ``with stream`` needs torch 2.7; ``set_stream`` switches the device too."""
    device = _device_index()
    before = _current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        _set_device_index(device)


# The names of torch 2.6 are deprecated since 2.8.
_SUFFIX = "index" if hasattr(torch.accelerator, "current_device_index") else "idx"
_device_index: Callable[[], int] = getattr(torch.accelerator, f"current_device_{_SUFFIX}")
_set_device_index: Callable[[int], None] = getattr(torch.accelerator, f"set_device_{_SUFFIX}")
