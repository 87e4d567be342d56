"""The model's tensors as they are now, found again at every update and checked where something has moved.

Objects, storages and submodules may be replaced between two updates (``.to()``, ``load_state_dict(assign=True)``,
``p.data = ...``). Asking a thousand tensors for shape and type costs milliseconds; asking whether they are the same
objects at the same addresses costs a tenth of that, and nearly always they are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import Module

from nitrous_ema.tracked import Structure, TrackedTensor


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
        self._addresses: list[int] = []
        self._by_name: Mapping[str, Tensor] = {}

    def find(self) -> Mapping[str, Tensor]:
        """Tensors by canonical name; the very same mapping as long as nothing has moved.

        Raises:
            UntrackableModelError: One is gone or has another shape or type, or its submodule was replaced.
        """
        self._structure.check()
        found = [holder[kind].get(attribute) for holder, kind, attribute in self._places]
        if self._are_known(found):
            return self._by_name
        self._found = [tensor.live() for tensor in self._tracked]
        self._addresses = [tensor.data_ptr() for tensor in self._found]
        self._by_name = {tracked.name: live for tracked, live in zip(self._tracked, self._found, strict=True)}
        return self._by_name

    def _are_known(self, found: Sequence[Tensor | None]) -> bool:
        if len(found) != len(self._found) or not all(map(operator.is_, found, self._found)):
            return False
        return [tensor.data_ptr() for tensor in self._found] == self._addresses
