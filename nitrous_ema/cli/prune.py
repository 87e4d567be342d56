"""``nitrous-ema prune``: drop snapshots of a finished run, and pin the ones that must be kept.

The command chooses and checks everything before it changes anything. It works in this order: remove and write pins;
hide all dropped snapshots at once, so that no later reader sees a partly pruned lineage; then delete them.

Hidden snapshots are deleted right away by default, because pruning is usually done on a full disk. Running readers are
not affected: the bytes of an open file stay on disk until the file is closed. The exception is a synthesis of more than
128 files, which opens each file again and again. It fails with the advice to start again, and never returns wrong
numbers. ``--grace`` gives such a synthesis time to finish: the hidden files stay readable for this many seconds. If
this process is interrupted meanwhile, the next prune of the folder deletes the hidden snapshots. A run deletes them,
too: a run that starts there ten minutes later, or one that runs out of disk space.

PRUNE-1  Nothing is changed before everything is checked.        test_refused_prune_changes_nothing
PRUNE-2  Only snapshots of one lineage are changed.              test_prune_touches_its_own_lineage_only
PRUNE-3  Pins are durable before anything is hidden, and         test_pins_come_first_then_hiding_then_removal
    everything is hidden before anything is deleted.
PRUNE-4  Hidden snapshots can be read during the grace.          test_hidden_files_stay_readable_during_the_grace
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema.cli.prune_plan import PrunePlan, PruneTarget, lines, plan_pruning
from nitrous_ema.cli.survey import legacy_sentence, survey
from nitrous_ema.cli.terminal import confirm, log, paragraph, show, show_json
from nitrous_ema.errors import NitrousError, SnapshotNotFound, SnapshotUnreadable
from nitrous_ema.snapshots.names import parse_folder_name
from nitrous_ema.snapshots.snapshot import Listing, Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.requested_lengths import lengths_of


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """Configuration of ``nitrous-ema prune``."""

    folder: Path
    """The snapshot folder."""
    run: str | None
    """Last run of the lineage to prune; None for the newest."""
    target: PruneTarget | None
    """How much to keep; None if the command only changes pins."""
    pin: tuple[int, ...]
    """Steps to pin."""
    unpin: tuple[int, ...]
    """Steps to unpin."""
    exclude: tuple[int, ...]
    """Steps that are neither dropped nor relied on."""
    grace_seconds: float
    """Seconds between hiding and deletion."""
    dry_run: bool
    """Whether to print the plan and change nothing."""
    ask: bool
    """Whether to ask before snapshots are deleted, where stdin is a terminal."""
    verbose: bool
    """Whether to print the bound on the choice."""
    as_json: bool
    """Whether to print one JSON object instead of text."""


def configure(options: argparse.Namespace) -> PruneConfig:
    """Return the configuration that the parsed options state.

    Raises:
        UsageError: No option states how much to keep, and none changes pins; or a length is out of range.
    """
    target = None
    if options.keep is not None or options.budget is not None or options.error is not None:
        target = PruneTarget(
            keep=options.keep, budget_bytes=options.budget, error=options.error, sigma_rels=_range(options)
        )
    elif not options.pin and not options.unpin:
        raise exit_status.UsageError(
            "nothing to do; pass one of --keep N, --budget BYTES and --error E, or change pins with --pin or --unpin."
        )
    return PruneConfig(
        folder=options.folder,
        run=options.run,
        target=target,
        pin=tuple(options.pin),
        unpin=tuple(options.unpin),
        exclude=tuple(options.exclude),
        grace_seconds=options.grace,
        dry_run=options.dry_run,
        ask=not options.yes,
        verbose=options.verbose,
        as_json=options.json,
    )


def _range(options: argparse.Namespace) -> tuple[float, float] | None:
    """Return the shortest and the longest wanted length; None without a length."""
    if options.sigma_rel is None and options.gamma is None:
        return None
    with exit_status.usage_errors():
        lengths = [length for length, _ in lengths_of(options.gamma, options.sigma_rel, ("--gamma", "--sigma-rel"))]
    return min(lengths), max(lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pins:
    """The pinned steps of a lineage, and the changes to them."""

    before: frozenset[int]
    """Steps with a pin and a snapshot."""
    add: tuple[Snapshot, ...]
    """Snapshots to pin."""
    remove: tuple[tuple[int, str], ...]
    """(step, run) of pins to remove; the snapshot may be gone."""
    not_pinned: tuple[int, ...]
    """Steps to unpin that have no pin."""

    @property
    def after(self) -> frozenset[int]:
        """Pinned steps after all changes."""
        return (self.before - {step for step, _ in self.remove}) | {each.step for each in self.add}

    @property
    def changes(self) -> bool:
        """Whether a pin is added or removed."""
        return bool(self.remove) or any(each.step not in self.before for each in self.add)


def run(config: PruneConfig) -> int:
    """Prune a folder, or print the plan; return the exit status."""
    store = SnapshotStore(config.folder)
    # Another store for the changes: before it hides snapshots, it must notice newer ones.
    reader = store.remembering()
    listing = _listing(reader, config)
    snapshots = [each for each in listing.snapshots if each.step not in config.exclude]
    pins = _pins(reader, listing, snapshots, config)
    plan: PrunePlan | None = None
    if config.target is not None:
        with exit_status.usage_errors():
            plan = plan_pruning(snapshots, pins.after, config.target)
    if pins.not_pinned:
        log(f"--unpin {','.join(map(str, pins.not_pinned))}: not pinned, so there is no pin to remove.")
    found = _described(reader, listing, config, pins, plan)
    # Text is printed before the work, so that an interrupted command has shown its plan. JSON is one object at the end.
    if not config.as_json:
        show(*_lines(found, verbose=config.verbose))
    if not config.dry_run:
        if config.ask and plan is not None and plan.dropped and not confirm(_question(found, config)):
            raise NitrousError("not confirmed; nothing was changed.")
        found |= _carry_out(store, pins, plan, config.grace_seconds)
    if config.as_json:
        show_json(found)
    else:
        show(_outcome(found, pins))
    return exit_status.DONE


def _question(found: dict[str, Any], config: PruneConfig) -> str:
    thinning = found["thinning"]
    size = format_bytes(thinning["bytes_before"] - thinning["bytes_after"])
    return f"Delete {pluralize(len(thinning['dropped']), 'snapshot')} ({size}) from {config.folder}?"


def _listing(store: SnapshotStore, config: PruneConfig) -> Listing:
    """Return the lineage to choose from.

    Raises:
        SnapshotUnreadable: A snapshot of the lineage has a damaged header, or needs a newer version of this library,
            and is not excluded. The error of an average cannot be computed without that snapshot's time and profiles.
        SnapshotNotFound: The lineage has no snapshot that is not excluded.
        UsageError: The folder is an old one.
    """
    listing = store.examine(config.run)
    damaged = [error for error in listing.damaged if _step(error.path) not in config.exclude]
    if damaged:
        others = f"{pluralize(len(damaged) - 1, 'more damaged snapshot')} (`nitrous-ema verify` lists all)"
        more = f" This lineage has {others}." if len(damaged) > 1 else ""
        raise SnapshotUnreadable(
            f"{damaged[0]}{more} Nothing was changed.", path=damaged[0].path, step=_step(damaged[0].path)
        )
    if not any(each.step not in config.exclude for each in listing.snapshots):
        if sentence := legacy_sentence(store.root, "prune"):
            raise exit_status.UsageError(sentence)
        raise SnapshotNotFound(
            f"{store.root} holds no snapshot to prune{store.location_hint()}.", path=store.root, nearest=()
        )
    return listing


def _step(path: Path) -> int | None:
    """Return the step in the name of a snapshot's folder, or of the folder of a snapshot's file."""
    known = parse_folder_name(path.name) or parse_folder_name(path.parent.name)
    return known[0] if known else None


def _pins(store: SnapshotStore, listing: Listing, snapshots: Sequence[Snapshot], config: PruneConfig) -> Pins:
    markers, runs = store.pins(), {name for name, _ in listing.lineage}
    by_step = {each.step: each for each in snapshots}
    remove: list[tuple[int, str]] = []
    not_pinned = []
    for step in config.unpin:
        # A pin may outlive its snapshot. Pins of other lineages may have the same step; they are not removed.
        ours = [marker for marker in markers if marker[0] == step and marker[1] in runs]
        if not ours and step not in by_step:
            raise _no_such_step(store, listing, step, list(by_step))
        remove += ours
        if not ours:
            not_pinned.append(step)
    for step in config.pin:
        if step not in by_step:
            raise _no_such_step(store, listing, step, list(by_step))
    return Pins(
        before=frozenset(each.step for each in snapshots if (each.step, each.run) in markers),
        add=tuple(by_step[step] for step in config.pin),
        remove=tuple(remove),
        not_pinned=tuple(not_pinned),
    )


def _no_such_step(store: SnapshotStore, listing: Listing, step: int, existing: Sequence[int]) -> SnapshotNotFound:
    sides = [max((s for s in existing if s < step), default=None), min((s for s in existing if s > step), default=None)]
    nearest = tuple(side for side in sides if side is not None)
    return SnapshotNotFound(
        f"{store.root} has no snapshot of step {step} in the lineage of run {listing.lineage[-1][0]}; nearest steps: "
        f"{' and '.join(map(str, nearest))}. Nothing was changed.",
        path=store.root,
        nearest=nearest,
    )


def _carry_out(store: SnapshotStore, pins: Pins, plan: PrunePlan | None, grace_seconds: float) -> dict[str, int]:
    """Change pins, then hide and delete the dropped snapshots; return the bytes hidden and deleted."""
    # Pins first (PRUNE-3): an interruption leaves too many snapshots, never a pinned one hidden.
    for step, owner in pins.remove:
        store.unpin(step, owner)
    for each in pins.add:
        store.pin(each.step, each.run)
    if plan is None:
        return {}
    hidden = store.hide(plan.dropped)
    if hidden and grace_seconds:
        time.sleep(grace_seconds)
    # remove_hidden() also deletes what an interrupted prune has hidden, so it is called even if hide() had no work.
    return {"bytes_hidden": hidden, "bytes_removed": store.remove_hidden()}


def _described(
    store: SnapshotStore, listing: Listing, config: PruneConfig, pins: Pins, plan: PrunePlan | None
) -> dict[str, Any]:
    """Return the plan, the pins and the snapshots that are not touched, in values that JSON can hold."""
    last = listing.lineage[-1][0]
    surveyed = survey(store, last)
    states = {each["run"]: each for each in surveyed["runs"]}
    return {
        "folder": str(config.folder),
        "run": last,
        "lineage": [list(ancestor) for ancestor in listing.lineage],
        "dry_run": config.dry_run,
        "state": states[last]["state"],
        "trainer": states[last].get("trainer", {}),
        "pinned": sorted(pins.after),
        "pinned_now": [each.step for each in pins.add],
        "unpinned_now": [step for step, _ in pins.remove],
        "excluded": sorted(config.exclude),
        "left_alone": _left_alone(surveyed, config.folder),
        "thinning": plan.described() if plan else None,
    }


def _left_alone(surveyed: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the folder's snapshots outside of the lineage, counted by kind, each with the command that treats them."""
    found = []
    for each in surveyed["runs"]:
        beside = [s["step"] for s in each["snapshots"] if not s["in_history"]]
        if not beside:
            continue
        unrelated = each["role"] == "unrelated"
        what = "of an unrelated run" if unrelated else "of another future"
        remedy = f"--run {each['run']} prunes them"
        # A branch reads its ancestors' snapshots, which are members of this lineage.
        remedy += "" if unrelated else "; shared earlier snapshots that this command drops are lost for that run, too"
        found.append({"what": what, "count": len(beside), "run": each["run"], "remedy": remedy})
    for what, command in (("incomplete", "inspect"), ("damaged", "verify")):
        if surveyed[what]:
            advice = f"`nitrous-ema {command} {folder}` lists them"
            found.append({"what": what, "count": len(surveyed[what]), "run": None, "remedy": advice})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# As text

