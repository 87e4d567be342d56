"""A second module whose weights are an average: for evaluation, sampling, or saving.

It is the online model's structure, copied without copying its tensors: averaged and copied tensors are views of the
average (a cast copy, refreshed before use, where the model's type is another one), skipped ones are the online model's
own. It stays in eval mode: a forward in train mode would write statistics, or weights, into the averages.
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
from nitrous_ema.averaging.model.live_tensors import holding_averages
from nitrous_ema.averaging.model.tracking import TrackedTensor, canonical_tensors, unwrap, writable_view, write
from nitrous_ema.errors import NitrousError, UncopyableModelError

Average = tuple[TrackedTensor, Tensor]

_EVAL_ONLY = "A model of averages stays in eval mode: a forward in train mode would write into the averages."


class AveragedModule:
    """Builds and keeps the module of one average.

    Args:
        engine: Whose average it is.
        profile: Which of its profiles.
        template: A module, or a function that builds it, to use instead of a copy of the online model's structure.
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
        self._held: dict[str, Tensor] = {}  # what the module holds, by canonical name
        self._casts: list[tuple[Tensor, Tensor]] = []  # the module's tensor, and the average it is cast from
        engine.viewers.add(self)

    def module(self) -> Module:
        """The module, with the values of now.

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
        """Follow the averages to other buffers; the module and its tensors stay the same objects."""
        self._casts = []
        for tracked, average in self._averages() if self._held else ():
            held = self._held[tracked.name]
            if average.dtype == tracked.dtype:
                _set(held, average)
            else:
                _set(held, torch.empty_like(average, dtype=tracked.dtype))
                self._casts.append((held, average))

    def prepare_forward(self, module: Module) -> None:
        """Order a forward after the averaging, and refuse one in train mode."""
        for name, submodule in module.named_modules():
            if submodule.training:
                raise RuntimeError(f"{name or type(module).__name__!r} was put in train mode. {_EVAL_ONLY}")
        self._engine.order_readers("forward of an averaged model")
        with neutral_modes():
            self._refresh()

    def _build(self) -> Module:
        template = self._template if isinstance(self._template, Module) or self._template is None else self._template()
        averages = list(self._averages())
        if template is None:
            online = unwrap(self._engine.model)
            _refuse_patched(online)
            self._held = {tracked.name: _replacement(tracked, average) for tracked, average in averages}
            module = _structural_copy(online, {id(t.live()): self._held[t.name] for t, _ in averages})
        else:
            module = unwrap(template)
            self._held = _tensors_of_template(module, averages)
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
        for held, average in self._casts:
            held.copy_(average)


class _BeforeForward:
    """Forward pre-hook. Holds nothing: a module that outlives its EMA keeps the last values."""

    def __init__(self, shown: weakref.ref[AveragedModule] | None = None) -> None:
        self._shown = shown

    def __call__(self, module: Module, _: Any) -> None:
        shown = self._shown() if self._shown is not None else None
        if shown is not None:
            shown.prepare_forward(module)

    def __reduce__(self) -> tuple[type[_BeforeForward], tuple[()]]:
        return _BeforeForward, ()


def _eval_only(module: Module, mode: bool = True) -> Module:
    """Stands in for ``Module.train``."""
    if mode:
        raise RuntimeError(f"train() on a model of averages. {_EVAL_ONLY} Train the online model.")
    return Module.train(module, False)


def _replacement(tracked: TrackedTensor, average: Tensor) -> Tensor:
    if not tracked.is_parameter:
        return average.detach()
    parameter = Parameter(average, requires_grad=False)
    parameter.__dict__.update(tracked.live().__dict__)  # marks that model code puts on parameters
    return parameter


def _set(held: Tensor, value: Tensor) -> None:
    """Give a tensor another storage, and keep the object."""
    try:
        held.data = value
    except RuntimeError:  # between some kinds of device; swapping takes the class and the marks with it
        other = Parameter(value, requires_grad=False) if isinstance(held, Parameter) else value.detach()
        other.__dict__.update(held.__dict__)
        torch.utils.swap_tensors(held, other)  # type: ignore[no-untyped-call]


def _structural_copy(model: Module, replacements: dict[int, Tensor]) -> Module:
    """A deep copy in which tensors are replaced, or shared where there is no replacement."""
    memo: dict[int, Any] = dict(replacements)
    for tensor in [*model.parameters(), *model.buffers()]:
        memo.setdefault(id(tensor), tensor)
    for module in model.modules():
        if getattr(module, "_holds_averages", False):
            memo[id(module)] = None  # an EMA that the model itself owns
    try:
        copies = dict(memo)  # a copy that fails leaves its beginnings there
        for module in reversed([*model.modules()]):  # inner ones first; wrappers belong to the training
            if (inner := unwrap(module)) is not module:
                copies[id(module)] = copy.deepcopy(inner, copies)
        return copy.deepcopy(model, copies)
    except Exception as error:
        name = _culprit(model, memo)
        raise UncopyableModelError(
            f"{name or type(model).__name__!r} cannot be copied ({type(error).__name__}: {error}); the average has no "
            "module of its own. Pass ema_model=a function that builds the module. Averages, snapshots and synthesis "
            "work without one.",
            name=name,
        ) from error


def _culprit(model: Module, memo: dict[int, Any]) -> str:
    """The innermost submodule that cannot be copied."""
    innermost_first = sorted(model.named_modules(), key=lambda named: -named[0].count(".") if named[0] else 1)
    for name, module in innermost_first:
        try:
            copy.deepcopy(module, dict(memo))
        except Exception:
            return str(name)
    return ""


def _refuse_patched(model: Module) -> None:
    for name, module in model.named_modules():
        patched = module.__dict__.get("forward") if unwrap(module) is module else None
        if patched is not None and _remembers_modules(patched):
            patch = getattr(patched, "__qualname__", type(patched).__name__)
            raise UncopyableModelError(
                f"forward of {name or type(model).__name__!r} was replaced by {patch}, which remembers "
                "other objects: a copy of the module would still run those of the online model. Pass ema_model=a "
                "function that builds the module. Averages, snapshots and synthesis work without one.",
                name=name,
            )


def _remembers_modules(patched: Any) -> bool:
    """Whether a copy of a module with this forward could run another module: deepcopy does not look into closures."""
    if isinstance(patched, FunctionType):
        return bool(patched.__closure__)  # it is not bound, so it knows its module by the closure
    while isinstance(patched, (MethodType, partial)):  # their module is replaced by its copy, but what do they call?
        patched = patched.__func__ if isinstance(patched, MethodType) else patched.func
    cells = (patched.__closure__ or ()) if isinstance(patched, FunctionType) else ()
    contents = [getattr(cell.cell_contents, "__self__", cell.cell_contents) for cell in cells]
    return any(isinstance(content, Module) for content in contents)


def _tensors_of_template(template: Module, averages: list[Average]) -> dict[str, Tensor]:
    found = canonical_tensors(template, persistent_only=False)
    held = {}
    for tracked, average in averages:
        tensor = found.get(tracked.name)
        if tensor is None or tensor.shape != average.shape:
            what = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UncopyableModelError(
                f"ema_model: {tracked.name!r} {what}; the online model has it with shape {tuple(average.shape)}. "
                "Build ema_model with the same architecture.",
                name=tracked.name,
            )
        untied = [key for key in tracked.keys if found.get(key) is not tensor]
        if untied:
            raise UncopyableModelError(
                f"ema_model: {untied[0]!r} and {tracked.name!r} are one tensor in the online model, but not here. "
                "Build ema_model with the same ties.",
                name=tracked.name,
            )
        held[tracked.name] = tensor
    return held


@contextmanager
def swapped(engine: AveragingEngine, profile: int) -> Iterator[None]:
    """Put an average into the online model, and the weights back at the end, whatever happens.

    The tensors and their storages stay the same objects. Costs one copy of the averaged tensors in their own types.
    """
    engine.order_readers("average_parameters()")
    engine.fence_all_readers()
    with neutral_modes():
        pairs = [writable_view(tracked.live(), average) for tracked, average in engine.flat_buffers.averages(profile)]
        weights = [live.detach().clone() for live, _ in pairs]
    refusal = NitrousError(
        "an average is in the place of the model's weights. Leave the `with ema.average_parameters()` block first."
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
