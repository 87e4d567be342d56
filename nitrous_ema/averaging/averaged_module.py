"""Evaluate with an average: in a second module (``AveragedModule``), or in the online model itself (``swapped``).

The second module must show the newest average without costing memory for another copy of it. It is therefore the online
model's structure, copied without its tensors. Averaged and copied tensors have the memory of the average; where the
model's type differs from the average's, they are cast copies that are refreshed before each use. Skipped tensors are
the online model's own. The module stays in eval mode, because a forward in train mode would write statistics, or weights, into the
averages.

``swapped`` needs no second module, but memory for a copy of the weights, and training must pause meanwhile.

Pickles of the module name ``_BeforeForward`` and ``_eval_only`` of this file. Both names stay here, so that saved
modules can be loaded by later versions (test_saved_modules_find_the_names_that_their_pickles_hold).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.kernels.flat_buffers import move_versions
from nitrous_ema.averaging.model.live_tensors import holding_averages
from nitrous_ema.averaging.model.tracking import TrackedTensor, canonical_tensors, unwrap, writable_view, write
from nitrous_ema.errors import NitrousError, UncopyableModelError

Average = tuple[TrackedTensor, Tensor]

_EVAL_ONLY = "A model of averages stays in eval mode: a forward in train mode would write into the averages."


class AveragedModule:
    """Builds the module of one average, and refreshes its values before each use.

    Args:
        engine: The engine of the average.
        profile: Index of the average among the engine's profiles.
        template: A module, or a function that builds it, to use instead of a copy of the online model's structure.

    Raises:
        TypeError: ``template`` is neither a module nor callable.
        ValueError: ``template`` is the online model.
    """

    def __init__(self, engine: AveragingEngine, profile: int, template: Module | Callable[[], Module] | None) -> None:
        if not (template is None or isinstance(template, Module) or callable(template)):
            raise TypeError(f"ema_model is {template!r:.80}; expected a module, or a function that builds one.")
        if isinstance(template, Module) and unwrap(template) is unwrap(engine.model):
            raise ValueError("ema_model is the online model itself; expected a second module of the same architecture.")
        self._engine = engine
        self._profile = profile
        self._template = template
        self._module: Module | None = None
        self._tensors: dict[str, Tensor] = {}  # averaged and copied tensors of the module, by canonical name
        self._casts: list[tuple[Tensor, Tensor]] = []  # a tensor of the module, and the average that it is cast from
        engine.viewers.add(self)

    def module(self) -> Module:
        """Return the module, with the current values. It is built at the first call.

        Raises:
            UncopyableModelError: The model cannot be copied, or the template lacks a tensor.
        """
        self._engine.order_readers("ema_model")
        with neutral_modes():
            if self._module is None:
                self._module = self._build()
            self._refresh()
        return self._module

    def rebind(self) -> None:
        """Use the averages' memory after they have moved; the module and its tensors stay the same objects."""
        self._casts = []
        for tracked, average in self._averages() if self._tensors else ():
            tensor = self._tensors[tracked.name]
            if average.dtype == tracked.dtype:
                _set(tensor, average)
            else:
                _set(tensor, torch.empty_like(average, dtype=tracked.dtype))
                self._casts.append((tensor, average))

    def mark_written(self) -> None:
        """Move the version counters of the module's tensors that have the memory of averages."""
        casts = {id(tensor) for tensor, _ in self._casts}
        move_versions([tensor for tensor in self._tensors.values() if id(tensor) not in casts])

    def prepare_forward(self, module: Module) -> None:
        """Order a forward after the averaging. Raises RuntimeError if a submodule is in train mode."""
        for name, submodule in module.named_modules():
            if submodule.training:
                raise RuntimeError(
                    f"{name or type(module).__name__!r} was put in train mode. {_EVAL_ONLY} Call eval() on it."
                )
        self._engine.order_readers("forward of an averaged model")
        with neutral_modes():
            self._refresh()

    def _build(self) -> Module:
        template = self._template if isinstance(self._template, Module) or self._template is None else self._template()
        averages = list(self._averages())
        if template is None:
            online = unwrap(self._engine.model)
            _refuse_patched(online)
            self._tensors = {tracked.name: _replacement(tracked, average) for tracked, average in averages}
            module = _structural_copy(online, {id(t.live()): self._tensors[t.name] for t, _ in averages})
        else:
            module = unwrap(template)
            self._tensors = _tensors_of_template(module, averages)
            module.requires_grad_(False)
        self.rebind()
        module.eval()
        module.__dict__["train"] = partial(_eval_only, module)  # a bound method could be copied but not pickled
        module.register_forward_pre_hook(_BeforeForward(weakref.ref(self)))
        return module

    def _averages(self) -> Iterator[Average]:
        yield from self._engine.flat_buffers.averages(self._profile)
        yield from self._engine.flat_buffers.copies()

    def _refresh(self) -> None:
        for tensor, average in self._casts:
            tensor.copy_(average)


