"""Snapshots in the background: staged into host slots on the lanes, written to the store by threads of our own.

An executor will not do: it refuses work once the main thread has ended, just when the last snapshot must be written.
The threads do only long calls that release the interpreter's lock (event waits, checksums, writes), so they cost the
training thread nothing; they are daemons, drained by whoever closes the EMA, drops it or ends the interpreter.

W1  A failed write is told once, on the caller's thread,         test_failed_write_is_raised_once_at_the_next_call
    with its path and cause.
W2  The training thread waits for nothing but a free slot, and   test_full_queue_waits_no_longer_than_asked
    no longer than ``wait_timeout``.
W3  Whatever happens to a snapshot, its slot comes back.         test_failed_write_gives_its_slot_back
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from nitrous_ema._base.arguments import clamp_timeout, format_bytes
from nitrous_ema.async_.staging import Slot, SlotPool, SlotReadbacks, StagingCopies, deadline_after
from nitrous_ema.averaging.execution.device_to_host import ChunkCopier
from nitrous_ema.averaging.execution.host_memory import check_host_memory, pinned_or_pageable
from nitrous_ema.averaging.execution.interfaces import BackgroundThread, Lane, PendingSnapshot
from nitrous_ema.errors import NitrousError, SnapshotWriteError, warn
from nitrous_ema.snapshots.header import Stamp
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.stats import WriteStats
from nitrous_ema.snapshots.store import SnapshotStore

_log = logging.getLogger(__name__)

_LESS_MEMORY = "Lower max_pending, or store averages in half the bytes (checkpoint_dtype=torch.float16)."


@dataclass(frozen=True, kw_only=True, slots=True)
class WritePolicy:
    """How snapshots are written in the background."""

    max_pending: int = 2
    """Snapshots on their way at once; each costs host memory of a snapshot's size."""
    on_full: Literal["wait", "skip", "raise"] = "wait"
    """What checkpoint() does when that many are on their way."""
    wait_timeout: float = 600.0
    """Seconds that it waits at most; also how long the interpreter's exit is held up."""
    on_error: Literal["raise", "warn"] = "raise"
    """How a failed write is told."""
    num_writers: int = 2
    """Threads that write."""

    def __post_init__(self) -> None:
        for name, least in (("max_pending", 1), ("num_writers", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")
        if not isinstance(self.wait_timeout, (int, float)) or not self.wait_timeout > 0:
            raise ValueError(f"wait_timeout is {self.wait_timeout!r}; expected a positive number of seconds.")
        for name, expected in (("on_full", ("wait", "skip", "raise")), ("on_error", ("raise", "warn"))):
            if getattr(self, name) not in expected:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, expected))}."
                )


