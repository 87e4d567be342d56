from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from nitrous_ema import PostHocEMA, SnapshotStore, load_average, sweep
from nitrous_ema.errors import (
    EvaluationError,
    NitrousError,
    ResultsError,
    SnapshotDamaged,
    SnapshotMismatch,
    SnapshotNotFound,
)
from nitrous_ema.search.results import read_table
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.synthesis import plan_from_store
from nitrous_ema.synthesis.outputs.reader import read_average
from nitrous_ema.synthesis.outputs.writer import write_outputs
from tests.support.snapshot_folders import damage, layout_of, record, snapshot_file, write_run

ROOT = Path(__file__).resolve().parents[3]
LENGTHS = (0.05, 0.07, 0.1, 0.14, 0.2)
STEPS, EVERY = 400, 20


def net(dtype=torch.float32) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    model[2].weight = model[0].weight  # tied
    return model.to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose weight is the step: an average of length sigma_rel is its profile's mean time (Eq. 122)."""
    root = tmp_path_factory.mktemp("sweep") / "snapshots"
    model = net()
    with PostHocEMA(model, checkpoint_every_num_steps=EVERY, checkpoint_folder=root, update_every=1) as ema:
        for step in range(1, STEPS + 1):
            with torch.no_grad():
                model[0].weight.fill_(step)
            model[1].num_batches_tracked.fill_(step)
            ema.update()
    return root


def mean_time(sigma_rel: float) -> float:
    """As a fraction of the training time, by solving Eq. 123 on a grid."""
    gamma = np.linspace(0, 400, 400_001)
    found = gamma[np.argmin(abs(np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) - sigma_rel))]
    return float((found + 1) / (found + 2))


class Distance:
    """Squared distance of an average from the average of one length; records its arguments and raises at one call."""

    def __init__(self, best=0.085, *, breaks_at=None, error=RuntimeError):
        self.wanted, self.breaks_at, self.error, self.seen = mean_time(best), breaks_at, error, []

    def __call__(self, state):
        if len(self.seen) == self.breaks_at:
            raise self.error("out of cheese")
        weight = float(state["0.weight"].mean()) if isinstance(state, dict) else float(state[0].weight.detach().mean())
        step = int(state["1.num_batches_tracked"] if isinstance(state, dict) else state[1].num_batches_tracked)
        self.seen.append((step, weight))
        return (weight / step - self.wanted) ** 2


def swept(folder, tmp_path, evaluate=None, **more):
    return sweep(
        folder, evaluate or Distance(), **{"sigma_rels": LENGTHS, "results": tmp_path / "r.jsonl", "refine": 0, **more}
    )


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is evaluated


def test_each_length_is_evaluated_with_its_average(folder, tmp_path):
    evaluate = Distance()
    table = swept(folder, tmp_path, evaluate)
    assert [row.sigma_rel for row in table.rows] == list(LENGTHS)
    weights = [weight / STEPS for _, weight in evaluate.seen]
    assert weights == pytest.approx([mean_time(length) for length in LENGTHS], abs=2e-3)  # of 400 discrete steps
    assert [row.value for row in table.rows] == [(weight - evaluate.wanted) ** 2 for weight in weights]
    assert all(row.step == row.t == STEPS for row in table.rows)


def test_lengths_and_steps_make_a_grid(folder, tmp_path):
    evaluate = Distance()
    table = swept(folder, tmp_path, evaluate, steps=[400, 200], sigma_rels=[0.1, 0.05, 0.1])
    assert [(row.step, row.sigma_rel) for row in table.rows] == [(200, 0.05), (200, 0.1), (400, 0.05), (400, 0.1)]
    assert [step for step, _ in evaluate.seen] == [200, 200, 400, 400]
    again = swept(folder, tmp_path, Distance(breaks_at=0), steps=np.array([200]), sigma_rels=np.array([0.05, 0.1]))
    assert again.rows == table.rows[:2]


def test_without_a_model_it_is_what_load_state_dict_takes(folder, tmp_path):
    seen = []

    def evaluate(state):
        model = net()
        model.load_state_dict(state, strict=True)
        seen.append({name: (each.dtype, each.shape) for name, each in state.items()})
        return 0.0

    swept(folder, tmp_path, evaluate, sigma_rels=[0.1])
    assert seen == [{name: (each.dtype, each.shape) for name, each in net().state_dict().items()}]


