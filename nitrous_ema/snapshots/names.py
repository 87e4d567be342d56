"""Names of runs, snapshot folders and files, and the error that names a damaged file.

A snapshot of step 1000 is the folder ``step-000000001000-RUN``, with one file ``rank-00000-of-00001.safetensors`` for
each rank. A newer version of the library may add a file that it merged from this snapshot and those before it, named by
the step where it begins: ``rank-00000-of-00001.from-000000000500.safetensors``. Where a file system refuses renames, a
file is written in one pass, under a name of its own: ``rank-00000-of-00001.one-pass-18f3a2b4c5d6e7f8.safetensors``, the
time in nanoseconds. A hidden snapshot has ``.trash-`` before the name of its folder; where folders cannot be renamed,
the note ``dropped-000000001000-RUN`` lies beside it. Folders of nitrous-ema 0.0.1 and ema-pytorch hold files
``{profile}.{step}.pt``.

A parser accepts exactly the names that its counterpart writes, so that no two names mean the same snapshot.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path

from nitrous_ema.errors import SnapshotDamaged, SnapshotUnavailable, SnapshotUnreadable
from nitrous_ema.snapshots.filesystem import FORBIDDEN, UNAVAILABLE, reason

IMPORTED = "imported"
"""Field of a stamp's ``trainer`` in snapshots that were imported: the fingerprint of their legacy files."""

INCOMPLETE_COPY = "Incomplete copy? Copy it again"
"""In messages on files that are shorter than their header states."""

_RUN = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}-[0-9a-f]{8}")
_FOLDER = re.compile(rf"step-([0-9]{{12,18}})-({_RUN.pattern})")
_HIDDEN = re.compile(rf"\.trash-({_FOLDER.pattern})(?:\.[0-9a-f]{{8}})?")  # the suffix: its removal has begun
_RANK_FILE = re.compile(r"rank-([0-9]{5,9})-of-([0-9]{5,9})\.safetensors")
_ONE_PASS_FILE = re.compile(r"(rank-[0-9]{5,9}-of-[0-9]{5,9})\.one-pass-[0-9a-f]{16}(\.safetensors)")
_MERGED_FILE = re.compile(r"rank-[0-9]{5,9}-of-[0-9]{5,9}\.from-[0-9]{12,18}\.safetensors")
_LEGACY_FILE = re.compile(r"(0|[1-9][0-9]{0,8})\.([1-9][0-9]{0,17})\.pt")  # one name for each profile and step


def new_run_id(now: datetime | None = None) -> str:
    """Return a new id for a run: its start in UTC and 8 random hexadecimal digits.

    Ids sort by time, and are safe in file names.

    Args:
        now: Start of the run, with its time zone; by default the current time.
    """
    started = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    return f"{started:%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}"


def is_run_id(value: object) -> bool:
    """Return whether a value is a run id as ``new_run_id`` returns it."""
    return type(value) is str and _RUN.fullmatch(value) is not None


def folder_name(step: int, run: str) -> str:
    """Return the name of a snapshot's folder."""
    return f"step-{step:012d}-{run}"


def parse_folder_name(name: str) -> tuple[int, str] | None:
    """Return step and run of a snapshot's folder, or None for any other name."""
    found = _FOLDER.fullmatch(name)
    # Compared with the name that is written: a thirteenth digit may be a leading zero.
    return (int(found[1]), found[2]) if found and folder_name(int(found[1]), found[2]) == name else None


def hidden_name(name: str) -> str:
    """Return the name that a snapshot's folder has once it is hidden from listings."""
    return f".trash-{name}"


def parse_hidden_name(name: str) -> tuple[int, str] | None:
    """Return step and run of a hidden snapshot's folder, also during its removal, or None for any other name."""
    found = _HIDDEN.fullmatch(name)
    return parse_folder_name(found[1]) if found else None


def candidate_paths(path: Path) -> tuple[Path, ...]:
    """Return the paths at which a file may be found, in the order in which to try them.

    A snapshot that was listed may have been hidden since. It may also have been hidden when the first path was tried,
    and restored before the second one: so the first path is tried once more.
    """
    if parse_folder_name(path.parent.name) is None:
        return (path,)
    return path, path.parent.with_name(hidden_name(path.parent.name)) / path.name, path


def closed_note_name(run: str) -> str:
    """Return the name of the note that a run writes no more snapshots."""
    return f"closed-{run}"


def parse_closed_note_name(name: str) -> str | None:
    """Return the run whose end a note records, or None for any other name."""
    return name.removeprefix("closed-") if name.startswith("closed-") else None


def pin_note_name(step: int, run: str) -> str:
    """Return the name of the note that a snapshot is pinned."""
    return f"pin-{step:012d}-{run}"


def parse_pin_note_name(name: str) -> tuple[int, str] | None:
    """Return step and run of a pin's note, or None for any other name."""
    known = parse_folder_name(f"step-{name[4:]}")
    return known if name.startswith("pin-") else None


def dropped_note_name(step: int, run: str) -> str:
    """Return the name of the note that a snapshot is hidden where its folder cannot be renamed."""
    return f"dropped-{step:012d}-{run}"


def parse_dropped_note_name(name: str) -> tuple[int, str] | None:
    """Return step and run of a note that a snapshot is hidden, or None for any other name."""
    known = parse_folder_name(f"step-{name[8:]}")
    return known if name.startswith("dropped-") else None