@contextmanager
def swapped(engine: AveragingEngine, profile: int) -> Iterator[None]:
    """Put an average into the online model for a ``with`` block, and restore the weights at its end.

    The tensors and their storages stay the same objects. Needs memory for one copy of the averaged tensors, in their
    own types. The weights are restored whatever the block raises, and the engine refuses updates and reads meanwhile.
    """
    engine.order_readers("average_parameters()")
    engine.fence_all_readers()  # the weights are about to be written, and any EMA may still be reading them
    with neutral_modes():
        pairs = [writable_view(tracked.live(), average) for tracked, average in engine.flat_buffers.averages(profile)]
        weights = [live.detach().clone() for live, _ in pairs]
    refusal = NitrousError(
        "the model currently holds averaged weights. Leave the `with ema.average_parameters()` block first."
    )
    engine.refuse(refusal)
    try:
        with holding_averages([tracked.live() for tracked in engine.flat_buffers.averaged]):
            with neutral_modes():
                for live, average in pairs:
                    write(live, average)
            yield
    finally:
        try:
            with neutral_modes():
                for (live, _), weight in zip(pairs, weights, strict=True):
                    write(live, weight)
        finally:
            engine.end_refusal(refusal)


class _BeforeForward:
    """Forward pre-hook that brings the module up to date.

    It holds a weak reference only, so a module that outlives its EMA retains the last values. Copies and pickles of the
    module get a hook without a reference, which does nothing: they are snapshots of the module.
    """

    def __init__(self, averaged_module: weakref.ref[AveragedModule] | None = None) -> None:
        self._averaged_module = averaged_module

    def __call__(self, module: Module, _: Any) -> None:
        averaged_module = self._averaged_module() if self._averaged_module is not None else None
        if averaged_module is not None:
            averaged_module.prepare_forward(module)

    def __reduce__(self) -> tuple[type[_BeforeForward], tuple[()]]:
        return _BeforeForward, ()


def _eval_only(module: Module, mode: bool = True) -> Module:
    """Replace ``Module.train`` of the module: put it in eval mode, or raise RuntimeError for train mode."""
    if mode:
        raise RuntimeError(f"train() on a model of averages. {_EVAL_ONLY} Train the online model.")
    return Module.train(module, False)


def _replacement(tracked: TrackedTensor, average: Tensor) -> Tensor:
    value = average.data  # with a version counter of its own, because the tensor may become a copy in another type
    if not tracked.is_parameter:
        return value
    parameter = Parameter(value, requires_grad=False)
    parameter.__dict__.update(tracked.live().__dict__)  # attributes that model code has set on the parameter
    return parameter


def _set(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor the storage of another one; the object stays the same."""
    try:
        tensor.data = value
    except RuntimeError:  # raised between some kinds of device
        # swap_tensors also swaps the class and the attributes, so the other tensor needs the same ones.
        other = Parameter(value, requires_grad=False) if isinstance(tensor, Parameter) else value.detach()
        other.__dict__.update(tensor.__dict__)
        torch.utils.swap_tensors(tensor, other)  # type: ignore[no-untyped-call]


def _structural_copy(model: Module, replacements: dict[int, Tensor]) -> Module:
    """Return a deep copy in which tensors are replaced, or shared with the model where there is no replacement.

    Args:
        model: The online model, without wrappers.
        replacements: Tensors of the copy, by the ``id`` of the model's tensor.

    Raises:
        UncopyableModelError: A submodule cannot be copied; names the innermost one.
    """
    memo: dict[int, Any] = dict(replacements)
    for tensor in [*model.parameters(), *model.buffers()]:
        memo.setdefault(id(tensor), tensor)
    for module in model.modules():
        if getattr(module, "_holds_averages", False):
            memo[id(module)] = None  # the model owns its EMA, and an EMA cannot be copied
    try:
        copies = dict(memo)  # deepcopy adds to it also when it fails, and _culprit needs the original memo
        # Wrappers (torch.compile, checkpointing) are left out of the copy: each is replaced by the copy of the module
        # that it wraps. Inner modules first, because a wrapped module may contain other wrappers.
        for module in reversed([*model.modules()]):
            if (inner := unwrap(module)) is not module:
                copies[id(module)] = copy.deepcopy(inner, copies)
        return copy.deepcopy(model, copies)
    except Exception as error:
        name = _culprit(model, memo)
        raise UncopyableModelError(
            f"{name or type(model).__name__!r} cannot be copied ({type(error).__name__}: {error}), so the average has "
            "no module of its own. Pass ema_model=a function that builds the module. Averages, snapshots and synthesis "
            "work without such a module.",
            name=name,
        ) from error


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


def _tensors_of_template(template: Module, averages: list[Average]) -> dict[str, Tensor]:
    """Return the template's tensors by canonical name. Raises UncopyableModelError for another architecture."""
    found = canonical_tensors(template, persistent_only=False)
    tensors = {}
    for tracked, average in averages:
        tensor = found.get(tracked.name)
        if tensor is None or tensor.shape != average.shape:
            difference = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UncopyableModelError(
                f"ema_model: {tracked.name!r} {difference}; the online model has it with shape "
                f"{tuple(average.shape)}. Build ema_model with the same architecture.",
                name=tracked.name,
            )
        untied = [key for key in tracked.keys if found.get(key) is not tensor]
        if untied:
            raise UncopyableModelError(
                f"ema_model: {untied[0]!r} and {tracked.name!r} are one tensor in the online model, but two in "
                "ema_model. Build ema_model with the same ties.",
                name=tracked.name,
            )
        tensors[tracked.name] = tensor
    return tensors