_LEFT_ALONE = {
    "of an unrelated run": "{snapshots} of an unrelated run ({run})",
    "of another future": "{snapshots} of another lineage (run {run})",
    "incomplete": "{snapshots}, incomplete",
    "damaged": "{snapshots}, damaged",
}


def _lines(found: dict[str, Any], *, verbose: bool) -> list[str]:
    ancestors = ", and the runs that it continues" if found["lineage"][:-1] else ""
    text = [f"{found['folder']}: run {found['run']}{ancestors}"]
    text += _still_written(found)
    text += [f"pinned: {', '.join(map(str, found['pinned_now']))}"] if found["pinned_now"] else []
    text += [f"unpinned: {', '.join(map(str, found['unpinned_now']))}"] if found["unpinned_now"] else []
    if found["thinning"]:
        text += ["", *lines(found["thinning"], verbose=verbose)]
    for each in found["left_alone"]:
        what = _LEFT_ALONE[each["what"]].format(snapshots=pluralize(each["count"], "snapshot"), run=each["run"])
        text += paragraph("left alone:", f"{what}; {each['remedy']}")
    return text


def _still_written(found: dict[str, Any]) -> list[str]:
    trainer, state = {"pid": "?", "host": "?", **found["trainer"]}, found["state"]
    if state in ("closed", "gone"):
        return []
    writer = {
        "alive": f"is still being written by process {trainer['pid']} on this host",
        "elsewhere": f"may still be written by process {trainer['pid']} on host {trainer['host']}",
        "unknown": "may still be written",
    }
    return paragraph(
        "note:",
        f"this run {writer[state]}. This command does not prune snapshots that are written later; the run's keep= "
        "argument does.",
    )


def _outcome(found: dict[str, Any], pins: Pins) -> str:
    if found["dry_run"]:
        return "dry run: nothing was changed."
    if "bytes_removed" not in found:
        return f"done: {'pins were' if pins.changes else 'no pin was'} changed, and no snapshot was dropped."
    return f"done: {format_bytes(found['bytes_removed'])} deleted."
