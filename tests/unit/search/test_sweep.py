from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from nitrous_ema import AsyncPostHocEMA, PostHocEMA, SnapshotStore, load_average, sweep
from nitrous_ema.errors import (
    EvaluationError,
    NitrousError,
    NitrousWarning,
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


class Fault:
    """Raises at one call. Its type is part of the fingerprint of ``Distance``, its values are not."""

    def __init__(self, breaks_at, error):
        self.breaks_at, self.error = breaks_at, error

    def pass_call(self, number):
        if number == self.breaks_at:
            raise self.error("out of cheese")


class Distance:
    """Squared distance of an average from the average of one length; records its arguments and raises at one call."""

    def __init__(self, best=0.085, *, breaks_at=None, error=RuntimeError):
        self.wanted, self.fault, self.seen = mean_time(best), Fault(breaks_at, error), []

    def __call__(self, state):
        self.fault.pass_call(len(self.seen))
        weight = float(state["0.weight"].mean()) if isinstance(state, dict) else float(state[0].weight.detach().mean())
        step = int(state["1.num_batches_tracked"] if isinstance(state, dict) else state[1].num_batches_tracked)
        self.seen.append((step, weight))
        return (weight / step - self.wanted) ** 2


def swept(folder, tmp_path, evaluate=None, **more):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sweep.. reads results", NitrousWarning)
        return sweep(
            folder,
            evaluate or Distance(),
            **{"sigma_rels": LENGTHS, "results": tmp_path / "r.jsonl", "refine": 0, **more},
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
    negative = lambda state: -near(state)  # noqa: E731
    table = swept(folder, tmp_path, negative, maximize=True, refine=3)
    assert table.best.sigma_rel == pytest.approx(0.12, rel=0.05)
    again = swept(folder, tmp_path, negative)  # the same results, seen the other way round
    assert again.best.value == min(row.value for row in again.rows) < max(row.value for row in again.rows)


def test_results_that_are_not_finite_are_noted_and_never_the_best(folder, tmp_path):
    values = iter([math.nan, 3.0, 2.0, -math.inf, 4.0])
    evaluate = lambda _: next(values)  # noqa: E731
    table = swept(folder, tmp_path, evaluate)
    assert table.best.value == 2.0
    assert "Results that are not finite are never the best: 0.05 at step 400, 0.14 at step 400." in table.notes
    assert swept(folder, tmp_path, evaluate).best.value == 2.0  # also when it comes from the file


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
    if len(seen) == 2 and not sys.argv[3:]:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(state)
    return float(len(seen))
table = sweep(sys.argv[1], evaluate, sigma_rels=[0.05, 0.07, 0.1, 0.14, 0.2], results=sys.argv[2], refine=0)
print([row.value for row in table])
"""


def test_killed_sweep_continues_and_leaves_nothing_but_results(folder, tmp_path):
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "r.jsonl")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(names(tmp_path)) == 2  # averages were waiting for their evaluation
    rest = subprocess.run([*command, "again"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert rest.returncode == 0, rest.stderr
    assert json.loads(rest.stdout) == [1.0, 2.0, 1.0, 2.0, 3.0]  # two from the file, and three evaluations
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
        second = swept(folder, tmp_path, evaluate, maximize=True)
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
        ({"restore": "last"}, ValueError, "restore is 'last'; expected 'original' or 'best'"),
        ({"restore": "best"}, ValueError, "there is no model to hold the best average"),
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
        match=r"^An average at step 400 does not fit the model; missing in the .*Pass as model= ",
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


# Results of another function


def scaled(factor):
    def evaluate(state):
        return factor * float(state["0.weight"].mean())

    return evaluate


def test_changed_function_is_evaluated_again(folder, tmp_path):
    first = swept(folder, tmp_path, scaled(1.0))
    second = swept(folder, tmp_path, scaled(2.0))
    assert [row.value for row in second] == [2 * row.value for row in first]
    (note,) = [note for note in second.notes if "evaluated again, because evaluate has changed" in note]
    assert note.startswith(f"5 of 5 results in {tmp_path / 'r.jsonl'}")
    assert note.endswith("evaluate: factor.")
    assert swept(folder, tmp_path, scaled(1.0)).rows == first.rows
    assert read_table(tmp_path / "r.jsonl").rows == second.rows  # the last lines, and none of the first function


def test_results_without_a_fingerprint_are_evaluated_again(folder, tmp_path):
    first = swept(folder, tmp_path, scaled(1.0))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    for line in lines:
        del line["evaluate"]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    evaluate = lambda state: seen.append(state) or 7.0  # noqa: E731
    assert [row.value for row in swept(folder, tmp_path, evaluate)] == [7.0] * len(first)


def test_reused_results_are_warned_about_once(folder, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for lengths in (LENGTHS[:2], LENGTHS):
            sweep(folder, scaled(1.0), sigma_rels=lengths, results=tmp_path / "r.jsonl", refine=0, at_once=1)
    (warning,) = caught
    assert warning.category is NitrousWarning
    assert "reads results from" in str(warning.message)
    assert warning.filename == __file__


# The model


def test_model_is_evaluated_in_eval_mode_without_gradients_and_given_back(folder, tmp_path):
    model, seen = net().train(), []
    model[2].eval()
    own = {name: each.clone() for name, each in model.state_dict().items()}
    pointers = [each.data_ptr() for each in model.state_dict().values()]

    def evaluate(given):
        seen.append(
            (given.training, given[1].training, torch.is_grad_enabled(), float(given[0].weight.detach().mean()))
        )
        given.train()
        return float(given[0].weight.detach().mean())

    swept(folder, tmp_path, evaluate, model=model)
    assert [each[:3] for each in seen] == [(False, False, False)] * len(LENGTHS)
    assert len({each[3] for each in seen}) == len(LENGTHS)
    assert all(torch.equal(each, own[name]) for name, each in model.state_dict().items())
    assert [each.data_ptr() for each in model.state_dict().values()] == pointers
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert torch.is_grad_enabled()


def test_model_is_given_back_if_the_evaluation_raises(folder, tmp_path):
    model = net().train()
    own = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(EvaluationError):
        swept(folder, tmp_path, Distance(breaks_at=2), model=model, restore="best")
    assert all(torch.equal(each, own[name]) for name, each in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_model_holds_the_best_average_on_request(folder, tmp_path, stored, known):
    more = {"averages": tmp_path / "kept"} if stored else {}
    model, weights, near = net().train(), {}, Distance(0.085)

    def evaluate(given):
        weights[near(given)] = given[0].weight.detach().clone()
        return next(reversed(weights))

    for _ in range(1 + known):
        table = swept(folder, tmp_path, evaluate, model=model, restore="best", refine=2, steps=[200, 400], **more)
        assert torch.equal(model[0].weight, weights[table.best.value])
        assert model.training
        torch.nn.init.zeros_(model[0].weight)


def test_spectral_norms_fit_each_average_and_come_back(tmp_path):
    """Oracle: the largest singular value of a layer with spectral norm is 1."""
    model = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(6, 6))
    with PostHocEMA(model, checkpoint_every_num_steps=10, checkpoint_folder=tmp_path / "s", update_every=1) as ema:
        for seed in range(40):
            torch.manual_seed(seed)
            with torch.no_grad():
                model.parametrizations.weight.original.normal_()
            ema.update()
    own = {name: each.clone() for name, each in model.state_dict().items()}
    norms = []

    def evaluate(given):
        norms.append(float(torch.linalg.matrix_norm(given.weight, 2)))
        return norms[-1]

    swept(tmp_path / "s", tmp_path, evaluate, model=model)
    assert norms == pytest.approx([1.0] * len(LENGTHS), abs=1e-3)
    assert all(torch.equal(each, own[name]) for name, each in model.state_dict().items())


def test_model_is_checked_although_all_results_are_known(folder, tmp_path):
    evaluate = Distance()
    swept(folder, tmp_path, evaluate)
    with pytest.raises(SnapshotMismatch, match="does not fit the model"):
        swept(folder, tmp_path, evaluate, model=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is 3"):
        swept(folder, tmp_path, evaluate, model=3)


# The EMA, live folders and steps


def training(root, steps, **more):
    ema = PostHocEMA(net(), checkpoint_every_num_steps=10, checkpoint_folder=root, update_every=1, **more)
    for _ in range(steps):
        ema.model[1].num_batches_tracked += 1
        ema.update()
    return ema


@pytest.mark.parametrize("kind", [PostHocEMA, AsyncPostHocEMA])
def test_ema_is_flushed_and_its_own_run_is_swept(tmp_path, kind):
    root, model = tmp_path / "s", net()
    more = {"read": "guarded"} if kind is AsyncPostHocEMA else {}
    with kind(model, checkpoint_every_num_steps=10, checkpoint_folder=root, update_every=1, **more) as ema:
        for _ in range(25):
            ema.fence()
            model[1].num_batches_tracked += 1
            ema.update()
        ema.flush()
        later = training(root, 0)
        later.restore()
        later.update()
        later.checkpoint()
        later.close()
        assert SnapshotStore(root).get().step == 21  # the newest run is another one
        table = swept(ema, tmp_path, model=model)
        assert table.steps == (20,)
        assert {row.run for row in table} == {ema.run}
        assert any("newest snapshot is of step 20, and the EMA is at step 25" in note for note in table.notes)
        ema.checkpoint()
        with pytest.warns(NitrousWarning, match="has written a snapshot of step 21 since this run"):
            ema.flush()
        again = swept(ema, tmp_path, model=model)
        assert again.steps == (25,)
        assert not any("the EMA is at step" in note for note in again.notes)
        ema.update()  # the model's weights were put back behind the fence: no violation


def test_ema_that_was_never_updated_sweeps_the_newest_run(tmp_path):
    training(tmp_path / "s", 40).close()
    with PostHocEMA(net(), checkpoint_folder=tmp_path / "s") as ema:
        assert swept(ema, tmp_path).steps == (40,)


def test_snapshot_that_is_still_being_written_is_noted(tmp_path):
    training(tmp_path / "s", 40).close()
    run = SnapshotStore(tmp_path / "s").runs()[0]
    assert not any("being written" in note for note in swept(tmp_path / "s", tmp_path).notes)
    (tmp_path / "s" / f"step-{50:012d}-{run}").mkdir()
    notes = swept(tmp_path / "s", tmp_path).notes
    assert any(
        "newest complete snapshot is of step 40; that of step 50 is still being written" in each for each in notes
    )
    assert not any("being written" in note for note in swept(tmp_path / "s", tmp_path, steps=[40]).notes)


def test_nearest_step_is_taken_and_noted(folder, tmp_path):
    table = swept(folder, tmp_path, steps=["nearest:188", "nearest:190", 400])
    assert table.steps == (180, 400)  # 180 and 200 are equally near to 190
    assert "Step 180 is taken for 'nearest:188'." in table.notes
    with pytest.raises(ValueError, match="step is 'nearest:'; expected"):
        swept(folder, tmp_path, steps=["nearest:"])


def test_something_else_than_snapshots_is_refused(tmp_path):
    with pytest.raises(TypeError, match="snapshots is 3; expected a snapshot folder"):
        swept(3, tmp_path)


# Progress and marks


def test_progress_counts_known_results_and_the_refinement(folder, tmp_path, monkeypatch):
    bars = []

    class Bar:
        disable = False

        def __init__(self, total, **options):
            self.total, self.count = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def set_postfix_str(self, text, refresh):
            self.text = text

        def update(self):
            self.count += 1

    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Bar))
    for _ in range(2):
        table = swept(folder, tmp_path, scaled(1.0), refine=2, steps=[200, 400])
    assert [(bar.total, bar.count) for bar in bars] == [(len(table), len(table))] * 2
    assert len(table) > 2 * len(LENGTHS)
    assert bars[0].text == f"best {table.best.value:.4g} at sigma_rel {table.best.sigma_rel:g}"


def test_sweep_works_without_tqdm(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert len(swept(folder, tmp_path)) == len(LENGTHS)


def test_inaccurate_row_is_marked(folder, tmp_path):
    table = swept(folder, tmp_path, scaled(-1.0), sigma_rels=[0.004, 0.1])
    assert table.rows[0].profile_error > 0.05 > table.rows[1].profile_error
    lines = str(table).splitlines()
    assert lines[1].endswith("<- best, profile error above 5%")
    assert not lines[2].endswith("5%")
    assert any("its value is that of another profile" in note for note in table.notes)