class BackgroundSnapshotSink:
    """Takes snapshots into slots and writes them with threads of its own.

    Args:
        retaining_writer: Writes them, and drops others.
        layout: Of the files.
        policy: How.
        pin: Use pinned host memory; falls back to pageable memory, and says so, where that fails.
    """

    def __init__(self, retaining_writer: RetainingWriter, layout: Layout, policy: WritePolicy, pin: bool) -> None:
        self._policy = policy
        self._layout = layout
        self._pool = _make_pool(layout, policy.max_pending, pin)
        self._copiers: dict[torch.device, ChunkCopier] = {}  # their memory is freed with the slots
        self._is_pageable_told = pin
        self._retaining_writer = retaining_writer
        self._ledger = retaining_writer.ledger
        self._failures: queue.SimpleQueue[SnapshotWriteError] = queue.SimpleQueue()
        self._sealed: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._lost: set[int] = set()  # steps; added by writers, discarded by the training thread
        work = partial(_write_all, self._sealed, self._pool, retaining_writer, self._failures, self._lost)
        self._threads = [BackgroundThread(work, f"writer-{index}") for index in range(policy.num_writers)]
        for thread in self._threads:
            thread.start()

    def take_snapshot(self, pending: PendingSnapshot, lane: Callable[[torch.device], Lane]) -> bool:
        """Queue the copies of a snapshot; False if it is skipped.

        Raises:
            NitrousError: All slots are busy and the policy is to raise.
            TimeoutError: None became free in time. The averages are untouched.
        """
        self._tell_pageable(pending)
        slot = self._claim(pending.stamp.step)
        if slot is None:
            return False
        self._lost.discard(pending.stamp.step)
        abandon = partial(_abandon, slot, self._pool, self._retaining_writer, pending.stamp)
        self._retaining_writer.expect(pending.stamp)
        try:
            lanes = {device: lane(device) for device in pending.flat_buffers.devices}
            self._pool.expect(slot, pending, {device: lanes[device].mark for device in lanes})
            for device, copies in slot.copies.items():
                copier = self._copiers.setdefault(device, ChunkCopier(device, self._layout))
                fill = partial(_fill, slot, pending, copies, copier, self._pool, self._sealed)
                lanes[device].enqueue_read(fill, abandon)
        except BaseException:
            abandon()
            raise
        return True

    def has_lost(self, step: int) -> bool:
        """Whether a snapshot of this step was taken and could not be written."""
        return step in self._lost

    def copies_in_flight(self, device: torch.device) -> SlotReadbacks | None:
        """The copies that may still be reading averages there; None where the lane's own order is all there is."""
        return None if device.type == "cpu" else self._pool.copies_in_flight(device)

    def raise_failures(self) -> None:
        """Tell every write that failed since the last call: raise, or warn, as the policy says.

        What could not be dropped is a warning in any case: no snapshot is lost by it.
        """
        self._retaining_writer.warn_of_failures()
        failures = []
        while not self._failures.empty():
            failures.append(self._failures.get())
        if not failures:
            return
        if self._policy.on_error == "raise":
            for other in failures[1:]:
                failures[0].args = (f"{failures[0]} Also: {other}",)
            raise failures[0]
        for failure in failures:
            warn(f"{failure} Training goes on without this snapshot.")

    def stats(self) -> WriteStats:
        """Counts of now, without those of updates."""
        return replace(self._ledger.read(), pending=self._pool.num_busy())

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Block until nothing is on its way. Raises TimeoutError, which names the steps that are."""
        left = self._pool.wait_idle(timeout_seconds)
        if left:
            raise TimeoutError(f"snapshots of steps {left} are still being written; call flush() or close() again.")

    def close(self, timeout_seconds: float | None = None) -> None:
        """Flush within the policy's time, then end the threads. What was not written by then is logged as an error."""
        left_seconds = deadline_after(
            clamp_timeout(self._policy.wait_timeout if timeout_seconds is None else timeout_seconds)
        )
        left = self._pool.wait_idle(left_seconds())
        if left:
            _log.error("gave up waiting: snapshots of steps %s are not on disk", left)
        for _ in self._threads:
            self._sealed.put(None)
        for thread in self._threads:
            thread.join(left_seconds())
        while not self._failures.empty():
            _log.error("nobody asked for this failure any more: %s", self._failures.get())

    def _tell_pageable(self, pending: PendingSnapshot) -> None:
        """Warn, once, if averages have come to an accelerator after the slots were made for the CPU."""
        device = next((device for device in pending.flat_buffers.devices if device.type != "cpu"), None)
        if device is not None and not self._is_pageable_told:
            self._is_pageable_told = True
            warn(
                f"Averages are on {device} now, but the host memory for snapshots was made for a model on the CPU and "
                "is not pinned: checkpoint() blocks until all is copied. Make the EMA after moving the model."
            )

    def _claim(self, step: int) -> Slot | None:
        policy = self._policy
        slot = self._pool.claim(0)
        if slot is not None:
            return slot
        what = f"snapshot of step {step}: all {policy.max_pending} slots (max_pending) are still being written"
        if policy.on_full == "skip":
            _log.warning("%s; it is skipped", what)
            self._ledger.add(skipped=1)
            return None
        if policy.on_full == "raise":
            raise NitrousError(f"{what}. Take snapshots less often, or raise max_pending.")
        started = time.monotonic()
        slot = self._pool.claim(clamp_timeout(policy.wait_timeout))
        self._ledger.add(seconds_waited=time.monotonic() - started)
        if slot is None:
            raise TimeoutError(
                f"{what}, after {policy.wait_timeout} seconds (wait_timeout). The disk is slow or hangs; averages and "
                "training are untouched. on_full='skip' goes on without the snapshot."
            )
        return slot


