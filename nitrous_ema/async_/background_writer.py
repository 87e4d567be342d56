"""Snapshots in the background: staged into host slots on the lanes, written to the store by threads of this package.

A write may take seconds, and training must not wait. take_snapshot() claims a slot, queues the readbacks into it on
the lanes and returns. When all readbacks are queued the slot goes to a writer thread, which waits for each page on the
host, writes it, and frees the slot. An executor cannot be used: it refuses work once the main thread has ended, just
when the last snapshot must be written. The threads make only long calls that release the interpreter's lock (event
waits, checksums, writes), so they cost the training thread nothing. They are daemons; closing or dropping the EMA
drains them, and so does the end of the interpreter.

WRITER-1  A failed write is reported once, on the caller's        test_failed_write_is_raised_once_at_the_next_call
    thread, with its path and cause.
WRITER-2  The training thread waits for nothing but a free slot,  test_full_queue_waits_no_longer_than_asked
    and no longer than ``wait_timeout``.
WRITER-3  Every snapshot's slot is freed, however the snapshot    test_failed_write_gives_its_slot_back
    ends.

Longer than 300 lines: the sink stands with the body of its threads.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nitrous_ema._base.arguments import clamp_timeout, deadline_after, format_bytes, pluralize
from nitrous_ema.async_.staging import Slot, SlotPool, SlotReadbacks, StagingCopies
from nitrous_ema.averaging.config import AsyncEMAConfig
from nitrous_ema.averaging.execution.background_thread import BackgroundThread
from nitrous_ema.averaging.execution.device_to_host import ChunkCopier
from nitrous_ema.averaging.execution.host_memory import check_host_memory, pinned_or_pageable
from nitrous_ema.averaging.execution.interfaces import Lane, PendingSnapshot
from nitrous_ema.errors import NitrousError, SnapshotWriteError, bug, warn
from nitrous_ema.snapshots.header import Stamp
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.stats import WriteStats
from nitrous_ema.snapshots.store import SnapshotStore

_log = logging.getLogger(__name__)

_LESS_MEMORY = "Lower max_pending, or store averages in half the bytes (checkpoint_dtype=torch.float16)."


class BackgroundSnapshotSink:
    """Stages snapshots in slots and writes them with threads of its own.

    Args:
        retaining_writer: Writes the snapshots, and drops the snapshots that ``keep=`` does not retain.
        layout: The layout of the files.
        config: How many snapshots are in flight, and what happens on a full queue or a failed write.
        pin: Use pinned host memory; falls back to pageable memory, with a warning, if pinning fails.
    """

    def __init__(self, retaining_writer: RetainingWriter, layout: Layout, config: AsyncEMAConfig, pin: bool) -> None:
        self._config = config
        self._layout = layout
        self._pool = _make_pool(layout, config.max_pending, pin)
        self._copiers: dict[torch.device, ChunkCopier] = {}  # their memory is freed with the slots
        self._warned_of_pageable = pin  # pinned slots need no warning, and a failure to pin them was warned about
        self._retaining_writer = retaining_writer
        self._ledger = retaining_writer.ledger
        self._failures: queue.SimpleQueue[SnapshotWriteError] = queue.SimpleQueue()
        self._sealed: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._lost: set[int] = set()  # steps; added by writers, discarded by the training thread
        # No bound method: a thread that refers to this object would keep it alive, and a dropped EMA would never end.
        work = partial(_write_all, self._sealed, self._pool, retaining_writer, self._failures, self._lost)
        self._threads = [BackgroundThread(work, f"writer-{index}") for index in range(config.num_writers)]
        for started, thread in enumerate(self._threads):
            try:
                thread.start()
            except NitrousError:
                for _ in range(started):
                    self._sealed.put(None)  # ends one of the threads that did start
                raise

    def take_snapshot(self, pending: PendingSnapshot, lane: Callable[[torch.device], Lane]) -> bool:
        """Queue the readbacks of a snapshot, and return True; return False if the snapshot is skipped.

        Raises:
            NitrousError: All slots are busy, and ``on_full`` is "raise".
            TimeoutError: No slot became free in time. The averages are untouched.
        """
        self._warn_of_pageable_slots(pending)
        slot = self._claim(pending.stamp.step)
        if slot is None:
            return False
        self._lost.discard(pending.stamp.step)
        abandon = partial(_abandon, slot, self._pool, self._retaining_writer, pending.stamp)
        # Registered before any write can begin: under a retention rule each snapshot waits for those taken before it.
        self._retaining_writer.expect(pending.stamp)
        try:
            lanes = {device: lane(device) for device in pending.flat_buffers.devices}
            self._pool.assign(slot, pending, {device: lanes[device].mark for device in lanes})
            self._enqueue_count(slot, pending, lanes)
            for device, copies in slot.copies.items():
                copier = self._copiers.setdefault(device, ChunkCopier(device, self._layout))
                fill = partial(_fill, slot, pending, copies, copier, self._pool, self._sealed)
                lanes[device].enqueue_read(fill, abandon)
        except BaseException:
            abandon()
            raise
        return True

    def resize(self, layout: Layout) -> None:
        """Give the slots pages for another layout. No snapshot may be in flight.

        Raises:
            NitrousError: There is not enough host memory.
        """
        try:
            self._pool.resize(layout)
        except (RuntimeError, MemoryError) as error:
            raise NitrousError(f"Not enough host memory for larger snapshots: {error}. {_LESS_MEMORY}") from error
        self._layout = layout
        self._copiers.clear()

    def _enqueue_count(self, slot: Slot, pending: PendingSnapshot, lanes: Mapping[torch.device, Lane]) -> None:
        """Queue a copy of the count of skipped updates, on the device and in order with the updates that count.

        The readback of that copy is queued with the pages. On the lane it would wait for other readbacks, and the next
        update would wait for it: a device has few engines that copy to the host.
        """
        if self._config.on_nonfinite == "skip":
            now = pending.flat_buffers.num_skipped
            if slot.count is None or slot.count.device != now.device:
                slot.count = torch.zeros_like(now)
            lane = lanes[pending.flat_buffers.groups[0].device]
            lane.enqueue_write(partial(_copy_count, now, slot.count), reads_parameters=False)

    def has_lost(self, step: int) -> bool:
        """Return whether a snapshot of this step was taken and could not be written."""
        return step in self._lost

    def readbacks_in_flight(self, device: torch.device) -> SlotReadbacks | None:
        """Return the readbacks that may still be reading averages on a device; None for the CPU.

        The CPU's lane runs updates and readbacks in order, so an update never meets a readback there.
        """
        return None if device.type == "cpu" else self._pool.readbacks_in_flight(device)

    def raise_failures(self) -> None:
        """Report every write that failed since the last call: raise or warn, as ``on_error`` requires.

        Files that could not be dropped cause a warning in both cases, because no snapshot is lost by them.
        """
        self._retaining_writer.report_failures()
        failures = []
        while not self._failures.empty():
            failures.append(self._failures.get())
        if not failures:
            return
        if self._config.on_error == "raise":
            # One error for all failures: a failure that is not raised now would never be reported.
            for other in failures[1:]:
                failures[0].args = (f"{failures[0]} Also: {other}",)
            raise failures[0]
        for failure in failures:
            warn(f"{failure} Training goes on without this snapshot.")

    def stats(self) -> WriteStats:
        """Return the present counters of snapshots; the counters of updates are not set here."""
        return replace(self._ledger.read(), pending=self._pool.num_busy())

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Block until no snapshot is in flight. Raises TimeoutError, which names the steps that still are."""
        unwritten = self._pool.wait_idle(timeout_seconds)
        if unwritten:
            raise TimeoutError(
                f"snapshots of steps {unwritten} are still being written; call flush() or close() again."
            )

    def close(self, timeout_seconds: float | None = None) -> None:
        """Flush within ``wait_timeout``, then end the threads; snapshots not written by then are logged as errors."""
        remaining_seconds = deadline_after(
            clamp_timeout(self._config.wait_timeout if timeout_seconds is None else timeout_seconds)
        )
        unwritten = self._pool.wait_idle(remaining_seconds())
        if unwritten:
            _log.error("timeout at close: snapshots of steps %s are not on disk", unwritten)
        # The end of the queue comes behind the sealed slots: the threads write these slots first, if the time suffices.
        for _ in self._threads:
            self._sealed.put(None)
        for thread in self._threads:
            thread.join(remaining_seconds())
        if not unwritten and not any(thread.is_alive() for thread in self._threads):
            self._pool.free()
            self._copiers.clear()
        # Logged, not raised: close() also runs at interpreter exit, where no caller is left.
        while not self._failures.empty():
            _log.error("snapshot write failed after the last call that could report it: %s", self._failures.get())

    def _warn_of_pageable_slots(self, pending: PendingSnapshot) -> None:
        """Warn, once, if averages were moved to an accelerator after the slots were allocated for the CPU."""
        device = next((device for device in pending.flat_buffers.devices if device.type != "cpu"), None)
        if device is not None and not self._warned_of_pageable:
            self._warned_of_pageable = True
            warn(
                f"The averages are on {device} now, but the host memory for snapshots was allocated for a model on the "
                "CPU and is not pinned, so checkpoint() blocks until everything is copied. Construct the EMA after "
                "moving the model."
            )

    def _claim(self, step: int) -> Slot | None:
        """Return a slot, after a wait if ``on_full`` is "wait"; None if the snapshot is skipped."""
        config = self._config
        slot = self._pool.claim(0)
        if slot is not None:
            return slot
        problem = f"snapshot of step {step}: all {config.max_pending} slots (max_pending) are still being written"
        if config.on_full == "skip":
            _log.warning("%s; the snapshot is skipped", problem)
            self._ledger.add(skipped=1)
            return None
        if config.on_full == "raise":
            raise NitrousError(f"{problem}. Take snapshots less often, or raise max_pending.")
        started = time.monotonic()
        slot = self._pool.claim(clamp_timeout(config.wait_timeout))
        self._ledger.add(seconds_waited=time.monotonic() - started)
        if slot is None:
            raise TimeoutError(
                f"{problem}, after {config.wait_timeout} seconds (wait_timeout). The disk is slow or hangs; averages "
                "and training are untouched. on_full='skip' continues without the snapshot."
            )
        return slot


