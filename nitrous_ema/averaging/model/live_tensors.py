"""The model's tensors as they are now: found again at every update, and checked where something has moved.

Objects, storages and submodules may be replaced between two updates (``.to()``, ``load_state_dict(assign=True)``,
``p.data = ...``). Checking a thousand tensors one by one takes milliseconds. Comparing objects and memory (address,
strides, elements) with the last update's takes a tenth of that, and nearly always nothing has changed.

No other module compares tensors. Work prepared for the tensors stays valid as long as ``find`` returns the same
mapping object. Such work must hold the tensors' memory, or another tensor may be allocated at the same address.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby

from torch import Tensor
from torch.nn import Module

from nitrous_ema.averaging.model.trackability import check_gathered
from nitrous_ema.averaging.model.tracking import TrackedTensor, canonical_tensors
from nitrous_ema.errors import UntrackableModelError, warn

# Ids of tensors that hold averages at the moment: one set for each average_parameters() block that is entered.
_holding_averages: list[frozenset[int]] = []


@contextmanager
def holding_averages(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Mark tensors of a model for the duration of the block: they hold averages instead of weights."""
    identities = frozenset(map(id, tensors))
    _holding_averages.append(identities)
    try:
        yield
    finally:
        _holding_averages.remove(identities)


def hold_averages(tensors: Iterable[Tensor]) -> bool:
    """Return whether one of these tensors holds an average instead of weights at the moment."""
    return bool(_holding_averages) and not frozenset().union(*_holding_averages).isdisjoint(map(id, tensors))


class LiveTensors:
    """The averaged and copied tensors of a model, found anew at each update.

    Args:
        model: The online model, wrapped or not.
        tracked: Its tensors.
    """

    def __init__(self, model: Module, tracked: Sequence[TrackedTensor]) -> None:
        self._structure = StructureCheck(model, tracked)
        self._tracked = [tensor for tensor in tracked if tensor.role != "skipped"]
        # Neighbours of one dictionary together, so that their lookups run in C.
        by_holder = groupby(self._tracked, lambda tensor: (id(tensor.holder), tensor.is_parameter))
        self._places = [
            (
                first.holder.__dict__,
                "_parameters" if first.is_parameter else "_buffers",
                [tensor.attribute for tensor in (first, *others)],
            )
            for _, (first, *others) in by_holder
        ]
        self._frozen = [tensor for tensor in tracked if tensor.is_frozen]
        self._found: list[Tensor] = []
        self._memory: list[list[object]] = []
        self._by_name: Mapping[str, Tensor] = {}

    def find(self) -> Mapping[str, Tensor]:
        """Return the tensors by canonical name; the same mapping object as long as nothing has moved.

        Raises:
            UntrackableModelError: A tensor is gone, has another shape or type, or can no longer be averaged; or its
                submodule was replaced; or its values may be stale.
        """
        self._structure.check()
        self._warn_of_trained()
        check_gathered(self._tracked[0].holder)  # Megatron hooks every submodule, so one module is enough
        # Dictionaries instead of getattr: a thousand attribute lookups on modules take a millisecond.
        found = list(
            chain.from_iterable(map(holder[kind].get, attributes) for holder, kind, attributes in self._places)
        )
        if self._are_known(found):
            return self._by_name
        self._found = [tensor.live() for tensor in self._tracked]
        self._memory = _memory(self._found)
        self._by_name = {tracked.name: live for tracked, live in zip(self._tracked, self._found, strict=True)}
        return self._by_name

    def _warn_of_trained(self) -> None:
        """Warn once of parameters that are trained by now, though they were left out as frozen ones."""
        held = [tensor.holder._parameters.get(tensor.attribute) for tensor in self._frozen]
        trained = [
            tensor.name
            for tensor, parameter in zip(self._frozen, held, strict=True)
            if parameter is not None and parameter.requires_grad
        ]
        if trained:
            self._frozen = []
            warn(
                "parameters require gradients now that required none when the EMA was constructed: "
                f"{_listed(trained)}. trainable_only=True has left them out, so ema_model has their newest values, not "
                "their averages. Construct the EMA after requires_grad_(True), or another EMA when more parameters are "
                "trained."
            )

    def _are_known(self, found: Sequence[Tensor | None]) -> bool:
        if len(found) != len(self._found) or not all(map(operator.is_, found, self._found)):
            return False
        # The same objects may have new memory: p.data = ... and .to() replace only the storage.
        return _memory(self._found) == self._memory


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:3]), *(["..."] if len(names) > 3 else [])])


def _memory(tensors: Sequence[Tensor]) -> list[list[object]]:
    # map() with C functions: no Python code runs per tensor.
    return [
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.stride, tensors)),
        list(map(Tensor.numel, tensors)),
    ]


class StructureCheck:
    """The check that no submodule was replaced and no tensor added since tracking began.

    After such a change the tracked tensors would no longer be the model.

    Args:
        model: The online model, wrapped or not.
        tracked: Its tensors.
    """

    def __init__(self, model: Module, tracked: Sequence[TrackedTensor]) -> None:
        self._model = model
        self._tracked = tracked
        self._record()

    def check(self) -> None:
        """Compare the model with its structure when tracking began. Wrapping a submodule is not a change.

        Raises:
            UntrackableModelError: A tracked tensor belongs to a submodule that is no longer in the model.
        """
        same_children = self._children == self._recorded_children
        same_counts = list(map(len, self._tensors)) == self._recorded_counts
        if same_children and same_counts and all(tensors[name] is None for tensors, name in self._empty):
            return
        # Something changed, perhaps only by a wrapper (torch.compile of a submodule): names and tensors decide.
        now = canonical_tensors(self._model, persistent_only=False)
        for tensor in self._tracked:
            if tensor.role != "skipped" and now.get(tensor.name) is not tensor.live():
                raise UntrackableModelError(
                    f"the submodule that holds {tensor.name!r} was replaced since tracking began. Make a new EMA after "
                    "changing the model, and load the old EMA's state into it where the shapes still agree.",
                    name=tensor.name,
                )
        known = {key for tensor in self._tracked for key in tensor.keys}
        added = [name for name in canonical_tensors(self._model) if name not in known]
        if added:
            warn(
                f"tensors added to the model since tracking began are not averaged: {_listed(added)}. Make a new EMA "
                "after changing the model."
            )
        self._record()

    def _record(self) -> None:
        """Record the structure as lists, which Python compares in C: 0.1 ms for a thousand modules."""
        modules = list(self._model.modules())
        self._children = [module._modules for module in modules]
        self._recorded_children = [dict(children) for children in self._children]
        self._tensors = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
        self._recorded_counts = list(map(len, self._tensors))
        # register_buffer("mean", None) leaves a name whose tensor may come later without a change of any count.
        self._empty = [(tensors, name) for tensors in self._tensors for name, value in tensors.items() if value is None]