def _fill(
    slot: Slot,
    pending: PendingSnapshot,
    copies: StagingCopies,
    copier: ChunkCopier,
    pool: SlotPool,
    sealed: queue.SimpleQueue[Slot | None],
) -> None:
    """Queue the copies of what is on one device. Runs on its lane."""
    for span, page in zip(pool.spans, slot.pages, strict=True):
        copier.copy(pending.flat_buffers, span, page, non_blocking=pool.is_pinned)
        copies.record()
        copier.yield_copy_engine()
    if pool.filled(slot, pending):
        sealed.put(slot)


def _abandon(slot: Slot, pool: SlotPool, retaining_writer: RetainingWriter, stamp: Stamp) -> None:
    """Give up a snapshot whose copies could not be queued, unless the writer has it already."""
    if pool.abandon(slot):
        retaining_writer.forget(stamp)


def _make_pool(layout: Layout, num_slots: int, pin: bool) -> SlotPool:
    needed = f"{num_slots} snapshots (max_pending) of {format_bytes(layout.data_bytes)} each"
    check_host_memory(num_slots * layout.data_bytes, needed, _LESS_MEMORY)
    return pinned_or_pageable(lambda pin: SlotPool(layout, num_slots, pin=pin), needed, _LESS_MEMORY, pin=pin)


def _write_all(
    sealed: queue.SimpleQueue[Slot | None],
    pool: SlotPool,
    retaining_writer: RetainingWriter,
    failures: queue.SimpleQueue[SnapshotWriteError],
    lost: set[int],
) -> None:
    """What a writer thread does, until it gets None."""
    while (slot := sealed.get()) is not None:
        try:
            _write(slot, retaining_writer)
        except BaseException as error:
            failure = error if isinstance(error, SnapshotWriteError) else _unforeseen(slot, retaining_writer.store, error)
            lost.add(failure.step)
            retaining_writer.ledger.add(failed=1, last_error=str(failure))
            failures.put(failure)
            del failure
        finally:
            _wait_copied(slot)
            pool.release(slot)
            del slot


def _write(slot: Slot, retaining_writer: RetainingWriter) -> None:
    pending = slot.pending
    if pending is None:
        raise RuntimeError("a sealed slot carries nothing: this is a bug in nitrous_ema.")
    snapshot = retaining_writer.write(pending.flat_buffers.layout, pending.stamp, partial(_pages, slot))
    _log.info("snapshot of step %d is on disk: %s", pending.stamp.step, snapshot.paths[0])


def _pages(slot: Slot) -> Iterator[memoryview]:
    """The pages in order, each after its copies have finished."""
    for index, page in enumerate(slot.pages):
        for copies in slot.copies.values():
            copies.wait(index)
        yield page.numpy().data


def _wait_copied(slot: Slot) -> None:
    """Block until nothing is copied into a slot any more, also where its file was given up before."""
    for copies in slot.copies.values():
        # A device that has failed copies no more; what it raises was told, or is by whatever the trainer does next.
        with suppress(Exception):
            if not copies.is_all_over():
                copies.wait(len(slot.pages) - 1)


def _unforeseen(slot: Slot, store: SnapshotStore, error: BaseException) -> SnapshotWriteError:
    step = slot.pending.stamp.step if slot.pending is not None else 0
    failure = SnapshotWriteError(f"snapshot of step {step} was not written: {error!r}.", path=store.root, step=step)
    failure.__cause__ = error
    return failure
