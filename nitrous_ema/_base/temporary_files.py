"""Names of unfinished files and folders, and their removal once the process that wrote them has ended.

A killed process leaves its temporary files behind, some as large as a model. Removing them must never hit a file that
another process still writes. A temporary name is therefore hidden and contains the signature of its process
(``processes.signature``). The next process that writes to the same folder removes the file only if its writer has
certainly ended (``processes.state_of_signature``): outputs and sweeps by ``remove_stale``, snapshots by
``SnapshotRemover.clean_up``.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from nitrous_ema._base.processes import SIGNATURE, ProcessState, signature, state_of_signature

# Bytes of the final name in a temporary name: file systems allow 255 bytes in all, and a signature takes up to 90.
_NAME_BYTES = 100
_TEMPORARY = re.compile(rf"\..+\.(?P<signature>{SIGNATURE.pattern})-[0-9a-f]{{16}}", re.DOTALL)


def temporary_name(name: str) -> str:
    """Return a new hidden name for a file that will be renamed to ``name``; it contains this process's signature."""
    return f"{temporary_prefix(name)}{signature()}-{secrets.token_hex(8)}"


def temporary_prefix(name: str) -> str:
    """Return the beginning of all temporary names of a file.

    Two names with the same first 100 bytes share this beginning.
    """
    return f".{os.fsencode(name)[:_NAME_BYTES].decode(errors='ignore')}."


def writer_state(name: str, *, untouched_seconds: float) -> ProcessState:
    """Return whether the process that made a temporary name still runs; "unknown" for any other name.

    Args:
        name: The name of a file or folder, without its path.
        untouched_seconds: Seconds since the last change of the file.
    """
    match = _TEMPORARY.fullmatch(name)
    return state_of_signature(match["signature"], untouched_seconds=untouched_seconds) if match else "unknown"


def remove_stale(
    folder: Path, names: Iterable[str], *, untouched_seconds: Callable[[Path], float], remove: Callable[[Path], object]
) -> None:
    """Remove the temporary files of processes that have certainly ended. An OSError leaves that file in place.

    Args:
        folder: The folder that contains them.
        names: Names in the folder; names that are not temporary are skipped.
        untouched_seconds: Returns the seconds since a file's last change.
        remove: Removes one file or folder.
    """
    for name in names:
        if _TEMPORARY.fullmatch(name):
            with suppress(OSError):
                if writer_state(name, untouched_seconds=untouched_seconds(folder / name)) == "gone":
                    remove(folder / name)
