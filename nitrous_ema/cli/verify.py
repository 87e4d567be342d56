"""``nitrous-ema verify``: read every byte of every committed file, and print each damaged file with its remedy."""

from __future__ import annotations

import argparse
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import pluralize
from nitrous_ema.cli.survey import legacy_sentence
from nitrous_ema.cli.terminal import log, show, show_json
from nitrous_ema.snapshots.nonfinite import nonfinite_text
from nitrous_ema.snapshots.snapshot import VerificationFailure
from nitrous_ema.snapshots.store import SnapshotStore


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Configuration of ``nitrous-ema verify``."""

    folder: Path
    """The snapshot folder."""
    as_json: bool
    """Whether to print one JSON object instead of text."""


def configure(options: argparse.Namespace) -> VerifyConfig:
    """Return the configuration that the parsed options state."""
    return VerifyConfig(folder=options.folder, as_json=options.json)


def run(config: VerifyConfig) -> int:
    """Verify a folder; return the exit status: 0 intact, 3 no snapshot, 4 damaged."""
    store = SnapshotStore(config.folder).remembering()
    found = _described(store)
    if config.as_json:
        show_json(found)
    else:
        for each in found["incomplete"]:
            log(f"{each['path']} is not a complete snapshot and was skipped: {each['reason']}.")
        show(*_lines(found))
    if found["damaged"]:
        return exit_status.DAMAGED
    return exit_status.DONE if found["runs"] else exit_status.NOT_FOUND


def _described(store: SnapshotStore) -> dict[str, Any]:
    """Read all snapshots of a folder, and return what was found in values that JSON can hold."""
    by_file: dict[Path, list[VerificationFailure]] = {}
    for failure in store.verify():
        by_file.setdefault(failure.path, []).append(failure)
    # One entry per file, because the remedy is the same for all its chunks.
    damaged = {path: failures[0].message + _more_chunks(len(failures) - 1) for path, failures in by_file.items()}
    folders = {path.parent for path in by_file}
    damaged |= _misplaced(store, folders)
    incomplete = [each for each in store.incomplete() if each.path not in folders]
    runs = [each.lineage[-1][0] for each in store.examine_runs() if each.snapshots]
    hint = legacy_sentence(store.root, "verify") or f"{store.root} holds no snapshot{store.location_hint()}."
    return {
        "folder": str(store.root),
        "runs": runs,
        "damaged": [{"path": str(path), "message": message} for path, message in damaged.items()],
        "incomplete": [{"path": str(each.path), "reason": each.reason} for each in incomplete],
        "nonfinite": _nonfinite(store),
        "hint": "" if runs or damaged else hint,
    }


def _more_chunks(count: int) -> str:
    if count == 0:
        return ""
    return f" {count} more of its chunks are damaged." if count > 1 else " Another of its chunks is damaged."


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [each["message"] for each in (*found["damaged"], *found["nonfinite"])]
    if found["damaged"]:
        return lines
    return [*lines, found["hint"] or "all snapshots are intact"]


def _nonfinite(store: SnapshotStore) -> list[dict[str, Any]]:
    """Return a message on each run with snapshots that were written with values that are not finite."""
    messages = []
    for examined in store.examine_runs():
        run = examined.lineage[-1][0]
        found = [each for each in examined.snapshots if each.run == run and not each.is_finite]
        if found:
            message = (
                f"run {run}: {pluralize(len(found), 'snapshot')} as written, but with values that are not finite (inf "
                f"or nan), from step {found[0].step} on ({nonfinite_text(found[0])}). Synthesized averages that read "
                "them have such values, too."
            )
            messages.append({"run": run, "steps": [each.step for each in found], "message": message})
    return messages


def _misplaced(store: SnapshotStore, reported: Set[Path]) -> dict[Path, str]:
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
    return found
