from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import bench_device, contestants, models, speed_test, stalls, training
from bench.harness import Budget, Report
from bench.savers import Saver
from bench.training import QUICK, Bench, Trainee, bytes_shown, copy_seconds, peak_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MAKERS = {**contestants.makers()[0], contestants.SIDE_STREAM: contestants.side_stream}


def test_large_model_has_the_tensors_of_the_model_that_users_time():
    with torch.device("meta"):
        model = training.vit_h_14()
    assert (models.averaged_elements(model), models.averaged_tensors(model)) == (632_045_800, 392)


def test_small_model_is_the_smallest_of_its_family():
    with torch.device("meta"):
        assert models.averaged_elements(models.vit_ti()) == 5_717_416


def test_network_of_the_speed_test_says_why_it_is_not_torchvisions(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    make, what = training.torchvision_vit_h_14()
    assert make is training.vit_h_14
    assert re.search("plain torch.*Error: ", what)


@pytest.mark.parametrize("name", MAKERS)
def test_contestant_moves_its_averages_once_in_update_every_calls(name, monkeypatch):
    work = []
    model = models.tiny()
    with ExitStack() as stack:
        averaging = MAKERS[name](model, stack, 5)
        for _ in range(6):  # from the first, which may copy, to the second
            averaging.update_and_fence()
        for operation in ("lerp_", "_foreach_lerp_", "_foreach_mul_", "lerp"):
            _note(monkeypatch, operation, work)
        for due in (False, False, False, False, True, False):
            work.clear()
            averaging.update_and_fence()
            assert bool(work) == due, name


def test_side_stream_keeps_two_averages_of_the_parameters(monkeypatch):
    model, averages = torch.nn.Linear(2, 1, bias=False), []
    before = model.weight.detach().clone()
    multiply = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda tensors, by: averages.extend(tensors) or multiply(tensors, by))
    with ExitStack() as stack:
        averaging = contestants.side_stream(model, stack)
        with torch.no_grad():
            model.weight.add_(1.0)
        averaging.update_and_fence()
    for average, weight in zip(averages, contestants.WEIGHTS, strict=True):
        torch.testing.assert_close(average, before + weight)


def test_step_waits_for_the_last_update_before_the_optimizer_and_updates_after_it():
    trainee, calls = Trainee(QUICK, CPU), []
    weight = next(trainee.model.parameters())

    def note(call: str) -> None:
        calls.append((call, weight.detach().clone()))

    averaging = contestants.Averaging(
        lambda: note("update"), fence=lambda: note("fence"), before_step=lambda: note("before")
    )
    trainee.steps(2, averaging)()
    assert [call for call, _ in calls] == ["before", "update", "before", "update", "fence"]
    same = [torch.equal(a, b) for (_, a), (_, b) in pairwise(calls)]
    assert same == [False, True, False, True]


def test_model_can_be_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    trainee = Trainee(QUICK, CPU, compiled=True)
    assert isinstance(trainee.model, torch._dynamo.OptimizedModule)
    trainee.steps(1)()


def test_peak_is_counted_from_the_beginning_of_its_block(monkeypatch):
    class Counts:
        held, peak = 5, 50

        def reset_peak_memory_stats(self) -> None:
            self.peak = self.held

        def max_memory_allocated(self) -> int:
            return self.peak

    counts = Counts()
    monkeypatch.setattr(torch, "get_device_module", lambda device: counts)
    with peak_bytes(CPU) as peak:
        counts.peak = max(counts.peak, 7)
    assert peak() == 7


def test_copy_of_more_than_the_buffer_is_timed_as_often_as_it_takes(monkeypatch):
    copied = []
    monkeypatch.setattr(training, "COPY_BYTES", 4)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source, non_blocking: copied.append(len(source)))
    assert copy_seconds(10, CPU, None) > 0
    assert copied == [4, 4, 4] * 4  # once to warm up, three times timed


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (2_500_000, "2.50 MB"), (5.06e9, "5.06 GB")])
def test_bytes_have_a_fitting_unit(size, text):
    assert bytes_shown(size) == text


def test_stretch_keeps_the_longest_step_of_each_kind(tmp_path):
    calls = []
    saver = Saver(folder=tmp_path, update=lambda: calls.append("update"), save=lambda: None)
    stretch = stalls.Stretch(_bench(), saver, count=3)
    stretch.run(lambda: calls.append("save"))
    assert calls == ["update", "update", "save", "update"]
    stretch.settle()
    stretch.settle()  # nothing has run since
    stretch.run(None)
    stretch.settle()
    assert {kind: len(values) for kind, values in stretch.longest.items()} == {stalls.WITH: 1, stalls.WITHOUT: 1}


def test_batch_shrinks_until_the_copy_takes_longer_than_three_steps(monkeypatch):
    bench = _bench()
    bench.trainee.batch = 8
    monkeypatch.setattr(stalls, "copy_seconds", lambda *given: 1.0)
    monkeypatch.setattr(Bench, "step_seconds", lambda self: self.trainee.batch / 4)
    monkeypatch.setattr(stalls, "_checkpoints", lambda bench, budget, count: (stalls.Comparison({}), {}, {}))
    stalls.stall(bench, Budget(0))
    added = bench.report.tables[0]
    assert "batch 1," in added["note"]
    assert "longer than three of them" in added["note"]
    assert added["copy_per_step"] == 4.0
    assert bench.trainee.batch == QUICK.batch


