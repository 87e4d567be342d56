"""Side by side with the libraries that ours replaces: nitrous-ema 0.0.1 and ema-pytorch 0.8.3.

Where they are right the numbers agree to float32 rounding; the tests of what they get wrong are with our own modules.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from nitrous_ema import KarrasEMA, PostHocEMA
from nitrous_ema.posthoc import solve_weights
from nitrous_ema.profile import sigma_rel_to_gamma
from tests.support.models import Net, Tied, safetensors_of
from tests.support.peers import load_nitrous_001

SIGMA_RELS = (0.05, 0.1)
NAMES = [name for name in Net().state_dict() if name != "norm.num_batches_tracked"]  # which the peers leave at 0
# Both round each step to float32; where they round differently the difference dies out with the average's memory.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def walk(model: nn.Module, step: int) -> None:
    """One step of a random walk of every floating-point tensor."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def ours(model: nn.Module, folder, **kwargs) -> PostHocEMA:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of step_size_correction=False with update_every > 1
        return PostHocEMA(
            model,
            **{"sigma_rels": SIGMA_RELS, "checkpoint_every_num_steps": 1e10, "checkpoint_folder": folder, **kwargs},
        )


def nitrous_001(model: nn.Module, folder, **kwargs):
    return load_nitrous_001().PostHocEMA(
        model,
        **{"sigma_rels": SIGMA_RELS, "checkpoint_every_num_steps": 1e10, "checkpoint_folder": str(folder), **kwargs},
    )


def ema_pytorch(model: nn.Module, folder, **kwargs):
    peer = pytest.importorskip("ema_pytorch")
    return peer.PostHocEMA(
        model, sigma_rels=SIGMA_RELS, checkpoint_every_num_steps="manual", checkpoint_folder=str(folder), **kwargs
    )


