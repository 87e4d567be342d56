"""Host memory: judged, pinned or not, and told; for snapshots on their way and for averages kept there."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from nitrous_ema.async_ import background_writer as writer
from nitrous_ema.async_ import staging
from nitrous_ema.averaging.execution import host_memory, offload
from nitrous_ema.averaging.execution.host_memory import AvailableMemory, check_host_memory, pinned_or_pageable
from nitrous_ema.averaging.kernels.flat_buffers import snapshot_layout
from nitrous_ema.averaging.model.tracking import track
from nitrous_ema.errors import NitrousError, NitrousWarning
from tests.support.fakes import small_pieces
from tests.support.models import Vector


@pytest.fixture
def layout():
    with small_pieces(chunk_bytes=256):
        return snapshot_layout(track(Vector(1000)), (6.94, 16.97), (0.1, 0.05), torch.float32)


@pytest.fixture
def available(monkeypatch):
    def available(num_bytes, cgroup=None):
        monkeypatch.setattr(host_memory, "available_memory", lambda: AvailableMemory(num_bytes, cgroup))

    return available


@pytest.mark.parametrize(("cgroup", "named"), [(None, "are available"), (Path("/groups/a"), "control group /groups/a")])
def test_more_than_is_available_is_refused_with_who_limits_it(available, cgroup, named):
    available(1000, cgroup)
    check_host_memory(1000, "tests", "Do less.")
    with pytest.raises(NitrousError, match=rf"No host memory for tests: .*{named}.*Do less\."):
        check_host_memory(1001, "tests", "Do less.")


def test_memory_that_all_processes_of_a_machine_cannot_have_together_is_told(available, monkeypatch):
    available(1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_host_memory(250, "tests", "Do less.")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.warns(NitrousWarning, match=r"5 processes .*LOCAL_WORLD_SIZE.*memory for tests.*Do less\."):
        check_host_memory(250, "tests", "Do less.")
    with pytest.raises(NitrousError, match="No host memory for tests"):
        check_host_memory(1001, "tests", "Do less.")


def test_pageable_memory_is_told_where_there_is_no_pinned():
    def make(pin):
        if pin:
            raise RuntimeError("made up")
        return "pageable"

    with pytest.warns(NitrousWarning, match=r"No pinned host memory for tests \(made up\).*pageable"):
        assert pinned_or_pageable(make, "tests", "Do less.") == "pageable"


def test_pageable_memory_that_was_asked_for_is_not_told():
    assert pinned_or_pageable(lambda pin: pin, "tests", "Do less.", pin=False) is False


def test_no_host_memory_at_all_is_one_clear_error():
    def make(pin):
        raise MemoryError("none left")

    with pytest.raises(NitrousError, match=r"No host memory for tests: none left\. Do less\."):
        pinned_or_pageable(make, "tests", "Do less.", pin=False)


def test_slots_that_do_not_fit_are_refused_with_what_to_do(available, layout):
    available(2 * layout.data_bytes)
    writer._make_pool(layout, 2, pin=False)
    with pytest.raises(NitrousError, match=r"for 3 snapshots \(max_pending\).*Lower max_pending.*checkpoint_dtype"):
        writer._make_pool(layout, 3, pin=False)


def test_copies_of_parameters_that_do_not_fit_are_refused_with_what_to_do(available):
    available(2 * 1024 - 1)
    with pytest.raises(NitrousError, match=r"the 2 copies of the parameters of offload='host', of .*offload=None"):
        offload._allocate([1024])


@pytest.fixture
def little_pinned(monkeypatch):
    """Five pieces can be pinned. What was asked for after that, in order, and how many were in use at a return."""
    order, pinned = [], []

    def piece(size_bytes, pin):
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

    monkeypatch.setattr(staging, "_page", piece)
    monkeypatch.setattr(offload, "_piece", piece)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", empty_host_cache, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    return order


def test_pinned_slots_that_did_not_suffice_are_given_back_before_pageable_ones_are_taken(layout, little_pinned):
    with pytest.warns(NitrousWarning, match="No pinned"):
        assert not writer._make_pool(layout, 2, pin=True).is_pinned
    assert little_pinned == ["0 in use", *["pageable"] * 2 * len(layout.chunks)]


def test_pinned_copies_that_did_not_suffice_are_given_back_before_pageable_ones_are_taken(little_pinned):
    with pytest.warns(NitrousWarning, match="No pinned"):
        offload._allocate([2048, 1024, 512])
    assert little_pinned == ["0 in use", *["pageable"] * 2 * 3]
