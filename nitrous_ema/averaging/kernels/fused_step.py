"""The averaging step of one group by one launch: every parameter is read once, and all profiles move.

Where Triton and the device allow it, this takes the place of ``ForeachStep``, whose foreach calls read the parameters
once per profile and take many launches. It needs averages in float32 and parameters in float32, bfloat16 or float16
(complex64 counts as pairs) that lie in their averages' memory order; an update in which some do not is left to
``ForeachStep``, whole. ``fused_kernel.py`` says which bits the two may differ in; ``run`` and ``run_stashed`` of one
update never differ.

F1  New addresses go to the device from pinned memory, on     nothing_waits_for_new_addresses
    the stream of the launch; the host does not wait.
F2  A table is read on the stream that uploaded it and on     tables_stay_on_their_stream
    no other, so that the allocator may give its memory       kept_parameters_are_found_from_the_stream_
    away once it is dropped; ``keep`` uploads nothing.         that_averages_them
F3  What was kept gives the bits that ``run`` would have.     kept_parameters_give_the_bits_of_run

These are cases of ``test_fused_step.py``, in ``tests/fused_step_cases.py``.

That pinned memory may be dropped at once as well: torch gives it to nobody before the copy has run (events of the
caching host allocator, recorded by ``copy_``: ATen/native/cuda/Copy.cu and ATen/core/CachingHostAllocator.h).
Parameters and averages are held by whoever queues the step.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nitrous_ema.averaging.kernels.flat_buffers import Group, memory_order
from nitrous_ema.averaging.kernels.foreach_step import AveragingStep, ForeachStep, are_same
from nitrous_ema.errors import warn

_BATCH_ELEMENTS = 1 << 23
_ALIGNED_BYTES = 16
_OLDEST_CAPABILITY = (8, 0)  # what Triton supports, says its README; bfloat16 needs it too


@dataclass(frozen=True, slots=True, eq=False)
class _Addresses:
    """Where the parameters of one update are."""

    tensors: Sequence[Tensor]
    rows: Tensor
    """For the kernel, on the host; pinned where that helps."""


@dataclass(frozen=True, slots=True, eq=False)
class _FusedStash:
    """Parameters of a batch that were copied."""

    batch: int
    rows: Tensor
    """Of the batch's tensors; on the host, pinned where that helps."""
    scratch: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """What averages one batch."""

    first_tensor: int
    last_tensor: int
    first_block: int
    last_block: int


def step_for(group: Group) -> AveragingStep:
    """The fastest averaging step that a group's device and types allow.

    The first of a device and number of profiles compiles the kernel, compares what it computes, and waits for that. A
    kernel that fails is told once, and ``ForeachStep`` takes its place.
    """
    if _is_candidate(group) and _works(group.flats[0].device, len(group.flats)):
        from nitrous_ema.averaging.kernels.fused_kernel import knows

        if all(knows(tensor.tracked.dtype) for tensor in group.tensors):
            return FusedStep(group)
    return ForeachStep(group)


