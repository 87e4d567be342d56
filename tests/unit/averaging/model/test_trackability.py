"""What trainers do to parameters is recognized, refused by name, and says what to do instead.

The fakes carry the attributes and class names that the trainers' sources give theirs; each names its source.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema.averaging.model.trackability import untrackable_reason
from nitrous_ema.averaging.model.tracking import TrackingPolicy, track
from nitrous_ema.errors import UntrackableModelError
from tests.support.fakes import TIMEOUT_SECONDS, averages_of
from tests.support.guarded_training import sgd


def partition_by_zero3(model: nn.Module) -> None:
    """deepspeed/runtime/zero/partition_parameters.py: ``_convert_to_deepspeed_param``, ``free_param``."""
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape, p.ds_numel, p.ds_status = number, p.shape, p.numel(), "NOT_AVAILABLE"
        p.ds_tensor = p.detach().flatten().clone()
        p.data = torch.empty(0, dtype=p.dtype, device=p.device)


def gather_for_zero3(model: nn.Module) -> None:
    """As inside of ``deepspeed.zero.GatheredParameters``."""
    partition_by_zero3(model)
    for p in model.parameters():
        p.data = p.ds_tensor.view(p.ds_shape)


def flatten_by_fsdp1(model: nn.Module) -> None:
    """torch/distributed/fsdp/_flat_param.py, ``use_orig_params=False``: one flat, sharded parameter."""
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()])[:3])
    flat._is_flat_param = flat._fsdp_flattened = True
    for name in [name for name, _ in model.named_parameters(recurse=False)]:
        delattr(model, name)
    model._flat_param = flat


def shard_by_fsdp1(model: nn.Module) -> None:
    """The same with ``use_orig_params=True``: 1-d views of this rank's shard, some of them empty."""
    shards = torch.ones(5).split([0, 3, 2])
    for (name, _), shard in zip(list(model.named_parameters(recurse=False)), shards, strict=False):
        setattr(model, name, nn.Parameter(shard))
        getattr(model, name)._fsdp_flattened = True


def offload_by_accelerate(model: nn.Module) -> None:
    """accelerate/hooks.py, ``AlignDevicesHook``: parameters are new ones on meta until the next forward."""
    for name, p in list(model.named_parameters(recurse=False)):
        setattr(model, name, nn.Parameter(p.to("meta")))


def free_storages(model: nn.Module) -> None:
    for p in model.parameters():
        p.untyped_storage().resize_(0)


class Float8Tensor(torch.Tensor):
    """transformer_engine/pytorch/tensor/float8_tensor.py; torchao's and torch's DTensor are made alike."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Float8Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Float8Tensor(args[0]) if func is torch.ops.aten.detach.default else NotImplemented


def convert_to_float8(model: nn.Module) -> None:
    for name, p in list(model.named_parameters(recurse=False)):
        setattr(model, name, nn.Parameter(Float8Tensor(p)))


class Params4bit(nn.Parameter):
    """bitsandbytes/nn/modules.py: packed bytes, and what they mean beside them."""

    quant_state: object = None


def quantize_by_bitsandbytes(model: nn.Module) -> None:
    packed = Params4bit(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(quant_type="nf4")
    model.weight = packed


class Int8Params(nn.Parameter):
    """The same file: rows of integers and their scales."""

    SCB: torch.Tensor | None = None


def quantize_rows_by_bitsandbytes(model: nn.Module) -> None:
    model.weight = Int8Params(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    model.weight.SCB = torch.ones(2)


TRAINERS = {
    "DeepSpeed ZeRO-3": (partition_by_zero3, r"'weight' is partitioned by DeepSpeed ZeRO-3.*stage 2"),
    "DeepSpeed ZeRO-3, gathered": (gather_for_zero3, r"'weight' is partitioned by DeepSpeed ZeRO-3.*stage 2"),
    "FSDP1": (shard_by_fsdp1, r"'weight' belongs to a flat parameter of FullyShardedDataParallel"),
    "accelerate's offloading": (offload_by_accelerate, r"'weight' is on the meta device.*cpu_offload"),
    "freed storages": (free_storages, r"'weight' has lost its storage"),
    "transformer-engine": (convert_to_float8, r"'weight' is a Float8Tensor, a tensor subclass .*ignore_names"),
    "bitsandbytes, 4 bits": (quantize_by_bitsandbytes, r"'weight' is a quantized Params4bit.*ignore_names"),
    "bitsandbytes, 8 bits": (quantize_rows_by_bitsandbytes, r"'weight' is a quantized Int8Params.*ignore_names"),
}


@pytest.mark.parametrize(("convert", "message"), TRAINERS.values(), ids=TRAINERS)
def test_converted_model_is_refused_before_anything_is_made(tmp_path, convert, message):
    model = nn.Linear(3, 2)
    convert(model)
    with pytest.raises(UntrackableModelError, match=message) as told:
        PostHocEMA(model, checkpoint_folder=tmp_path / "none")
    assert told.value.name == "weight"
    assert not (tmp_path / "none").exists()


def test_flat_parameter_is_refused():
    model = nn.Linear(3, 2)
    flatten_by_fsdp1(model)
    with pytest.raises(UntrackableModelError, match="'_flat_param' belongs to a flat parameter"):
        track(model)


@pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
@pytest.mark.parametrize(("convert", "message"), TRAINERS.values(), ids=TRAINERS)
def test_model_converted_later_is_refused_by_the_update_that_meets_it(tmp_path, cls, convert, message):
    model = nn.Linear(3, 2)
    ema = cls(model, checkpoint_folder=tmp_path, update_every=1, checkpoint_every_num_steps="manual")
    optimizer = sgd(model)
    ema.update()
    optimizer.step()
    ema.update()
    before = averages_of(ema)
    convert(model)
    with pytest.raises(UntrackableModelError, match=message):
        ema.update()
    after = averages_of(ema)
    assert ema.step == 2
    assert all(torch.equal(after[key], before[key]) for key in before)
    ema.close(TIMEOUT_SECONDS)


@pytest.mark.parametrize("convert", [quantize_by_bitsandbytes, partition_by_zero3, offload_by_accelerate])
def test_converted_tensor_may_be_skipped(convert):
    """As with frozen quantized weights under trained adapters."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    convert(model[0])
    roles = {tensor.name: tensor.role for tensor in track(model, TrackingPolicy(ignore_startswith_names=["0."]))}
    assert roles == {"0.weight": "skipped", "0.bias": "skipped", "1.weight": "averaged", "1.bias": "averaged"}


