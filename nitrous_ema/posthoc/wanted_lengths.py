"""The lengths for which retention keeps snapshots, during training and after it."""

from __future__ import annotations

import numpy as np

from nitrous_ema.profile import FloatArray, checked_lengths, gamma_to_sigma_rel

_LENGTHS = 16  # requested lengths over the range
# The default range ends at 2.5 times the longest tracked length, but at most at 0.25.
_LONGEST, _REACH = 0.25, 2.5


def wanted_lengths(gammas: FloatArray, sigma_rels: tuple[float, float] | None) -> FloatArray:
    """Return lengths over a range, evenly spaced in their logarithm, [lengths].

    Args:
        gammas: Exponents of the tracked profiles, which determine the default range.
        sigma_rels: Shortest and longest length; default as in ``KeepCount``.

    Raises:
        TypeError: ``sigma_rels`` is not a pair of numbers.
        ValueError: A length is out of range, or the shortest length is not first.
    """
    if sigma_rels is None:
        tracked = np.asarray(gamma_to_sigma_rel(gammas))
        low, high = float(tracked.min()), float(max(tracked.max(), min(_REACH * tracked.max(), _LONGEST)))
    else:
        try:
            low, high = (float(s) for s in sigma_rels)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"sigma_rels is {sigma_rels!r}; expected the shortest and the longest length, e.g. (0.03, 0.25)."
            ) from error
        if low > high:
            raise ValueError(f"sigma_rels is {sigma_rels!r}; expected the shortest length first, then the longest.")
    checked_lengths("sigma_rels", (low, high))
    return np.unique(np.geomspace(low, high, _LENGTHS)) if low < high else np.array([low])
