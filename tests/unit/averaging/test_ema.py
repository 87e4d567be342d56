"""``PostHocEMA`` and ``KarrasEMA`` through their public methods."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nitrous_ema import AsyncPostHocEMA, KarrasEMA, NitrousError, NitrousWarning, PostHocEMA
from nitrous_ema.errors import ClosedError, SnapshotError, SnapshotNotFound, SnapshotWriteError, UntrackableModelError
from nitrous_ema.posthoc import synthesis_report
from nitrous_ema.profile import gamma_to_sigma_rel, sigma_rel_to_gamma
from tests.support.fakes import FaultyFiles, use_files
from tests.support.laggy.runner import assert_right_on_laggy
from tests.support.memory_orders import Orders
from tests.support.models import Net, Tied, Vector, safetensors_of, set_weights
from tests.support.peers import REPOSITORY

IMAGES = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(tmp_path) -> Iterator[Callable[..., PostHocEMA]]:
    """Makes EMAs in a folder of their own, and closes them."""
    made = []

    def build(model: nn.Module, **kwargs) -> PostHocEMA:
        defaults = {"update_every": 1, "checkpoint_every_num_steps": "manual", "checkpoint_folder": tmp_path / "ema"}
        made.append(PostHocEMA(model, **{**defaults, **kwargs}))
        return made[-1]

    yield build
    for ema in made:
        ema.close()


def train(ema: nn.Module, model: nn.Module, seeds: range, **kwargs) -> None:
    for seed in seeds:
        set_weights(model, seed)
        ema.update(**kwargs)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def assert_same(one: dict, other: dict) -> None:
    assert set(one) == set(other)
    for key in one:
        assert torch.equal(one[key], other[key]), key


# ---- the drop-in

SCRIPT = """
import torch
import torch.nn as nn
import torch.optim as optim
from nitrous_ema import PostHocEMA

data = torch.randn(512, 128)
target = torch.randn(512, 1)
net = nn.Linear(128, 1)
optimizer = optim.SGD(net.parameters(), lr=0.01)
ema = PostHocEMA(net, sigma_rels=[0.05, 0.1], checkpoint_every_num_steps=100, update_every=10, step_size_correction=True)

for _ in range(1000):
    optimizer.zero_grad()
    sample_idx = torch.randint(0, 512, (32,))
    loss = (net(data[sample_idx]) - target[sample_idx]).pow(2).mean()
    loss.backward()
    optimizer.step()
    ema.update()

with torch.no_grad():
    print("Loss: ", (net(data) - target).pow(2).mean().item())
    ema_model = ema.synthesize_ema_model(sigma_rel=0.08, device="cpu")
    print("EMA Loss: ", (ema_model(data) - target).pow(2).mean().item())
