"""A model that is lent to an evaluation: it holds one average after the other, then its own values and modes again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from nitrous_ema.averaging.execution.write_guard import fence_all
from nitrous_ema.averaging.load_average import check_fits, load_average, load_tensors
from nitrous_ema.averaging.model.spectral_norm import fit_spectral_norms
from nitrous_ema.averaging.model.tracking import canonical_tensors, check_module, writable_view, write
from nitrous_ema.snapshots.layout import TensorRecord

_REMEDY = "Pass as model= the architecture that was trained."


class ModelLoan:
    """Puts averages into a model and gives the model back. The model's own values are kept in host memory meanwhile.

    Args:
        model: The model, wrapped or not.

    Raises:
        TypeError: It is not a module.
    """

    def __init__(self, model: Module) -> None:
        check_module(model)
        self._model = model
        self._own: dict[str, Tensor] | None = None  # None as long as the model has its own values
        self._modes = [(module, module.training) for module in model.modules()]

    def check(self, records: Sequence[TensorRecord], path: Path, *, dtype: str | None, subject: str) -> None:
        """Check that an average of these tensors fits the model; arguments and errors as ``check_fits``."""
        tensors = canonical_tensors(self._model)
        check_fits(tensors, records, path, dtype=dtype, subject=subject, remedy=_REMEDY)

    @contextmanager
    def holding(self, path: Path, *, subject: str) -> Iterator[Module]:
        """Put an average into the model; in the block it is in eval mode, and no gradients are recorded.

        Args:
            path: The file of the average.
            subject: What the message of a SnapshotMismatch calls the average. The file may be a temporary one.
        """
        if self._own is None:
            self._own = _copies(self._model)
        load_tensors(canonical_tensors(self._model), path, subject=subject, remedy=_REMEDY)
        fit_spectral_norms(self._model)
        self._model.eval()
        with torch.no_grad():
            yield self._model

    def give_back(self, average: Path | None = None) -> None:
        """Give the model its modes and its own values back.

        Args:
            average: The file of an average that the model is to hold instead of its own values.
        """
        for module, training in self._modes:
            module.training = training
        if average is not None:
            load_average(self._model, average)
        elif self._own is not None:
            # Looked up again, because the evaluation may have moved the model to another device.
            tensors = canonical_tensors(self._model)
            fence_all(list(tensors.values()))
            for name, tensor in tensors.items():
                if name in self._own and self._own[name].shape == tensor.shape:
                    write(*writable_view(tensor, self._own[name]))
        self._own = None


def _copies(model: Module) -> dict[str, Tensor]:
    """Return a copy of each tensor, under all of its names."""
    copies: dict[int, Tensor] = {}
    tensors = canonical_tensors(model)
    for tensor in tensors.values():
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}
