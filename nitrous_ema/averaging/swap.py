"""Evaluate with an average in the online model itself: no second module, but training must pause meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Module

from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.model.live_tensors import holding_averages
from nitrous_ema.averaging.model.spectral_norm import fit_spectral_norms, spectral_vectors
from nitrous_ema.averaging.model.tracking import writable_view, write
from nitrous_ema.errors import NitrousError


@contextmanager
def swapped(engine: AveragingEngine, profile: int, *, restore_buffers: bool = False) -> Iterator[None]:
    """Put an average into the online model for a ``with`` block, and restore the weights at its end.

    The tensors and their storages stay the same objects. Needs memory for one copy of the averaged tensors, in their
    own types. The weights are restored whatever the block raises, and the engine refuses updates and reads meanwhile.

    Args:
        engine: The engine of the average.
        profile: Index of the average among the engine's profiles.
        restore_buffers: Restore every buffer of the model, averaged or not.
    """
    engine.order_readers("average_parameters()")
    engine.fence_all_readers()  # the weights are about to be written, and any EMA may still be reading them
    with neutral_modes():
        pairs = [writable_view(tracked.live(), average) for tracked, average in engine.flat_buffers.averages(profile)]
        weights = [live.detach().clone() for live, _ in pairs]
        buffers = _Buffers(engine.model) if restore_buffers else None
        vectors = [(vector, vector.clone()) for pair in spectral_vectors(engine.model) for vector in pair]
    refusal = NitrousError(
        "the model currently holds averaged weights. Leave the `with ema.average_parameters()` block first."
    )
    engine.refuse(refusal)
    try:
        with holding_averages([tracked.live() for tracked in engine.flat_buffers.averaged]):
            with neutral_modes():
                for live, average in pairs:
                    write(live, average)
                fit_spectral_norms(engine.model)
            yield
    finally:
        try:
            with neutral_modes():
                if buffers is not None:
                    buffers.restore()
                for (live, _), weight in zip(pairs, weights, strict=True):
                    write(live, weight)
                for vector, value in vectors:
                    write(vector, value)
        finally:
            engine.end_refusal(refusal)


class _Buffers:
    """The buffers of a model as they are now: the objects and their values."""

    def __init__(self, model: Module) -> None:
        self._saved: list[tuple[dict[str, Tensor | None], str, Tensor | None, Tensor | None]] = [
            (module._buffers, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]

    def restore(self) -> None:
        """Put the objects back into the model, with their values."""
        for buffers, name, buffer, values in self._saved:
            buffers[name] = buffer
            if buffer is not None and values is not None:
                write(*writable_view(buffer, values))
