"""Names of files and folders that are not finished, and the removal of those whose process has ended.

A temporary name is hidden, and holds the signature of the process that made it (``processes.signature``). A process that
is killed leaves its temporary files behind, some as large as a model. The next process that writes to the same folder
removes such a file only if it is certain that its writer has ended.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from nitrous_ema._base.processes import SIGNATURE, ProcessState, signature, state_of_signature

_NAME_BYTES = 100  # of the final name: file systems allow 255 bytes in all, and a signature takes up to 90
_TEMPORARY = re.compile(rf"\..+\.(?P<signature>{SIGNATURE.pattern})-[0-9a-f]{{16}}", re.DOTALL)


def temporary_name(name: str) -> str:
    """Draw a new hidden name for a file that will be called ``name``; it holds this process's signature."""
    return f"{temporary_prefix(name)}{signature()}-{secrets.token_hex(8)}"


def temporary_prefix(name: str) -> str:
    """Return what all temporary names of a file begin with."""
    return f".{os.fsencode(name)[:_NAME_BYTES].decode(errors='ignore')}."


def writer_state(name: str, *, untouched_seconds: float) -> ProcessState:
    """Return what became of the process that drew a temporary name; "unknown" for any other name.

    Args:
        name: The name of a file or folder, without its path.
        untouched_seconds: Seconds since its last change.
    """
    found = _TEMPORARY.fullmatch(name)
    return state_of_signature(found["signature"], untouched_seconds=untouched_seconds) if found else "unknown"


def remove_stale(
    folder: Path, names: Iterable[str], *, untouched_seconds: Callable[[Path], float], remove: Callable[[Path], object]
) -> None:
    """Remove what processes that have certainly ended left in a folder. What cannot be removed stays.

    Args:
        folder: The folder.
        names: Names in it; only temporary ones are looked at.
        untouched_seconds: Returns the seconds since a file's last change.
        remove: Removes one file or folder.
    """
    for name in names:
        if _TEMPORARY.fullmatch(name):
            with suppress(OSError):
                if writer_state(name, untouched_seconds=untouched_seconds(folder / name)) == "gone":
                    remove(folder / name)
