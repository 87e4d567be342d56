from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick_bench_tells_where_the_time_goes(tmp_path):
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bench.bench_launch", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    whole, parts = json.loads(file.read_text())["tables"]
    assert [row["name"] for row in whole["rows"]] == [row["name"] for row in parts["rows"]]
    assert len(parts["rows"]) == 5
    assert abs(sum(row["median"] for row in parts["rows"]) - whole["rows"][-1]["seconds"]["median"]) < 1e-6