def dropped(names: Collection[str]) -> frozenset[tuple[int, str]]:
    """Return step and run of the snapshots that notes among these names hide: all but those that are pinned."""
    found = frozenset(filter(None, map(parse_dropped_note_name, names)))
    return found.difference(filter(None, map(parse_pin_note_name, names))) if found else found


def listed_folders(names: Collection[str]) -> list[tuple[int, str]]:
    """Return step and run of the snapshots' folders among these names that are not hidden."""
    hidden = dropped(names)
    return [known for known in map(parse_folder_name, names) if known is not None and known not in hidden]


def is_note_name(name: str) -> bool:
    """Return whether a name is that of a note, also if its step or run is not a snapshot's."""
    return name.startswith(("closed-", "pin-", "dropped-"))


def rank_file_name(rank: int, world_size: int) -> str:
    """Return the name of one rank's file in the folder of a snapshot."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def parse_rank_file_name(name: str) -> tuple[int, int] | None:
    """Return rank and world size of a rank's file, or None for any other name."""
    found = _RANK_FILE.fullmatch(name)
    if not found or rank_file_name(int(found[1]), int(found[2])) != name or int(found[1]) >= int(found[2]):
        return None
    return int(found[1]), int(found[2])


@functools.lru_cache(maxsize=16)
def rank_file_names(world_size: int) -> tuple[str, ...]:
    """Return the names of all files of a snapshot that several ranks wrote, in the order of the ranks."""
    return tuple(rank_file_name(rank, world_size) for rank in range(world_size))


def all_rank_files(names: Collection[str]) -> tuple[str, ...] | None:
    """Return the files of a snapshot in the order of their ranks, if these names are those of all of its files.

    None does not mean that they are not: files written in one pass are looked for by ``FolderInspector.examine``. Here
    no name but one is parsed, since a listing may have hundreds of thousands of them.
    """
    world_size = next((parsed[1] for parsed in map(parse_rank_file_name, names) if parsed), 0)
    if not 0 < world_size <= len(names):  # a forged name may state a billion ranks
        return None
    expected = rank_file_names(world_size)
    return expected if set(names).issuperset(expected) else None


def one_pass_file_name(rank: int, world_size: int, now_ns: int) -> str:
    """Return the name under which one rank's file is written in one pass; names of later moments sort later."""
    return rank_file_name(rank, world_size).replace(".", f".one-pass-{now_ns:016x}.")


def without_one_pass(name: str) -> str:
    """Return the name that a file written in one pass would have after a rename; any other name unchanged."""
    found = _ONE_PASS_FILE.fullmatch(name)
    return found[1] + found[2] if found else name


def is_one_pass_name(name: str) -> bool:
    """Return whether a name is that of a file which was written in one pass."""
    return without_one_pass(name) != name


def is_snapshot_file_name(name: str) -> bool:
    """Return whether a name is that of one of a snapshot's files, however it was written."""
    return parse_rank_file_name(without_one_pass(name)) is not None or is_merged_file_name(name)


def is_merged_file_name(name: str) -> bool:
    """Return whether a name is that of a file which was merged from several snapshots."""
    return _MERGED_FILE.fullmatch(name) is not None


def parse_legacy_file_name(name: str) -> tuple[int, int] | None:
    """Return profile and step of a file of nitrous-ema 0.0.1 or ema-pytorch, or None for any other name."""
    found = _LEGACY_FILE.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def damaged(path: Path, reason: str, *, chunk: int | None = None) -> SnapshotDamaged:
    """Return the error for a damaged file. Its message names the option that excludes the snapshot.

    Args:
        path: The file, under its final name.
        reason: What was found, and what was expected.
        chunk: Index of the chunk with the wrong checksum, if the checksum of a chunk is wrong.
    """
    known = parse_folder_name(path.parent.name)
    step = known[0] if known else None
    remedy = f" {exclusion_hint(step)}" if step is not None else ""
    where = "" if chunk is None else f"chunk {chunk}: "
    return SnapshotDamaged(f"{path} is damaged: {where}{reason}.{remedy}", path=path, step=step, chunk=chunk)


def unreadable(path: Path, error: OSError, what: str = "read") -> SnapshotUnreadable:
    """Return the error for a file or folder that the system does not read: its own, or that of its file system.

    Args:
        path: The file or the snapshot's folder, under its final name.
        error: Why the call failed.
        what: The call.
    """
    known = parse_folder_name(path.parent.name) or parse_folder_name(path.name)
    step = known[0] if known else None
    if error.errno in FORBIDDEN:
        text = f"{path} cannot be {what}: {reason(error, path)}. It may be intact: give this user access to it."
    elif error.errno in UNAVAILABLE:
        text = (
            f"{path} could not be {what}, after several attempts: {reason(error, path)}. Its disk or network file "
            "system fails, and it may be intact: check the file system, then try again."
        )
    else:
        return damaged(path, f"it cannot be {what}: {reason(error, path)}")
    or_exclude = "" if step is None else f" If the error persists: {exclusion_hint(step)}"
    return SnapshotUnavailable(text + or_exclude, path=path, step=step)


def exclusion_hint(step: int) -> str:
    """Return the sentence of a message that names the options which exclude a snapshot, and commands that have them."""
    return (
        f"Exclude this snapshot with exclude=[{step}] (on the command line: --exclude {step} of synthesize or prune)."
    )
