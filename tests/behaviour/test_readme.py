"""The snippets of README.md do what the page shows, as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nitrous_ema import SnapshotStore, load_average

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SOURCE = "examples/train.py"
BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
HUNK = re.compile(r"^@@ -(\d+),(\d+) \+(\d+),(\d+) @@$")


def block(language: str, containing: str) -> str:
    """The one block of code in this language that contains a text."""
    (found,) = [
        each["text"] for each in BLOCK.finditer(README) if each["language"] == language and containing in each["text"]
    ]
    return found


def applied(diff: str, source: list[str]) -> list[str]:
    """``source`` after a unified diff of one file; its line numbers, counts and context must be exact."""
    result, read = [], 0
    lines = iter(diff.splitlines()[2:])
    for head in lines:
        old_begin, old_count, new_begin, new_count = map(int, HUNK.match(head).groups())
        result += source[read : old_begin - 1]
        read = old_begin - 1
        assert len(result) == new_begin - 1
        while read < old_begin - 1 + old_count or len(result) < new_begin - 1 + new_count:
            line = next(lines) or " "  # editors remove the space of an empty line, and patch does without it
            if line[0] == "+":
                result.append(line[1:])
                continue
            assert (line[0], line[1:]) == (" ", source[read])
            result.append(source[read])
            read += 1
    return result + source[read:]


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which the diff was applied, the second snippet appended, and both run; and what they print."""
    folder = tmp_path_factory.mktemp("readme")
    trained = applied(block("diff", "ema.update()"), (ROOT / SOURCE).read_text().splitlines())
    (folder / "train.py").write_text("\n".join([*trained, block("python", "sweep(")]))
    return folder, run([sys.executable, "-W", "error", "train.py"], folder).splitlines()


def rows(lines: list[str]) -> dict[float, tuple[float, float]]:
    """Value and profile error by length."""
    fields = [line.split() for line in lines]
    head = next(number for number, line in enumerate(lines) if line.startswith("step"))
    return {float(row[1]): (float(row[2]), float(row[3])) for row in fields[head + 1 : -1]}


def test_the_diff_applies_with_the_command_beside_it(tmp_path):
    if shutil.which("patch") is None:
        pytest.skip("patch is not installed")
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / SOURCE, tmp_path / SOURCE)
    shutil.copy(ROOT / "README.md", tmp_path)
    assert "`patch -p1 < README.md`" in README
    with (tmp_path / "README.md").open() as page:
        done = subprocess.run(["patch", "-p1"], cwd=tmp_path, stdin=page, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "fuzz" in done.stdout, "offset" in done.stdout) == (0, False, False), done.stdout
    expected = applied(block("diff", "ema.update()"), (ROOT / SOURCE).read_text().splitlines())
    assert (tmp_path / SOURCE).read_text().splitlines() == expected


def test_the_diff_adds_six_lines_at_most():
    lines = block("diff", "ema.update()").splitlines()[2:]
    assert sum(line.startswith("+") for line in lines) <= 6
    assert not any(line.startswith("-") for line in lines)


def test_training_and_sweep_give_good_averages_without_a_warning(ran):
    folder, printed = ran
    raw = float(printed[0].removeprefix("raw weights: "))
    found = rows(printed)
    assert {0.03, 0.05, 0.08, 0.12, 0.2} <= set(found)
    assert max(error for _, error in found.values()) < 0.01
    best = float(printed[-1])
    assert found[best][0] == min(value for value, _ in found.values())
    assert found[best][0] < raw / 2
    assert len(SnapshotStore(folder / "ema-checkpoints").snapshots()) == 40


def test_the_page_shows_what_the_snippets_print(ran):
    _, printed = ran
    shown = block("", "raw weights:").splitlines()
    # Values differ from one kind of CPU to another, and with them the lengths that the refinement tries.
    assert [line.split()[:1] for line in shown[:2]] == [line.split()[:1] for line in printed[:2]]
    given = {0.03, 0.08, 0.12, 0.2}
    errors, errors_shown = ({length: row[1] for length, row in rows(of).items()} for of in (printed, shown))
    assert {length: errors[length] for length in given} == {length: errors_shown[length] for length in given}
    assert rows(shown)[float(shown[-1])][0] == min(value for value, _ in rows(shown).values())


def test_the_worker_writes_averages_that_load(ran):
    folder, _ = ran
    command = block("", "nitrous-ema synthesize").split()
    assert command[0] == "nitrous-ema"
    records = [
        json.loads(line) for line in run([sys.executable, "-m", "nitrous_ema", *command[1:]], folder).splitlines()
    ]
    assert max(record["profile_error"] for record in records) < 0.01
    path = re.search(r'load_average\(model, "(?P<path>[^"]+)"\)', block("python", "load_average"))["path"]
    model = re.search(r"^model = .*$", (ROOT / SOURCE).read_text(), re.MULTILINE)[0]
    names: dict[str, object] = {}
    exec(f"import torch\nfrom torch.nn import Linear, SiLU\n{model}", names)
    load_average(names["model"], folder / path)


def test_numbers_of_the_table_stand_in_the_benchmarks():
    table = README.split("| `make bench", 1)[1].split("\n\n", 1)[0]
    numbers = re.findall(r"[\d.]+ (?:us|ms|s|MiB)\b", table)
    assert len(numbers) >= 16
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [number for number in numbers if number not in page] == []


def test_the_page_is_short():
    assert len(README.splitlines()) <= 150
