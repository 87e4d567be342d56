"""Attributes of the online model that are no tensors of it, such as the scaling of LoRA layers, followed by a copy.

A copy of the model's structure has the attributes of the moment at which it was made. Where the model's attribute has
another value by now, the copy gets the new value. An attribute that a user has set on the copy stays until then.
Buffers that ``state_dict()`` does not save are followed in the same way: they are caches, and belong to attributes such
as the length that they were made for.

Values are compared with a *fingerprint* of the copied ones. Numbers, strings and containers count by value, tensors by
object and version counter, and other objects by object and by their own attributes, two levels deep. Containers of more
than 10,000 entries count by object and length.
"""

from __future__ import annotations

import copy
import enum
import hashlib
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from nitrous_ema.averaging.model.structural_copy import copy_cache
from nitrous_ema.errors import UncopyableModelError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size, type)
_BY_OBJECT = (Module, FunctionType, BuiltinFunctionType, MethodType)
_CONTAINERS = (dict, list, tuple, deque, set, frozenset)
_LEVELS = 2
_MOST_ENTRIES = 10_000
# Those of every module, which are no state of the model; forward, which structural_copy checks when it copies; and the
# trainer of a LightningModule, which its copies do not have either.
_NOT_FOLLOWED = frozenset({*Module().__dict__, "forward", "train", "_compiled_call_impl", "_trainer", "_fabric"})
_MISSING = object()
_CACHE = "buffer "  # begins the names of buffers; names of attributes have no spaces


class FollowedAttributes:
    """The attributes of a model's modules, and those of their copies.

    Args:
        pairs: Every module of the model with its copy, which has the model's attributes as they are now.
    """

    def __init__(self, pairs: Sequence[tuple[Module, Module]]) -> None:
        self._pairs = pairs
        self._seen = [_fingerprints(original) for original, _ in pairs]

    def follow(self, memo: Callable[[], dict[int, Any]]) -> None:
        """Copy the attributes whose value in the model has changed since they were copied.

        Args:
            memo: Returns the memo of ``copy.deepcopy`` for tensors; called if anything has changed.

        Raises:
            UncopyableModelError: A new value cannot be copied.
        """
        now = [_fingerprints(original) for original, _ in self._pairs]
        changed = [index for index, (new, seen) in enumerate(zip(now, self._seen, strict=True)) if new != seen]
        if not changed:
            return
        modules = {id(original): copied for original, copied in self._pairs}
        for index in changed:
            new, seen = now[index], self._seen[index]
            names = [name for name in {**seen, **new} if new.get(name, _MISSING) != seen.get(name, _MISSING)]
            _copy(*self._pairs[index], names, {**memo(), **modules})
            self._seen[index] = new


def _copy(original: Module, copied: Module, names: Sequence[str], memo: dict[int, Any]) -> None:
    for name in names:
        if name.startswith(_CACHE):
            copy_cache(original, copied, name.removeprefix(_CACHE), memo)
            continue
        if name not in original.__dict__:
            copied.__dict__.pop(name, None)
            continue
        try:
            copied.__dict__[name] = copy.deepcopy(original.__dict__[name], memo)
        except Exception as error:
            raise UncopyableModelError(
                f"attribute {name!r} of a {type(original).__name__} has changed since ema_model was built and cannot "
                f"be copied ({type(error).__name__}: {error}). Evaluate with average_parameters(), or pass "
                "ema_model=a function that builds the module.",
                name=name,
            ) from error


def _fingerprints(module: Module) -> Mapping[str, Any]:
    found = {name: _fingerprint(value) for name, value in module.__dict__.items() if name not in _NOT_FOLLOWED}
    caches = module._non_persistent_buffers_set & module._buffers.keys()
    return found | {_CACHE + name: _fingerprint(module._buffers[name]) for name in caches}


def _fingerprint(value: Any, levels: int = _LEVELS, inside: tuple[int, ...] = ()) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return _Same(value, 0 if value.is_inference() else value._version)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return value.shape, value.dtype.str, hashlib.sha256(value.tobytes()).digest()
    if id(value) in inside or isinstance(value, _BY_OBJECT):
        return _Same(value)
    if isinstance(value, _CONTAINERS) and len(value) > _MOST_ENTRIES:
        return _Same(value, len(value))
    inside = (*inside, id(value))
    if isinstance(value, dict):
        parts = [(_fingerprint(key, levels, inside), _fingerprint(value[key], levels, inside)) for key in value]
        return type(value), tuple(parts)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(value)
    if isinstance(value, _CONTAINERS):
        return type(value), tuple(_fingerprint(each, levels, inside) for each in value)
    if levels and hasattr(value, "__dict__"):
        return _Same(value), _fingerprint(vars(value), levels - 1, inside)
    return _Same(value)


class _Same:
    """An object, compared by identity; held weakly where that is possible."""

    def __init__(self, value: Any, version: int = 0) -> None:
        try:
            self._value: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._value = lambda: value
        self._version = version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._version != other._version:
            return False
        value = self._value()
        return value is not None and value is other._value()

    __hash__ = None  # type: ignore[assignment]
