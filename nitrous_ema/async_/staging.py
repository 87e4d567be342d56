"""Host memory that carries a snapshot from the averages to the disk.

A slot is laid out like the file's data: a page per chunk of the layout, pinned where averages live on an accelerator,
allocated once. torch's allocator of pinned memory rounds every size up to a power of two (ATen/core/
CachingHostAllocator.h), so where memory is pinned a chunk that is no power of two, the last one of a section, is cut
into several pages that are. The page is the unit of copying and of waiting: one mark each.

state    owner                         may                                    leaves by
FREE     nobody                        -                                      claim()   -> FILLING
FILLING  training thread, then lanes   queue and run copies into the pages    filled()  -> SEALED
                                                                              abandon() -> FREE
SEALED   one writer thread             wait for a page's marks, then read     release() -> FREE
                                       that page

P1  A slot has one owner; only SlotPool changes its state.       test_slot_in_the_wrong_state_is_named_as_a_bug
P2  A page is read after its marks were waited for.              test_writer_waits_for_each_page_before_it_reads_it
P3  A slot is claimed again only after its file is committed     test_slot_stays_taken_until_its_file_is_committed
    or given up.
P4  A failed snapshot costs a snapshot, never a slot.            test_failed_write_gives_its_slot_back
P5  Averages are written after the copies that still read them,  test_write_waits_for_the_copies_of_its_range_only
    page by page.
P6  Marks are made once and recorded again for each snapshot:    test_slot_is_not_free_before_its_copies_are_over
    when a slot is claimed, the writer has waited for all that
    were recorded before, whatever became of the file. (Not so
    for a snapshot that could not be queued whole. Nobody waits
    for its marks, and a lane runs later copies after its.)
P7  Copies that were not queued yet are not over, and those of   test_copies_are_not_over_before_they_are_queued
    a snapshot that has left its slot are.                       test_copies_of_a_slot_that_was_left_stay_over
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from nitrous_ema.averaging.execution.interfaces import Mark, PendingSnapshot
from nitrous_ema.snapshots.layout import Layout, Span

_SMALLEST_BYTES = 4096  # pinned memory comes in pages of the system, of at least this size


class StagingCopies:
    """The copies of one snapshot from one device: one per page, queued and finished in the order of the pages.

    Asked and told from several threads: those that train, those that step optimizers, and writers.

    Args:
        marks: One per page; recorded again here.
    """

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks
        self._lock = threading.Lock()
        self._num_queued = 0  # pages whose copy is queued; guarded by _lock
        self._num_over = 0  # pages whose copy is known to have finished; only grows; guarded by _lock

    def record(self) -> None:
        """The copy into the next page is queued where the caller's work runs now."""
        with self._lock:
            self._marks[self._num_queued].record()
            self._num_queued += 1

    def wait(self, page: int) -> None:
        """Block until a page is filled."""
        self._marks[page].wait()

    def wait_on_device(self, first: int, last: int) -> None:
        """What is queued from here comes after the copies into pages ``[first, last)``."""
        with self._lock:
            first = max(first, self._num_over)
            for mark in self._marks[first:last]:
                mark.wait_on_device()

    def are_over(self, last: int) -> bool:
        """Whether the copies into all pages before ``last`` have finished, as far as the host knows now."""
        with self._lock:
            # They finish in order: the last one speaks for all. One not recorded for this snapshot says it is reached.
            is_over = last <= self._num_over or (last <= self._num_queued and self._marks[last - 1].is_reached())
            if is_over:
                self._num_over = max(self._num_over, last)
            return is_over

    def is_all_over(self) -> bool:
        """Whether nothing is read from the device any more."""
        return self.are_over(len(self._marks))

    def end(self) -> None:
        """The snapshot has left its slot: whoever still asks for its copies has nothing to wait for."""
        with self._lock:
            self._num_over = len(self._marks)


class SlotReadbacks:
    """The copies that may still be reading averages of one device, of all slots: a ``ReadbacksInFlight``.

    Args:
        begins: Where each page begins in the file's data.
        copies: Of each slot.
    """

    def __init__(self, begins: Sequence[int], copies: Sequence[StagingCopies]) -> None:
        self._begins = begins
        self._copies = copies

    def wait_on_device(self, begin: int, end: int) -> None:
        """What is queued from here comes after the copies that read ``[begin, end)`` of the file's data."""
        first, last = self._pages(begin, end)
        for copies in self._copies:
            copies.wait_on_device(first, last)

    def are_over(self, begin: int, end: int) -> bool:
        """Whether those have finished, as far as the host knows now."""
        _, last = self._pages(begin, end)
        return all(copies.are_over(last) for copies in self._copies)

    def _pages(self, begin: int, end: int) -> tuple[int, int]:
        """The first page with bytes of a range, and the one after its last."""
        return max(bisect_right(self._begins, begin) - 1, 0), bisect_left(self._begins, end)


