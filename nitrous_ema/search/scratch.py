"""A folder for averages until they were evaluated, beside the results, where there is room for large files.

Its name tells whose it is, so that what a killed process left is removed by the next sweep with the same results.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from nitrous_ema.processes import fate_of_signature, signature


@contextmanager
def scratch_folder(results: Path) -> Iterator[Path]:
    """The name of a folder that nobody else uses; the folder is made by whoever needs it, and removed at the end.

    Args:
        results: The file beside which it lies; its folder is made.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{results.name}."
    for left in list(results.parent.iterdir()):
        owner = left.name.removeprefix(prefix).rpartition("-")[0]
        if left.name.startswith(prefix) and fate_of_signature(owner, untouched_seconds=0) == "gone":
            shutil.rmtree(left, ignore_errors=True)
    folder = results.parent / f"{prefix}{signature()}-{token_hex(4)}"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
