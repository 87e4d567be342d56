"""Readback of averages from the CPU, the laggy device, and the meta device, which has shapes and no bytes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from nitrous_ema.averaging.execution.device_to_host import ChunkCopier
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, snapshot_layout
from nitrous_ema.averaging.model.tracking import TrackingPolicy, track
from tests.support.fakes import small_pieces
from tests.support.laggy.runner import assert_right_on_laggy
from tests.support.memory_orders import Orders
from tests.support.models import set_weights

CPU = torch.device("cpu")
CHUNK_BYTES = 64


def make_flat_buffers(
    kind: str, dtype: torch.dtype, device: str = "cpu", chunk_bytes: int = CHUNK_BYTES
) -> FlatBuffers:
    """Return averages with values that every type can hold."""
    torch.manual_seed(0)
    model = Orders() if kind == "orders" else nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9))
    set_weights(model, 3)
    model.to(device)
    tracked = track(model, TrackingPolicy())
    with small_pieces(chunk_bytes=chunk_bytes):
        flat_buffers = FlatBuffers(tracked, snapshot_layout(tracked, (5.0, 6.0), (0.1, 0.2), dtype))
    for profile in range(2):
        for number, (_, average) in enumerate(flat_buffers.averages(profile)):
            real = torch.view_as_real(average) if average.is_complex() else average
            real.copy_(torch.arange(real.numel()).view(real.shape) % 50 + number + profile)
    for _, value in flat_buffers.copies():
        value.copy_(torch.arange(value.numel()).view(value.shape) % 2)
    return flat_buffers


def data_of(flat_buffers: FlatBuffers, *, non_blocking: bool = False) -> bytes:
    """Return the file's data as the copiers produce it, page by page; the pages hold other bytes before."""
    copiers = [ChunkCopier(device, flat_buffers.layout) for device in flat_buffers.devices]
    pages = []
    for span in flat_buffers.layout.chunks:
        page = torch.full((CHUNK_BYTES,), 0xFF, dtype=torch.uint8)
        page = page.pin_memory() if non_blocking else page
        pages.append(page[: span.end - span.begin])
        for copier in copiers:
            copier.copy(flat_buffers, span, page, non_blocking=non_blocking)
            copier.yield_copy_engine()
    if non_blocking:
        torch.accelerator.synchronize()
    return b"".join(page.numpy().tobytes() for page in pages)


def expected_data(flat_buffers: FlatBuffers, dtype: torch.dtype) -> bytes:
    """Return the file's data by the definition: tensor by tensor, as safetensors files have them."""
    parts = []
    for profile in range(2):
        for _, average in flat_buffers.averages(profile):
            real = torch.view_as_real(average) if average.is_complex() else average
            parts.append(real.cpu().to(dtype).contiguous().view(-1).view(torch.uint8))
    parts.append(torch.zeros(flat_buffers.layout.padding_bytes, dtype=torch.uint8))
    parts += [value.cpu().contiguous().view(-1).view(torch.uint8) for _, value in flat_buffers.copies()]
    return torch.cat(parts).numpy().tobytes()


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "orders"])
def test_pages_have_the_bytes_of_the_file(kind, dtype):
    flat_buffers = make_flat_buffers(kind, dtype)
    assert data_of(flat_buffers) == expected_data(flat_buffers, dtype)


def copied_on(device: str, kind: str, dtype: str) -> dict[str, object]:
    """Return the file's data, copied on a separate stream after the averages were written."""
    flat_buffers = make_flat_buffers(kind, getattr(torch, dtype), device)
    if device == "cpu":
        return {"data": data_of(flat_buffers)}
    caller, copies = torch.accelerator.current_stream(), torch.Stream(device=device)
    copies.wait_stream(caller)
    torch.accelerator.set_stream(copies)
    data = data_of(flat_buffers, non_blocking=True)
    torch.accelerator.set_stream(caller)
    return {"data": data}


@pytest.mark.slow
def test_late_copies_have_the_bytes_of_the_file():
    cases = [{"kind": kind, "dtype": dtype} for kind in ("plain", "orders") for dtype in ("float32", "bfloat16")]
    assert_right_on_laggy(copied_on, cases=cases)


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The sizes in bytes of all allocations on a device, and all operator calls with their numbers of elements."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.sizes, self.calls = device, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {storage for each in args if (storage := _storage(each)) is not None}
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, result.numel()))
        storage = _storage(result)
        if storage is not None and storage not in known and result.device.type == self.device:
            self.sizes.append(result.untyped_storage().nbytes())
        return result


