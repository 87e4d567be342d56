"""Large amounts of host memory: judged before any is taken, pinned where that can be had, and told where it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from nitrous_ema._base.arguments import format_bytes
from nitrous_ema.errors import NitrousError, warn

_Memory = TypeVar("_Memory")


def check_host_memory(num_bytes: int, needed: str, remedy: str) -> None:
    """Refuse what this process cannot have; warn of what all of this machine cannot have together.

    Args:
        num_bytes: How much is going to be taken.
        needed: What for, as it follows "memory for".
        remedy: A sentence.

    Raises:
        NitrousError: There is not that much.
    """
    available = available_memory()
    left = "are available" if available.cgroup is None else f"are left by the control group {available.cgroup}"
    if num_bytes > available.bytes:
        raise NitrousError(f"No host memory for {needed}: {format_bytes(available.bytes)} {left}. {remedy}")
    processes = processes_per_machine()
    if processes * num_bytes > available.bytes:
        # No error: the other processes may have no EMA, or have taken their memory already.
        warn(
            f"{processes} processes share this machine (LOCAL_WORLD_SIZE). If each keeps host memory for {needed}, "
            f"they need {format_bytes(processes * num_bytes)}; {format_bytes(available.bytes)} {left} now. {remedy} Where all of "
            "them have the same parameters, an EMA in one of them is enough."
        )


def pinned_or_pageable(make: Callable[[bool], _Memory], needed: str, remedy: str, *, pin: bool = True) -> _Memory:
    """Take memory, pinned if that can be had; otherwise pageable memory, with a warning.

    Args:
        make: Takes it, pinned or not; keeps nothing of it where it raises.
        needed: What for, as it follows "memory for".
        remedy: A sentence.
        pin: False: pageable memory is what is wanted.

    Raises:
        NitrousError: There is not even pageable memory.
    """
    if pin:
        try:
            return make(True)
        except (RuntimeError, MemoryError) as error:
            reason = str(error)
        _free_pinned()  # only now: the error held on to what was made
        warn(f"No pinned host memory for {needed} ({reason}); using pageable memory, from which copies block.")
    try:
        return make(False)
    except (RuntimeError, MemoryError) as error:
        raise NitrousError(f"No host memory for {needed}: {error}. {remedy}") from error


def _free_pinned() -> None:
    """Give pinned memory back to the system: torch would keep it for later, while pageable memory is taken instead."""
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in torch 2.6
    if empty_host_cache is not None and torch.accelerator.is_available():
        empty_host_cache()


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


# Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


_V2 = _Names("memory.max", "memory.current", "inactive_file")
