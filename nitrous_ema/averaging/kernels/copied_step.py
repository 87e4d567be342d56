"""The step of copied tensors: an update stores their present values.

``copy_each`` copies many tensors. ``aligned`` is the layout of scratch memory, for this step and the other ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nitrous_ema.averaging.kernels.flat_buffers import CopiedGroup

ALIGNED_BYTES = 16
"""Stashed tensors begin at multiples of this in scratch memory, whatever their types."""


class CopiedTensorsStep:
    """The ``AveragingStep`` of one group of copied tensors: one batch, and weights have no effect.

    Args:
        group: Its buffer must not be replaced while this object is used.
    """

    def __init__(self, group: CopiedGroup) -> None:
        self._flat, self._stored = group.flat, group.values()
        self.batches = ((0, group.flat.numel()),)
        sizes = [math.prod(value.shape) * value.dtype.itemsize for value in self._stored]
        self._begins = list(accumulate(map(aligned, sizes), initial=0))

    def sources(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of this group as they are now."""
        return list(tensors)

    def run(
        self,
        sources: list[Tensor],
        weights: Sequence[float],
        batches: Sequence[int] | None = None,
        allowed: Tensor | None = None,
    ) -> None:
        """Store the present values of the tensors."""
        if is_refused(allowed):
            return
        selected = on_device(allowed)
        before = self._flat if selected is None else self._flat.clone()
        copy_each(self._stored, sources)
        if selected is not None:
            torch.where(selected, self._flat, before, out=self._flat)

    def stash_bytes(self, batch: int) -> int:
        """Return the bytes of scratch that ``stash`` needs."""
        return self._begins[-1]

    def stash(self, sources: list[Tensor], batch: int, scratch: Tensor) -> list[Tensor]:
        """Copy the values of the tensors to scratch memory, on the current stream."""
        views = []
        for begin, value in zip(self._begins, self._stored, strict=False):
            num_bytes = math.prod(value.shape) * value.dtype.itemsize
            views.append(scratch[begin : begin + num_bytes].view(value.dtype).view(value.shape))
        copy_each(views, sources, non_blocking=True)
        return views

    def run_stashed(self, stashed: list[Tensor], weights: Sequence[float], allowed: Tensor | None = None) -> None:
        """Store the stashed values."""
        self.run(stashed, weights, allowed=allowed)


def is_refused(allowed: Tensor | None) -> bool:
    """Return whether an update is skipped, as far as the host can know it without a wait: if its flag is on the CPU."""
    return allowed is not None and allowed.device.type == "cpu" and not allowed


def on_device(allowed: Tensor | None) -> Tensor | None:
    """Return the flag of an update where only the device knows whether it is skipped; elsewhere None."""
    return None if allowed is None or allowed.device.type == "cpu" else allowed


def aligned(num_bytes: int) -> int:
    """Return a number of bytes rounded up to a multiple of ``ALIGNED_BYTES``."""
    return -(-num_bytes // ALIGNED_BYTES) * ALIGNED_BYTES


# Types that one foreach copy takes on every device. CUDA's takes no uint16, uint32 and uint64 (ATen/native/cuda/
# ForeachBinaryOpList.cu, AT_DISPATCH_SOURCE_TYPES); XPU's had no float8 (intel/torch-xpu-ops, issue 4006).
_IN_ONE_CALL = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor], *, non_blocking: bool = False) -> None:
    """Copy each source into its target.

    One call is made for each pair of types, since a call for several types launches a kernel per tensor.
    """
    by_types: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, out_of = by_types.setdefault((target.dtype, source.dtype), ([], []))
        into.append(target)
        out_of.append(source)
    for types, (into, out_of) in by_types.items():
        if _IN_ONE_CALL.issuperset(types):
            torch._foreach_copy_(into, out_of, non_blocking=non_blocking)
        else:
            for target, source in zip(into, out_of, strict=True):
                target.copy_(source, non_blocking=non_blocking)
