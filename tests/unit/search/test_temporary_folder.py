from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nitrous_ema._base.processes import signature
from nitrous_ema.search.temporary_folder import temporary_folder


def test_folder_is_removed_even_after_an_interrupt(tmp_path):
    def interrupted():
        with temporary_folder(tmp_path / "deep" / "r.jsonl") as folder:
            folder.mkdir()
            (folder / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "deep").iterdir()) == []


def test_folder_that_was_never_created_is_not_an_error(tmp_path):
    with temporary_folder(tmp_path / "r.jsonl") as folder:
        assert not folder.exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/ns/pid"), reason="the system does not identify processes")
def test_folder_of_a_killed_process_is_removed_and_nothing_else(tmp_path):
    program = (
        "import os, sys, pathlib; from nitrous_ema.search.temporary_folder import temporary_folder\n"
        "with temporary_folder(pathlib.Path(sys.argv[1])) as folder: folder.mkdir(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "r.jsonl")], check=True, timeout=120)
    (left,) = tmp_path.iterdir()
    others = [tmp_path / f".r.jsonl.{signature()}-0000000000000000", tmp_path / ".r.jsonl.notes"]
    others.append(tmp_path / left.name.removeprefix(".r.jsonl."))
    for other in others:
        other.mkdir()
    with temporary_folder(tmp_path / "r.jsonl"):
        assert not left.exists()
        assert all(other.exists() for other in others)
