"""Post-hoc EMA: store a few averages of the weights during training, choose the EMA length afterwards.

In a training loop (the first is a drop-in for nitrous-ema 0.0.1, the second works beside the training):

    PostHocEMA(model), AsyncPostHocEMA(model)    update() after each optimizer step; ema_models, average_parameters()
    KarrasEMA(model)                             one average
    KeepCount, KeepBytes, KeepGeometric, KeepAll keep=: which snapshots stay on disk

After it:

    PostHocEMA.synthesize_ema_model(sigma_rel=)  a model with an average of any length
    load_average(model, path)                    the same from a file that `nitrous-ema synthesize` wrote
    sweep(evaluate, ...)                         the best length by evaluation
    SnapshotStore, LegacyFolder                  folders of snapshots, of this version and of others

Begin with docs/quickstart.md; docs/glossary.md has the twelve terms. The command is `nitrous-ema --help`.

The names in ``__all__`` are imported when they are first used. So importing the package, or one of its modules that
works without torch, does not import torch. docs/design.md is a tour of the packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from nitrous_ema._version import __version__

__all__ = [
    "AsyncPostHocEMA",
    "KarrasEMA",
    "KeepAll",
    "KeepBytes",
    "KeepCount",
    "KeepGeometric",
    "LegacyFolder",
    "NitrousError",
    "NitrousWarning",
    "PostHocEMA",
    "SnapshotStore",
    "__version__",
    "load_average",
    "sweep",
]

if TYPE_CHECKING:
    from nitrous_ema.async_.ema import AsyncPostHocEMA
    from nitrous_ema.averaging.ema import KarrasEMA, PostHocEMA
    from nitrous_ema.averaging.load_average import load_average
    from nitrous_ema.errors import NitrousError, NitrousWarning
    from nitrous_ema.posthoc.keep_rules import KeepAll, KeepBytes, KeepCount, KeepGeometric
    from nitrous_ema.search.sweep import sweep
    from nitrous_ema.snapshots.legacy.folder import LegacyFolder
    from nitrous_ema.snapshots.store import SnapshotStore
else:  # hidden from type checkers: with a module's __getattr__ they accept every misspelled name as Any
    _HOMES = {
        "AsyncPostHocEMA": "nitrous_ema.async_.ema",
        "KarrasEMA": "nitrous_ema.averaging.ema",
        "KeepAll": "nitrous_ema.posthoc.keep_rules",
        "KeepBytes": "nitrous_ema.posthoc.keep_rules",
        "KeepCount": "nitrous_ema.posthoc.keep_rules",
        "KeepGeometric": "nitrous_ema.posthoc.keep_rules",
        "LegacyFolder": "nitrous_ema.snapshots.legacy.folder",
        "NitrousError": "nitrous_ema.errors",
        "NitrousWarning": "nitrous_ema.errors",
        "PostHocEMA": "nitrous_ema.averaging.ema",
        "SnapshotStore": "nitrous_ema.snapshots.store",
        "load_average": "nitrous_ema.averaging.load_average",
        "sweep": "nitrous_ema.search.sweep",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value  # the next access does not call __getattr__
        return value

    def __dir__() -> list[str]:
        return sorted([*__all__, "async_", "errors", "posthoc", "profile", "search", "snapshots", "synthesis"])
