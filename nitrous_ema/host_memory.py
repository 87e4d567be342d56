"""Large amounts of host memory: judged before any is taken, pinned where that can be had, and told where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from nitrous_ema.errors import NitrousError, warn
from nitrous_ema.resources import available_memory, processes_per_machine
from nitrous_ema.sizes import amount

_Memory = TypeVar("_Memory")


def judge_host_memory(num_bytes: int, needed: str, remedy: str) -> None:
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
        raise NitrousError(f"No host memory for {needed}: {amount(available.bytes)} {left}. {remedy}")
    processes = processes_per_machine()
    if processes * num_bytes > available.bytes:
        # No error: the other processes may have no EMA, or have taken their memory already.
        warn(
            f"{processes} processes share this machine (LOCAL_WORLD_SIZE). If each keeps host memory for {needed}, "
            f"they need {amount(processes * num_bytes)}; {amount(available.bytes)} {left} now. {remedy} Where all of "
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
