"""The file of a sweep's results: one JSON object per line, each durable before the next evaluation begins.

A crash or a power cut must not lose a finished result, and a later call must be able to continue from the file. Lines
are only appended, so a crash can cut the last line only, and the next writer repairs just this line. Any other text
means that the file is not a file of results; it is left unchanged.

RESULTS-1  A line is on disk when add() returns.                   test_a_result_is_synced_before_it_counts
RESULTS-2  A last line that a crash has cut is removed, and no     test_a_torn_last_line_is_repaired
    other line. A whole result without its newline is not removed.
RESULTS-3  Any other line that is not a result is an error that    test_a_line_that_is_no_result_is_named
    names the line: no other file is overwritten.
RESULTS-4  The process that adds a line or repairs the file holds  test_two_sweeps_take_turns_at_one_file
    its lock, so several sweeps may share the file.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from nitrous_ema._base.paths import local_path
from nitrous_ema.errors import ResultsError
from nitrous_ema.search.table import Row, SweepTable
from nitrous_ema.snapshots.bounded_json import brief, parse_json
from nitrous_ema.snapshots.filesystem import FileSystem, is_folder, is_there, read_whole, sync_folder, write_fully

_log = logging.getLogger(__name__)

_MAX_BYTES = 256 * 2**20  # a hundred thousand results and more; read whole
_MAX_VALUES = 10_000  # in one line, whose only lists are the excluded steps, the lineage and the fingerprint
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


class ResultsFile:
    """A file of sweep results.

    Args:
        path: The file; the first add() creates it.
        files: The file system; tests pass a recording one.
    """

    def __init__(self, path: str | os.PathLike[str], *, files: FileSystem | None = None) -> None:
        self.path = local_path("results", path).absolute()
        self._files = files or FileSystem()
        self._can_lock = True  # False once it was logged that the file system refuses

    def read(self) -> list[Row]:
        """Return all results in the order of the file; an empty list without a file. Changes nothing.

        Raises:
            ResultsError: A line is not a result. A cut last line is ignored.
            OSError: The file cannot be read.
        """
        try:
            return self._parsed(self._content())[0]
        except FileNotFoundError:
            return []

    def add(self, row: Row) -> None:
        """Append a result durably. A cut last line is removed first.

        Raises:
            ResultsError: As in read().
            OSError: The file cannot be written.
        """
        line = (json.dumps(_record(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        is_new = not is_there(self.path, self._files)
        with self._locked() as descriptor:
            end = self._repair(descriptor)
            write_fully(self._files, descriptor, line, end)
            self._files.fsync(descriptor)
        if is_new:  # fsync of a new file does not make its name durable
            sync_folder(self._files, self.path.parent)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self._files.make_folders(self.path.parent)
        descriptor = self._files.open_lines(self.path)
        try:
            try:
                self._files.lock_file(descriptor)
            except OSError as error:  # some network file systems do not support locks
                if self._can_lock:
                    _log.info("%s: its file system refuses locks (%s): run one sweep at a time", self.path, error)
                self._can_lock = False
            yield descriptor
        finally:
            self._files.close(descriptor)

    def _repair(self, descriptor: int) -> int:
        """Remove a cut last line, or add a missing newline; return the offset of the next line."""
        content = self._content()  # read under the lock: another sweep may have added lines
        whole, has_tail = self._parsed(content)[1:]
        if not has_tail:
            self._files.truncate(descriptor, whole)
            return whole
        write_fully(self._files, descriptor, b"\n", len(content))
        return len(content) + 1

    def _content(self) -> bytes:
        try:
            return read_whole(self.path, max_bytes=_MAX_BYTES, files=self._files)
        except ValueError as error:
            is_a_folder = is_folder(self.path, self._files)
            what = f"is a folder; expected the file of the results, such as {self.path / 'sweep.jsonl'}"
            raise ResultsError(
                f"{self.path} {what}."
                if is_a_folder
                else f"{self.path}: not a file of sweep results: {error}. Pass another file for the results.",
                path=self.path,
                line=0,
            ) from error

    def _parsed(self, content: bytes) -> tuple[list[Row], int, bool]:
        """Return the results, the offset after the last newline, and whether a whole result follows it."""
        whole = content.rfind(b"\n") + 1
        rows = []
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                rows.append(_row(line))
            except ValueError as error:
                raise ResultsError(
                    f"{self.path}, line {number}: not a sweep result: {error}. Remove this line, or pass another file "
                    "for the results.",
                    path=self.path,
                    line=number,
                ) from error
        # A cut line is never a JSON object: the closing brace is its last byte.
        with suppress(ValueError):
            return [*rows, _row(content[whole:])], whole, True
        return rows, whole, False


def read_table(path: str | os.PathLike[str]) -> SweepTable:
    """Return the results in a file that belong together with its last line, as a table.

    They have the metric, tolerance, exclusions, dtype and evaluation function of the last line. They belong to its
    run, to an ancestor of its run, or to a run that continues it. The last line also decides for all of them whether
    higher values are better.

    Raises:
        ResultsError: A line is not a result, or the file has no results.
        OSError: The file cannot be read.
    """
    found = ResultsFile(path).read()
    if not found:
        raise ResultsError(f"{path} contains no sweep results.", path=Path(path), line=0)
    last = found[-1]
    alike = [replace(row, maximize=last.maximize) for row in found if row.is_alike(last)]
    # A later line replaces an earlier one of the same step and length.
    chosen = {(row.step, row.sigma_rel): row for row in alike}
    others = len(found) - len(alike)
    notes = (
        (f"{others} other results in {path} differ in metric, run, tolerance, exclusions, dtype or evaluate.",)
        if others
        else ()
    )
    return SweepTable(tuple(chosen[key] for key in sorted(chosen)), notes)


def _record(row: Row) -> dict[str, Any]:
    """Return a row in JSON's types; numbers that are not finite become text, because JSON has none."""
    found = {**asdict(row), "excluded": list(row.excluded), "path": str(row.path) if row.path else None}
    found["evaluate"] = dict(row.evaluate)
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found.items()
    }


def _row(line: bytes) -> Row:
    found = parse_json(line, max_values=_MAX_VALUES)
    if type(found) is not dict:
        raise ValueError(f"{brief(repr(found))} is not an object")
    values: dict[str, Any] = {}
    for field in fields(Row):
        if field.name not in found and field.name == "evaluate":
            continue  # written before fingerprints were recorded: no evaluation function shares such a result
        if field.name not in found:
            raise ValueError(f"field {field.name!r} is missing")
        values[field.name] = _value(field.name, str(field.type), found[field.name])
    return Row(**values)


def _is_link(link: Any) -> bool:
    return type(link) is list and len(link) == 2 and type(link[0]) is str and type(link[1]) in (int, type(None))


def _value(name: str, kind: str, found: Any) -> Any:
    if name == "excluded" and type(found) is list and all(type(step) is int for step in found):
        return tuple(found)
    if name == "lineage" and type(found) is list and all(_is_link(link) for link in found):
        return tuple((run, left_at) for run, left_at in found)
    if name == "evaluate" and type(found) is dict and all(type(digest) is str for digest in found.values()):
        return tuple(found.items())
    if name == "path" and (found is None or type(found) is str):
        return found if found is None else Path(found)
    if kind == "float" and found in ("nan", "inf", "-inf"):
        return float(found)
    # type(), not isinstance(): JSON's true would pass for an int.
    if type(found) not in _KINDS.get(kind, ()):
        raise ValueError(f"field {name!r} is {brief(repr(found))}")
    return float(found) if kind == "float" else found
