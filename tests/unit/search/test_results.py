from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path

import pytest

from nitrous_ema import search
from nitrous_ema.errors import ResultsError
from nitrous_ema.search.results import ResultsFile, read_table
from tests.support.search_rows import row
from tests.support.small_snapshots import Recorded

ROWS = (
    row(0.05, 3.0, excluded=(7,), path=Path("/a/é b")),
    row(0.1, math.nan),
    row(1 / 9, -math.inf, maximize=True),
    row(0.15, 0.1 + 0.2),
)


@pytest.fixture
def path(tmp_path) -> Path:
    file = ResultsFile(tmp_path / "deep" / "results.jsonl")
    for each in ROWS:
        file.add(each)
    return file.path


def same(found, expected) -> bool:
    """Equality in which NaN equals NaN."""
    return repr(found) == repr(expected)


def test_results_come_back_to_the_bit(path):
    assert same(ResultsFile(path).read(), list(ROWS))


def test_every_line_is_json_for_any_reader(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [each["value"] for each in found] == [3.0, "nan", "-inf", 0.1 + 0.2]
    assert found[0]["excluded"] == [7]


def test_no_file_has_no_results(tmp_path):
    assert ResultsFile(tmp_path / "none").read() == []
    assert list(tmp_path.iterdir()) == []


def test_folder_is_not_a_file_of_results(tmp_path):
    with pytest.raises(ResultsError, match=r"is a folder; expected the file of the results"):
        ResultsFile(tmp_path).read()


def test_a_result_is_synced_before_it_counts(tmp_path):
    files = Syncs()
    ResultsFile(tmp_path / "results", files=files).add(ROWS[0])
    ResultsFile(tmp_path / "results", files=files).add(ROWS[1])
    assert files.done == ["write", "fsync", "fsync_folder", "write", "fsync"]


class Syncs(Recorded):
    """Records kinds of calls; the files were opened elsewhere."""

    def __init__(self):
        super().__init__()
        self.done = []

    def write_at(self, descriptor, buffer, offset):
        self.open[descriptor] = "results"
        self.done.append("write")
        return super().write_at(descriptor, buffer, offset)

    def fsync(self, descriptor):
        self.done.append("fsync")
        super().fsync(descriptor)

    def fsync_folder(self, path):
        self.done.append("fsync_folder")
        super().fsync_folder(path)


def test_a_torn_last_line_is_repaired(path):
    """Wherever it was cut, earlier results remain, and the next one has a line of its own."""
    whole = path.read_bytes()
    begin = whole[:-1].rfind(b"\n") + 1
    for cut in range(begin, len(whole)):
        path.write_bytes(whole[:cut])
        kept = list(ROWS) if cut == len(whole) - 1 else list(ROWS[:-1])
        assert same(ResultsFile(path).read(), kept)
        assert path.stat().st_size == cut  # reading changes nothing
        ResultsFile(path).add(ROWS[0])
        assert same(ResultsFile(path).read(), [*kept, ROWS[0]])


def test_two_sweeps_take_turns_at_one_file(path):
    """The other one is in the middle of a line."""
    whole = path.read_bytes()
    with path.open("ab", buffering=0) as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(whole[:20])
        added = pool.submit(ResultsFile(path).add, ROWS[1])
        with pytest.raises(FutureTimeout):  # the builtin one from Python 3.11 on
            added.result(timeout=0.2)
        other.write(whole[20 : whole.index(b"\n") + 1])
        fcntl.flock(other, fcntl.LOCK_UN)
        added.result(timeout=30)
    assert same(ResultsFile(path).read(), [*ROWS, ROWS[0], ROWS[1]])


def test_file_system_that_refuses_locks_is_noted_once(path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    caplog.set_level("INFO")
    file = ResultsFile(path)
    file.add(ROWS[0])
    file.add(ROWS[1])
    assert same(file.read(), [*ROWS, ROWS[0], ROWS[1]])
    assert [message for message in caplog.messages if "refuses locks" in message] == caplog.messages[-1:]


def test_blocks_that_a_power_cut_left_empty_are_a_torn_line(path):
    with path.open("ab") as file:
        file.write(bytes(4096))
    ResultsFile(path).add(ROWS[0])
    assert path.read_bytes().endswith(b"}\n")
    assert same(ResultsFile(path).read(), [*ROWS, ROWS[0]])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda line: "hello", "line 2: not a sweep result"),
        (lambda line: "[1]", "is not an object"),
        (lambda line: "", "not a sweep result"),
        (lambda line: line.replace('"value"', '"other"'), "field 'value' is missing"),
        (lambda line: line.replace('"nan"', '"large"'), "field 'value' is 'large'"),
        (lambda line: line.replace('"step": 100', '"step": 100.5'), "field 'step' is 100.5"),
        (lambda line: line.replace('"step": 100', '"step": true'), "field 'step' is True"),
        (lambda line: line.replace('"excluded": []', '"excluded": ["a"]'), "field 'excluded' is"),
        (lambda line: line.replace('"path": null', '"path": 3'), "field 'path' is 3"),
        (lambda line: line.replace('[["r", null]]', '[["r", "x"]]'), "field 'lineage' is"),
        (lambda line: line.replace('[["r", null]]', '[["r"]]'), "field 'lineage' is"),
    ],
)
def test_a_line_that_is_no_result_is_named(path, change, found):
    lines = path.read_text().splitlines()
    lines[1] = change(lines[1])
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    for ask in (ResultsFile(path).read, lambda: ResultsFile(path).add(ROWS[0])):
        with pytest.raises(ResultsError, match=found) as raised:
            ask()
        assert (raised.value.path, raised.value.line) == (path, 2)
    assert path.read_bytes() == before


