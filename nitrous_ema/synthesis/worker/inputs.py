"""The snapshots that the synthesis process reads: a folder of ours, or one of ``{i}.{step}.pt`` files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.names import parse_folder_name
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.plan import Plan, plan_at, plan_synthesis

if TYPE_CHECKING:
    from nitrous_ema.snapshots.legacy.folder import LegacySnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedAverages:
    """Averages, wherever they end."""

    sigma_rels: Sequence[float] | None
    gammas: Sequence[float] | None
    exclude: Collection[int]
    tolerance: float


class StoredSnapshots:
    """One training history in a folder of ours, as it was when it was last looked at.

    Args:
        root: The folder.
        wanted: The averages.
        run: Its last run; by default the newest there is.
    """

    def __init__(self, root: Path, wanted: RequestedAverages, run: str | None) -> None:
        self.store = SnapshotStore(root)
        self.wanted = wanted
        self.asked_run = run
        self.listed: list[Snapshot] = []
        """Ascending by step."""

    @property
    def lineage(self) -> Lineage:
        """Of the history that was listed; empty if there is none."""
        return max((each.stamp.lineage for each in self.listed), key=len, default=())

    @property
    def is_closed(self) -> bool:
        """Whether its last run has said that it writes no more."""
        return bool(self.lineage) and self.store.files.exists(self.store.root / f"closed-{self.lineage[-1][0]}")

    def look(self, run: str | None = None) -> None:
        """List what there is, of another run if one is given."""
        self.listed = self.store.snapshots(run or self.asked_run, exclude=self.wanted.exclude)

    def targets(self, steps: Sequence[int] | Literal["all"] | None) -> list[Snapshot]:
        """Snapshots at which averages end: of these steps, all, or the newest.

        Raises:
            ValueError: A step is excluded.
            SnapshotNotFound: There is no such snapshot; names the nearest steps.
        """
        _check_not_excluded(steps, self.wanted.exclude)
        self.look()
        found = {each.step: each for each in self.listed}
        newest = max(found, default=None)
        wanted: Sequence[int | None] = [newest]
        if steps is not None and (found or steps != "all"):
            wanted = sorted(found) if steps == "all" else steps
        for step in wanted:
            if step not in found:
                # Raises, naming what there is; if not, it was committed a moment ago.
                self.store.get(step, self.asked_run, exclude=self.wanted.exclude)
                return self.targets(steps)
        return [found[step] for step in wanted if step is not None]

    def plan(self, target: Snapshot) -> Plan:
        """What to read for the averages that end there."""
        wanted = self.wanted
        return plan_at(
            target,
            self.listed,
            sigma_rels=wanted.sigma_rels,
            gammas=wanted.gammas,
            excluded=wanted.exclude,
            tolerance=wanted.tolerance,
        )

    def steps(self) -> set[int]:
        """Steps of which there is something in the folder, whole or not."""
        names = map(parse_folder_name, self.store.files.list(self.store.root))
        return {known[0] for known in names if known}

    def unrelated_runs(self) -> list[str]:
        """Runs that have no part in this history."""
        runs = {known[1] for name in self.store.files.list(self.store.root) if (known := parse_folder_name(name))}
        if runs <= dict(self.lineage).keys():
            return []  # without opening every file again
        return self.store.unrelated_runs(self.asked_run)


class LegacySnapshots:
    """A folder of nitrous-ema 0.0.1 or ema-pytorch, which knows no runs.

    Args:
        root: The folder.
        wanted: The averages.
        sigma_rels: Its profiles, or
        gammas: the same as exponents.
    """

    is_closed = True  # nothing follows it, and nothing tells

    def __init__(
        self,
        root: Path,
        wanted: RequestedAverages,
        *,
        sigma_rels: Sequence[float] | None,
        gammas: Sequence[float] | None,
    ) -> None:
        from nitrous_ema.snapshots.legacy.folder import LegacyFolder

        self.wanted = wanted
        self._folder = LegacyFolder(root, sigma_rels=sigma_rels, gammas=gammas)
        self._moments = self._folder.snapshots(exclude=wanted.exclude)

    def targets(self, steps: Sequence[int] | Literal["all"] | None) -> list[LegacySnapshot]:
        """As StoredSnapshots.targets()."""
        _check_not_excluded(steps, self.wanted.exclude)
        if steps == "all":
            return self._moments
        return [self._folder.get(step, exclude=self.wanted.exclude) for step in ([None] if steps is None else steps)]

    def plan(self, target: Any) -> Plan:
        """What to read for the averages that end there."""
        wanted = self.wanted
        return plan_synthesis(
            self._moments,
            target=target,
            sigma_rels=wanted.sigma_rels,
            gammas=wanted.gammas,
            excluded=wanted.exclude,
            tolerance=wanted.tolerance,
        )

    def steps(self) -> set[int]:
        """As StoredSnapshots.steps()."""
        return {*self._folder.steps}

    def unrelated_runs(self) -> list[str]:
        """None."""
        return []


def _check_not_excluded(steps: Sequence[int] | Literal["all"] | None, exclude: Collection[int]) -> None:
    for step in steps if steps not in (None, "all") else ():
        if step in exclude:
            raise ValueError(f"step {step} is a target and is excluded; ask for another step, or do not exclude it.")
