"""The snapshots that the synthesis process reads: a snapshot folder, or a folder of ``{i}.{step}.pt`` files.

``StoredSnapshots`` and ``LegacySnapshots`` have the same methods: ``targets`` selects the snapshots at which averages
end, ``plan`` plans the averages of one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nitrous_ema._base.arguments import check_not_excluded, choose_step, nearest_note
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.names import parse_folder_name
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.plan import Plan, plan_at, plan_synthesis
from nitrous_ema.synthesis.worker.reporting import log_warning

if TYPE_CHECKING:
    from nitrous_ema.snapshots.legacy.folder import LegacySnapshot
    from nitrous_ema.synthesis.worker.arguments import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedAverages:
    """The averages to synthesize at every target step."""

    sigma_rels: Sequence[float] | None
    """Lengths as fractions of the training time; None where ``gammas`` has them."""
    gammas: Sequence[float] | None
    """Lengths as exponents; None where ``sigma_rels`` has them."""
    exclude: Collection[int]
    """Steps of snapshots that are ignored."""
    tolerance: float
    """Relative profile error that reading fewer snapshots may add; 0 reads all."""


def open_inputs(config: WorkerConfig) -> StoredSnapshots | LegacySnapshots:
    """Return the snapshots that a config names; a folder of ``{i}.{step}.pt`` files is listed here.

    Raises:
        ValueError: The tracked profiles of a folder of ``{i}.{step}.pt`` files are invalid.
        SnapshotNotFound: A folder of ``{i}.{step}.pt`` files does not exist or is empty.
    """
    requested = RequestedAverages(
        sigma_rels=config.sigma_rels, gammas=config.gammas, exclude=config.exclude, tolerance=config.tolerance
    )
    if config.is_legacy:
        return LegacySnapshots(
            config.snapshots, requested, sigma_rels=config.tracked_sigma_rels, gammas=config.tracked_gammas
        )
    return StoredSnapshots(config.snapshots, requested, config.run)


class StoredSnapshots:
    """The lineage of one run in a snapshot folder, as of the last ``refresh``.

    Args:
        root: The folder.
        requested: The averages.
        run: Run at which the lineage ends; None is the newest run.
    """

    def __init__(self, root: Path, requested: RequestedAverages, run: str | None) -> None:
        self.store = SnapshotStore(root)
        self.requested = requested
        self.requested_run = run
        self.listed: list[Snapshot] = []
        """Snapshots of the lineage, ascending by step; empty before the first ``refresh``."""

    @property
    def lineage(self) -> Lineage:
        """The lineage itself: its runs, each with the step at which it was left; empty while no snapshot is listed."""
        # Ancestors' snapshots have the beginnings of this lineage, so the longest one is that of the last run.
        return max((each.stamp.lineage for each in self.listed), key=len, default=())

    @property
    def is_closed(self) -> bool:
        """Whether the last run of the lineage has been closed: it will write no more snapshots."""
        return bool(self.lineage) and self.store.is_closed(self.lineage[-1][0])

    def refresh(self, run: str | None = None) -> None:
        """List the lineage again, or the lineage of another run if ``run`` is passed.

        Raises:
            SnapshotNotFound: There is no such run.
            SnapshotDamaged: A snapshot that is not excluded has a wrong size or header.
        """
        self.listed = self.store.snapshots(run or self.requested_run, exclude=self.requested.exclude)

    def legacy_note(self) -> str:
        """Return a note on legacy files beside the snapshots, which are not read; "" without any."""
        return self.store.legacy_note()

    def targets(self, steps: Sequence[int | str] | Literal["all"] | None) -> list[Snapshot]:
        """List the lineage and return the snapshots at which averages end.

        Args:
            steps: Target steps; "all" selects every snapshot, None the newest.

        Raises:
            ValueError: A target step is excluded.
            SnapshotNotFound: A target step has no snapshot; the message names the nearest steps.
        """
        selected = _selected(steps, self.requested.exclude)
        self.refresh()
        by_step = {each.step: each for each in self.listed}
        if steps == "all" and by_step:
            return self.listed
        chosen: dict[int, Snapshot] = {}
        for step in selected:
            place = choose_step(step, by_step)
            if place is None:
                # get() raises with the nearest steps. If it does not raise, the snapshot was committed after the
                # listing, so the lineage is listed again.
                self.store.get(step, self.requested_run, exclude=self.requested.exclude)
                return self.targets(steps)
            chosen[place] = by_step[place]
            _log_nearest(step, place)
        return list(chosen.values())

    def plan(self, target: Snapshot) -> Plan:
        """Plan the averages that end at a snapshot of the listed lineage; raises as ``plan_at``."""
        requested = self.requested
        return plan_at(
            target,
            self.listed,
            sigma_rels=requested.sigma_rels,
            gammas=requested.gammas,
            excluded=requested.exclude,
            tolerance=requested.tolerance,
        )

    def steps(self) -> set[int]:
        """Return the steps of all snapshot folders, including incomplete snapshots."""
        names = map(parse_folder_name, self.store.names())
        return {known[0] for known in names if known}

    def unrelated_runs(self) -> list[str]:
        """Return the runs in the folder that are not part of the listed lineage."""
        runs = {known[1] for name in self.store.names() if (known := parse_folder_name(name))}
        # Names are enough if all runs are related. Otherwise the store has to open every file.
        if runs <= dict(self.lineage).keys():
            return []
        return self.store.unrelated_runs(self.requested_run)


class LegacySnapshots:
    """A folder of nitrous-ema 0.0.1 or ema-pytorch: ``{i}.{step}.pt`` files, without runs.

    Args:
        root: The folder.
        requested: The averages.
        sigma_rels: Tracked profiles of the folder, or
        gammas: the same profiles as exponents. Exactly one of the two.

    Raises:
        ValueError: Both or neither of sigma_rels and gammas, or one outside its domain.
        SnapshotNotFound: The folder does not exist or has no snapshot.
    """

    is_closed = True  # such a folder does not record whether training has ended, and is not followed

    def __init__(
        self,
        root: Path,
        requested: RequestedAverages,
        *,
        sigma_rels: Sequence[float] | None,
        gammas: Sequence[float] | None,
    ) -> None:
        from nitrous_ema.snapshots.legacy.folder import LegacyFolder

        self.requested = requested
        self._folder = LegacyFolder(root, sigma_rels=sigma_rels, gammas=gammas)
        self._snapshots = self._folder.snapshots(exclude=requested.exclude)

    def targets(self, steps: Sequence[int | str] | Literal["all"] | None) -> list[LegacySnapshot]:
        """Return the snapshots at which averages end; arguments and errors as ``StoredSnapshots.targets``."""
        selected = _selected(steps, self.requested.exclude)
        if steps == "all":
            return self._snapshots
        chosen: dict[int, LegacySnapshot] = {}
        for step in selected:
            found = self._folder.get(step, exclude=self.requested.exclude)
            chosen[found.step] = found
            _log_nearest(step, found.step)
        return list(chosen.values())

    def plan(self, target: Any) -> Plan:
        """Plan the averages that end at a snapshot of the folder; raises as ``plan_synthesis``."""
        requested = self.requested
        return plan_synthesis(
            self._snapshots,
            target=target,
            sigma_rels=requested.sigma_rels,
            gammas=requested.gammas,
            excluded=requested.exclude,
            tolerance=requested.tolerance,
        )

    def steps(self) -> set[int]:
        """Return the steps of all files in the folder."""
        return {*self._folder.steps}

    def unrelated_runs(self) -> list[str]:
        """Return an empty list: the folder has no runs."""
        return []

    def legacy_note(self) -> str:
        """Return an empty text: the legacy files are read."""
        return ""


def _selected(
    steps: Sequence[int | str] | Literal["all"] | None, exclude: Collection[int]
) -> Sequence[int | str | None]:
    """Return the target steps one by one; the newest, as None, if they are not listed."""
    selected: Sequence[int | str | None] = [None] if steps is None or isinstance(steps, str) else steps
    for step in selected:
        check_not_excluded(step, exclude)
    return selected


def _log_nearest(step: int | str | None, chosen: int) -> None:
    if note := nearest_note(step, chosen):
        log_warning(note)