def _storage(value: object) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def allocated_on_meta(kind: str, dtype: torch.dtype) -> list[int]:
    """Return the sizes of what copying everything from the meta device allocates."""
    flat_buffers = make_flat_buffers(kind, dtype)
    flat_buffers.to(torch.device("meta"))
    copier = ChunkCopier(torch.device("meta"), flat_buffers.layout)
    with Allocations("meta") as allocations, mock.patch.object(torch.Tensor, "copy_", _no_copy):
        for span in flat_buffers.layout.chunks:
            copier.copy(flat_buffers, span, torch.empty(CHUNK_BYTES, dtype=torch.uint8), non_blocking=True)
            copier.yield_copy_engine()
    return allocations.sizes


def _no_copy(target, source, non_blocking=False):
    """Check the condition under which a real device makes no temporary: one type and contiguous, or one device."""
    assert target.shape == source.shape
    if target.device != source.device:
        assert (target.dtype, target.is_contiguous()) == (source.dtype, source.is_contiguous()) == (source.dtype, True)
        assert non_blocking
    return target


@pytest.mark.parametrize(("kind", "dtype"), [("plain", torch.float16), ("orders", torch.float32)])
def test_device_memory_is_one_staging_chunk_at_most(kind, dtype):
    assert sorted(allocated_on_meta(kind, dtype)) == [1, CHUNK_BYTES]  # and one byte for the kernel between chunks


def test_averages_as_the_file_has_them_need_no_chunk():
    assert allocated_on_meta("plain", torch.float32) == [1]


def test_staging_chunk_is_no_larger_than_the_largest_chunk():
    model = nn.Linear(2, 2, dtype=torch.float64)
    tracked = track(model)
    flat_buffers = FlatBuffers(tracked, snapshot_layout(tracked, (5.0,), (0.1,), torch.float32), torch.device("meta"))
    copier = ChunkCopier(torch.device("meta"), flat_buffers.layout)
    with Allocations("meta") as allocations, mock.patch.object(torch.Tensor, "copy_", _no_copy):
        copier.copy(flat_buffers, flat_buffers.layout.chunks[0], torch.empty(24, dtype=torch.uint8), non_blocking=True)
    assert allocations.sizes == [24]


def test_only_averages_on_its_device_are_copied():
    flat_buffers = make_flat_buffers("plain", torch.float32)
    for group in (*flat_buffers.groups, *flat_buffers.copy_groups):
        group.device = torch.device("cuda:1")  # pretended
    page = torch.full((CHUNK_BYTES,), 0xFF, dtype=torch.uint8)
    ChunkCopier(CPU, flat_buffers.layout).copy(flat_buffers, flat_buffers.layout.chunks[0], page, non_blocking=False)
    assert (page == 0xFF).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_is_written_between_the_averages_on_its_device(dtype):
    flat_buffers = make_flat_buffers("orders", dtype, chunk_bytes=4096)
    flat_buffers.to(torch.device("meta"))
    flat_buffers.groups[1].device = torch.device("cuda:1")  # pretended
    written = []

    def copy(target, source, non_blocking=False):
        written.append(target.numel() if target.device != source.device else 0)
        return target

    page = torch.empty(4096, dtype=torch.uint8)
    (profile, *_) = flat_buffers.layout.chunks
    with mock.patch.object(torch.Tensor, "copy_", copy):
        ChunkCopier(torch.device("meta"), flat_buffers.layout).copy(flat_buffers, profile, page, non_blocking=True)
    assert sum(written) == flat_buffers.layout.average_elements - flat_buffers.groups[1].numel


def test_copy_engine_is_yielded_by_a_kernel_of_one_element():
    copier = ChunkCopier(torch.device("meta"), make_flat_buffers("plain", torch.float32).layout)
    copier.yield_copy_engine()
    with Allocations("meta") as allocations:
        copier.yield_copy_engine()
    assert allocations.calls == [("add_", 1)]  # no memset and no copy, which are work of the copy engine itself


def test_averages_in_host_memory_yield_no_copy_engine():
    copier = ChunkCopier(CPU, make_flat_buffers("plain", torch.float32).layout)
    with Allocations("cpu") as allocations:
        copier.yield_copy_engine()
    assert allocations.sizes == []
