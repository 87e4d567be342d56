from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest

from nitrous_ema.synthesis.outputs.reuse import expected_outputs
from nitrous_ema.synthesis.outputs.shards import index_path
from nitrous_ema.synthesis.outputs.writer import write_outputs, write_shard
from nitrous_ema.synthesis.plan import plan_from_store
from tests.support.snapshot_folders import layout_of, record, write_run

RECORDS = [record("w", (100,)), record("v", (90,)), record("b", (7,), "BF16")]


@pytest.fixture
def plan(tmp_path):
    write_run(tmp_path / "snapshots", layout_of(RECORDS), range(100, 1100, 100))
    return make_plan(tmp_path)


def make_plan(tmp_path, **more):
    return plan_from_store(tmp_path / "snapshots", sigma_rels=[0.06, 0.09], **{"tolerance": 1e-2, **more})


def paths_in(folder):
    return [folder / "short.safetensors", folder / "long.safetensors"]


def reusable(plan, folder, **how):
    return [each.is_reusable for each in expected_outputs(plan, paths_in(folder), **how)]


def test_written_output_is_reusable_and_has_the_expected_size(plan, tmp_path):
    assert reusable(plan, tmp_path) == [False, False]
    expected = expected_outputs(plan, paths_in(tmp_path))
    write_outputs(plan.only([1]), paths_in(tmp_path)[1:])
    assert reusable(plan, tmp_path) == [False, True]
    assert expected[1].num_bytes == expected[1].path.stat().st_size


@pytest.mark.parametrize(
    "other", [{"tolerance": 0}, {"step": 900}, {"exclude": [300]}, {"sigma_rels": [0.06, 0.1]}, {"tolerance": 2e-2}]
)
def test_output_of_another_recipe_is_not_reusable(plan, tmp_path, other):
    write_outputs(plan, paths_in(tmp_path))
    changed = plan_from_store(tmp_path / "snapshots", **{"sigma_rels": [0.06, 0.09], "tolerance": 1e-2, **other})
    assert reusable(changed, tmp_path)[1] is False


@pytest.mark.parametrize(
    ("before", "how"),
    [({}, {"dtype": "F16"}), ({}, {"accumulate": "float32"}), ({"dtype": "BF16"}, {"dtype": "F16"})],
    ids=["smaller", "sums", "of the same size"],
)
def test_output_of_another_type_is_not_reusable(plan, tmp_path, before, how):
    write_outputs(plan, paths_in(tmp_path), **before)
    assert reusable(plan, tmp_path, **how) == [False, False]
    write_outputs(plan, paths_in(tmp_path), **how)
    assert reusable(plan, tmp_path, **how) == [True, True]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "folder", "pipe", "longer"])
def test_damaged_output_is_not_reusable(plan, tmp_path, damage):
    write_outputs(plan, paths_in(tmp_path))
    path = paths_in(tmp_path)[0]
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    else:
        made = {"cut": content[:-1], "empty": b"", "garbage": bytes(len(content)), "longer": content + b"x"}
        path.write_bytes(made[damage])
    assert reusable(plan, tmp_path) == [False, True]


def test_torch_file_is_never_reusable(plan, tmp_path):
    path = tmp_path / "average.pt"
    write_outputs(plan.only([0]), [path])
    (found,) = expected_outputs(plan.only([0]), [path])
    assert not found.is_reusable


def test_first_part_is_reusable_only_with_its_index(plan, tmp_path):
    for part in (0, 1):
        write_shard(plan, paths_in(tmp_path), part=part, parts=2)
        assert reusable(plan, tmp_path, part=part, parts=2, in_parts=True) == [True, True]
    index = index_path(paths_in(tmp_path)[0])
    index.write_text(json.dumps({"weight_map": {}}))
    assert reusable(plan, tmp_path, part=0, parts=2, in_parts=True) == [False, True]
    assert reusable(plan, tmp_path, part=1, parts=2, in_parts=True) == [True, True]


def test_numbers_that_another_machine_may_solve_differently_are_not_compared(plan, tmp_path):
    write_outputs(plan, paths_in(tmp_path))
    path = paths_in(tmp_path)[0]
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header, data = path.read_bytes()[8 : 8 + size], path.read_bytes()[8 + size :]
    changed = json.loads(header)
    changed["__metadata__"]["weight_l1"] = "1.0000000000000002"
    text = json.dumps(changed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert reusable(plan, tmp_path) == [True, True]


def test_part_of_a_plan_has_the_numbers_of_the_whole(plan):
    (first, second) = (plan.only([index]) for index in (0, 1))
    assert [each.sigma_rels for each in (first, second)] == [(0.06,), (0.09,)]
    assert second.report.profile_error.tolist() == [plan.report.profile_error[1]]
    assert second.weights.tolist() == plan.weights[:, 1:].tolist()
    assert all(a.columns is b.columns for a, b in pairwise((first, plan, second)))