def test_fields_of_a_later_version_are_ignored(path):
    path.write_text(path.read_text().replace('"metric"', '"later": [1], "metric"'))
    assert same(ResultsFile(path).read(), list(ROWS))


def test_table_of_a_file_has_the_recipe_of_its_last_line(tmp_path):
    file = ResultsFile(tmp_path / "results.jsonl")
    for each in (row(0.1, 1.0, run="old"), row(0.2, 5.0), row(0.1, 4.0), row(0.1, 3.0, step=50)):
        file.add(each)
    table = read_table(file.path)
    assert [(each.step, each.sigma_rel) for each in table.rows] == [(50, 0.1), (100, 0.1), (100, 0.2)]
    assert table.best.value == 3.0
    assert "1 other results" in table.notes[0]


def test_table_of_a_file_has_the_results_of_one_history(tmp_path):
    """Also results of a run that another run continues, up to the step at which it was left, in any order of lines."""
    first, later = (("a", None),), (("a", 200), ("b", None))
    of_history = [
        row(0.1, 1.0, step=100, run="a", lineage=first),
        row(0.1, 2.0, step=200, run="a", lineage=first),
        row(0.1, 3.0, step=300, run="b", lineage=later),
    ]
    others = [
        row(0.1, 4.0, step=300, run="a", lineage=first),  # an abandoned branch
        row(0.1, 5.0, step=300, run="c", lineage=(("a", 100), ("c", None))),
    ]
    file = ResultsFile(tmp_path / "results.jsonl")
    for each in [*others, *of_history]:
        file.add(each)
    table = read_table(file.path)
    assert [each.value for each in table.rows] == [1.0, 2.0, 3.0]
    assert "2 other results" in table.notes[0]
    file.add(replace(of_history[0], sigma_rel=0.2))
    assert {each.value for each in read_table(file.path).rows if each.step <= 200} == {1.0, 2.0}


def test_direction_of_the_last_line_counts_for_all(tmp_path):
    """A sweep without ``maximize`` is repeated with it: the second call only adds to the file."""
    file = ResultsFile(tmp_path / "results.jsonl")
    for each in (row(0.1, 5.0), row(0.2, 3.0), row(0.15, 4.0, maximize=True)):
        file.add(each)
    assert read_table(file.path).best.value == 5.0


def test_read_table_is_a_name_of_the_package():
    assert search.read_table is read_table


def test_table_of_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ResultsError, match="contains no sweep results"):
        read_table(tmp_path / "empty")


# Files that others made


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: sparse(path)])
def test_what_is_no_file_of_results_is_refused_at_once(tmp_path, make):
    path = tmp_path / "sweep.jsonl"
    make(path)
    with pytest.raises(
        ResultsError, match=r"sweep.jsonl: not a file of sweep results: it (is not a reg|has more than)"
    ):
        read_table(path)
    with pytest.raises(ResultsError, match="Pass another file for the results"):
        ResultsFile(path).add(ROWS[0])


def sparse(path):
    """Make a file of a terabyte, which takes no disk space."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


def test_no_file_is_made_through_a_link(tmp_path):
    (tmp_path / "sweep.jsonl").symlink_to("elsewhere")
    with pytest.raises(FileNotFoundError):
        ResultsFile(tmp_path / "sweep.jsonl").add(ROWS[0])
    assert not (tmp_path / "elsewhere").exists()


def test_results_on_another_disk_may_be_linked(tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "sweep.jsonl").symlink_to("elsewhere")
    ResultsFile(tmp_path / "sweep.jsonl").add(ROWS[0])
    assert len(ResultsFile(tmp_path / "elsewhere").read()) == 1
