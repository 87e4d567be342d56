"""One averaging step: the numbers, and that they depend on nothing but average, parameter and weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, Group
from nitrous_ema.averaging.kernels.foreach_step import ForeachStep
from tests.support.memory_orders import Orders, flat_buffers_of
from tests.support.models import set_weights


def step_once(flat_buffers: FlatBuffers, weights: list[float], batch_elements: int | None = None, **kwargs) -> None:
    with torch.no_grad():
        for group in flat_buffers.groups:
            step = ForeachStep(group, batch_elements)
            step.run(step.sources(live_of(group)), weights, **kwargs)


def live_of(group: Group) -> list[torch.Tensor]:
    return [tensor.tracked.live().detach() for tensor in group.tensors]


def started(model: nn.Module) -> FlatBuffers:
    """Flat buffers whose averages are not the parameters: it has seen other weights before."""
    flat_buffers = flat_buffers_of(model)
    set_weights(model, 1)
    step_once(flat_buffers, [1.0, 1.0])
    set_weights(model, 2)
    return flat_buffers


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.25, 0.9], [1e-5, 1.0]])
def test_every_profile_moves_towards_the_parameters_by_its_weight(weights):
    model = Orders()
    flat_buffers = started(model)
    before = [{t.name: a.clone() for t, a in flat_buffers.averages(profile)} for profile in range(2)]
    step_once(flat_buffers, weights)
    for profile, weight in enumerate(weights):
        for tracked, average in flat_buffers.averages(profile):
            wide = torch.complex128 if average.is_complex() else torch.float64
            old, new = before[profile][tracked.name].to(wide), tracked.live().detach().to(wide)
            expected = (old + weight * (new - old)).to(average.dtype)
            torch.testing.assert_close(average, expected, rtol=3e-7, atol=1e-7)


def test_weight_of_one_copies_the_bits():
    model = Orders()
    flat_buffers = started(model)
    with torch.no_grad():
        flat_buffers.average(0, "wide").fill_(torch.inf)  # from which no interpolation leads back
        model.plain.fill_(1e-30)
        model.wide.fill_(0.1)
    step_once(flat_buffers, [1.0, 1.0])
    assert torch.equal(flat_buffers.average(0, "wide"), model.wide.detach())
    assert torch.equal(flat_buffers.average(1, "plain"), model.plain.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("batch_elements", [1, 3, 64, 1000, 1 << 20])
def test_batch_size_does_not_change_a_bit(dtype, batch_elements):
    results = []
    for size in (None, batch_elements):
        model = nn.ParameterList([nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in ((37, 41), (5,), (129,))])
        flat_buffers = started(model)
        for seed, weight in ((2, 0.3), (3, 0.7), (4, 1e-3), (5, 1.0), (6, 0.123)):
            set_weights(model, seed)
            step_once(flat_buffers, [weight, weight / 2], size)
        results.append([average.clone() for profile in range(2) for _, average in flat_buffers.averages(profile)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_memory_order_does_not_change_a_bit():
    results = []
    for permute in (lambda x: x, lambda x: x.t().contiguous().t()):
        model = nn.ParameterList([nn.Parameter(permute(torch.empty(33, 65)))])
        flat_buffers = started(model)
        step_once(flat_buffers, [0.3, 0.01])
        results.append(flat_buffers.average(0, "0").contiguous())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("batch_elements", [7, 1 << 20])
def test_float8_parameters_are_averaged_in_float32(dtype, batch_elements):
    def parameters() -> list[torch.Tensor]:
        values = [torch.randn(23), torch.randn(6, 5).t(), torch.randn(20_000)]
        return [nn.Parameter(value.to(dtype), requires_grad=False) for value in values]

    model = nn.ParameterList(parameters())
    flat_buffers = flat_buffers_of(model)
    step_once(flat_buffers, [1.0, 1.0])
    expected = [[old.double(), old.double()] for old in model]
    for weights in ([0.125, 0.01], [1e-3, 0.9]):
        for index, new in enumerate(parameters()):
            model[index] = new
            expected[index] = [
                old + weight * (new.double() - old) for old, weight in zip(expected[index], weights, strict=True)
            ]
        step_once(flat_buffers, weights, batch_elements)
    for profile in range(2):
        for (_, average), averages in zip(flat_buffers.averages(profile), expected, strict=True):
            torch.testing.assert_close(average, averages[profile].float(), rtol=1e-6, atol=1e-6)


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


class Lerps(TorchDispatchMode):
    """How many times anything was averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += len(args[0]) if func is torch.ops.aten._foreach_lerp_.Scalar else "lerp" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_full_size_copy_of_the_parameters_is_made(dtype):
    model = nn.ParameterList([nn.Parameter(torch.zeros(1000, dtype=dtype)) for _ in range(4)])
    flat_buffers = flat_buffers_of(model)
    with Allocations() as allocations:
        step_once(flat_buffers, [0.1, 0.2], 256)
    assert allocations.largest <= 256


def test_large_parameters_of_the_averages_type_are_read_where_they_are():
    flat_buffers = flat_buffers_of(nn.ParameterList([nn.Parameter(torch.zeros(1 << 15)) for _ in range(3)]))
    with Allocations() as allocations:
        step_once(flat_buffers, [0.1, 0.2], 1 << 16)
    assert allocations.largest == 0


