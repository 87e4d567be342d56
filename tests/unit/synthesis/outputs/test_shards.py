from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from nitrous_ema.averaging.load_average import load_average
from nitrous_ema.errors import SnapshotDamaged, SnapshotNotFound
from nitrous_ema.synthesis.outputs.layout import OutputLayout
from nitrous_ema.synthesis.outputs.shards import part_names
from nitrous_ema.synthesis.outputs.writer import write_outputs, write_shard
from nitrous_ema.synthesis.plan import plan_from_store
from nitrous_ema.synthesis.streaming import TILE_ELEMENTS
from tests.support.snapshot_folders import layout_of, record, write_run

LENGTHS = (0.06, 0.09)
STEPS = range(100, 1100, 100)
RECORDS = [
    record("a.weight", (TILE_ELEMENTS + 5,)),
    record("b.weight", (300, 100), "BF16", tied=["z.weight"]),
    record("c.phase", (50,), "C64"),
    record("count", (), "I64", "copied"),
    record("d.weight", (9, 1000), "F16"),
    record("e.bias", (17,)),
    record("frozen", (4,), role="skipped"),
    record("hidden", (40,), persistent=False),
]
COPIED = {"count": np.int64(7).tobytes()}


def plan_of(root, records=RECORDS, **more):
    write_run(root, layout_of(records, **more), STEPS, copied=lambda step: COPIED)
    return plan_from_store(root, sigma_rels=LENGTHS, tolerance=0)


def paths_in(folder):
    folder.mkdir(exist_ok=True)
    return [folder / f"average-{length}.safetensors" for length in LENGTHS]


def loaded(index):
    """As diffusers and transformers read it: the index, then each of its files by the safetensors package."""
    content = json.loads(index.read_text())
    state = {}
    for name in set(content["weight_map"].values()):
        with safetensors.safe_open(index.with_name(name), "pt") as file:
            assert file.metadata()["format"] == "pt"
            for key in file.keys():  # noqa: SIM118 - it is no dict
                assert content["weight_map"][key] == name
                state[key] = file.get_tensor(key)
    assert state.keys() == content["weight_map"].keys()
    assert content["metadata"]["total_size"] == sum(each.nbytes for each in state.values())
    return state


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [None, "F32"])
def test_parts_have_the_bits_of_one_file(tmp_path, parts, dtype):
    plan = plan_of(tmp_path / "in")
    whole, split = paths_in(tmp_path / "whole"), paths_in(tmp_path / "split")
    write_outputs(plan, whole, dtype=dtype)
    for part in reversed(range(parts)):
        write_shard(plan, split, part=part, parts=parts, dtype=dtype, threads=1 + part % 2)
    for one, several in zip(whole, split, strict=True):
        index = several.with_name(several.name + ".index.json")
        expected, found = safetensors.torch.load_file(one), loaded(index)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        assert {key: each.dtype for key, each in expected.items()} == {key: each.dtype for key, each in found.items()}
    assert len(list((tmp_path / "split").iterdir())) == len(LENGTHS) * (parts + 1)


def test_files_have_the_names_that_others_expect(tmp_path):
    plan, paths, reported = plan_of(tmp_path / "in"), paths_in(tmp_path / "out"), []
    write_shard(plan, paths, part=1, parts=2, committed=lambda index, path: reported.append((index, path.name)))
    assert reported == [(0, "average-0.06-00002-of-00002.safetensors"), (1, "average-0.09-00002-of-00002.safetensors")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [name for _, name in reported]
    write_shard(plan, paths, part=0, parts=2)
    assert (tmp_path / "out" / "average-0.06.safetensors.index.json").exists()


def test_parts_are_about_equally_long_and_hold_each_tensor_once(tmp_path):
    records = [record(f"layer{i:03}", (i % 7 * 50 + 10,)) for i in range(200)]
    plan = plan_of(tmp_path, records)
    for parts in (1, 2, 5, 16):
        names = part_names(plan, None, parts)
        assert sorted(name for part in names for name in part) == sorted(each.name for each in records)
        sizes = [sum(e.end - e.begin for e in OutputLayout(plan, None, names=part).entries) for part in names]
        assert max(sizes) - min(sizes) <= 2 * 4 * 310
        ranges = [OutputLayout(plan, None, names=part).elements for part in names]
        assert all(left[1] == right[0] for left, right in pairwise(ranges))


def test_process_reads_hardly_more_than_its_part(tmp_path):
    records = [record(f"layer{i}", (TILE_ELEMENTS,)) for i in range(12)]
    plan, read = plan_of(tmp_path / "in", records, chunk_bytes=1 << 16), []
    for part in range(4):
        progress = []
        write_shard(
            plan,
            paths_in(tmp_path / "out"),
            part=part,
            parts=4,
            progress=lambda done, total, seen=progress: seen.append(done),
        )
        read.append(progress[-1])
    assert read == [plan.bytes_to_read // 4] * 4


def test_model_takes_all_parts(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))
    records = [record(name, each.shape) for name, each in model.state_dict().items()]
    plan, paths = plan_of(tmp_path / "in", records), paths_in(tmp_path / "out")
    for part in range(3):
        write_shard(plan, paths, part=part, parts=3)
    write_outputs(plan, paths)
    reported = load_average(model, paths[0].with_name(paths[0].name + ".index.json"))
    assert reported["sigma_rel"] == "0.06"
    expected = safetensors.torch.load_file(paths[0])
    assert all(torch.equal(each, expected[name]) for name, each in model.state_dict().items())


def test_missing_part_is_named(tmp_path):
    plan, paths = plan_of(tmp_path / "in"), paths_in(tmp_path / "out")
    for part in (0, 2):
        write_shard(plan, paths, part=part, parts=3)
    index = paths[0].with_name(paths[0].name + ".index.json")
    with pytest.raises(SnapshotNotFound, match=r"00002-of-00003.safetensors: this part of .* is missing") as e:
        load_average(nn.Linear(2, 2), index)
    assert e.value.path.name == "average-0.06-00002-of-00003.safetensors"


def test_parts_of_different_averages_are_refused(tmp_path):
    plan, paths = plan_of(tmp_path / "in"), paths_in(tmp_path / "out")
    write_shard(plan, paths, part=0, parts=2)
    other = plan_from_store(tmp_path / "in", sigma_rels=(0.07, 0.08), tolerance=0)
    write_shard(other, paths, part=1, parts=2)
    with pytest.raises(SnapshotDamaged, match="parts of different averages"):
        load_average(nn.Linear(2, 2), paths[0].with_name(paths[0].name + ".index.json"))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": "../a"}}', b'{"weight_map": {"a": 1}}']
)
def test_file_that_is_not_an_index_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(SnapshotDamaged, match="not a synthesized average, or damaged: "):
        load_average(nn.Linear(2, 2), path)


@pytest.mark.parametrize(("part", "parts"), [(2, 2), (-1, 2), (0, 0), (0, 100_000)])
def test_part_that_does_not_exist_is_refused(tmp_path, part, parts):
    with pytest.raises(ValueError, match=f"part {part} of {parts}"):
        write_shard(plan_of(tmp_path / "in"), paths_in(tmp_path / "out"), part=part, parts=parts)
    assert not list((tmp_path / "out").iterdir())


def test_only_safetensors_are_written_in_parts(tmp_path):
    paths = [path.with_suffix(".pt") for path in paths_in(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"only .safetensors files can be written in parts"):
        write_shard(plan_of(tmp_path / "in"), paths, part=0, parts=1)
