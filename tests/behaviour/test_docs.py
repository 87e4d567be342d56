"""The pages under docs/ are true: links, paths, names, numbers, and the order of calls in the tour of the code."""

from __future__ import annotations

import ast
import importlib
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nitrous_ema import PostHocEMA
from nitrous_ema.cli import main
from nitrous_ema.profile import sigma_rel_to_gamma
from tests.support.snapshot_folders import damage, layout_of, need, record, run_id, write_snapshot

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nitrous_ema"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
DESIGN = (ROOT / "docs" / "design.md").read_text()
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def without_code(page: Path) -> str:
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert set(re.findall(r"^\| \[[^]]+\]\(([\w-]+\.md)\)", index, re.MULTILINE)) == {
        page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md"
    }


def test_the_reader_on_the_page_of_the_file_format_reads_a_snapshot(tmp_path):
    """The page alone suffices: its code has nothing from the package, and notices damage and newer files."""
    page = (ROOT / "docs" / "file-format.md").read_text()
    reader: dict[str, Any] = {}
    exec(re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1], reader)
    layout = layout_of(
        [record("w", (3,)), record("n", (2,), "I64", "copied"), record("b", (1,), "F16")], chunk_bytes=16
    )
    averages = [np.arange(4.0) + profile for profile in range(2)]
    path = write_snapshot(tmp_path, layout, 7, averages, {"n": np.array([5, 6]).tobytes()}, run=run_id()).paths[0]
    fields, tensors = reader["read_snapshot"](path)
    described = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))
    assert set(fields) | {"requires", "nonfinite", "offsets"} == described
    assert {name: each.tolist() for name, each in tensors.items() if name != "padding"} == {
        "ema0.w": [0, 1, 2],
        "ema0.b": [3],
        "ema1.w": [1, 2, 3],
        "ema1.b": [4],
        "model.n": [5, 6],
    }
    damage(path, at=0.99)
    with pytest.raises(ValueError, match="the data is damaged"):
        reader["read_snapshot"](path)
    damage(path, at=0.1)
    with pytest.raises(ValueError, match="the header is damaged"):
        reader["read_snapshot"](path)
    damage(path, at=0.1)
    need(path, columns="1.2")
    with pytest.raises(ValueError, match="a newer nitrous_ema is needed"):
        reader["read_snapshot"](path)


def test_every_python_snippet_parses():
    for page in PAGES:
        for snippet in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            ast.parse(snippet)


# The glossary


def test_the_glossary_has_twelve_terms():
    page = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^\| \*\*([^*]+)\*\*", page, re.MULTILINE)
    assert terms == [
        *("length", "exponent", "profile", "average", "snapshot", "target step", "training time", "run", "lineage"),
        *("retention", "pin", "profile error"),
    ]


