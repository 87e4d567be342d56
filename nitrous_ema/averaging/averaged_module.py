"""Evaluate with an average in a second module, ``AveragedModule``; ``swap.py`` uses the online model itself.

The second module must show the newest average without costing memory for another copy of it. It is therefore the online
model's structure, copied without its tensors. Averaged and copied tensors have the memory of the average. Where the
model's type differs from the average's, or a user has cast or moved the module, they are copies that are refreshed
before each use. Skipped tensors are the online model's own, or copies as well (``share_skipped=False``).

Attributes that are no tensors, and buffers that are not saved, follow the online model (``model/attributes.py``). The
module stays in eval mode, because a forward in train mode would write statistics, or weights, into the averages;
``module_overrides.py`` has what it does differently from other modules.

Longer than 300 lines: every way in which a user may change the module is met on one page.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.kernels.flat_buffers import move_versions
from nitrous_ema.averaging.model.attributes import FollowedAttributes
from nitrous_ema.averaging.model.spectral_norm import fit_spectral_norms, spectral_vectors
from nitrous_ema.averaging.model.structural_copy import copy_memo, structural_copy
from nitrous_ema.averaging.model.trackability import untrackable_reason
from nitrous_ema.averaging.model.tracking import TrackedTensor, canonical_tensors, unwrap
from nitrous_ema.averaging.module_overrides import EVAL_ONLY, ModuleOverrides
from nitrous_ema.errors import NitrousError, UncopyableModelError

Average = tuple[TrackedTensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A place in the module for a tensor that shows an average."""

    tensors: dict[str, Any]
    """The parameters, or the buffers, of one submodule."""
    attribute: str
    is_parameter: bool
    name: str
    """Canonical name."""


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
        self._overrides: ModuleOverrides | None = None
        self._attributes: FollowedAttributes | None = None
        skipped = [tensor for tensor in engine.flat_buffers.tracked if tensor.role == "skipped"]
        shared = engine.config.share_skipped
        self._unshared = {tensor.name: tensor for tensor in skipped if tensor.persistent and not shared}
        self._sources: dict[str, Tensor] = {}  # averages, copied tensors, and skipped ones that are not shared
        self._places: list[_Place] = []
        self._held: list[Tensor] = []  # the tensors in these places, as they were found last
        self._addresses: list[int] = []
        self._fitted: frozenset[str] = frozenset()  # vectors of spectral norms, which are computed from the averages
        self._is_fitted = False
        self._copies: list[tuple[Tensor, Tensor]] = []  # a tensor of the module, and the average that it is copied from
        engine.viewers.add(self)

    def module(self) -> Module:
        """Return the module, with the current values. It is built at the first call.

        Raises:
            UncopyableModelError: The model cannot be copied, or the template lacks a tensor.
            NitrousError: A tensor of the module was replaced.
        """
        self._engine.order_readers("ema_model")
        with neutral_modes():
            if self._module is None:
                self._module = self._build()
            if self._attributes is not None:
                self._attributes.follow(self._memo)
            self._note_trainable()
            self._refresh()
        return self._module

    def rebind(self) -> None:
        """Use the averages' memory after they have moved; the module and its tensors stay the same objects."""
        if self._module is None:
            return
        before, self._sources = self._sources, self._find_sources()
        for place, tensor in zip(self._places, self._held, strict=True):
            source = self._sources[place.name]
            # A tensor that a user has moved to another device stays there.
            stays = tensor.device != before[place.name].device
            self._give_memory(tensor, place.name, tensor.dtype, tensor.device if stays else source.device)
        held = [place.tensors.get(place.attribute) for place in self._places]
        if all(map(operator.is_, held, self._held)):
            self._note()
        else:  # _refresh() follows what a user has put into these places
            self._addresses = _addresses(self._held)

    def mark_written(self) -> None:
        """Move the version counters of the module's tensors that have the memory of averages."""
        self._is_fitted = False
        copies = {id(tensor) for tensor, _ in self._copies}
        move_versions([tensor for tensor in self._held if id(tensor) not in copies])

    def prepare_forward(self, module: Module) -> None:
        """Order a forward after the averaging. Raises RuntimeError if a submodule is in train mode."""
        for name, submodule in module.named_modules():
            if submodule.training:
                raise RuntimeError(
                    f"{name or type(module).__name__!r} was put in train mode. {EVAL_ONLY} Call eval() on it."
                )
        self._engine.order_readers("forward of an averaged model")
        with neutral_modes():
            self._refresh()

    def prepare_copy(self) -> None:
        """Order a copy of the module after the averaging, and bring the module up to date."""
        self.module()

    # ---- building

    def _build(self) -> Module:
        template = self._template if isinstance(self._template, Module) or self._template is None else self._template()
        self._sources = self._find_sources()
        averages = [(tracked, self._sources[tracked.name]) for tracked in self._shown()]
        if template is None:
            tensors = {tracked.name: _replacement(tracked, source) for tracked, source in averages}
            module, pairs = structural_copy(unwrap(self._engine.model), self._replacements(tensors))
            self._attributes = FollowedAttributes(pairs)
        else:
            module = unwrap(template)
            tensors = _tensors_of_template(module, averages)
            module.requires_grad_(False)
        vectors = {id(tensor) for pair in spectral_vectors(module) for tensor in pair}
        self._fitted = frozenset(name for name, tensor in tensors.items() if id(tensor) in vectors)
        for tracked, source in averages:
            self._give_memory(tensors[tracked.name], tracked.name, tracked.dtype, source.device)
        self._places = list(_places(module, {id(tensor): name for name, tensor in tensors.items()}))
        self._note()
        self._is_fitted = False
        module.eval()
        self._overrides = ModuleOverrides(module, self)
        return module

    def _shown(self) -> Iterator[TrackedTensor]:
        """Yield the tensors whose values the module gets here; the others are shared with the online model."""
        yield from (tensor for tensor in self._engine.flat_buffers.tracked if tensor.role != "skipped")
        yield from (tensor for tensor in self._unshared.values() if untrackable_reason(_held(tensor)) is None)

    def _find_sources(self) -> dict[str, Tensor]:
        """Return what the module's tensors show, by canonical name."""
        pairs = [*self._engine.flat_buffers.averages(self._profile), *self._engine.flat_buffers.copies()]
        return {tracked.name: tensor for tracked, tensor in pairs} | self._live_sources()

    def _live_sources(self) -> dict[str, Tensor]:
        """Return the online model's tensors that the module has copies of, as the model holds them now."""
        return {name: _held(tracked) for name, tracked in self._unshared.items()}

    def _replacements(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return what takes the place of the online model's tensors in copies, by the ``id`` of the latter."""
        replacements = {id(_held(tracked)): tensors[tracked.name] for tracked in self._shown()}
        for tracked in self._unshared.values():
            if tracked.name not in tensors:  # quantized or sharded: its values cannot be refreshed
                replacements[id(_held(tracked))] = copy.deepcopy(_held(tracked))
        return replacements

    def _memo(self) -> dict[int, object]:
        """Return the memo for copies of the online model's attributes."""
        tensors = {place.name: tensor for place, tensor in zip(self._places, self._held, strict=True)}
        return copy_memo(unwrap(self._engine.model), self._replacements(tensors))

    # ---- values

    def _refresh(self) -> None:
        """Follow what a user has done to the module's tensors, and copy averages where the module has copies."""
        self._follow_live_sources()
        held = [place.tensors.get(place.attribute) for place in self._places]
        if any(place.is_parameter and type(tensor) is Tensor for place, tensor in zip(self._places, held, strict=True)):
            return  # torch.func.functional_call has put other tensors into the module, for this call
        if not all(map(operator.is_, held, self._held)) or _addresses(self._held) != self._addresses:
            self._follow(held)
        for tensor, source in self._copies:
            tensor.copy_(source)
        if self._fitted and not self._is_fitted and self._module is not None:
            fit_spectral_norms(self._module)
            self._is_fitted = True

    def _follow_live_sources(self) -> None:
        """Find tensors of the online model that were replaced or resized since they were last copied."""
        live = self._live_sources()
        if all(self._sources[name] is source for name, source in live.items()):
            return
        self._sources |= live
        for place, tensor in zip(self._places, self._held, strict=True):
            if tensor.shape != self._sources[place.name].shape:
                self._give_memory(tensor, place.name, tensor.dtype, tensor.device)
        self._note()

    def _follow(self, held: list[Tensor | None]) -> None:
        """Give tensors that were cast or moved memory of their own, in their new type and place.

        They were given memory by other code, which may belong to another model and must not be written.
        """
        self._is_fitted = False
        self._sources = self._find_sources()  # share_memory_() moves these as well
        # Observers resize their buffers in a forward, also in eval mode.
        resizable = {tracked.name for tracked in self._engine.flat_buffers.copied if tracked.may_resize}
        for place, tensor in zip(self._places, held, strict=True):
            if place.name in resizable and tensor is not None and tensor.shape != self._sources[place.name].shape:
                source = self._sources[place.name]
                place.tensors[place.attribute] = torch.empty_like(source, dtype=tensor.dtype, device=tensor.device)
        held = [place.tensors.get(place.attribute) for place in self._places]
        for place, tensor, before in zip(self._places, held, self._held, strict=True):
            # A cast of a module replaces its buffers, and the values of its parameters.
            is_other = place.is_parameter and tensor is not before
            if tensor is None or is_other or tensor.is_meta or tensor.shape != self._sources[place.name].shape:
                raise NitrousError(
                    f"ema_model: {place.name!r} was replaced or changed its shape (load_state_dict with assign=True, "
                    "offloading to the meta device, pruning, ...), so it does not show the average. Change a copy of "
                    "the module instead: copy.deepcopy(ema_model), made before the tensor is replaced."
                )
        for place, tensor, before, address in zip(self._places, held, self._held, self._addresses, strict=True):
            if tensor is not None and tensor is not before:
                place.tensors[place.attribute] = torch.empty_like(tensor)
            # Processes may share the memory of a tensor after share_memory_(), so that it stays.
            elif before.data_ptr() != address and not (
                before.device.type == "cpu" and before.untyped_storage().is_shared()
            ):
                _set(before, torch.empty_like(before))
        self._note()

    def _give_memory(self, tensor: Tensor, name: str, dtype: torch.dtype, device: torch.device) -> None:
        """Give a tensor the memory of the average that it shows if it has the same type and place, else its own."""
        source = self._sources[name]
        is_alike = (dtype, device) == (source.dtype, source.device)
        # Observers resize empty buffers in their first forward; memory within a buffer of averages cannot be resized.
        shares = is_alike and source.numel() > 0 and name not in self._fitted and name not in self._unshared
        _set(tensor, source if shares else torch.empty_like(source, dtype=dtype, device=device))

    def _note(self) -> None:
        """Note the module's tensors as they are now, and which of them are copies."""
        self._held = [tensor for place in self._places if (tensor := place.tensors[place.attribute]) is not None]
        self._addresses = _addresses(self._held)
        copies = {}
        for place, tensor in zip(self._places, self._held, strict=True):
            source = self._sources[place.name]
            is_other = (tensor.data_ptr(), tensor.dtype) != (source.data_ptr(), source.dtype)
            if is_other and place.name not in self._fitted:
                copies[id(tensor)] = tensor, source
        self._copies = [*copies.values()]

    def _note_trainable(self) -> None:
        """Note which parameters require gradients in copies of the module: those of the online model that do."""
        trained = {tracked.name for tracked in self._shown() if _held(tracked).requires_grad}
        if self._overrides is not None:
            pairs = zip(self._places, self._held, strict=True)
            self._overrides.trainable = frozenset(id(tensor) for place, tensor in pairs if place.name in trained)


def _held(tracked: TrackedTensor) -> Tensor:
    """Return the tensor that the online model holds now, whatever its kind."""
    held = (tracked.holder._parameters if tracked.is_parameter else tracked.holder._buffers).get(tracked.attribute)
    return tracked.live() if held is None else held  # which raises


def _places(module: Module, names: Mapping[int, str]) -> Iterator[_Place]:
    """Yield every place of a module that has one of the tensors whose names are given by ``id``."""
    for submodule in module.modules():
        for kind in (submodule._parameters, submodule._buffers):
            for attribute, tensor in kind.items():
                if id(tensor) in names:
                    yield _Place(kind, attribute, kind is submodule._parameters, names[id(tensor)])


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _replacement(tracked: TrackedTensor, source: Tensor) -> Tensor:
    value = source.data  # with a version counter of its own, because the tensor may become a copy in another type
    if not tracked.is_parameter:
        return value
    parameter = Parameter(value, requires_grad=False)
    parameter.__dict__.update(_held(tracked).__dict__)  # attributes that model code has set on the parameter
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


def _tensors_of_template(template: Module, averages: list[Average]) -> dict[str, Tensor]:
    """Return the template's tensors by canonical name. Raises UncopyableModelError for another architecture."""
    found = canonical_tensors(template, persistent_only=False)
    tensors = {}
    for tracked, average in averages:
        tensor = found.get(tracked.name)
        if tensor is None or (tensor.shape != average.shape and not tracked.may_resize):
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