def test_model_gets_every_average_cast_and_under_wrappers(folder, tmp_path):
    model, seen = torch.nn.DataParallel(net(torch.float64)), []

    def evaluate(given):
        assert given is model
        seen.append({name: each.clone() for name, each in given.module.state_dict().items()})
        return 0.0

    table = swept(folder, tmp_path, evaluate, model=model, averages=tmp_path / "averages")
    for row, state in zip(table.rows, seen, strict=True):
        expected = net(torch.float64)
        load_average(expected, row.path)
        assert state["0.weight"].dtype == torch.float64
        assert all(torch.equal(each, state[name]) for name, each in expected.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_state_dict_is_what_other_readers_find_in_the_file(folder, tmp_path, suffix):
    path = tmp_path / f"average{suffix}"
    write_outputs(plan_from_store(folder, sigma_rels=[0.08]), [path])
    expected = torch.load(path, weights_only=True) if suffix == ".pt" else safetensors.torch.load_file(path)
    found = read_average(path)
    assert found.keys() == expected.keys() == net().state_dict().keys()
    assert all(each.dtype == found[name].dtype and torch.equal(each, found[name]) for name, each in expected.items())


@pytest.mark.parametrize(
    "returned", [2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor(2), torch.tensor(2.0, requires_grad=True)]
)
def test_value_may_be_any_single_number(folder, tmp_path, returned):
    assert swept(folder, tmp_path, lambda _: returned, sigma_rels=[0.1]).best.value == 2.0


def test_lengths_of_a_pass_are_read_together(folder, tmp_path):
    together = swept(folder, tmp_path)
    assert len({(row.snapshots_read, row.bytes_read) for row in together.rows}) == 1
    alone = swept(folder, tmp_path, at_once=1, metric="alone")
    assert [row.snapshots_read == 1 for row in alone.rows] == [True, False, True, False, False]  # two were tracked


# The search


def test_refinement_finds_the_best_length_between_the_given_ones(folder, tmp_path):
    evaluate = Distance(0.085)
    table = swept(folder, tmp_path, evaluate, refine=4)
    assert table.best.sigma_rel == pytest.approx(0.085, rel=0.03)
    assert len(evaluate.seen) == len(table.rows) <= len(LENGTHS) + 4


def test_higher_is_better_on_request(folder, tmp_path):
    near = Distance(0.12)
    table = swept(folder, tmp_path, lambda state: -near(state), maximize=True, refine=3)
    assert table.best.sigma_rel == pytest.approx(0.12, rel=0.05)
    again = swept(folder, tmp_path, lambda state: -near(state))  # the same results, seen the other way round
    assert again.best.value == min(row.value for row in again.rows) < max(row.value for row in again.rows)


def test_results_that_are_not_finite_are_noted_and_never_the_best(folder, tmp_path):
    values = iter([math.nan, 3.0, 2.0, -math.inf, 4.0])
    table = swept(folder, tmp_path, lambda _: next(values))
    assert table.best.value == 2.0
    assert "Results that are not finite are never the best: 0.05 at step 400, 0.14 at step 400." in table.notes
    assert swept(folder, tmp_path, Distance(breaks_at=0)).best.value == 2.0  # also when it comes from the file


def test_best_at_an_end_of_the_range_is_noted(folder, tmp_path):
    assert any(
        "is the longest one evaluated; longer lengths may" in note
        for note in swept(folder, tmp_path, Distance(0.25)).notes
    )
    assert not any("one evaluated" in note for note in swept(folder, tmp_path, metric="within").notes)


def test_lengths_that_the_snapshots_do_not_support_are_noted(folder, tmp_path):
    assert any("0.004" in note for note in swept(folder, tmp_path, sigma_rels=[0.004, 0.1]).notes)


# Interrupted


@pytest.mark.parametrize("breaks_at", [0, 1, 4, 6])
def test_interrupted_sweep_continues_with_the_same_numbers(folder, tmp_path, breaks_at):
    whole = swept(folder, tmp_path, metric="whole", refine=3)
    broken = Distance(breaks_at=breaks_at)
    with pytest.raises(EvaluationError):
        swept(folder, tmp_path, broken, refine=3)
    rest = Distance()
    table = swept(folder, tmp_path, rest, refine=3)
    assert len(broken.seen) + len(rest.seen) == len(table.rows)
    assert [(row.sigma_rel, row.value) for row in table.rows] == [(row.sigma_rel, row.value) for row in whole.rows]
    assert breaks_at == 0 or f"{breaks_at} of {len(table.rows)} results were read from" in table.notes[-1]


def test_finished_sweep_evaluates_nothing_again_and_reads_no_snapshot_data(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "copy")
    first = swept(root, tmp_path, refine=2)
    for step in range(EVERY, STEPS + 1, EVERY):
        damage(snapshot_file(root, step), at=0.99)
    again = swept(root, tmp_path, Distance(breaks_at=0), refine=2)
    assert again.rows == first.rows


KILLED = """
import os, signal, sys
from nitrous_ema import sweep
seen = []
def evaluate(state):
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(state)
    return float(len(seen))
sweep(sys.argv[1], evaluate, sigma_rels=[0.05, 0.07, 0.1, 0.14, 0.2], results=sys.argv[2])
"""


def test_killed_sweep_continues_and_leaves_nothing_but_results(folder, tmp_path):
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "r.jsonl")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(names(tmp_path)) == 2  # averages were waiting for their evaluation
    rest = Distance()
    table = swept(folder, tmp_path, rest)
    assert [row.value for row in table.rows[:2]] == [1.0, 2.0]
    assert len(rest.seen) == 3
    assert names(tmp_path) == ["r.jsonl"]