@pytest.mark.parametrize("profiles", [1, 2, 3])
def test_small_tensors_and_all_profiles_are_averaged_in_one_go(profiles):
    """On the CPU, foreach is a loop over tensors: a thousand lerps of a few elements take longer than the work."""
    flat_buffers = flat_buffers_of(
        nn.ParameterList([nn.Parameter(torch.zeros(8)) for _ in range(100)]), profiles=profiles
    )
    with Lerps() as lerps:
        step_once(flat_buffers, [0.1, 0.2, 0.3][:profiles])
    assert lerps.number == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", [[0.3, 0.01], [0.7, 0.5], [1e-6, 0.99, 0.4999]])
def test_profiles_that_move_together_get_the_bits_of_a_lerp_each(dtype, weights):
    model = nn.ParameterList([nn.Parameter(torch.empty(size, dtype=dtype)) for size in (5, 70_001, 16_001, 1, 8, 3)])
    flat_buffers = flat_buffers_of(model, profiles=len(weights))
    set_weights(model, 1)
    step_once(flat_buffers, [1.0] * len(weights))
    before = [[average.clone() for _, average in flat_buffers.averages(profile)] for profile in range(len(weights))]
    set_weights(model, 2)
    step_once(flat_buffers, weights)
    for profile, weight in enumerate(weights):
        for (tracked, average), old in zip(flat_buffers.averages(profile), before[profile], strict=True):
            assert torch.equal(average, torch.lerp(old, tracked.live().detach().to(old.dtype), weight))


def test_averages_move_where_a_returned_tensor_was_moved_to_shared_memory():
    model = nn.ParameterList([nn.Parameter(torch.zeros(10))])
    flat_buffers = flat_buffers_of(model)
    (group,) = flat_buffers.groups
    step = ForeachStep(group)
    flat_buffers.average(1, "0").share_memory_()
    with torch.no_grad():
        step.run(step.sources([torch.ones(10)]), [0.25, 0.5])
    assert [flat_buffers.average(profile, "0").unique().tolist() for profile in range(2)] == [[0.25], [0.5]]


def test_batches_cover_the_group_and_are_averaged_alone():
    model = nn.ParameterList([nn.Parameter(torch.ones(10))])
    flat_buffers = flat_buffers_of(model, profiles=1)
    step = ForeachStep(flat_buffers.groups[0], 4)
    assert step.batches == [(0, 4), (4, 8), (8, 10)]
    with torch.no_grad():
        step.run(step.sources([model[0]]), [1.0], [1])
    assert flat_buffers.average(0, "0").tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 2


@pytest.mark.parametrize("batch_elements", [7, 1 << 20])
def test_kept_parameters_give_the_same_bits_whatever_becomes_of_the_live_ones(batch_elements):
    model = Orders()
    flat_buffers = [flat_buffers_of(model), flat_buffers_of(model)]
    for seed, weights in ((1, [1.0, 1.0]), (2, [0.3, 0.01])):
        set_weights(model, seed)
        step_once(flat_buffers[1], weights)
        with torch.no_grad():
            steps = [(group, ForeachStep(group, batch_elements)) for group in flat_buffers[0].groups]
            kept = [
                (
                    step,
                    step.stash(
                        step.sources(live_of(group)), batch, torch.empty(step.stash_bytes(batch), dtype=torch.uint8)
                    ),
                )
                for group, step in steps
                for batch in range(len(step.batches))
            ]
            set_weights(model, 7)
            for step, parameters in kept:
                step.run_stashed(parameters, weights)
        for (group, _), expected in zip(steps, flat_buffers[1].groups, strict=True):
            assert all(map(torch.equal, group.flats, expected.flats))


def test_kept_parameters_are_aligned_to_16_bytes():
    model = nn.ParameterList([nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (1, 9, 3)])
    flat_buffers = flat_buffers_of(model)
    (group,) = flat_buffers.groups
    step = ForeachStep(group)
    kept = step.stash(step.sources(live_of(group)), 0, torch.empty(step.stash_bytes(0), dtype=torch.uint8))
    assert step.stash_bytes(0) == 16 + 32 + 16
    assert [tensor.data_ptr() % 16 for tensor in kept.flat] == [0, 0, 0]


@pytest.mark.parametrize("replace", ["data", "parameter", "order", "in place"])
def test_parameters_are_found_again_when_their_storage_was_replaced(replace):
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(3))])
    flat_buffers = flat_buffers_of(model, profiles=1)
    (group,) = flat_buffers.groups
    step = ForeachStep(group, 5)
    new = torch.randn(4, 6)
    with torch.no_grad():
        step.run(step.sources([tensor.tracked.live().detach() for tensor in group.tensors]), [1.0])
        if replace == "data":
            model[0].data = new
        elif replace == "parameter":
            model[0] = nn.Parameter(new)
        elif replace == "order":
            model[0].data = new.t().contiguous().t()
        else:
            model[0].copy_(new)
        step.run(step.sources([tensor.tracked.live().detach() for tensor in group.tensors]), [1.0])
    assert torch.equal(flat_buffers.average(0, "0"), new)


def test_work_that_was_queued_reads_the_storage_of_its_own_update():
    model = nn.ParameterList([nn.Parameter(torch.ones(4))])
    flat_buffers = flat_buffers_of(model, profiles=1)
    step = ForeachStep(flat_buffers.groups[0])
    with torch.no_grad():
        queued = step.sources([model[0].detach()])
        model[0].data = torch.full((4,), 2.0)
        step.sources([model[0].detach()])
        step.run(queued, [1.0])
    assert flat_buffers.average(0, "0").tolist() == [1.0] * 4
