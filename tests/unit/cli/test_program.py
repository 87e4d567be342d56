from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nitrous_ema import __version__
from nitrous_ema.async_ import synthesize_worker
from nitrous_ema.cli import program as cli
from tests.support.snapshot_folders import layout_of, record, run_id, write_run

ROOT = Path(__file__).resolve().parents[3]
LAYOUT = layout_of([record("w", (50_000,)), record("n", (), "I64", "copied")])  # several chunks in each profile
COMMANDS = ("demo", "synthesize", "verify", "inspect", "import", "prune", "plot")
RUN = run_id(0)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "snapshots"
    write_run(root, LAYOUT, [100, 200, 300], copied=lambda step: {"n": np.int64(step).tobytes()}, run=RUN)
    return root


def run_cli(*arguments, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "nitrous_ema", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


# The command itself


def test_help_names_every_command():
    done = run_cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert command in capsys.readouterr().out


def test_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nitrous-ema {__version__}\n"


@pytest.mark.parametrize(
    "wrong",
    [
        ["frobnicate"],
        [],
        ["--frob"],
        ["verify"],
        ["verify", ".", "--frob"],
        ["demo", "--steps", "x"],
        ["prune", "--keep", "3"],
        ["prune", ".", "--keep", "3", "--error", "0.1"],
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_mistake(wrong, capsys):
    assert cli.main(wrong) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error:" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["verify", "."],
        ["inspect", "."],
        ["inspect", ".", "--sigma-rel", "0.05,0.07"],
        ["prune", ".", "--keep", "2", "--dry-run"],
        ["synthesize", "--help"],
    ],
)
def test_commands_that_do_not_need_torch_do_not_import_it(folder, arguments):
    program = (
        f"import sys; from nitrous_ema import cli; status = cli.main({arguments!r});"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_missing_extra_of_the_demo_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'nitrous-ema[demo]'" in line


def test_demo_that_cannot_write_reports_it_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert str(tmp_path / "file") in line
    assert "Training" in out


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("nitrous_ema.cli.demo.main", interrupt)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_reader_that_leaves_early_gets_no_traceback(folder):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nitrous_ema", "inspect", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# synthesize


def test_synthesize_hands_its_arguments_to_the_worker_unchanged(monkeypatch):
    given = []
    monkeypatch.setattr(synthesize_worker, "use_one_thread_per_product", lambda: None)
    monkeypatch.setattr(synthesize_worker, "main", lambda arguments, **options: given.append(list(arguments)) or 4)
    arguments = ["some folder", "--sigma-rel", "0.05,0.06,...,0.15", "--out=x", "--version", "-h", "--json", "--"]
    assert cli.main(["synthesize", *arguments]) == 4
    assert given == [arguments]


def test_synthesize_writes_what_the_worker_writes(folder, tmp_path):
    lengths = ["--sigma-rel", "0.06,0.07"]
    ours = run_cli("synthesize", folder, *lengths, "--out", tmp_path / "ours")
    command = [
        sys.executable,
        "-m",
        "nitrous_ema.async_.synthesize_worker",
        folder,
        *lengths,
        "--out",
        tmp_path / "its",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert ours.returncode == 0, ours.stderr
    for line in map(json.loads, ours.stdout.splitlines()):
        path = Path(line["path"])
        assert path.read_bytes() == (tmp_path / "its" / path.name).read_bytes()
    assert len(list((tmp_path / "ours").iterdir())) == 2


def test_synthesize_of_no_folder_exits_with_3(tmp_path):
    done = run_cli("synthesize", tmp_path / "nothing", "--sigma-rel", "0.1", "--out", tmp_path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
