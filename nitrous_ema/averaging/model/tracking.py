"""Which tensors of a model are averaged, copied or skipped, and what each is called.

Names are *canonical*: the keys of the unwrapped model's ``state_dict()``. A wrapper module (``torch.compile``, DDP,
``DataParallel``, activation checkpointing) is recognized by its type, at any depth, and leaves the name; a user's own
submodule that happens to be called ``module`` keeps it.

=========  =============================================================  ==============================================
role       which tensors                                                  what happens at an applied update
=========  =============================================================  ==============================================
averaged   floating-point and complex64 parameters and persistent buffers one average per profile moves towards it
copied     integers, ``param_or_buffer_names_no_ema``, non-persistent     the value of that moment is kept, once
           buffers, floating-point buffers that hold inf or nan
skipped    ``ignore_names``, ``ignore_startswith_names``                  nothing; it is not in snapshots either
=========  =============================================================  ==============================================

A parameter that stands under several keys (tied weights, a module used twice) is one tensor that remembers all of them.
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

from nitrous_ema._base.torch_dtypes import TORCH_CODES
from nitrous_ema.averaging.model.trackability import check_gathered, untrackable_reason
from nitrous_ema.errors import UntrackableModelError, warn
from nitrous_ema.snapshots.layout import TensorRecord

Role = Literal["averaged", "copied", "skipped"]
NameFilter = Collection[str] | Callable[[str], bool]
"""Canonical names, or a function of one that returns whether it is meant."""

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
_WRAPPER_ATTRIBUTES = frozenset(attribute for _, _, attribute in _WRAPPERS)


@dataclass(frozen=True, slots=True, eq=False)
class TrackedTensor:
    """One tensor of the model, found again at every use: its storage, even its object, may have been replaced."""

    name: str
    """Canonical name: the first of ``keys``."""
    keys: tuple[str, ...]
    """Every key of the unwrapped model's state_dict under which it stands."""
    wrapped_names: tuple[str, ...]
    """The same with the attribute names of wrapper modules left in, as the given model's state_dict has them."""
    role: Role
    dtype: torch.dtype
    shape: torch.Size
    persistent: bool
    is_parameter: bool
    holder: Module
    attribute: str

    def live(self) -> Tensor:
        """The tensor that the model holds now.

        Raises:
            UntrackableModelError: It is gone, has another shape or type than when tracking began, or became something
                that cannot be averaged.
        """
        held = (self.holder._parameters if self.is_parameter else self.holder._buffers).get(self.attribute)
        problem = None if held is None else untrackable_reason(held)
        if problem is not None:
            raise UntrackableModelError(f"{self.name!r} {problem}.", name=self.name)
        if held is None or held.shape != self.shape or held.dtype != self.dtype:
            found = "gone" if held is None else f"{held.dtype} of shape {tuple(held.shape)}"
            raise UntrackableModelError(
                f"{self.name!r} is {found} now but was {self.dtype} of shape {tuple(self.shape)} when tracking began. "
                "Make a new EMA after changing the model (and load its state where the shapes still agree). A trainer "
                "that empties or swaps parameters between steps cannot be tracked.",
                name=self.name,
            )
        return held

    @property
    def record(self) -> TensorRecord:
        """What a snapshot file says of this tensor."""
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
    """Which tensors leave the default role, by canonical name; names as the wrapped model has them are understood."""

    copied: NameFilter | None = ()
    """Copied at each update instead of averaged (``param_or_buffer_names_no_ema``)."""
    skipped: NameFilter | None = ()
    """Left out entirely (``ignore_names``)."""
    skipped_prefixes: Collection[str] | None = ()
    """Left out entirely if the name starts with one of these (``ignore_startswith_names``)."""

    def __post_init__(self) -> None:
        for argument, field_name in (
            ("param_or_buffer_names_no_ema", "copied"),
            ("ignore_names", "skipped"),
            ("ignore_startswith_names", "skipped_prefixes"),
        ):
            given = getattr(self, field_name)
            if isinstance(given, str):
                raise TypeError(f"{argument} is the string {given!r}; expected a collection of names: [{given!r}].")
            if given is None or callable(given):
                continue
            if not isinstance(given, Iterable):
                raise TypeError(f"{argument} is {given!r}; expected names, or () for none.")
            names = tuple(given)  # asked again and again, which an iterator does not survive
            wrong = next((name for name in names if not isinstance(name, str)), None)
            if wrong is not None:
                raise TypeError(f"{argument} has {wrong!r:.80}; expected names of tensors, which are strings.")
            object.__setattr__(self, field_name, names)


@dataclass(slots=True, eq=False)
class _Found:
    """A tensor met while walking the model, and every name it was met under."""

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
    """The model without the wrapper modules around it (those inside it stay)."""
    inner = _wrapped(model)
    while inner is not None:
        model = inner[1]
        inner = _wrapped(model)
    return model


def canonical_tensors(model: Module, *, persistent_only: bool = True) -> dict[str, Tensor]:
    """The live tensors of a model under every key of its unwrapped ``state_dict()``.

    Tied tensors stand under each of their keys; non-persistent buffers are left out unless asked for.
    """
    named: dict[str, Tensor] = {}
    for found in _walk(model):
        if found.persistent or not persistent_only:
            named.update(dict.fromkeys(found.keys, found.tensor))
    return named


