"""A folder for averages until they were evaluated, beside the results, where there is room for large files.

Its name tells whose it is, so that what a killed process left is removed by the next sweep with the same results.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nitrous_ema._base.temporary_files import remove_stale, temporary_name, temporary_prefix


@contextmanager
def temporary_folder(results: Path) -> Iterator[Path]:
    """The name of a folder that nobody else uses; the folder is made by whoever needs it, and removed at the end.

    Args:
        results: The file beside which it lies; its folder is made.
    """
    parent = results.parent
    parent.mkdir(parents=True, exist_ok=True)
    own = [each.name for each in parent.iterdir() if each.name.startswith(temporary_prefix(results.name))]
    remove_stale(parent, own, untouched_seconds=lambda path: 0.0, remove=partial(shutil.rmtree, ignore_errors=True))
    folder = parent / temporary_name(results.name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
