"""Host memory that stages a snapshot on its way from the averages to the disk.

Copying a snapshot to the host and writing it to disk both take long, and training must wait for neither. Each snapshot
therefore gets a *slot*: host memory for a whole snapshot, which the lanes fill and a writer thread empties. A slot is
laid out like the file's data, with a page per chunk of the layout. It is pinned where averages are on an accelerator,
and allocated once. A slot has one owner at a time, so its pages need no lock. The page is the unit of copying and of
waiting, with one mark per page and device: the writer can write the first pages while later pages are still being
copied, and an update can average the ranges whose pages have been copied.

A file has one profile after the other, but an update moves all profiles of a range. Readbacks are therefore queued by
range: the first page of each profile, then the second of each. Otherwise no range would come free in the first half of
a readback of two profiles.

torch's allocator of pinned memory rounds every size up to a power of two (ATen/core/CachingHostAllocator.h). Where
memory is pinned, a chunk whose size is not a power of two (the last chunk of a section) is therefore cut into several
pages of such sizes.

state    owner                         may                                    leaves by
FREE     no thread                     -                                      claim()   -> FILLING
FILLING  training thread, then lanes   queue and run copies into the pages    filled()  -> SEALED
                                                                              abandon() -> FREE
SEALED   one writer thread             wait for a page's marks, then read     release() -> FREE
                                       that page

STAGE-1  A slot has one owner; only SlotPool changes its state.   test_slot_in_the_wrong_state_is_named_as_a_bug
STAGE-2  A page is read after its marks were waited for.          test_writer_waits_for_each_page_before_it_reads_it
STAGE-3  A slot is claimed again only after its file is           test_slot_stays_taken_until_its_file_is_committed
    committed or has failed.
STAGE-4  A failed snapshot costs a snapshot, never a slot.        test_failed_write_gives_its_slot_back
STAGE-5  Averages are written after the readbacks that still      test_write_waits_for_the_copies_of_its_range_only
    read them, page by page.
STAGE-6  Marks are made once and recorded again for each          test_slot_is_not_free_before_its_copies_have_finished
    snapshot: when a slot is claimed, the writer has waited for
    all marks that were recorded before, also where the file
    has failed. (Not so for a snapshot that could not be queued
    whole. No thread waits for its marks, but its lane runs
    later copies after its copies.)
STAGE-7  Readbacks that were not queued yet have not finished,    test_copies_have_not_finished_before_they_are_queued
    and readbacks of a snapshot that has left its slot have.      test_copies_of_a_slot_that_was_left_stay_finished
STAGE-8  A range of the averages is read back in all profiles     test_readbacks_are_queued_range_by_range
    before the next range is.                                     test_six_late_steps_fit_in_the_default_scratch

Longer than 300 lines: slots and the copies into them change state together.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from nitrous_ema._base.waiting import wait_for
from nitrous_ema.averaging.execution.interfaces import Mark, PendingSnapshot
from nitrous_ema.errors import bug
from nitrous_ema.snapshots.layout import Layout, Span

_SMALLEST_BYTES = 4096  # pinned memory comes in pages of the system, of at least this size


class StagingCopies:
    """The readbacks of one snapshot from one device: one per page, numbered and finished in the order of queueing.

    Called from several threads: threads that train, threads that step optimizers, and writers.

    Args:
        marks: One per readback; this object records them again.
    """

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks
        self._lock = threading.Lock()
        self._num_queued = 0  # guarded by _lock
        self._num_finished = 0  # readbacks that are known to have finished; only grows; guarded by _lock

    def record(self) -> None:
        """Note that the next readback is queued where the caller's work runs now."""
        with self._lock:
            self._marks[self._num_queued].record()
            self._num_queued += 1

    def wait_for_page(self, number: int) -> None:
        """Block until the page of a readback is filled."""
        # Without the lock: the wait may be long, and threads that train must be able to poll meanwhile. The writer has
        # the slot only after all marks were recorded.
        self._marks[number].wait_on_host()

    def wait_on_device(self, last: int) -> None:
        """Order the work queued next after all readbacks before ``last``."""
        with self._lock:
            # Finished readbacks must be left out: after end() the marks may already belong to the slot's next snapshot.
            if last > self._num_finished:
                self._marks[last - 1].wait_on_device()

    def num_finished(self) -> int:
        """Return how many readbacks the host knows to have finished."""
        low, high, step = self._num_finished, self._num_queued, 1
        # In most calls the next readback has not finished, and nothing else is queried. Otherwise in strides.
        while low < high:
            last = min(low + step, high)
            if self.have_finished(last):
                low, step = last, 2 * step
            else:
                high, step = last - 1, 1
        return low

    def have_finished(self, last: int) -> bool:
        """Return whether the host knows that all readbacks before ``last`` have finished."""
        with self._lock:
            # Readbacks finish in order, so the last mark stands for all. A mark that was not recorded for this snapshot
            # reports that it is reached, and must not be queried.
            finished = last <= self._num_finished or (last <= self._num_queued and self._marks[last - 1].is_reached())
            if finished:
                self._num_finished = max(self._num_finished, last)
            return finished

    def all_have_finished(self) -> bool:
        """Return whether the host knows that this snapshot reads nothing from the device any more."""
        return self.have_finished(len(self._marks))

    def end(self) -> None:
        """Count all readbacks as finished, because the snapshot has left its slot: readers have nothing to wait for."""
        with self._lock:
            self._num_finished = len(self._marks)


