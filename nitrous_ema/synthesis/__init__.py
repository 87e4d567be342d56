"""Averages of any length from a run's snapshots: a plan of what to read, and one pass over it.

    plan = plan_from_store("ema-checkpoints", sigma_rels=[0.08])
    stream(plan, take)              # take(begin_element, block) gets the averages in the target's flat order
    stream_copied(plan, take_bytes)

numpy only; ``nitrous_ema.outputs`` writes the averages as files.
"""

from __future__ import annotations

from nitrous_ema.synthesis.arrays import Synthesized, synthesize, synthesize_plan
from nitrous_ema.synthesis.choice import DEFAULT_TOLERANCE
from nitrous_ema.synthesis.plan import Column, Plan, plan_from_store, plan_synthesis
from nitrous_ema.synthesis.sources import FileSource, Moment, OpenFiles, Reader, Source
from nitrous_ema.synthesis.stored import StoredMoment, stored_moment
from nitrous_ema.synthesis.streaming import (
    DEFAULT_MEMORY_BYTES,
    Accumulate,
    Consumer,
    Progress,
    Sizes,
    engine_sizes,
    passes,
    stream,
    stream_copied,
)

__all__ = [
    "DEFAULT_MEMORY_BYTES",
    "DEFAULT_TOLERANCE",
    "Accumulate",
    "Column",
    "Consumer",
    "FileSource",
    "Moment",
    "OpenFiles",
    "Plan",
    "Progress",
    "Reader",
    "Sizes",
    "Source",
    "StoredMoment",
    "Synthesized",
    "engine_sizes",
    "passes",
    "plan_from_store",
    "plan_synthesis",
    "stored_moment",
    "stream",
    "stream_copied",
    "synthesize",
    "synthesize_plan",
]
