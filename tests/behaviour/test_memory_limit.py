"""A snapshot set several times larger than the memory that a process may have, in that process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.plan import plan_from_store
from tests.support.snapshot_folders import layout_of, record, run_id, write_snapshot

MIB = 1 << 20
ELEMENTS, STEPS, LENGTHS = 6 * MIB, range(1, 9), 8
BUDGET, STACK = 32 * MIB, 9 * MIB  # a thread's stack counts as memory, used or not

# RLIMIT_DATA, not RLIMIT_AS: libraries reserve a large address space, most of which takes no memory.
CODE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from nitrous_ema.synthesis.outputs.writer import write_outputs
from nitrous_ema.synthesis.plan import plan_from_store

root, out, lengths, allowed, budget = sys.argv[1:]
np.ones((64, 64)) @ np.ones((64, 64))  # memory that the BLAS library allocates for itself
plan = plan_from_store(root, sigma_rels=json.loads(lengths), tolerance=0)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmData"].split()[0]) * 1024 + int(allowed)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    everything = np.ones(plan.bytes_to_read // 4)
    raise SystemExit("the limit has no effect")
except MemoryError:
    pass
paths = [Path(out) / f"{number}.safetensors" for number in range(len(plan.gammas))]
write_outputs(plan, paths, memory_bytes=int(budget), threads=2)
print(plan.bytes_to_read)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits mapped memory on Linux only")
def test_snapshots_larger_than_the_memory_allowed(tmp_path):
    layout, run = layout_of([record("weight", (ELEMENTS,))], chunk_bytes=1 << 24), run_id()
    pattern = np.tile(np.random.default_rng(0).standard_normal(1 << 16).astype("f4"), ELEMENTS >> 16)
    for step in STEPS:
        write_snapshot(tmp_path, layout, step, [pattern * step, pattern / step], run=run)
    assert SnapshotStore(tmp_path).get(8).layout.average_elements == ELEMENTS
    out = tmp_path / "out"
    out.mkdir()
    lengths, allowed = np.linspace(0.05, 0.15, LENGTHS).tolist(), BUDGET + 10 * STACK
    command = [sys.executable, "-c", CODE, str(tmp_path), str(out), json.dumps(lengths), str(allowed), str(BUDGET)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3 * allowed
    plan = plan_from_store(tmp_path, sigma_rels=lengths, tolerance=0)
    factors = [column.step if column.gamma == plan.columns[0].gamma else 1 / column.step for column in plan.columns]
    for number, weights in enumerate(plan.weights.T):
        found = np.memmap(Path(out) / f"{number}.safetensors", "f4", "r")[-ELEMENTS:]
        np.testing.assert_allclose(found[:: 1 << 12], pattern[:: 1 << 12] * (weights @ factors), atol=1e-4)