def without_wrappers(name: str) -> str:
    """A name without every part that could come from a wrapper module: to compare names of different wrappings."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_ATTRIBUTES)


def writable_view(live: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The part of an expanded tensor that can be written (one of each repeated element), and its new value.

    Any other tensor is given back as it is.
    """
    for dim, (size, stride) in enumerate(zip(live.shape, live.stride(), strict=True)):
        if size > 1 and stride == 0:
            live, value = live.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    return live, value


def write(live: Tensor, value: Tensor) -> None:
    """Give a tensor of the model other values; a frozen part may have been made in inference mode."""
    with torch.inference_mode(live.is_inference()), torch.no_grad():
        live.copy_(value)


def check_module(model: Module) -> None:
    """Raises TypeError for what is no module: parameters, a state_dict, a function."""
    if not isinstance(model, Module):
        raise TypeError(f"model is {model!r:.80}; expected a torch.nn.Module.")


def track(model: Module, policy: TrackingPolicy | None = None) -> tuple[TrackedTensor, ...]:
    """Every tensor of a model with its role, in the order of its ``state_dict()``.

    Args:
        model: The online model, wrapped or not.
        policy: Which tensors leave the default role.

    Raises:
        UntrackableModelError: A tensor cannot be averaged (see ``trackable``; such a tensor may still be skipped by
            name), its values may be stale, or nothing is left to average.
        ValueError: A filter names something that the model does not have.
    """
    check_module(model)
    policy = policy or TrackingPolicy()
    for module in model.modules():
        check_gathered(module)
    found = list(_walk(model))
    _check_filters(policy, found)
    tracked = tuple(_tracked(each, _role(each, policy)) for each in found)
    if not any(tensor.role == "averaged" for tensor in tracked):
        raise UntrackableModelError(
            f"{type(unwrap(model)).__name__} has nothing to average: none of its {len(tracked)} tensors is a "
            "floating-point parameter or buffer that the filters leave in. Pass a model with weights, or filter less.",
            name="",
        )
    return tracked


def _wrapped(module: Module) -> tuple[str, Module] | None:
    """The attribute and the module that a wrapper wraps; None for any other module."""
    for home, class_name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(home), class_name, None)
        if wrapper is not None and isinstance(module, wrapper):
            return attribute, getattr(module, attribute)
    return None


def _walk(model: Module) -> Iterator[_Found]:
    """Every tensor once, in state_dict order, with all its names. Yields only when all names are known."""
    by_identity: dict[int, _Found] = {}

    def visit(module: Module, prefix: str, wrapped_prefix: str) -> None:
        inner = _wrapped(module)
        if inner is not None:
            visit(inner[1], prefix, f"{wrapped_prefix}{inner[0]}.")
            return
        for attribute, tensor, is_parameter, persistent in _own_tensors(module):
            found = by_identity.setdefault(id(tensor), _Found(tensor, module, attribute, is_parameter, persistent))
            if persistent and not found.persistent:  # names that are not saved are no keys of what is
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
    """(attribute, tensor, is a parameter, is persistent) of what one module holds itself, in state_dict order."""
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
    prefixes = tuple(policy.skipped_prefixes or ())
    return _matches(policy.skipped, found) or any(name.startswith(prefixes) for name in found.names())


def _role(found: _Found, policy: TrackingPolicy) -> Role:
    if _is_skipped(found, policy):
        return "skipped"
    _check_trackable(found)
    tensor = found.tensor
    if _matches(policy.copied, found) or not (tensor.is_floating_point() or tensor.is_complex()):
        return "copied"
    if not found.persistent:
        return "copied"  # a cache that the model rebuilds, often a mask with -inf: averaging would give nan
    if not found.is_parameter and not torch.isfinite(tensor.detach().abs().float()).all():
        warn(
            f"Buffer {found.keys[0]!r} holds inf or nan, of which no average exists; it is copied at each update "
            "instead. Name it in param_or_buffer_names_no_ema to say that this is meant."
        )
        return "copied"
    return "averaged"


def _check_trackable(found: _Found) -> None:
    """Refuse, by name, what cannot be averaged or stored."""
    problem = untrackable_reason(found.tensor)
    if problem is None and found.tensor.dtype not in TORCH_CODES:
        problem = (
            f"is {found.tensor.dtype}, which cannot be averaged or stored. Convert it, or skip it with ignore_names"
        )
    if problem is not None:
        raise UntrackableModelError(f"{found.keys[0]!r} {problem}.", name=found.keys[0])


def _check_filters(policy: TrackingPolicy, found: list[_Found]) -> None:
    """A filter that matches nothing is a typing mistake, and would be silent for the whole run."""
    names = [name for each in found for name in each.names()]
    for argument, given in (("param_or_buffer_names_no_ema", policy.copied), ("ignore_names", policy.skipped)):
        if callable(given):
            if not any(given(each.keys[0]) for each in found):
                raise ValueError(f"{argument}: the function matches none of the model's {len(found)} tensors.")
        else:
            for name in given or ():
                if name not in names:
                    raise ValueError(_no_match(argument, name, names))
    for prefix in policy.skipped_prefixes or ():
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(_no_match("ignore_startswith_names", prefix, names))


def _no_match(argument: str, name: str, names: list[str]) -> str:
    known = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return f"{argument}: {name!r} matches no tensor of the model. Nearest names: {', '.join(map(repr, near))}."


def _tracked(found: _Found, role: Role) -> TrackedTensor:
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
    )
