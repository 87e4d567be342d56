"""Where to look next for the best length, given what some lengths are worth: numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping

RESOLUTION = 0.02
"""Relative difference below which two lengths are not worth telling apart."""

_GOLDEN = (3 - 5**0.5) / 2
_LOPSIDED = 2
"""Parabolas alone creep up to the minimum of a steep valley from one side, and leave the other one wide."""
_DIGITS = 3
"""Of a proposed length: short names, and the same proposal on machines whose logarithms differ in the last bit."""


def next_length(losses: Mapping[float, float]) -> float | None:
    """A length between the best one and its neighbours that may be better.

    In the logarithm of the length: the minimum of the parabola through the best point and its two neighbours, if there
    is one far enough from these three, else the golden section of the wider side. The latter also where one side is
    much wider than the other, or is the only one since the best length is the first or the last of all. It never leaves
    the range and never comes within RESOLUTION of a length that is known.

    Args:
        losses: What each length is worth, by length > 0; lower is better. Lengths with a loss that is not finite are
            not repeated, and otherwise not there.

    Returns:
        The length, of three digits; None if it is found well enough, or two finite losses are not there.
    """
    finite = sorted((math.log(length), loss) for length, loss in losses.items() if math.isfinite(loss))
    if len(finite) < 2:
        return None
    best = min(range(len(finite)), key=lambda index: finite[index][1])
    neighbours = finite[max(best - 1, 0) : best + 2]
    known = [math.log(length) for length in losses]
    sides = sorted((x - finite[best][0] for x, _ in neighbours if x != finite[best][0]), key=abs, reverse=True)
    proposals = [finite[best][0] + _GOLDEN * side for side in sides]
    even = len(sides) == 2 and abs(sides[0]) <= _LOPSIDED * abs(sides[1])
    if even and (vertex := _vertex(neighbours)) is not None:
        proposals.insert(0, vertex)
    for x in proposals:
        length = float(f"{math.exp(x):.{_DIGITS}g}")
        if all(abs(math.log(length) - other) >= RESOLUTION for other in known):
            return length
    return None


def _vertex(points: list[tuple[float, float]]) -> float | None:
    """Minimum of the parabola through three points, within their range; None if it has none."""
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if not curvature > 0:
        return None
    x = (x0 + x1) / 2 - left / (2 * curvature)
    return x if x0 < x < x2 else None
