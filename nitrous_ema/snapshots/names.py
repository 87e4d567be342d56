"""Names of runs, folders and files, and the error for a file that is damaged."""

from __future__ import annotations

import re
import secrets
from datetime import datetime, timezone
from pathlib import Path

from nitrous_ema.errors import SnapshotDamaged

_RUN = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}-[0-9a-f]{8}")


_FOLDER = re.compile(rf"step-([0-9]{{12,18}})-({_RUN.pattern})")


_HIDDEN = re.compile(rf"\.trash-({_FOLDER.pattern})(?:\.[0-9a-f]{{8}})?")


_OLD_FILE = re.compile(r"(0|[1-9][0-9]{0,8})\.([1-9][0-9]{0,17})\.pt")  # one name for each profile and step


_RANK_FILE = re.compile(r"rank-([0-9]{5,9})-of-([0-9]{5,9})\.safetensors")


def new_run_id(now: datetime | None = None) -> str:
    """Draw the name of a run: when it started, and 8 random digits. Sorts by time; safe in file names.

    Args:
        now: Start of the run, with its time zone; the present moment by default.
    """
    started = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    return f"{started:%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}"


def folder_name(step: int, run: str) -> str:
    """Name of a snapshot's folder."""
    return f"step-{step:012d}-{run}"


def parse_folder_name(name: str) -> tuple[int, str] | None:
    """Step and run of a snapshot's folder; None for any other name."""
    found = _FOLDER.fullmatch(name)
    return (int(found[1]), found[2]) if found and folder_name(int(found[1]), found[2]) == name else None


def hidden_name(name: str) -> str:
    """Name of a snapshot's folder that no listing shows any more."""
    return f".trash-{name}"


def parse_hidden_name(name: str) -> tuple[int, str] | None:
    """Step and run of a hidden snapshot's folder, also one that is being removed; None for any other name."""
    found = _HIDDEN.fullmatch(name)
    return parse_folder_name(found[1]) if found else None


def places(path: Path) -> tuple[Path, ...]:
    """Where to look for a file, in this order: a snapshot's may have been hidden since, or hidden and brought back."""
    if parse_folder_name(path.parent.name) is None:
        return (path,)
    return path, path.parent.with_name(hidden_name(path.parent.name)) / path.name, path


def rank_file_name(rank: int, world_size: int) -> str:
    """Name of one rank's file in the folder."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def parse_rank_file_name(name: str) -> tuple[int, int] | None:
    """Rank and world size of a final file name; None for any other name."""
    found = _RANK_FILE.fullmatch(name)
    if not found or rank_file_name(int(found[1]), int(found[2])) != name or int(found[1]) >= int(found[2]):
        return None
    return int(found[1]), int(found[2])


def parse_old_file_name(name: str) -> tuple[int, int] | None:
    """Profile and step of a file of nitrous-ema 0.0.1 or ema-pytorch, by its name; None for any other name."""
    found = _OLD_FILE.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def damaged(path: Path, what: str, *, chunk: int | None = None) -> SnapshotDamaged:
    """The error for a file that does not hold what was written, with the way to go on without it.

    Args:
        path: The file, under its final name.
        what: What was found, and what was expected.
        chunk: Index of the chunk with the wrong checksum, if it is that.
    """
    known = parse_folder_name(path.parent.name)
    step = known[0] if known else None
    remedy = f" Leave this snapshot out with exclude=[{step}] (on the command line: --exclude {step})." if known else ""
    where = "" if chunk is None else f"chunk {chunk}: "
    return SnapshotDamaged(f"{path} is damaged: {where}{what}.{remedy}", path=path, step=step, chunk=chunk)
