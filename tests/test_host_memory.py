"""Host memory for snapshots: judged, pinned or not, and told."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from nitrous_ema.arena import snapshot_layout
from nitrous_ema.async_ import host_memory, staging
from nitrous_ema.async_.host_memory import make_pool
from nitrous_ema.async_.staging import SlotPool
from nitrous_ema.errors import NitrousError, NitrousWarning
from nitrous_ema.resources import AvailableMemory
from nitrous_ema.tracked import track
from tests.fakes import small_pieces
from tests.models import Vector


@pytest.fixture
def layout():
    with small_pieces(chunk_bytes=256):
        return snapshot_layout(track(Vector(1000)), (6.94, 16.97), (0.1, 0.05), torch.float32)


def test_pageable_memory_is_told_where_there_is_no_pinned(layout, monkeypatch):
    def no_pinned(layout, num_slots, pin):
        if pin:
            raise RuntimeError("out of pinned memory")
        return SlotPool(layout, num_slots, pin=False)

    monkeypatch.setattr(host_memory, "SlotPool", no_pinned)
    with pytest.warns(NitrousWarning, match=r"No pinned host memory for 2 snapshots .*out of pinned memory"):
        make_pool(layout, 2, pin=True)


@pytest.mark.parametrize(("cgroup", "named"), [(None, "are available"), (Path("/groups/a"), "control group /groups/a")])
def test_slots_beyond_the_available_memory_are_refused_with_who_limits_it(layout, monkeypatch, cgroup, named):
    available = AvailableMemory(2 * layout.data_bytes, cgroup)
    monkeypatch.setattr(host_memory, "available_memory", lambda: available)
    make_pool(layout, 2, pin=False)
    with pytest.raises(NitrousError, match=rf"for 3 snapshots.*{named}.*Lower max_pending.*checkpoint_dtype"):
        make_pool(layout, 3, pin=False)


def test_memory_that_all_processes_of_a_machine_cannot_have_together_is_told(layout, monkeypatch):
    monkeypatch.setattr(host_memory, "available_memory", lambda: AvailableMemory(8 * layout.data_bytes, None))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    make_pool(layout, 2, pin=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.warns(NitrousWarning, match=r"5 processes .*LOCAL_WORLD_SIZE.*2 snapshots.*Lower max_pending"):
        make_pool(layout, 2, pin=False)
    with pytest.raises(NitrousError, match="No host memory for 9 snapshots"):
        make_pool(layout, 9, pin=False)


def test_no_host_memory_at_all_is_one_clear_error(layout, monkeypatch):
    def none(layout, num_slots, pin):
        raise MemoryError("none left")

    monkeypatch.setattr(host_memory, "SlotPool", none)
    with pytest.raises(NitrousError, match=r"Lower max_pending"):
        make_pool(layout, 2, pin=False)


def test_pinned_memory_that_did_not_suffice_is_given_back_before_pageable_is_taken(layout, monkeypatch):
    order, pinned = [], []

    def page(size_bytes, pin):
        if len(pinned) == 5 and pin:
            raise RuntimeError("out of pinned memory")
        made = torch.empty(size_bytes, dtype=torch.uint8)
        if pin:
            pinned.append(weakref.ref(made))
        else:
            order.append("pageable")
        return made

    def empty_host_cache():
        order.append(f"{sum(each() is not None for each in pinned)} in use")

    monkeypatch.setattr(staging, "_page", page)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", empty_host_cache, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.warns(NitrousWarning, match="No pinned"):
        assert not make_pool(layout, 2, pin=True).is_pinned
    assert order == ["0 in use", *["pageable"] * 2 * len(layout.chunks)]
