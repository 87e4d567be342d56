"""Ordering behind the averaging within a compiled graph.

A hook that Python runs would end the graph, so the graph has a custom operator, which runs at each call. Compilers
order operators by the tensors that they read and write: a forward reads the operator's outputs, which are copies of the
model's inputs, in the place of these inputs.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # not in torch 2.6
_numbers = itertools.count()
_prepare: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(prepare: Any) -> int:
    """Return the number by which a compiled graph calls ``prepare.prepare_compiled()``; the object is held weakly."""
    _define()
    number = next(_numbers)
    _prepare[number] = prepare
    return number


def ordered(value: Any, number: int) -> Any:
    """Return arguments of a forward whose tensors are ordered behind the averaging; called while a graph is traced."""
    if _is_exporting():
        raise RuntimeError("ema_model cannot be exported, because its values change. Export copy.deepcopy(ema_model).")
    tensors: list[Tensor] = []
    _collect(value, tensors)
    if not tensors:
        raise RuntimeError(
            "ema_model is compiled, and its forward has no tensor among its arguments, after which its work could be "
            "ordered. Call it uncompiled, or compile copy.deepcopy(ema_model)."
        )
    return _replace(value, iter(torch.ops.nitrous_ema.order_behind_averaging(tensors, number)))


def _collect(value: Any, tensors: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif type(value) in (list, tuple):
        for each in value:
            _collect(each, tensors)
    elif type(value) is dict:
        for each in value.values():
            _collect(each, tensors)


def _replace(value: Any, tensors: Any) -> Any:
    """Return a copy of the containers that ``_collect`` walks, with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if type(value) is list:
        return [_replace(each, tensors) for each in value]
    if type(value) is tuple:
        return tuple([_replace(each, tensors) for each in value])
    if type(value) is dict:
        return {key: _replace(each, tensors) for key, each in value.items()}
    return value


@functools.cache
def _define() -> None:
    """Define the operator, once in a process."""
    name = "nitrous_ema::order_behind_averaging"
    # A CUDA graph would record the waits of one call for every replay; torch 2.7 and earlier have no such tag.
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    torch.library.define(name, "(Tensor[] inputs, int number) -> Tensor[]", tags=() if unsafe is None else (unsafe,))
    torch.library.impl(name, "CompositeExplicitAutograd", _order)
    torch.library.register_fake(name, _copies)
    torch.library.register_autograd(name, lambda context, gradients: (gradients, None))


def _order(inputs: Sequence[Tensor], number: int) -> list[Tensor]:
    prepare = _prepare.get(number)
    if prepare is not None:
        prepare.prepare_compiled()
    return _copies(inputs, number)


def _copies(inputs: Sequence[Tensor], number: int) -> list[Tensor]:
    return [tensor.clone() for tensor in inputs]
