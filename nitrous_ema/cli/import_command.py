"""``nitrous-ema import``: a folder of nitrous-ema 0.0.1 or ema-pytorch, rewritten as snapshots of ours."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema._base.options import unknown_exclusions
from nitrous_ema.cli.terminal import log, paragraph, segments, show
from nitrous_ema.errors import SnapshotDamaged
from nitrous_ema.snapshots.legacy.conversion import Import, plan_import
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore


def run(options: argparse.Namespace) -> int:
    """Import a folder, or say what importing it would do."""
    with exit_status.usage_errors():
        old = LegacyFolder(options.folder, sigma_rels=options.sigma_rels, gammas=options.gammas)
        planned = plan_import(old, SnapshotStore(options.new), dtype=options.dtype, exclude=options.exclude)
    if unknown := unknown_exclusions(options.exclude, old.steps):
        log(unknown)
    found = _described(planned, options)
    if not options.json:
        show("\n".join(_lines(found)))
    written: list[Snapshot] = []

    def told(snapshot: Snapshot) -> None:
        written.append(snapshot)
        log(f"step {snapshot.step}: {format_bytes(snapshot.bytes)} ({len(written)} of {len(planned.steps)})")

    damaged = list(planned.damaged) if options.dry_run else planned.write_missing(told)
    found |= {"written": [each.step for each in written], "damaged": [_plain(error) for error in damaged]}
    show(json.dumps(found, indent=2) if options.json else "\n".join(_outcome(found)))
    return exit_status.DAMAGED if damaged else exit_status.DONE


def _described(planned: Import, options: argparse.Namespace) -> dict[str, Any]:
    """All that is said before anything is written, in plain values."""
    return {
        "folder": str(options.folder),
        "new": str(options.new),
        "run": planned.run,
        "dry_run": options.dry_run,
        "to_write": [each.stamp.step for each in planned.steps],
        "bytes_to_write": planned.bytes_to_write,
        "checkpoint_dtypes": sorted({each.layout.checkpoint_dtype for each in planned.steps}),
        "present": list(planned.present),
        "removed": list(planned.removed),
        "excluded": list(planned.excluded),
        "partial": [{"step": step, "sigma_rels": list(sigma_rels)} for step, sigma_rels in planned.partial],
        "damaged": [_plain(error) for error in planned.damaged],
    }


def _plain(error: SnapshotDamaged) -> dict[str, Any]:
    return {"path": str(error.path), "step": error.step, "message": str(error)}


def _lines(found: dict[str, Any]) -> list[str]:
    steps, types = found["to_write"], "/".join(found["checkpoint_dtypes"])
    known = {
        *steps,
        *found["present"],
        *found["removed"],
        *found["excluded"],
        *(each["step"] for each in found["damaged"]),
    }

    def named(chosen: list[int]) -> str:
        return segments(sorted(known), frozenset(chosen))

    told = [f"{found['folder']} -> {found['new']}: run {found['run']}"]
    if steps:
        told += paragraph(
            "to write:",
            f"{pluralize(len(steps), 'snapshot')}, {format_bytes(found['bytes_to_write'])}, averages as {types}: "
            f"{named(steps)}",
        )
    for title, key in (("there already:", "present"), ("left out:", "excluded")):
        told += paragraph(title, named(found[key])) if found[key] else []
    if found["removed"]:
        told += paragraph("removed since an import that was finished, so not written again:", named(found["removed"]))
    for each in found["partial"]:
        has = ", ".join(f"{sigma_rel:.4g}" for sigma_rel in each["sigma_rels"])
        told += paragraph(
            "note:", f"step {each['step']} has only the profile of sigma_rel {has}, and is taken over so."
        )
    for each in found["damaged"]:
        told += paragraph("damaged, not taken over:", each["message"])
    return told


def _outcome(found: dict[str, Any]) -> list[str]:
    if found["dry_run"]:
        return ["dry run: nothing was written."]
    told = [
        f"done: {pluralize(len(found['written']), 'snapshot')} written, {len(found['present'])} were there already."
    ]
    known = len(found["to_write"]) - len(found["written"])  # were found to be damaged only when they were read
    for each in found["damaged"][len(found["damaged"]) - known :]:
        told += paragraph("damaged, not taken over:", each["message"])
    if found["damaged"]:
        told.append("Put whole files in their place and import again: what is there is not written again.")
    return told
