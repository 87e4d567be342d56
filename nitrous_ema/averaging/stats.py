"""The counts of an EMA: updates here, snapshots in ``snapshots.stats``."""

from __future__ import annotations

from dataclasses import dataclass, fields

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

    def as_metrics(self, prefix: str = "ema/") -> dict[str, float]:
        """Return the counts as a logger of metrics accepts them: flat names, and numbers only.

        Args:
            prefix: Begins every name.
        """
        counts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "last_error"}
        return {
            f"{prefix}{name}": value for name, value in (counts | {"write_bandwidth": self.write_bandwidth}).items()
        }