def test_the_numbers_of_the_glossary_are_computed():
    page = (ROOT / "docs" / "glossary.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| (\d+) steps \| (\d+) steps \| (\d+) steps \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for row in rows:
        sigma_rel = float(row[0])
        gamma = sigma_rel_to_gamma(sigma_rel)
        lag, half = 1 / (gamma + 2), 1 - 0.5 ** (1 / (gamma + 1))
        steps = [f"{1e5 * each:.0f}" for each in (sigma_rel, lag, half)]
        assert row == (f"{sigma_rel:g}", f"{gamma:.4g}", *steps)
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(snippet, {})
    assert f"prints `{printed.getvalue().strip()}`" in page


# The API reference


@pytest.mark.parametrize("name", ["nitrous_ema", "nitrous_ema.profile", "nitrous_ema.posthoc", "nitrous_ema.snapshots",
                                  "nitrous_ema.synthesis", "nitrous_ema.async_", "nitrous_ema.search"])  # fmt: skip
def test_the_api_page_lists_the_public_names(name):
    page = (ROOT / "docs" / "api.md").read_text()
    section = page.split(f"\n## {name}\n", 1)[1].split("\n##", 1)[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    listed = {each for cell in cells for each in re.findall(r"`([\w.]+)`", cell) if "." not in each}
    assert listed == set(importlib.import_module(name).__all__)


def test_the_api_page_lists_every_error():
    section = (ROOT / "docs" / "api.md").read_text().split("\n## nitrous_ema.errors\n", 1)[1]
    errors = importlib.import_module("nitrous_ema.errors")
    known = {
        name for name, each in vars(errors).items() if isinstance(each, type) and each.__module__ == errors.__name__
    }
    assert {
        each for cell in re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE) for each in cell.strip("`").split("`, `")
    } == known


def test_every_module_on_the_design_and_api_pages_exists():
    for page in (DESIGN, (ROOT / "docs" / "api.md").read_text()):
        for path in re.findall(r"`([\w/]+(?:\.py|/))`", page):
            assert any(
                (base / path).exists() for base in (ROOT, PACKAGE, PACKAGE / "averaging", PACKAGE / "synthesis")
            ), path


def test_the_design_page_lists_every_table_of_invariants():
    rows = dict(re.findall(r"^\| ([A-Z]+) \| `([\w/.]+)` \|", DESIGN, re.MULTILINE))
    found = {}
    for path in PACKAGE.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        for name in set(re.findall(r"^([A-Z]+)-\d+  ", docstring, re.MULTILINE)):
            found[name] = path.relative_to(PACKAGE).as_posix()
    assert rows == found


# Printed output


@pytest.fixture(scope="module")
def like_the_demo(tmp_path_factory):
    """A folder that holds nitrous-demo/snapshots: 40 snapshots at the demo's steps, of a smaller model."""
    folder = tmp_path_factory.mktemp("printed")
    model = torch.nn.Linear(4, 4)
    with PostHocEMA(model, checkpoint_folder=folder / "nitrous-demo/snapshots", checkpoint_every_num_steps=90,
                    update_every=90) as ema:  # fmt: skip
        for _ in range(3600):
            ema.update()
    return folder


def comparable(text: str) -> str:
    """A text without what depends on the model's size, on the run and on the width of lines."""
    text = re.sub(r"[\d.]+ [KMG]?i?B\b", "SIZE", re.sub(r"\d{8}T[\d.]+-[0-9a-f]{8}", "RUN", text))
    return " ".join(text.split())


@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_output_shown_for_the_demo_is_what_the_commands_print(like_the_demo, monkeypatch, capsys, command):
    page = (ROOT / "docs" / "choosing.md").read_text()
    arguments, shown = re.search(rf"^\$ nitrous-ema ({command} .*)\n((?:.*\n)*?)```$", page, re.MULTILINE).groups()
    monkeypatch.chdir(like_the_demo)
    assert main(arguments.split()) == 0
    printed = capsys.readouterr()
    assert comparable(shown.removeprefix("...\n")) in comparable(printed.out + printed.err)


def test_lengths_shown_in_the_quickstart_are_what_inspect_prints(like_the_demo, capsys):
    page = (ROOT / "docs" / "quickstart.md").read_text()
    shown = re.search(r"^supported lengths .*\n(?:  .*\n)+", page, re.MULTILINE)[0]
    assert main(["inspect", str(like_the_demo / "nitrous-demo/snapshots")]) == 0
    assert comparable(shown) in comparable(capsys.readouterr().out)


# The tour

TRACER = """
import collections, json, sys, tempfile, threading
from pathlib import Path

package, snapshots = sys.argv[1], sys.argv[2]
visits = collections.defaultdict(list)

def trace(frame, event, argument):
    path = frame.f_code.co_filename
    if path.startswith(package) and frame.f_code.co_name[0] != "<":
        name = threading.current_thread().name.rstrip("0123456789").rstrip("-_")
        if visits[name][-1:] != [path[len(package) + 1:]]:
            visits[name].append(path[len(package) + 1:])

def traced(work):
    threading.settrace(trace)
    sys.settrace(trace)
    work()
    sys.settrace(None)
    threading.settrace(None)
    found = dict(visits)
    visits.clear()
    return found

import torch
from nitrous_ema import AsyncPostHocEMA

model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
threading.settrace(trace)  # for the threads that are started here
ema = AsyncPostHocEMA(model, checkpoint_folder=snapshots, checkpoint_every_num_steps=2)

def step():
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    ema.update()
    ema.flush()

step()
visits.clear()
update = traced(step)
ema.close()

from nitrous_ema.async_.synthesize_worker import main
arguments = [snapshots, "--sigma-rel", "0.07", "--out", snapshots + "-out", "--threads", "1"]
average = traced(lambda: main(arguments))
json.dump({"update": update, "average": average}, sys.stderr)
"""


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """Files in the order of their calls: of one update and of one average, by the name of the thread."""
    import json

    folder = tmp_path_factory.mktemp("tour") / "snapshots"
    command = [sys.executable, "-W", "ignore", "-c", TRACER, str(PACKAGE), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "thread", "before"),
    [
        ("update", "MainThread", "The training thread"),
        ("update", "nitrous-ema-averaging", "The lane"),
        ("update", "nitrous-ema-writer", "A writer thread"),
        ("average", "MainThread", "`python -m nitrous_ema.async_.synthesize_worker"),
        ("average", "synthesis", "A thread of the pass"),
    ],
)
def test_the_tour_names_the_files_in_the_order_of_the_calls(visits, kind, thread, before):
    text = DESIGN.split(f"\n{before}", 1)[1].split("\n\n", 2)[1]
    listed = re.findall(r"^\| `([\w/.]+)` \|", text, re.MULTILINE)
    assert len(listed) >= 5
    remaining = iter(visits[kind][thread])
    missing = [path for path in listed if path not in remaining]  # each is looked for behind the one before
    assert missing == []
