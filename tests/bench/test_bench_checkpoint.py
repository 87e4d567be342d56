from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from bench import models, savers
from bench.bench_checkpoint import CHECKSUMS, FINITE, QUICK, HostMemory, Rushed, Steps, memory_copy
from bench.savers import DCP, EMA_PYTORCH_HALF, Saver
from nitrous_ema import SnapshotStore

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("make", savers.makers()[0])
def test_saver_writes_two_averages_and_settles_to_an_empty_folder(make, tmp_path):
    model = models.tiny()
    with ExitStack() as stack:
        for name, saver in make(model, stack, tmp_path).items():
            saver.settle()
            assert _files(saver.folder) == []
            saver.save()
            if saver.wait is not None:
                saver.wait()
            assert not saver.is_saving()
            width = 2 if name == EMA_PYTORCH_HALF else 4
            written = sum(path.stat().st_size for path in _files(saver.folder))
            assert written > 2 * width * models.averaged_elements(model), name
            saver.settle()
            assert _files(saver.folder) == [], name


@pytest.mark.parametrize("make", savers.makers()[0])
def test_saver_that_saves_durably_has_nothing_left_to_do(make, tmp_path):
    model = models.tiny()
    with ExitStack() as stack:
        for name, saver in make(model, stack, tmp_path).items():
            if saver.save_durably is None:
                continue
            saver.settle()
            saver.save_durably()
            assert not saver.is_saving(), name
            written = sum(path.stat().st_size for path in _files(saver.folder))
            assert written > 8 * models.averaged_elements(model), name


def test_saved_states_of_torch_are_the_averages(tmp_path):
    from torch.distributed import checkpoint

    model = models.tiny()
    with ExitStack() as stack:
        made = savers._torch(model, stack, tmp_path)
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        made[DCP].update()
        made[DCP].save()
        made[DCP].wait()
        read = savers.averaged_states(models.tiny())
        (folder,) = made[DCP].folder.iterdir()
        checkpoint.load(read, checkpoint_id=folder, no_dist=True)
    key, live = next(iter(model.state_dict().items()))
    assert torch.allclose(read["0"][key], live - 0.99, atol=1e-5)
    assert torch.allclose(read["1"][key], live - 0.999, atol=1e-5)


def test_both_ways_to_make_host_memory_durable_write_the_same_bytes(tmp_path):
    memory = HostMemory(models.tiny(), tmp_path)
    memory.write_plainly()
    memory.write_snapshot()
    (plain,) = _files(tmp_path / "plain")
    store = SnapshotStore(tmp_path / "store")
    snapshot = store.get()
    data = snapshot.paths[0].read_bytes()[snapshot.headers[0].data_begin :]
    assert plain.read_bytes() == data
    assert len(data) >= 8 * models.averaged_elements(models.tiny())
    assert len(set(data)) == 256  # no zeros that a file system could leave out
    assert store.verify() == []
    memory.settle()
    assert _files(tmp_path) == []


def test_floor_copies_the_bytes_of_two_averages():
    model = models.tiny()
    copy = memory_copy(model)
    copy()
    source, target = (cell.cell_contents for cell in copy.__closure__)
    assert source.nbytes == target.nbytes == 8 * models.averaged_elements(model)
    assert torch.equal(source, target)


def test_checkpoint_falls_into_the_second_of_the_training_steps(tmp_path):
    model, calls = models.tiny(), []
    before = next(model.parameters()).detach().clone()
    saver = Saver(folder=tmp_path, update=lambda: calls.append("update"), save=lambda: None)
    Steps(model=model, size=QUICK, side=4).around(saver)(lambda: calls.append("save"))
    assert calls == ["update", "update", "save", "update", "update"]
    assert not torch.equal(before, next(model.parameters()))


def test_work_that_outlasts_its_steps_is_counted(tmp_path):
    answers = iter([True, False, True])
    saver = Saver(folder=tmp_path, update=lambda: None, save=lambda: None, is_saving=lambda: next(answers))
    rushed = Rushed(saver)
    for _ in range(3):
        rushed.settle()
    assert rushed.times == 2


def test_quick_bench_runs_with_every_table(tmp_path):
    file = tmp_path / "checkpoint.json"
    command = [sys.executable, "-m", "bench.bench_checkpoint", "--quick", "--threads", "1", "--rounds", "1"]
    command += ["--folder", str(tmp_path), "--json", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    tables = json.loads(file.read_text())["tables"]
    assert [table["title"].split(" ")[0] for table in tables] == ["held", "added", "until", "computed"]
    for table in tables:
        names = {row["name"].split(".checkpoint()")[0] for row in table["rows"]}
        assert names >= ({CHECKSUMS, FINITE} if table is tables[3] else {"PostHocEMA", "AsyncPostHocEMA"})
        assert all(math.isfinite(s) for row in table["rows"] for s in row["samples"])
        assert table["title"] in done.stdout
    assert all(row["bytes_per_second"] > 0 for table in tables[2:] for row in table["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
