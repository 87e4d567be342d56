"""One averaging step: the numbers, and that they depend on nothing but average, parameter and weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nitrous_ema.arena import Arena
from nitrous_ema.step import GroupStep
from tests.models import set_weights
from tests.test_arena import Orders, arena_of


def step_once(arena: Arena, weights: list[float], batch_elements: int | None = None, **kwargs) -> None:
    with torch.no_grad():
        for group in arena.groups:
            step = GroupStep(group, batch_elements)
            step.run(step.sources([tensor.tracked.live() for tensor in group.tensors]), weights, **kwargs)


def started(model: nn.Module) -> Arena:
    """An arena whose averages are not the parameters: it has seen other weights before."""
    arena = arena_of(model)
    set_weights(model, 1)
    step_once(arena, [1.0, 1.0])
    set_weights(model, 2)
    return arena


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.25, 0.9], [1e-5, 1.0]])
def test_every_profile_moves_towards_the_parameters_by_its_weight(weights):
    model = Orders()
    arena = started(model)
    before = [{t.name: a.clone() for t, a in arena.averages(profile)} for profile in range(2)]
    step_once(arena, weights)
    for profile, weight in enumerate(weights):
        for tracked, average in arena.averages(profile):
            wide = torch.complex128 if average.is_complex() else torch.float64
            old, new = before[profile][tracked.name].to(wide), tracked.live().detach().to(wide)
            expected = (old + weight * (new - old)).to(average.dtype)
            torch.testing.assert_close(average, expected, rtol=3e-7, atol=1e-7)


def test_weight_of_one_copies_the_bits():
    model = Orders()
    arena = started(model)
    with torch.no_grad():
        arena.average(0, "wide").fill_(torch.inf)  # from which no interpolation leads back
        model.plain.fill_(1e-30)
        model.wide.fill_(0.1)
    step_once(arena, [1.0, 1.0])
    assert torch.equal(arena.average(0, "wide"), model.wide.detach())
    assert torch.equal(arena.average(1, "plain"), model.plain.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("batch_elements", [1, 3, 64, 1000, 1 << 20])
def test_batch_size_does_not_change_a_bit(dtype, batch_elements):
    results = []
    for size in (None, batch_elements):
        model = nn.ParameterList([nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in ((37, 41), (5,), (129,))])
        arena = started(model)
        for seed, weight in ((2, 0.3), (3, 0.7), (4, 1e-3), (5, 1.0), (6, 0.123)):
            set_weights(model, seed)
            step_once(arena, [weight, weight / 2], size)
        results.append([average.clone() for profile in range(2) for _, average in arena.averages(profile)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_memory_order_does_not_change_a_bit():
    results = []
    for permute in (lambda x: x, lambda x: x.t().contiguous().t()):
        model = nn.ParameterList([nn.Parameter(permute(torch.empty(33, 65)))])
        arena = started(model)
        step_once(arena, [0.3, 0.01])
        results.append(arena.average(0, "0").contiguous())
    assert torch.equal(*results)


def test_float8_parameters_are_averaged_in_float32():
    model = nn.ParameterList([nn.Parameter(torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), requires_grad=False)])
    arena = arena_of(model, profiles=1)
    step_once(arena, [1.0])
    model[0] = nn.Parameter(torch.tensor([2.0, 4.0]).to(torch.float8_e4m3fn), requires_grad=False)
    arena.tracked[0].live()
    step_once(arena, [0.125])
    assert arena.average(0, "0").tolist() == [1.125, 2.25]


class Allocations(TorchDispatchMode):
    """Largest tensor, in elements, that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(made, torch.Tensor) and not func.is_view and made._base is None:
                self.largest = max(self.largest, made.numel())
        return result


class Lerped(TorchDispatchMode):
    """Tensors that were averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._foreach_lerp_.Scalar:
            self.tensors += len(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_full_size_copy_of_the_parameters_is_made(dtype):
    model = nn.ParameterList([nn.Parameter(torch.zeros(1000, dtype=dtype)) for _ in range(4)])
    arena = arena_of(model)
    with Allocations() as allocations:
        step_once(arena, [0.1, 0.2], 256)
    assert allocations.largest <= 256


def test_large_parameters_of_the_averages_type_are_read_where_they_are():
    arena = arena_of(nn.ParameterList([nn.Parameter(torch.zeros(1 << 15)) for _ in range(3)]))
    with Allocations() as allocations:
        step_once(arena, [0.1, 0.2], 1 << 16)
    assert allocations.largest == 0


def test_small_tensors_are_averaged_in_one_go():
    """On the CPU, foreach is a loop over tensors: a thousand lerps of a few elements take longer than the work."""
    arena = arena_of(nn.ParameterList([nn.Parameter(torch.zeros(8)) for _ in range(100)]), profiles=2)
    with Lerped() as lerped:
        step_once(arena, [0.1, 0.2])
    assert lerped.tensors == 2  # one per profile


def test_every_batch_is_announced_before_it_is_written():
    model = nn.ParameterList([nn.Parameter(torch.ones(10))])
    arena = arena_of(model, profiles=1)
    seen = []

    def before(begin: int, end: int) -> None:
        seen.append((begin, end, arena.groups[0].flats[0].count_nonzero().item()))

    step_once(arena, [1.0], 4, before_batch=before)
    assert seen == [(0, 4, 0), (4, 8, 4), (8, 10, 8)]


@pytest.mark.parametrize("replace", ["data", "parameter", "order", "in place"])
def test_parameters_are_found_again_when_their_storage_was_replaced(replace):
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(3))])
    arena = arena_of(model, profiles=1)
    (group,) = arena.groups
    step = GroupStep(group, 5)
    new = torch.randn(4, 6)
    with torch.no_grad():
        step.run(step.sources([tensor.tracked.live() for tensor in group.tensors]), [1.0])
        if replace == "data":
            model[0].data = new
        elif replace == "parameter":
            model[0] = nn.Parameter(new)
        elif replace == "order":
            model[0].data = new.t().contiguous().t()
        else:
            model[0].copy_(new)
        step.run(step.sources([tensor.tracked.live() for tensor in group.tensors]), [1.0])
    assert torch.equal(arena.average(0, "0"), new)


def test_work_that_was_queued_reads_the_storage_of_its_own_update():
    model = nn.ParameterList([nn.Parameter(torch.ones(4))])
    arena = arena_of(model, profiles=1)
    step = GroupStep(arena.groups[0])
    with torch.no_grad():
        queued = step.sources([model[0]])
        model[0].data = torch.full((4,), 2.0)
        step.sources([model[0]])
        step.run(queued, [1.0])
    assert arena.average(0, "0").tolist() == [1.0] * 4
