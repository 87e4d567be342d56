"""What reports on a folder cost."""

from __future__ import annotations

import pytest

from nitrous_ema.cli import program as cli
from nitrous_ema.snapshots.filesystem import FileSystem
from tests.support.snapshot_folders import layout_of, record, run_id, write_run


@pytest.mark.parametrize(
    ("command", "most"), [(["inspect"], 1), (["prune", "--dry-run", "--keep", "5"], 1), (["verify"], 2)]
)
def test_each_header_is_read_once_however_often_the_training_was_resumed(tmp_path, monkeypatch, command, most):
    """verify reads each file once more: all of it."""
    lineage, layout = (), layout_of([record("w", (3,))])
    for number in range(8):
        run = run_id(number)
        steps = range(100 * number + 10, 100 * number + 40, 10)
        write_run(tmp_path / "ema", layout, steps, run=run, lineage=(*lineage, (run, None)))
        lineage = (*lineage, (run, steps[-1]))
    opened = []
    monkeypatch.setattr(FileSystem, "open_read", lambda self, path: opened.append(path) or original(self, path))
    assert cli.main([command[0], str(tmp_path / "ema"), *command[1:]]) == 0
    assert len(opened) == most * 24
    assert len(set(opened)) == 24


original = FileSystem.open_read
