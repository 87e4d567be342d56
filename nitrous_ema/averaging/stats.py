"""The counts of an EMA: updates here, snapshots in ``snapshots.stats``."""

from __future__ import annotations

from dataclasses import dataclass

from nitrous_ema.snapshots.stats import WriteStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats(WriteStats):
    """The counts of an EMA at one moment: of its updates, and of its snapshots."""

    updates: int = 0
    """Updates that were applied, since the first one of the run."""
    scratch_bytes: int = 0
    """Device memory held for parameters that the trainer wrote while a snapshot copy still read their averages."""
    held_up: int = 0
    """How often the trainer had to wait for a snapshot copy, because the scratch memory had reached its limit; or, with
    ``offload="host"``, for averaging in host memory."""
