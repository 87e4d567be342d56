"""Work beside the training loop: ``AsyncPostHocEMA``, and ``synthesize_worker``, a process of its own.

Read ``ema.py`` first, then ``lanes.py`` (averaging) and ``background_writer.py`` (snapshots). The work of the process
is in ``nitrous_ema.synthesis.worker``. The names are looked up when they are first used, for two reasons. ``python -m
nitrous_ema.async_.synthesize_worker`` requires that its module is not imported yet, and the worker runs without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["AsyncPostHocEMA", "synthesize_worker"]

if TYPE_CHECKING:
    from nitrous_ema.async_ import synthesize_worker
    from nitrous_ema.async_.ema import AsyncPostHocEMA
else:

    def __getattr__(name: str) -> object:
        if name == "synthesize_worker":
            return import_module("nitrous_ema.async_.synthesize_worker")  # and sets this attribute
        if name == "AsyncPostHocEMA":
            return import_module("nitrous_ema.async_.ema").AsyncPostHocEMA
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
