"""The averages' buffers: order, types, memory order, and the way to and from files."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, memory_order, move_versions
from tests.support.memory_orders import Orders, flat_buffers_of
from tests.support.models import Net, set_weights


@pytest.fixture
def orders() -> Orders:
    model = Orders()
    set_weights(model, 3)
    return model


def row_major(model: nn.Module, flat_buffers: FlatBuffers) -> torch.Tensor:
    """Oracle: the averaged parameters as a file has them, in float64."""
    parts = []
    for tracked in flat_buffers.averaged:
        value = tracked.live().detach()
        value = torch.view_as_real(value) if value.is_complex() else value
        parts.append(value.double().flatten())
    return torch.cat(parts)


def load_all(flat_buffers: FlatBuffers, profile: int, values: torch.Tensor, pieces: int) -> None:
    for part, begin in zip(values.split(pieces), range(0, len(values), pieces), strict=True):
        flat_buffers.fill(profile, begin, part)


@pytest.mark.parametrize("pieces", [1, 7, 64, 10_000])
def test_what_is_filled_in_row_major_order_is_read_so_and_shown_as_tensors(orders, pieces):
    flat_buffers = flat_buffers_of(orders)
    values = row_major(orders, flat_buffers)
    load_all(flat_buffers, 1, values, pieces)
    for tracked, average in flat_buffers.averages(1):
        assert average.shape == tracked.shape
        torch.testing.assert_close(average, tracked.live().detach().to(average.dtype), rtol=0, atol=0)
    read = torch.full_like(values, torch.nan)
    for begin in range(0, len(values), pieces):
        for first, piece in flat_buffers.pieces(1, begin, min(begin + pieces, len(values))):
            read[begin + first : begin + first + piece.numel()] = piece.flatten()
    torch.testing.assert_close(read, values.float().double(), rtol=1e-7, atol=0)
    assert all(not average.any() for _, average in flat_buffers.averages(0))


@pytest.mark.parametrize("pieces", [1, 7, 64])
def test_pieces_are_few_and_views_of_the_averages_whatever_their_memory_order(orders, pieces):
    flat_buffers = flat_buffers_of(orders)
    storages = {group.flats[1].data_ptr() for group in flat_buffers.groups}
    most = sum(2 * len(tensor.shape) + 1 for group in flat_buffers.groups for tensor in group.tensors)
    for begin in range(0, flat_buffers.layout.average_elements, pieces):
        found = list(flat_buffers.pieces(1, begin, min(begin + pieces, flat_buffers.layout.average_elements)))
        assert {piece.untyped_storage().data_ptr() for _, piece in found} <= storages
        assert len(found) <= min(pieces, most)


def test_a_piece_of_a_permuted_tensor_is_at_most_one_more_view_than_twice_its_axes():
    model = nn.ParameterList([nn.Parameter(torch.empty(7, 5, 6, 4).permute(3, 1, 0, 2))])
    flat_buffers = flat_buffers_of(model, profiles=1)
    found = [
        len(list(flat_buffers.pieces(0, begin, end)))
        for begin in range(0, 840, 13)
        for end in range(begin + 1, 841, 17)
    ]
    assert max(found) == 2 * 4 - 1
    assert min(found) == 1


def test_averages_lie_back_to_back_in_one_buffer_per_type_and_profile(orders):
    flat_buffers = flat_buffers_of(orders)
    assert [group.dtype for group in flat_buffers.groups] == [
        torch.float32,
        torch.float32,
        torch.float64,
        torch.float32,
    ]
    assert flat_buffers.groups[1].tensors[0].tracked.name == "pairs"  # they would begin at an odd element otherwise
    assert [len(group.flats) for group in flat_buffers.groups] == [2] * 4
    assert [group.begin for group in flat_buffers.groups] == [0, *_running_ends(flat_buffers)][:-1]
    assert sum(group.numel for group in flat_buffers.groups) == flat_buffers.layout.average_elements


def _running_ends(flat_buffers: FlatBuffers) -> list[int]:
    return [group.begin + group.numel for group in flat_buffers.groups]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float8_e4m3fn, torch.float32),
    ],
)
def test_averages_are_float32_whatever_the_parameters_are_but_for_float64(dtype, expected):
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)])
    ((_, average),) = flat_buffers_of(model, profiles=1).averages(0)
    assert average.dtype == expected


def test_average_of_a_channels_last_parameter_has_its_memory_order(orders):
    flat_buffers = flat_buffers_of(orders)
    assert flat_buffers.average(0, "last").is_contiguous(memory_format=torch.channels_last)
    assert flat_buffers.average(0, "transposed").t().is_contiguous()
    assert flat_buffers.average(0, "expanded").is_contiguous()


def test_copied_tensors_keep_their_types_and_values(orders):
    flat_buffers = flat_buffers_of(orders, param_or_buffer_names_no_ema=["narrow"])
    for tracked, value in flat_buffers.copies():
        value.copy_(tracked.live())
    kept = {tracked.name: value for tracked, value in flat_buffers.copies()}
    assert set(kept) == {"narrow", "count", "flags", "byte"}
    for tracked, value in flat_buffers.copies():
        assert value.dtype == tracked.dtype
        assert torch.equal(value, tracked.live())


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_copied_bytes_go_out_and_come_back(orders, pieces):
    first, second = (
        flat_buffers_of(orders, param_or_buffer_names_no_ema=["narrow"]),
        flat_buffers_of(orders, param_or_buffer_names_no_ema=["narrow"]),
    )
    for tracked, value in first.copies():
        value.copy_(tracked.live())
    section = first.layout.sections[-1]
    blob = torch.zeros(section.end - section.begin, dtype=torch.uint8)
    padding = first.layout.padding_bytes
    for begin, piece in first.copied_pieces(0, len(blob) - padding):
        blob[padding + begin : padding + begin + len(piece)] = piece
    for part, begin in zip(blob.split(pieces), range(0, len(blob), pieces), strict=True):
        second.fill_copied(begin - padding, part)
    for (tracked, value), (_, again) in zip(first.copies(), second.copies(), strict=True):
        assert torch.equal(value, again), tracked.name


def test_copied_tensor_gets_another_shape_and_the_other_values_stay(orders):
    flat_buffers = flat_buffers_of(orders)
    for _, value in flat_buffers.copies():
        value.fill_(1)
    first, *others = flat_buffers.copied
    tracked = [replace(each, shape=torch.Size((5, 3))) if each is first else each for each in flat_buffers.tracked]
    before = dict(flat_buffers.averages(0))
    flat_buffers.resize(tracked, replace(flat_buffers.layout, records=tuple(each.record for each in tracked)))
    values = {each.name: value for each, value in flat_buffers.copies()}
    assert values[first.name].shape == (5, 3)
    assert not values[first.name].any()
    assert others
    assert all((values[each.name] == 1).all() for each in others)
    assert all(average is before[each] for each, average in flat_buffers.averages(0))


def test_order_of_copied_tensors_is_the_layouts():
    model = Net()
    flat_buffers = flat_buffers_of(model, param_or_buffer_names_no_ema=["head.bias"])
    assert [tensor.name for tensor in flat_buffers.copied] == [record.name for record in flat_buffers.layout.copied]
    assert flat_buffers.copied[0].name == "norm.num_batches_tracked"  # the widest type first: all offsets are aligned


def test_parameter_in_its_averages_order_is_read_without_a_copy(orders):
    flat_buffers = flat_buffers_of(orders)
    for group in flat_buffers.groups:
        for tensor in group.tensors:
            live = tensor.tracked.live().detach()
            flat = memory_order(live, tensor)
            is_view = flat.data_ptr() == live.data_ptr()
            assert is_view == (tensor.tracked.name not in ("expanded", "holes")), tensor.tracked.name


def test_parameter_whose_order_changed_is_permuted(orders):
    flat_buffers = flat_buffers_of(orders)
    group = flat_buffers.groups[0]
    (tensor,) = [each for each in group.tensors if each.tracked.name == "last"]
    other = orders.last.detach().contiguous()
    assert torch.equal(memory_order(other, tensor), memory_order(orders.last.detach(), tensor))


def test_returned_tensors_have_storages_of_their_own_size_in_the_buffers(orders):
    flat_buffers = flat_buffers_of(orders, param_or_buffer_names_no_ema=["narrow"])
    places = [
        (flat.untyped_storage().data_ptr(), flat.untyped_storage().data_ptr() + flat.untyped_storage().nbytes())
        for flat in [group.flats[0] for group in flat_buffers.groups] + [g.flat for g in flat_buffers.copy_groups]
    ]
    for tracked, value in [*flat_buffers.averages(0), *flat_buffers.copies()]:
        assert value.untyped_storage().nbytes() == value.nbytes, tracked.name
        assert value.storage_offset() == 0
        assert not value.nbytes or any(begin <= value.data_ptr() < end for begin, end in places), tracked.name


def test_returned_tensor_holds_its_buffer(orders):
    flat_buffers = flat_buffers_of(orders)
    flat_buffers.average(0, "wide").copy_(orders.wide.detach())
    buffers = [weakref.ref(group.flats[0]) for group in flat_buffers.groups]
    value = flat_buffers.average(0, "wide")
    del flat_buffers
    gc.collect()
    assert all(buffer() is None for buffer in buffers)
    _ = [torch.full((3,), torch.nan, dtype=torch.float64) for _ in range(100)]  # would take the memory if it were free
    assert torch.equal(value, orders.wide.detach())


def test_returned_tensor_is_made_once_and_anew_only_where_it_lies_elsewhere(orders):
    flat_buffers = flat_buffers_of(orders)
    value = flat_buffers.average(0, "plain")
    assert flat_buffers.average(0, "plain") is value
    value.share_memory_()  # as a queue between processes does
    flat_buffers.fill(0, 0, row_major(orders, flat_buffers)[:12])
    assert torch.equal(flat_buffers.average(0, "plain"), orders.plain.detach())


def test_writes_move_the_version_counters_of_returned_tensors_and_of_their_aliases(orders):
    flat_buffers = flat_buffers_of(orders)
    alias = flat_buffers.average(0, "plain").detach()
    before = alias._version
    flat_buffers.mark_written()
    assert alias._version > before


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_version_counters_move_where_torch_takes_one_tensor_at_a_time(error, monkeypatch):
    """As torch 2.6 does."""
    of_torch = torch.autograd.graph.increment_version

    def of_one(tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise error("increment_version expects a Tensor as input")
        of_torch(tensor)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", of_one)
    tensors = [torch.zeros(2), torch.zeros(3)]
    move_versions(tensors)
    assert [tensor._version for tensor in tensors] == [1, 1]
