"""The step of copied tensors (buffers of integers, what a filter copies): their present values are taken over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nitrous_ema.averaging.kernels.flat_buffers import CopiedGroup

_ALIGNED_BYTES = 16


class CopiedTensorsStep:
    """The ``Step`` of one group of copied tensors: one batch; weights mean nothing.

    Args:
        group: Its buffer must not be replaced while this object is used.
    """

    def __init__(self, group: CopiedGroup) -> None:
        self._kept = group.values()
        self.batches = ((0, group.flat.numel()),)
        sizes = [math.prod(value.shape) * value.dtype.itemsize for value in self._kept]
        self._begins = list(accumulate((-(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES for size in sizes), initial=0))

    def sources(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of this group as they are now."""
        return list(tensors)

    def run(self, sources: list[Tensor], weights: Sequence[float], batches: Sequence[int] | None = None) -> None:
        """Take them over."""
        copy_each(self._kept, sources)

    def stash_bytes(self, batch: int) -> int:
        """Scratch that ``keep`` needs."""
        return self._begins[-1]

    def stash(self, sources: list[Tensor], batch: int, scratch: Tensor) -> list[Tensor]:
        """Copy them to scratch on the current stream."""
        views = []
        for begin, value in zip(self._begins, self._kept, strict=False):
            num_bytes = math.prod(value.shape) * value.dtype.itemsize
            views.append(scratch[begin : begin + num_bytes].view(value.dtype).view(value.shape))
        copy_each(views, sources, non_blocking=True)
        return views

    def run_stashed(self, kept: list[Tensor], weights: Sequence[float]) -> None:
        """Take them over from there."""
        self.run(kept, weights)


# What one call takes on every device. CUDA's has no uint16, uint32 and uint64 (ATen/native/cuda/
# ForeachBinaryOpList.cu, AT_DISPATCH_SOURCE_TYPES); XPU's had no float8 (intel/torch-xpu-ops, issue 4006).
_IN_ONE_CALL = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor], *, non_blocking: bool = False) -> None:
    """Copy each source into its target.

    A call for each pair of types: one call for several types launches a kernel per tensor.
    """
    by_types: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        to, of = by_types.setdefault((target.dtype, source.dtype), ([], []))
        to.append(target)
        of.append(source)
    for types, (to, of) in by_types.items():
        if _IN_ONE_CALL.issuperset(types):
            torch._foreach_copy_(to, of, non_blocking=non_blocking)
        else:
            for target, source in zip(to, of, strict=True):
                target.copy_(source, non_blocking=non_blocking)