class SlotReadbacks:
    """The readbacks of all slots that may still be reading averages of one device: a ``ReadbacksInFlight``.

    Args:
        begins: Where each page begins in the file's data.
        numbers: The number of each page's readback.
        copies: The readbacks of each slot.
    """

    def __init__(self, begins: Sequence[int], numbers: Sequence[int], copies: Sequence[StagingCopies]) -> None:
        self._begins, self._numbers = begins, numbers
        self._copies = copies

    @property
    def num_finished(self) -> int:
        """How many readbacks have finished in every slot, as far as the host knows."""
        return min(copies.num_finished() for copies in self._copies)

    def wait_on_device(self, begin: int, end: int) -> None:
        """Order the work queued next after the readbacks of ``[begin, end)`` of the file's data."""
        last = self._last(begin, end)
        for copies in self._copies:
            copies.wait_on_device(last)

    def have_finished(self, begin: int, end: int) -> bool:
        """Return whether the host knows that the readbacks of ``[begin, end)`` have finished."""
        last = self._last(begin, end)
        return all(copies.have_finished(last) for copies in self._copies)

    def _last(self, begin: int, end: int) -> int:
        """Return the number after that of the last readback into a page with bytes of a range."""
        pages = slice(max(bisect_right(self._begins, begin) - 1, 0), bisect_left(self._begins, end))
        return max(self._numbers[pages], default=-1) + 1


class SlotState(Enum):
    """The states of the module's table."""

    FREE = "free"
    FILLING = "filling"
    SEALED = "sealed"


@dataclass(slots=True, eq=False)
class Slot:
    """Host memory of one snapshot."""

    pages: list[Tensor]  # uint8, in the order of the file; touched only by the owner
    numbers: Sequence[int]  # per page, the number of its readback
    num_skipped: Tensor  # int64: updates that were skipped before the snapshot; filled before the first page
    count: Tensor | None = None  # the same on the device of the averages; made when first needed
    # Per readback; made by the training thread, once.
    marks: dict[torch.device, list[Mark]] = field(default_factory=dict)
    copies: dict[torch.device, StagingCopies] = field(default_factory=dict)  # of the snapshot that it carries
    state: SlotState = SlotState.FREE  # guarded by SlotPool._lock
    pending: PendingSnapshot | None = None  # the snapshot that it carries; set by the training thread
    unfilled: int = 0  # devices whose readbacks are not queued yet; guarded by SlotPool._lock