"""  # noqa: E501 - as it was published


def test_script_written_for_nitrous_001_runs_as_it_stands(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "")
    losses = re.fullmatch(r"Loss:  (\S+)\nEMA Loss:  (\S+)\n", run.stdout)
    assert losses, run.stdout
    assert all(0 < float(loss) < 3 for loss in losses.groups())
    assert len(list((tmp_path / "ema-checkpoints").glob("step-*"))) == 10


# ---- the profile, with one-hot weights: the parameter at step s is the s-th unit vector, so the average is the profile


def one_hot(model: Vector, step: int) -> None:
    with torch.no_grad():
        model.weight.zero_()
        model.weight[step] = 1.0


def t_deltas(kind: str, steps: int) -> np.ndarray:
    if kind == "steps":
        return np.ones(steps, dtype=np.int64)
    return np.random.default_rng(0).integers(1, 500, steps)  # images of batches that vary


def exact_profile(gamma: float, t_delta: np.ndarray, update_every: int) -> np.ndarray:
    """The share of each step's weights: the profile's integral from the applied update before it to its own."""
    applied = np.arange(0, len(t_delta), update_every)
    if applied[-1] != len(t_delta) - 1:
        applied = np.append(applied, len(t_delta) - 1)  # brought up to now by a checkpoint
    times = np.cumsum(t_delta)[applied].astype(np.longdouble)
    shares = np.zeros(len(t_delta))
    shares[applied] = np.diff(np.append(0, times / times[-1]) ** (gamma + 1))
    return shares


@pytest.mark.parametrize("update_every", [1, 3, 7, 50])
@pytest.mark.parametrize("kind", ["steps", "images"])
@pytest.mark.parametrize("steps", [1, 2, 100, 600])
def test_average_is_the_exact_discrete_profile(steps, kind, update_every, make):
    sigma_rels, model = (0.03, 0.1, 0.25), Vector(steps)
    ema = make(model, sigma_rels=sigma_rels, update_every=update_every)
    for step, t_delta in enumerate(t_deltas(kind, steps)):
        one_hot(model, step)
        ema.update(t_delta)
    ema.checkpoint()
    for view, sigma_rel in zip(ema.ema_models, sigma_rels, strict=True):
        expected = exact_profile(sigma_rel_to_gamma(sigma_rel), t_deltas(kind, steps), update_every)
        np.testing.assert_allclose(view.ema_model.weight.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.25])
def test_average_has_the_requested_length(sigma_rel, make):
    steps, model = 1000, Vector(1000)
    ema = make(model, sigma_rels=[sigma_rel])
    for step in range(steps):
        one_hot(model, step)
        ema.update()
    shares = ema.ema_models[0].ema_model.weight.double().numpy()
    times = np.arange(1, steps + 1) / steps
    width = math.sqrt(shares @ times**2 - (shares @ times) ** 2)
    assert width == pytest.approx(sigma_rel, rel=1e-2)
    assert ema.sigma_rels == (sigma_rel,)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.05, 0.07, 0.12, 0.2])
@pytest.mark.parametrize("update_every", [1, 5])
@pytest.mark.parametrize("kind", ["steps", "images"])
def test_synthesized_average_has_the_requested_profile_within_the_predicted_error(sigma_rel, update_every, kind, make):
    steps, model, every = 1000, Vector(1000), 50
    ema = make(model, update_every=update_every, checkpoint_every_num_steps=every)
    for step, t_delta in enumerate(t_deltas(kind, steps)):
        one_hot(model, step)
        ema.update(t_delta)
    shares = ema.synthesize_ema_model(sigma_rel=sigma_rel).ema_model.weight.double().numpy()
    # Per unit of time, as the report measures: integral of the squared difference over that of the square.
    gamma, deltas = sigma_rel_to_gamma(sigma_rel), t_deltas(kind, steps)
    expected = exact_profile(gamma, deltas, 1)
    if update_every > 1:  # both as means over the same intervals
        expected, shares = (np.add.reduceat(x, np.arange(0, steps, every)) for x in (expected, shares))
        deltas = np.add.reduceat(deltas, np.arange(0, steps, every))
    error = math.sqrt(((shares - expected) ** 2 / deltas).sum() / (expected**2 / deltas).sum())
    times = np.cumsum(t_deltas(kind, steps))[every - 1 :: every]
    report = synthesis_report(
        np.repeat(times, 2), np.tile(sigma_rel_to_gamma([0.05, 0.1]), len(times)), [times[-1]], [gamma]
    )
    assert error <= 1.05 * report.profile_error[0] + 1e-3
    assert shares.sum() == pytest.approx(1.0, abs=1e-5)


# ---- synthesis


@pytest.mark.filterwarnings("ignore:.*cannot be reconstructed accurately")  # from a handful of snapshots
@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.1), (0.05, 0.1, 0.2)])  # files with and without padding
def test_weights_of_a_synthesis_sum_to_one(sigma_rels, make):
    """Weights that never change are their own average; 0.0.1 scales them."""
    model = Net()
    set_weights(model, 5)
    ema = make(model, sigma_rels=sigma_rels, checkpoint_every_num_steps=7)
    for _ in range(50):
        ema.update()
    for sigma_rel in (0.02, 0.08, 0.25):
        synthesized = ema.synthesize_ema_model(sigma_rel=sigma_rel).ema_model
        for name, value in model.state_dict().items():
            torch.testing.assert_close(synthesized.state_dict()[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [Net, Tied, Orders, lambda: Net().bfloat16(), lambda: Net().double()])
def test_tracked_length_is_synthesized_from_its_own_snapshot(build, make):
    model = build()
    ema = make(model, checkpoint_every_num_steps=10, checkpoint_dtype=torch.float64)
    train(ema, model, range(30))
    synthesized = ema.synthesize_ema_model(gamma=ema.gammas[0])
    assert_same(tensors(synthesized), tensors(ema.ema_models[0]))
    assert synthesized.step == 30


def test_synthesized_average_is_as_of_its_target_step(make):
    model = Net()
    ema = make(model, checkpoint_every_num_steps=10)
    train(ema, model, range(30))
    before = tensors(ema.synthesize_ema_model(sigma_rel=0.07))
    train(ema, model, range(30, 60))
    assert_same(tensors(ema.synthesize_ema_model(sigma_rel=0.07, step=30)), before)
    assert before["ema_model.norm.num_batches_tracked"].item() == 29
    key = "ema_model.conv.weight"
    assert not torch.equal(tensors(ema.synthesize_ema_model(sigma_rel=0.07))[key], before[key])


def test_target_step_without_a_snapshot_is_refused_with_the_nearest_steps(make):
    model = Net()
    ema = make(model, checkpoint_every_num_steps=10)
    train(ema, model, range(40))
    with pytest.raises(SnapshotNotFound, match="nearest steps there: 20 and 30") as error:
        ema.synthesize_ema_model(sigma_rel=0.07, step=27)
    assert list(error.value.nearest) == [20, 30]


def test_synthesis_without_any_snapshot_is_refused(make):
    ema = make(Net())
    ema.update()
    with pytest.raises(SnapshotError, match="snapshot"):
        ema.synthesize_ema_model(sigma_rel=0.07)


@pytest.mark.parametrize("given", [{}, {"sigma_rel": 0.07, "gamma": 7.0}, {"sigma_rel": 0.3}, {"gamma": -1.0}])
def test_synthesis_needs_one_length_in_its_domain(given, make):
    with pytest.raises(ValueError, match=r"sigma_rel|gamma"):
        make(Net()).synthesize_ema_model(**given)


def test_synthesis_does_not_touch_the_training(make):
    model = Net()
    ema = make(model, checkpoint_every_num_steps=10)
    train(ema, model, range(20))
    before, online = tensors(ema), tensors(model)
    synthesized = ema.synthesize_ema_model(sigma_rel=0.07)
    set_weights(model, 99)
    synthesized.update()
    assert_same(tensors(ema), before)
    model.load_state_dict(online)
    assert ema.step == 20


@pytest.mark.filterwarnings("ignore:.*cannot be reconstructed accurately")  # from a handful of snapshots
def test_resumed_run_is_synthesized_with_its_ancestors_and_without_their_abandoned_future(make):
    """Oracle: one uninterrupted run."""
    model = Vector(60)
    whole = make(model, checkpoint_every_num_steps=10)
    train(whole, model, range(60))
    first = make(model, checkpoint_every_num_steps=10)
    with pytest.warns(NitrousWarning, match="begins anew"):
        train(first, model, range(30))
    state = copy.deepcopy(dict(first.state_dict()))
    train(first, model, range(100, 130))  # a future that is left
    second = make(model, checkpoint_every_num_steps=10)
    second.load_state_dict(state)
    train(second, model, range(30, 60))
    assert_same(tensors(second.synthesize_ema_model(sigma_rel=0.2)), tensors(whole.synthesize_ema_model(sigma_rel=0.2)))


def test_buffer_that_became_infinite_is_synthesized_as_it_was_tracked(make):
    model = Vector(3)
    model.register_buffer("scale", torch.ones(2))
    ema = make(model)
    ema.update()
    model.scale.fill_(math.inf)
    ema.update()
    ema.checkpoint()
    synthesized = ema.synthesize_ema_model(gamma=ema.gammas[0])
    assert not synthesized.ema_model.scale.isfinite().any()
    assert torch.equal(synthesized.ema_model.weight, ema.ema_models[0].ema_model.weight)


# ---- snapshots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_snapshot_is_read_by_safetensors_on_any_machine(dtype, make, tmp_path):
    model = Orders()
    ema = make(model, checkpoint_dtype=dtype)
    train(ema, model, range(5))
    ema.checkpoint()
    found = safetensors_of(tmp_path / "ema", 5)
    for profile, view in enumerate(ema.ema_models):
        for key, value in tensors(view).items():
            name = key.removeprefix("ema_model.")
            if name in ("count", "flags", "byte"):
                assert torch.equal(found[f"model.{name}"], value)
                continue
            stored = torch.view_as_real(value) if value.is_complex() else value
            assert torch.equal(found[f"ema{profile}.{name}"], stored.to(dtype)), name
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert len([name for name in found if name != "padding"]) == 2 * 11 + 3


def test_snapshots_are_taken_at_multiples_of_their_interval(make):
    model = Net()
    ema = make(model, checkpoint_every_num_steps=4.0, update_every=3)
    train(ema, model, range(10))
    assert [(snapshot.step, snapshot.t) for snapshot in ema.snapshots.snapshots()] == [(4, 4), (8, 8)]


@pytest.mark.parametrize("every", [1e10, "manual"])
def test_no_snapshot_is_taken_by_itself_with_manual(every, make):
    model = Net()
    ema = make(model, checkpoint_every_num_steps=every)
    train(ema, model, range(5))
    assert ema.snapshots.snapshots() == []
    assert ema.checkpoint() is True
    assert [snapshot.step for snapshot in ema.snapshots.snapshots()] == [5]


def test_snapshot_of_the_same_step_is_not_written_again(make, tmp_path):
    ema = make(Net())
    ema.update()
    ema.checkpoint()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ema").rglob("*")}
    assert ema.checkpoint() is True
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ema").rglob("*")} == before


def test_snapshot_before_the_first_update_is_refused(make):
    with pytest.raises(NitrousError, match=r"before the first update\(\)"):
        make(Net()).checkpoint()


def test_failed_snapshot_is_raised_and_the_averages_go_on(make, tmp_path):
    model = Net()
    ema = make(model)
    train(ema, model, range(3))
    before = tensors(ema)
    name = f"step-{3:012d}-{ema.run}"
    (tmp_path / "ema" / name).touch()  # a file where the snapshot's folder must be
    with pytest.raises(SnapshotWriteError) as error:
        ema.checkpoint()
    assert error.value.step == 3
    assert_same(tensors(ema), before)
    (tmp_path / "ema" / name).unlink()
    ema.checkpoint()
    stats = ema.stats()
    assert (stats.updates, stats.snapshots, stats.failed, stats.pending) == (3, 1, 1, 0)
    assert stats.last_error == str(error.value)


def test_failed_snapshot_leaves_the_callers_modes(make, monkeypatch):
    """The data is produced by a generator: left in the middle, it must not keep gradients off."""
    files = FaultyFiles()
    use_files(monkeypatch, files)
    ema = make(Net())
    ema.update()
    files.broken = True
    with pytest.raises(SnapshotWriteError) as error:
        ema.checkpoint()
    assert torch.is_grad_enabled()
    with torch.no_grad(), torch.inference_mode():
        del error
        gc.collect()
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()


def test_stats_count_updates_snapshots_and_bytes(make, tmp_path):
    model = Net()
    ema = make(model, update_every=2, checkpoint_every_num_steps=3)
    train(ema, model, range(7))  # applied at calls 1, 3, 5, 7, and for the snapshot at 6
    stats = ema.stats()
    files = list((tmp_path / "ema").rglob("rank-*"))
    assert (stats.updates, stats.snapshots, stats.pending) == (5, 2, 0)
    assert stats.bytes_written == sum(file.stat().st_size for file in files)
    assert stats.write_bandwidth == pytest.approx(stats.bytes_written / stats.seconds_writing)
    assert KarrasEMA(model, sigma_rel=0.1).stats().updates == 0


# ---- what the averages are made of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_narrow_parameters_have_the_precision_of_float32(dtype):
    model = Vector(64, dtype)
    ema = KarrasEMA(model, sigma_rel=0.05, update_every=1)
    exact, gamma = torch.zeros(64, dtype=torch.float64), ema.gamma
    for step in range(1, 301):
        set_weights(model, step)
        ema.update()
        exact += (
            (model.weight.detach().double() - exact) * -math.expm1((gamma + 1) * math.log1p(-1 / step))
            if (step > 1)
            else model.weight.detach().double()
        )
    average = ema.state_dict()["ema_model.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_averages_of_wide_and_complex_parameters_keep_their_type(dtype):
    model = Vector(8, dtype)
    ema = KarrasEMA(model, gamma=1.0, update_every=1)
    for value in (1.0, 3.0):
        with torch.no_grad():
            model.weight.fill_(value + (1j * value if dtype.is_complex else 1e-12))
        ema.update()
    expected = 2.5 + (2.5j if dtype.is_complex else 1e-12)  # the second update counts 1 - (1 - 1/2)^2
    assert ema.ema_model.weight.dtype == dtype
    assert ema.ema_model.weight[0].item() == pytest.approx(expected, rel=1e-15 if dtype == torch.float64 else 1e-6)


def test_batch_norm_statistics_are_averaged_and_its_count_is_that_of_the_update():
    model = Net().train()
    ema = KarrasEMA(model, gamma=1.0, update_every=2)
    means = []
    for _ in range(4):
        model(IMAGES)
        means.append(model.norm.running_mean.clone())
        ema.update()
    share = 1 - (1 / 3) ** 2
    torch.testing.assert_close(ema.ema_model.norm.running_mean, means[0] + share * (means[2] - means[0]))
    assert ema.ema_model.norm.num_batches_tracked.item() == 3


def test_tied_weights_have_one_average():
    model = Tied()
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    train(ema, model, range(5))
    assert ema.ema_model.embed.weight is ema.ema_model.out.weight
    state = ema.state_dict()
    assert state["ema_model.embed.weight"] is state["ema_model.out.weight"]


@pytest.mark.parametrize("argument", ["param_or_buffer_names_no_ema", "ignore_names"])
def test_filtered_names_are_copied_or_left_out(argument, make, tmp_path):
    model = Net()
    ema = make(model, **{argument: ["head.bias"]})
    train(ema, model, range(3))
    ema.checkpoint()
    kept, found = model.head.bias.detach().clone(), safetensors_of(tmp_path / "ema", 3)
    set_weights(model, 9)
    shown = ema.ema_models[0].ema_model.head.bias
    if argument == "ignore_names":
        assert shown is model.head.bias
        assert not [name for name in found if name.endswith("head.bias")]
    else:
        assert torch.equal(shown, kept)
        assert torch.equal(found["model.head.bias"], kept)


def test_frozen_counts_steps_and_keeps_the_first_weights():
    model = Net()
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, frozen=True)
    train(ema, model, range(1))
    before = tensors(ema)
    train(ema, model, range(1, 5))
    assert_same(tensors(ema), before)
    assert ema.step == 5


@pytest.mark.parametrize("seed", [1, 2])
def test_averages_are_the_weights_until_the_first_update(seed, make):
    model = Net()
    set_weights(model, seed)
    ema = make(model)
    assert torch.equal(ema.ema_models[1].ema_model.conv.weight, model.conv.weight)
    assert (ema.initted, ema.step, ema.t) == (False, 0, 0)


def test_copying_the_model_sets_the_averages_and_keeps_the_counters(make):
    model = Net()
    ema = make(model)
    train(ema, model, range(5))
    set_weights(model, 9)
    ema.copy_params_from_model_to_ema()
    assert torch.equal(ema.ema_models[0].ema_model.head.weight, model.head.weight)
    assert (ema.step, ema.t) == (5, 5)


@pytest.mark.parametrize("build", [Net, Orders, lambda: Net().bfloat16()])
def test_copying_the_averages_sets_the_weights_in_place(build, make):
    model = build()
    ema = make(model)
    train(ema, model, range(5))
    place = next(model.parameters()).data_ptr()
    ema.copy_params_from_ema_to_model()
    assert next(model.parameters()).data_ptr() == place
    shown = ema.ema_models[1].ema_model.state_dict()
    for name, value in model.named_parameters():
        assert torch.equal(value, shown[name]), name


# ---- the clock


@pytest.mark.parametrize("checkpoints", [(), (5,), (5, 17, 23)])
def test_checkpoints_between_updates_do_not_shift_the_schedule(checkpoints, make):
    model, applied = Vector(40), []
    ema = make(model, update_every=10)
    for step in range(1, 36):
        one_hot(model, step)
        before = ema.t
        ema.update()
        if ema.t != before:
            applied.append(step)
        if step in checkpoints:
            ema.checkpoint()
            assert ema.t == step
    assert applied == [1, 11, 21, 31]


def test_time_and_steps_are_counted_apart(make):
    model = Net()
    ema = make(model, update_every=2, checkpoint_every_num_steps=4)
    for t_delta in (10, 20.5, 30, 1, 5):
        ema.update(t_delta=t_delta)
    assert (ema.step, ema.t) == (5, 66.5)
    (snapshot,) = ema.snapshots.snapshots()
    assert (snapshot.step, snapshot.t, snapshot.stamp.t_first) == (4, 61.5, 10)


@pytest.mark.parametrize("t_delta", [0, -1, math.nan, math.inf, 10**400])
def test_time_that_stands_still_is_refused_and_nothing_changes(t_delta, make):
    model = Net()
    ema = make(model)
    train(ema, model, range(3))
    before = tensors(ema)
    set_weights(model, 9)
    with pytest.raises(ValueError, match=r"t_delta is .*: training time must move forward"):
        ema.update(t_delta)
    assert_same(tensors(ema), before)
    assert (ema.step, ema.t) == (3, 3)


@pytest.mark.parametrize("t_delta", [torch.tensor(2048), torch.ones(1), np.ones(2)])
def test_time_in_a_tensor_is_refused_with_the_remedy(t_delta, make):
    """A number on the device would make each update() wait for it."""
    ema = make(Net())
    with pytest.raises(TypeError, match=r"t_delta is (tensor|array)\(.*; expected a number\. Pass t_delta\.item\(\)"):
        ema.update(t_delta)
    ema.update(np.int64(3))
    assert (ema.step, ema.t) == (1, 3)


def test_uncorrected_profile_is_warned_of_at_construction(make):
    with pytest.warns(NitrousWarning, match="does not give the requested profiles"):
        make(Net(), update_every=10, step_size_correction=False)


def late_average(update_every: int, dtype: torch.dtype, steps: int = 4000, begin: int = 10**6) -> torch.Tensor:
    """The average of a weight that was 1.0 for a long time and is 1.001 since."""
    model = Vector(1, dtype)
    ema = KarrasEMA(model, gamma=6.94, update_every=update_every)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update()
    state = ema.state_dict()
    state["_extra_state"].update(step=begin, now=begin, t=begin, updates=begin)
    ema.load_state_dict(state)
    for _ in range(steps + 1):
        with torch.no_grad():
            model.weight.fill_(1.001)
        ema.update()
    return ema.state_dict()["ema_model.weight"].double()


def test_late_updates_are_lost_in_float32_unless_they_are_sparse():
    """The claim of the warning, against float64: changes below 2^-24 / weight of a weight (here 8e-3) do not arrive."""
    exact = late_average(1, torch.float64)
    with pytest.warns(
        NitrousWarning, match=r"contributes only 7.9e-06 to .*, relative weight changes smaller than 7.5e-03 are lost"
    ):
        dense = late_average(1, torch.float32)
    sparse = late_average(1000, torch.float32)
    moved = (exact - 1).item()
    assert abs((dense - exact).item()) > 0.9 * moved  # it stood still
    assert abs((sparse - exact).item()) < 0.05 * moved
    assert abs((late_average(1000, torch.float64) - exact).item()) < 1e-9 * moved  # and the profile is kept


def test_float64_averages_are_not_warned_of_small_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late_average(1, torch.float64, steps=10)


# ---- the caller's modes


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "deterministic": lambda: deterministic(),
}


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller_change_nothing(mode, make, tmp_path):
    results = []
    for number, context in enumerate((nullcontext, MODES[mode])):
        model = Orders()
        with context():
            ema = make(model, checkpoint_every_num_steps=10, checkpoint_folder=tmp_path / str(number))
        for seed in range(20):
            set_weights(model, seed)
            with context():
                ema.update()
        with context():
            synthesized = ema.synthesize_ema_model(sigma_rel=0.07)
            shown = [view.ema_model for view in (*ema.ema_models, synthesized)]
            with ema.average_parameters(1):
                pass
            ema.load_state_dict(ema.state_dict())
        states = [*(module.state_dict() for module in shown), ema.state_dict(), model.state_dict()]
        flat = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        assert not any(value.is_inference() or value.requires_grad for value in flat)
        results.append([value.clone() for value in flat])
        train(ema, model, range(20, 22))  # outside the mode again
        results[-1] += [value.clone() for value in tensors(ema).values()]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# ---- as a module


def test_averages_and_online_model_stay_out_of_parameters_buffers_and_modules(make):
    model = Net()
    ema = make(model)
    train(ema, model, range(2))
    views = [ema, *ema.ema_models, KarrasEMA(model, sigma_rel=0.1)]
    _ = [view.ema_model for view in views[1:]]
    for view in views:
        assert [*view.parameters(), *view.buffers(), *view.named_parameters(), *view.named_buffers()] == []
        assert [*view.modules()] == [view]
        assert [*view.children()] == []


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_casting_a_parent_leaves_the_averages(cast, make):
    model, parent = Net(), nn.Module()
    parent.ema = make(model)
    parent.layer = nn.Linear(2, 2)
    train(parent.ema, model, range(3))
    before = tensors(parent.ema)
    cast(parent)
    assert parent.layer.weight.dtype != torch.float32
    assert_same(tensors(parent.ema), before)
    train(parent.ema, model, range(3, 5))


def test_online_model_that_is_cast_is_refused_by_name_and_nothing_counts(make):
    model = Net()
    ema = make(model)
    train(ema, model, range(2))
    model.half()
    with pytest.raises(UntrackableModelError, match=r"'conv.weight' is torch.float16 .* now but was torch.float32"):
        ema.update()
    assert ema.step == 2


def test_moving_to_where_it_is_changes_nothing(make):
    ema = make(Net())
    place = ema.state_dict()["ema_models.0.ema_model.head.weight"].data_ptr()
    assert ema.to("cpu") is ema
    assert ema.state_dict()["ema_models.0.ema_model.head.weight"].data_ptr() == place


def test_moving_to_meta_is_refused(make):
    ema = make(Net())
    with pytest.raises(NitrousError, match="meta"):
        ema.to("meta")
    ema.update()


def test_train_and_eval_of_a_parent_pass(make):
    parent = nn.Module()
    parent.ema = make(Net())
    parent.train()
    parent.eval()
    assert not parent.ema.ema_models[0].ema_model.training


@pytest.mark.parametrize("kind", [PostHocEMA, KarrasEMA])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_ema_is_not_copied_or_pickled(kind, again, make):
    ema = make(Net()) if kind is PostHocEMA else KarrasEMA(Net(), sigma_rel=0.1)
    with pytest.raises(TypeError, match="state_dict"):
        again(ema)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_online_model_can_still_be_copied_and_pickled(again, make):
    model = Net()
    ema = make(model)
    train(ema, model, range(2))
    assert_same(tensors(again(model)), tensors(model))


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_model_under_ddp_has_the_names_and_averages_of_the_model(make, tmp_path):
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    ema, plain = make(wrapped), make(model, checkpoint_folder=tmp_path / "plain")
    for seed in range(3):
        wrapped(IMAGES).sum().backward()
        set_weights(model, seed)
        ema.update()
        plain.update()
    assert_same(tensors(ema), tensors(plain))
    assert type(ema.ema_models[0].ema_model) is Net


@pytest.mark.usefixtures("one_process")
def test_ddp_of_a_module_that_owns_an_ema_sees_nothing_of_it(make):
    parent = nn.Module()
    parent.net = Net()
    parent.ema = make(parent.net)
    parent.forward = parent.net.forward
    before = tensors(parent.ema)
    wrapped = nn.parallel.DistributedDataParallel(parent)
    wrapped(IMAGES).sum().backward()
    assert_same(tensors(parent.ema), before)
    assert not [name for name, _ in wrapped.named_parameters() if "ema" in name]


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrapped_model_has_the_snapshots_of_the_model(wrap, make, tmp_path):
    model = Net()
    ema, plain = make(wrap(model)), make(model, checkpoint_folder=tmp_path / "plain")
    for each in (ema, plain):
        train(each, model, range(3))
        each.checkpoint()
    assert_same(safetensors_of(tmp_path / "ema", 3), safetensors_of(tmp_path / "plain", 3))
    assert_same(tensors(ema), tensors(plain))


# ---- ending


def test_closed_ema_refuses_updates_and_closes_again_in_peace(make, tmp_path):
    model = Net()
    with make(model) as ema:
        train(ema, model, range(2))
        ema.checkpoint()
    ema.close()
    for call in (ema.update, ema.checkpoint, lambda: ema.load_state_dict({})):
        with pytest.raises(ClosedError, match=r"closed. Construct another one"):
            call()
    assert ema.step == 2
    assert (tmp_path / "ema" / f"closed-{ema.run}").exists()


def test_run_without_snapshots_leaves_no_note_when_it_is_closed(make, tmp_path):
    make(Net()).close()
    assert list((tmp_path / "ema").iterdir()) == []


def test_flush_and_fence_have_nothing_to_wait_for(make):
    ema = make(Net())
    ema.update()
    ema.fence()
    ema.flush(timeout=0)


# ---- mistakes, each raised before anything is changed

MISTAKES = {
    "length outside its domain": ({"sigma_rels": (0.05, 0.3)}, ValueError, "sigma_rel"),
    "both lengths and exponents": ({"sigma_rels": (0.05,), "gammas": (7.0,)}, ValueError, "Both"),
    "no length": ({"sigma_rels": ()}, ValueError, "Neither"),
    "equal exponents": ({"gammas": (7.0, 7.0)}, ValueError, "two profiles are equal"),
    "name that matches nothing": ({"ignore_names": ["hed"]}, ValueError, "'hed' matches no tensor"),
    "copied name that matches nothing": ({"param_or_buffer_names_no_ema": ["x"]}, ValueError, "'x' matches no"),
    "prefix that matches nothing": ({"ignore_startswith_names": ["x."]}, ValueError, "'x.' matches no"),
    "unknown type": ({"checkpoint_dtype": torch.int8}, ValueError, "checkpoint_dtype"),
    "interval between snapshots": ({"checkpoint_every_num_steps": 0}, ValueError, "checkpoint_every_num_steps"),
    "interval between updates": ({"update_every": 0}, ValueError, "update_every"),
    "unknown correction": ({"step_size_correction": "no"}, ValueError, "step_size_correction"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_an_argument_is_raised_before_a_folder_is_made(mistake, make, tmp_path):
    arguments, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        make(Net(), **arguments)
    assert list(tmp_path.iterdir()) == []


def quantized() -> nn.Module:
    model = nn.Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.odd = nn.Parameter(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), requires_grad=False)
    return model


MODELS = {
    "no tensor to average": (nn.ReLU, "no tensor to average"),
    "quantized": (quantized, "'odd' .*unquantized"),
    "on meta": (lambda: nn.Linear(2, 2, device="meta"), "'weight' is on the meta device"),
    "uninitialized": (lambda: nn.LazyLinear(2), "'weight' is uninitialized"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [PostHocEMA, KarrasEMA])
@pytest.mark.parametrize("mistake", MODELS)
def test_model_that_cannot_be_averaged_is_refused_before_a_folder_is_made(kind, mistake, make, tmp_path):
    build, message = MODELS[mistake]
    with pytest.raises(UntrackableModelError, match=message):
        make(build()) if kind is PostHocEMA else KarrasEMA(build(), sigma_rel=0.1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [{}, {"sigma_rel": 0.1, "gamma": 7.0}])
def test_karras_ema_needs_exactly_one_of_length_and_exponent(given):
    with pytest.raises(ValueError, match="Give either sigma_rel or gamma"):
        KarrasEMA(Net(), **given)


def test_folder_that_cannot_be_written_is_refused_at_construction(make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SnapshotError, match=r"Snapshots cannot be written to .*file") as error:
        make(Net(), checkpoint_folder=tmp_path / "file" / "ema")
    assert error.value.path == tmp_path / "file" / "ema"


def test_folder_that_cannot_be_written_leaves_no_thread_or_hook(tmp_path):
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    (tmp_path / "file").write_text("in the way")
    model = Net()
    threads, hooks = threading.active_count(), len(_global_optimizer_pre_hooks)
    with pytest.raises(SnapshotError) as error:  # which holds the frames of the constructor
        AsyncPostHocEMA(model, checkpoint_folder=tmp_path / "file" / "ema")
    assert (threading.active_count(), len(_global_optimizer_pre_hooks)) == (threads, hooks)
    assert len(model._load_state_dict_pre_hooks) == 0
    assert error.value.__cause__ is not None


def test_profile_that_is_not_there_is_refused(make):
    message = r"index is 2; expected 0 to 1 \(2 tracked profiles\)"
    with pytest.raises(IndexError, match=message), make(Net()).average_parameters(2):
        pass


# ---- the hot path


class Operations(TorchDispatchMode):
    """Every operation that runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", [Net, Tied, Orders, lambda: Net().bfloat16()])
