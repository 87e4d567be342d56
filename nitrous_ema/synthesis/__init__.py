"""Averages of any length from a run's snapshots: a plan of what to read, and one pass over it.

    plan = plan_from_store("ema-checkpoints", sigma_rels=[0.08])
    stream(plan, take)              # take(begin_element, block) gets the averages in the target's flat order
    stream_copied(plan, take_bytes)

numpy only; ``nitrous_ema.synthesis.outputs.writer`` writes the averages as files.
"""

from __future__ import annotations

from nitrous_ema.snapshots.readable_snapshot import SnapshotView, StoredSnapshotView, stored_snapshot_view
from nitrous_ema.snapshots.reading import FileSource, OpenFiles, Reader, Source
from nitrous_ema.synthesis.in_memory import Synthesized, synthesize, synthesize_plan
from nitrous_ema.synthesis.plan import Column, Plan, plan_from_store, plan_synthesis
from nitrous_ema.synthesis.snapshot_selection import DEFAULT_TOLERANCE
from nitrous_ema.synthesis.streaming import (
    DEFAULT_MEMORY_BYTES,
    Accumulate,
    BlockSizes,
    Consumer,
    Progress,
    engine_sizes,
    passes,
    stream,
    stream_copied,
)

__all__ = [
    "DEFAULT_MEMORY_BYTES",
    "DEFAULT_TOLERANCE",
    "Accumulate",
    "BlockSizes",
    "Column",
    "Consumer",
    "FileSource",
    "OpenFiles",
    "Plan",
    "Progress",
    "Reader",
    "SnapshotView",
    "Source",
    "StoredSnapshotView",
    "Synthesized",
    "engine_sizes",
    "passes",
    "plan_from_store",
    "plan_synthesis",
    "stored_snapshot_view",
    "stream",
    "stream_copied",
    "synthesize",
    "synthesize_plan",
]
