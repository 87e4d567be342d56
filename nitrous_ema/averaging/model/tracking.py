"""Which tensors of a model are averaged, copied or skipped, and the name of each.

Names are *canonical*: the keys of the unwrapped model's ``state_dict()``. A wrapper module (``torch.compile``, DDP,
``DataParallel``, activation checkpointing) is recognized by its type, at any depth, and its attribute is left out of
the names. A user's own submodule that happens to be called ``module`` stays in them.

=========  =============================================================  ==============================================
role       which tensors                                                  what happens at an applied update
=========  =============================================================  ==============================================
averaged   floating-point and complex64 parameters; buffers as           one average per profile moves towards it
           ``buffers`` states
copied     all other buffers, integers, ``param_or_buffer_names_no_ema``, the present value is stored, once
           floating-point buffers that hold inf or nan
skipped    ``ignore_names``, ``ignore_startswith_names``; non-persistent  nothing; it is not in snapshots either
           buffers, which are caches that the model rebuilds; with
           ``trainable_only`` parameters that require no gradients
=========  =============================================================  ==============================================

Most buffers have no meaningful average: the average of a pruning mask is no mask, that of a unit vector has another
length, that of a counter or a quantization scale fits no weights. Running statistics do have one. So ``buffers="auto"``
averages the buffers that torch's normalization layers name ``running_mean`` and ``running_var``.

A parameter under several keys (tied weights, a module used twice) is one tensor with all of these keys.

Longer than 300 lines: names, roles and the filters that choose roles depend on one another.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from nitrous_ema._base.arguments import format_bytes
from nitrous_ema._base.torch_dtypes import TORCH_CODES
from nitrous_ema.averaging.model.trackability import check_gathered, untrackable_reason
from nitrous_ema.errors import UntrackableModelError, warn
from nitrous_ema.snapshots.layout import Role, TensorRecord

BufferPolicy = Literal["auto", "average", "copy"] | Collection[str] | Callable[[str], bool]
"""Which floating-point buffers are averaged: running statistics, all, none; or a ``NameFilter`` of those averaged."""

NameFilter = Collection[str] | Callable[[str], bool]
"""Canonical names, or a function that returns whether a canonical name matches."""

# Module that defines the wrapper, its class, and the attribute that holds what it wraps. A class whose module was
# never imported has no instances, so nothing is imported to ask (torch._dynamo alone costs over a second).
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
        "_checkpoint_wrapped_module",
    ),
)
_RUNNING_STATISTICS = ("running_mean", "running_var")  # of torch.nn's batch and instance normalization
_FEW_BYTES = 2**20  # frozen parameters of a test model are worth no warning
_WRAPPER_ATTRIBUTES = frozenset(attribute for _, _, attribute in _WRAPPERS)


@dataclass(frozen=True, slots=True, eq=False)
class TrackedTensor:
    """A tensor of the model and its role; the live tensor is looked up at every use, since it may be replaced."""

    name: str
    """Canonical name: the first of ``keys``."""
    keys: tuple[str, ...]
    """Every key of the tensor in the unwrapped model's state_dict."""
    wrapped_names: tuple[str, ...]
    """The same keys in the state_dict of the model as it was passed, with the attribute names of wrapper modules."""
    role: Role
    dtype: torch.dtype
    shape: torch.Size
    persistent: bool
    is_parameter: bool
    holder: Module
    attribute: str
    is_frozen: bool = False
    """Whether it is skipped because it required no gradients (``trainable_only``)."""

    @property
    def may_resize(self) -> bool:
        """Whether the tensor may change its shape during training, as the buffers of observers do."""
        return self.role == "copied" and not self.is_parameter

    def live(self) -> Tensor:
        """Return the tensor that the model holds now.

        Raises:
            UntrackableModelError: The tensor is gone, has another type than when tracking began, has another shape and
                may not change it, or can no longer be averaged.
        """
        held = (self.holder._parameters if self.is_parameter else self.holder._buffers).get(self.attribute)
        reason = None if held is None else untrackable_reason(held)
        if reason is not None:
            raise UntrackableModelError(f"{self.name!r} {reason}.", name=self.name)
        resized = held is not None and held.shape != self.shape and not self.may_resize
        if held is None or resized or held.dtype != self.dtype:
            found = "gone" if held is None else f"{held.dtype} of shape {tuple(held.shape)}"
            raise UntrackableModelError(
                f"{self.name!r} is {found} now but was {self.dtype} of shape {tuple(self.shape)} when tracking began. "
                "Make a new EMA after changing the model, and load the old EMA's state into it where the shapes still "
                "agree. A trainer that empties or swaps parameters between steps cannot be tracked.",
                name=self.name,
            )
        return held

    @property
    def record(self) -> TensorRecord:
        """The record of this tensor in snapshot files."""
        return TensorRecord(
            name=self.name,
            keys=self.keys,
            dtype=TORCH_CODES.get(self.dtype, str(self.dtype)),  # a skipped tensor may be of any type
            shape=tuple(self.shape),
            role=self.role,
            persistent=self.persistent,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingPolicy:
    """Filters that give tensors another role than the default, by canonical name or by the name in a wrapped model."""

    param_or_buffer_names_no_ema: NameFilter | None = ()
    """Names, or a function of a name that returns a bool: these tensors are copied at each update, not averaged."""
    ignore_names: NameFilter | None = ()
    """Names, or a function of a name that returns a bool: these tensors are neither averaged nor copied nor stored."""
    ignore_startswith_names: Collection[str] | None = ()
    """Prefixes: tensors whose name starts with one of them are neither averaged nor copied nor stored."""
    buffers: BufferPolicy = "auto"
    """Which floating-point buffers that ``state_dict()`` saves are averaged: "auto": those named ``running_mean`` or
    ``running_var``; "average": all; "copy": none; or names, or a function of a name. The others are copied."""
    trainable_only: bool | None = None
    """Whether parameters that require no gradients are left to the online model: neither averaged nor copied nor
    stored. None: they are averaged, and a warning reports that they are most of the bytes."""

    def __post_init__(self) -> None:
        if isinstance(self.buffers, str) and self.buffers not in ("auto", "average", "copy"):
            raise ValueError(
                f"buffers is {self.buffers!r}; expected 'auto', 'average', 'copy', a collection of names, or a "
                "function of a name."
            )
        if self.buffers is None or isinstance(self.buffers, bool):
            raise TypeError(f"buffers is {self.buffers!r}; expected 'auto', 'average' or 'copy'.")
        if self.trainable_only is not None and not isinstance(self.trainable_only, bool):
            raise TypeError(f"trainable_only is {self.trainable_only!r}; expected True, False or None.")
        for argument in ("param_or_buffer_names_no_ema", "ignore_names", "ignore_startswith_names", "buffers"):
            names = getattr(self, argument)
            if argument == "buffers" and isinstance(names, str):
                continue
            if isinstance(names, str):
                raise TypeError(f"{argument} is the string {names!r}; expected a collection of names: [{names!r}].")
            if names is None or callable(names):
                continue
            if not isinstance(names, Iterable):
                raise TypeError(f"{argument} is {names!r}; expected a collection of names, or () for no name.")
            names = tuple(names)  # an iterator could be read only once, and the names are read for every tensor
            wrong = next((name for name in names if not isinstance(name, str)), None)
            if wrong is not None:
                raise TypeError(f"{argument} has {wrong!r:.80}; expected names of tensors, which are strings.")
            object.__setattr__(self, argument, names)


@dataclass(slots=True, eq=False)
class _Found:
    """A tensor found while walking the model, with every name under which it was found."""

    tensor: Tensor
    holder: Module
    attribute: str
    is_parameter: bool
    persistent: bool
    keys: list[str] = field(default_factory=list)
    wrapped_names: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        return [*self.keys, *self.wrapped_names]


def unwrap(model: Module) -> Module:
    """Return the model inside the outermost wrapper modules; wrappers of submodules stay."""
    return list(wrappers(model))[-1]


def wrappers(model: Module) -> Iterator[Module]:
    """Yield the outermost wrapper modules of a model, and the model itself last."""
    yield model
    while (inner := _wrapped(model)) is not None:
        model = inner[1]
        yield model


def canonical_tensors(model: Module, *, persistent_only: bool = True) -> dict[str, Tensor]:
    """Return the live tensors of a model under every key of its unwrapped ``state_dict()``.

    Tied tensors are listed under each of their keys. ``persistent_only=False`` includes non-persistent buffers.
    """
    named: dict[str, Tensor] = {}
    for found in _walk(model):
        if found.persistent or not persistent_only:
            named.update(dict.fromkeys(found.keys, found.tensor))
    return named


def without_wrappers(name: str) -> str:
    """Return a name without the parts that a wrapper module may have added, to compare names of different wrappings."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_ATTRIBUTES)


def writable_view(live: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the writable part of an expanded tensor (one of each repeated element) and the matching part of its value.

    Any other tensor is returned as it is, with its value.
    """
    for dim, (size, stride) in enumerate(zip(live.shape, live.stride(), strict=True)):
        if size > 1 and stride == 0:
            live, value = live.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    return live, value


def write(live: Tensor, value: Tensor) -> None:
    """Copy values into a tensor of the model."""
    # A frozen part of the model may have been made in inference mode, and is writable only there.
    with torch.inference_mode(live.is_inference()), torch.no_grad():
        live.copy_(value)


def check_module(model: Module) -> None:
    """Raise TypeError for a model that is not a module, such as parameters, a state_dict or a function."""
    if not isinstance(model, Module):
        raise TypeError(f"model is {model!r:.80}; expected a torch.nn.Module.")


def track(model: Module, policy: TrackingPolicy | None = None) -> tuple[TrackedTensor, ...]:
    """Return every tensor of a model with its role, in the order of its ``state_dict()``.

    Args:
        model: The online model, wrapped or not.
        policy: Filters that give tensors another role than the default.

    Raises:
        UntrackableModelError: A tensor cannot be averaged (see ``trackability``; such a tensor may be skipped by
            name), its values may be stale, or no tensor is left to average.
        ValueError: A filter matches no tensor of the model.
    """
    check_module(model)
    policy = policy or TrackingPolicy()
    for module in model.modules():
        check_gathered(module)
    found = list(_walk(model))
    _check_filters(policy, found)
    tracked = tuple(_tracked(each, policy) for each in found)
    if not any(tensor.role == "averaged" for tensor in tracked):
        raise UntrackableModelError(
            f"{type(unwrap(model)).__name__} has no tensor to average: none of its {len(tracked)} tensors is a "
            "floating-point parameter or buffer that the filters leave in. Pass a model with weights, or filter fewer "
            "tensors (param_or_buffer_names_no_ema, ignore_names, ignore_startswith_names, trainable_only).",
            name="",
        )
    if policy.trainable_only is None:
        _warn_of_frozen(tracked)
    return tracked


def _wrapped(module: Module) -> tuple[str, Module] | None:
    """Return the attribute that holds the wrapped module, and that module; None if ``module`` is not a wrapper."""
    for home, class_name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(home), class_name, None)
        if wrapper is not None and isinstance(module, wrapper):
            return attribute, getattr(module, attribute)
    return None


