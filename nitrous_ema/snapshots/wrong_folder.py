"""Which folder to give where another one was given: the folder of a single snapshot, or one above the snapshots."""

from __future__ import annotations

from pathlib import Path

from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.names import (
    is_snapshot_file_name,
    parse_folder_name,
    parse_legacy_file_name,
)

_MOST_LISTED = 100  # folders inside the given one; a home directory has many
_MOST_NAMED = 3


def right_folder(files: FileSystem, root: Path) -> str:
    """Return a sentence that names the folder to give instead of ``root``; an empty text if it knows no other.

    Args:
        files: The file system.
        root: A folder, a file, or a path that does not exist.
    """
    if parse_folder_name(root.name):
        return f"This is the folder of a single snapshot: give the snapshot folder, {root.parent}."
    if parse_folder_name(root.parent.name) and is_snapshot_file_name(root.name):
        return f"This is a file of a single snapshot: give the snapshot folder, {root.parent.parent}."
    names = [name for name in _names_in(files, root) if not name.startswith(".")]
    if any(map(_is_ours, names)):
        return ""
    inside = [str(root / name) for name in names[:_MOST_LISTED] if any(map(_is_ours, _names_in(files, root / name)))]
    if not inside:
        return ""
    more = f" and {len(inside) - _MOST_NAMED} more" if len(inside) > _MOST_NAMED else ""
    which = "that folder" if len(inside) == 1 else "one of them"
    return f"There are snapshots in {', '.join(inside[:_MOST_NAMED])}{more}: give {which}."


def _names_in(files: FileSystem, folder: Path) -> list[str]:
    try:
        return sorted(files.list(folder))
    except OSError:  # a file, or a folder that this process may not list
        return []


def _is_ours(name: str) -> bool:
    return parse_folder_name(name) is not None or parse_legacy_file_name(name) is not None
