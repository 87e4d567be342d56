"""The file of a sweep's results: one JSON object a line, each durable before the next evaluation begins.

R1  A line is on disk when add() returns.                            test_a_result_is_synced_before_it_counts
R2  A last line that a crash has cut is removed, and no other; one   test_a_torn_last_line_is_repaired
    that lacks only its end is kept.
R3  Anything else that is no result is an error that names the       test_a_line_that_is_no_result_is_named
    line: nobody's file is overwritten.
R4  Who adds a line or mends the file holds its lock, so several     test_two_sweeps_take_turns_at_one_file
    sweeps may share it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from nitrous_ema.errors import ResultsError
from nitrous_ema.search.table import Row, SweepTable
from nitrous_ema.snapshots.bounded_json import brief, parse_json
from nitrous_ema.snapshots.filesystem import FileSystem, sync_folder, write_fully

_MAX_VALUES = 10_000  # in a line; steps left out and runs are the only lists
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


class ResultsFile:
    """Results by recipe, step and length.

    Args:
        path: The file; made by the first add().
        files: The file system; tests put a recording one here.
    """

    def __init__(self, path: str | os.PathLike[str], *, files: FileSystem | None = None) -> None:
        self.path = Path(path).absolute()
        self._files = files or FileSystem()

    def read(self) -> list[Row]:
        """All results, in the order in which they came; an empty list if there is no file. Changes nothing.

        Raises:
            ResultsError: A line is no result; a cut last one is passed over.
            OSError: The file cannot be read.
        """
        try:
            return self._parsed(self.path.read_bytes())[0]
        except FileNotFoundError:
            return []
        except IsADirectoryError as error:
            raise ResultsError(
                f"{self.path} is a folder; expected the file of the results, such as {self.path / 'sweep.jsonl'}.",
                path=self.path,
                line=0,
            ) from error

    def add(self, row: Row) -> None:
        """Add a line, durably; a cut last line goes first.

        Raises:
            ResultsError: As read().
            OSError: The file cannot be written.
        """
        line = (json.dumps(_record(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        is_new = not self.path.exists()
        with self._locked() as descriptor:
            end = self._mended(descriptor)
            write_fully(self._files, descriptor, line, end)
            self._files.fsync(descriptor)
        if is_new:
            sync_folder(self._files, self.path.parent)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            self._files.close(descriptor)

    def _mended(self, descriptor: int) -> int:
        """Remove a cut last line, or end one that lacks only its end; returns where the next one begins."""
        content = self.path.read_bytes()
        whole, tail = self._parsed(content)[1:]
        if not tail:
            os.ftruncate(descriptor, whole)
            return whole
        write_fully(self._files, descriptor, b"\n", len(content))
        return len(content) + 1

    def _parsed(self, content: bytes) -> tuple[list[Row], int, bool]:
        """The results, where the last line that has its end ends, and whether a whole result comes after it."""
        whole = content.rfind(b"\n") + 1
        rows = []
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                rows.append(_row(line))
            except ValueError as error:
                raise ResultsError(
                    f"{self.path}, line {number}: no result of a sweep: {error}. Remove that line, or name another "
                    "file for the results.",
                    path=self.path,
                    line=number,
                ) from error
        with suppress(ValueError):
            return [*rows, _row(content[whole:])], whole, True
        return rows, whole, False


def read_table(path: str | os.PathLike[str]) -> SweepTable:
    """All results in a file that are alike that of its last line.

    They have its metric, tolerance, exclusions and type, and are of its run, of what that continues or of what
    continues that. That line also says whether higher is better: results of a sweep that was told otherwise count in
    the same way.

    Raises:
        ResultsError: A line is no result, or there is none.
        OSError: The file cannot be read.
    """
    found = ResultsFile(path).read()
    if not found:
        raise ResultsError(f"{path} has no results of a sweep.", path=Path(path), line=0)
    last = found[-1]
    alike = [replace(row, maximize=last.maximize) for row in found if row.is_alike(last)]
    chosen = {(row.step, row.sigma_rel): row for row in alike}
    others = len(found) - len(alike)
    notes = (
        (f"{others} results in {path} are of another metric, run, tolerance, exclusion or dtype.",) if others else ()
    )
    return SweepTable(tuple(chosen[key] for key in sorted(chosen)), notes)


def _record(row: Row) -> dict[str, Any]:
    """A row as JSON has it: numbers that are not finite as text."""
    found = {**asdict(row), "excluded": list(row.excluded), "path": str(row.path) if row.path else None}
    return {
        name: repr(value) if isinstance(value, float) and value - value != 0 else value for name, value in found.items()
    }


def _row(line: bytes) -> Row:
    found = parse_json(line, max_values=_MAX_VALUES)
    if type(found) is not dict:
        raise ValueError(f"{brief(repr(found))} is no object")
    values: dict[str, Any] = {}
    for field in fields(Row):
        if field.name not in found:
            raise ValueError(f"it has no {field.name!r}")
        values[field.name] = _value(field.name, str(field.type), found[field.name])
    return Row(**values)


def _is_link(link: Any) -> bool:
    return type(link) is list and len(link) == 2 and type(link[0]) is str and type(link[1]) in (int, type(None))


def _value(name: str, kind: str, found: Any) -> Any:
    if name == "excluded" and type(found) is list and all(type(step) is int for step in found):
        return tuple(found)
    if name == "lineage" and type(found) is list and all(_is_link(link) for link in found):
        return tuple((run, left_at) for run, left_at in found)
    if name == "path" and (found is None or type(found) is str):
        return found if found is None else Path(found)
    if kind == "float" and found in ("nan", "inf", "-inf"):
        return float(found)
    if type(found) not in _KINDS.get(kind, ()):
        raise ValueError(f"its {name!r} is {brief(repr(found))}")
    return float(found) if kind == "float" else found