def _copy_count(num_skipped: Tensor, count: Tensor) -> None:
    count.copy_(num_skipped)


def _fill(
    slot: Slot,
    pending: PendingSnapshot,
    copies: StagingCopies,
    copier: ChunkCopier,
    pool: SlotPool,
    sealed: queue.SimpleQueue[Slot | None],
) -> None:
    """Queue the readbacks of one device. Runs on its lane."""
    if slot.count is not None:
        slot.num_skipped.copy_(slot.count, non_blocking=pool.is_pinned)
    for index in pool.order:
        copier.copy(pending.flat_buffers, pool.spans[index], slot.pages[index], non_blocking=pool.is_pinned)
        # The mark comes before the kernel that lets other copies run. Behind the kernel, everything that holds up the
        # kernel would also delay the mark.
        copies.record()
        copier.yield_copy_engine()
    if pool.filled(slot, pending):
        sealed.put(slot)


def _abandon(slot: Slot, pool: SlotPool, retaining_writer: RetainingWriter, stamp: Stamp) -> None:
    """Drop a snapshot whose readbacks could not be queued, unless a writer thread has it already."""
    if pool.abandon(slot):
        retaining_writer.forget(stamp)


def _make_pool(layout: Layout, num_slots: int, pin: bool) -> SlotPool:
    purpose = f"{pluralize(num_slots, 'snapshot')} (max_pending) of {format_bytes(layout.data_bytes)} each"
    check_host_memory(num_slots * layout.data_bytes, purpose, _LESS_MEMORY)
    return pinned_or_pageable(lambda pin: SlotPool(layout, num_slots, pin=pin), purpose, _LESS_MEMORY, pin=pin)