class SlotState(Enum):
    """See the module's table."""

    FREE = "free"
    FILLING = "filling"
    SEALED = "sealed"


@dataclass(slots=True, eq=False)
class Slot:
    """Host memory of one snapshot."""

    pages: list[Tensor]  # uint8; touched only by the owner
    marks: dict[torch.device, list[Mark]] = field(default_factory=dict)  # per page; made by the training thread, once
    copies: dict[torch.device, StagingCopies] = field(default_factory=dict)  # of what it carries
    state: SlotState = SlotState.FREE  # guarded by SlotPool._lock
    pending: PendingSnapshot | None = None  # what it carries; set by the training thread
    unfilled: int = 0  # devices whose copies are not queued yet; guarded by SlotPool._lock


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
        self.is_pinned = pin
        self.spans = page_spans(layout, pin)
        """Of the pages of each slot, in the file's data, in order."""
        self._begins = [span.begin for span in self.spans]
        self._slots = [Slot([_page(end - begin, pin) for begin, end in self.spans]) for _ in range(num_slots)]

    def claim(self, timeout_seconds: float | None) -> Slot | None:
        """A free slot, which becomes FILLING; None if there was none in time (0: do not wait)."""
        with self._lock:
            if not self._changed.wait_for(lambda: self._free() is not None, timeout_seconds):
                return None
            slot = self._free()
            if slot is not None:
                slot.state = SlotState.FILLING
            return slot

    def expect(
        self, slot: Slot, pending: PendingSnapshot, make_mark: Mapping[torch.device, Callable[[], Mark]]
    ) -> None:
        """Note what a slot will carry, and from which devices; marks are made when a device is first met."""
        for device, make in make_mark.items():
            if device not in slot.marks:
                slot.marks[device] = [make() for _ in slot.pages]
        with self._lock:
            self._check(slot, SlotState.FILLING)
            slot.pending, slot.unfilled = pending, len(make_mark)
            slot.copies = {device: StagingCopies(slot.marks[device]) for device in make_mark}

    def filled(self, slot: Slot, pending: PendingSnapshot) -> bool:
        """One device's copies are queued; True, and the slot is SEALED, if that was the last one.

        Of a snapshot that was given up meanwhile, and whose slot may carry another one: False.
        """
        with self._lock:
            if slot.pending is not pending:
                return False
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

    def copies_in_flight(self, device: torch.device) -> SlotReadbacks | None:
        """The copies that may still be reading averages on a device; None if there are none."""
        with self._lock:
            copies = [slot.copies[device] for slot in self._busy() if device in slot.copies]
        copies = [each for each in copies if not each.is_all_over()]
        return SlotReadbacks(self._begins, copies) if copies else None

    def num_busy(self) -> int:
        """Snapshots that are on their way."""
        with self._lock:
            return len(self._busy())

    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.state is not SlotState.FREE]

    def _free(self) -> Slot | None:
        return next((slot for slot in self._slots if slot.state is SlotState.FREE), None)

    def _free_again(self, slot: Slot) -> None:
        for copies in slot.copies.values():
            copies.end()
        slot.state, slot.pending, slot.copies = SlotState.FREE, None, {}
        self._changed.notify_all()

    def _check(self, slot: Slot, expected: SlotState) -> None:
        if slot.state is not expected:
            raise RuntimeError(f"a slot is {slot.state.value}, not {expected.value}: this is a bug in nitrous_ema.")


def page_spans(layout: Layout, pin: bool) -> tuple[Span, ...]:
    """Where the pages of a slot lie in the file's data, in order; none lies across two chunks.

    Args:
        layout: Of the files.
        pin: Cut chunks so that pages can be allocated without being rounded up, but for the last one of a section,
            which then takes one whole page of the system.
    """
    if not pin:
        return layout.chunks
    return tuple(span for chunk in layout.chunks for span in _powers_of_two(chunk))


def _powers_of_two(chunk: Span) -> Iterator[Span]:
    """Largest first, so that each begins at a multiple of its size; what is less than the smallest comes last."""
    begin = chunk.begin
    while begin < chunk.end:
        left = chunk.end - begin
        size = left if left < _SMALLEST_BYTES else 1 << (left.bit_length() - 1)
        yield Span(begin, begin + size)
        begin += size


def _page(size_bytes: int, pin: bool) -> Tensor:
    if pin:
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    # Written to now: otherwise the first copy waits for the system to find every page, and the next update behind it
    # (2 s instead of 0.45 s for 0.7 GB, measured).
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu").fill_(0)


def deadline_after(timeout_seconds: float | None) -> Callable[[], float | None]:
    """The seconds that are left of a timeout, asked for again and again."""
    if timeout_seconds is None:
        return lambda: None
    deadline = time.monotonic() + timeout_seconds
    return lambda: max(deadline - time.monotonic(), 0.0)
