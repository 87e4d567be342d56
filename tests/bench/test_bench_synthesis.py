from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from bench import bench_synthesis, synthesizers

REPOSITORY = Path(__file__).resolve().parents[2]
LENGTHS = (0.06, 0.09)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return folder, bench_synthesis.fill(folder, "tiny", 4)


def test_every_contestant_synthesizes_the_same_averages(folders, tmp_path):
    """Ours up to the tolerance; peers also up to what their clocks are off, of a model that moves 0.01 each step."""
    _, snapshots = folders
    single = [synthesizers.OURS_SINGLE, synthesizers.OURS_TOLERANT]
    state = {}
    for name, source in [*snapshots.items(), *((name, snapshots[synthesizers.OURS]) for name in single)]:
        out = tmp_path / name
        out.mkdir()
        synthesizers.synthesizer(bench_synthesis._short(name))(source, out, LENGTHS)
        for length in LENGTHS:
            (file,) = out.glob(f"{length}.*")
            loaded = safetensors.torch.load_file(file) if file.suffix == ".safetensors" else torch.load(file)
            state[name, length] = torch.cat([loaded[key].float().reshape(-1) for key in sorted(loaded)])
    for (name, length), found in state.items():
        allowed = 2e-3 if name in (synthesizers.OURS, *single) else 1e-2
        torch.testing.assert_close(found, state[synthesizers.OURS, length], atol=allowed, rtol=0)


@pytest.mark.parametrize("name", [synthesizers.LOOP, synthesizers.LOOP_SINGLE])
def test_plain_loop_writes_our_averages(folders, tmp_path, name, monkeypatch):
    monkeypatch.setattr(synthesizers, "BLOCK_ELEMENTS", 256)
    source = folders[1][synthesizers.OURS]
    synthesizers.synthesizer(name)(source, tmp_path, LENGTHS)
    synthesizers.synthesizer(synthesizers.OURS)(source, tmp_path, LENGTHS)
    for length in LENGTHS:
        ours = (tmp_path / f"{length}.safetensors").read_bytes()
        begin = 8 + int.from_bytes(ours[:8], "little")
        found = np.fromfile(tmp_path / f"{length}.bin", np.float32)
        np.testing.assert_allclose(found, np.frombuffer(ours[begin:], np.float32), atol=1e-6)


def test_quick_bench_runs_with_every_table(tmp_path):
    file = tmp_path / "synthesis.json"
    command = [sys.executable, "-m", "bench.bench_synthesis", "--quick", "--threads", "1"]
    command += ["--folder", str(tmp_path / "made"), "--json", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    tables = json.loads(file.read_text())["tables"]
    assert [table["title"].split(" from ")[0] for table in tables] == [
        "2 averages",
        "memory above a process with everything imported",
        "8 averages",
        "bytes read for these",
    ]
    for table in tables:
        assert synthesizers.OURS in {row["name"] for row in table["rows"]}
        assert all(math.isfinite(second) for row in table["rows"] for second in row.get("samples", ()))
    read = {row["name"]: row["read"] for row in tables[-1]["rows"]}
    assert 0 < read[synthesizers.OURS_TOLERANT] < read[synthesizers.OURS]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["made", "synthesis.json"]
