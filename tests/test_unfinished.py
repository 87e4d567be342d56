from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nitrous_ema.processes import signature
from nitrous_ema.snapshots.files import FileSystem
from nitrous_ema.unfinished import remove_unfinished, unfinished_path


def unfinished_of_the_dead(path: Path) -> Path:
    code = (
        "import sys; from pathlib import Path; from nitrous_ema.unfinished import unfinished_path\n"
        "left = unfinished_path(Path(sys.argv[1])); left.write_bytes(b'x'); sys.stdout.write(str(left))"
    )
    command = [sys.executable, "-c", code, str(path)]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="needs what Linux tells of processes")
def test_unfinished_outputs_of_the_dead_are_removed_and_nothing_else(tmp_path):
    gone = unfinished_of_the_dead(tmp_path / "a.safetensors")
    here = signature().split(".")
    kept = [
        unfinished_path(tmp_path / "a.safetensors"),
        tmp_path / f".a.{'.'.join(['0' * 16, '0' * 16, *here[2:]])}-01234567.tmp",  # of another host
        tmp_path / ".a.1234-01234567.tmp",  # where a system tells the process id only
        tmp_path / f"{gone.name[1:]}",
        tmp_path / "a.safetensors",
    ]
    for path in kept:
        path.write_bytes(b"x")
    remove_unfinished(FileSystem(), [tmp_path, tmp_path, tmp_path / "nowhere"])
    assert not gone.exists()
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize("name", ["a.safetensors", "n" * 255, "é" * 127])
def test_name_of_an_unfinished_output_is_no_longer_than_names_may_be(tmp_path, name):
    path = unfinished_path(tmp_path / name)
    path.touch()
    assert path.parent == tmp_path
    assert path.name.startswith(f".{name[:40]}")