class SlotPool:
    """All slots, and their states.

    Args:
        layout: The layout of the files.
        num_slots: How many snapshots can be in flight at once.
        pin: Allocate pinned memory.

    Raises:
        RuntimeError, MemoryError: From torch, if there is not enough memory.
    """

    def __init__(self, layout: Layout, num_slots: int, pin: bool) -> None:
        # A lock of its own: a Condition's __enter__ is Python code, and Ctrl-C inside it would leave the lock held for
        # ever.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self.is_pinned = pin
        self._place(layout, page_spans(layout, pin))
        counts = _page(8 * num_slots, pin).zero_().view(torch.int64)
        self._slots = [
            Slot([_page(end - begin, pin) for begin, end in self.spans], self._numbers, count) for count in counts
        ]

    def _place(self, layout: Layout, spans: Sequence[Span]) -> None:
        self.spans = spans
        """Where the pages of each slot lie in the file's data, in order."""
        self._begins = [span.begin for span in spans]
        sections = [section.begin for section in layout.sections]
        # A page's place in its section: that of the same averages is the same in each profile.
        places = [begin - sections[bisect_right(sections, begin) - 1] for begin in self._begins]
        self.order = sorted(range(len(spans)), key=places.__getitem__)
        """The pages in the order of their readbacks."""
        self._numbers = [0] * len(spans)
        for number, page in enumerate(self.order):
            self._numbers[page] = number

    def resize(self, layout: Layout) -> None:
        """Give every slot pages for another layout. All slots are free.

        Raises:
            RuntimeError, MemoryError: From torch, if there is not enough memory; the slots stay as they were.
        """
        spans = page_spans(layout, self.is_pinned)
        with self._lock:
            for slot in self._slots:
                self._check(slot, SlotState.FREE)
        # Pages of equal size stay: those of the averages, which are nearly all of the memory.
        pages = [
            [
                old if old is not None and old.numel() == end - begin else _page(end - begin, self.is_pinned)
                for old, (begin, end) in zip([*slot.pages, *[None] * len(spans)], spans, strict=False)
            ]
            for slot in self._slots
        ]
        self._place(layout, spans)
        for slot, its_pages in zip(self._slots, pages, strict=True):
            slot.pages, slot.numbers, slot.marks = its_pages, self._numbers, {}

    def claim(self, timeout_seconds: float | None) -> Slot | None:
        """Return a free slot, which becomes FILLING; None if no slot became free in time (0: do not wait)."""
        with self._lock:
            if not wait_for(self._changed, lambda: self._free() is not None, timeout_seconds):
                return None
            slot = self._free()
            if slot is not None:
                slot.state = SlotState.FILLING
            return slot

    def assign(
        self, slot: Slot, pending: PendingSnapshot, make_mark: Mapping[torch.device, Callable[[], Mark]]
    ) -> None:
        """Assign a snapshot to a slot.

        Args:
            slot: A slot that is FILLING.
            pending: The snapshot.
            make_mark: The devices that its averages are on, each with a function that makes a mark of the device's
                lane. Marks are made when a device is first met, and stay with the slot.
        """
        for device, make in make_mark.items():
            if device not in slot.marks:
                slot.marks[device] = [make() for _ in slot.pages]
        with self._lock:
            self._check(slot, SlotState.FILLING)
            slot.pending, slot.unfilled = pending, len(make_mark)
            # New objects over the same marks: readers of the last snapshot may still hold its StagingCopies (STAGE-7).
            slot.copies = {device: StagingCopies(slot.marks[device]) for device in make_mark}

    def filled(self, slot: Slot, pending: PendingSnapshot) -> bool:
        """Note that the readbacks of one device are queued; the slot is SEALED with the last device.

        Returns:
            True if the slot is SEALED now. False also for a snapshot that was abandoned meanwhile; its slot may carry
            another snapshot.
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
        """Free a slot whose readbacks could not be queued; return False if it is free, or owned by a writer."""
        with self._lock:
            is_filling = slot.state is SlotState.FILLING
            if is_filling:
                self._free_again(slot)
            return is_filling

    def release(self, slot: Slot) -> None:
        """Free a slot whose file is committed or has failed."""
        with self._lock:
            self._check(slot, SlotState.SEALED)
            self._free_again(slot)

    def wait_idle(self, timeout_seconds: float | None) -> list[int]:
        """Wait until every slot is free, and return the steps of snapshots that are still in flight at the timeout."""
        with self._lock:
            wait_for(self._changed, lambda: not self._busy(), timeout_seconds)
            return [slot.pending.stamp.step for slot in self._busy() if slot.pending is not None]

    def free(self) -> None:
        """Free the memory of all slots, which are free and are not claimed any more."""
        with self._lock:
            self._slots = []

    def readbacks_in_flight(self, device: torch.device) -> SlotReadbacks | None:
        """Return the readbacks that may still be reading averages on a device; None if there are no such readbacks."""
        with self._lock:
            copies = [slot.copies[device] for slot in self._busy() if device in slot.copies]
        # Outside the lock: this queries the driver, and writers need the lock to free their slots.
        copies = [each for each in copies if not each.all_have_finished()]
        return SlotReadbacks(self._begins, self._numbers, copies) if copies else None

    def num_busy(self) -> int:
        """Return the number of snapshots in flight."""
        with self._lock:
            return len(self._busy())

    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.state is not SlotState.FREE]

    def _free(self) -> Slot | None:
        return next((slot for slot in self._slots if slot.state is SlotState.FREE), None)

    def _free_again(self, slot: Slot) -> None:
        # Deferred updates may hold these objects longer than the slot carries the snapshot. From here on the objects
        # must not query the marks, which the next snapshot records again.
        for copies in slot.copies.values():
            copies.end()
        slot.state, slot.pending, slot.copies = SlotState.FREE, None, {}
        self._changed.notify_all()

    def _check(self, slot: Slot, expected: SlotState) -> None:
        if slot.state is not expected:
            raise bug(f"a slot is {slot.state.value}, not {expected.value}")


def page_spans(layout: Layout, pin: bool) -> tuple[Span, ...]:
    """Return where the pages of a slot lie in the file's data, in order; no page lies across two chunks.

    Args:
        layout: The layout of the files.
        pin: Cut chunks so that pages can be allocated without being rounded up. The last page of a section is an
            exception: it takes one whole page of the system.
    """
    if not pin:
        return layout.chunks
    return tuple(span for chunk in layout.chunks for span in _powers_of_two(chunk))


def _powers_of_two(chunk: Span) -> Iterator[Span]:
    """Yield the largest spans first, so that each begins at a multiple of its size; the remainder comes last."""
    begin = chunk.begin
    while begin < chunk.end:
        remaining = chunk.end - begin
        size = remaining if remaining < _SMALLEST_BYTES else 1 << (remaining.bit_length() - 1)
        yield Span(begin, begin + size)
        begin += size


def _page(size_bytes: int, pin: bool) -> Tensor:
    if pin:
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    # Filled now, so that the system maps all of the memory here. Otherwise the first copy waits for the mapping, and
    # the next update waits for the copy (2 s instead of 0.45 s for 0.7 GB, measured).
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu").fill_(0)
