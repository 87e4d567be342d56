"""Whether all tensors of an update are finite: one flag on their device, computed while the host goes on.

The largest magnitude of a tensor is NaN if any element is, and infinite if any element is, so it stands for all of
them. On accelerators foreach calls compute it for many tensors at once. On the CPU ``aminmax`` does, which is 20 times
faster there than ``isfinite`` or a norm; small tensors are gathered first, since each call takes as long as a thousand
elements (measured, 4 M elements in one tensor, and 1000 tensors of 1000).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_SMALL_ELEMENTS_CPU = 1 << 14
_GATHERED_ELEMENTS_CPU = 1 << 20
_REDUCED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether no element is inf or NaN: a bool tensor without axes, on the tensors' device and current stream.

    Args:
        tensors: Floating-point or complex, at least one; all on one device.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if real.dtype not in _REDUCED_DTYPES:  # float8
                real = real.to(torch.float32)
            by_dtype.setdefault(real.dtype, []).append(real)
    extremes = _extremes_cpu if tensors[0].device.type == "cpu" else _extremes
    finite = [torch.stack(extremes(group)).isfinite().all() for group in by_dtype.values()]
    return torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool, device=tensors[0].device)


def _extremes(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(tensors, math.inf))


def _extremes_cpu(tensors: list[Tensor]) -> list[Tensor]:
    return [extreme for tensor in _gathered(tensors) for extreme in torch.aminmax(tensor)]


def _gathered(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield large tensors as they are, and small ones many at a time."""
    small: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if tensor.numel() > _SMALL_ELEMENTS_CPU:
            yield tensor
            continue
        small.append(tensor.reshape(-1))
        elements += tensor.numel()
        if elements >= _GATHERED_ELEMENTS_CPU:
            yield torch.cat(small)
            small, elements = [], 0
    if small:
        yield torch.cat(small)
