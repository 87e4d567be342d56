"""Available memory: of the machine, and of made-up control groups below a made-up root folder."""

from __future__ import annotations

import psutil
import pytest

from nitrous_ema.averaging.execution.host_memory import available_memory, processes_per_machine

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


class Host:
    """A machine whose processes are in control groups of one version."""

    def __init__(self, root, version):
        self.root, self.version = root, version
        self.top = root / ("sys/fs/cgroup/memory" if version == "v1" else "sys/fs/cgroup")
        self.top.mkdir(parents=True)
        (root / "proc/self").mkdir(parents=True)
        self.place("/")

    def place(self, group, mounted_group="/"):
        """Where this process is, and which group is the uppermost that can be seen."""
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


def test_without_limits_it_is_what_the_machine_has(host):
    unlimited = "max" if host.version == "v2" else 9223372036854771712
    host.limit("", unlimited, 123)
    host.place("/a")
    host.limit("a", unlimited, 123)
    assert found(host) == (MACHINE, None)


def test_group_leaves_its_limit_without_what_is_used_for_good(host):
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
    host.limit("..", 1)  # above the mount: nothing of ours
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
    host.limit("..", 1)  # above the mount: nothing of ours
    assert found(host)[0] == 7000
    assert found(host)[1].samefile(limited)


@pytest.mark.parametrize("name", ["limit", "usage", "stat"])
@pytest.mark.parametrize("content", [None, "", "many\n", "\xff\n"])
def test_what_cannot_be_read_limits_nothing(host, name, content):
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
def test_system_that_says_nothing_of_groups_limits_nothing(host, name, content):
    host.limit("", 5000)
    path = host.root / "proc/self" / name
    path.unlink() if content is None else path.write_text(content)
    assert found(host) == (MACHINE, None)


@pytest.mark.parametrize(("value", "expected"), [(None, 1), ("8", 8), ("1", 1), ("0", 1), ("-3", 1), ("many", 1)])
def test_processes_of_a_machine_are_what_torchrun_says(monkeypatch, value, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert processes_per_machine() == expected


def test_real_machine_has_some_memory_and_not_more_than_is_there():
    assert 0 < available_memory().bytes <= psutil.virtual_memory().total