@pytest.mark.parametrize("module", [bench_device, speed_test])
def test_cpu_is_refused_but_to_see_that_it_runs(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "--quick" in capsys.readouterr().err


def test_contestant_that_fails_is_told_and_the_rest_goes_on(monkeypatch, tmp_path):
    def broken(model, stack, update_every=1):
        raise torch.OutOfMemoryError("no memory for this one\nand a second line")

    libraries = {"broken": broken, contestants.SYNC: MAKERS[contestants.SYNC]}
    monkeypatch.setattr(contestants, "makers", lambda: (libraries, {}))
    tables, status = _run(bench_device, monkeypatch, tmp_path, "--tables update step memory --every 1 2")
    assert status == 1
    assert len(tables) == 4
    for table in tables:
        assert table["failed"] == {"broken": "OutOfMemoryError: no memory for this one"}
        assert contestants.SYNC in {row["name"] for row in table["rows"]}


def test_contestants_for_which_no_time_is_left_are_told(monkeypatch, tmp_path):
    tables, status = _run(bench_device, monkeypatch, tmp_path, "--tables update stall --minutes 0")
    assert status == 1
    assert all("--minutes" in why for table in tables for why in table["failed"].values())
    assert {*MAKERS} == tables[0]["failed"].keys()
    assert tables[1]["failed"].keys() >= {"sync", "async", "torch"}


def test_training_that_fails_ends_the_tables_of_its_model_only(monkeypatch, tmp_path):
    monkeypatch.setattr(Trainee, "step", lambda self, averaging=None: 1 / 0)
    tables, status = _run(bench_device, monkeypatch, tmp_path, "--tables bytes")
    assert status == 1
    assert [table["failed"] for table in tables] == [{"no EMA": "ZeroDivisionError: division by zero"}]


def test_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch, tmp_path):
    def broken(network):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    tables, _ = _run(speed_test, monkeypatch, tmp_path, "--steps 2 --rounds 1")
    assert "torch.compile has failed (RuntimeError: no compiler)" in tables[0]["title"]
    assert len(tables[0]["rows"]) >= 4


def test_quick_bench_runs_with_every_table_and_option(tmp_path):
    folder = tmp_path / "snapshots"
    folder.mkdir()
    options = "--rounds 1 --every 1 3 --batch 3 --minutes 1 --models vit-ti --tables bytes update step memory stall"
    tables = _command("bench_device", tmp_path, f"{options} --folder {folder}")
    kinds = [table["title"].split(":")[0] for table in tables]
    assert kinds == [
        "bytes",
        "one update of two averages",
        "one training step, update_every 1",
        "one training step, update_every 3",
        "device memory",
        "added by one checkpoint to 8 training steps",
        "longest of these 8 steps",
    ]
    for table in tables[1:5]:
        assert {row["name"] for row in table["rows"]} >= {*MAKERS}
    assert not any(table["failed"] for table in tables)
    assert all(math.isfinite(s) for table in tables for row in table["rows"] for s in row.get("samples", []))
    assert "copying that to host memory" in tables[5]["note"]
    assert [*folder.iterdir()] == []


def test_quick_speed_test_runs_every_contestant(tmp_path):
    (table,) = _command("speed_test", tmp_path, "--eager --large --steps 3 --rounds 2 --minutes 1")
    assert table["title"] == "3 training steps of tiny ViT, eager, inputs of 2 x 3 x 16 x 16"
    assert table["failed"] == {}
    names = [row["name"] for row in table["rows"]]
    assert {"without EMA", "PostHocEMA", "PostHocEMA, update_every=1", "AsyncPostHocEMA, update_every=100"} <= {*names}
    assert all(len(row["samples"]) == 2 for row in table["rows"])


def _bench() -> Bench:
    report = Report(bench="fake", options={}, machine={})
    return Bench(report=report, trainee=Trainee(QUICK, CPU), libraries={}, every=(1,), rounds=1, folder=None)


def _run(module, monkeypatch, folder, options):
    """In this process: tables and exit status."""
    line = f"bench --device cpu --quick --rounds 1 --json {folder} {options}"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as ended:
        module.main()
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["tables"], int(ended.value.code)


def _command(module, folder, options):
    """As users run it."""
    command = f"-m bench.{module} --device cpu --quick --threads 1 --json {folder} {options}".split()
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    tables = json.loads((folder / f"{module}.json").read_text())["tables"]
    assert all(table["title"] in done.stdout for table in tables)
    return tables


def _note(monkeypatch, operation, work):
    """Note every call of an operation, wherever it is looked up."""
    for owner in (torch, torch.Tensor):
        original = getattr(owner, operation, None)
        if original is not None:
            monkeypatch.setattr(
                owner, operation, lambda *a, original=original, **k: work.append(operation) or original(*a, **k)
            )
