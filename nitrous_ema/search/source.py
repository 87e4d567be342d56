"""The snapshots of a sweep: those of a folder, of an old folder, or of an EMA that is training in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nitrous_ema._base.arguments import nearest_note
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.names import parse_folder_name
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis import Plan, SnapshotView, plan_from_store, plan_synthesis

if TYPE_CHECKING:
    from nitrous_ema.averaging.ema import PostHocEMA
    from nitrous_ema.snapshots.legacy.folder import LegacyFolder, LegacySnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotSource:
    """The snapshots of a sweep, and how to read them."""

    snapshots: SnapshotStore | LegacyFolder
    find: Callable[[int | str | None], Snapshot | LegacySnapshot]
    """Returns the snapshot of a step; None is the newest."""
    exclude: tuple[int, ...]
    tolerance: float
    newest_step: int | None
    """Step of the EMA that was passed; None for a folder."""

    def targets(self, steps: Sequence[int | str] | None) -> list[Snapshot | LegacySnapshot]:
        """Return the target snapshots, ascending by step; a missing one raises before anything is evaluated."""
        wanted: Sequence[int | str | None] = [None] if steps is None else steps
        if not wanted:
            raise ValueError("steps is empty; pass steps that have a snapshot, or None for the newest.")
        found = {each.step: each for each in map(self.find, wanted)}
        return [found[step] for step in sorted(found)]

    def notes(self, steps: Sequence[int | str] | None, targets: Sequence[Snapshot | LegacySnapshot]) -> list[str]:
        """Return notes on steps that differ from the expected ones, and on files that are not read."""
        found = [nearest_note(step, self.find(step).step) for step in steps or () if isinstance(step, str)]
        found += [self._age_note(targets[-1])] if steps is None else []
        found += [self.snapshots.legacy_note()] if isinstance(self.snapshots, SnapshotStore) else []
        return list(filter(None, found))

    def _age_note(self, newest: Snapshot | LegacySnapshot) -> str:
        """Return a note that the newest snapshot is older than the newest step; an empty text if it is not."""
        if self.newest_step is not None and self.newest_step > newest.step:
            return (
                f"The newest snapshot is of step {newest.step}, and the EMA is at step {self.newest_step}. Call "
                "checkpoint() before the sweep to evaluate averages that end there."
            )
        if not isinstance(self.snapshots, SnapshotStore):
            return ""
        names = map(parse_folder_name, self.snapshots.names())
        later = [step for step, run in filter(None, names) if run == newest.run and step > newest.step]
        if not set(later) - {*self.exclude}:
            return ""
        return (
            f"The newest complete snapshot is of step {newest.step}; that of step {max(later)} is still being written, "
            "or was never finished."
        )

    def plan(self, target: Snapshot | LegacySnapshot, sigma_rels: Sequence[float]) -> Plan:
        """Return the plan of averages of some lengths that end at a snapshot."""
        if isinstance(self.snapshots, SnapshotStore):
            return plan_from_store(
                self.snapshots,
                sigma_rels=sigma_rels,
                step=target.step,
                run=target.run,
                exclude=self.exclude,
                tolerance=self.tolerance,
            )
        snapshots: list[SnapshotView] = list(self.snapshots.snapshots(exclude=self.exclude))
        return plan_synthesis(
            snapshots,
            target=self.snapshots.get(target.step),
            sigma_rels=sigma_rels,
            excluded=self.exclude,
            tolerance=self.tolerance,
        )

    def name_of(self, run: str) -> str:
        """Return the name under which results store a run: its id, or the folder's path for an old folder."""
        return run if isinstance(self.snapshots, SnapshotStore) else str(self.snapshots.root.absolute())

    def lineage_of(self, plan: Plan) -> Lineage:
        """Return the lineage of a plan's target, by these names."""
        return tuple((self.name_of(run), left_at) for run, left_at in plan.target.lineage)


def open_source(
    snapshots: SnapshotStore | LegacyFolder | PostHocEMA | str | os.PathLike[str],
    run: str | None,
    exclude: tuple[int, ...],
    tolerance: float,
) -> SnapshotSource:
    """Return the snapshots that the arguments of a sweep name. An EMA is flushed first.

    Raises:
        TypeError: ``snapshots`` is something else.
        ValueError: A run of an old folder is named; such a folder has no runs.
    """
    source: Any = SnapshotStore(snapshots) if isinstance(snapshots, (str, os.PathLike)) else snapshots
    newest_step: int | None = None
    if isinstance(source, SnapshotStore):
        find = _finder(source, run, exclude)
    elif hasattr(source, "synthesize_ema_model"):
        ema = source
        ema.flush()
        source, newest_step = ema.snapshots, ema.step
        find = _finder(source, run, exclude) if run else lambda step: ema._target(step, exclude=exclude)
    elif hasattr(source, "gammas") and hasattr(source, "get"):
        if run is not None:
            raise ValueError(f"run is {run!r}, but a folder of {{i}}.{{step}}.pt files has no runs; omit run=.")
        find = lambda step: source.get(step, exclude=exclude)  # noqa: E731 - a def would hide that it is one of three
    else:
        raise TypeError(
            f"snapshots is {snapshots!r:.80}; expected a snapshot folder, a SnapshotStore, a LegacyFolder, or a "
            "PostHocEMA."
        )
    return SnapshotSource(snapshots=source, find=find, exclude=exclude, tolerance=tolerance, newest_step=newest_step)


def _finder(store: SnapshotStore, run: str | None, exclude: tuple[int, ...]) -> Callable[[Any], Snapshot]:
    return lambda step: store.get(step, run, exclude=exclude)
