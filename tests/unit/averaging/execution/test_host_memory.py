"""Host memory: checked, pinned or pageable, for snapshots in flight and for averages; and how much is available.

Available memory is of the machine, and of made-up control groups below a made-up root folder.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import psutil
import pytest
import torch

from nitrous_ema.async_ import background_writer, staging
from nitrous_ema.averaging.execution import host_memory, offload
from nitrous_ema.averaging.execution.host_memory import (
    AvailableMemory,
    available_memory,
    check_host_memory,
    pinned_or_pageable,
    processes_per_machine,
)
from nitrous_ema.averaging.kernels.flat_buffers import snapshot_layout
from nitrous_ema.averaging.model.tracking import track
from nitrous_ema.errors import NitrousError, NitrousWarning
from tests.support.fakes import small_pieces
from tests.support.models import Vector

MACHINE = 10_000_000
FILES = {
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "v2": ("memory.max", "memory.current", "inactive_file"),
}
MOUNTS = {
    "v1": "35 31 0:32 {group} /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory",
    "v2": "41 31 0:38 {group} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate",
}
OTHER_MOUNTS = (
    "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
)


@pytest.fixture
def layout():
    with small_pieces(chunk_bytes=256):
        return snapshot_layout(track(Vector(1000)), (6.94, 16.97), (0.1, 0.05), torch.float32)


@pytest.fixture
def available(monkeypatch):
    def available(num_bytes, cgroup=None):
        monkeypatch.setattr(host_memory, "available_memory", lambda: AvailableMemory(num_bytes, cgroup))

    return available


@pytest.mark.parametrize(
    ("cgroup", "named"), [(None, "available"), (Path("/groups/a"), "available in the control group /groups/a")]
)
def test_more_than_is_available_is_an_error_that_names_the_limit(available, cgroup, named):
    available(1000, cgroup)
    check_host_memory(1000, "tests", "Do less.")
    with pytest.raises(NitrousError, match=rf"for tests: 1001 B are needed, 1000 B are {named}\. Do less\."):
        check_host_memory(1001, "tests", "Do less.")


def test_memory_that_is_too_little_for_all_processes_of_a_machine_causes_a_warning(available, monkeypatch):
    available(1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_host_memory(250, "tests", "Do less.")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.warns(NitrousWarning, match=r"5 processes .*LOCAL_WORLD_SIZE.*memory for tests.*Do less\."):
        check_host_memory(250, "tests", "Do less.")
    with pytest.raises(NitrousError, match="Not enough host memory for tests"):
        check_host_memory(1001, "tests", "Do less.")


def test_pageable_memory_instead_of_pinned_causes_a_warning():
    def make(pin):
        if pin:
            raise RuntimeError("simulated")
        return "pageable"

    with pytest.warns(NitrousWarning, match=r"Pinned host memory for tests could not be .*\(simulated\)\. Pageable"):
        assert pinned_or_pageable(make, "tests", "Do less.") == "pageable"


def test_requested_pageable_memory_causes_no_warning():
    assert pinned_or_pageable(lambda pin: pin, "tests", "Do less.", pin=False) is False


def test_no_host_memory_at_all_is_one_clear_error():
    def make(pin):
        raise MemoryError("none left")

    with pytest.raises(NitrousError, match=r"Not enough host memory for tests: none left\. Do less\."):
        pinned_or_pageable(make, "tests", "Do less.", pin=False)


def test_slots_that_do_not_fit_are_an_error_with_a_remedy(available, layout):
    available(2 * layout.data_bytes)
    background_writer._make_pool(layout, 2, pin=False)
    with pytest.raises(NitrousError, match=r"for 3 snapshots \(max_pending\).*Lower max_pending.*checkpoint_dtype"):
        background_writer._make_pool(layout, 3, pin=False)


def test_copies_of_parameters_that_do_not_fit_are_an_error_with_a_remedy(available):
    available(2 * 1024 - 1)
    with pytest.raises(NitrousError, match=r"the 2 copies of the parameters of offload='host', of .*offload=None"):
        offload._allocate([1024])


@pytest.fixture
def little_pinned(monkeypatch):
    """Only five pieces can be pinned. Returns a log of later allocations and of pinned pieces still in use."""
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


def test_pinned_slots_are_freed_before_pageable_slots_are_allocated(layout, little_pinned):
    with pytest.warns(NitrousWarning, match="Pinned host memory for"):
        assert not background_writer._make_pool(layout, 2, pin=True).is_pinned
    assert little_pinned == ["0 in use", *["pageable"] * (1 + 2 * len(layout.chunks))]  # and the slots' counts


def test_pinned_copies_are_freed_before_pageable_copies_are_allocated(little_pinned):
    with pytest.warns(NitrousWarning, match="Pinned host memory for"):
        offload._allocate([2048, 1024, 512])
    assert little_pinned == ["0 in use", *["pageable"] * 2 * 3]


class Host:
    """A made-up machine whose processes are in control groups of one version."""

    def __init__(self, root, version):
        self.root, self.version = root, version
        self.top = root / ("sys/fs/cgroup/memory" if version == "v1" else "sys/fs/cgroup")
        self.top.mkdir(parents=True)
        (root / "proc/self").mkdir(parents=True)
        self.place("/")

    def place(self, group, mounted_group="/"):
        """Put this process into a group; ``mounted_group`` is the outermost group that it can see."""
        lines = ["3:cpu:/", f"4:memory:{group}", "1:name=systemd:/other", "0::/"]
        (self.root / "proc/self/cgroup").write_text("\n".join(lines if self.version == "v1" else [f"0::{group}", ""]))
        mounts = [*OTHER_MOUNTS, MOUNTS[self.version].format(group=mounted_group)]
        (self.root / "proc/self/mountinfo").write_text("\n".join(mounts))

    def limit(self, group, limit, used=0, reclaimable=0):
        folder = self.top / group
        folder.mkdir(parents=True, exist_ok=True)
        names = FILES[self.version]
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {reclaimable}\nactive_file 77\n")
        return folder


@pytest.fixture(params=["v1", "v2"])
def host(request, tmp_path, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=MACHINE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return Host(tmp_path, request.param)


def found(host):
    memory = available_memory(host.root)
    return memory.bytes, memory.cgroup


def test_without_limits_the_memory_of_the_machine_is_available(host):
    unlimited = "max" if host.version == "v2" else 9223372036854771712
    host.limit("", unlimited, 123)
    host.place("/a")
    host.limit("a", unlimited, 123)
    assert found(host) == (MACHINE, None)


def test_group_leaves_its_limit_less_what_cannot_be_reclaimed(host):
    host.place("/a")
    folder = host.limit("a", 5000, 3000, 400)
    assert found(host) == (2400, folder)


def test_group_beyond_its_limit_leaves_nothing(host):
    host.place("/a")
    assert found(host) == (MACHINE, None)
    host.limit("a", 5000, 6000, 400)
    assert found(host)[0] == 0


def test_group_with_more_than_the_machine_limits_nothing(host):
    host.place("/a")
    host.limit("a", 2 * MACHINE, 100)
    assert found(host) == (MACHINE, None)


@pytest.mark.parametrize("tightest", ["a/b/c", "a/b", "a", ""])
def test_least_of_all_levels_counts(host, tightest):
    host.place("/a/b/c")
    for group in ("a/b/c", "a/b", "a", ""):
        host.limit(group, 9000)
    folder = host.limit(tightest, 8000)
    host.limit("..", 1)  # above the mount: not a group of this process
    assert found(host)[0] == 8000
    assert found(host)[1].samefile(folder)


@pytest.mark.parametrize(
    ("group", "mounted_group", "folder"),
    [
        ("/pod/box", "/pod/box", ""),
        ("/pod/box/mine", "/pod/box", "mine"),
        ("/elsewhere", "/pod/box", ""),
        ("/../outside", "/", ""),
    ],
)
def test_container_sees_its_own_group_as_the_root(host, group, mounted_group, folder):
    host.place(group, mounted_group)
    limited = host.limit(folder, 7000)
    host.limit("..", 1)  # above the mount: not a group of this process
    assert found(host)[0] == 7000
    assert found(host)[1].samefile(limited)


@pytest.mark.parametrize("name", ["limit", "usage", "stat"])
@pytest.mark.parametrize("content", [None, "", "many\n", "\xff\n"])
def test_files_that_cannot_be_read_limit_nothing(host, name, content):
    host.place("/a")
    folder = host.limit("a", 5000, 3000)
    host.limit("", 6000)
    limit, usage, _ = FILES[host.version]
    path = folder / {"limit": limit, "usage": usage, "stat": "memory.stat"}[name]
    path.unlink() if content is None else path.write_bytes(content.encode("latin-1"))
    lenient = name == "stat" and content == ""  # no such line: nothing can be reclaimed
    assert found(host)[0] == (2000 if lenient else 6000)


@pytest.mark.parametrize("name", ["cgroup", "mountinfo"])
@pytest.mark.parametrize("content", [None, "nonsense\n"])
def test_system_without_control_groups_limits_nothing(host, name, content):
    host.limit("", 5000)
    path = host.root / "proc/self" / name
    path.unlink() if content is None else path.write_text(content)
    assert found(host) == (MACHINE, None)


@pytest.mark.parametrize(("value", "expected"), [(None, 1), ("8", 8), ("1", 1), ("0", 1), ("-3", 1), ("many", 1)])
def test_processes_of_a_machine_are_those_that_torchrun_has_started(monkeypatch, value, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert processes_per_machine() == expected


def test_real_machine_has_some_memory_and_not_more_than_its_total():
    assert 0 < available_memory().bytes <= psutil.virtual_memory().total