@pytest.mark.parametrize("make", [lambda: Params4bit(torch.ones(2)), lambda: nn.Parameter(torch.ones(0, 3))])
def test_neither_an_unquantized_nor_an_empty_parameter_is_a_problem(make: Callable[[], nn.Parameter]):
    assert untrackable_reason(make()) is None


# Megatron's overlapped gather: the tensors look as ever, and hold an earlier step's values


class DistributedDataParallel(nn.Module):
    """megatron/core/distributed/distributed_data_parallel.py, with ``overlap_param_gather``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.ddp_config = SimpleNamespace(use_distributed_optimizer=True, overlap_param_gather=True)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.enable_forward_pre_hook()

    def enable_forward_pre_hook(self) -> None:
        for module in self.module.modules():
            self.handles.append(module.register_forward_pre_hook(self._make_forward_pre_hook()))

    def disable_forward_pre_hook(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _make_forward_pre_hook(self) -> Callable[..., None]:
        def hook(module: nn.Module, *unused: object) -> None:
            pass  # finish_param_sync of this module's buckets

        return hook


@pytest.mark.parametrize("of", [lambda wrapper: wrapper, lambda wrapper: wrapper.module], ids=["wrapper", "inside"])
def test_overlapped_gather_is_refused(of):
    wrapper = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(UntrackableModelError, match=r"overlap_param_gather.*disable_forward_pre_hook\(\)"):
        track(of(wrapper))
    wrapper.disable_forward_pre_hook()
    track(of(wrapper))


def test_overlapped_gather_by_one_hook_for_all_modules_is_refused():
    """As in megatron/core/optimizer/distrib_optimizer.py before the hooks moved to the wrapper."""
    hook = DistributedDataParallel(nn.Linear(1, 1))._make_forward_pre_hook()
    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        with pytest.raises(UntrackableModelError, match="overlap_param_gather"):
            track(nn.Linear(3, 2))
    finally:
        handle.remove()


def test_overlapped_gather_that_began_later_is_refused_until_it_is_finished(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    ema = PostHocEMA(model, checkpoint_folder=tmp_path, update_every=1, checkpoint_every_num_steps="manual")
    ema.update()
    wrapper = DistributedDataParallel(model)
    with pytest.raises(UntrackableModelError, match="overlap_param_gather"):
        ema.update()
    wrapper.disable_forward_pre_hook()  # gathers everything
    ema.update()
    wrapper.enable_forward_pre_hook()
    assert ema.step == 2


def test_other_forward_hooks_are_no_problem():
    model = nn.Linear(3, 2)
    model.register_forward_pre_hook(lambda *_: None)
    track(model)


@pytest.fixture
def world():
    """A process group of one."""
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_torchs_fsdp1_is_recognized(world, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    with pytest.raises(UntrackableModelError, match="belongs to a flat parameter"):
        track(model)


def test_torchs_fsdp2_is_recognized(world, tmp_path):
    """Its parameters have the shape and type that they had before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(3, 2)
    ema = PostHocEMA(model, checkpoint_folder=tmp_path, update_every=1, checkpoint_every_num_steps="manual")
    ema.update()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UntrackableModelError, match="'weight' is a DTensor, a tensor subclass"):
        ema.update()
    with pytest.raises(UntrackableModelError, match="'weight' is a DTensor, a tensor subclass"):
        track(model)
