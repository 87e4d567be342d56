"""Puts the work of an update on the lanes: which tensors are read live, which copied first, and after what.

One lane per device, made when it is first needed. What is queued refers to buffers and tensors, never to the EMA.

D1  Storage that a lane may still be reading is held, also where  test_replaced_storage_is_held_until_it_was_read
    the trainer has dropped it (``p.data = ...``), until the
    caller, who might get that memory next, is ordered after.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nitrous_ema._base.torch_dtypes import TORCH_DTYPES
from nitrous_ema.averaging.execution.caller_copies import CallerSideCopies
from nitrous_ema.averaging.execution.deferred_updates import DeferredUpdates, PlacedStep, StashPool
from nitrous_ema.averaging.execution.inline import InlineLane
from nitrous_ema.averaging.execution.interfaces import Lane, ReadbacksInFlight, SnapshotSink, neutral_modes
from nitrous_ema.averaging.execution.offload import Offload
from nitrous_ema.averaging.kernels.copied_step import CopiedTensorsStep
from nitrous_ema.averaging.kernels.flat_buffers import AveragedTensor, CopiedGroup, FlatBuffers, Group
from nitrous_ema.averaging.kernels.foreach_step import AveragingStep
from nitrous_ema.averaging.kernels.fused_step import step_for
from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.layout import Layout, Span

Ranges = Callable[[int, int], Iterator[Span]]


class UpdateDispatcher:
    """The lanes of one set of flat buffers, and the order of what is put on them.

    Args:
        flat_buffers: The averages.
        make_lane: Makes the lane of a device.
        reads_later: Whether lanes may run after the caller has gone on. Buffers, which change in forward, are then
            copied where the caller is.
        offloads: The averages are in host memory, and what is on an accelerator is copied there to be averaged.
        scratch_bytes: The most device memory, per device, for parameters that the caller writes while a snapshot copy
            still reads their averages; None: as much as the parameters take.
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
        self._followers: dict[torch.device, DeferredUpdates] = {}
        self._offloaded: dict[tuple[PlacedStep, torch.device], Offload] = {}
        # Reentrant, and around all that touches followers: optimizers may step on other threads than the trainer's.
        self._lock = threading.RLock()
        self._error: Exception | None = None  # raised where nobody may be told; guarded by _lock
        self._copies = CallerSideCopies()
        self._last_live: Mapping[str, Tensor] | None = None
        self._held: Mapping[str, Tensor] = {}  # aliases of the same: they hold storages, not objects
        self.sinks: list[SnapshotSink] = []
        """None or one: whose copies of averages are not to be overtaken by writes."""
        self.place()

    def place(self) -> None:
        """Take note of where the flat buffers are."""
        layout = self._flat_buffers.layout
        self._steps = [
            (group, _placed(step_for(group), _average_ranges(layout, group))) for group in self._flat_buffers.groups
        ]
        self._copy_steps = [
            (copies, _placed(CopiedTensorsStep(copies), _copied_ranges(layout, copies)))
            for copies in self._flat_buffers.copy_groups
        ]
        self._offloaded.clear()
        self._copied_for: tuple[Mapping[str, Tensor], bool] | None = None  # what _copied was computed for
        self._copied: Sequence[str] = ()
        self._copy_devices: Mapping[str, torch.device] = {}  # where each tensor's copy goes
        averaged = {
            tensor.tracked.name: group.device for group in self._flat_buffers.groups for tensor in group.tensors
        }
        copied = {
            tracked.name: group.device for group in self._flat_buffers.copy_groups for tracked, _, _ in group.tensors
        }
        self.devices: Mapping[str, torch.device] = averaged | copied
        """Of each tensor's average or copy, by name."""

    def lane(self, device: torch.device) -> Lane:
        """The lane of a device."""
        if device not in self._lanes:
            self._lanes[device] = self._make_lane(device)
        return self._lanes[device]

    def queue(self, live: Mapping[str, Tensor], weights: Sequence[float], *, copy_all: bool) -> None:
        """Queue one averaging step of every group, and the keeping of copied tensors.

        Args:
            live: Every averaged and copied tensor of the model, by name.
            weights: Of the parameters, per profile.
            copy_all: Copy parameters where the caller is, instead of reading them live.
        """
        if live is not self._last_live:
            self.order_writers()  # D1
            self._last_live, self._held = live, {name: tensor.detach() for name, tensor in live.items()}
        copied = self._copied_names(live, copy_all)
        read = self._held
        if copied or self._copies.are_held:
            to_copy = {name: read[name] for name in copied}
            read = {**read, **self._copies.take(to_copy, self._copy_devices, self.order_writers)}
        with self._lock:
            for group, placed in self._steps:
                tensors = [read[tensor.tracked.name] for tensor in group.tensors]
                self._advance(group.device, placed, tensors, weights)
            for copies, placed in self._copy_steps:
                tensors = [read[tracked.name] for tracked, _, _ in copies.tensors]
                self._advance(copies.device, placed, tensors, weights)
        if copy_all and self._offloaded:
            self.order_writers()  # what was not copied on the device has left it before the caller goes on

    def order_writers(self) -> None:
        """What the caller does next with parameters comes after every read of them so far.

        Never raises: optimizers call it. ``take_error`` tells what went wrong.
        """
        with self._lock:
            try:
                for follower in self._late_followers():
                    with neutral_modes():
                        follower.stash_live()
            except Exception as error:
                self._error = self._error or error
            for lane in self.lanes():
                lane.order_writer()

    def flush_deferred(self) -> None:
        """Queue all that still waits for snapshot copies, behind them: who asks wants the averages as they are now."""
        with self._lock, neutral_modes():
            for follower in self._late_followers():
                follower.flush()

    def order_readers(self) -> None:
        """What the caller does next with averages comes after every update so far."""
        self.flush_deferred()
        for lane in self.lanes():
            lane.order_reader()

    def is_capturing(self) -> bool:
        """Whether what the caller does now is recorded into a graph instead of done."""
        return any(lane.is_capturing() for lane in self.lanes())

    @property
    def reads_later(self) -> bool:
        """Whether any of the lanes may still be reading when ``queue`` has returned."""
        return not all(isinstance(lane, InlineLane) for lane in self._lanes.values())

    @property
    def scratch_bytes(self) -> int:
        """Device memory held for parameters, on all devices."""
        return sum(follower.scratch.num_bytes for follower in self._followers.values())

    @property
    def num_held_up(self) -> int:
        """How often the trainer had to wait: for a snapshot copy, or for averaging in host memory."""
        followers, offloaded = self._followers.values(), self._offloaded.values()
        return sum(each.num_held_up for each in followers) + sum(each.num_held_up for each in offloaded)

    def lanes(self) -> list[Lane]:
        """Those made so far."""
        return list(self._lanes.values())

    def take_error(self) -> BaseException | None:
        """What queued work raised since the last call; of several failures the first device's."""
        errors = [lane.take_error() for lane in self._lanes.values()]
        if self._error is not None:
            with self._lock:
                errors, self._error = [*errors, self._error], None
        return next((error for error in errors if error is not None), None)

    def drain(self, timeout_seconds: float | None = None, *, with_snapshots: bool = True) -> None:
        """Block until all work is done, and snapshots are written. Raises TimeoutError, which names all that is not."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self.flush_deferred()
        late = []
        for waiting in [lane.drain for lane in self.lanes()] + [sink.flush for sink in self.sinks if with_snapshots]:
            try:
                waiting(None if deadline is None else max(deadline - time.monotonic(), 0.0))
            except TimeoutError as error:
                late.append(str(error))
        if late:
            raise TimeoutError(f"after {timeout_seconds} seconds: {' '.join(late)}")

    def _copied_names(self, live: Mapping[str, Tensor], copy_all: bool) -> Sequence[str]:
        """Buffers, parameters on another device than their average, or everything; computed when something moved."""
        known = self._copied_for
        if known is None or known[0] is not live or known[1] != copy_all:
            goes_out = {name: self._offloads and tensor.device.type != "cpu" for name, tensor in live.items()}
            self._copy_devices = {
                name: live[name].device if out else self.devices[name] for name, out in goes_out.items()
            }
            self._copied = [
                tensor.name
                for tensor in self._flat_buffers.tracked
                if tensor.role != "skipped"
                and (
                    (copy_all and not goes_out[tensor.name])
                    or (self._reads_later and not tensor.is_parameter)
                    or live[tensor.name].device != self._copy_devices[tensor.name]
                )
            ]
            self._copied_for = live, copy_all
        return self._copied

    def _advance(
        self, device: torch.device, placed: PlacedStep, tensors: Sequence[Tensor], weights: Sequence[float]
    ) -> None:
        sources = placed.step.sources(tensors)
        if self._offloads and tensors and tensors[0].device != device:
            self._offload(placed, tensors).advance(sources, weights)
        else:
            self._follower(device).advance(placed, sources, weights)

    def _offload(self, placed: PlacedStep, tensors: Sequence[Tensor]) -> Offload:
        device = tensors[0].device
        if any(tensor.device != device for tensor in tensors):
            raise NitrousError(
                f"offload='host': neighbouring tensors of the model were all on one device when the EMA was "
                f"constructed, and are on {device} and others now. Construct another EMA where they are."
            )
        if (placed, device) not in self._offloaded:
            self._offloaded[placed, device] = Offload(placed.step, self.lane(device), self.lane(torch.device("cpu")))
        return self._offloaded[placed, device]

    def _follower(self, device: torch.device) -> DeferredUpdates:
        if device not in self._followers:
            scratch = StashPool(device, self._own_bytes(device) if self._scratch_bytes is None else self._scratch_bytes)
            copies = partial(_copies_in_flight, self.sinks, device)  # no reference to this object: no cycle
            self._followers[device] = DeferredUpdates(self.lane(device), copies, scratch)
        return self._followers[device]

    def _late_followers(self) -> Iterable[DeferredUpdates]:
        return [follower for follower in self._followers.values() if follower.is_late]

    def _own_bytes(self, device: torch.device) -> int:
        """What one copy of all that is averaged or copied on a device takes as scratch."""
        steps = [placed.step for group, placed in self._steps if group.device == device]
        steps += [placed.step for copies, placed in self._copy_steps if copies.device == device]
        return sum(step.stash_bytes(batch) for step in steps for batch in range(len(step.batches)))


def _copies_in_flight(sinks: Sequence[SnapshotSink], device: torch.device) -> ReadbacksInFlight | None:
    return sinks[0].copies_in_flight(device) if sinks else None


def _placed(step: AveragingStep, ranges: Ranges) -> PlacedStep:
    return PlacedStep(step, [list(ranges(begin, end)) for begin, end in step.batches])


def _average_ranges(layout: Layout, group: Group) -> Ranges:
    """Where elements of a group lie in the file's data, in every profile."""
    item_bytes = TORCH_DTYPES[layout.checkpoint_dtype].itemsize
    permuted = [tensor for tensor in group.tensors if _is_permuted(tensor)]

    def ranges(begin: int, end: int) -> Iterator[Span]:
        for tensor in permuted:  # any part of it may be anywhere in it in the file
            if tensor.begin < end and begin < tensor.end:
                begin, end = min(begin, tensor.begin), max(end, tensor.end)
        for section, _ in zip(layout.sections, layout.gammas, strict=False):
            first = section.begin + group.begin * item_bytes
            yield Span(first + begin * item_bytes, first + end * item_bytes)

    return ranges


def _is_permuted(tensor: AveragedTensor) -> bool:
    """Whether it lies in another order in the file, which is row-major, than here."""
    return not tensor.is_row_major


def _copied_ranges(layout: Layout, copies: CopiedGroup) -> Ranges:
    """Where bytes of a group of copied tensors lie in the file's data."""
    first = layout.sections[-1].begin + layout.padding_bytes + copies.begin

    def ranges(begin: int, end: int) -> Iterator[Span]:
        yield Span(first + begin, first + end)

    return ranges
