"""Lanes that run averaging in the background. The only file that makes streams, events or threads for such work.

Averaging beside training has one danger: memory is read while it is written. Two streams, or two threads, have no order
of their own, so each pair of a writer and a reader needs a wait. The idea of this module is that an ``Event`` stands
for each kind of work that others must wait for, and that all waits are on the device: the host queues them and goes on.
``ThreadLane`` (CPU) is one worker thread with a bounded queue; there the training thread itself waits.
``AcceleratorLane`` is a side stream and a copy stream on one device, written against torch's generic streams and
events. Its Python code runs on the caller's thread and only queues work. Both lanes run their work in order.

Which work waits for which on an accelerator, and by which event:

LANE-1  Averaging reads parameters after what the  _ready    test_update_reads_the_weights_of_its_own_step
    caller has queued before update(); so does a   _deferred test_deferred_update_is_ordered_whoever_asks_for_it
    stash, on whichever stream it is made.
LANE-2  The caller writes parameters after         _read     test_optimizer_does_not_write_what_is_still_read
    averaging has read them; it does not wait for            test_optimizer_does_not_wait_for_a_snapshot_copy
    work that reads no parameters.
LANE-3  A readback reads averages after the last   _done     test_snapshot_holds_the_averages_of_its_step
    update wrote them, or the caller loaded them.  _ready
LANE-4  Averages are written after the readback    marks     test_next_update_waits_for_the_snapshot_copy
    of their range has read them.
LANE-5  The caller reads averages after the last   _done     test_averages_can_be_read_at_any_time
    update wrote them, and the next update writes  _ready    test_averages_can_be_read_on_another_stream
    them after what was queued since on the streams
    where they were read.
LANE-6  Averaging reads stashed parameters after   _stashed  test_stashed_parameters_are_averaged_after_the_copy
    they were stashed, and parameters are written            test_parameters_are_written_after_they_were_stashed
    after they were stashed, on whichever streams
    either happens.
LANE-7  The current stream and the current device            test_current_stream_and_device_are_left_alone
    stay the same for the caller, and threads of             test_writers_wait_on_the_device_of_the_averages
    the package touch no device but the lane's.

The current stream is looked up at every call, because users run under other streams. Streams and events live as long as
the lane. Every tensor that queued work uses is held until the work is done, or outlives it, so no ``record_stream`` is
needed. Queued work holds no reference to the EMA that queued it.

Longer than 300 lines: both lanes implement the same table.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nitrous_ema._base.arguments import pluralize
from nitrous_ema._base.waiting import wait_for
from nitrous_ema.async_.graph_capture import let_others_capture
from nitrous_ema.averaging.execution.background_thread import BackgroundThread
from nitrous_ema.averaging.execution.inline import ReachedMark, attempt
from nitrous_ema.averaging.execution.interfaces import Mark, Work
from nitrous_ema.errors import bug

_MAX_QUEUED = 16
_POLL_SECONDS = 0.001


class ThreadLane:
    """One worker thread and a bounded queue, for averages in host memory.

    state of a piece of work   owner            leaves by
    QUEUED                     the queue        the worker takes it -> RUNNING, or abandons it after an error -> DONE
    RUNNING                    worker thread    it returns or raises -> DONE
    """

    def __init__(self) -> None:
        # A lock of its own: a Condition's __enter__ is Python code, and Ctrl-C inside it would leave the lock held for
        # ever.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # All guarded by _lock:
        self._queue: deque[tuple[Work, Work | None] | None] = deque()
        self._queued = 0  # pieces of work ever queued
        self._done = 0  # how many of these have ended
        self._last_write = 0  # the value of _queued right after the last enqueue_write()
        self._last_read = 0  # the same of the last enqueue_write() that reads parameters
        self._error: BaseException | None = None
        self._abandoned = 0  # work up to this number was queued before an error was taken: it is not run either
        self._closed = False
        self._thread = BackgroundThread(self._work, "averaging")
        self._thread.start()

    def enqueue_write(self, work: Work, *, reads_parameters: bool = True, abandon: Work | None = None) -> None:
        """Queue averaging work; block while the queue is full."""
        with self._lock:
            self._put(work, abandon)
            self._last_write = self._queued
            if reads_parameters:
                self._last_read = self._queued

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        """Queue work that reads the averages; block while the queue is full."""
        with self._lock:
            self._put(work, abandon)

    def stash(self, work: Work) -> None:
        """Run the work now: on the CPU the caller's earlier work is done when it calls."""
        work()

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return new memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def order_deferred(self) -> None:
        """Do nothing: on the CPU the caller's earlier work is done when it calls."""

    def order_writer(self) -> None:
        """Block until all queued work so far that reads parameters is done; work queued behind it is not waited for."""
        with self._lock:
            last = self._last_read
            self._changed.wait_for(lambda: self._done >= last)

    def order_reader(self) -> None:
        """Block until every ``enqueue_write`` so far is done; a readback that was queued later is not waited for."""
        with self._lock:
            last = self._last_write
            self._changed.wait_for(lambda: self._done >= last)

    def is_capturing(self) -> bool:
        """Return False: nothing is ever captured on the CPU."""
        return False

    def mark(self) -> Mark:
        """Return a mark that is always reached: work runs in order, so a mark is reached when work after it runs."""
        return ReachedMark()

    def take_error(self) -> BaseException | None:
        """Return what queued work raised since the last call."""
        # Without the lock first: this is called at every update, and the next call finds an error that is set later.
        if self._error is None:
            return None
        with self._lock:
            error, self._error = self._error, None
            # Work that is queued behind the failure would average into, or write, averages that are no longer valid.
            self._abandoned = self._queued
            return error

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Block until all queued work is done. Raises TimeoutError."""
        with self._lock:
            last = self._queued
            if not wait_for(self._changed, lambda: self._done >= last, timeout_seconds):
                raise TimeoutError(f"averaging work is still queued: {pluralize(last - self._done, 'piece')}.")

    def close(self, timeout_seconds: float | None = None) -> None:
        """Drain the queue and end the thread. Raises TimeoutError."""
        self.drain(timeout_seconds)
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.append(None)
                self._changed.notify_all()
        self._thread.join(timeout_seconds)

    def _put(self, work: Work, abandon: Work | None) -> None:
        """Queue one piece of work; the caller holds ``_lock``."""
        if self._closed:
            raise bug("work for a lane that was closed")
        # Bounded, so that a trainer that is faster than the averaging cannot queue work, and the tensors that the work
        # holds, without limit.
        self._changed.wait_for(lambda: len(self._queue) < _MAX_QUEUED)
        self._queue.append((work, abandon))
        self._queued += 1
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: bool(self._queue))
                item = self._queue.popleft()
                failed = self._error is not None or self._done < self._abandoned
                self._changed.notify_all()  # _put() may be waiting for space in the queue
            if item is None:
                return
            error = _error_of(*item, failed=failed)
            del item  # otherwise its tensors would be held until the next work arrives
            with self._lock:
                self._error = self._error or error
                self._done += 1
                self._changed.notify_all()


def _error_of(work: Work, abandon: Work | None, *, failed: bool) -> BaseException | None:
    """Run one piece of work, unless work before it failed, and return what it raised."""
    if failed:
        if abandon is not None:
            abandon()
        return None
    try:
        with torch.no_grad():  # torch's modes belong to a thread; a new thread starts with gradients enabled
            attempt(work, abandon)
    except BaseException as error:
        return error  # not raised here, where it would end the thread: take_error() returns it to the caller
    return None


class AcceleratorLane:
    """A side stream for averaging, a second one for readbacks, and a third one for memory, on one device.

    Two streams, because a readback may take longer than several steps: on a common stream it would hold up the next
    update, and through it the optimizer.

    Args:
        device: The device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._update_stream = torch.Stream(device=device)
        self._copy_stream = torch.Stream(device=device)
        self._memory_stream = torch.Stream(device=device)
        # Made once and recorded again and again: making events in the training loop would stall on the driver's lock.
        # A stream that already waits for an event is not affected when the event is recorded again (CUDA's contract;
        # tests/support/laggy/contract.py states it for the fake device).
        self._ready = torch.Event(device)  # recorded after what the caller has queued
        self._read = torch.Event(device)  # recorded after the last averaging work that reads parameters
        self._stashed = torch.Event(device)  # recorded after the caller has last stashed parameters
        self._done = torch.Event(device)  # recorded after the last averaging work
        self._deferred = torch.Event(device)  # recorded after what the caller had queued at the last deferred update
        # Waits for events that were never recorded are left out: they would wait for nothing.
        self._has_read = self._has_stashed = self._has_run = self._has_deferred = False
        self._readers: set[torch.Stream] = set()  # where averages may have been read since the last averaging work
        self._probe()

    def enqueue_write(self, work: Work, *, reads_parameters: bool = True, abandon: Work | None = None) -> None:
        """Queue averaging work on the side stream."""
        # For two reasons: the work reads parameters that the caller has written (LANE-1), and writes averages that the
        # caller may be reading (LANE-5).
        for stream in {_current_stream(self._device), *self._readers}:
            self._ready.record(stream)
            self._update_stream.wait_event(self._ready)
        self._readers.clear()
        try:
            with _entered(self._update_stream):
                attempt(work, abandon)
        finally:
            # Also after an error: a part of the work may be queued, and others must wait for that part.
            self._done.record(self._update_stream)
            self._has_run = True
            # Only here, because the optimizer waits for _read: work that reads no parameters may be queued behind waits
            # for readbacks, and would hold up the optimizer for nothing.
            if reads_parameters:
                self._read.record(self._update_stream)
                self._has_read = True

    def enqueue_read(self, work: Work, abandon: Work) -> None:
        """Queue work that reads the averages on the copy stream."""
        # The caller may have loaded averages on its own stream (LANE-3).
        self._ready.record(_current_stream(self._device))
        self._copy_stream.wait_event(self._ready)
        if self._has_run:
            self._copy_stream.wait_event(self._done)
        # No event is recorded here: the work itself records a mark for each page, and updates wait for these (LANE-4).
        with _entered(self._copy_stream):
            attempt(work, abandon)

    def stash(self, work: Work) -> None:
        """Queue the work on the caller's current stream.

        The stash must be complete before the caller writes parameters, which it does on this stream: no wait is needed
        there.
        """
        caller = _current_stream(self._device)
        if self._has_stashed:
            # The last stash may have been made on another stream. After this wait the event, recorded below, stands for
            # both stashes.
            caller.wait_event(self._stashed)
        if self._has_deferred:
            # The parameters may have been written on another stream, which the caller has left since update().
            caller.wait_event(self._deferred)
        with _entered(caller):  # makes the lane's device current, too
            work()
        self._stashed.record(caller)
        self._has_stashed = True
        self._update_stream.wait_event(self._stashed)

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return new memory from the pool of a stream on which no work runs.

        Memory of the caller's stream would be a block that the trainer is about to use again. Memory of the other two
        streams may still be used by queued work.
        """
        with _entered(self._memory_stream):
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._ready.record(self._memory_stream)
        # torch hands out 32 streams in turn: this one may be a stream of the trainer's, with work of its own.
        _current_stream(self._device).wait_event(self._ready)
        return memory

    def order_deferred(self) -> None:
        """Order later work and stashes, on the device, after what the caller has queued so far."""
        caller = _current_stream(self._device)
        if self._has_deferred:
            # As in stash(): the event, recorded below, then stands for all updates that were deferred.
            caller.wait_event(self._deferred)
        self._deferred.record(caller)
        self._has_deferred = True
        self._update_stream.wait_event(self._deferred)

    def order_writer(self) -> None:
        """Make the caller's current stream wait, on the device, until parameters were read; the host does not wait."""
        caller = _current_stream(self._device)
        if self._has_read:
            caller.wait_event(self._read)
        if self._has_stashed:
            # Another stream may still be copying parameters that this caller is about to write.
            caller.wait_event(self._stashed)

    def order_reader(self) -> None:
        """Make the caller's current stream wait, on the device, for all averaging so far; the host does not wait."""
        caller = _current_stream(self._device)
        self._readers.add(caller)
        if self._has_run:
            caller.wait_event(self._done)

    def is_capturing(self) -> bool:
        """Return whether the current stream is being captured into a graph; False if the backend has no graphs."""
        module = torch.get_device_module(self._device)
        is_capturing: Callable[[], bool] = getattr(module, "is_current_stream_capturing", _never)
        return is_capturing()

    def mark(self) -> Mark:
        """Return a mark backed by an event that a host thread can wait for without spinning."""
        return _DeviceMark(self._device)

    def _probe(self) -> None:
        """Make every call that drain() and the marks make: some backends have streams without some of them (MPS)."""
        mark = self.mark()
        with _entered(self._copy_stream):
            mark.record()
            mark.wait_on_device()
        mark.is_reached()
        mark.wait_on_host()
        self.drain()
        self.drain(_POLL_SECONDS)

    def take_error(self) -> BaseException | None:
        """Return None: work is queued by the caller's own call, which raises."""
        return None

    def drain(self, timeout_seconds: float | None = None) -> None:
        """Block until all queued work is done. Raises TimeoutError."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        for stream in (self._update_stream, self._copy_stream):
            if deadline is None:
                stream.synchronize()
            # Polled, because torch has no wait for a stream with a timeout.
            while deadline is not None and not stream.query():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"averaging work on {self._device} is still queued.")
                time.sleep(_POLL_SECONDS)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Drain both streams; torch takes them back when this object is freed. Raises TimeoutError."""
        self.drain(timeout_seconds)


