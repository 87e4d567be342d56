"""A copy of a model's structure around other tensors, for modules that show an average."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor
from torch.nn import Module

from nitrous_ema.averaging.model.tracking import unwrap
from nitrous_ema.errors import UncopyableModelError


def structural_copy(model: Module, replacements: Mapping[int, Tensor]) -> tuple[Module, list[tuple[Module, Module]]]:
    """Return a deep copy in which tensors are replaced, or shared with the model where there is no replacement.

    Args:
        model: The online model, without wrappers.
        replacements: Tensors of the copy, by the ``id`` of the model's tensor.

    Returns:
        The copy, and every module of the model that is not a wrapper with its copy.

    Raises:
        UncopyableModelError: A submodule cannot be copied, or its ``forward`` runs other modules; names the innermost.
    """
    _refuse_patched(model)
    memo = copy_memo(model, replacements)
    try:
        copies = dict(memo)  # deepcopy adds to it also when it fails, and _culprit needs the original memo
        # Wrappers (torch.compile, checkpointing) are left out of the copy: each is replaced by the copy of the module
        # that it wraps. Inner modules first, because a wrapped module may contain other wrappers.
        for module in reversed([*model.modules()]):
            if (inner := unwrap(module)) is not module:
                copies[id(module)] = copy.deepcopy(inner, copies)
        copied = copy.deepcopy(model, copies)
    except Exception as error:
        name = _culprit(model, memo)
        raise UncopyableModelError(
            f"{name or type(model).__name__!r} cannot be copied ({type(error).__name__}: {error}), so the average has "
            "no module of its own. Pass ema_model=a function that builds the module. Averages, snapshots and synthesis "
            "work without such a module.",
            name=name,
        ) from error
    originals = [module for module in model.modules() if unwrap(module) is module]
    found = [(module, copies.get(id(module))) for module in originals]
    pairs = [(module, other) for module, other in found if isinstance(other, Module)]
    for module, other in pairs:
        for name in module._non_persistent_buffers_set:
            copy_cache(module, other, name, memo)
    return copied, pairs


def copy_cache(original: Module, copied: Module, name: str, memo: Mapping[int, Any]) -> None:
    """Give a module's copy a buffer that ``state_dict()`` does not save, as the model has it now.

    A forward of either module may write it, so it is not shared. If the copy was cast or moved, the buffer is, too.

    Args:
        original: The module.
        copied: Its copy.
        name: Name of the buffer.
        memo: From ``copy_memo``.
    """
    if name not in original._buffers:
        copied._buffers.pop(name, None)
        copied._non_persistent_buffers_set.discard(name)
        return
    held, value = copied._buffers.get(name), original._buffers[name]
    copied._non_persistent_buffers_set.add(name)
    copied._buffers[name] = None if value is None else memo.get(id(value), value)
    if value is not None and copied._buffers[name] is value:
        like = held if held is not None and held.is_floating_point() == value.is_floating_point() else value
        copied._buffers[name] = value.detach().clone().to(like)


def copy_memo(model: Module, replacements: Mapping[int, Tensor]) -> dict[int, Any]:
    """Return the memo for ``copy.deepcopy`` of parts of a model: what takes the place of tensors, by their ``id``."""
    memo: dict[int, Any] = dict(replacements)
    for tensor in [*model.parameters(), *model.buffers()]:
        memo.setdefault(id(tensor), tensor)
    for module in model.modules():
        if getattr(module, "_holds_averages", False):
            memo[id(module)] = None  # the model owns its EMA, and an EMA cannot be copied
        # A forward leaves results in attributes (weight_norm does). They belong to a graph, and cannot be copied.
        for value in module.__dict__.values():
            memo.update({id(tensor): tensor.detach() for tensor in _results(value)})
    return memo


def _results(value: Any, inside: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Yield the tensors in a value, or in containers of plain types, that autograd has computed."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif type(value) in (list, tuple, dict) and id(value) not in inside:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _results(each, (*inside, id(value)))


def _culprit(model: Module, memo: dict[int, Any]) -> str:
    """Return the name of the innermost submodule that cannot be copied; empty for the model itself."""
    innermost_first = sorted(model.named_modules(), key=lambda named: -named[0].count(".") if named[0] else 1)
    for name, module in innermost_first:
        try:
            copy.deepcopy(module, dict(memo))
        except Exception:
            return str(name)
    return ""


def _refuse_patched(model: Module) -> None:
    """Raise UncopyableModelError if a submodule's ``forward`` was replaced by one that could run other modules."""
    for name, module in model.named_modules():
        patched = module.__dict__.get("forward") if unwrap(module) is module else None
        if patched is not None and _refers_to_modules(patched):
            patch = getattr(patched, "__qualname__", type(patched).__name__)
            raise UncopyableModelError(
                f"forward of {name or type(model).__name__!r} was replaced by {patch}, which refers to other objects: "
                "a copy of the module would still run the objects of the online model. Pass ema_model=a function that "
                "builds the module. Averages, snapshots and synthesis work without such a module.",
                name=name,
            )


def _refers_to_modules(patched: Any) -> bool:
    """Return whether a copy of a module with this forward could run another module.

    deepcopy replaces the module of a bound method and the arguments of a partial, but copies no closure of a function.
    """
    if isinstance(patched, FunctionType):
        return bool(patched.__closure__)  # an unbound function can know its module by its closure only
    while isinstance(patched, (MethodType, partial)):
        patched = patched.__func__ if isinstance(patched, MethodType) else patched.func
    cells = (patched.__closure__ or ()) if isinstance(patched, FunctionType) else ()
    contents = [getattr(cell.cell_contents, "__self__", cell.cell_contents) for cell in cells]
    return any(isinstance(content, Module) for content in contents)
