"""``nitrous-ema prune``: thins the snapshots of a finished run, and pins those that must stay.

Everything is chosen and checked before anything is touched. Then, in this order: pins are taken away and set; what goes
is hidden, all of it at once, so that no reader that comes later sees a half-thinned history; then it is removed.

What is hidden is removed right away by default. Whoever prunes mostly has a full disk, and readers at work are not
hurt: they keep their files open, which keeps the bytes until they are done. Only a synthesis of more than 128 files
opens each of them again and again; it ends with the advice to start again, never with a wrong number. ``--grace`` gives
it time: for so long the hidden files can still be read. If this process is interrupted meanwhile, the next prune of the
folder removes what was hidden, and so does a run that starts there ten minutes later or is out of room.

P1  Nothing is touched before all is checked.              test_refused_prune_changes_nothing
P2  Only snapshots of the one history are touched.         test_prune_touches_its_own_history_only
P3  Pins are durable before anything is hidden, and all    test_pins_come_first_then_hiding_then_removal
    is hidden before anything is removed.
P4  What is hidden can be read while the grace lasts.      test_hidden_files_stay_readable_during_the_grace
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema.cli.prune_plan import PrunePlan, PruneTarget, lines, plan_pruning
from nitrous_ema.cli.survey import legacy_sentence, survey
from nitrous_ema.cli.terminal import paragraph, show
from nitrous_ema.errors import SnapshotDamaged, SnapshotNotFound
from nitrous_ema.snapshots.names import parse_folder_name
from nitrous_ema.snapshots.snapshot import Listing, Snapshot
from nitrous_ema.snapshots.store import SnapshotStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Which steps of a history are pinned, and what changes."""

    before: frozenset[int]
    add: tuple[Snapshot, ...]
    remove: tuple[tuple[int, str], ...]
    """(step, run) of notes; the snapshot may be gone."""

    @property
    def after(self) -> frozenset[int]:
        """Pinned steps once all is done."""
        return (self.before - {step for step, _ in self.remove}) | {each.step for each in self.add}


def run(options: argparse.Namespace) -> int:
    """Prune a folder, or say what pruning would do."""
    store = SnapshotStore(options.folder)
    wish = _wish(options)
    history = _history(store, options)
    snapshots = [each for each in history.snapshots if each.step not in options.exclude]
    pins = _pins(store, history, snapshots, options)
    thinning: PrunePlan | None = None
    if wish is not None:
        with exit_status.usage_errors():
            thinning = plan_pruning(snapshots, pins.after, wish)
    found = _described(store, history, options, pins, thinning)
    if not options.json:
        show("\n".join(_lines(found)))
    if not options.dry_run:
        found |= _carry_out(store, pins, thinning, options.grace)
    show(json.dumps(found, indent=2) if options.json else _outcome(found))
    return exit_status.DONE


def _wish(options: argparse.Namespace) -> PruneTarget | None:
    """How much is to stay; None if the command only pins."""
    if options.keep is None and options.budget is None and options.error is None:
        if options.pin or options.unpin:
            return None
        raise exit_status.UsageError(
            "how much is to stay? Give one of --keep N, --budget BYTES and --error E (or only --pin or --unpin)."
        )
    return PruneTarget(
        keep=options.keep, budget_bytes=options.budget, error=options.error, sigma_rels=options.sigma_rel
    )


def _history(store: SnapshotStore, options: argparse.Namespace) -> Listing:
    """What there is to choose from, if all of it can be read."""
    history = store.examine(options.run)
    damaged = [error for error in history.damaged if _step(error.path) not in options.exclude]
    if damaged:
        more = f" So are {len(damaged) - 1} more of this history: `nitrous-ema verify` lists them." * (len(damaged) > 1)
        raise SnapshotDamaged(
            f"{damaged[0]}{more} Nothing was changed.", path=damaged[0].path, step=_step(damaged[0].path), chunk=None
        )
    if not any(each.step not in options.exclude for each in history.snapshots):
        if legacy := legacy_sentence(store.root, "prune"):
            raise exit_status.UsageError(legacy)
        raise SnapshotNotFound(f"{store.root} holds no snapshot to choose from.", path=store.root, nearest=())
    return history


def _step(path: Path) -> int | None:
    """The step of a snapshot's folder, or of a file in it."""
    known = parse_folder_name(path.name) or parse_folder_name(path.parent.name)
    return known[0] if known else None


def _pins(store: SnapshotStore, history: Listing, snapshots: Sequence[Snapshot], options: argparse.Namespace) -> Pins:
    notes, runs = store.pins(), {name for name, _ in history.lineage}
    by_step = {each.step: each for each in snapshots}
    remove = []
    for step in options.unpin:
        ours = [note for note in notes if note[0] == step and note[1] in runs]
        if not ours and step not in by_step:
            raise _no_such_step(store, history, step, list(by_step))
        remove += ours
    for step in options.pin:
        if step not in by_step:
            raise _no_such_step(store, history, step, list(by_step))
    return Pins(
        before=frozenset(each.step for each in snapshots if (each.step, each.run) in notes),
        add=tuple(by_step[step] for step in options.pin),
        remove=tuple(remove),
    )