@pytest.mark.parametrize("correction", ["exact", True])
def test_update_reads_nothing_back_from_the_device(build, correction, make):
    model = build()
    ema = make(model, step_size_correction=correction)
    train(ema, model, range(2))
    with Operations() as operations:
        ema.update()
    assert {"_foreach_lerp_", "lerp_"} & set(operations.names)
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_to_copy", "masked_select", "cpu"}
    assert not waiting & set(operations.names)


def test_update_that_is_not_due_runs_no_operation(make):
    ema = make(Net(), update_every=10)
    ema.update()
    with Operations() as operations:
        ema.update()
    assert operations.names == []


def test_no_thread_or_hook_is_left_by_the_synchronous_service(make):
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    threads, hooks = threading.active_count(), len(_global_optimizer_pre_hooks)
    ema = make(Net())
    ema.update()
    assert (threading.active_count(), len(_global_optimizer_pre_hooks)) == (threads, hooks)


# ---- devices, on a fake one


def averages_on(device: str, case: str, folder: str = "") -> dict:
    """The results of a short training; they must be the same on the fake accelerator as on the CPU."""
    import tempfile

    from tests.support.laggy.device import take_host_waits

    model = Net()
    set_weights(model, 1)
    options = {
        "apart": {"allow_different_devices": True},
        "follow": {"move_ema_to_online_device": True},
    }.get(case, {})
    with tempfile.TemporaryDirectory() as root:
        if case == "whole":
            model.to(device)
        ema = PostHocEMA(
            model, update_every=1, checkpoint_every_num_steps="manual", checkpoint_folder=Path(root), **options
        )
        model.to(device)
        if case == "moved":
            ema.to(device)
            shown = ema.ema_models[0].ema_model
        refused = ""
        for seed in range(2, 6):
            if seed == 4 and case == "moved":
                ema.to("cpu").to(device)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    values = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
                    parameter.copy_(values * seed + len(name))
            if case == "refused" and device != "cpu":
                try:
                    ema.update()
                except NitrousError as error:
                    refused = str(error)
            else:
                take_host_waits()
                ema.update()
                assert case == "apart" or seed == 2 or take_host_waits() == []
        if case == "refused":
            return {"names the remedy": "move_ema_to_online_device=True" in refused if device != "cpu" else True}
        ema.checkpoint()
        state = {key: value for key, value in ema.state_dict().items() if isinstance(value, torch.Tensor)}
        places = {value.device.type for value in state.values()}
        assert places == ({"cpu"} if case == "apart" else {torch.device(device).type}), places
        if case == "moved":
            assert shown is ema.ema_models[0].ema_model
            assert shown.head.weight.device.type == torch.device(device).type
        synthesized = ema.synthesize_ema_model(gamma=ema.gammas[0], device="cpu").state_dict()
        return {
            "state": {key: value.cpu() for key, value in state.items()}["ema_models.1.ema_model.head.weight"],
            "synthesized": synthesized["ema_model.conv.weight"],
            "step": ema.step,
        }


