"""Synthesize averages of any length from the snapshots of a run. Begin with ``plan.py``, then ``streaming.py``.

``snapshot_selection`` chooses the snapshots, ``outputs`` writes and reads the files, ``worker`` is the process.

    plan = plan_from_store("ema-checkpoints", sigma_rels=[0.08])
    write_outputs(plan, [Path("average.safetensors")])  # into files
    stream(plan, consumer)  # or block by block: consumer(begin_element, block), in the target's flat order
    stream_copied(plan, take_bytes)

The package works with numpy alone; only ``.pt`` files and reading outputs back need torch. Its names are looked up when
they are first used, because numpy reads the thread limits of the synthesis process once, when it is loaded. The worker
sets those limits after it has imported its command line from this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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
    "write_outputs",
    "write_shard",
]

if TYPE_CHECKING:
    from nitrous_ema.snapshots.readable_snapshot import SnapshotView, StoredSnapshotView, stored_snapshot_view
    from nitrous_ema.snapshots.reading import FileSource, OpenFiles, Reader, Source
    from nitrous_ema.synthesis.in_memory import Synthesized, synthesize, synthesize_plan
    from nitrous_ema.synthesis.outputs.writer import write_outputs, write_shard
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
else:  # hidden from type checkers, to which a module's __getattr__ would make every misspelled name an Any
    _NAMES = {
        "nitrous_ema.snapshots.readable_snapshot": ("SnapshotView", "StoredSnapshotView", "stored_snapshot_view"),
        "nitrous_ema.snapshots.reading": ("FileSource", "OpenFiles", "Reader", "Source"),
        "nitrous_ema.synthesis.in_memory": ("Synthesized", "synthesize", "synthesize_plan"),
        "nitrous_ema.synthesis.outputs.writer": ("write_outputs", "write_shard"),
        "nitrous_ema.synthesis.plan": ("Column", "Plan", "plan_from_store", "plan_synthesis"),
        "nitrous_ema.synthesis.snapshot_selection": ("DEFAULT_TOLERANCE",),
        "nitrous_ema.synthesis.streaming": (
            "DEFAULT_MEMORY_BYTES",
            "Accumulate",
            "BlockSizes",
            "Consumer",
            "Progress",
            "engine_sizes",
            "passes",
            "stream",
            "stream_copied",
        ),
    }
    _HOMES = {name: module for module, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value  # later lookups of this name do not call this function
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
