"""``nitrous-ema inspect``: what is in a folder, for people or as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema.cli.coverage_report import asked, asked_lines, covered, covered_lines, old_profiles_given
from nitrous_ema.cli.survey import legacy_sentence, legacy_steps, survey
from nitrous_ema.cli.terminal import columns, elided, paragraph, show
from nitrous_ema.snapshots.store import SnapshotStore

_MOST_ROWS = 16
_STATES = {
    "closed": "closed",
    "alive": "its trainer, process {pid} of this host, is alive",
    "gone": "not closed, but its trainer, process {pid} of this host, is gone",
    "elsewhere": "not closed; its trainer is process {pid} of host {host}",
    "unknown": "not closed; who writes it is not known",
}


def run(options: argparse.Namespace) -> int:
    """List a folder."""
    store = SnapshotStore(options.folder)
    is_old, asks = old_profiles_given(options), options.sigma_rel is not None or options.gamma is not None
    if options.step is not None and not asks:
        raise exit_status.UsageError(
            "--step says where the averages of --sigma-rel or --gamma end; give one of these too."
        )
    found = survey(store, options.run)
    if not found["runs"]:
        found["legacy"] = legacy_steps(store.root)
        if asks and not is_old and (sentence := legacy_sentence(found["folder"], "inspect")):
            raise exit_status.UsageError(sentence)
    with exit_status.usage_errors():
        found["covered"] = covered(options, store) if found["runs"] or is_old else None
        found["asked"] = asked(options, store) if asks else []
    show(json.dumps(found, indent=2) if options.json else "\n".join(_lines(found, everything=options.all)))
    return exit_status.DONE


def _lines(found: dict[str, Any], *, everything: bool) -> list[str]:
    """A survey, for people."""
    disk, most = found["disk"], 10**9 if everything else _MOST_ROWS
    lines = [found["folder"] if found["runs"] or found["legacy"] else f"{found['folder']} holds no snapshot"]
    if disk["free_bytes"] is not None:
        fit = disk["snapshots_that_fit"]
        more = (
            "" if fit is None else f": {pluralize(fit, 'more snapshot')} of {format_bytes(disk['snapshot_bytes'])} fit"
        )
        lines.append(f"disk       {format_bytes(disk['free_bytes'])} free{more}")
    for each in found["runs"]:
        lines += ["", *_run_lines(each, found["run"], most)]
    lines += _legacy_lines(found, most)
    lines += ["", *covered_lines(found["covered"])] if found["covered"] else []
    for each in found["asked"]:
        lines += ["", *asked_lines(each)]
    lines += _section("incomplete", [f"{each['path']}: {each['reason']}" for each in found["incomplete"]])
    lines += _section("temporary files", [_temporary_line(each) for each in found["temporary"]])
    lines += _section("damaged", [each["message"] for each in found["damaged"]])
    hidden = [f"{each['path']}: {format_bytes(each['bytes'])}" for each in found["hidden"]]
    lines += _section("hidden; the next prune removes it, or a run that starts ten minutes later", hidden)
    lines += _section("notes on what is not there", [each["path"] for each in found["notes"] if each["stray"]])
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
        f"  tensors    {run['tensors']}; {run['average_elements']:,} averaged numbers per profile as "
        f"{run['checkpoint_dtype']}",
        f"  snapshots  {len(rows)}, {format_bytes(run['bytes'])}",
        *columns([["step", "t", "size", "written", ""], *elided(rows, most=most, word="(--all)")], indent="    "),
    ]


def _readers(run: dict[str, Any], newest: str) -> str:
    """Which of a run's snapshots readers take."""
    taken = [each["step"] for each in run["snapshots"] if each["in_history"]]
    left = len(run["snapshots"]) - len(taken)
    choose = "--run takes it"
    if run["role"] == "newest":
        return "take this run and what it continues" if run["lineage"][:-1] else "take this run"
    if run["role"] == "ancestor":
        abandoned = f"; {left} later than that are an abandoned future: {choose}" if left else ""
        return f"take its snapshots up to step {taken[-1] if taken else 0}{abandoned}"
    if run["role"] == "branch":
        return f"pass it over: an abandoned future beside that of run {newest}; {choose}"
    return f"pass it over: unrelated to run {newest}; {choose}"


def _marks(snapshot: dict[str, Any]) -> str:
    files = f"{snapshot['files']} files" if snapshot["files"] > 1 else ""
    return ", ".join(filter(None, ("pinned" if snapshot["pinned"] else "", files)))


def _temporary_line(temporary: dict[str, Any]) -> str:
    writers = {
        "alive": "being written by a process of this host",
        "gone": "left by a process that is gone; the next run that starts here removes it",
        "elsewhere": "written by a process of another host or container, which may be alive",
        "unknown": "nobody knows by whom; remove it by hand if no process writes here",
    }
    return f"{temporary['path']}: {format_bytes(temporary['bytes'])}, {writers[temporary['writer']]}"


def _legacy_lines(found: dict[str, Any], most: int) -> list[str]:
    if not found.get("legacy"):
        return []
    rows = [[f"{each['step']}", f"{each['profiles']}", format_bytes(each["bytes"])] for each in found["legacy"]]
    table = columns([["step", "profiles", "size"], *elided(rows, most=most, word="(--all)")])
    return ["", *paragraph("", legacy_sentence(found["folder"], "inspect")), *table]


def _section(title: str, entries: list[str]) -> list[str]:
    return ["", title, *(f"  {entry}" for entry in entries)] if entries else []
