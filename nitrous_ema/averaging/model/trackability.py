"""What can be averaged, and what trainers do to a model so that its parameters do not hold its weights.

Trainers are recognized by what they leave on tensors and modules, never by an import. Each case is refused when
tracking begins and again at the first update() that meets it, since most trainers convert a model after that.

who                                  what he does                                recognized by
DeepSpeed ZeRO-3                     empties parameters between their uses       ``ds_id`` on the parameter
FSDP1                                flattens and shards them                    ``_fsdp_flattened``
FSDP2, torchao, transformer-engine   tensor subclasses with their own dispatch   ``__torch_dispatch__``
bitsandbytes                         packed integers and a state beside them     ``quant_state``, ``SCB``
accelerate's offloading              parameters on meta between their uses       the device
whoever resizes a storage to 0       the tensor keeps its shape, not its values  the address
Megatron, gather overlapped          parameters are stale until the next forward a forward pre-hook
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from nitrous_ema.errors import UntrackableModelError

_GATHERING_HOOK = "._make_forward_pre_hook.<locals>.hook"


def untrackable_reason(tensor: Tensor) -> str | None:
    """Why a tensor cannot be averaged or copied, as what follows its name, without a full stop; None if it can."""
    kind = type(tensor)
    if is_lazy(tensor):
        return "is uninitialized. Run one forward pass (or initialize the lazy modules) before making the EMA"
    if hasattr(tensor, "ds_id"):  # deepspeed/runtime/zero/partition_parameters.py, is_zero_param
        return (
            "is partitioned by DeepSpeed ZeRO-3, which leaves it empty between its uses. Train with ZeRO stage 2 or "
            "below, or average on one process from gathered weights"
        )
    if hasattr(tensor, "_fsdp_flattened"):  # torch/distributed/fsdp/_flat_param.py
        return (
            "belongs to a flat parameter of FullyShardedDataParallel (FSDP1), which holds another part of the weights "
            "on each rank. Such a model cannot be tracked; one trained under DistributedDataParallel can"
        )
    if tensor.is_meta:
        return (
            "is on the meta device and holds no values. Materialize the model first, and do not offload its weights "
            "(accelerate's cpu_offload, disk_offload or device_map)"
        )
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            f"is a {kind.__name__}, a tensor subclass that the averaging does not know. Average a model that is not "
            "converted to it, or skip it with ignore_names"
        )
    return _problem_of_values(tensor)


def _problem_of_values(tensor: Tensor) -> str | None:
    if getattr(tensor, "quant_state", None) is not None or getattr(tensor, "SCB", None) is not None:
        # bitsandbytes/nn/modules.py, Params4bit and Int8Params
        return f"is a quantized {type(tensor).__name__}, whose packed values have no average. Skip it with ignore_names"
    if tensor.is_conj() or tensor.is_neg():
        return "is a conjugated or negated view. Give the model tensor.resolve_conj().resolve_neg() instead"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"is {tensor.dtype} with layout {tensor.layout}. Only dense, unquantized tensors can be averaged"
    if tensor.numel() and not tensor.data_ptr():
        return "has lost its storage: a trainer that frees weights between their uses (FSDP) cannot be tracked"
    return None


def check_gathered(module: Module) -> None:
    """Refuse a module whose parameters may be stale until its next forward, which waits for them to be gathered.

    With ``overlap_param_gather`` Megatron's distributed optimizer writes this rank's shard only, and a forward pre-hook
    of every submodule waits for the others' (``megatron/core/distributed/distributed_data_parallel.py``; before that
    ``megatron/core/optimizer/distrib_optimizer.py``, one hook for all modules). ``disable_forward_pre_hook()`` gathers
    everything and takes the hooks off.

    Raises:
        UntrackableModelError: It has such a hook.
    """
    hooked = any(
        getattr(hook, "__qualname__", "").endswith(_GATHERING_HOOK)
        for hooks in (module._forward_pre_hooks, torch_module._global_forward_pre_hooks)
        for hook in hooks.values()
    )
    if hooked:
        raise UntrackableModelError(
            "the parameters are gathered while the next forward runs (Megatron's overlap_param_gather); until then "
            "they may be those of an earlier step. Train without it, or call disable_forward_pre_hook() on the "
            "DistributedDataParallel wrapper before making the EMA and before each update(), and "
            "enable_forward_pre_hook() after it.",
            name="",
        )