def train(model: nn.Module, emas: list, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        walk(model, step)
        for ema in emas:
            ema.update()


def assert_same_averages(ema: PostHocEMA, peer, names=NAMES) -> None:
    for view, other in zip(ema.ema_models, peer.ema_models, strict=True):
        shown, expected = view.ema_model.state_dict(), other.ema_model.state_dict()
        for name in names:
            torch.testing.assert_close(
                shown[name], expected[name], **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
            )


# ---- averages


@pytest.mark.parametrize("update_every", [1, 3, 10])
@pytest.mark.parametrize("correction", [False, True])
def test_averages_equal_those_of_nitrous_001(correction, update_every, tmp_path):
    model, options = Net(), {"step_size_correction": correction, "update_every": update_every}
    ema, peer = ours(model, tmp_path, **options), nitrous_001(model, tmp_path, **options)
    train(model, [ema, peer], 300)
    assert_same_averages(ema, peer)


@pytest.mark.parametrize("update_every", [1, 3, 10])
def test_uncorrected_averages_equal_those_of_ema_pytorch(update_every, tmp_path):
    model = Net()
    ema = ours(model, tmp_path, step_size_correction=False, update_every=update_every)
    peer = ema_pytorch(model, tmp_path, update_every=update_every)
    train(model, [ema, peer], 300)
    assert_same_averages(ema, peer)


OPTIONS = {
    "frozen": {"frozen": True},
    "copied": {"param_or_buffer_names_no_ema": {"head.weight", "norm.running_mean"}},
    "skipped": {"ignore_names": {"head.weight", "norm.running_var"}},
    "skipped by prefix": {"ignore_startswith_names": {"norm.", "head.b"}},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_leave_the_averages_of_nitrous_001(option, tmp_path):
    model, options = Net(), {"step_size_correction": True, "update_every": 3, **OPTIONS[option]}
    ema, peer = ours(model, tmp_path, **options), nitrous_001(model, tmp_path, **options)
    train(model, [ema, peer], 100)
    averaged = [name for name in NAMES if f"ema_models.0.ema_model.{name}" in ema.state_dict()]
    assert len(averaged) == {"skipped": len(NAMES) - 2, "skipped by prefix": 3}.get(option, len(NAMES))
    assert_same_averages(ema, peer, averaged)


def test_karras_ema_equals_that_of_nitrous_001():
    model, options = Net(), {"sigma_rel": 0.08, "step_size_correction": True, "update_every": 4}
    ema, peer = KarrasEMA(model, **options), load_nitrous_001().KarrasEMA(model, **options)
    train(model, [ema, peer], 100)
    shown, expected = ema.ema_model.state_dict(), peer.ema_model.state_dict()
    for name in NAMES:
        torch.testing.assert_close(shown[name], expected[name], **TOLERANCE)
    assert ema.gamma == pytest.approx(peer.gamma, rel=1e-9)


def test_outputs_are_a_tuple_as_in_nitrous_001(tmp_path):
    model, options = Net().eval(), {"step_size_correction": True, "update_every": 2}
    ema, peer = ours(model, tmp_path, **options), nitrous_001(model, tmp_path, **options)
    train(model, [ema, peer], 1)
    images = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(ema(images), peer(images), **TOLERANCE)


def test_weights_are_set_to_the_last_average_as_in_nitrous_001(tmp_path):
    options = {"step_size_correction": True, "update_every": 2}
    results = []
    for make in (ours, nitrous_001):
        torch.manual_seed(0)
        model = Net()
        ema = make(model, tmp_path, **options)
        train(model, [ema], 50)
        ema.copy_params_from_ema_to_model()
        results.append(model.state_dict())
    for name in NAMES:
        torch.testing.assert_close(results[0][name], results[1][name], **TOLERANCE)


# ---- states


@pytest.mark.parametrize("build", [Net, Tied])
def test_keys_of_the_state_are_those_of_nitrous_001(build, tmp_path):
    model = build()
    assert set(ours(model, tmp_path).state_dict()) == set(nitrous_001(model, tmp_path).state_dict())
    karras = load_nitrous_001().KarrasEMA(model, sigma_rel=0.1)
    assert set(KarrasEMA(model, sigma_rel=0.1).state_dict()) == set(karras.state_dict())


def through_a_file(state: dict, folder) -> dict:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("calls", [0, 1, 7, 10])
@pytest.mark.parametrize("update_every", [1, 3])
def test_training_goes_on_from_a_state_of_nitrous_001(calls, update_every, tmp_path):
    model, options = Net(), {"step_size_correction": True, "update_every": update_every}
    peer = nitrous_001(model, tmp_path, **options)
    train(model, [peer], calls)
    ema = ours(Net(), tmp_path, **options)
    ema.model.load_state_dict(model.state_dict())
    ema.load_state_dict(through_a_file(peer.state_dict(), tmp_path))
    assert (ema.step, ema.initted) == (peer.step, calls > 0)
    online = ema.model
    for step in range(calls, 60):
        walk(model, step)
        walk(online, step)
        peer.update()
        ema.update()
    assert_same_averages(ema, peer)


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_nitrous_001_loads_as_part_of_the_users_module(strict, tmp_path):
    def parent_of(ema: nn.Module) -> nn.Module:
        parent = nn.Module()
        parent.diffusion = nn.Module()
        parent.diffusion.ema = ema
        return parent

    model, options = Net(), {"step_size_correction": True, "update_every": 2}
    peer = nitrous_001(model, tmp_path, **options)
    train(model, [peer], 20)
    ema = ours(Net(), tmp_path, **options)
    parent_of(ema).load_state_dict(through_a_file(parent_of(peer).state_dict(), tmp_path), strict=strict)
    assert ema.step == 20
    assert_same_averages(ema, peer)


def test_state_of_a_karras_ema_of_nitrous_001_loads(tmp_path):
    model = Net()
    peer = load_nitrous_001().KarrasEMA(model, sigma_rel=0.1, update_every=1)
    train(model, [peer], 20)
    ema = KarrasEMA(Net(), sigma_rel=0.1, update_every=1)
    ema.load_state_dict(through_a_file(peer.state_dict(), tmp_path))
    assert ema.step == 20
    assert torch.equal(ema.ema_model.head.weight, peer.ema_model.head.weight)


@pytest.mark.parametrize("wrap", ["compile", "parallel"])
@pytest.mark.parametrize("now", ["none", "compile"])
def test_state_of_nitrous_001_loads_with_the_names_that_wrappers_gave_it(wrap, now, tmp_path):
    def compiled(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")

    model = Net()
    peer = nitrous_001(nn.DataParallel(model) if wrap == "parallel" else compiled(model), tmp_path, update_every=1)
    train(model, [peer], 10)
    state = peer.state_dict()
    assert any("module." in key or "_orig_mod." in key for key in state)
    other = Net()
    ema = ours(compiled(other) if now == "compile" else other, tmp_path, update_every=1)
    ema.load_state_dict(state)
    prefix = "module." if wrap == "parallel" else "_orig_mod."
    for name in NAMES:
        saved = state[f"ema_models.1.ema_model.{prefix}{name}"]
        assert torch.equal(ema.ema_models[1].ema_model.state_dict()[name], saved), name


def test_states_with_skipped_tensors_of_nitrous_001_load(tmp_path):
    model, options = Net(), {"update_every": 1, "ignore_names": {"head.weight"}}
    peer = nitrous_001(model, tmp_path, **options)
    train(model, [peer], 10)
    ema = ours(Net(), tmp_path, **options)
    ema.load_state_dict(peer.state_dict())
    assert ema.step == 10


# ---- synthesis


@pytest.mark.filterwarnings("ignore:.*cannot be reconstructed accurately")  # from a handful of snapshots
@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.15])
def test_synthesized_averages_differ_from_nitrous_001_by_normalization_only(sigma_rel, tmp_path):
    """0.0.1 solves without the constraint that weights sum to 1. Solved like that, our snapshots give its average."""
    model, options = Net(), {"step_size_correction": True, "update_every": 1, "checkpoint_every_num_steps": 50}
    ema, peer = ours(model, tmp_path / "ours", **options), nitrous_001(model, tmp_path / "theirs", **options)
    train(model, [ema, peer], 300)
    steps = np.repeat(np.arange(50, 301, 50), 2)
    gammas = np.tile(sigma_rel_to_gamma(list(SIGMA_RELS)), 6)
    weights = solve_weights(steps, gammas, [300], [sigma_rel_to_gamma(sigma_rel)], normalize=None)[:, 0]
    expected = peer.synthesize_ema_model(sigma_rel=sigma_rel, device="cpu").ema_model.state_dict()
    synthesized = ema.synthesize_ema_model(sigma_rel=sigma_rel, device="cpu").ema_model.state_dict()
    files = {step: safetensors_of(tmp_path / "ours", step) for step in range(50, 301, 50)}
    for name in NAMES:
        columns = [files[step][f"ema{index % 2}.{name}"].double() for index, step in enumerate(steps)]
        unnormalized = sum(weight * column for weight, column in zip(weights, columns, strict=True))
        torch.testing.assert_close(unnormalized.float(), expected[name], rtol=1e-4, atol=1e-4)
        # and what is left between the two is of the size by which its weights miss 1
        missing = abs(1 - weights.sum()) * max(column.abs().max() for column in columns)
        torch.testing.assert_close(synthesized[name], expected[name], rtol=0, atol=float(3 * missing + 1e-4))
