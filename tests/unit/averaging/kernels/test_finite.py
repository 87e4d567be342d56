"""Whether all tensors are finite. Oracle: ``torch.isfinite`` of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nitrous_ema.averaging.kernels import finite
from nitrous_ema.averaging.kernels.finite import all_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2]
SIZES = (1, 3, 33, 1000, finite._SMALL_ELEMENTS_CPU + 7)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """Tensors of many sizes and memory orders, with the largest numbers of their type."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    made += [torch.randn(300, 200, generator=generator).to(dtype).t(), torch.randn(4, 5, 6, 7).to(dtype)[:, 1:, ::2]]
    real = torch.float32 if dtype.is_complex else dtype
    for tensor in made:
        tensor.view(-1)[0:1].fill_(torch.finfo(real).max) if tensor.is_contiguous() else None
    return [*made, torch.empty(0, 3).to(dtype), torch.zeros(()).to(dtype)]


@pytest.fixture(params=["cpu", "accelerator"])
def reduce(request, monkeypatch):
    """``all_finite`` as it is on each kind of device."""
    if request.param == "accelerator":
        monkeypatch.setattr(finite, "_extremes_cpu", finite._extremes)
    return all_finite


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_numbers_are_finite(reduce, dtype):
    assert bool(reduce(tensors(dtype)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_element_anywhere_is_seen(reduce, dtype, bad):
    for index, tensor in enumerate(tensors(dtype)):
        for place in {0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() else ():
            made = tensors(torch.float32 if dtype == torch.float64 else dtype) + tensors(torch.float32)
            where = made[index]
            position = [int(each) for each in torch.unravel_index(torch.tensor(place), where.shape)]
            where[tuple(position)] = torch.tensor(bad).to(where.dtype)
            assert not bool(reduce(made)), (index, place)


def test_tensors_without_elements_are_finite(reduce):
    assert bool(reduce([torch.empty(0), torch.empty(0, 3, dtype=torch.bfloat16)]))


def test_many_small_tensors_are_gathered_within_a_limit(monkeypatch):
    monkeypatch.setattr(finite, "_GATHERED_ELEMENTS_CPU", 100)
    many = [torch.zeros(30) for _ in range(11)]
    assert [each.numel() for each in finite._gathered(many)] == [120, 120, 90]
    many[10][29] = math.inf
    assert not bool(all_finite(many))
