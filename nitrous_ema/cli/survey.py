"""The contents of a snapshot folder in values that JSON can hold, for ``inspect`` and for the notes of ``prune``."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nitrous_ema.cli.terminal import format_time
from nitrous_ema.snapshots.filesystem import ONLY_ONE_PASS, FileSystem
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.legacy.folder import files_by_step
from nitrous_ema.snapshots.names import (
    closed_note_name,
    dropped_note_name,
    is_one_pass_name,
    parse_folder_name,
    pin_note_name,
)
from nitrous_ema.snapshots.nonfinite import nonfinite_averages
from nitrous_ema.snapshots.snapshot import Listing, Snapshot
from nitrous_ema.snapshots.store import SnapshotStore


def survey(store: SnapshotStore, run: str | None = None) -> dict[str, Any]:
    """Return everything in a folder as its files' headers describe it; no tensor data is read.

    Damaged files are listed, not raised. A store that is ``remembering()`` reads each header once.

    Args:
        store: The folder.
        run: Last run of the lineage that the roles of the other runs refer to; by default the newest run.

    Raises:
        SnapshotNotFound: The folder or the run does not exist.
    """
    listing = store.examine(run)
    pins = store.pins()
    damaged = {str(error.path): str(error) for error in listing.damaged}
    runs = []
    for examined in store.examine_runs():
        damaged |= {str(error.path): str(error) for error in examined.damaged}
        runs.append(_described_run(store, examined, listing.lineage, pins))
    hidden = store.hidden()
    return {
        "folder": str(store.root),
        "run": listing.lineage[-1][0] if listing.lineage else None,
        "runs": runs,
        "incomplete": [{"path": str(each.path), "reason": each.reason} for each in store.incomplete()],
        "damaged": [{"path": path, "message": message} for path, message in damaged.items()],
        "temporary": [
            {"path": str(each.path), "bytes": each.bytes, "writer": each.writer} for each in store.temporary()
        ],
        "hidden": [{"path": str(path), "bytes": _bytes_in(store.files, path)} for path in hidden],
        "notes": _notes(store, runs, hidden),
        "disk": _disk(store, listing.snapshots[-1] if listing.snapshots else None),
    }


def writing_state(store: SnapshotStore, run: str, own: Sequence[Snapshot]) -> str:
    """Return whether a run may still write: "closed", or its trainer's state (see ``processes.process_state``)."""
    if store.is_closed(run):
        return "closed"
    return own[-1].trainer_state() if own else "unknown"


def _described_run(
    store: SnapshotStore, examined: Listing, selected: Lineage, pins: frozenset[tuple[int, str]]
) -> dict[str, Any]:
    run, lineage, own = examined.lineage[-1][0], examined.lineage, examined.snapshots
    state = writing_state(store, run, own)
    described: dict[str, Any] = {
        "run": run,
        "closed": state == "closed",
        "state": state,
        "role": _role(run, lineage, selected),
        "lineage": [list(ancestor) for ancestor in lineage],
        "bytes": sum(each.bytes for each in own),
    }
    if own:
        described |= _described_contents(own[-1])
    # None: the lineage ends with this run, so all its steps belong to it. 0: the run is outside the lineage.
    left_at = dict(selected).get(run, 0)
    described["snapshots"] = [
        _described_snapshot(each, pinned=(each.step, run) in pins, in_lineage=left_at is None or each.step <= left_at)
        for each in own
    ]
    return described


def _described_contents(last: Snapshot) -> dict[str, Any]:
    """Return what the newest snapshot of a run records about all of the run's snapshots."""
    layout = last.layout
    return {
        "trainer": dict(last.stamp.trainer),
        "sigma_rels": list(layout.sigma_rels),
        "gammas": list(layout.gammas),
        "checkpoint_dtype": layout.checkpoint_dtype,
        "tensors": len(layout.records),
        "average_elements": layout.average_elements,
    }


def _described_snapshot(snapshot: Snapshot, *, pinned: bool, in_lineage: bool) -> dict[str, Any]:
    return {
        "step": snapshot.step,
        "t": snapshot.t,
        "bytes": snapshot.bytes,
        "files": len(snapshot.paths),
        "written": format_time(snapshot.stamp.created_ns),
        "pinned": pinned,
        "in_history": in_lineage,
        "nonfinite": [
            each._asdict() for header in snapshot.headers for each in nonfinite_averages(header) if each is not None
        ],
        "path": str(snapshot.paths[0].parent),
    }


def _role(run: str, lineage: Lineage, selected: Lineage) -> str:
    """Return a run's role in the selected lineage.

    It is "newest" for the last run, "ancestor" for a run that was continued, "branch" for a run outside of the lineage
    that shares an ancestor with it, else "unrelated".
    """
    names = [name for name, _ in selected]
    if run in names:
        return "newest" if run == names[-1] else "ancestor"
    return "branch" if any(name in names for name, _ in lineage) else "unrelated"


def _notes(store: SnapshotStore, runs: list[dict[str, Any]], hidden: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the folder's marker files; one without its snapshot or run is ``stray``."""
    existing = {closed_note_name(each["run"]) for each in runs}
    existing |= {pin_note_name(snapshot["step"], each["run"]) for each in runs for snapshot in each["snapshots"]}
    existing |= {dropped_note_name(*known) for path in hidden if (known := parse_folder_name(path.name))}
    return [{"path": str(note), "stray": note.name not in existing} for note in store.notes()]


def _bytes_in(files: FileSystem, folder: Path) -> int:
    """Return the size of all files in a folder; what vanishes meanwhile or cannot be looked at counts as 0 bytes."""
    total = 0
    with suppress(OSError):  # such as a folder that is removed during the listing
        for name in files.list(folder):
            with suppress(OSError):
                status = files.lstat(folder / name)
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _disk(store: SnapshotStore, last: Snapshot | None) -> dict[str, Any]:
    free, size = store.free_bytes(), last.bytes if last else None
    is_in_one_pass = last is not None and any(is_one_pass_name(path.name) for path in last.paths)
    fit = None if free is None or size is None else free // size
    return {
        "free_bytes": free,
        "snapshot_bytes": size,
        "snapshots_that_fit": fit,
        "missing": store.missing_operations() + ([ONLY_ONE_PASS] if is_in_one_pass else []),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Folders of nitrous-ema 0.0.1 and ema-pytorch


def legacy_steps(root: Path) -> list[dict[str, Any]]:
    """Return the steps of a folder of ``{profile}.{step}.pt`` files, ascending; empty for any other folder."""
    found = files_by_step(root)
    return [
        {
            "step": step,
            "profiles": len(paths),
            "bytes": sum(FileSystem().lstat(path).st_size for path in paths.values()),
        }
        for step, paths in sorted(found.items())
    ]


def legacy_sentence(root: Path, command: str) -> str:
    """Return a message that an old folder needs other commands or options; an empty string for any other folder."""
    if not files_by_step(root):
        return ""
    limits = {
        "verify": "Their checksums are compared only when synthesis reads them. ",
        "prune": "The files do not record their profiles, so they cannot be pruned; nothing was changed. ",
    }
    return (
        f"{root} contains files of nitrous-ema 0.0.1 or ema-pytorch ({{profile}}.{{step}}.pt), not snapshots of this "
        f"version. {limits.get(command, '')}`nitrous-ema synthesize` reads them if --tracked-sigma-rel or "
        "--tracked-gamma names their profiles; `nitrous-ema import` converts them."
    )