class FusedStep:
    """The ``AveragingStep`` of one group as one launch per run of batches.

    Args:
        group: Of types that ``fused_kernel.knows``. Its buffers must not be replaced while this object is used.
        batch_elements: Elements of one profile per batch, a multiple of the kernel's block.

    Raises:
        ImportError: There is no Triton.
    """

    def __init__(self, group: Group, batch_elements: int = _BATCH_ELEMENTS) -> None:
        from nitrous_ema.averaging.kernels import fused_kernel

        self._kernel = fused_kernel
        self._group = group
        self._device = group.flats[0].device
        self._plain = ForeachStep(group, batch_elements)
        self.batches = self._plain.batches
        self._found: Sequence[Tensor] | None = None
        self._rows: Tensor | None = None  # of those places; None where the kernel cannot read them
        self._uploaded: tuple[Tensor, Any, Tensor] | None = None  # rows, the stream of F2, table
        blocks = fused_kernel.cut([(tensor.begin, tensor.end) for tensor in group.tensors])
        self._launches = [self._launch_of(blocks, *batch) for batch in self.batches]
        self._blocks = blocks.to(self._device)

    def sources(self, tensors: Sequence[Tensor]) -> Any:
        """Where the parameters of this group are now; see ``AveragingStep``."""
        if self._found is None or not are_same(tensors, self._found):
            self._found, self._rows = [*tensors], self._find(tensors)
        return self._plain.sources(tensors) if self._rows is None else _Addresses(tensors, self._rows)

    def run(self, sources: Any, weights: Sequence[float], batches: Sequence[int] | None = None) -> None:
        """Move averages towards parameters; see ``AveragingStep``."""
        if not isinstance(sources, _Addresses):
            self._plain.run(sources, weights, batches)
            return
        with _current(self._device) as stream:
            table = self._table(sources.rows, stream)
            for first, last in _runs(range(len(self.batches)) if batches is None else batches):
                blocks = self._launches[first].first_block, self._launches[last].last_block
                self._kernel.launch(table, self._blocks, 0, *blocks, self._group.flats, weights)

    def stash_bytes(self, batch: int) -> int:
        """Scratch that ``keep`` needs; see ``AveragingStep``."""
        launch = self._launches[batch]
        return self._plain.stash_bytes(batch) + _ALIGNED_BYTES * (launch.last_tensor - launch.first_tensor)

    def stash(self, sources: Any, batch: int, scratch: Tensor) -> Any:
        """Copy the parameters of a batch; see ``AveragingStep``."""
        if not isinstance(sources, _Addresses):
            return self._plain.stash(sources, batch, scratch)
        launch, (low, high) = self._launches[batch], self.batches[batch]
        views, read, rows, place = [], [], [], 0
        for index in range(launch.first_tensor, launch.last_tensor):
            like = self._group.tensors[index]
            flat = memory_order(sources.tensors[index].detach(), like)
            begin, end = max(like.begin, low), max(min(like.end, high), low)
            # Placed as the average is, so that the copy may be read in wide accesses.
            place = _aligned(place) + begin * flat.itemsize % _ALIGNED_BYTES
            views.append(scratch[place : place + (end - begin) * flat.itemsize].view(flat.dtype))
            read.append(flat[begin - like.begin : end - like.begin])
            rows.append(self._kernel.row(views[-1], begin, end))
            place += (end - begin) * flat.itemsize
        torch._foreach_copy_(views, read)
        return _FusedStash(batch, self._pinned(self._kernel.table(rows)), scratch)

    def run_stashed(self, kept: Any, weights: Sequence[float]) -> None:
        """Average from what was kept; see ``AveragingStep``."""
        if not isinstance(kept, _FusedStash):
            self._plain.run_stashed(kept, weights)
            return
        launch = self._launches[kept.batch]
        with _current(self._device):
            table = kept.rows.to(self._device, non_blocking=True)
            blocks = launch.first_block, launch.last_block
            self._kernel.launch(table, self._blocks, launch.first_tensor, *blocks, self._group.flats, weights)

    def _table(self, rows: Tensor, stream: Any) -> Tensor:
        """The rows on the device."""
        if self._uploaded is None or self._uploaded[0] is not rows or self._uploaded[1] != stream:
            self._uploaded = rows, stream, rows.to(self._device, non_blocking=True)
        return self._uploaded[2]

    def _find(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """A row per tensor for the kernel; None if it cannot read one of them."""
        rows = []
        for tensor, like in zip(tensors, self._group.tensors, strict=True):
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if real.stride() != like.strides or real.device != self._device:
                return None
            rows.append(self._kernel.row(real, like.begin, like.end))
        return self._pinned(self._kernel.table(rows))

    def _pinned(self, rows: Tensor) -> Tensor:
        return rows if self._device.type == "cpu" else rows.pin_memory()

    def _launch_of(self, blocks: Tensor, begin: int, end: int) -> _Launch:
        numbers = blocks[:, 1].contiguous()
        size = self._kernel.BLOCK_ELEMENTS
        edges = torch.tensor([begin // size, -(-end // size)], dtype=numbers.dtype, device="cpu")
        first, last = torch.searchsorted(numbers, edges).tolist()
        return _Launch(int(blocks[first, 0]), int(blocks[last - 1, 0]) + 1, first, last)


@functools.cache
def _works(device: torch.device, num_profiles: int) -> bool:
    """Whether the kernel does what it should; where it fails, why is told, once."""
    try:
        from nitrous_ema.averaging.kernels import fused_kernel

        if not fused_kernel.can_compile_for(triton_backend(device) or ""):
            return False
        with _current(device):
            fused_kernel.rehearse(device, num_profiles)
    except Exception as error:  # of Triton, a compiler that it calls, the driver: whatever it is, training goes on
        warn(
            f"The fused averaging kernel does not work on {device}: {type(error).__name__}: {str(error)[:500]}. "
            "Averaging by torch's own operations instead, which takes more time on the device, and gives the same "
            "averages but for rounding. A release of triton that fits this torch and its driver avoids that."
        )
        return False
    return True


def _is_candidate(group: Group) -> bool:
    """Whether the kernel might work for a group, as far as can be told without Triton."""
    return (
        group.numel > 0
        and all(type(flat) is Tensor and flat.data_ptr() % _ALIGNED_BYTES == 0 for flat in group.flats)
        and triton_backend(group.flats[0].device) is not None
        and importlib.util.find_spec("triton") is not None
    )


def triton_backend(device: torch.device) -> str | None:
    """Triton's name for what compiles for a device; None where it has nothing that could be tried."""
    if device.type == "cuda" and torch.cuda.is_available():
        if torch.version.hip is not None:
            return "amd"
        return "nvidia" if torch.cuda.get_device_capability(device) >= _OLDEST_CAPABILITY else None
    return "intel" if device.type == "xpu" else None


def _runs(batches: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for batch in batches:
        if runs and batch == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], batch
        else:
            runs.append((batch, batch))
    return runs


@contextmanager
def _current(device: torch.device) -> Iterator[Any]:
    """Make a device the current one, and give its current stream: Triton launches there."""
    module = torch.get_device_module(device)
    with nullcontext() if device.type == "cpu" else module.device(device):
        yield module.current_stream()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