def _walk(model: Module) -> Iterator[_Found]:
    """Yield every tensor once, in state_dict order, after all of its names are known."""
    by_identity: dict[int, _Found] = {}

    def visit(module: Module, prefix: str, wrapped_prefix: str) -> None:
        inner = _wrapped(module)
        if inner is not None:
            visit(inner[1], prefix, f"{wrapped_prefix}{inner[0]}.")
            return
        for attribute, tensor, is_parameter, persistent in _own_tensors(module):
            found = by_identity.setdefault(id(tensor), _Found(tensor, module, attribute, is_parameter, persistent))
            # A buffer may be persistent in one module and not in another: only names that are saved are its keys.
            if persistent and not found.persistent:
                found.persistent, found.keys, found.wrapped_names = True, [], []
            if persistent == found.persistent:
                found.keys.append(prefix + attribute)
                found.wrapped_names.append(wrapped_prefix + attribute)
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.", f"{wrapped_prefix}{name}.")

    visit(model, "", "")
    yield from by_identity.values()


def _own_tensors(module: Module) -> Iterator[tuple[str, Tensor, bool, bool]]:
    """Yield (attribute, tensor, is a parameter, is persistent) for a module's own tensors, in state_dict order."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter, True, True
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            yield attribute, buffer, False, attribute not in module._non_persistent_buffers_set


def _matches(names: NameFilter | None, found: _Found) -> bool:
    if callable(names):
        return names(found.keys[0])
    return any(name in (names or ()) for name in found.names())


def _is_skipped(found: _Found, policy: TrackingPolicy) -> bool:
    prefixes = tuple(policy.ignore_startswith_names or ())
    return _matches(policy.ignore_names, found) or any(name.startswith(prefixes) for name in found.names())


def _role(found: _Found, policy: TrackingPolicy) -> Role:
    is_named = _matches(policy.param_or_buffer_names_no_ema, found)
    is_left_out = not found.persistent or _is_frozen(found, policy)
    if _is_skipped(found, policy) or (is_left_out and not is_named):
        return "skipped"
    _check_trackable(found)
    tensor = found.tensor
    if is_named or not (tensor.is_floating_point() or tensor.is_complex()):
        return "copied"
    if not found.is_parameter and not _averages_buffer(found, policy.buffers):
        return "copied"
    if not found.is_parameter and not torch.isfinite(tensor.detach().abs().float()).all():
        warn(
            f"buffer {found.keys[0]!r} holds inf or nan, which cannot be averaged, so it is copied at each update. "
            "List it in param_or_buffer_names_no_ema to silence this warning."
        )
        return "copied"
    return "averaged"


def _is_frozen(found: _Found, policy: TrackingPolicy) -> bool:
    return bool(policy.trainable_only) and found.is_parameter and not found.tensor.requires_grad


def _warn_of_frozen(tracked: Collection[TrackedTensor]) -> None:
    """Warn where most of the averaged bytes never change, as with adapters in a frozen model."""
    averaged = [tensor for tensor in tracked if tensor.role == "averaged"]
    frozen = [tensor for tensor in averaged if tensor.is_parameter and not tensor.live().requires_grad]
    num_bytes, frozen_bytes = (sum(tensor.live().nbytes for tensor in each) for each in (averaged, frozen))
    # Before requires_grad_(True) none of the parameters requires gradients.
    is_trained = len(frozen) < sum(tensor.is_parameter for tensor in averaged)
    if is_trained and frozen_bytes > num_bytes / 2 and frozen_bytes > _FEW_BYTES:
        warn(
            f"{format_bytes(frozen_bytes)} of the {format_bytes(num_bytes)} of averaged tensors are parameters that "
            "require no gradients. They take memory for each profile, and disk space in each snapshot. "
            "trainable_only=True leaves them to the online model; trainable_only=False silences this warning."
        )


def _averages_buffer(found: _Found, buffers: BufferPolicy) -> bool:
    if buffers == "auto":
        return found.attribute in _RUNNING_STATISTICS
    if isinstance(buffers, str):
        return buffers == "average"
    return _matches(buffers, found)


def _check_trackable(found: _Found) -> None:
    """Raise UntrackableModelError, with its name, for a tensor that can be neither averaged nor copied."""
    reason = untrackable_reason(found.tensor)
    if reason is None and found.tensor.dtype not in TORCH_CODES:
        reason = (
            f"is {found.tensor.dtype}, which cannot be averaged or stored. Convert it, or skip it with ignore_names"
        )
    if reason is not None:
        raise UntrackableModelError(f"{found.keys[0]!r} {reason}.", name=found.keys[0])


def _check_filters(policy: TrackingPolicy, found: list[_Found]) -> None:
    """Raise ValueError for a filter that matches nothing: a typing mistake would have no effect for the whole run."""
    names = [name for each in found for name in each.names()]
    for argument, wanted in (
        ("param_or_buffer_names_no_ema", policy.param_or_buffer_names_no_ema),
        ("ignore_names", policy.ignore_names),
        ("buffers", () if isinstance(policy.buffers, str) else policy.buffers),
    ):
        if callable(wanted):
            if not any(wanted(each.keys[0]) for each in found):
                raise ValueError(f"{argument}: the function matches none of the model's {len(found)} tensors.")
        else:
            for name in wanted or ():
                if name not in names:
                    raise ValueError(_no_match(argument, name, names))
    for prefix in policy.ignore_startswith_names or ():
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(_no_match("ignore_startswith_names", prefix, names))


def _no_match(argument: str, name: str, names: list[str]) -> str:
    known = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return f"{argument}: {name!r} matches no tensor of the model. Nearest names: {', '.join(map(repr, near))}."


def _tracked(found: _Found, policy: TrackingPolicy) -> TrackedTensor:
    role = _role(found, policy)
    return TrackedTensor(
        name=found.keys[0],
        keys=tuple(dict.fromkeys(found.keys)),
        wrapped_names=tuple(dict.fromkeys(found.wrapped_names)),
        role=role,
        dtype=found.tensor.dtype,
        shape=found.tensor.shape if not is_lazy(found.tensor) else torch.Size(),
        persistent=found.persistent,
        is_parameter=found.is_parameter,
        holder=found.holder,
        attribute=found.attribute,
        is_frozen=role == "skipped" and not _is_skipped(found, policy) and _is_frozen(found, policy),
    )
