"""``nitrous-ema inspect``: list a snapshot folder and the lengths that it supports, as text or as JSON."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema.cli.coverage_report import LengthRequest, coverage, coverage_lines, prediction_lines, predictions
from nitrous_ema.cli.survey import legacy_sentence, legacy_steps, survey
from nitrous_ema.cli.terminal import columns, elide_rows, paragraph, show, show_json
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.snapshots.nonfinite import NonFiniteAverage
from nitrous_ema.snapshots.store import SnapshotStore

_MOST_ROWS = 16
_STATES = {
    "closed": "closed",
    "alive": "its trainer, process {pid} on this host, is running",
    "gone": "not closed, but its trainer, process {pid} on this host, has ended",
    "elsewhere": "not closed; its trainer is process {pid} on host {host}",
    "unknown": "not closed; its trainer is unknown",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Configuration of ``nitrous-ema inspect``."""

    folder: Path
    """The snapshot folder, or an old folder."""
    run: str | None
    """Run that the other runs are compared with; None for the newest."""
    all_rows: bool
    """Whether long tables are printed in full."""
    verbose: bool
    """Whether to print condition numbers and bounds of predictions."""
    as_json: bool
    """Whether to print one JSON object instead of text."""
    request: LengthRequest | None
    """Averages whose errors are predicted; None without ``--sigma-rel`` and ``--gamma``."""
    exclude: tuple[int, ...]
    """Steps to ignore."""
    legacy_sigma_rels: tuple[float, ...] | None
    """Profiles of an old folder, as lengths."""
    legacy_gammas: tuple[float, ...] | None
    """Profiles of an old folder, as exponents."""

    @property
    def is_legacy(self) -> bool:
        """Whether the user has named the profiles of an old folder."""
        return self.legacy_sigma_rels is not None or self.legacy_gammas is not None


def configure(options: argparse.Namespace) -> InspectConfig:
    """Return the configuration that the parsed options state.

    Raises:
        UsageError: ``--step`` without a length.
    """
    request = None
    if options.sigma_rel is not None or options.gamma is not None:
        request = LengthRequest(
            sigma_rels=options.sigma_rel, gammas=options.gamma, steps=options.step, tolerance=options.tolerance
        )
    elif options.step is not None:
        raise exit_status.UsageError(
            "--step needs the lengths of the averages that end at these steps; pass --sigma-rel or --gamma, too."
        )
    return InspectConfig(
        folder=options.folder,
        run=options.run,
        all_rows=options.all,
        verbose=options.verbose,
        as_json=options.json,
        request=request,
        exclude=tuple(options.exclude),
        legacy_sigma_rels=None if options.tracked_sigma_rel is None else tuple(options.tracked_sigma_rel),
        legacy_gammas=None if options.tracked_gamma is None else tuple(options.tracked_gamma),
    )


def run(config: InspectConfig) -> int:
    """Print the contents of a folder; return the exit status."""
    store = SnapshotStore(config.folder).remembering()
    found = survey(store, config.run)
    found["legacy"], found["legacy_note"] = legacy_steps(store.root), store.legacy_note() if found["runs"] else ""
    found["hint"] = "" if found["runs"] or found["legacy"] else store.location_hint()
    if config.request and not found["runs"] and found["legacy"] and not config.is_legacy:
        raise exit_status.UsageError(legacy_sentence(store.root, "inspect"))
    with exit_status.usage_errors():
        source = _source(config, store)
        found["covered"] = coverage(source, config.run, config.exclude) if found["runs"] or config.is_legacy else None
        found["asked"] = predictions(source, config.request, config.run, config.exclude) if config.request else []
    if config.as_json:
        show_json(found)
    else:
        show(*_lines(found, all_rows=config.all_rows, verbose=config.verbose))
    return exit_status.DONE if found["runs"] or found["legacy"] else exit_status.NOT_FOUND


def _source(config: InspectConfig, store: SnapshotStore) -> SnapshotStore | LegacyFolder:
    if not config.is_legacy:
        return store
    return LegacyFolder(config.folder, sigma_rels=config.legacy_sigma_rels, gammas=config.legacy_gammas)


def _lines(found: dict[str, Any], *, all_rows: bool, verbose: bool) -> list[str]:
    """Return a survey as text."""
    disk, most = found["disk"], 10**9 if all_rows else _MOST_ROWS
    is_empty = not (found["runs"] or found["legacy"])
    lines = [f"{found['folder']} holds no snapshot{found['hint']}." if is_empty else found["folder"]]
    if disk["free_bytes"] is not None:
        fit = disk["snapshots_that_fit"]
        space = (
            ""
            if fit is None
            else f": space for {pluralize(fit, 'more snapshot')} of {format_bytes(disk['snapshot_bytes'])}"
        )
        lines.append(f"disk       {format_bytes(disk['free_bytes'])} free{space}")
    for missing in disk["missing"]:
        lines += paragraph("           ", missing)
    for each in found["runs"]:
        lines += ["", *_run_lines(each, found["run"], most)]
    lines += _legacy_lines(found, most)
    lines += ["", *coverage_lines(found["covered"])] if found["covered"] else []
    for each in found["asked"]:
        lines += ["", *prediction_lines(each, verbose=verbose)]
    lines += _section("incomplete", [f"{each['path']}: {each['reason']}" for each in found["incomplete"]])
    lines += _section("temporary files", [_temporary_line(each) for each in found["temporary"]])
    lines += _section("damaged", [each["message"] for each in found["damaged"]])
    hidden = [f"{each['path']}: {format_bytes(each['bytes'])}" for each in found["hidden"]]
    lines += _section("hidden (the next prune deletes them, or a run that starts at least ten minutes later)", hidden)
    stray = [each["path"] for each in found["notes"] if each["stray"]]
    lines += _section("markers of snapshots or runs that do not exist", stray)
    return lines


