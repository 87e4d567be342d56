"""Whether there is host memory for snapshots on their way: judged before any is taken, pinned where that can be had."""

from __future__ import annotations

import torch

from nitrous_ema.async_.staging import SlotPool
from nitrous_ema.errors import NitrousError, warn
from nitrous_ema.resources import available_memory, processes_per_machine
from nitrous_ema.sizes import amount
from nitrous_ema.snapshots.format import Layout

_LESS = "Lower max_pending, or store averages in half the bytes (checkpoint_dtype=torch.float16)."


def make_pool(layout: Layout, num_slots: int, pin: bool) -> SlotPool:
    """Allocate slots for snapshots.

    Warns where they are pageable though they should be pinned, and where the processes of this machine cannot all have
    as many.

    Args:
        layout: Of the files.
        num_slots: How many snapshots can be on their way at once.
        pin: Pin them; what cannot be pinned is pageable.

    Raises:
        NitrousError: There is not that much memory.
    """
    needed = f"{num_slots} snapshots (max_pending) of {amount(layout.data_bytes)} each"
    _judge(num_slots * layout.data_bytes, needed)
    if pin:
        try:
            return SlotPool(layout, num_slots, pin=True)
        except (RuntimeError, MemoryError) as error:
            reason = str(error)
        _free_pinned()  # only now: the error held on to the slots that were made
        warn(f"No pinned host memory for {needed} ({reason}); using pageable memory, from which copies block.")
    try:
        return SlotPool(layout, num_slots, pin=False)
    except (RuntimeError, MemoryError) as error:
        raise NitrousError(f"No host memory for {needed}: {error}. {_LESS}") from error


def _judge(slot_bytes: int, needed: str) -> None:
    """Refuse what this process cannot have; warn of what all of this machine cannot have together."""
    available = available_memory()
    left = "are available" if available.cgroup is None else f"are left by the control group {available.cgroup}"
    if slot_bytes > available.bytes:
        raise NitrousError(f"No host memory for {needed}: {amount(available.bytes)} {left}. {_LESS}")
    processes = processes_per_machine()
    if processes * slot_bytes > available.bytes:
        # No error: the other processes may have no EMA, or have taken their memory already.
        warn(
            f"{processes} processes share this machine (LOCAL_WORLD_SIZE). If each keeps host memory for {needed}, "
            f"they need {amount(processes * slot_bytes)}; {amount(available.bytes)} {left} now. {_LESS} Where all of "
            "them have the same parameters, an EMA in one of them is enough."
        )


def _free_pinned() -> None:
    """Give pinned memory back to the system: torch would keep it for later, while pageable memory is taken instead."""
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in torch 2.6
    if empty_host_cache is not None and torch.accelerator.is_available():
        empty_host_cache()
