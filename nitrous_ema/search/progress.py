"""The progress of a sweep: a bar of tqdm where tqdm is installed, on terminals and in notebooks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nitrous_ema.search.table import Row


class SweepProgress:
    """Counts the results of a sweep.

    Args:
        bar: A bar of tqdm, or None.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._best: Row | None = None

    def add(self, row: Row, *, planned: bool) -> None:
        """Count one result. One that was not ``planned`` is of the refinement, whose number is not known before."""
        if self._bar is None:
            return
        if math.isfinite(row.value) and (self._best is None or row.loss < self._best.loss):
            self._best = row
            self._bar.set_postfix_str(f"best {row.value:.4g} at sigma_rel {row.sigma_rel:g}", refresh=False)
        self._bar.total += not planned
        self._bar.update()


@contextmanager
def sweep_progress(total: int) -> Iterator[SweepProgress]:
    """Yield the progress of a sweep of ``total`` results."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield SweepProgress(None)
        return
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    # None: no bar where the output is not a terminal. The output of a notebook is not one, but shows the bar.
    with tqdm(total=total, desc="sweep", unit="average", disable=False if in_notebook else None) as bar:
        yield SweepProgress(None if bar.disable else bar)
