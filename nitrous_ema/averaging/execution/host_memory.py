"""Large allocations of host memory: checked before allocation, pinned where possible, with a warning where not."""

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


def check_host_memory(num_bytes: int, purpose: str, remedy: str) -> None:
    """Raise if the memory is not available; warn if it is not enough for all processes of this machine together.

    Args:
        num_bytes: Bytes that are about to be allocated.
        purpose: What the memory is for, as it follows "memory for".
        remedy: What the user can do, as a sentence.

    Raises:
        NitrousError: Less memory is available.
    """
    available = available_memory()
    where = "available" if available.cgroup is None else f"available in the control group {available.cgroup}"
    if num_bytes > available.bytes:
        raise NitrousError(
            f"Not enough host memory for {purpose}: {format_bytes(num_bytes)} are needed, "
            f"{format_bytes(available.bytes)} are {where}. {remedy}"
        )
    processes = processes_per_machine()
    if processes * num_bytes > available.bytes:
        # Not an error: the other processes may have no EMA, or may have allocated their memory already.
        warn(
            f"{processes} processes share this machine (LOCAL_WORLD_SIZE). If each allocates host memory for "
            f"{purpose}, they need {format_bytes(processes * num_bytes)}; {format_bytes(available.bytes)} are {where} "
            f"now. {remedy} If all processes have the same parameters, an EMA in one of them is enough."
        )


def pinned_or_pageable(make: Callable[[bool], _Memory], purpose: str, remedy: str, *, pin: bool = True) -> _Memory:
    """Allocate pinned memory if possible; otherwise pageable memory, with a warning.

    Args:
        make: Allocates the memory, pinned or not. If it raises, it must not hold a part of the memory.
        purpose: What the memory is for, as it follows "memory for".
        remedy: What the user can do, as a sentence.
        pin: False: allocate pageable memory, without a warning.

    Raises:
        NitrousError: There is not enough pageable memory either.
    """
    if pin:
        try:
            return make(True)
        except (RuntimeError, MemoryError) as error:
            reason = str(error)
        # Not in the except block: until it ends, the error's traceback refers to the memory that make() had allocated.
        _free_pinned()
        warn(
            f"Pinned host memory for {purpose} could not be allocated ({reason}). Pageable memory is used instead, so "
            "copies from the device block the training thread."
        )
    try:
        return make(False)
    except (RuntimeError, MemoryError) as error:
        raise NitrousError(f"Not enough host memory for {purpose}: {error}. {remedy}") from error


def _free_pinned() -> None:
    """Return free pinned memory to the system, since torch would cache it while pageable memory is allocated."""
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in torch 2.6
    if empty_host_cache is not None and torch.accelerator.is_available():
        empty_host_cache()


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """Memory that can be allocated without swapping and without being killed by the kernel."""

    bytes: int
    cgroup: Path | None
    """Folder of the control group that sets the limit; None if the machine does."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Files of a control group in one version of their interface."""

    limit: str
    usage: str
    reclaimable: str
    """Line of ``memory.stat``: file pages that count as used, but that the kernel reclaims when memory is needed."""


def available_memory(root: Path = Path("/")) -> AvailableMemory:
    """Return the minimum of the machine's available memory and what each level of control groups leaves.

    Args:
        root: Folder that holds ``proc`` and the mount points; tests pass a folder of their own.
    """
    least = AvailableMemory(psutil.virtual_memory().available, None)
    with suppress(OSError, ValueError):
        for folder, names in _levels(root):
            remaining = _remaining_bytes(folder, names)
            if remaining is not None and remaining < least.bytes:
                least = AvailableMemory(remaining, folder)
    return least


def processes_per_machine() -> int:
    """Return the number of this training run's processes on this machine, if ``torchrun`` has started them; else 1.

    Source: torch.distributed.run, "Environment Variables".
    """
    with suppress(ValueError):
        return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return 1


def _levels(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Yield folders of this process's control groups that limit memory, from the innermost outwards."""
    groups: dict[_Names, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":  # version 2 (cgroups(7))
            groups[_V2] = group
        elif "memory" in controllers.split(","):
            groups[_V1] = group
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        names = _V2 if kind == "cgroup2" else _V1
        if kind != "cgroup2" and (kind != "cgroup" or "memory" not in options.split(",")):
            continue
        # Fields 4 and 5 are the root of the mount within its file system, and the mount point (proc_pid_mountinfo(5)).
        mounted_group, mount_point = mount.split(" ")[3:5]
        yield from ((folder, names) for folder in _folders(root, mount_point, mounted_group, groups.get(names)))


def _folders(root: Path, mount_point: str, mounted_group: str, group: str | None) -> list[Path]:
    """Return the folders of a group and of all mounted groups around it.

    A container often sees its own group alone, mounted as the root.
    """
    top = root / mount_point.lstrip("/")
    inner = Path(group or mounted_group)
    if ".." in inner.parts or not inner.is_relative_to(mounted_group):
        return [top]
    folder = top / inner.relative_to(mounted_group)
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]


def _remaining_bytes(folder: Path, names: _Names) -> int | None:
    """Return the bytes that a group's limit leaves; None if it has no limit, or its files cannot be read."""
    try:
        limit = int((folder / names.limit).read_text())  # "max" means no limit, and int() raises
        used = int((folder / names.usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(limit - used + int(stat.get(names.reclaimable, 0)), 0)
    except (OSError, ValueError):
        return None


# Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")
