"""A temporary folder for averages that wait for their evaluation.

It is beside the file of results, because that disk was chosen for this sweep; ``/tmp`` may be too small for averages.
Its name holds the signature of the process. If the process is killed, the next sweep with the same results removes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nitrous_ema._base.temporary_files import remove_stale, temporary_name, temporary_prefix
from nitrous_ema.snapshots.filesystem import FileSystem


@contextmanager
def temporary_folder(results: Path) -> Iterator[Path]:
    """Yield the path of a folder that no other process uses, and remove the folder at the end.

    The caller creates the folder if it needs one: a sweep that has all results needs none.

    Args:
        results: The file of results, beside which the folder lies. Its parent folder is created.
    """
    files, parent = FileSystem(), results.parent
    files.make_folders(parent)
    names = [name for name in files.list(parent) if name.startswith(temporary_prefix(results.name))]
    # The age matters only for folders of processes from before the last boot. With age 0 these are not removed.
    remove_stale(parent, names, untouched_seconds=lambda path: 0.0, remove=files.remove_tree)
    folder = parent / temporary_name(results.name)
    try:
        yield folder
    finally:
        files.remove_tree(folder)
