"""The results of averaging by one launch; run by ``test_fused_step.py`` in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nitrous_ema.averaging.kernels import fused_step
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, Group
from nitrous_ema.averaging.kernels.foreach_step import ForeachStep
from nitrous_ema.averaging.kernels.fused_step import FusedStep, step_for
from tests.support.memory_orders import flat_buffers_of
from tests.support.models import set_weights

BATCH = 2 * 2048


class _Layouts(nn.Module):
    """Parameters in every memory order and type that one launch takes; some begin at odd elements."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.empty(8, 16, 5, 5).to(memory_format=torch.channels_last))
        self.scalar = nn.Parameter(torch.empty(()))
        self.transposed = nn.Parameter(torch.empty(70, 60).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.brain = nn.Parameter(torch.empty(3, 1501, dtype=torch.bfloat16))
        self.narrow = nn.Parameter(torch.empty(100, 50, dtype=torch.float16))
        self.view = nn.Parameter(torch.empty(5001)[1:])
        self.pairs = nn.Parameter(torch.empty(2100, dtype=torch.complex64))
        self.flipped = nn.Parameter(torch.empty(30, 20, dtype=torch.complex64).t())


def _started(profiles: int = 2) -> tuple[FlatBuffers, list[tuple[Group, list[Tensor]]]]:
    """Return averages that differ from the parameters, and the parameters, by group."""
    model = _Layouts()
    flat_buffers = flat_buffers_of(model, profiles)
    set_weights(model, 1)
    for group in flat_buffers.groups:
        tensors = [tensor.tracked.live().detach() for tensor in group.tensors]
        ForeachStep(group).run(ForeachStep(group).sources(tensors), [1.0] * profiles)
    set_weights(model, 2)
    return flat_buffers, [
        (group, [tensor.tracked.live().detach() for tensor in group.tensors]) for group in flat_buffers.groups
    ]


def _flats(flat_buffers: FlatBuffers) -> list[Tensor]:
    return [flat.clone() for group in flat_buffers.groups for flat in group.flats]


def _same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, ones, others))


def _scratch(num_bytes: int) -> Tensor:
    return torch.full((num_bytes + 64,), 123, dtype=torch.uint8)


def _of_run(weights: list[float]) -> list[Tensor]:
    """Return the averages after one launch for all groups."""
    flat_buffers, groups = _started(len(weights))
    for group, tensors in groups:
        step = FusedStep(group, BATCH)
        step.run(step.sources(tensors), weights)
    return _flats(flat_buffers)


def averages_of_every_layout_are_those_of_group_step():
    for profiles in range(1, 7):
        weights = [0.9 / (profile + 1) for profile in range(profiles)]
        flat_buffers, groups = _started(profiles)
        for group, tensors in groups:
            plain = ForeachStep(group)
            plain.run(plain.sources(tensors), weights)
        for ours, theirs in zip(_of_run(weights), _flats(flat_buffers), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2.0**-23, atol=2.0**-22)  # rounding of products up to 4


def weight_of_one_copies_every_layout():
    flat_buffers, groups = _started()
    for group, tensors in groups:
        step = FusedStep(group)
        step.run(step.sources(tensors), [1.0, 1.0])
    for tracked, average in flat_buffers.averages(1):
        assert torch.equal(average, tracked.live().detach().to(average.dtype)), tracked.name


def batches_cover_the_group_and_are_those_of_what_is_left_to_group_step():
    _, groups = _started()
    for group, _ in groups:
        step = FusedStep(group, BATCH)
        assert [begin for begin, _ in step.batches] == [0, *(end for _, end in step.batches[:-1])]
        assert step.batches[-1][1] == group.numel
        assert list(step.batches) == list(ForeachStep(group, BATCH).batches)


