"""Temporary names, and which temporary files are removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nitrous_ema._base.processes import signature
from nitrous_ema._base.temporary_files import remove_stale, temporary_name, writer_state


def left_by_an_ended_process(path: Path) -> Path:
    code = (
        "import sys; from pathlib import Path; from nitrous_ema._base.temporary_files import temporary_name\n"
        "path = Path(sys.argv[1]); left = path.with_name(temporary_name(path.name)); left.write_bytes(b'x')\n"
        "sys.stdout.write(str(left))"
    )
    command = [sys.executable, "-c", code, str(path)]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="needs Linux's process namespaces")
def test_files_of_ended_processes_are_removed_and_nothing_else(tmp_path):
    gone = left_by_an_ended_process(tmp_path / "a.safetensors")
    here = signature().split(".")
    others = [
        tmp_path / temporary_name("a.safetensors"),
        tmp_path / f".a.{'.'.join(['0' * 16, '0' * 16, *here[2:]])}-0123456789abcdef",  # another host
        tmp_path / ".a.1234-0123456789abcdef",  # a system that shows the process id only
        tmp_path / f"{gone.name[1:]}",
        tmp_path / "a.safetensors",
    ]
    for path in others:
        path.write_bytes(b"x")
    names = [path.name for path in (gone, *others)] + [temporary_name("vanished")]
    remove_stale(tmp_path, names, untouched_seconds=lambda path: 0.0, remove=Path.unlink)
    assert not gone.exists()
    assert all(path.exists() for path in others)


def test_file_that_cannot_be_removed_stays_and_does_not_stop_the_rest(tmp_path):
    first, second = (left_by_an_ended_process(tmp_path / name) for name in "ab")
    if writer_state(first.name, untouched_seconds=0) != "gone":
        pytest.skip("this system does not show whether a process has ended")

    def remove(path):
        if path == first:
            raise PermissionError("busy")
        path.unlink()

    remove_stale(tmp_path, [first.name, second.name], untouched_seconds=lambda path: 0.0, remove=remove)
    assert (first.exists(), second.exists()) == (True, False)


@pytest.mark.parametrize("name", ["a.safetensors", "n" * 255, "é" * 127])
def test_temporary_name_fits_into_the_longest_file_name(tmp_path, name):
    path = tmp_path / temporary_name(name)
    path.touch()
    assert path.name.startswith(f".{name[:40]}")


@pytest.mark.parametrize("name", ["a.safetensors", ".notes", ".a.-0123456789abcdef", ".a.12-0123"])
def test_writer_of_any_other_name_is_unknown(name):
    assert writer_state(name, untouched_seconds=0) == "unknown"
    assert writer_state(temporary_name("a"), untouched_seconds=0) != "gone"
