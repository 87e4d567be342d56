"""``nitrous-ema verify``: read every byte of every committed file, and print each damaged file with its remedy."""

from __future__ import annotations

import argparse
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import pluralize
from nitrous_ema.cli.survey import legacy_sentence
from nitrous_ema.cli.terminal import log, show
from nitrous_ema.snapshots.nonfinite import nonfinite_text
from nitrous_ema.snapshots.snapshot import VerificationFailure
from nitrous_ema.snapshots.store import SnapshotStore


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Configuration of ``nitrous-ema verify``."""

    folder: Path
    """The snapshot folder."""


def configure(options: argparse.Namespace) -> VerifyConfig:
    """Return the configuration that the parsed options state."""
    return VerifyConfig(folder=options.folder)


def run(config: VerifyConfig) -> int:
    """Verify a folder; return the exit status: 0 intact, 3 no snapshot, 4 damaged."""
    store = SnapshotStore(config.folder).remembering()
    by_file: dict[Path, list[VerificationFailure]] = {}
    for failure in store.verify():
        by_file.setdefault(failure.path, []).append(failure)
    # One line per file, because the remedy is the same for all its chunks.
    for failures in by_file.values():
        more = f" {len(failures) - 1} more of its chunks are damaged." if len(failures) > 1 else ""
        show(failures[0].message + more)
    folders = {path.parent for path in by_file}
    misplaced = _misplaced(store, folders)
    for message in misplaced:
        show(message)
    for incomplete in store.incomplete():
        if incomplete.path not in folders:
            log(f"{incomplete.path} is not a complete snapshot and was skipped: {incomplete.reason}.")
    for message in _nonfinite(store):
        show(message)
    if by_file or misplaced:
        return exit_status.DAMAGED
    if store.runs():
        show("all snapshots are intact")
        return exit_status.DONE
    show(legacy_sentence(store.root, "verify") or f"{store.root} holds no snapshot{store.location_hint()}.")
    return exit_status.NOT_FOUND


def _nonfinite(store: SnapshotStore) -> list[str]:
    """Return a message on each run with snapshots that were written with values that are not finite."""
    messages = []
    for examined in store.examine_runs():
        run = examined.lineage[-1][0]
        found = [each for each in examined.snapshots if each.run == run and not each.is_finite]
        if found:
            messages.append(
                f"run {run}: {pluralize(len(found), 'snapshot')} as written, but with values that are not finite (inf "
                f"or nan), from step {found[0].step} on ({nonfinite_text(found[0])}). Synthesized averages that read "
                "them have such values, too."
            )
    return messages


def _misplaced(store: SnapshotStore, reported: Set[Path]) -> list[str]:
    """Return messages on snapshots whose bytes are intact but whose lineage contradicts their run's.

    Args:
        store: The folder.
        reported: Folders of files that are reported as damaged already.
    """
    found: dict[Path, str] = {}
    for examined in store.examine_runs():
        for error in examined.damaged:
            if not reported & {error.path, error.path.parent}:
                found[error.path] = str(error)
    return list(found.values())
