"""``nitrous-ema import``: convert a folder of nitrous-ema 0.0.1 or ema-pytorch into a folder of snapshots."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema._base.dtypes import dtype_code
from nitrous_ema._base.options import unknown_exclusions
from nitrous_ema.cli.terminal import log, paragraph, show, show_json, step_ranges
from nitrous_ema.errors import SnapshotDamaged
from nitrous_ema.snapshots.legacy.conversion import Import, plan_import
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Configuration of ``nitrous-ema import``."""

    folder: Path
    """The old folder; it is only read."""
    new: Path
    """Folder of the snapshots; created if it does not exist."""
    legacy_sigma_rels: tuple[float, ...] | None
    """Profiles of the old folder, as lengths; None if ``legacy_gammas`` has them."""
    legacy_gammas: tuple[float, ...] | None
    """Profiles of the old folder, as exponents; None if ``legacy_sigma_rels`` has them."""
    dtype: str | None
    """Code of the type in which averages are stored; None for the type of the old files."""
    exclude: tuple[int, ...]
    """Steps to leave out."""
    dry_run: bool
    """Whether to print the plan and write nothing."""
    as_json: bool
    """Whether to print one JSON object instead of text."""


def configure(options: argparse.Namespace) -> ImportConfig:
    """Return the configuration that the parsed options state."""
    return ImportConfig(
        folder=options.folder,
        new=options.new,
        legacy_sigma_rels=None if options.tracked_sigma_rel is None else tuple(options.tracked_sigma_rel),
        legacy_gammas=None if options.tracked_gamma is None else tuple(options.tracked_gamma),
        dtype=dtype_code(options.dtype),
        exclude=tuple(options.exclude),
        dry_run=options.dry_run,
        as_json=options.json,
    )


def run(config: ImportConfig) -> int:
    """Convert a folder, or print the plan; return the exit status: 0 done, 4 some old files are damaged."""
    with exit_status.usage_errors():
        old = LegacyFolder(config.folder, sigma_rels=config.legacy_sigma_rels, gammas=config.legacy_gammas)
        planned = plan_import(old, SnapshotStore(config.new), dtype=config.dtype, exclude=config.exclude)
    if message := unknown_exclusions(config.exclude, old.steps):
        log(message)
    found = _described(planned, config)
    if not config.as_json:
        show(*_lines(found))
    written: list[Snapshot] = []

    def log_written(snapshot: Snapshot) -> None:
        written.append(snapshot)
        log(f"step {snapshot.step}: {format_bytes(snapshot.bytes)} ({len(written)} of {len(planned.steps)})")

    damaged = list(planned.damaged) if config.dry_run else planned.write_missing(log_written)
    found |= {"written": [each.step for each in written], "damaged": [_plain(error) for error in damaged]}
    if config.as_json:
        show_json(found)
    else:
        show(*_outcome(found))
    return exit_status.DAMAGED if damaged else exit_status.DONE


def _described(planned: Import, config: ImportConfig) -> dict[str, Any]:
    """Return the plan of an import in values that JSON can hold."""
    return {
        "folder": str(config.folder),
        "new": str(config.new),
        "run": planned.run,
        "dry_run": config.dry_run,
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
    """Return the plan as text."""
    steps, dtypes = found["to_write"], "/".join(found["checkpoint_dtypes"])
    known = {
        *steps,
        *found["present"],
        *found["removed"],
        *found["excluded"],
        *(each["step"] for each in found["damaged"]),
    }

    def ranges(chosen: list[int]) -> str:
        return step_ranges(sorted(known), frozenset(chosen))

    lines = [f"{found['folder']} -> {found['new']}: run {found['run']}"]
    if steps:
        lines += paragraph(
            "to write:",
            f"{pluralize(len(steps), 'snapshot')}, {format_bytes(found['bytes_to_write'])}, averages as {dtypes}: "
            f"{ranges(steps)}",
        )
    for title, key in (("already imported:", "present"), ("excluded:", "excluded")):
        lines += paragraph(title, ranges(found[key])) if found[key] else []
    if found["removed"]:
        lines += paragraph("deleted since a finished import, so not written again:", ranges(found["removed"]))
    for each in found["partial"]:
        existing = ", ".join(f"{sigma_rel:.4g}" for sigma_rel in each["sigma_rels"])
        lines += paragraph(
            "note:",
            f"step {each['step']} has only the profile of sigma_rel {existing}, and is imported without the others.",
        )
    for each in found["damaged"]:
        lines += paragraph("damaged, not imported:", each["message"])
    return lines


def _outcome(found: dict[str, Any]) -> list[str]:
    if found["dry_run"]:
        return ["dry run: nothing was written."]
    lines = [f"done: {pluralize(len(found['written']), 'snapshot')} written, {len(found['present'])} already imported."]
    # The plan has already listed files whose structure is damaged. Damage in tensor data is found only while writing.
    found_late = len(found["to_write"]) - len(found["written"])
    for each in found["damaged"][len(found["damaged"]) - found_late :]:
        lines += paragraph("damaged, not imported:", each["message"])
    if found["damaged"]:
        lines.append("Replace the damaged files and run the import again; imported snapshots are not written again.")
    return lines