def batch_by_batch_gives_the_bits_of_one_launch():
    flat_buffers, groups = _started()
    for group, tensors in groups:
        step = FusedStep(group, BATCH)
        sources = step.sources(tensors)
        order = list(range(len(step.batches)))
        step.run(sources, [0.3, 0.01], order[1:3])
        step.run(sources, [0.3, 0.01], [order[0], *order[3:]])
    assert _same(_flats(flat_buffers), _of_run([0.3, 0.01]))


def batch_moves_its_own_averages_only():
    _, ((group, tensors), *_) = _started()
    step, before = FusedStep(group, BATCH), group.flats[1].clone()
    step.run(step.sources(tensors), [0.3, 0.3], [1])
    begin, end = step.batches[1]
    moved = group.flats[1] != before
    assert bool(moved[begin:end].all())
    assert not bool(moved[:begin].any() or moved[end:].any())


def stashed_parameters_give_the_bits_of_run():
    weights = [0.3, 0.01, 0.7, 0.2, 1.0]
    flat_buffers, groups = _started(len(weights))
    for group, tensors in groups:
        step = FusedStep(group, BATCH)
        sources, kept = step.sources(tensors), []
        for batch in range(len(step.batches)):
            scratch = _scratch(step.stash_bytes(batch))
            kept.append(step.stash(sources, batch, scratch[:-64]))
            assert bool((scratch[-64:] == 123).all())
        for tensor in tensors:
            tensor.zero_()
        for batch in reversed(kept):
            step.run_stashed(batch, weights)
    assert _same(_flats(flat_buffers), _of_run(weights))


def skipped_update_leaves_every_bit_though_parameters_are_not_finite():
    weights = [0.3, 0.01, 0.7, 0.2, 1.0]
    flat_buffers, groups = _started(len(weights))
    before, never = _flats(flat_buffers), torch.tensor(False)
    for group, tensors in groups:
        step = FusedStep(group, BATCH)
        for tensor in tensors:
            tensor.fill_(torch.nan)
        sources = step.sources(tensors)
        step.run(sources, weights, allowed=never)
        for batch in range(len(step.batches)):
            step.run_stashed(step.stash(sources, batch, _scratch(step.stash_bytes(batch))), weights, never)
    assert _same(_flats(flat_buffers), before)


def applied_update_with_a_flag_gives_the_bits_of_one_without():
    weights = [0.3, 0.01]
    flat_buffers, groups = _started(len(weights))
    for group, tensors in groups:
        step = FusedStep(group, BATCH)
        sources = step.sources(tensors)
        first, *others = range(len(step.batches))
        step.run(sources, weights, [first], torch.tensor(True))
        for batch in others:
            stashed = step.stash(sources, batch, _scratch(step.stash_bytes(batch)))
            step.run_stashed(stashed, weights, torch.tensor(True))
    assert _same(_flats(flat_buffers), _of_run(weights))


def update_that_the_kernel_cannot_read_is_group_steps_also_where_it_is_kept():
    _, ((group, tensors), *_) = _started()
    step, plain = FusedStep(group, BATCH), ForeachStep(group, BATCH)
    before, usual = [flat.clone() for flat in group.flats], step.sources(tensors)
    tensors = [tensors[0].detach().contiguous(), *tensors[1:]]  # the first is no longer channels_last
    plain.run(plain.sources(tensors), [0.3, 0.01])
    expected = [flat.clone() for flat in group.flats]
    for flat, value in zip(group.flats, before, strict=True):
        flat.copy_(value)
    unusual = step.sources(tensors)
    assert type(unusual) is not type(usual)
    step.run(unusual, [0.3, 0.01], [1])
    for batch in {*range(len(step.batches))} - {1}:
        step.run_stashed(step.stash(unusual, batch, _scratch(step.stash_bytes(batch))), [0.3, 0.01])
    assert _same(group.flats, expected)


