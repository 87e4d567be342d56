from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nitrous_ema._base import exit_status
from nitrous_ema.errors import ClosedError, SnapshotDamaged, SnapshotMismatch, SnapshotNotFound

ROOT = Path(__file__).resolve().parents[3]


def ending(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (exit_status.UsageError("text"), 2),
        (SnapshotNotFound("text", path=None, nearest=()), 3),
        (SnapshotDamaged("text", path=None, step=1, chunk=None), 4),
        (SnapshotMismatch("text", path=None), 1),
        (ClosedError("text"), 1),
        (PermissionError("text"), 1),
        (KeyboardInterrupt("text"), 130),
    ],
)
def test_every_error_has_its_status_and_is_told_once(error, status):
    told = []
    assert exit_status.run_program(ending(error), told.append, interrupted="text") == status
    assert told == ["text"]


@pytest.mark.parametrize(("code", "status"), [(0, 0), (2, 2), (None, 2), ("words", 2)])
def test_parser_that_stops_has_told_already(code, status):
    told = []
    assert exit_status.run_program(ending(SystemExit(code)), told.append) == status
    assert told == []


def test_work_that_ends_well_has_its_own_status():
    assert exit_status.run_program(lambda: 4, pytest.fail) == 4


def test_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"):
        exit_status.run_program(ending(ValueError("ours")), pytest.fail)


def test_value_error_of_what_the_user_gave_is_wrong_usage():
    def work() -> int:
        with exit_status.usage_errors():
            raise ValueError("yours")

    told = []
    assert exit_status.run_program(work, told.append) == 2
    assert told == ["yours"]


def test_what_stdout_does_not_take_is_told(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        told = []
        assert exit_status.run_program(lambda: exit_status.to_stdout("x\n"), told.append) == 1
    assert told == ["stdout cannot be written: No space left on device."]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_program_without_stdout_or_stderr_goes_on(closed, tmp_path):
    """A shell closes them with >&-. What is opened next does not get their number, where messages would end up."""
    script = (
        "import sys; from nitrous_ema._base import exit_status\n"
        "def work():\n"
        "    file = open(sys.argv[1], 'w')\n"
        "    file.write(str(file.fileno())); file.flush()\n"
        "    exit_status.to_stdout('told'); sys.stderr.write('said'); sys.stderr.flush()\n"
        "    return 0\n"
        "sys.exit(exit_status.run_program(work, print))\n"
    )
    number = {"stdout": 1, "stderr": 2}[closed]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {number}>&-', "sh", sys.executable, "-c", script, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0
    assert (done.stdout, done.stderr) == (("", "said") if closed == "stdout" else ("told", ""))
    assert int((tmp_path / "x").read_text()) > 2


def test_interrupt_of_text_that_is_executed_ends_with_its_status_too(tmp_path):
    """As dataclasses do while they are imported; ``python -m`` would end by SIGINT."""
    (tmp_path / "interrupted.py").write_text(
        "import sys; from nitrous_ema._base import exit_status\n"
        "sys.exit(exit_status.run_program(lambda: exec('raise KeyboardInterrupt'), sys.stderr.write))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (130, "interrupted.")


@pytest.mark.parametrize(
    ("ending", "status"), [("return 0", 0), ("raise SnapshotNotFound('x', path=None, nearest=())", 3)]
)
def test_program_goes_on_where_stderr_cannot_be_written(ending, status):
    script = (
        "import sys; from nitrous_ema._base import exit_status; from nitrous_ema.errors import SnapshotNotFound\n"
        "def work():\n"
        "    exit_status.to_stderr('said'); exit_status.to_stdout('told')\n"
        f"    {ending}\n"
        "sys.exit(exit_status.run_program(work, exit_status.to_stderr))\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=full, text=True, timeout=300, cwd=ROOT
        )
    assert (done.returncode, done.stdout) == (status, "told")
