"""Weights that are not finite, and averages beyond their stored type, from training to synthesized averages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousError, NitrousWarning, PostHocEMA, load_average
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.errors import NonFiniteError
from nitrous_ema.profile import update_weight
from nitrous_ema.synthesis import synthesize

ROOT = Path(__file__).resolve().parents[2]
CLASSES = [PostHocEMA, AsyncPostHocEMA]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def train(ema, steps, bad_at=(), bad=float("nan"), seen=None) -> None:
    """Train with ``bad`` in one weight after some steps, which is gone one step later; ``seen`` takes all weights."""
    model = ema.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(ema.step + 1, steps + 1):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        good = {name: value.clone() for name, value in model.state_dict().items()}
        if step in bad_at:
            ema.fence()
            with torch.no_grad():
                model[2].weight[0, 3] = bad
        ema.update()
        if seen is not None:
            seen[step] = {name: value.clone() for name, value in model.state_dict().items()}
        if step in bad_at:
            model.load_state_dict(good)


def close_after_update(ema) -> None:
    ema.update()
    ema.close()


def run(module: str, *arguments) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", module, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def reported(caught) -> list[str]:
    return [str(each.message) for each in caught if issubclass(each.category, NitrousWarning)]


@pytest.mark.parametrize("cls", CLASSES)
def test_training_warns_once_with_step_and_tensor(cls, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with cls(net(), checkpoint_folder=tmp_path, checkpoint_every_num_steps=10, update_every=1) as ema:
            train(ema, 60, bad_at=[25])
    (message,) = reported(caught)
    assert "not finite at step 30 (sigma_rel 0.05: 1 value, the first in '2.weight'; sigma_rel 0.1: 1 value" in message
    assert "Restore a snapshot of an earlier step" in message
    assert ema.stats().nonfinite == 4


@pytest.mark.parametrize("cls", CLASSES)
def test_training_raises_once_if_asked_and_goes_on(cls, tmp_path):
    ema = cls(net(), checkpoint_folder=tmp_path, checkpoint_every_num_steps=10, update_every=1, on_nonfinite="raise")
    with pytest.raises(NonFiniteError, match="not finite at step 10 ") as raised:
        train(ema, 10_000, bad_at=[5])
    assert (raised.value.step, raised.value.name) == (10, "2.weight")
    train(ema, 40 + ema.step)
    ema.close()
    assert ema.stats().nonfinite == ema.stats().snapshots >= 5


@pytest.mark.parametrize("cls", CLASSES)
def test_half_overflow_names_the_type(cls, tmp_path):
    model = net()
    model[1].running_var.fill_(1.5e5)
    ema = cls(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps=1, update_every=1,
              checkpoint_dtype=torch.float16)  # fmt: skip
    with pytest.warns(NitrousWarning, match=r"'1.running_var'.*The largest number of float16 is 65504"):
        close_after_update(ema)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema.synthesize_ema_model(sigma_rel=0.05)
    assert re.search(r"have values that are not finite .*'1.running_var'.*exclude=", reported(caught)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nonfinite") / "snapshots"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with PostHocEMA(net(), checkpoint_folder=root, checkpoint_every_num_steps=10, update_every=1) as ema:
            train(ema, 60, bad_at=[25])
    return root


def test_worker_warns_and_names_the_steps(folder, tmp_path):
    done = run("nitrous_ema.async_.synthesize_worker", folder, "--sigma-rel", "0.07", "--out", tmp_path)
    assert done.returncode == 0
    assert "warning: The synthesized averages have values that are not finite (inf or nan)" in done.stderr
    assert "'2.weight'" in done.stderr
    output = json.loads(done.stdout)
    assert output["nonfinite"] == [step for step in output["steps_read"] if step >= 30] != []
    model = net()
    load_average(model, output["path"])
    assert not model[2].weight.isfinite().all()


def test_worker_is_silent_about_finite_snapshots_of_the_same_run(folder, tmp_path):
    done = run("nitrous_ema.async_.synthesize_worker", folder, "--sigma-rel", "0.05", "--step", "20", "--out", tmp_path)
    assert done.returncode == 0
    assert "not finite" not in done.stderr
    assert json.loads(done.stdout)["nonfinite"] == []


def test_inspect_and_verify_report_the_snapshots(folder):
    for command in ("inspect", "verify"):
        done = run("nitrous_ema", command, folder)
        assert done.returncode == 0
        text = " ".join(done.stdout.split())
        assert "4 snapshots" in text
        assert "from step 30 on" in text
        assert "'2.weight'" in text
    found = json.loads(run("nitrous_ema", "inspect", folder, "--json").stdout)
    listed = {each["step"]: each["nonfinite"] for each in found["runs"][0]["snapshots"]}
    assert listed[20] == []
    assert listed[30] == [{"sigma_rel": sigma, "num_values": 1, "tensor": "2.weight"} for sigma in (0.05, 0.1)]
    done = run("nitrous_ema", "inspect", folder, "--sigma-rel", "0.07", "--json")
    assert "not finite" in json.loads(done.stdout)["asked"][0]["warnings"][0]


def test_excluded_snapshots_are_not_warned_of(folder):
    assert "not finite" in synthesize(folder, sigma_rels=[0.07]).plan.report.warnings[0]
    plan = synthesize(folder, sigma_rels=[0.05], exclude=[30, 40, 50, 60]).plan
    assert not any("not finite" in each for each in plan.report.warnings)
    assert plan.nonfinite_steps == ()


@pytest.mark.parametrize("cls", CLASSES)
def test_restore_warns_of_averages_that_are_not_finite(cls, folder, tmp_path):
    ema = cls(net(), checkpoint_folder=folder, update_every=1)
    with pytest.warns(NitrousWarning, match=r"step 60 have values that are not finite .*'2.weight'"):
        ema.restore()
    ema.restore(20)
    assert all(value.isfinite().all() for value in ema.state_dict().values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("cls", CLASSES)
def test_retention_keeps_the_finite_snapshots(cls, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NitrousWarning)
        with cls(net(), checkpoint_folder=tmp_path, checkpoint_every_num_steps=10, update_every=1, keep=4) as ema:
            train(ema, 400, bad_at=[135])
    finite = [each.step for each in ema.snapshots.snapshots() if each.is_finite]
    assert len(finite) == 3
    assert finite[-1] == 130


# Updates that are skipped


@pytest.fixture(params=["inside update()", "on a thread"])
def placed(request, monkeypatch):
    """Where AsyncPostHocEMA averages small models on the CPU."""
    if request.param == "on a thread":
        monkeypatch.setattr("nitrous_ema.async_.ema._FEW_ELEMENTS", 0)


def defined(model: nn.Module, weights, steps: int, gammas, bad_at, every: int = 1) -> list[dict[str, torch.Tensor]]:
    """The averages by the definition: a bad update changes nothing but the time at which the next one begins."""
    names = [name for name, value in model.state_dict().items() if value.is_floating_point()]
    averages = [{name: model.state_dict()[name].clone() for name in names} for _ in gammas]
    last = 0
    for step in sorted({*range(1, steps + 1, every), steps}):  # checkpoint() brings the averages up to the last step
        now = weights[step]
        for gamma, average in zip(gammas, averages, strict=True):
            weight = 1.0 if last == 0 else update_weight(gamma, step, step - last)
            if step not in bad_at:
                for name in names:
                    average[name] = now[name].clone() if weight == 1.0 else average[name].lerp(now[name], weight)
        last = step
    return averages


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("every", "bad_at"), [(1, [1]), (1, [5, 6, 17]), (4, [5, 6]), (3, [])])
def test_skipped_update_leaves_averages_and_counts_as_applied(cls, placed, bad, every, bad_at, tmp_path):
    model = net()
    started, seen = net(), {}
    with cls(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps="manual", update_every=every,
             on_nonfinite="skip") as ema:  # fmt: skip
        train(ema, 21, bad_at, bad, seen)
        gammas = ema.gammas
        ema.checkpoint()
    expected = defined(started, seen, 21, gammas, bad_at, every)
    for average, view in zip(expected, ema.ema_models, strict=True):
        found = view.ema_model.state_dict()
        for name, value in average.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert ema.t == 21
    assert ema.stats().updates_skipped == len([step for step in bad_at if (step - 1) % every == 0])


def test_both_classes_skip_to_the_bit_and_finite_updates_have_the_bits_of_no_option(placed, tmp_path):
    found = {}
    for bad_at in ([], [3, 8]):
        for cls in CLASSES:
            for option in ("warn", "skip"):
                model, folder = net(), tmp_path / f"{cls.__name__}-{option}-{len(bad_at)}"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", NitrousWarning)
                    with cls(model, checkpoint_folder=folder, update_every=1, on_nonfinite=option) as ema:
                        train(ema, 20, bad_at)
                        state = {k: v.clone() for k, v in ema.state_dict().items() if isinstance(v, torch.Tensor)}
                found[len(bad_at), cls, option] = state
    reference = found[0, PostHocEMA, "warn"]
    for cls in CLASSES:
        assert all(torch.equal(found[0, cls, "skip"][key], value) for key, value in reference.items())
    one, other = (found[2, cls, "skip"] for cls in CLASSES)
    assert all(torch.equal(one[key], other[key]) for key in reference)
    assert all(value.isfinite().all() for value in one.values())
    assert not found[2, PostHocEMA, "warn"]["ema_models.0.ema_model.2.weight"].isfinite().all()


@pytest.mark.parametrize("cls", CLASSES)
def test_copied_tensors_stay_with_their_averages_and_may_hold_anything(cls, placed, tmp_path):
    model = net()
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    options = {"param_or_buffer_names_no_ema": ["mask"], "update_every": 1, "on_nonfinite": "skip"}
    with cls(model, checkpoint_folder=tmp_path, **options) as ema:
        ema.update()
        for bad, mask in ((False, 1.0), (True, 2.0), (False, torch.nan)):
            ema.fence()
            with torch.no_grad():
                model[2].bias.fill_(torch.nan if bad else 0.5)
                model.mask.fill_(mask)
            ema.update()
            stored = ema.state_dict()["ema_models.0.ema_model.mask"][0].item()
            assert stored == (1.0 if bad else mask) or (stored != stored and mask != mask)
        ema.checkpoint()
    assert ema.stats().updates_skipped == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_skipped_updates_are_logged(cls, placed, tmp_path, caplog):
    with cls(net(), checkpoint_folder=tmp_path, checkpoint_every_num_steps=10, update_every=1,
             on_nonfinite="skip") as ema:  # fmt: skip
        train(ema, 40, [13, 14, 35])
    said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert said == [f"{n} updates were skipped up to step {s}: tensors were not finite" for n, s in ((2, 20), (3, 40))]
    assert ema.stats().nonfinite == 0


@pytest.mark.parametrize("cls", CLASSES)
def test_skipping_on_two_devices_is_refused_before_anything_starts(cls, tmp_path, monkeypatch):
    model = net()
    monkeypatch.setattr(FlatBuffers, "devices", property(lambda self: (torch.device("cpu"), torch.device("meta"))))
    with pytest.raises(NitrousError, match="on_nonfinite='skip': the tensors are on cpu and meta"):
        cls(model, checkpoint_folder=tmp_path, on_nonfinite="skip")
