"""One model on several ranks: each averages, the first one writes, and no rank waits for another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from nitrous_ema import NitrousError, PostHocEMA, SnapshotStore
from nitrous_ema.averaging.model import ranks
from tests.support import rank_cases
from tests.support.rank_cases import CLASSES, net, step
from tests.support.worlds import World, world

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
both = pytest.mark.parametrize("name", CLASSES)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Iterator[World]:
    with world(2, tmp_path_factory.mktemp("two")) as started:
        yield started


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Iterator[World]:
    with world(3, tmp_path_factory.mktemp("three")) as started:
        yield started


def only_run(folder) -> str:
    (run,) = SnapshotStore(folder).runs()
    return run


@both
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_every_rank_of_ddp_averages_and_the_first_one_writes(two, tmp_path, name, is_wrapped):
    first, second = two.run(rank_cases.train_ddp, name, tmp_path / "s", is_wrapped)
    assert first["run"] == second["run"] == only_run(tmp_path / "s")
    assert (first["snapshots"], second["snapshots"]) == (3, 0)
    store = SnapshotStore(tmp_path / "s")
    assert [each.step for each in store.snapshots()] == [2, 4, 6]
    assert store.is_closed(first["run"])
    assert store.verify() == []
    assert store.temporary() == []
    for mine, other in zip(first["averages"], second["averages"], strict=True):
        assert all(map(np.array_equal, mine, other))


def test_averages_of_ddp_are_those_of_one_process_with_the_same_weights(two, tmp_path):
    """DDP's gradients are the means of the ranks', so one process can take the same steps."""
    found, _ = two.run(rank_cases.train_ddp, "PostHocEMA", tmp_path / "s", True)
    models = [net(), net()]
    ema = PostHocEMA(
        models[0], checkpoint_folder=tmp_path / "alone", checkpoint_every_num_steps="manual", update_every=1
    )
    for number in range(1, 7):
        for rank, model in enumerate(models):
            inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * number + rank))
            (model(inputs) - inputs).square().mean().backward()
        with torch.no_grad():
            for pair in zip(*(model.parameters() for model in models), strict=True):
                mean = (pair[0].grad + pair[1].grad) / 2
                for parameter in pair:
                    parameter -= 0.1 * mean
                    parameter.grad = None
        ema.update()
    for mine, other in zip(found["averages"], rank_cases.averages(ema), strict=True):
        for ours, theirs in zip(mine, [value for value in other if value.ndim == 2], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@both
def test_first_rank_alone_writes_and_waits_for_nobody(three, tmp_path, name):
    assert three.run(rank_cases.first_rank_alone, name, tmp_path / "s") == [2, None, None]
    assert [each.step for each in SnapshotStore(tmp_path / "s").snapshots()] == [2, 4]


@both
def test_averages_that_no_rank_writes_are_an_error(two, tmp_path, name):
    _, (message, taken) = two.run(rank_cases.second_rank_alone, name, tmp_path / "s")
    assert "Rank 1 has averages" in message
    assert "rank 0, which is to write them, has constructed no EMA" in message
    assert "process_group='self'" in message
    assert taken == 4
    assert not (tmp_path / "s").exists()


@both
def test_folder_for_each_rank_is_an_error_unless_it_is_requested(two, tmp_path, name):
    first, second = two.run(rank_cases.folder_each, name, tmp_path / "a", None)
    assert first == ""  # its own folder, which it writes
    assert "has constructed no EMA for this folder" in second
    assert two.run(rank_cases.folder_each, name, tmp_path / "b", "self") == ["", ""]
    runs = [only_run(tmp_path / "b" / str(rank)) for rank in range(2)]
    assert runs[0] != runs[1]


@both
def test_different_weights_are_named_once(two, tmp_path, name):
    warned = two.run(rank_cases.different_weights, name, tmp_path / "s")
    assert sorted(map(len, warned)) == [0, 1]  # the rank that came second
    (message,) = warned[0] or warned[1]
    assert "train different weights: '0.weight' and " in message
    assert "process_group='self'" in message


@pytest.mark.parametrize(("mark", "value"), [("tensor_model_parallel", True), ("allreduce", False)])
def test_parameters_marked_as_shards_are_refused(two, tmp_path, mark, value):
    for message in two.run(rank_cases.marked_as_shards, tmp_path, mark, value, None):
        assert message.startswith("'2.weight' is one rank's part of a tensor")
    assert two.run(rank_cases.marked_as_shards, tmp_path, mark, value, "self") == ["", ""]
    assert two.run(rank_cases.marked_as_shards, tmp_path / "x", mark, not value, None) == ["", ""]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"update_every": [1, 2]}, "update_every differs"),
        ({"sigma_rels": [(0.05,), (0.06,)]}, "the model's tensors or profiles differs"),
        ({"checkpoint_every_num_steps": [2, 3]}, "checkpoint_every_num_steps differs"),
    ],
)
def test_ranks_with_other_arguments_are_refused(two, tmp_path, options, what):
    first, second = two.run(rank_cases.other_arguments, tmp_path / "s", options)
    assert first == ""
    assert "Rank 1 and rank 0 have constructed different EMAs" in second
    assert what in second


@both
@pytest.mark.parametrize("how", ["load", "restore"])
def test_ranks_that_load_a_state_agree_on_the_new_run(two, tmp_path, name, how):
    first, second = two.run(rank_cases.resume, name, tmp_path / "s", how)
    assert first == second
    assert len({run for run, _ in first}) == 3
    assert {run for run, _ in first} <= set(SnapshotStore(tmp_path / "s").runs())


def test_ranks_restore_the_snapshot_of_the_first(three, tmp_path):
    assert three.run(rank_cases.restore_at_different_times, tmp_path / "s") == [4, 4, 4]


@both
def test_first_rank_of_a_group_writes(three, tmp_path, name):
    outside, first, second = three.run(rank_cases.in_a_group, name, tmp_path / "s", [1, 2])
    assert outside in ("NitrousError", "TypeError")
    run = only_run(tmp_path / "s")
    assert (first, second) == (f"{run} 1", f"{run} 0")


def test_keys_of_an_earlier_start_are_not_read(two, tmp_path):
    first = two.run(rank_cases.start_again, tmp_path / "s", "0")
    second = two.run(rank_cases.start_again, tmp_path / "s", "1")
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_old_keys_in_a_store_are_an_error_of_the_writer(two, tmp_path):
    two.run(rank_cases.start_again, tmp_path / "s", "1")
    message, _ = two.run(rank_cases.start_again_with_old_keys, tmp_path / "s")
    assert "still has the keys of an earlier start" in message


@both
def test_no_call_is_a_collective(two, tmp_path, name):
    for of_the_ema, of_a_barrier in two.run(rank_cases.collectives, name, tmp_path / "s"):
        assert of_the_ema == 0
        assert of_a_barrier > 0


def test_group_that_is_initialized_after_construction_is_an_error(tmp_path, monkeypatch):
    model = net()
    ema = PostHocEMA(model, checkpoint_folder=tmp_path / "s", update_every=1)
    own = PostHocEMA(model, checkpoint_folder=tmp_path / "own", update_every=1, process_group="self")
    monkeypatch.setattr(ranks, "_world_size", lambda: 2)
    step(model, 1, 0)
    with pytest.raises(NitrousError, match=r"after init_process_group\(\)"):
        ema.update()
    assert ema.step == 0
    own.update()


@pytest.mark.parametrize("process_group", ["all", 3, [0, 1]])
def test_other_groups_are_refused(tmp_path, process_group):
    with pytest.raises(TypeError, match="expected a process group, 'self', or None"):
        PostHocEMA(net(), checkpoint_folder=tmp_path / "s", process_group=process_group)
    assert not (tmp_path / "s").exists()
