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

from nitrous_ema.trackable import check_gathered
from nitrous_ema.tracked import Structure, TrackedTensor

_lent: list[frozenset[int]] = []  # ids of tensors that hold averages for now, of each average_parameters() block


@contextmanager
def lent(tensors: Iterable[Tensor]) -> Iterator[None]:
    """In here these tensors of a model hold averages, which are nobody's weights."""
    identities = frozenset(map(id, tensors))
    _lent.append(identities)
    try:
        yield
    finally:
        _lent.remove(identities)


def is_lent(tensors: Iterable[Tensor]) -> bool:
    """Whether one of these tensors holds an average for now."""
    return bool(_lent) and not frozenset().union(*_lent).isdisjoint(map(id, tensors))


class LiveTensors:
    """Every averaged or copied tensor of a model.

    Args:
        model: The online model, wrapped or not.
        tracked: Its tensors.
    """

    def __init__(self, model: Module, tracked: Sequence[TrackedTensor]) -> None:
        self._structure = Structure(model, tracked)
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
