"""An average in the place of the model's weights, for the duration of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nitrous_ema.averager import Averager
from nitrous_ema.errors import NitrousError
from nitrous_ema.foreach import copy_each
from nitrous_ema.pipeline import neutral_modes
from nitrous_ema.tracked import writable


@contextmanager
def swapped(averager: Averager, profile: int) -> Iterator[None]:
    """Put an average into the online model, and the weights back at the end, whatever happens.

    The tensors and their storages stay the same objects. Costs one copy of the averaged tensors in their own types.
    """
    averager.order_readers("average_parameters()")
    averager.fence()
    with neutral_modes():
        pairs = [writable(tracked.live(), average) for tracked, average in averager.arena.averages(profile)]
        weights = [live.detach().clone() for live, _ in pairs]
    refusal = NitrousError(
        "an average is in the place of the model's weights. Leave the `with ema.average_parameters()` block first."
    )
    averager.refuse(refusal)
    try:
        with neutral_modes():
            for live, average in pairs:
                live.copy_(average)
        yield
    finally:
        try:
            with neutral_modes():
                copy_each([live for live, _ in pairs], weights)
        finally:
            averager.end_refusal(refusal)