@pytest.mark.slow
def test_devices_are_followed_moved_or_separate_as_configured():
    cases = [{"case": case} for case in ("whole", "moved", "follow", "apart", "refused")]
    assert_right_on_laggy(averages_on, cases=cases, schedules=["eager", "lazy", "random:0", "random:1", "random:2"])


def test_gamma_and_length_of_a_view_are_those_of_its_profile(make):
    ema = make(Net(), gammas=(7.0, 20.0))
    assert [view.gamma for view in ema.ema_models] == [7.0, 20.0]
    assert [view.sigma_rel for view in ema.ema_models] == [gamma_to_sigma_rel(7.0), gamma_to_sigma_rel(20.0)]


@pytest.mark.parametrize("ema_class", [PostHocEMA, AsyncPostHocEMA])
def test_length_that_the_snapshots_cannot_give_is_warned_of(tmp_path, ema_class):
    with ema_class(nn.Linear(2, 2), checkpoint_folder=tmp_path, checkpoint_every_num_steps=20, update_every=1) as ema:
        for _ in range(40):
            ema.update()
            ema.fence()
        with pytest.warns(NitrousWarning, match=r"sigma_rel=0\.005 .*cannot be reconstructed accurately"):
            ema.synthesize_ema_model(sigma_rel=0.005)


@pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler about torch itself
def test_compiled_training_step_may_contain_update(tmp_path):
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = PostHocEMA(net, checkpoint_folder=tmp_path, checkpoint_every_num_steps="manual", update_every=1)

    @torch.compile(backend="eager")
    def train(batch):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
        ema.update()

    seen = []
    for _ in range(3):
        train(torch.ones(4, 3))
        seen.append(net.weight.detach().clone())
    weights = [float((n / 3) ** (ema.gammas[0] + 1) - ((n - 1) / 3) ** (ema.gammas[0] + 1)) for n in (1, 2, 3)]
    expected = sum(weight * each for weight, each in zip(weights, seen, strict=True))
    torch.testing.assert_close(ema.state_dict()["ema_models.0.ema_model.weight"], expected)


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_tensor_that_is_added_after_construction_is_reported(tmp_path, kind):
    model = nn.Linear(3, 2)
    if kind == "buffer":
        model.register_buffer("late", None)
    else:
        model.register_parameter("late", None)
    ema = PostHocEMA(model, checkpoint_folder=tmp_path, update_every=1)
    ema.update()
    model.late = nn.Parameter(torch.ones(2)) if kind == "parameter" else torch.ones(2)
    with pytest.warns(NitrousWarning, match="'late'"):
        ema.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update()


