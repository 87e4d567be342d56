"""Names of outputs that are not finished, and what is done with those of processes that were killed.

Ctrl-C and SIGTERM leave none. A process that is killed outright leaves files as large as its averages, which nobody
reads. Whoever writes to the same folder next removes them, if it is certain that their writer is gone.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from nitrous_ema.processes import fate_of_signature, signature
from nitrous_ema.snapshots.files import FileSystem

_NAME_BYTES = 100  # of the output's own: with them no name is longer than its 255 bytes
_UNFINISHED = re.compile(r"\..*\.([0-9a-f]{16}(?:\.[0-9a-f]+){4})-[0-9a-f]{8}\.tmp", re.DOTALL)


def unfinished_path(path: Path) -> Path:
    """A new name for an output that is not finished: hidden, in the same folder, and it tells who wrote it."""
    begin = os.fsencode(path.name)[:_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{begin}.{signature()}-{secrets.token_hex(4)}.tmp")


def remove_unfinished(files: FileSystem, folders: Iterable[Path]) -> None:
    """Remove what processes that are certainly gone have left in these folders. What cannot be removed stays."""
    for folder in dict.fromkeys(folders):
        with suppress(OSError):
            for name in files.list(folder):
                if (found := _UNFINISHED.fullmatch(name)) is not None:
                    with suppress(OSError):
                        _remove_if_left(files, folder / name, found[1])


def _remove_if_left(files: FileSystem, path: Path, writer: str) -> None:
    untouched_seconds = time.time() - files.lstat(path).st_ctime
    if fate_of_signature(writer, untouched_seconds=untouched_seconds) == "gone":
        files.unlink(path)
