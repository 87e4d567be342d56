"""The model's tensors as they are now, found again at every update and checked where something has moved.

Objects, storages and submodules may be replaced between two updates (``.to()``, ``load_state_dict(assign=True)``,
``p.data = ...``). Checking a thousand tensors one by one costs milliseconds; asking whether they are the same objects
with the same memory (address, strides, elements) costs a tenth of that, and nearly always they are.

Nobody else needs to compare: whoever prepares something for the tensors may keep it for as long as ``find`` returns the
very same mapping, and must hold their memory meanwhile, or another tensor may come to lie at the same address.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Module

from nitrous_ema.averaging.model.trackability import check_gathered
from nitrous_ema.averaging.model.tracking import TrackedTensor, canonical_tensors
from nitrous_ema.errors import UntrackableModelError, warn

_lent: list[frozenset[int]] = []  # ids of tensors that hold averages for now, of each average_parameters() block


@contextmanager
def holding_averages(tensors: Iterable[Tensor]) -> Iterator[None]:
    """In here these tensors of a model hold averages, which are nobody's weights."""
    identities = frozenset(map(id, tensors))
    _lent.append(identities)
    try:
        yield
    finally:
        _lent.remove(identities)


def hold_averages(tensors: Iterable[Tensor]) -> bool:
    """Whether one of these tensors holds an average for now."""
    return bool(_lent) and not frozenset().union(*_lent).isdisjoint(map(id, tensors))


class LiveTensors:
    """Every averaged or copied tensor of a model.

    Args:
        model: The online model, wrapped or not.
        tracked: Its tensors.
    """

    def __init__(self, model: Module, tracked: Sequence[TrackedTensor]) -> None:
        self._structure = StructureCheck(model, tracked)
        self._tracked = [tensor for tensor in tracked if tensor.role != "skipped"]
        self._places = [
            (tensor.holder.__dict__, "_parameters" if tensor.is_parameter else "_buffers", tensor.attribute)
            for tensor in self._tracked
        ]
        self._found: list[Tensor] = []
        self._memory: list[list[object]] = []
        self._by_name: Mapping[str, Tensor] = {}

    def find(self) -> Mapping[str, Tensor]:
        """Tensors by canonical name; the very same mapping as long as nothing has moved.

        Raises:
            UntrackableModelError: One is gone, has another shape or type, or became something that cannot be averaged;
                its submodule was replaced; its values may be stale.
        """
        self._structure.check()
        check_gathered(self._tracked[0].holder)  # the hooks in question are on every submodule
        found = [holder[kind].get(attribute) for holder, kind, attribute in self._places]
        if self._are_known(found):
            return self._by_name
        self._found = [tensor.live() for tensor in self._tracked]
        self._memory = _memory(self._found)
        self._by_name = {tracked.name: live for tracked, live in zip(self._tracked, self._found, strict=True)}
        return self._by_name

    def _are_known(self, found: Sequence[Tensor | None]) -> bool:
        if len(found) != len(self._found) or not all(map(operator.is_, found, self._found)):
            return False
        return _memory(self._found) == self._memory


def _memory(tensors: Sequence[Tensor]) -> list[list[object]]:
    return [
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.stride, tensors)),
        list(map(Tensor.numel, tensors)),
    ]


class StructureCheck:
    """Notices that a submodule was replaced, or a tensor added: what is tracked would no longer be the model.

    Args:
        model: The online model, wrapped or not.
        tracked: Its tensors.
    """

    def __init__(self, model: Module, tracked: Sequence[TrackedTensor]) -> None:
        self._model = model
        self._tracked = tracked
        self._note()

    def check(self) -> None:
        """Compare with when tracking began. Wrapping a submodule is no change.

        Raises:
            UntrackableModelError: A tracked tensor belongs to a submodule that is not in the model any more.
        """
        is_as_noted = self._children == self._noted_children and list(map(len, self._tensors)) == self._noted_counts
        if is_as_noted and all(tensors[name] is None for tensors, name in self._empty):
            return
        now = canonical_tensors(self._model, persistent_only=False)
        for tensor in self._tracked:
            if tensor.role != "skipped" and now.get(tensor.name) is not tensor.live():
                raise UntrackableModelError(
                    f"the submodule that holds {tensor.name!r} was replaced since tracking began. Make a new EMA after "
                    "changing the model (and load its state where the shapes still agree).",
                    name=tensor.name,
                )
        known = {key for tensor in self._tracked for key in tensor.keys}
        added = [name for name in now if name not in known]
        if added:
            warn(
                f"{added[0]!r} and {len(added) - 1} more tensors were added since tracking began and are not averaged. "
                "Make a new EMA after changing the model."
            )
        self._note()

    def _note(self) -> None:
        """As lists, which Python compares without a loop of ours: a thousand modules take a tenth of a millisecond."""
        modules = list(self._model.modules())
        self._children = [module._modules for module in modules]
        self._noted_children = [dict(children) for children in self._children]
        self._tensors = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
        self._noted_counts = list(map(len, self._tensors))
        # register_buffer("mean", None), to be set later.
        self._empty = [(tensors, name) for tensors in self._tensors for name, value in tensors.items() if value is None]
