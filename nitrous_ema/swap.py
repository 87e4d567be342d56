"""An average in the place of the model's weights, for the duration of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nitrous_ema.averager import Averager
from nitrous_ema.errors import NitrousError
from nitrous_ema.live import lent
from nitrous_ema.pipeline import neutral_modes
from nitrous_ema.tracked import writable, write


@contextmanager
def swapped(averager: Averager, profile: int) -> Iterator[None]:
    """Put an average into the online model, and the weights back at the end, whatever happens.

    The tensors and their storages stay the same objects. Costs one copy of the averaged tensors in their own types.
    """
    averager.order_readers("average_parameters()")
    averager.fence_everybody()
    with neutral_modes():
        pairs = [writable(tracked.live(), average) for tracked, average in averager.arena.averages(profile)]
        weights = [live.detach().clone() for live, _ in pairs]
    refusal = NitrousError(
        "an average is in the place of the model's weights. Leave the `with ema.average_parameters()` block first."
    )
    averager.refuse(refusal)
    try:
        with lent([tracked.live() for tracked in averager.arena.averaged]):
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
            averager.end_refusal(refusal)