def _write_all(
    sealed: queue.SimpleQueue[Slot | None],
    pool: SlotPool,
    retaining_writer: RetainingWriter,
    failures: queue.SimpleQueue[SnapshotWriteError],
    lost: set[int],
) -> None:
    """Write sealed slots until the queue returns None. The body of a writer thread."""
    while (slot := sealed.get()) is not None:
        try:
            _write(slot, retaining_writer)
        except BaseException as error:
            # Every error, also one of our own bugs: this thread must go on, and must free the slot (WRITER-3).
            failure = (
                error if isinstance(error, SnapshotWriteError) else _unexpected(slot, retaining_writer.store, error)
            )
            lost.add(failure.step)
            retaining_writer.ledger.add(failed=1, last_error=str(failure))
            failures.put(failure)
            del failure  # its traceback refers to the slot's pages
        finally:
            # A file may fail at its first page. The slot must not be free while readbacks still write into it.
            _wait_copied(slot)
            pool.release(slot)
            del slot  # otherwise held until the next slot arrives


def _write(slot: Slot, retaining_writer: RetainingWriter) -> None:
    pending = slot.pending
    if pending is None:
        raise bug("a sealed slot carries no snapshot")
    snapshot = retaining_writer.write(pending.flat_buffers.layout, pending.stamp, partial(_pages, slot))
    _log.info("snapshot of step %d is on disk: %s", pending.stamp.step, snapshot.paths[0])
    retaining_writer.note_skipped(pending.stamp.step, int(slot.num_skipped))


def _pages(slot: Slot) -> Iterator[memoryview]:
    """Yield the pages in order, each after its readbacks have finished."""
    for number, page in zip(slot.numbers, slot.pages, strict=True):
        for copies in slot.copies.values():
            copies.wait_for_page(number)
        yield page.numpy().data


def _wait_copied(slot: Slot) -> None:
    """Block until no readback writes into a slot any more. Needed where the file failed at an early page."""
    for copies in slot.copies.values():
        # A device that has failed copies nothing more. Its error was reported with the write, or the trainer's next
        # call on the device raises it.
        with suppress(Exception):
            if not copies.all_have_finished():
                copies.wait_for_page(len(slot.pages) - 1)


def _unexpected(slot: Slot, store: SnapshotStore, error: BaseException) -> SnapshotWriteError:
    step = slot.pending.stamp.step if slot.pending is not None else 0
    failure = SnapshotWriteError(f"snapshot of step {step} was not written: {error!r}.", path=store.root, step=step)
    failure.__cause__ = error
    return failure
