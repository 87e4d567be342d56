"""Puts the work of an update on the lanes: which tensors are read live, which are copied first, and in which order.

There is one lane per device, made when it is first needed. An update's averaging may run long after update() has
returned, so each tensor is either read live, under the write guard's protection, or copied where the caller's work
runs. Averages that a snapshot's readback still reads are written later (``deferred_updates.py``). Queued work refers to
buffers and tensors, never to the EMA: an EMA that is dropped must be freed while work is queued.

DISPATCH-1  Storage that a lane may still be reading is held, also   test_replaced_storage_is_held_until_it_was_read
    where the trainer has dropped it (``p.data = ...``), until the
    caller is ordered after the read: the caller might get that
    memory next, for something else.

Longer than 300 lines: the order of the calls on all lanes stands in one class.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nitrous_ema._base.torch_dtypes import TORCH_DTYPES
from nitrous_ema.averaging.execution.caller_copies import CallerSideCopies
from nitrous_ema.averaging.execution.deferred_updates import DeferredUpdates, PlacedStep, StashPool
from nitrous_ema.averaging.execution.finite_updates import UpdateFlag, check
from nitrous_ema.averaging.execution.inline import InlineLane
from nitrous_ema.averaging.execution.interfaces import Lane, ReadbacksInFlight, SnapshotSink
from nitrous_ema.averaging.execution.offload import Offload
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.kernels.copied_step import CopiedTensorsStep
from nitrous_ema.averaging.kernels.flat_buffers import AveragedTensor, CopiedGroup, FlatBuffers, Group
from nitrous_ema.averaging.kernels.foreach_step import AveragingStep
from nitrous_ema.averaging.kernels.fused_step import step_for
from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.layout import Layout, Span

_BATCHES_BEYOND = 3

Ranges = Callable[[int, int], Iterator[Span]]
"""Given the first and last element of a batch, the ranges of the file's data where it lies."""