def test_error_of_the_evaluation_names_the_length(folder, tmp_path):
    with pytest.raises(
        EvaluationError, match=r"out of cheese.*sigma_rel 0\.1 at step 400.*continues from there"
    ) as raised:
        swept(folder, tmp_path, Distance(breaks_at=2))
    assert (raised.value.sigma_rel, raised.value.step) == (0.1, 400)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert names(tmp_path) == ["r.jsonl"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupt_passes_as_it_is_and_leaves_results_only(folder, tmp_path, kind):
    with pytest.raises(kind):
        swept(folder, tmp_path, Distance(breaks_at=2, error=kind))
    assert names(tmp_path) == ["r.jsonl"]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("returned", [None, "2.0", [1.0, 2.0], torch.ones(2)])
def test_returned_value_that_is_not_a_number_is_refused_by_the_name_of_its_type(folder, tmp_path, returned):
    with pytest.raises(EvaluationError, match=f"returned {type(returned).__name__}, not one number"):
        swept(folder, tmp_path, lambda _: returned)


@pytest.mark.parametrize(
    "other",
    [{"metric": "fid"}, {"tolerance": 0.0}, {"exclude": [200]}, {"steps": [380]}, {"dtype": "bf16"}],
    ids=lambda each: next(iter(each)),
)
def test_results_of_another_recipe_are_distinguished(folder, tmp_path, other):
    first = swept(folder, tmp_path)
    evaluate = Distance()
    second = swept(folder, tmp_path, evaluate, **other)
    assert len(evaluate.seen) == len(LENGTHS)
    assert swept(folder, tmp_path, Distance(breaks_at=0)).rows == first.rows
    assert swept(folder, tmp_path, Distance(breaks_at=0), **other).rows == second.rows


def test_results_of_another_run_are_distinguished(folder, tmp_path):
    swept(folder, tmp_path)
    with PostHocEMA(net(), checkpoint_every_num_steps=10, checkpoint_folder=tmp_path / "s", update_every=1) as ema:
        for _ in range(STEPS):
            ema.update()
    evaluated = []
    swept(SnapshotStore(tmp_path / "s"), tmp_path, lambda state: evaluated.append(state) or 1.0)
    assert len(evaluated) == len(LENGTHS)


def test_steps_of_a_run_and_of_one_that_continues_it_are_one_table(tmp_path):
    model, root = net(), tmp_path / "snapshots"
    settings = {"checkpoint_every_num_steps": 10, "checkpoint_folder": root, "update_every": 1}
    with PostHocEMA(model, **settings) as ema:
        for _ in range(40):
            ema.update()
        state = ema.state_dict()
    with PostHocEMA(model, **settings) as ema:
        ema.load_state_dict(state)
        for _ in range(40):
            ema.update()
    table = swept(root, tmp_path, lambda _: 1.0, steps=[30, 40, 60, 80], sigma_rels=[0.1])
    assert len({row.run for row in table.rows}) == 2
    assert read_table(tmp_path / "r.jsonl").rows == table.rows


def test_default_step_is_the_newest_at_every_call(tmp_path):
    model, root = net(), tmp_path / "snapshots"
    with PostHocEMA(model, checkpoint_every_num_steps=10, checkpoint_folder=root, update_every=1) as ema:
        for newest in (40, 80):
            for _ in range(40):
                ema.update()
            assert swept(root, tmp_path, lambda _: 1.0).steps == (newest,)


# Files


def test_averages_are_gone_when_they_were_evaluated(folder, tmp_path):
    counts = []

    def evaluate(state):
        (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
        counts.append(len(list(folder.iterdir())))
        return 0.0

    swept(folder, tmp_path, evaluate, at_once=3)
    assert counts == [3, 2, 1, 2, 1]
    assert names(tmp_path) == ["r.jsonl"]


def test_averages_are_stored_in_the_given_folder(folder, tmp_path):
    table = swept(folder, tmp_path, averages=tmp_path / "averages")
    assert [row.path for row in table.rows] == [
        tmp_path / "averages" / f"step-400-sigma-{length!r}.safetensors" for length in LENGTHS
    ]
    assert names(tmp_path / "averages") == sorted(row.path.name for row in table.rows)


def test_averages_of_lengths_that_were_evaluated_before_are_stored_too(folder, tmp_path):
    """A first sweep has stored none of them. Stored averages are not written again."""
    swept(folder, tmp_path)
    first, again = (swept(folder, tmp_path, Distance(breaks_at=0), averages=tmp_path / "kept") for _ in range(2))
    assert [row.path for row in first.rows] == [row.path for row in again.rows]
    assert names(tmp_path / "kept") == sorted(row.path.name for row in first.rows)
    made = [row.path.stat().st_ino for row in first.rows]
    assert swept(folder, tmp_path, Distance(breaks_at=0), averages=tmp_path / "kept").rows == first.rows
    assert [row.path.stat().st_ino for row in first.rows] == made
    evaluate = Distance()
    assert [evaluate(read_average(row.path)) for row in first.rows] == [row.value for row in first.rows]


@pytest.mark.parametrize("other", [{"tolerance": 0.0}, {"dtype": "bf16"}, {"exclude": [200]}])
def test_averages_of_another_sweep_are_not_replaced(folder, tmp_path, other):
    table = swept(folder, tmp_path, averages=tmp_path / "kept")
    content = [row.path.read_bytes() for row in table.rows]
    others = swept(folder, tmp_path, averages=tmp_path / "kept", **other)
    assert [row.path.read_bytes() for row in table.rows] == content
    assert not {row.path for row in table.rows} & {row.path for row in others.rows}
    made = [row.path.stat().st_ino for row in (*table.rows, *others.rows)]
    for rows, options in ((table.rows, {}), (others.rows, other)):
        assert swept(folder, tmp_path, Distance(breaks_at=0), averages=tmp_path / "kept", **options).rows == rows
    assert [row.path.stat().st_ino for row in (*table.rows, *others.rows)] == made
    for row in (*table.rows, *others.rows):
        row.path.write_text("my thesis")
    with pytest.raises(ValueError, match="is not an average of this sweep; move it"):
        swept(folder, tmp_path, averages=tmp_path / "kept", results=tmp_path / "new.jsonl", **other)


@pytest.mark.parametrize("results", ["r.jsonl", "other.jsonl"])
def test_evaluated_averages_stay_where_more_lengths_read_other_snapshots(folder, tmp_path, results):
    few = {"sigma_rels": [0.06, 0.12], "tolerance": 1e-2, "averages": tmp_path / "kept"}
    first = swept(folder, tmp_path, **few)
    content = [row.path.read_bytes() for row in first.rows]
    more = swept(folder, tmp_path, **{**few, "sigma_rels": [0.06, 0.12, 0.2]}, results=tmp_path / results)
    assert more.rows[2].snapshots_read > first.rows[0].snapshots_read
    assert [row.path.read_bytes() for row in first.rows] == content
    evaluate = Distance()
    assert [evaluate(read_average(row.path)) for row in more.rows] == [row.value for row in more.rows]
    assert (more.rows[:2] == first.rows) == (results == "r.jsonl")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float64"])
def test_averages_have_the_requested_type(folder, tmp_path, dtype):
    seen = []

    def evaluate(state):
        seen.append((str(state["0.weight"].dtype), state["1.num_batches_tracked"].dtype))
        return 0.0

    table = swept(folder, tmp_path, evaluate, dtype=dtype, sigma_rels=[0.1])
    name = str(dtype).removeprefix("torch.")
    assert seen == [(f"torch.{name}", torch.int64)]
    assert [row.dtype for row in table.rows] == [{"bfloat16": "BF16", "float64": "F64"}[name]]


def test_types_that_averages_cannot_have_are_swept_in_another_type(tmp_path):
    write_run(tmp_path / "snapshots", layout_of([record("w", (30,), "F8_E4M3")]), range(10, 210, 10))
    seen = []
    with pytest.raises(NitrousError, match="F8_E4M3"):
        swept(tmp_path / "snapshots", tmp_path, seen.append)
    swept(tmp_path / "snapshots", tmp_path, lambda state: seen.append(state["w"].dtype) or 0.0, dtype="bf16")
    assert seen == [torch.bfloat16] * len(LENGTHS)


def test_finished_sweep_with_the_other_direction_records_it_in_its_file(folder, tmp_path):
    evaluate = lambda state: float(state["0.weight"].mean())  # noqa: E731
    first = swept(folder, tmp_path, evaluate)
    assert read_table(tmp_path / "r.jsonl").best == first.best
    for _ in range(2):
        second = swept(folder, tmp_path, Distance(breaks_at=0), maximize=True)
        assert second.best.sigma_rel != first.best.sigma_rel
        assert read_table(tmp_path / "r.jsonl").best == second.best
        assert len((tmp_path / "r.jsonl").read_text().splitlines()) == len(LENGTHS) + 1


def test_each_new_result_is_passed_to_the_callback(folder, tmp_path):
    passed = []
    swept(folder, tmp_path, sigma_rels=LENGTHS[:2])
    table = swept(folder, tmp_path, told=passed.append)
    assert passed == list(table.rows[2:])


def test_old_folders_are_swept_too(tmp_path):
    root = tmp_path / "old"
    root.mkdir()
    for step in range(10, 210, 10):
        for profile in range(2):
            torch.save({"ema_model.w": torch.tensor([float(step)])}, root / f"{profile}.{step}.pt")
    old = LegacyFolder(root, sigma_rels=[0.05, 0.1])
    table = sweep(old, lambda state: float(state["w"]), sigma_rels=[0.05, 0.08, 0.1], results=tmp_path / "r", refine=0)
    assert table.rows[0].value == table.rows[2].value == 200.0  # tracked lengths are the snapshots themselves
    assert {row.run for row in table.rows} == {str(root)}
    with pytest.raises(ValueError, match="files has no runs; omit run="):
        sweep(old, lambda state: 0.0, sigma_rels=[0.05], results=tmp_path / "r", run="mine")


# Refused before anything is touched


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"sigma_rels": []}, ValueError, "sigma_rels is empty"),
        ({"sigma_rels": [0.1, 0.5]}, ValueError, "sigma_rels has 0.5"),
        ({"sigma_rels": "0.05,0.1"}, TypeError, "expected a sequence of numbers"),
        ({"sigma_rels": 0.05}, TypeError, "sigma_rels is 0.05; expected a sequence of numbers"),
        ({"steps": []}, ValueError, "steps is empty"),
        ({"steps": [200, 205]}, SnapshotNotFound, "nearest steps there: 200 and 220"),
        ({"sigma_rels": [0.1, "x"]}, ValueError, "sigma_rels is .*; expected real numbers"),
        ({"steps": 400}, TypeError, "steps is 400; expected a sequence of steps"),
        ({"steps": "all"}, TypeError, "steps is 'all'; expected a sequence of steps"),
        ({"steps": ["400"]}, TypeError, r"steps is \['400'\]; expected a sequence of steps"),
        ({"exclude": 400}, TypeError, "exclude is 400; expected a sequence of steps"),
        ({"evaluate": 3}, TypeError, "evaluate is 3; expected a function"),
        ({"metric": 3}, TypeError, "metric is 3; expected a name"),
        ({"refine": 1.5}, ValueError, "refine is 1.5; expected a whole number"),
        ({"refine": -1}, ValueError, "refine is -1"),
        ({"at_once": 0}, ValueError, "at_once is 0"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'; expected one of float64"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"run": "unknown"}, SnapshotNotFound, "unknown"),
        ({"memory_bytes": 1000}, ValueError, "memory"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_wrong_arguments_are_refused_before_anything_is_evaluated(folder, tmp_path, wrong, error, message):
    with pytest.raises(error, match=message):
        swept(folder, tmp_path, **{"evaluate": Distance(breaks_at=0), **wrong})
    assert names(tmp_path) == []


def test_file_of_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "r.jsonl").write_text("my thesis\n")
    with pytest.raises(ResultsError, match="pass another file"):
        swept(folder, tmp_path, Distance(breaks_at=0))
    assert (tmp_path / "r.jsonl").read_text() == "my thesis\n"


def test_model_that_does_not_fit_is_refused_untouched(folder, tmp_path):
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(
        SnapshotMismatch,
        match=r"^The average of sigma_rel 0\.05 at step 400 does not fit the model; missing in the .*Pass as model= ",
    ):
        swept(folder, tmp_path, Distance(breaks_at=0), model=model)
    assert torch.equal(model.weight, before)
    assert names(tmp_path) == []


def test_damaged_snapshot_is_an_error_and_can_be_excluded(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "copy")
    damage(snapshot_file(root, 200), at=0.99)
    with pytest.raises(SnapshotDamaged, match="200"):
        swept(root, tmp_path, tolerance=0.0)
    assert len(swept(root, tmp_path, tolerance=0.0, exclude=[200]).rows) == len(LENGTHS)
