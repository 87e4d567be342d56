"""Every field of the commands' JSON outputs is on docs/json.md, and every field on that page exists."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nitrous_ema._base.temporary_files import temporary_name
from nitrous_ema.cli import main
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.worker.output_record import Output
from tests.support.old_folders import write_ema_pytorch
from tests.support.snapshot_folders import damage, layout_of, record, run_id, snapshot_file, write_run

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "json.md").read_text()
RUN = run_id(0)


def documented(command: str) -> set[str]:
    table = PAGE.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}


def paths_of(value: object, path: str = "") -> Iterator[str]:
    """The names of all fields in a JSON value, as the page writes them: ``runs[].snapshots[].step``."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from paths_of(inner, f"{path}.{name}".removeprefix("."))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from paths_of(inner, f"{path}[]")
    elif value is not None and value != []:
        yield path


def averages(step: int) -> list[np.ndarray]:
    return [np.full(50, np.inf if step == 40 else 1.0)] * 2


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> Path:
    """A folder with something of every kind that the commands report."""
    root, layout = tmp_path_factory.mktemp("json") / "snapshots", layout_of([record("w", (50,))])
    trainer = {"host": socket.gethostname(), "pid": 1, "started": 0.0, "boot": "b", "pid_namespace": "p"}
    write_run(root, layout, [10, 20, 30, 40, 50], averages=averages, run=RUN, trainer=trainer)
    write_run(root, layout, [15, 16], averages=averages, run=run_id(-1))  # unrelated
    damage(snapshot_file(root, 15), at=0.001)
    (root / f"step-{60:012d}-{RUN}").mkdir()  # incomplete
    store = SnapshotStore(root)
    store.pin(20, RUN)
    store.hide([each for each in store.snapshots() if each.step == 10])
    (root / "0.7.pt").write_bytes(b"of another library")
    (snapshot_file(root, 30).parent / temporary_name("rank-00000.safetensors")).write_bytes(b"unfinished")
    return root


COMMANDS = {
    "inspect": [["--sigma-rel", "0.03,0.07", "--exclude", "30"]],
    "verify": [[]],
    "prune": [
        ["--keep", "3", "--pin", "30", "--dry-run"],
        ["--error", "0.1", "--unpin", "20", "--exclude", "30"],
        ["--budget", "1MB"],
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_fields_of_a_command_are_those_on_the_page(snapshots, tmp_path, capsys, monkeypatch, command):
    found: set[str] = set()
    monkeypatch.setattr(SnapshotStore, "missing_operations", lambda store: ["folders cannot be renamed"])
    for number, options in enumerate(COMMANDS[command]):
        folder = shutil.copytree(snapshots, tmp_path / str(number))
        main([command, str(folder), *options, "--json"])
        found |= set(paths_of(json.loads(capsys.readouterr().out)))
    # A list of pairs is one field on the page.
    found = {re.sub(r"(lineage|lengths|with_little_rounding|sigma_rels)(\[\])+$", r"\1", path) for path in found}
    page = {re.sub(r"sigma_rels\[\]$", "sigma_rels", path) for path in documented(command)}
    assert found == page


def test_fields_of_an_import_are_those_on_the_page(tmp_path, capsys):
    old, found = tmp_path / "old", set()
    write_ema_pytorch(old, (1000, 2000, 3000))
    for options in (["--dry-run"], [], []):
        main(["import", str(old), str(tmp_path / "new"), "--tracked-sigma-rel", "0.05,0.1", *options, "--json"])
        found |= set(paths_of(json.loads(capsys.readouterr().out)))
    assert found <= documented("import")
    assert {"to_write[]", "written[]", "present[]", "run", "checkpoint_dtypes[]"} <= found


def test_fields_of_the_outputs_of_synthesize_are_those_on_the_page():
    names = {name.removesuffix("[]") for name in documented("synthesize")}
    assert names == {each.name for each in dataclasses.fields(Output)}
