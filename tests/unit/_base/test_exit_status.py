"""Exit statuses of programs, and output where stdout or stderr is closed or full."""

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
def test_every_error_has_its_status_and_is_reported_once(error, status):
    reported = []
    assert exit_status.run_program(ending(error), reported.append, interrupted="text") == status
    assert reported == ["text"]


@pytest.mark.parametrize(("code", "status"), [(0, 0), (2, 2), (None, 2), ("words", 2)])
def test_exit_of_the_parser_is_not_reported_again(code, status):
    reported = []
    assert exit_status.run_program(ending(SystemExit(code)), reported.append) == status
    assert reported == []


def test_work_without_errors_has_its_own_status():
    assert exit_status.run_program(lambda: 4, pytest.fail) == 4


def test_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"):
        exit_status.run_program(ending(ValueError("ours")), pytest.fail)


def test_value_error_from_an_argument_is_wrong_usage():
    def work() -> int:
        with exit_status.usage_errors():
            raise ValueError("yours")

    reported = []
    assert exit_status.run_program(work, reported.append) == 2
    assert reported == ["yours"]


def test_unwritable_stdout_is_reported(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        reported = []
        assert exit_status.run_program(lambda: exit_status.to_stdout("x\n"), reported.append) == 1
    assert reported == ["stdout cannot be written: No space left on device."]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_program_without_stdout_or_stderr_goes_on(closed, tmp_path):
    """A shell closes them with >&-. The next opened file must not get their number, or messages end up in it."""
    script = (
        "import sys; from nitrous_ema._base import exit_status\n"
        "def work():\n"
        "    file = open(sys.argv[1], 'w')\n"
        "    file.write(str(file.fileno())); file.flush()\n"
        "    exit_status.to_stdout('out'); sys.stderr.write('err'); sys.stderr.flush()\n"
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
    assert (done.stdout, done.stderr) == (("", "err") if closed == "stdout" else ("out", ""))
    assert int((tmp_path / "x").read_text()) > 2


def test_interrupt_during_exec_also_ends_with_its_status(tmp_path):
    """Dataclasses execute text while they are imported; ``python -m`` would otherwise end by SIGINT."""
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
        "    exit_status.to_stderr('err'); exit_status.to_stdout('out')\n"
        f"    {ending}\n"
        "sys.exit(exit_status.run_program(work, exit_status.to_stderr))\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=full, text=True, timeout=300, cwd=ROOT
        )
    assert (done.returncode, done.stdout) == (status, "out")
