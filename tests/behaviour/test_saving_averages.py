"""Averages go through the savers that users have: none takes their tensors for tied ones, or writes too much."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from nitrous_ema import AsyncPostHocEMA, PostHocEMA, load_average
from nitrous_ema.synthesis.worker.launch import launch
from tests.support.memory_orders import Orders
from tests.support.models import Net, set_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be reconstructed accurately")  # from a handful of snapshots


def trained(cls: type[PostHocEMA], model: nn.Module, folder: os.PathLike[str]) -> PostHocEMA:
    ema = cls(model, checkpoint_folder=folder, checkpoint_every_num_steps=2, update_every=1)
    for seed in range(6):
        ema.fence()
        set_weights(model, seed)
        ema.update()
    return ema


def shared(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the keys whose tensors savers take for one, as accelerate and huggingface_hub find them.

    Both compare device, address and bytes of the storage (``accelerate.utils.other.id_tensor_storage``,
    ``huggingface_hub.serialization._torch.get_torch_storage_id``).
    """
    keys = defaultdict(list)
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        if storage.nbytes():
            keys[tensor.device, storage.data_ptr(), storage.nbytes()].append(key)
    return [names for names in keys.values() if len(names) > 1]


def assert_separate(state: Mapping[str, object]) -> None:
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    assert shared(tensors) == []
    assert {key: value.untyped_storage().nbytes() for key, value in tensors.items()} == {
        key: value.nbytes for key, value in tensors.items()
    }
    places = sorted((value.data_ptr(), value.data_ptr() + value.nbytes) for value in tensors.values() if value.nbytes)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


def states(ema: PostHocEMA) -> Iterable[Mapping[str, object]]:
    synthesized = ema.synthesize_ema_model(sigma_rel=0.07)
    yield from (view.ema_model.state_dict() for view in ema.ema_models)
    # Copied tensors are the same in every profile, as tied weights are.
    yield from ({k: v for k, v in ema.state_dict().items() if k.startswith(f"ema_models.{i}.")} for i in range(2))
    yield synthesized.ema_model.state_dict()
    yield synthesized.state_dict()


@pytest.mark.parametrize("build", [Net, Orders, lambda: Net().bfloat16()])
@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
def test_every_tensor_of_an_average_has_a_storage_of_its_own_size(cls, build, tmp_path):
    with trained(cls, build(), tmp_path) as ema:
        for state in states(ema):
            assert_separate(state)


def test_model_with_a_loaded_average_has_storages_of_its_own(tmp_path):
    with trained(PostHocEMA, Net(), tmp_path / "run"):
        pass
    (output,) = launch(tmp_path / "run", sigma_rels=[0.07], out=tmp_path / "out").result(timeout=60)
    model = Net()
    load_average(model, output.path)
    assert_separate(model.state_dict())


def test_averages_of_all_profiles_take_the_memory_of_the_buffers_alone(tmp_path):
    ema = trained(PostHocEMA, Net(), tmp_path)
    buffers = [
        (flat.untyped_storage().data_ptr(), flat.untyped_storage().data_ptr() + flat.untyped_storage().nbytes())
        for group in ema._engine.flat_buffers.groups
        for flat in group.flats
    ]
    for view in ema.ema_models:
        for name, parameter in view.ema_model.named_parameters():
            assert any(begin <= parameter.data_ptr() < end for begin, end in buffers), name


def test_safetensors_saves_the_module_and_loads_it(tmp_path):
    ema = trained(PostHocEMA, Net(), tmp_path / "run")
    shown = ema.ema_models[0].ema_model
    safetensors.torch.save_model(shown, tmp_path / "model.safetensors")
    other = Net()
    assert safetensors.torch.load_model(other, tmp_path / "model.safetensors") == (set(), [])
    torch.testing.assert_close(dict(other.state_dict()), dict(shown.state_dict()), rtol=0, atol=0)


def test_torch_save_of_one_layer_writes_that_layer(tmp_path):
    ema = trained(PostHocEMA, nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 2)), tmp_path / "run")
    head = ema.ema_models[0].ema_model[1].state_dict()
    torch.save(head, tmp_path / "head.pt")
    assert (tmp_path / "head.pt").stat().st_size < sum(value.nbytes for value in head.values()) + 4096
    saved = torch.load(tmp_path / "head.pt", weights_only=True)
    torch.testing.assert_close(dict(saved), dict(head), rtol=0, atol=0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_copies_of_a_state_have_storages_of_their_own(again, tmp_path):
    state = trained(PostHocEMA, Orders(), tmp_path).ema_models[0].state_dict()
    copied = again(state)
    assert_separate(copied)
    assert all(torch.equal(copied[key], value) for key, value in state.items() if isinstance(value, Tensor))