def _no_such_step(store: SnapshotStore, history: Listing, step: int, there: Sequence[int]) -> SnapshotNotFound:
    sides = [max((s for s in there if s < step), default=None), min((s for s in there if s > step), default=None)]
    nearest = tuple(side for side in sides if side is not None)
    return SnapshotNotFound(
        f"{store.root} has no snapshot of step {step} in the history of run {history.lineage[-1][0]}; nearest steps "
        f"there: {' and '.join(map(str, nearest))}. Nothing was changed.",
        path=store.root,
        nearest=nearest,
    )


def _carry_out(store: SnapshotStore, pins: Pins, thinning: PrunePlan | None, grace: float) -> dict[str, int]:
    """Do it, in the order in which it is safe; returns the bytes hidden and removed."""
    for step, owner in pins.remove:
        store.unpin(step, owner)
    for each in pins.add:
        store.pin(each.step, each.run)
    if thinning is None:
        return {}
    hidden = store.hide(thinning.dropped)
    if hidden and grace:
        time.sleep(grace)
    return {"bytes_hidden": hidden, "bytes_removed": store.remove_hidden()}


def _described(
    store: SnapshotStore, history: Listing, options: argparse.Namespace, pins: Pins, thinning: PrunePlan | None
) -> dict[str, Any]:
    """All that is said, in plain values."""
    last = history.lineage[-1][0]
    surveyed = survey(store, last)
    states = {each["run"]: each for each in surveyed["runs"]}
    return {
        "folder": str(options.folder),
        "run": last,
        "lineage": [list(ancestor) for ancestor in history.lineage],
        "dry_run": options.dry_run,
        "state": states[last]["state"],
        "trainer": states[last].get("trainer", {}),
        "pinned": sorted(pins.after),
        "pinned_now": [each.step for each in pins.add],
        "unpinned_now": [step for step, _ in pins.remove],
        "excluded": sorted(options.exclude),
        "left_alone": _left_alone(surveyed, options.folder),
        "thinning": thinning.described() if thinning else None,
    }


def _left_alone(surveyed: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What is in the folder beside the history, and how to deal with it."""
    found = []
    for each in surveyed["runs"]:
        beside = [s["step"] for s in each["snapshots"] if not s["in_history"]]
        if not beside:
            continue
        unrelated = each["role"] == "unrelated"
        what = "of an unrelated run" if unrelated else "of another future"
        remedy = f"--run {each['run']} prunes them"
        remedy += "" if unrelated else "; steps of its past that go from this history are gone for it, too"
        found.append({"what": what, "count": len(beside), "run": each["run"], "remedy": remedy})
    for what, remedy in (("incomplete", "inspect"), ("damaged", "verify")):
        if surveyed[what]:
            advice = f"`nitrous-ema {remedy} {folder}` says more"
            found.append({"what": what, "count": len(surveyed[what]), "run": None, "remedy": advice})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# In words


def _lines(found: dict[str, Any]) -> list[str]:
    told = [f"{found['folder']}: run {found['run']}" + (", and what it continues" if found["lineage"][:-1] else "")]
    told += _still_written(found)
    told += [f"pinned: {', '.join(map(str, found['pinned_now']))}"] if found["pinned_now"] else []
    told += [f"unpinned: {', '.join(map(str, found['unpinned_now']))}"] if found["unpinned_now"] else []
    if found["thinning"]:
        told += ["", *lines(found["thinning"])]
    for each in found["left_alone"]:
        whose = f" ({each['run']})" if each["run"] else ""
        told += paragraph(
            "left alone:", f"{pluralize(each['count'], 'snapshot')} {each['what']}{whose}; {each['remedy']}"
        )
    return told


def _still_written(found: dict[str, Any]) -> list[str]:
    trainer, state = {"pid": "?", "host": "?", **found["trainer"]}, found["state"]
    if state in ("closed", "gone"):
        return []
    who = {
        "alive": f"is still being written, by process {trainer['pid']} of this host",
        "elsewhere": f"may still be written, by process {trainer['pid']} of host {trainer['host']}",
        "unknown": "may still be written",
    }
    return paragraph("note:", f"this run {who[state]}. What it writes from now on is not thinned; its keep= does that.")


def _outcome(found: dict[str, Any]) -> str:
    if found["dry_run"]:
        return "dry run: nothing was changed."
    if "bytes_removed" not in found:
        return "pins are written; no snapshot was removed."
    return f"done: {format_bytes(found['bytes_removed'])} removed."
