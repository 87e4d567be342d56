"""Copies of many tensors in few calls, of every type that a model may have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