def parameters_are_found_again_when_their_storage_was_replaced():
    _, ((group, tensors), *_) = _started()
    step = FusedStep(group)
    step.run(step.sources(tensors), [1.0, 1.0])
    old = step.sources(tensors)
    new = tensors[0].detach().clone() + 1
    tensors = [new, *tensors[1:]]
    step.run(step.sources(tensors), [1.0, 0.5])
    like = group.tensors[0]
    assert torch.equal(group.flats[0][like.begin : like.end].as_strided(like.shape, like.strides), new)
    step.run(old, [1.0, 1.0])
    assert not torch.equal(group.flats[0][like.begin : like.end].as_strided(like.shape, like.strides), new)


class _Uploads(TorchFunctionMode):
    """A log of the tables that are made on the device: on which stream, and whether the host waited."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[object, bool]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.to, torch.add) and args[0].dtype == torch.int64:
            waits = func is Tensor.to and not (kwargs or {}).get("non_blocking", False)
            self.seen.append((torch.cpu.current_stream(), waits))
        return func(*args, **(kwargs or {}))


def nothing_waits_for_new_addresses():
    _, ((group, tensors), *_) = _started()
    step = FusedStep(group, BATCH)
    with _Uploads() as uploads:
        sources = step.sources(tensors)
        for batch in (0, 1, None):
            step.run(sources, [0.5, 0.5], None if batch is None else [batch])
        step.run(step.sources(tensors), [0.5, 0.5])
    assert uploads.seen == [(torch.cpu.current_stream(), False)]  # once, because nothing has moved


def tables_stay_on_their_stream():
    _, ((group, tensors), *_) = _started()
    step, side = FusedStep(group), torch.cpu.Stream()
    sources = step.sources(tensors)
    with _Uploads() as uploads:
        step.run(sources, [0.5, 0.5])
        with torch.cpu.stream(side):
            step.run(sources, [0.5, 0.5])
            step.run(sources, [0.5, 0.5])
    assert uploads.seen == [(torch.cpu.current_stream(), False), (side, False)]


def stashed_parameters_are_found_from_the_stream_that_averages_them():
    _, ((group, tensors), *_) = _started()
    step, side = FusedStep(group), torch.cpu.Stream()
    with _Uploads() as uploads:
        kept = step.stash(step.sources(tensors), 0, _scratch(step.stash_bytes(0)))
        assert uploads.seen == []
        with torch.cpu.stream(side):
            step.run_stashed(kept, [0.5, 0.5])
    assert uploads.seen == [(side, False)]


def stash_pins_no_memory():
    pinned: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedStep, "_pinned", lambda self, rows: pinned.append(rows) or rows)
        _, ((group, tensors), *_) = _started()
        step = FusedStep(group, BATCH)
        sources = step.sources(tensors)
        assert len(pinned) == 1
        for batch in range(len(step.batches)):
            step.run_stashed(step.stash(sources, batch, _scratch(step.stash_bytes(batch))), [0.5, 0.5])
        step.run(step.sources(tensors), [0.5, 0.5])
    assert len(pinned) == 1


@contextmanager
def _on_a_device_that_compiles() -> Iterator[None]:
    """Let the interpreter pass for a GPU's compiler."""
    from nitrous_ema.averaging.kernels import fused_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_step, "triton_backend", lambda device: "nvidia")
        patch.setattr(fused_kernel, "can_compile_for", lambda backend: True)
        yield


def kernel_is_chosen_for_types_that_it_knows_only():
    def parameter(dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.zeros(3).to(dtype), requires_grad=False)

    chosen = {}
    with _on_a_device_that_compiles():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float64, torch.float8_e5m2):
            (group,) = flat_buffers_of(nn.ParameterList([parameter(dtype)])).groups
            chosen[dtype] = type(step_for(group))
    assert [dtype for dtype, step in chosen.items() if step is not FusedStep] == [torch.float64, torch.float8_e5m2]


def nothing_is_launched_on_a_device_while_kernels_are_interpreted():
    (group,) = flat_buffers_of(nn.Linear(3, 3)).groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_step, "triton_backend", lambda device: "nvidia")
        fused_step._works.cache_clear()
        assert type(step_for(group)) is ForeachStep
        fused_step._works.cache_clear()