def _run_lines(run: dict[str, Any], newest: str, most: int) -> list[str]:
    trainer = {"pid": "?", "host": "?", **run.get("trainer", {})}
    lines = [f"run {run['run']} ({_STATES[run['state']].format(**trainer)})"]
    lines += paragraph("  readers   ", _readers(run, newest))
    ancestors = [f"{name} up to step {step}" for name, step in run["lineage"][:-1]]
    if ancestors:
        lines += paragraph("  continues ", ", then ".join(ancestors))
    if not run["snapshots"]:
        return lines
    profiles = zip(run["sigma_rels"], run["gammas"], strict=True)
    rows = [
        [f"{each['step']}", f"{each['t']}", format_bytes(each["bytes"]), each["written"], _marks(each)]
        for each in run["snapshots"]
    ]
    return [
        *lines,
        f"  profiles   {', '.join(f'sigma_rel {sigma:g} (gamma {gamma:.4g})' for sigma, gamma in profiles)}",
        f"  tensors    {run['tensors']}; {run['average_elements']:,} averaged elements per profile, stored as "
        f"{run['checkpoint_dtype']}",
        f"  snapshots  {len(rows)}, {format_bytes(run['bytes'])}",
        *_nonfinite_lines(run["snapshots"]),
        *columns([["step", "t", "size", "written", ""], *elide_rows(rows, most=most, hint="(--all)")], indent="    "),
    ]


def _readers(run: dict[str, Any], newest: str) -> str:
    """Return which of a run's snapshots readers use by default, and how to select the run."""
    used = [each["step"] for each in run["snapshots"] if each["in_history"]]
    later = len(run["snapshots"]) - len(used)
    select = f"--run {run['run']} selects it"
    if run["role"] == "newest":
        return "use this run and the runs that it continues" if run["lineage"][:-1] else "use this run"
    if run["role"] == "ancestor":
        are = "is" if later == 1 else "are"
        abandoned = f"; {pluralize(later, 'later snapshot')} {are} abandoned ({select})" if later else ""
        return f"use its snapshots up to step {used[-1] if used else 0}{abandoned}"
    if run["role"] == "branch":
        return f"ignore it: not in the lineage of run {newest}, though it shares earlier snapshots ({select})"
    return f"ignore it: unrelated to run {newest} ({select})"


def _marks(snapshot: dict[str, Any]) -> str:
    files = f"{snapshot['files']} files" if snapshot["files"] > 1 else ""
    nonfinite = "not finite" if snapshot["nonfinite"] else ""
    return ", ".join(filter(None, ("pinned" if snapshot["pinned"] else "", files, nonfinite)))


def _nonfinite_lines(snapshots: list[dict[str, Any]]) -> list[str]:
    """Return how many of a run's snapshots have values that are not finite, and what the first one records."""
    found = [each for each in snapshots if each["nonfinite"]]
    if not found:
        return []
    first = "; ".join(str(NonFiniteAverage(**each)) for each in found[0]["nonfinite"])
    return paragraph(
        "  not finite",
        f"{pluralize(len(found), 'snapshot')}, from step {found[0]['step']} on, with values that are inf or nan "
        f"({first})",
    )


def _temporary_line(temporary: dict[str, Any]) -> str:
    writers = {
        "alive": "being written by a process on this host",
        "gone": "left by a process that has ended; the next run that starts here deletes it",
        "elsewhere": "written by a process on another host or in another container, which may still be running",
        "unknown": "owner unknown; delete it manually once no process is writing to this folder",
    }
    return f"{temporary['path']}: {format_bytes(temporary['bytes'])}, {writers[temporary['writer']]}"


def _legacy_lines(found: dict[str, Any], most: int) -> list[str]:
    if not found.get("legacy"):
        return []
    rows = [[f"{each['step']}", f"{each['profiles']}", format_bytes(each["bytes"])] for each in found["legacy"]]
    table = columns([["step", "profiles", "size"], *elide_rows(rows, most=most, hint="(--all)")])
    note = found["legacy_note"] or legacy_sentence(found["folder"], "inspect")
    return ["", *paragraph("", note), *table]


def _section(title: str, entries: list[str]) -> list[str]:
    return ["", title, *(f"  {entry}" for entry in entries)] if entries else []
