"""The memory of the averages: a few flat buffers in file order, and named tensors in them.

A *profile's flat space* is all averaged tensors of the model back to back, in the model's order, in elements. It is the
same for every profile, and a section of a snapshot file holds exactly this space. It is cut into *groups*: maximal runs
of tensors that share a device, their parameters' device and an accumulation type (float64 where the tensor is float64,
float32 otherwise). Each group has one flat buffer per profile, so that writing a snapshot copies buffers, not tensors.

An average has its parameter's own memory order (channels_last, transposed), so that averaging runs over both as flat
memory. Files are row-major, and ``pieces`` yields strided views where the two orders differ. A parameter that is
expanded or has gaps is averaged in row-major order. complex64 counts as pairs of float32, in groups of its own: a
complex tensor must begin at an even element.

Copied tensors lie in byte buffers, one per run of tensors with one device and type, in the order of the file's last
section.

``averages`` and ``copies`` return tensors for users. Each has a storage of its own size, which is a slice of a buffer's
storage and holds the buffer. Programs that save tensors take tensors of one storage for tied ones, and write the whole
storage. A tensor with its own storage has its own version counter too, which ``mark_written`` moves.

Longer than 300 lines because the same cut of a range serves reading and writing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nitrous_ema._base.torch_dtypes import TORCH_CODES
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.model.tracking import TrackedTensor
from nitrous_ema.snapshots.layout import Layout

_ROW_ELEMENTS_CPU = 64  # every profile begins at a multiple of 256 bytes


@dataclass(slots=True, eq=False)
class Group:
    """A run of averaged tensors with one device and accumulation type."""

    device: torch.device
    dtype: torch.dtype
    first: int
    """Index of its first tensor among the averaged ones."""
    begin: int
    """Its first element in a profile's flat space."""
    tensors: list[AveragedTensor]
    flats: list[Tensor]
    """One buffer per profile, 1-d; its last tensor's end is its size."""
    together: Tensor | None = None
    """In host memory: all buffers as one [profiles, elements] view."""

    @property
    def numel(self) -> int:
        """Elements of one buffer."""
        return self.tensors[-1].end if self.tensors else 0


@dataclass(frozen=True, slots=True, eq=False)
class AveragedTensor:
    """The place of one averaged tensor in its group's buffers."""

    tracked: TrackedTensor
    begin: int
    """First element, relative to the group."""
    end: int
    shape: tuple[int, ...]
    """Real shape: complex64 has a trailing axis of 2."""
    strides: tuple[int, ...]
    is_row_major: bool


@dataclass(slots=True, eq=False)
class CopiedGroup:
    """Copied tensors of one type on one device, back to back."""

    device: torch.device
    begin: int
    """Its first byte among all copied tensors."""
    tensors: list[tuple[TrackedTensor, int, int]]
    """Each with its first and last byte, relative to the group."""
    flat: Tensor  # uint8

    def values(self) -> list[Tensor]:
        """Return the copied values, as views with the model's types and shapes."""
        return [self.flat[begin:end].view(tracked.dtype).view(tracked.shape) for tracked, begin, end in self.tensors]


