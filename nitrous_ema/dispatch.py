"""Puts the work of an update on the lanes: which tensors are read live, which copied first, and after what.

One lane per device, made when it is first needed. What is queued refers to buffers and tensors, never to the EMA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nitrous_ema.arena import Arena, AveragedTensor, CopyGroup, Group
from nitrous_ema.copies import CallerCopies
from nitrous_ema.pipeline import Lane, Sink
from nitrous_ema.snapshots.format import Layout, Span
from nitrous_ema.step import GroupStep
from nitrous_ema.tracked import TORCH_DTYPES

BeforeWrite = Callable[[int, int], None]
Ranges = Callable[[int, int], Iterator[Span]]


class Dispatch:
    """The lanes of one arena, and the order of what is put on them.

    Args:
        arena: The averages.
        make_lane: Makes the lane of a device.
        reads_later: Whether lanes may run after the caller has gone on. Buffers, which change in forward, are then
            copied where the caller is.
    """

    def __init__(self, arena: Arena, make_lane: Callable[[torch.device], Lane], *, reads_later: bool) -> None:
        self._arena = arena
        self._make_lane = make_lane
        self._reads_later = reads_later
        self._lanes: dict[torch.device, Lane] = {}
        self._copies = CallerCopies(self.order_caller)
        self.sinks: list[Sink] = []
        """None or one: whose copies of averages are not to be overtaken by writes."""
        self.place()

    def place(self) -> None:
        """Take note of where the arena's buffers are."""
        self._steps = [GroupStep(group) for group in self._arena.groups]
        self._copied_for: tuple[Mapping[str, Tensor], bool] | None = None  # what _copied was computed for
        self._copied: Sequence[str] = ()
        averaged = {tensor.tracked.name: group.device for group in self._arena.groups for tensor in group.tensors}
        copied = {tracked.name: group.device for group in self._arena.copy_groups for tracked, _, _ in group.tensors}
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
        copied = self._copied_names(live, copy_all)
        read = live
        if copied or self._copies.are_held:
            read = {**live, **self._copies.take({name: live[name] for name in copied}, self.devices)}
        layout = self._arena.layout
        for group, step in zip(self._arena.groups, self._steps, strict=True):
            sources = step.sources([read[tensor.tracked.name] for tensor in group.tensors])
            before_write = self._before_write(group.device, partial(_average_ranges, layout, group))
            self.lane(group.device).run(partial(step.run, sources, weights, before_write))
        for copies in self._arena.copy_groups:
            values = [read[tracked.name] for tracked, _, _ in copies.tensors]
            before_write = self._before_write(copies.device, partial(_copied_ranges, layout, copies))
            self.lane(copies.device).run(partial(_keep, copies, values, before_write))

    def order_caller(self) -> None:
        """What the caller does next with parameters or averages comes after everything queued so far."""
        for lane in self._lanes.values():
            lane.order_caller()

    def lanes(self) -> list[Lane]:
        """Those made so far."""
        return list(self._lanes.values())

    def take_error(self) -> BaseException | None:
        """What queued work raised since the last call; of several failures the first device's."""
        errors = [lane.take_error() for lane in self._lanes.values()]
        return next((error for error in errors if error is not None), None)

    def drain(self, timeout_seconds: float | None = None, *, with_snapshots: bool = True) -> None:
        """Block until all work is done, and snapshots are written. Raises TimeoutError, which names all that is not."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
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
            self._copied = [
                tensor.name
                for tensor in self._arena.tracked
                if tensor.role != "skipped"
                and (
                    copy_all
                    or (self._reads_later and not tensor.is_parameter)
                    or live[tensor.name].device != self.devices[tensor.name]
                )
            ]
            self._copied_for = live, copy_all
        return self._copied

    def _before_write(self, device: torch.device, make_ranges: Callable[[], Ranges]) -> BeforeWrite | None:
        """What orders the lane's writes after snapshot copies that are still reading there; None if there are none.

        That is nearly always, so where they would write is looked up only then.
        """
        for sink in self.sinks:
            order = sink.writes_order(device)
            if order is not None:
                return partial(_order_ranges, order, make_ranges())
        return None


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


def _copied_ranges(layout: Layout, copies: CopyGroup) -> Ranges:
    """Where bytes of a group of copied tensors lie in the file's data."""
    first = layout.sections[-1].begin + layout.padding_bytes + copies.begin

    def ranges(begin: int, end: int) -> Iterator[Span]:
        yield Span(first + begin, first + end)

    return ranges


def _order_ranges(order: BeforeWrite, ranges: Ranges, begin: int, end: int) -> None:
    for span in ranges(begin, end):
        order(span.begin, span.end)


def _keep(copies: CopyGroup, values: Sequence[Tensor], before_write: BeforeWrite | None) -> None:
    """Take over the copied tensors' present values."""
    if before_write is not None:
        before_write(0, copies.flat.numel())
    torch._foreach_copy_(copies.values(), list(values))
