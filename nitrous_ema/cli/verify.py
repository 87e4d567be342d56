"""``nitrous-ema verify``: reads every byte under a final name, and says of each bad file what to do."""

from __future__ import annotations

import argparse
from pathlib import Path

from nitrous_ema._base import exit_status
from nitrous_ema.cli.survey import legacy_sentence
from nitrous_ema.cli.terminal import log, show
from nitrous_ema.snapshots.snapshot import VerificationFailure
from nitrous_ema.snapshots.store import SnapshotStore


def run(options: argparse.Namespace) -> int:
    """Verify a folder; the exit status tells whether all is whole."""
    store = SnapshotStore(options.folder)
    by_file: dict[Path, list[VerificationFailure]] = {}
    for problem in store.verify():
        by_file.setdefault(problem.path, []).append(problem)
    for problems in by_file.values():
        more = f" {len(problems) - 1} more of its chunks are damaged." if len(problems) > 1 else ""
        show(problems[0].message + more)
    folders = {path.parent for path in by_file}
    misplaced = _misplaced(store, folders)
    for message in misplaced:
        show(message)
    for incomplete in store.incomplete():
        if incomplete.path not in folders:
            log(f"{incomplete.path} is not a snapshot (yet) and was passed over: {incomplete.reason}.")
    if by_file or misplaced:
        return exit_status.DAMAGED
    if store.runs():
        show("every snapshot is whole")
        return exit_status.DONE
    show(legacy_sentence(store.root, "verify") or f"{store.root} holds no snapshot")
    return exit_status.NOT_FOUND


def _misplaced(store: SnapshotStore, told: set[Path]) -> list[str]:
    """What is said of snapshots whose bytes are right, but that tell another history than their run's."""
    found: dict[Path, str] = {}
    for each in store.runs():
        for error in store.examine(each).damaged:
            if not told & {error.path, error.path.parent}:
                found[error.path] = str(error)
    return list(found.values())
