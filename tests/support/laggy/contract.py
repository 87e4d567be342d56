"""The promises of the fake device, one function each: CUDA's ordering contract as seen from Python.

A function raises if the device breaks its promise. `probe` runs a function by name, as a scenario.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tests.support.laggy import device as laggy

TIMEOUT_SECONDS = 60
PROBES: dict[str, Callable[[], None]] = {}


def probe(device: str, name: str) -> Mapping[str, Any]:
    if device != "cpu":  # the CPU promises nothing that must be tested
        PROBES[name]()
    return {}


def promise(function: Callable[[], None]) -> Callable[[], None]:
    PROBES[function.__name__] = function
    return function


def full(value: float, device: str = laggy.NAME) -> torch.Tensor:
    return torch.full((64,), float(value), device=device)


def holds(tensor: torch.Tensor, value: float) -> bool:
    return bool((tensor.cpu() == value).all())


class on:
    """Makes a stream current for a block, with the calls that the library uses."""

    def __init__(self, stream: torch.Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_stream(self.before)


# ---- order


@promise
def tasks_of_one_stream_keep_their_order():
    tensor = full(0)
    for _ in range(20):
        tensor.add_(1).mul_(2)
    assert holds(tensor, sum(2**i for i in range(1, 21)))


@promise
def a_stream_that_waits_for_an_event_sees_what_was_written_before_it():
    side, tensor = torch.Stream(device="laggy"), full(0)
    for value in range(1, 10):
        tensor.fill_(value)
        side.wait_event(torch.accelerator.current_stream().record_event())
        with on(side):
            seen = tensor.clone()
        side.synchronize()
        assert holds(seen, value)


@promise
def an_event_recorded_again_does_not_move_waits_that_exist_already():
    laggy.set_policy("lazy")
    side, event, tensor = torch.Stream(device="laggy"), torch.Event("laggy"), full(1)
    event.record()
    side.wait_event(event)
    tensor.fill_(2)
    event.record()
    with on(side):
        seen = tensor.clone()
    side.synchronize()
    assert holds(seen, 1)


@promise
def an_event_that_was_never_recorded_is_done():
    event = torch.Event("laggy")
    torch.accelerator.current_stream().wait_event(event)
    assert event.query()
    event.synchronize()


@promise
def a_poll_never_blocks_and_the_first_finds_nothing_done():
    laggy.set_policy("lazy")
    full(1)
    event = torch.accelerator.current_stream().record_event()
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert laggy.take_host_waits() == ["event.synchronize()"]


@promise
def a_stream_is_not_done_while_it_waits():
    laggy.set_policy("lazy")
    side = torch.Stream(device="laggy")
    full(1)
    side.wait_event(torch.accelerator.current_stream().record_event())
    assert not side.query()
    side.synchronize()
    assert side.query()


@promise
def every_thread_has_its_own_current_stream():
    side, seen = torch.Stream(device="laggy"), []
    with on(side):
        thread = threading.Thread(target=lambda: seen.append(torch.accelerator.current_stream()))
        thread.start()
        thread.join(TIMEOUT_SECONDS)
        assert torch.accelerator.current_stream() == side
    assert seen == [torch.accelerator.current_stream()]


@promise
def a_kernel_that_fails_raises_at_the_next_wait():
    laggy.set_policy("lazy")
    full(1)[torch.tensor([1000], device="laggy")]
    with pytest.raises(RuntimeError, match="an earlier kernel failed"):
        torch.accelerator.synchronize()
    with pytest.raises(laggy.KernelFailed):
        laggy.set_policy("eager")


# ---- memory


@promise
def fresh_memory_is_poison():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(64, dtype=dtype, device="laggy").cpu().isnan().all()
    assert torch.empty(64, pin_memory=True).isnan().all()


@promise
def a_freed_block_may_be_overwritten_at_once():
    laggy.set_policy("lazy")
    assert holds_after_free(record_stream=False) is False


@promise
def record_stream_keeps_a_freed_block():
    assert holds_after_free(record_stream=True)


def holds_after_free(*, record_stream: bool) -> bool:
    """Return whether a side stream still reads the right values from a tensor that its owner freed."""
    side, tensor = torch.Stream(device="laggy"), full(1)
    main = torch.accelerator.current_stream()
    side.wait_stream(main)
    with on(side):
        seen = tensor.clone()
    if record_stream:
        tensor.record_stream(side)
    del tensor
    reused = full(2)
    main.synchronize()
    side.synchronize()
    assert holds(reused, 2)
    return holds(seen, 1)


@promise
def a_storage_that_grows_keeps_its_values():
    tensor = full(3)
    tensor.resize_(1024)
    assert holds(tensor[:64], 3)


# ---- copies


@promise
def a_copy_to_pinned_memory_returns_before_its_data():
    laggy.set_policy("lazy")
    tensor, host = full(1), torch.empty(64, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.accelerator.current_stream().record_event()
    assert host.isnan().all()
    copied.synchronize()
    assert holds(host, 1)


@promise
def a_copy_to_pageable_memory_always_blocks():
    tensor, host = full(1), torch.zeros(64)
    host.copy_(tensor, non_blocking=True)
    assert (host == 1).all()
    assert laggy.take_host_waits() == ["non_blocking copy to memory that is not pinned and contiguous"]


@promise
def a_copy_from_pageable_memory_takes_the_bytes_of_the_call():
    host, tensor = torch.ones(64), full(0)
    tensor.copy_(host, non_blocking=True)
    host.fill_(2)
    assert holds(tensor, 1)


@promise
def a_copy_from_pinned_memory_reads_when_it_runs():
    laggy.set_policy("lazy")
    host, tensor = torch.ones(64).pin_memory(), full(0)
    tensor.copy_(host, non_blocking=True)
    host.fill_(2)
    assert holds(tensor, 2)


@promise
def a_freed_pinned_block_waits_for_its_copies():
    laggy.set_policy("lazy")
    host, tensor = torch.ones(64).pin_memory(), full(0)
    tensor.copy_(host, non_blocking=True)
    address = host.data_ptr()
    del host
    assert torch.empty(64, pin_memory=True).data_ptr() != address
    assert holds(tensor, 1)


@promise
def a_copy_that_has_begun_is_not_held():
    laggy.set_policy("lazy")
    tensor, host = torch.zeros(1 << 22, device="laggy"), torch.empty(1 << 22, pin_memory=True)
    before = torch.accelerator.current_stream().record_event()
    host.copy_(tensor, non_blocking=True)
    copied = torch.accelerator.current_stream().record_event()
    copied.query()
    poll(before)  # the executor goes on to the copy, which it has not finished in most runs
    laggy.hold_copies()
    assert not laggy.is_held_up()
    poll(copied)
    assert not laggy.is_held_up()
    assert (host == 0).all()


def poll(event: torch.Event) -> None:
    """Wait by polling, which does not end a hold."""
    until = time.monotonic() + TIMEOUT_SECONDS
    while not event.query():
        assert time.monotonic() < until


@promise
def a_number_on_the_host_is_read_when_the_op_is_called():
    laggy.set_policy("lazy")
    weight, tensor = torch.tensor(0.5), full(0)
    tensor.lerp_(full(1), weight)
    weight.fill_(7)
    assert holds(tensor, 0.5)


@promise
def a_host_tensor_among_device_tensors_is_refused():
    with pytest.raises(RuntimeError, match="same device"):
        full(1).lerp_(torch.ones(64), 0.5)


# ---- waits


@promise
def a_wait_is_counted_for_the_thread_that_may_wait():
    tensor = full(1)
    event = torch.accelerator.current_stream().record_event()
    writer = threading.Thread(target=event.synchronize)
    writer.start()
    writer.join(TIMEOUT_SECONDS)
    assert laggy.take_host_waits() == []
    assert tensor.sum().item() == 64
    assert laggy.take_host_waits() == ["item()"]


@promise
def the_averaging_ops_are_queued_and_nothing_waits():
    """No op that averaging uses may fall back to a synchronous run, which would hide every race."""
    laggy.set_policy("lazy")
    sources = [full(1), full(2).bfloat16(), full(3).half()]
    complex_one = torch.zeros(64, dtype=torch.complex64, device="laggy")
    laggy.take_host_waits()
    before = laggy.counters()["ran"]
    pinned = torch.empty(256, pin_memory=True)
    flat = torch.zeros(256, device="laggy")
    parts = [flat[64 * i : 64 * (i + 1)] for i in range(3)]
    torch._foreach_copy_(parts, sources)
    torch._foreach_lerp_(parts, [source.float() for source in sources], 0.25)
    torch._foreach_lerp_(parts[:1], sources[:1], [torch.tensor(0.5)])
    torch._foreach_add_(parts, sources, alpha=0.5)
    torch._foreach_mul_(parts, 0.5)
    torch._foreach_sub(parts, 1.0)
    flat.lerp_(torch.ones_like(flat), 0.5)
    flat[:128].copy_(flat[128:])
    flat.view(torch.int32).zero_()
    flat.bfloat16().float()
    torch.view_as_real(complex_one).view(-1).add_(1)
    flat.as_strided((8, 8), (1, 8)).t().narrow(0, 2, 3).contiguous()
    flat.detach().set_(flat.untyped_storage(), 64, (64,), (1,)).zero_()
    pinned.copy_(flat, non_blocking=True)
    pinned[64:128].copy_(flat.view(16, 16)[:, :4].reshape(-1), non_blocking=True)
    pinned.view(torch.bfloat16)[:64].copy_(flat[:64], non_blocking=True)
    torch.linalg.vector_norm(flat)
    torch.cat([flat, flat]).isfinite().all()
    event = torch.Event("laggy")
    event.record()
    assert laggy.counters()["ran"] == before
    assert not event.query()
    assert laggy.take_host_waits() == []
    assert laggy.synchronous_ops() == []


# ---- torch's names


@promise
def the_device_module_has_events_and_streams_of_its_own():
    module = torch.get_device_module("laggy")
    side = torch.Stream(device="laggy")
    event = module.Event(enable_timing=False, blocking=True)
    with on(side):
        tensor = full(1)
        event.record()
        assert module.current_stream() == side
    event.synchronize()
    assert event.query()
    with pytest.raises(TypeError, match=r"torch\.laggy\.Stream"):
        event.record(side)
    event.wait(module.current_stream())
    assert holds(tensor, 1)


@promise
def a_generic_stream_that_waits_for_a_module_event_waits_for_nothing():
    laggy.set_policy("lazy")
    side, event = torch.Stream(device="laggy"), torch.get_device_module("laggy").Event()
    tensor = torch.empty(64, device="laggy").fill_(1)
    event.record()
    side.wait_event(event)
    with on(side):
        seen = tensor.clone()
    side.synchronize()
    assert not holds(seen, 1)


@promise
def two_devices_copy_in_the_order_of_both_their_streams():
    first, second = full(1, "laggy:0"), full(2, "laggy:1")
    second.copy_(first)
    first.fill_(3)
    second.mul_(2)
    assert holds(second, 2)
    assert holds(first, 3)
    with pytest.raises(RuntimeError, match="same device"):
        first.add_(second)


@promise
def set_stream_makes_the_streams_device_current():
    assert torch.accelerator.current_accelerator().type == "laggy"
    assert torch.accelerator.device_count() == 2
    before, away = torch.accelerator.current_stream(), torch.Stream(device="laggy:1")
    with on(away):
        assert torch.accelerator.current_device_index() == 1
        assert torch.empty(1, device="laggy").device.index == 1
    assert torch.accelerator.current_device_index() == 0
    assert torch.accelerator.current_stream() == before
    assert torch.accelerator.current_stream("laggy:1") == away  # as on CUDA: every device has a current stream
    with torch.get_device_module("laggy").device(1):
        torch.accelerator.set_stream(torch.Stream(stream_id=0, device_index=1, device_type=away.device_type))