class _DeviceMark:
    """A point on the stream of the device that is current when the mark is recorded."""

    def __init__(self, device: torch.device) -> None:
        # Host waits use the device module's own events: torch.Event(blocking=True) ignores the flag, and spinning would
        # take a core from the trainer. Such an event is another structure than torch.Event, and torch does not check
        # that a generic stream is given a generic event (torch/csrc/Stream.cpp, torch/csrc/cuda/Event.cpp). The event
        # is therefore recorded and waited for on the current stream only, and never passed to a stream.
        self._device = device
        event_class: Callable[..., Any] = torch.get_device_module(device).Event
        try:
            self._event = event_class(enable_timing=False, blocking=True)
        except TypeError:
            self._event = event_class(enable_timing=False)  # some device modules have no such flag

    def record(self) -> None:
        """Place the mark on the current stream."""
        self._event.record()

    def wait_on_device(self) -> None:
        """Order the work queued next on the current stream after the mark."""
        self._event.wait()

    def wait_on_host(self) -> None:
        """Block this thread until the mark is reached; other threads run meanwhile."""
        self._prepare_thread()
        self._event.synchronize()

    def is_reached(self) -> bool:
        """Query the driver, without a wait."""
        self._prepare_thread()
        return bool(self._event.query())

    def _prepare_thread(self) -> None:
        if not isinstance(threading.current_thread(), BackgroundThread):
            return
        # Only the package's own threads enter the relaxed mode. In a trainer's thread it would allow forbidden calls
        # during that thread's own captures.
        if self._device.type == "cuda":
            let_others_capture()
        # A new thread's device is 0, and the driver would make a context there, of hundreds of MB: in each process of a
        # node that trains on a device per process.
        _set_device_index(self._device.index)


def _never() -> bool:
    return False


def _current_stream(device: torch.device) -> torch.Stream:
    return torch.accelerator.current_stream(device)


@contextmanager
def _entered(stream: torch.Stream) -> Iterator[None]:
    """Make a stream current for a block, and restore the caller's stream and device (LANE-7).

    ``with stream`` needs torch 2.7. ``set_stream`` changes the current device as well, so that is restored too.
    """
    device = _device_index()
    before = _current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        _restore_device_index(device)


# The names of torch 2.6 are deprecated since 2.8.
_SUFFIX = "index" if hasattr(torch.accelerator, "current_device_index") else "idx"
_device_index: Callable[[], int] = getattr(torch.accelerator, f"current_device_{_SUFFIX}")
_set_device_index: Callable[[int], None] = getattr(torch.accelerator, f"set_device_{_SUFFIX}")
# Restored only where the device has a context already. A thread that has chosen no device is on device 0, which may be
# another process's. So does ``with torch.accelerator.device_index(...)``, which older releases of torch lack.
_restore_device_index: Callable[[int], Any] = getattr(torch._C, "_accelerator_maybeExchangeDevice", _set_device_index)
