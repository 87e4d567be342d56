"""What distinguishes the module of an average from any module of its class: a few instance attributes and a hook.

The module is brought up to date before each forward, stays in eval mode, and refuses methods that would write into the
averages. Its copies and pickles are plain modules: they share nothing with the averages, need nothing of this library,
and can be trained.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch.nn import Module, Parameter

from nitrous_ema.averaging import compiled_forward

EVAL_ONLY = "A model of averages stays in eval mode: a forward in train mode would write into the averages."
_MERGING = ("merge_and_unload", "merge_adapter")


class Updatable(Protocol):
    """The owner of a module of averages, which brings it up to date."""

    def prepare_copy(self) -> None:
        """Bring the module up to date, because it is about to be copied."""

    def prepare_forward(self, module: Module) -> None:
        """Bring the module up to date, because it is about to run."""


class ModuleOverrides:
    """The instance attributes and the hook of one module of averages.

    The module outlives its owner, which is held weakly: then it retains the last values.

    Args:
        module: The module.
        owner: Brings it up to date.
    """

    def __init__(self, module: Module, owner: Updatable) -> None:
        self._module = module
        self._owner = weakref.ref(owner)
        self._number = compiled_forward.register(self)
        self.trainable: frozenset[int] = frozenset()
        """The ``id`` of each parameter of the module that requires gradients in copies and pickles."""
        self._hook = module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        module.__dict__.update(self._entries())
        for submodule in module.modules():
            for name in _writing_methods(type(submodule)):
                submodule.__dict__[name] = _Refusal(submodule, name)

    def prepare_compiled(self) -> None:
        """Bring the module up to date; called by the operator of a compiled graph."""
        if (owner := self._owner()) is not None:
            owner.prepare_forward(self._module)

    def _entries(self) -> dict[str, Any]:
        return {"train": self._train, "__deepcopy__": self._deep_copy, "__reduce_ex__": self._reduce}

    def _before_forward(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return compiled_forward.ordered((args, kwargs), self._number)
        if (owner := self._owner()) is not None:
            owner.prepare_forward(module)
        return None

    def _train(self, mode: bool = True) -> Module:
        """Replace ``Module.train``: put the module in eval mode, or raise RuntimeError for train mode."""
        if mode:
            raise RuntimeError(
                f"train() on a model of averages. {EVAL_ONLY} Train the online model, or copy.deepcopy(ema_model)."
            )
        return Module.train(self._module, False)

    def _deep_copy(self, memo: dict[int, Any]) -> Module:
        # A submodule of the module that is being copied may refer to the module.
        plain: Module | None = memo.get(id(self))
        return copy.deepcopy(self._plain() if plain is None else plain, memo)

    def _reduce(self, protocol: int) -> Any:
        return operator.getitem, ((self._plain(),), 0)

    def _plain(self) -> Module:
        """Return a plain module with the memory of this one. Parameters require gradients as in the online model."""
        if (owner := self._owner()) is not None:
            owner.prepare_copy()
        bare = type(self._module).__new__(type(self._module))
        entries = self._entries()
        bare.__dict__.update({name: value for name, value in self._module.__dict__.items() if name not in entries})
        for name, hooks in [*bare.__dict__.items()]:
            if isinstance(hooks, OrderedDict) and self._hook.id in hooks:
                bare.__dict__[name] = OrderedDict((key, hook) for key, hook in hooks.items() if key != self._hook.id)
        memo: dict[int, Any] = {id(self): bare}
        for parameter in self._module.parameters():
            memo[id(parameter)] = self._alias(parameter)
        for buffer in self._module.buffers():
            memo[id(buffer)] = buffer.detach() if type(buffer) is torch.Tensor else buffer
        return copy.deepcopy(bare, memo)

    def _alias(self, parameter: Parameter) -> Parameter:
        if type(parameter) is not Parameter:
            return parameter  # a class with its own constructor, such as those of quantized weights
        # Parameters shared with the online model require gradients here as well.
        requires_grad = parameter.requires_grad or id(parameter) in self.trainable
        alias = Parameter(parameter.detach(), requires_grad=requires_grad)
        alias.__dict__.update(parameter.__dict__)
        return alias


class _Refusal:
    """Takes the place of a method that merges adapters in place, which no version counter shows.

    In copies of the module it is the method itself.
    """

    def __init__(self, module: Module, name: str) -> None:
        self._module = module
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"{self._name}() on a model of averages would write into the averages, and into the online model's own "
            f"weights where ema_model shares them. Call it on copy.deepcopy(ema_model)."
        )

    def __reduce__(self) -> Any:
        return getattr, (self._module, self._name)


def _writing_methods(kind: type[Module]) -> Iterable[str]:
    yield from (name for name in _MERGING if hasattr(kind, name))
    if hasattr(kind, "merge") and hasattr(kind, "unmerge"):  # a layer of adapters
        yield "merge"
