"""The step of copied tensors (buffers of integers, what a filter copies): their present values are taken over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from nitrous_ema.arena import CopyGroup
from nitrous_ema.foreach import copy_each

_ALIGNED_BYTES = 16


class CopyStep:
    """The ``Step`` of one group of copied tensors: one batch; weights mean nothing.

    Args:
        group: Its buffer must not be replaced while this object is used.
    """

    def __init__(self, group: CopyGroup) -> None:
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

    def kept_bytes(self, batch: int) -> int:
        """Scratch that ``keep`` needs."""
        return self._begins[-1]

    def keep(self, sources: list[Tensor], batch: int, scratch: Tensor) -> list[Tensor]:
        """Copy them to scratch on the current stream."""
        views = []
        for begin, value in zip(self._begins, self._kept, strict=False):
            num_bytes = math.prod(value.shape) * value.dtype.itemsize
            views.append(scratch[begin : begin + num_bytes].view(value.dtype).view(value.shape))
        copy_each(views, sources, non_blocking=True)
        return views

    def run_kept(self, kept: list[Tensor], weights: Sequence[float]) -> None:
        """Take them over from there."""
        self.run(kept, weights)
