"""Which tensors can be averaged, and the trainers under which parameters do not hold the model's weights.

Some trainers shard, empty or pack parameters between their uses; an average of such tensors would be a wrong number.
They are recognized by marks that they leave on tensors and modules, never by an import. Each case is refused when
tracking begins, and again at the first update() that meets it, since most trainers convert a model after that.

trainer                              effect on the model                         recognized by
DeepSpeed ZeRO-3                     empties parameters between their uses       ``ds_id`` on the parameter
FSDP1                                flattens and shards them                    ``_fsdp_flattened``
FSDP2, tensor parallelism (DTensor)  tensor subclasses with their own dispatch   ``__torch_dispatch__``
torchao, transformer-engine          tensor subclasses with their own dispatch   ``__torch_dispatch__``
bitsandbytes                         packed integers and a state beside them     ``quant_state``, ``SCB``
accelerate's offloading              parameters on meta between their uses       the device
any code that resizes a storage to 0 the tensor has its shape, but no values     the address
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
    """Return why a tensor cannot be averaged or copied, or None if it can.

    The text continues a sentence that begins with the tensor's name, and has no full stop at its end.
    """
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
            "on each rank. FSDP1 models cannot be tracked; train under DistributedDataParallel instead"
        )
    if tensor.is_meta:
        return (
            "is on the meta device and holds no values. Materialize the model first, and do not offload its weights "
            "(accelerate's cpu_offload, disk_offload or device_map)"
        )
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            f"is a {kind.__name__}, a tensor subclass that cannot be averaged. Track the model before it is converted, "
            "or skip the tensor with ignore_names"
        )
    return _reason_in_values(tensor)


def _reason_in_values(tensor: Tensor) -> str | None:
    if getattr(tensor, "quant_state", None) is not None or getattr(tensor, "SCB", None) is not None:
        # bitsandbytes/nn/modules.py, Params4bit and Int8Params
        return (
            f"is a quantized {type(tensor).__name__}, whose packed values have no average. Skip it with ignore_names, "
            "or all parameters that require no gradients with trainable_only=True"
        )
    if tensor.is_conj() or tensor.is_neg():
        return "is a conjugated or negated view. Give the model tensor.resolve_conj().resolve_neg() instead"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"is {tensor.dtype} with layout {tensor.layout}. Only dense, unquantized tensors can be averaged"
    if tensor.numel() and not tensor.data_ptr():  # untyped_storage().resize_(0) leaves shape and strides as they were
        return "has lost its storage: a trainer that frees weights between their uses (FSDP) cannot be tracked"
    return None


def check_gathered(module: Module) -> None:
    """Refuse a module whose parameters may be stale until its next forward, which waits for them to be gathered.

    With ``overlap_param_gather`` Megatron's distributed optimizer writes only this rank's shard. A forward pre-hook of
    every submodule waits for the other shards (``megatron/core/distributed/distributed_data_parallel.py``; in earlier
    releases ``megatron/core/optimizer/distrib_optimizer.py``, one hook for all modules). ``disable_forward_pre_hook()``
    gathers all shards and removes the hooks.

    Raises:
        UntrackableModelError: The module, or torch for all modules, has such a hook.
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