class UpdateDispatcher:
    """The lanes of one set of flat buffers, and the order of the work on them.

    Args:
        flat_buffers: The averages.
        make_lane: Makes the lane of a device.
        reads_later: Whether lanes may run after the caller has gone on. Buffers change in forward, so they are then
            copied where the caller's work runs.
        offloads: Whether the averages are in host memory, and tensors on an accelerator are copied there to be
            averaged.
        scratch_bytes: The most device memory, per device, for stashed parameters: parameters that the caller writes
            while a readback still reads their averages. None: as much as the parameters take.
    """

    def __init__(
        self,
        flat_buffers: FlatBuffers,
        make_lane: Callable[[torch.device], Lane] = lambda device: InlineLane(),
        *,
        reads_later: bool = False,
        scratch_bytes: int | None = None,
        offloads: bool = False,
    ) -> None:
        self._flat_buffers = flat_buffers
        self._make_lane = make_lane
        self._reads_later = reads_later
        self._scratch_bytes = scratch_bytes
        self._offloads = offloads
        self._lanes: dict[torch.device, Lane] = {}
        self._deferred_updates: dict[torch.device, DeferredUpdates] = {}
        self._offloaded: dict[tuple[PlacedStep, torch.device], Offload] = {}
        # Guards every use of _deferred_updates, because optimizers may step on other threads than the trainer's.
        self._lock = threading.RLock()
        self._num_held_up_before = 0  # by what release() has let go of
        self._error: BaseException | None = None  # of an optimizer's hook, which must not raise; guarded by _lock
        self._caller_copies = CallerSideCopies()
        self._last_live: Mapping[str, Tensor] | None = None
        self._listed: tuple[list[list[Tensor]], list[list[Tensor]]] | None = None  # by step, of _read_live
        self._read_live: Mapping[str, Tensor] = {}  # aliases of _last_live, which hold its storages (DISPATCH-1)
        self.sinks: list[SnapshotSink] = []
        """Empty or one sink, whose readbacks must not be overtaken by writes of averages."""
        self.place()

    def place(self) -> None:
        """Make the steps and find their devices; to be called again whenever the flat buffers have moved."""
        layout = self._flat_buffers.layout
        self._steps = [
            (group, _placed(step_for(group), _average_ranges(layout, group))) for group in self._flat_buffers.groups
        ]
        self._copy_steps = [
            (copies, _placed(CopiedTensorsStep(copies), _copied_ranges(layout, copies)))
            for copies in self._flat_buffers.copy_groups
        ]
        # Of an update's steps in host memory this one counts it if it is skipped.
        self._counting = next((placed for _, placed in self._steps if placed.step.batches), None)
        self._offloaded.clear()
        self._listed = None
        self._copied_for: tuple[Mapping[str, Tensor], bool] | None = None  # the arguments that _copied belongs to
        self._copied: Sequence[str] = ()
        self._copy_devices: Mapping[str, torch.device] = {}  # the device of each tensor's caller-side copy
        averaged = {
            tensor.tracked.name: group.device for group in self._flat_buffers.groups for tensor in group.tensors
        }
        copied = {
            tracked.name: group.device for group in self._flat_buffers.copy_groups for tracked, _, _ in group.tensors
        }
        self.devices: Mapping[str, torch.device] = averaged | copied
        """The device of each tensor's average or copy, by name."""

    def lane(self, device: torch.device) -> Lane:
        """Return the lane of a device."""
        if device not in self._lanes:
            self._lanes[device] = self._make_lane(device)
        return self._lanes[device]

    def queue(
        self, live: Mapping[str, Tensor], weights: Sequence[float], *, copy_all: bool, may_skip: bool = False
    ) -> None:
        """Queue one averaging step of every group, and the copying of copied tensors.

        Args:
            live: Every averaged and copied tensor of the model, by name.
            weights: Weight of the parameters, per profile.
            copy_all: Copy parameters where the caller's work runs, instead of reading them live.
            may_skip: Leave the averages and copied tensors as they are if an averaged tensor is not finite.
        """
        if live is not self._last_live:
            # The aliases below are about to be replaced. That frees storages which the trainer has dropped, so the
            # caller must come after the reads of them first.
            self.order_writers()  # DISPATCH-1
            # Aliases, because p.data = ... puts another storage into the same Parameter object: to hold the object
            # would not hold the storage.
            self._last_live, self._read_live = live, {name: tensor.detach() for name, tensor in live.items()}
            self._listed = None
        copied = self._copied_names(live, copy_all)
        read = self._read_live
        if copied or self._caller_copies.are_held:
            to_copy = {name: read[name] for name in copied}
            read = {**read, **self._caller_copies.take(to_copy, self._copy_devices, self.order_writers)}
        with self._lock:
            flag = self._enqueue_check(read) if may_skip else None
            of_steps, of_copies = self._tensors_of_steps(read)
            for (group, placed), tensors in zip(self._steps, of_steps, strict=True):
                self._enqueue(group.device, placed, tensors, weights, flag, may_count=placed is self._counting)
            for (copies, placed), tensors in zip(self._copy_steps, of_copies, strict=True):
                self._enqueue(copies.device, placed, tensors, weights, flag)
        if copy_all and self._offloaded:
            # With offload="host" parameters are copied straight to the host, not on the device first. With
            # read="copied" no hook orders writers after that copy, so the caller is ordered after it here.
            self.order_writers()  # after the copies to the host

    def release(self) -> None:
        """Let go of the parameters, and of all memory but the averages. No work is queued any more, nor will be."""
        with self._lock:
            self._num_held_up_before = self.num_held_up
            self._last_live, self._read_live, self._copied_for, self._listed = None, {}, None, None
            self._steps, self._copy_steps, self._counting = [], [], None  # they hold views of the parameters
            self._caller_copies = CallerSideCopies()
            self._deferred_updates.clear()
            self._offloaded.clear()

    def order_writers(self) -> None:
        """Order the caller's next use of the parameters after every read of them so far.

        Raises no Exception, because optimizers' hooks call it: ``take_error`` returns what went wrong. Ctrl-C is
        raised; where it struck the averaging itself, the averages are invalid, and ``take_error`` returns it too.
        """
        with self._lock:
            # Before order_writer(), which then orders the caller after the stashes and after forced averaging as well.
            late = self._with_deferred()
            try:
                for deferred in late:
                    with neutral_modes():
                        deferred.stash_live()
            except BaseException as error:
                # A list: the mark of each of them is to be taken.
                was_interrupted = True in [deferred.take_interrupted() for deferred in late]
                if was_interrupted or isinstance(error, Exception):
                    self._error = self._error or error
                if not isinstance(error, Exception):
                    raise
            for lane in self.lanes():
                lane.order_writer()

    def flush_deferred(self) -> None:
        """Queue every deferred update behind the readbacks in its way, because the caller asks for the averages."""
        with self._lock, neutral_modes():
            for deferred in self._with_deferred():
                deferred.flush()

    def order_readers(self) -> None:
        """Order the caller's next use of the averages after every update so far."""
        with self._lock:
            self.flush_deferred()  # order_reader() covers queued work only
            for lane in self.lanes():
                lane.order_reader()

    def is_capturing(self) -> bool:
        """Return whether the caller's work is now being captured into a graph."""
        return any(lane.is_capturing() for lane in self.lanes())

    @property
    def reads_later(self) -> bool:
        """Whether any lane may still be reading when ``queue`` has returned."""
        return not all(isinstance(lane, InlineLane) for lane in self._lanes.values())

    @property
    def scratch_bytes(self) -> int:
        """Device memory that is held for stashed parameters, on all devices."""
        return sum(deferred.stash_pool.num_bytes for deferred in self._deferred_updates.values())

    @property
    def num_held_up(self) -> int:
        """How often the trainer had to wait, for a readback or for averaging in host memory."""
        of_deferred = sum(deferred.num_held_up for deferred in self._deferred_updates.values())
        of_offloaded = sum(offload.num_held_up for offload in self._offloaded.values())
        return self._num_held_up_before + of_deferred + of_offloaded

    def lanes(self) -> list[Lane]:
        """Return the lanes that were made so far."""
        return list(self._lanes.values())

    def take_error(self) -> BaseException | None:
        """Return what queued work raised since the last call; if work failed on several devices, the first device's."""
        errors = [lane.take_error() for lane in self._lanes.values()]
        # Without the lock first: this is called at every update, and the next call finds an error that is set later.
        if self._error is not None:
            with self._lock:
                errors, self._error = [*errors, self._error], None
        return next((error for error in errors if error is not None), None)

    def drain(self, timeout_seconds: float | None = None, *, with_snapshots: bool = True) -> None:
        """Block until all work is done, and snapshots are written.

        Args:
            timeout_seconds: For everything together; None: no limit.
            with_snapshots: Wait for snapshots too.

        Raises:
            TimeoutError: Something is still pending; the message names all of it.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self.flush_deferred()
        pending = []
        for wait in [lane.drain for lane in self.lanes()] + [sink.flush for sink in self.sinks if with_snapshots]:
            try:
                wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))
            except TimeoutError as error:
                pending.append(str(error))
        if pending:
            raise TimeoutError(f"after {timeout_seconds} seconds: {' '.join(pending)}")

    def _tensors_of_steps(self, read: Mapping[str, Tensor]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Return the tensors that each step reads, listed anew only for other tensors."""
        if read is self._read_live and self._listed is not None:
            return self._listed
        listed = (
            [[read[tensor.tracked.name] for tensor in group.tensors] for group, _ in self._steps],
            [[read[tracked.name] for tracked, _, _ in copies.tensors] for copies, _ in self._copy_steps],
        )
        self._listed = listed if read is self._read_live else None
        return listed

    def _copied_names(self, live: Mapping[str, Tensor], copy_all: bool) -> Sequence[str]:
        """Return the names of the tensors to copy where the caller's work runs.

        These are buffers, parameters on another device than their average, or all tensors. The names are computed anew
        only when a tensor was replaced or ``copy_all`` has changed.
        """
        known = self._copied_for
        if known is None or known[0] is not live or known[1] != copy_all:
            offloaded = {name: self._offloads and tensor.device.type != "cpu" for name, tensor in live.items()}
            self._copy_devices = {
                name: live[name].device if is_offloaded else self.devices[name]
                for name, is_offloaded in offloaded.items()
            }
            self._copied = [
                tensor.name
                for tensor in self._flat_buffers.tracked
                if tensor.role != "skipped"
                and (
                    (copy_all and not offloaded[tensor.name])
                    or (self._reads_later and not tensor.is_parameter)
                    or live[tensor.name].device != self._copy_devices[tensor.name]
                )
            ]
            self._copied_for = live, copy_all
        return self._copied

    def check_one_device(self, live: Mapping[str, Tensor]) -> None:
        """Raise NitrousError if updates of these tensors run on several devices, so that no flag can stand for all."""
        devices = {tensor.device for tensor in live.values()} if self._offloads else set(self._flat_buffers.devices)
        if len(devices) > 1:
            where = " and ".join(sorted(map(str, devices)))
            raise NitrousError(
                f"on_nonfinite='skip': the tensors are on {where}, and whether an update is skipped is decided on one "
                "device for all of them. Pass on_nonfinite='warn', or put all tensors on one device."
            )

    def _enqueue_check(self, read: Mapping[str, Tensor]) -> UpdateFlag:
        """Queue the check of all averaged tensors where they are; return the flag of this update."""
        tensors = [read[tensor.name] for tensor in self._flat_buffers.averaged]
        if self._offloads and tensors[0].device.type != "cpu":
            flag = UpdateFlag()
            self.lane(tensors[0].device).enqueue_write(partial(check, flag, tensors, None))  # the averages' lane counts
            return flag
        deferred = self._deferred_updates_of(self._flat_buffers.groups[0].device)
        return deferred.enqueue_check(tensors, self._flat_buffers.num_skipped)

    def _enqueue(
        self,
        device: torch.device,
        placed: PlacedStep,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        flag: UpdateFlag | None,
        may_count: bool = False,
    ) -> None:
        sources = placed.step.sources(tensors)
        if self._offloads and tensors and tensors[0].device != device:
            num_skipped = self._flat_buffers.num_skipped if may_count and flag is not None else None
            self._offload(placed, tensors).enqueue_update(sources, weights, flag, num_skipped)
        else:
            self._deferred_updates_of(device).enqueue_update(placed, sources, weights, flag)

    def _offload(self, placed: PlacedStep, tensors: Sequence[Tensor]) -> Offload:
        device = tensors[0].device
        if any(tensor.device != device for tensor in tensors):
            raise NitrousError(
                f"offload='host': tensors of one group are on {device} and on other devices; they were all on one "
                "device when the EMA was constructed. Construct another EMA for the model as it is placed now."
            )
        if (placed, device) not in self._offloaded:
            self._offloaded[placed, device] = Offload(placed.step, self.lane(device), self.lane(torch.device("cpu")))
        return self._offloaded[placed, device]

    def _deferred_updates_of(self, device: torch.device) -> DeferredUpdates:
        if device not in self._deferred_updates:
            limit_bytes = self._default_scratch_bytes(device) if self._scratch_bytes is None else self._scratch_bytes
            # Not a bound method: a reference to this object would make a cycle, and averages of a dropped EMA would
            # stay in device memory until the garbage collector runs.
            readbacks = partial(_readbacks_in_flight, self.sinks, device)
            lane = self.lane(device)
            self._deferred_updates[device] = DeferredUpdates(lane, readbacks, StashPool(lane, device, limit_bytes))
        return self._deferred_updates[device]

    def _with_deferred(self) -> list[DeferredUpdates]:
        return [deferred for deferred in self._deferred_updates.values() if deferred.has_deferred]

    def _default_scratch_bytes(self, device: torch.device) -> int:
        """Return the bytes of one stash of all tensors that are averaged or copied on a device, and some batches more.

        A copy of six steps needs one stash if it comes to the end of a batch at each step. It does not: then each of
        the up to three updates that are deferred at once takes a whole batch where it needs a part of one.
        """
        steps = [placed.step for group, placed in self._steps if group.device == device]
        steps += [placed.step for copies, placed in self._copy_steps if copies.device == device]
        sizes = [step.stash_bytes(batch) for step in steps for batch in range(len(step.batches))]
        return sum(sizes) + _BATCHES_BEYOND * max(sizes, default=0)


