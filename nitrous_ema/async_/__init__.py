"""Everything that runs beside the training loop: the background service and the synthesis process.

Looked up when first used: ``python -m nitrous_ema.async_.synthesize_worker`` must find its module not imported yet,
and runs without torch.
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
            return import_module("nitrous_ema.async_.synthesize_worker")  # the import system keeps it here
        if name == "AsyncPostHocEMA":
            return import_module("nitrous_ema.async_.ema").AsyncPostHocEMA
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
