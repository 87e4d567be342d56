"""The results of the averaging kernel; run by ``test_fused_kernel.py`` in Triton's interpreter.

The expected results come from numpy, which rounds every operation and contracts no operations.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

ALL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _formula(average: Tensor, parameter: Tensor, weight: float) -> Tensor:
    a, x, w = average.numpy(), parameter.float().numpy(), np.float32(weight)
    if w == 1:
        return torch.from_numpy(x)
    return torch.from_numpy(a + w * (x - a) if w < 0.5 else x - (x - a) * (np.float32(1) - w))


def _launch(parameters: Sequence[Tensor], flats: Sequence[Tensor], weights: Sequence[float], *cut: int) -> None:
    """Average parameters that lie back to back: all blocks, or a range of blocks."""
    from nitrous_ema.averaging.kernels import fused_kernel

    ends = np.cumsum([0, *(parameter.numel() for parameter in parameters)]).tolist()
    ranges = list(pairwise(ends))
    rows = [fused_kernel.row(each, *place) for each, place in zip(parameters, ranges, strict=True)]
    blocks = fused_kernel.cut(ranges)
    first, last = cut or (0, len(blocks))
    fused_kernel.launch(fused_kernel.table(rows), blocks, 0, first, last, flats, weights, torch.tensor(True))


def _random(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in sizes]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def every_profile_moves_by_the_formula_to_the_bit():
    parameters = [each.to(ALL_TYPES[index % 3]) for index, each in enumerate(_random(5000, 1, 4100, 0, 2048, 7, 2047))]
    size = sum(each.numel() for each in parameters)
    whole = torch.cat([each.float() for each in parameters])
    for weights in (
        [0.01],
        [0.3, 0.5],
        [0.75, 1.0, 1e-6],
        [0.1, 0.2, 0.499999, 0.999999],
        [0.1] * 5,
        [0.3] * 5 + [0.7],
    ):
        flats = _random(*[size] * len(weights))
        expected = [_formula(flat, whole, weight) for flat, weight in zip(flats, weights, strict=True)]
        _launch(parameters, flats, weights)
        assert all(map(_same, flats, expected)), weights


def averages_are_those_of_exact_arithmetic_but_for_three_roundings():
    (average, parameter), weights = _random(3000, 3000), (1e-5, 0.2, 0.5, 0.8)
    for weight in weights:
        moved = average.clone()
        _launch([parameter], [moved], [weight])
        rounded = float(np.float32(weight))
        exact = average.double() + rounded * (parameter.double() - average.double())
        step = (parameter.double() - average.double()).abs() * min(rounded, 1 - rounded)
        assert bool(((moved.double() - exact).abs() <= 2.0**-24 * (exact.abs() + 3 * step)).all()), weight


def weight_of_one_copies_the_bits():
    parameter = torch.tensor([-0.0, 1e-42, torch.inf, -torch.inf, torch.nan, 0.1] * 400)
    for weight in (1.0, 1 - 1e-12):
        averages = torch.full_like(parameter, torch.inf)
        _launch([parameter], [averages], [weight])
        assert _same(averages, parameter), weight


def narrow_types_are_read_exactly():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)[::16].contiguous()
    for dtype in ALL_TYPES[1:]:
        parameter = every.view(dtype)
        if dtype == torch.bfloat16:  # Triton's interpreter, not its compiler, gets the subnormal ones wrong
            parameter = parameter[~((parameter != 0) & (parameter.abs() < torch.finfo(dtype).tiny))]
        averages = torch.zeros(parameter.numel())
        _launch([parameter], [averages], [1.0])
        torch.testing.assert_close(averages, parameter.float(), rtol=0, atol=0, equal_nan=True)


def address_that_allows_no_wide_access_changes_no_bit():
    (values, average) = _random(9000, 9000)
    for dtype in ALL_TYPES:
        results = []
        for offset in range(4):
            parameter = torch.cat([values[:offset], values]).to(dtype)[offset:]
            results.append(average.clone())
            _launch([parameter], results[-1:], [0.3])
        assert all(_same(results[0], result) for result in results[1:])


def blocks_outside_of_a_launch_are_left_alone():
    parameters, (average,) = _random(3000, 5000), _random(8000)
    moved = average.clone()
    _launch(parameters, [moved], [0.3], 1, 3)  # the tensors have blocks 0, 1 and 1, 2, 3
    expected = _formula(average, torch.cat(parameters), 0.3)
    assert _same(moved[2048:4096], expected[2048:4096])
    assert _same(moved[:2048], average[:2048])
    assert _same(moved[4096:], average[4096:])


def table_may_begin_at_any_tensor():
    from nitrous_ema.averaging.kernels import fused_kernel

    parameter, average = _random(100, 150)
    expected = _formula(average[50:].clone(), parameter, 0.3)
    blocks = fused_kernel.cut([(0, 50), (50, 150)])
    rows = fused_kernel.table([fused_kernel.row(parameter, 50, 150)])
    fused_kernel.launch(rows, blocks, 1, 1, 2, [average], [0.3], torch.tensor(True))
    assert _same(average[50:], expected)


def averages_may_lie_past_2_to_the_31():
    """Only touched pages of the memory exist. The interpreter copies tensors, so it is passed a short tensor."""
    from nitrous_ema.averaging.kernels import fused_kernel

    begin, numel = (1 << 31) + 5000, 5000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, 4 * (begin + numel), flags=flags)
    average = torch.frombuffer(memory, dtype=torch.float32, offset=4 * begin, count=numel)
    (parameter,) = _random(numel)
    rows = fused_kernel.table([fused_kernel.row(parameter, begin, begin + numel)])
    blocks = fused_kernel.cut([(begin, begin + numel)])
    flat = torch.frombuffer(memory, dtype=torch.float32, count=4)
    fused_kernel.launch(rows, blocks, 0, 0, len(blocks), [flat], [1.0], torch.tensor(True))
    assert _same(average, parameter)


def rehearsal_of_the_kernel_succeeds_for_any_number_of_profiles():
    from nitrous_ema.averaging.kernels import fused_kernel

    for num_profiles in range(1, 7):
        fused_kernel.rehearse(torch.device("cpu"), num_profiles)


def rehearsal_of_a_kernel_that_does_nothing_fails():
    from nitrous_ema.averaging.kernels import fused_kernel

    launch = fused_kernel.launch
    fused_kernel.launch = lambda *arguments: None
    try:
        with pytest.raises(RuntimeError, match="wrong by"):
            fused_kernel.rehearse(torch.device("cpu"), 1)
    finally:
        fused_kernel.launch = launch


def nothing_runs_on_a_device_while_kernels_are_interpreted():
    from nitrous_ema.averaging.kernels import fused_kernel

    assert not fused_kernel.can_compile_for("nvidia")
