"""Choose the next length to evaluate, from the losses of the lengths evaluated so far.

The search minimizes over one variable, the logarithm of the length, by parabolas and golden sections. It stops when a
new length would be too close to a known one to make a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

RESOLUTION = 0.02
"""Relative difference below which two lengths count as equal."""

_GOLDEN = (3 - 5**0.5) / 2
_LOPSIDED = 2
"""Ratio of the two sides' widths above which the parabola is not used.

Parabolas alone approach the minimum of a steep valley from one side and leave the other side wide: one such minimum was
missed by 7 % (test_lopsided_valley_is_found_within_five_percent).
"""
_DIGITS = 3
"""Digits of a proposed length.

File names stay short, and machines whose logarithms differ in the last bit propose the same length.
"""


def next_length(losses: Mapping[float, float]) -> float | None:
    """Return a length near the best one that may be better.

    With x the logarithm of the length, the proposal is the minimum of the parabola through the best point and its two
    neighbors. The golden section of the wider side is proposed instead if the parabola has no minimum, if the minimum
    is too close to a known length, if one side is much wider than the other, or if the best length is the shortest or
    longest. A proposal never lies outside the range of the known lengths, nor within RESOLUTION of one of them.

    Args:
        losses: Loss of each length > 0; lower is better. A length whose loss is not finite is
            never proposed again, and is otherwise ignored.

    Returns:
        The length, of three digits; None if the search is finished, or if fewer than two losses are finite.
    """
    finite = sorted((math.log(length), loss) for length, loss in losses.items() if math.isfinite(loss))
    if len(finite) < 2:
        return None
    best = min(range(len(finite)), key=lambda index: finite[index][1])
    neighbors = finite[max(best - 1, 0) : best + 2]
    known = [math.log(length) for length in losses]  # also without a finite loss, so that none is proposed again
    sides = sorted((x - finite[best][0] for x, _ in neighbors if x != finite[best][0]), key=abs, reverse=True)
    # The wider side first; a proposal on it is less likely to be too close to a known length.
    proposals = [finite[best][0] + _GOLDEN * side for side in sides]
    even = len(sides) == 2 and abs(sides[0]) <= _LOPSIDED * abs(sides[1])
    if even and (vertex := _vertex(neighbors)) is not None:
        proposals.insert(0, vertex)
    for x in proposals:
        length = float(f"{math.exp(x):.{_DIGITS}g}")
        if all(abs(math.log(length) - other) >= RESOLUTION for other in known):
            return length
    return None


def _vertex(points: list[tuple[float, float]]) -> float | None:
    """Return x at the minimum of the parabola through three points; None without a minimum inside their range."""
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if not curvature > 0:  # true for NaN, too: differences of huge losses overflow
        return None
    x = (x0 + x1) / 2 - left / (2 * curvature)
    return x if x0 < x < x2 else None