# ---- batch norm


@pytest.mark.parametrize("index", [0, 1])
def test_recalibrated_copy_has_the_statistics_of_the_data_and_the_average_stays(index, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    ema = PostHocEMA(model, checkpoint_folder=tmp_path, update_every=1)
    for seed in range(5):
        set_weights(model, seed)
        ema.update()
    before = copy.deepcopy(ema.state_dict())
    data = [(torch.randn(8, 3) * 2 + 1, "label") for _ in range(6)]
    recalibrated = ema.update_bn(data, index)
    first = ema.ema_models[index].ema_model[0]
    outputs = torch.stack([first(x) for x, _ in data])  # [batches, 8, 4]
    torch.testing.assert_close(recalibrated[1].running_mean, outputs.mean((0, 1)))
    torch.testing.assert_close(recalibrated[1].running_var, outputs.var(1).mean(0))
    assert not recalibrated.training
    now = ema.state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.items() if isinstance(value, torch.Tensor))
    of_view = ema.ema_models[index].update_bn(data, device="cpu")
    torch.testing.assert_close(of_view.state_dict(), recalibrated.state_dict())


def test_recalibration_of_a_profile_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(IndexError, match="index is 2"):
        PostHocEMA(Net(), checkpoint_folder=tmp_path).update_bn([], 2)
