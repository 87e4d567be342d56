from __future__ import annotations

import json
import sys

import pytest

from nitrous_ema.async_ import synthesize_worker
from nitrous_ema.cli import program as cli
from tests.support.snapshot_folders import layout_of, record, write_run

LENGTHS = ["--sigma-rel", "0.06,0.07"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize_worker, "use_one_thread_per_product", lambda: None)
    write_run(tmp_path / "snapshots", layout_of([record("w", (50,))]), range(10, 401, 10))
    return str(tmp_path / "snapshots")


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Make stdout and stderr terminals."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True)  # pytest replaces the streams before the call


def test_outputs_are_rows_of_a_table_on_a_terminal(folder, tmp_path, terminal, capsys):
    assert cli.main(["synthesize", folder, *LENGTHS, "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    head, *rows = out.splitlines()
    assert head.split() == ["step", "sigma_rel", "error", "size", "file"]
    assert [row.split()[:2] for row in rows] == [["400", "0.06"], ["400", "0.07"]]
    assert [row.split()[-2:] for row in rows] == [
        ["written", str(tmp_path / "out" / f"step-400-sigma-{length}.safetensors")] for length in ("0.06", "0.07")
    ]
    assert len({row.index("written") for row in rows}) == 1  # aligned
    assert "\r" in err  # the line of progress


def test_reused_outputs_are_rows_too(folder, tmp_path, terminal, capsys):
    arguments = ["synthesize", folder, *LENGTHS, "--out", str(tmp_path / "out"), "--skip-existing"]
    cli.main(arguments)
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert [row.split()[-2] for row in capsys.readouterr().out.splitlines()[1:]] == ["kept", "kept"]


def test_outputs_are_lines_of_json_in_a_pipe(folder, tmp_path, capsys):
    assert cli.main(["synthesize", folder, *LENGTHS, "--out", str(tmp_path / "out")]) == 0
    assert [json.loads(line)["sigma_rel"] for line in capsys.readouterr().out.splitlines()] == [0.06, 0.07]


def test_outputs_are_lines_of_json_on_request(folder, tmp_path, terminal, capsys):
    assert cli.main(["synthesize", folder, *LENGTHS, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert [json.loads(line)["sigma_rel"] for line in capsys.readouterr().out.splitlines()] == [0.06, 0.07]


def test_the_module_prints_json_on_a_terminal_too(folder, tmp_path, terminal, capsys):
    assert synthesize_worker.main([folder, *LENGTHS, "--out", str(tmp_path / "out")]) == 0
    assert [json.loads(line)["sigma_rel"] for line in capsys.readouterr().out.splitlines()] == [0.06, 0.07]


def test_condition_and_bounds_are_printed_on_request(folder, tmp_path, capsys):
    for options, is_printed in (([], False), (["--verbose"], True)):
        assert cli.main(["synthesize", folder, *LENGTHS, "--out", str(tmp_path / "out"), *options]) == 0
        err = capsys.readouterr().err
        assert ("condition number" in err) == is_printed
        assert ("proven minimum" in err) == is_printed
        assert "profile error up to" in err


def test_help_names_the_command_that_was_called(capsys):
    assert cli.main(["synthesize", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: nitrous-ema synthesize ")