def _readbacks_in_flight(sinks: Sequence[SnapshotSink], device: torch.device) -> ReadbacksInFlight | None:
    return sinks[0].readbacks_in_flight(device) if sinks else None


def _placed(step: AveragingStep, ranges: Ranges) -> PlacedStep:
    return PlacedStep(step, [list(ranges(begin, end)) for begin, end in step.batches])


def _average_ranges(layout: Layout, group: Group) -> Ranges:
    """Return where elements of a group lie in the file's data, in every profile."""
    item_bytes = TORCH_DTYPES[layout.checkpoint_dtype].itemsize
    permuted = [tensor for tensor in group.tensors if _is_permuted(tensor)]

    def ranges(begin: int, end: int) -> Iterator[Span]:
        # An element of such a tensor may lie anywhere in the tensor's range of the file: a batch that has some of the
        # tensor must wait for the readbacks of all of it.
        for tensor in permuted:
            if tensor.begin < end and begin < tensor.end:
                begin, end = min(begin, tensor.begin), max(end, tensor.end)
        for section, _ in zip(layout.sections, layout.gammas, strict=False):  # without the section of copied tensors
            first = section.begin + group.begin * item_bytes
            yield Span(first + begin * item_bytes, first + end * item_bytes)

    return ranges


def _is_permuted(tensor: AveragedTensor) -> bool:
    """Return whether the file, which is row-major, has the tensor's elements in another order than its average."""
    return not tensor.is_row_major


def _copied_ranges(layout: Layout, copies: CopiedGroup) -> Ranges:
    """Return where bytes of a group of copied tensors lie in the file's data."""
    first = layout.sections[-1].begin + layout.padding_bytes + copies.begin

    def ranges(begin: int, end: int) -> Iterator[Span]:
        yield Span(first + begin, first + end)

    return ranges
