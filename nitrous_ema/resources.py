"""How much memory this process may still use, and with how many it shares that.

It is what the machine has, and what the process's control group leaves.

In a container the machine's free memory is not for us alone to take: the kernel kills whoever goes beyond the limit of
the control group. Nothing here raises: what cannot be read, or says something else than expected, limits nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """Memory that can be had without swapping and without being killed for it."""

    bytes: int
    cgroup: Path | None
    """The control group (its folder) that leaves less than the machine has; None if none does."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Files of a control group in one version of their interface."""

    limit: str
    usage: str
    reclaimable: str
    """Line of ``memory.stat``: file pages that count as used, but are given up for the asking."""


# Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> AvailableMemory:
    """The least of what the machine has available and what this process's control groups leave, at every level.

    Args:
        root: Folder that holds ``proc`` and what is mounted; tests put a made-up one here.
    """
    least = AvailableMemory(psutil.virtual_memory().available, None)
    with suppress(OSError, ValueError):
        for folder, names in _levels(root):
            left = _left_bytes(folder, names)
            if left is not None and left < least.bytes:
                least = AvailableMemory(left, folder)
    return least


def processes_per_machine() -> int:
    """How many processes of this training run share this machine, if ``torchrun`` has started it; else 1.

    Source: torch.distributed.run, "Environment Variables".
    """
    with suppress(ValueError):
        return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return 1


def _levels(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Folders of this process's control groups with a say about memory, from the innermost outwards."""
    groups: dict[_Names, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            groups[_V2] = group
        elif "memory" in controllers.split(","):
            groups[_V1] = group
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        names = _V2 if kind == "cgroup2" else _V1
        if kind != "cgroup2" and (kind != "cgroup" or "memory" not in options.split(",")):
            continue
        mounted_group, mount_point = mount.split(" ")[3:5]
        yield from ((folder, names) for folder in _folders(root, mount_point, mounted_group, groups.get(names)))


def _folders(root: Path, mount_point: str, mounted_group: str, group: str | None) -> list[Path]:
    """Of a group and of all groups around it that are mounted. A container often sees only its own, as the root."""
    top = root / mount_point.lstrip("/")
    inner = Path(group or mounted_group)
    if ".." in inner.parts or not inner.is_relative_to(mounted_group):
        return [top]
    folder = top / inner.relative_to(mounted_group)
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]


def _left_bytes(folder: Path, names: _Names) -> int | None:
    """What a group leaves; None if it has no limit, or does not say."""
    try:
        limit = int((folder / names.limit).read_text())  # "max" is no number, and no limit
        used = int((folder / names.usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(limit - used + int(stat.get(names.reclaimable, 0)), 0)
    except (OSError, ValueError):
        return None
