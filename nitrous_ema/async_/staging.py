"""Host memory that carries a snapshot from the averages to the disk.

A slot is laid out like the file's data: one page per chunk of the layout, pinned where averages live on an accelerator,
allocated once. The chunk is the unit of copying, of waiting (one mark each) and of the file's checksums.

state    owner                         may                                    leaves by
FREE     nobody                        -                                      claim()   -> FILLING
FILLING  training thread, then lanes   queue and run copies into the pages    filled()  -> SEALED
                                                                              abandon() -> FREE
SEALED   one writer thread             wait for a chunk's marks, then read    release() -> FREE
                                       that page

P1  A slot has one owner; only SlotPool changes its state.       test_slot_in_the_wrong_state_is_named_as_a_bug
P2  A page is read after the marks of its chunk were waited for. test_writer_waits_for_each_chunk_before_it_reads_it
P3  A slot is claimed again only after its file is committed     test_slot_stays_taken_until_its_file_is_committed
    or given up.
P4  A failed snapshot costs a snapshot, never a slot.            test_failed_write_gives_its_slot_back
P5  Averages are written after the copies that still read them,  test_write_waits_for_the_copy_of_its_chunks_only
    chunk by chunk.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from nitrous_ema.pipeline import Mark, Pending
from nitrous_ema.snapshots.format import Layout


class SlotState(Enum):
    """See the module's table."""

    FREE = "free"
    FILLING = "filling"
    SEALED = "sealed"


@dataclass(slots=True, eq=False)
class Slot:
    """Host memory of one snapshot."""

    pages: list[Tensor]  # uint8, one per chunk; touched only by the owner
    marks: dict[torch.device, list[Mark]] = field(default_factory=dict)  # per chunk: recorded after its copy
    state: SlotState = SlotState.FREE  # guarded by SlotPool._lock
    pending: Pending | None = None  # what it carries; set by the training thread
    unfilled: int = 0  # devices whose copies are not queued yet; guarded by SlotPool._lock
    is_copied: bool = True  # every copy has finished, as far as the host knows; set by the writer, read by anybody


class SlotPool:
    """All slots, and their states.

    Args:
        layout: Of the files.
        num_slots: How many snapshots can be on their way at once.
        pin: Allocate pinned memory.

    Raises:
        RuntimeError, MemoryError: From torch, if there is not that much memory.
    """

    def __init__(self, layout: Layout, num_slots: int, pin: bool) -> None:
        # A lock of its own: a Condition's __enter__ is Python, and Ctrl-C inside it would leave it held for ever.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._slots = [Slot([_page(end - begin, pin) for begin, end in layout.chunks]) for _ in range(num_slots)]

    def claim(self, timeout_seconds: float | None) -> Slot | None:
        """A free slot, which becomes FILLING; None if there was none in time (0: do not wait)."""
        with self._lock:
            if not self._changed.wait_for(lambda: self._free() is not None, timeout_seconds):
                return None
            slot = self._free()
            if slot is not None:
                slot.state, slot.is_copied = SlotState.FILLING, False
            return slot

    def expect(self, slot: Slot, pending: Pending, marks: Mapping[torch.device, list[Mark]]) -> None:
        """Note what a slot will carry, and from which devices."""
        with self._lock:
            self._check(slot, SlotState.FILLING)
            slot.pending, slot.marks, slot.unfilled = pending, dict(marks), len(marks)

    def filled(self, slot: Slot) -> bool:
        """One device's copies are queued; True, and the slot is SEALED, if that was the last one."""
        with self._lock:
            self._check(slot, SlotState.FILLING)
            slot.unfilled -= 1
            if slot.unfilled == 0:
                slot.state = SlotState.SEALED
            return slot.unfilled == 0

    def abandon(self, slot: Slot) -> bool:
        """Give a slot back whose copies could not be queued; False if that was done, or the slot is the writer's."""
        with self._lock:
            is_ours = slot.state is SlotState.FILLING
            if is_ours:
                self._free_again(slot)
            return is_ours

    def release(self, slot: Slot) -> None:
        """Give a slot back whose file is committed or given up."""
        with self._lock:
            self._check(slot, SlotState.SEALED)
            self._free_again(slot)

    def wait_idle(self, timeout_seconds: float | None) -> list[int]:
        """Wait until every slot is free; the steps that are still on their way when the time is up."""
        with self._lock:
            self._changed.wait_for(lambda: not self._busy(), timeout_seconds)
            return [slot.pending.stamp.step for slot in self._busy() if slot.pending is not None]

    def reading(self, device: torch.device) -> list[Slot]:
        """Slots whose copies may still be reading averages on a device."""
        with self._lock:
            return [slot for slot in self._busy() if not slot.is_copied and device in slot.marks]

    def num_busy(self) -> int:
        """Snapshots that are on their way."""
        with self._lock:
            return len(self._busy())

    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.state is not SlotState.FREE]

    def _free(self) -> Slot | None:
        return next((slot for slot in self._slots if slot.state is SlotState.FREE), None)

    def _free_again(self, slot: Slot) -> None:
        slot.state, slot.pending, slot.is_copied = SlotState.FREE, None, True
        self._changed.notify_all()

    def _check(self, slot: Slot, expected: SlotState) -> None:
        if slot.state is not expected:
            raise RuntimeError(f"a slot is {slot.state.value}, not {expected.value}: this is a bug in nitrous_ema.")


def _page(size_bytes: int, pin: bool) -> Tensor:
    if pin:
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    # Written to now: otherwise the first copy waits for the system to find every page, and the next update behind it
    # (2 s instead of 0.45 s for 0.7 GB, measured).
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu").fill_(0)


def order_writes(layout: Layout, marks: Sequence[Sequence[Mark]]) -> Callable[[int, int], None]:
    """What orders a write of averages at ``[begin, end)`` of the file's data after copies that may still read there.

    Args:
        layout: Of the files.
        marks: Per snapshot on its way, the marks of its chunks on the device in question.
    """
    ends = [chunk.end for chunk in layout.chunks]

    def order(begin: int, end: int) -> None:
        index = bisect_left(ends, begin + 1)
        while index < len(ends) and layout.chunks[index].begin < end:
            for of_slot in marks:
                of_slot[index].order()
            index += 1

    return order


def deadline_after(timeout_seconds: float | None) -> Callable[[], float | None]:
    """The seconds that are left of a timeout, asked for again and again."""
    if timeout_seconds is None:
        return lambda: None
    deadline = time.monotonic() + timeout_seconds
    return lambda: max(deadline - time.monotonic(), 0.0)
