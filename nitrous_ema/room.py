"""Whether the disk has room for the snapshots of a training, judged before it begins."""

from __future__ import annotations

import logging

from nitrous_ema.errors import SnapshotError, warn
from nitrous_ema.sizes import amount
from nitrous_ema.snapshots.format import parse_folder_name
from nitrous_ema.snapshots.store import SnapshotStore

_log = logging.getLogger(__name__)

_FEW = 20
"""Where ``keep`` sets no bound: fewer snapshots than this are soon too few."""

_REMEDY = (
    "Free some space there, choose another folder (checkpoint_folder), let fewer snapshots stay (keep=), or store "
    "averages in half the bytes (checkpoint_dtype=torch.float16)."
)


def judge_room(store: SnapshotStore, snapshot_bytes: int, most_snapshots: int | None) -> None:
    """Say how many snapshots fit, and object if these are none, or fewer than will be wanted.

    Nothing is judged where the file system does not tell what is free.

    Args:
        store: Where they will go; its folder exists. Snapshots that are there count as room for those of a rule that
            has a bound: it drops them as others come.
        snapshot_bytes: Size of one, on the disk of this process.
        most_snapshots: How many may be on disk at once; None: any number.

    Raises:
        SnapshotError: Not even one fits.
    """
    free_bytes = store.free_bytes()
    if free_bytes is None:
        _log.info("a snapshot is %s; %s does not tell how many fit", amount(snapshot_bytes), store.root)
        return
    fitting = free_bytes // snapshot_bytes
    _log.info("a snapshot is %s; %d fit into what is free in %s", amount(snapshot_bytes), fitting, store.root)
    facts = f"A snapshot needs {amount(snapshot_bytes)}, and {amount(free_bytes)} are free in {store.root}"
    if not fitting:
        raise SnapshotError(f"{facts}: not even one fits. {_REMEDY}", path=store.root)
    there = sum(parse_folder_name(name) is not None for name in store.files.list(store.root))
    if most_snapshots is None and fitting < _FEW:
        told = "and keep= sets no bound"
    elif most_snapshots is not None and fitting + there < most_snapshots:
        told = f"besides the {there} that are there, and keep= lets {most_snapshots} be there at once"
    else:
        return
    warn(f"{facts}: only {fitting} fit, {told}. {_REMEDY}")