class FlatBuffers:
    """The averages of every profile, and the copied tensors.

    Args:
        tracked: The model's tensors, in its order.
        layout: Order of the tensors in snapshot files, which is the order here.
        device: Device of the averages; by default each average is on its parameter's device.
    """

    def __init__(self, tracked: Sequence[TrackedTensor], layout: Layout, device: torch.device | None = None) -> None:
        by_name = {tensor.name: tensor for tensor in tracked}
        self.tracked = tuple(tracked)
        self.averaged = tuple(by_name[record.name] for record in layout.averaged)
        self.copied = tuple(by_name[record.name] for record in layout.copied)
        self.layout = layout
        self.groups = self._make_groups(device)
        self.copy_groups = self._make_copy_groups(
            {tensor.name: device or tensor.live().device for tensor in self.copied}
        )
        counted_on = self.groups[0].device if self.groups else torch.device("cpu")
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=counted_on)
        """Updates that were skipped, because a tensor was not finite; counted by the lane that averages."""
        self._places = {tensor.tracked.name: (group, tensor) for group in self.groups for tensor in group.tensors}
        # By profile and name; None as the profile of copied tensors.
        self._returned: dict[tuple[int | None, str], Tensor] = {}

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that hold averages or copied tensors, each once."""
        averaged = [group.device for group in self.groups]
        return tuple(dict.fromkeys([*averaged, *(group.device for group in self.copy_groups)]))

    def average(self, profile: int, name: str) -> Tensor:
        """Return the average of one tensor, with the parameter's shape and memory order and a storage of its own."""
        group, tensor = self._places[name]
        dtype, strides = group.dtype, tensor.strides
        place = range(tensor.begin * dtype.itemsize, tensor.end * dtype.itemsize)
        if tensor.tracked.dtype.is_complex:
            dtype, strides = tensor.tracked.dtype, tuple(stride // 2 for stride in strides[:-1])
        return self._tensor((profile, name), group.flats[profile], place, dtype, tensor.tracked.shape, strides)

    def averages(self, profile: int) -> Iterator[tuple[TrackedTensor, Tensor]]:
        """Yield every averaged tensor with its average."""
        for tracked in self.averaged:
            yield tracked, self.average(profile, tracked.name)

    def copies(self) -> Iterator[tuple[TrackedTensor, Tensor]]:
        """Yield every copied tensor with its stored value, which has a storage of its own."""
        for group in self.copy_groups:
            for tracked, begin, end in group.tensors:
                key, place = (None, tracked.name), range(begin, end)
                yield tracked, self._tensor(key, group.flat, place, tracked.dtype, tracked.shape)

    def mark_written(self) -> None:
        """Move the version counters of the tensors returned so far, because their buffers are written.

        A backward pass that needs their earlier values then raises, as with any tensor.
        """
        move_versions(self._returned.values())

    def pieces(
        self, profile: int, begin: int, end: int, device: torch.device | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield elements ``[begin, end)`` of a profile's flat space in the order of the file, piece by piece.

        Args:
            profile: Index of the profile.
            begin: First element.
            end: End of the range.
            device: Only pieces on this device; None for all.

        Yields:
            (first element relative to ``begin``, view of the accumulation type). The file has the elements of a view
            in the view's row-major order. Neighbours that are row-major in memory are one 1-d view. A tensor in another
            memory order is a few views that are not contiguous: at most one more than twice its number of axes.
        """
        for group in self.groups:
            if device is not None and group.device != device:
                continue
            low, high = max(begin, group.begin), min(end, group.begin + group.numel)
            for first, view in _row_major_views(group, profile, low - group.begin, high - group.begin):
                yield group.begin + first - begin, view

    def copied_pieces(self, begin: int, end: int, device: torch.device | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield bytes ``[begin, end)`` of the copied tensors: (first byte relative to ``begin``, 1-d uint8 view)."""
        for group in self.copy_groups:
            if device is not None and group.device != device:
                continue
            low, high = max(begin, group.begin), min(end, group.begin + group.flat.numel())
            if low < high:
                yield low - begin, group.flat[low - group.begin : high - group.begin]

    def fill(self, profile: int, begin: int, values: Tensor) -> None:
        """Write row-major elements into a profile, from element ``begin`` on: the reverse of ``pieces``."""
        for first, view in self.pieces(profile, begin, begin + values.numel()):
            view.copy_(values[first : first + view.numel()].view(view.shape))

    def fill_copied(self, begin: int, values: Tensor) -> None:
        """Write bytes of the copied tensors, from byte ``begin`` on: the reverse of ``copied_pieces``.

        Args:
            begin: Relative to the first copied byte; negative where padding precedes it in a file.
            values: 1-d uint8.
        """
        for group in self.copy_groups:
            low, high = max(begin, group.begin), min(begin + values.numel(), group.begin + group.flat.numel())
            if low < high:
                group.flat[low - group.begin : high - group.begin].copy_(values[low - begin : high - begin])

    def to(self, device: torch.device) -> None:
        """Move every buffer to a device. Views taken before still show the old buffers."""
        for group in self.groups:
            group.device, group.flats = device, [flat.to(device) for flat in group.flats]
            # flat.to() returns the same buffers where they are in host memory already.
            group.together = group.together if device.type == "cpu" else None
        for copies in self.copy_groups:
            copies.device, copies.flat = device, copies.flat.to(device)
        self.num_skipped = self.num_skipped.to(device)

    def resize(self, tracked: Sequence[TrackedTensor], layout: Layout) -> None:
        """Give copied tensors new shapes. Their values are zeros then; all others stay.

        Views taken before still show the old buffers.

        Args:
            tracked: The model's tensors, in its order; all but copied ones as before.
            layout: The order of these tensors in snapshot files.
        """
        by_name = {tensor.name: tensor for tensor in tracked}
        before = {name.name: value for name, value in self.copies()}
        devices = {tensor.name: group.device for group in self.copy_groups for tensor, _, _ in group.tensors}
        self.tracked, self.layout = tuple(tracked), layout
        self.copied = tuple(by_name[record.name] for record in layout.copied)
        self.copy_groups = self._make_copy_groups(devices)
        self._returned = {key: tensor for key, tensor in self._returned.items() if key[0] is not None}
        for tensor, value in self.copies():
            if value.shape == before[tensor.name].shape:
                value.copy_(before[tensor.name])

    def _tensor(
        self,
        key: tuple[int | None, str],
        flat: Tensor,
        place: range,
        dtype: torch.dtype,
        shape: torch.Size,
        strides: Sequence[int] = (),
    ) -> Tensor:
        """Return the tensor of some bytes of a buffer, the same object at each call; row-major without strides."""
        known = self._returned.get(key)
        # The buffer may have moved, and share_memory_() on a tensor that a user has moves the tensor's own storage.
        if known is None or (place and known.data_ptr() != flat.data_ptr() + place.start):
            storage = flat.untyped_storage()[place.start : place.stop]
            with neutral_modes():
                known = torch.empty(0, dtype=dtype, device=flat.device)
                known.set_(storage, 0, shape, strides)
            self._returned[key] = known
        return known

    def _make_groups(self, device: torch.device | None) -> list[Group]:
        groups: list[Group] = []
        for index, tracked in enumerate(self.averaged):
            place = device or tracked.live().device
            dtype = accumulation_dtype(tracked.dtype)
            was_complex = bool(groups) and groups[-1].tensors[-1].tracked.dtype.is_complex
            is_other = tracked.dtype.is_complex != was_complex
            # The parameters of a group share a device as well, so that one step can read all of them.
            moved = bool(groups) and groups[-1].tensors[-1].tracked.live().device != tracked.live().device
            if not groups or is_other or moved or (groups[-1].device, groups[-1].dtype) != (place, dtype):
                begin = groups[-1].begin + groups[-1].numel if groups else 0
                groups.append(Group(place, dtype, index, begin, [], []))
            groups[-1].tensors.append(_placed(tracked, groups[-1].numel))
        for group in groups:
            group.flats, group.together = _buffers(group, len(self.layout.gammas))
        return groups

    def _make_copy_groups(self, devices: Mapping[str, torch.device]) -> list[CopiedGroup]:
        groups: list[CopiedGroup] = []
        for tracked in self.copied:
            place = devices[tracked.name]
            end = groups[-1].tensors[-1][2] if groups else 0
            last = groups[-1].tensors[-1][0] if groups else tracked
            moved = last.live().device != tracked.live().device
            if not groups or moved or (groups[-1].device, last.dtype) != (place, tracked.dtype):
                groups.append(CopiedGroup(place, (groups[-1].begin + end) if groups else 0, [], torch.empty(0)))
                end = 0
            nbytes = math.prod(tracked.shape) * tracked.dtype.itemsize
            groups[-1].tensors.append((tracked, end, end + nbytes))
        for group in groups:
            group.flat = torch.zeros(group.tensors[-1][2], dtype=torch.uint8, device=group.device)
        return groups


def move_versions(tensors: Collection[Tensor]) -> None:
    """Move the version counters of tensors, whose memory is written where autograd does not see it."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except (TypeError, RuntimeError):  # the releases before torch 2.7 take one tensor
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def snapshot_layout(
    tracked: Sequence[TrackedTensor], gammas: Sequence[float], sigma_rels: Sequence[float], dtype: torch.dtype
) -> Layout:
    """Return the layout of snapshots of these tensors and profiles, with averages stored as ``dtype``."""
    return Layout(
        records=tuple(tensor.record for tensor in tracked),
        gammas=tuple(gammas),
        sigma_rels=tuple(sigma_rels),
        checkpoint_dtype=TORCH_CODES[dtype],
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a parameter of type ``dtype`` is averaged: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_order(tensor: Tensor, like: AveragedTensor) -> Tensor:
    """Return a live tensor as flat memory in the order of its average: a view where it is stored so, else a copy."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if real.stride() != like.strides:
        real = torch.empty_strided(like.shape, like.strides, dtype=real.dtype, device=real.device).copy_(real)
    return real.as_strided((like.end - like.begin,), (1,))


def _buffers(group: Group, profiles: int) -> tuple[list[Tensor], Tensor | None]:
    """Return zeros for every profile, and in host memory also one tensor of all profiles."""
    if group.device.type != "cpu":
        return [torch.zeros(group.numel, dtype=group.dtype, device=group.device) for _ in range(profiles)], None
    row = -(-group.numel // _ROW_ELEMENTS_CPU) * _ROW_ELEMENTS_CPU
    together = torch.zeros((profiles, row), dtype=group.dtype, device="cpu")[:, : group.numel]
    # Each profile gets a storage of its own, by way of numpy: torch.save of a view writes the view's whole storage.
    return [torch.from_numpy(flat.numpy()) for flat in together], together


def _placed(tracked: TrackedTensor, begin: int) -> AveragedTensor:
    live = tracked.live().detach()
    real = torch.view_as_real(live) if live.is_complex() else live
    strides = real.stride() if _is_dense(real) else torch.empty(real.shape, device="meta").stride()
    shape = tuple(real.shape)
    row_major = torch.empty_strided(shape, strides, device="meta").is_contiguous()
    return AveragedTensor(tracked, begin, begin + real.numel(), shape, tuple(strides), row_major)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory without gaps or overlaps, in some order of the axes."""
    expected = 1  # the stride of the next axis, if the axes before it are filled
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return expected > 0


def _row_major_views(group: Group, profile: int, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
    """Cut ``[begin, end)`` of a group, in the order of a file, into views of its buffer: (first element, view)."""
    flat, run = group.flats[profile], begin  # run: the first element that no view contains yet
    index = max(bisect_right(group.tensors, begin, key=lambda tensor: tensor.begin) - 1, 0)
    while index < len(group.tensors) and (tensor := group.tensors[index]).begin < end:
        low, high = max(begin, tensor.begin), min(end, tensor.end)
        if not tensor.is_row_major and low < high:
            if run < low:
                yield run, flat[run:low]
            whole = flat[tensor.begin : tensor.end].as_strided(tensor.shape, tensor.strides)
            for first, view in _boxes(whole, low - tensor.begin, high - tensor.begin):
                yield tensor.begin + first, view
            run = high
        index += 1
    if run < end:
        yield run, flat[run:end]


def _boxes(tensor: Tensor, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
    """Cut elements ``[begin, end)`` of a tensor, counted in row-major order, into views: (first element, view).

    The views are the rest of a row, whole rows, and the start of a row, where a row is everything that one index of the
    first axis selects. Parts of a row are cut in the same way, one axis further.
    """
    if begin < end and end - begin == tensor.numel():
        yield begin, tensor
    elif begin < end:
        row = tensor.numel() // len(tensor)
        first, last = -(-begin // row), end // row  # of the whole rows, if first < last
        rest_end = min(first * row, end)
        yield from _boxes_of_row(tensor, row, begin, rest_end)
        if first < last:
            yield first * row, tensor[first:last]
        yield from _boxes_of_row(tensor, row, max(last * row, rest_end), end)


def _boxes_of_row(tensor: Tensor, row: int, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
    """Cut a range that lies in one row of ``row`` elements, as ``_boxes`` does."""
    if begin < end:
        start = begin - begin % row
        for first, view in _boxes(tensor[start // row], begin - start, end - start):
            yield start + first, view
