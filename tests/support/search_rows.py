"""Rows of a search with given values."""

from __future__ import annotations

from nitrous_ema.search.table import Row


def row(sigma_rel: float, value: float, step: int = 100, **more) -> Row:
    common = {
        "metric": "loss",
        "run": "r",
        "lineage": ((more.get("run", "r"), None),),
        "t": float(step),
        "maximize": False,
        "profile_error": 1e-3,
        "rounding": 1e-8,
        "tolerance": 1e-3,
        "excluded": (),
        "dtype": "model",
        "snapshots_read": 5,
        "bytes_read": 1000,
        "seconds": 0.5,
    }
    return Row(**{**common, "step": step, "sigma_rel": sigma_rel, "value": value, **more})
