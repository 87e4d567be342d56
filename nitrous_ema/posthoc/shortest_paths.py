"""Sets of kept times as paths: each step from one kept time to the next costs what the interval between them adds.

The squared error of every target is the sum of its interval costs, so the best set of times is a shortest path over
them. One weight per target turns several errors into one cost. Shortest paths at *any* weights also bound every other
set: a set that keeps all targets within their limits costs at most the sum of the weights.

Only intervals that keep every target within its limit on their own are edges. That leaves few of them: in the best path
the average interval spends only its share of the limit, and costs grow with a high power of the width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.posthoc.interval_cost import INTERPOLATION_ERROR, IntervalCost
from nitrous_ema.profile import FloatArray

Places = NDArray[np.intp]

# Beyond this many edges (about 80 MB in all, every pair of 2048 times) every second time is left out until they fit. So
# many are only left at limits so wide that a handful of times meets them.
EDGES_LIMIT = 1 << 21
# Multiplications in one matrix product. BLAS does larger ones on several threads, which wait for each other: on a busy
# machine that took a hundred times longer than the product.
_PRODUCT_SIZE = 200_000
# Slack of limits that are compared with costs from the table: it never leaves out an edge or a path that is allowed.
SLACK = 1 + INTERPOLATION_ERROR


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SubsetProblem:
    """Times to choose from, targets at some of them, and how far each target may be off."""

    log_t: FloatArray
    """Logarithms of the times to choose from, [times], ascending. The last one is always kept."""
    log_t_r: FloatArray
    """Logarithms of the times of the targets, [targets]."""
    cost: IntervalCost
    """For the exponents of the targets."""
    limit2: FloatArray
    """Largest squared relative error of each target, [targets], > 0."""
    slack2: FloatArray
    """What leaving out times may add to the squared errors, [targets], > 0: the scale on which sets are compared."""
    required: Places
    """Places of the times that are kept in any case."""

    def errors2(self, places: Places) -> FloatArray:
        """Squared relative errors [targets] when these times are kept."""
        return self.cost.errors2(self.log_t[places], self.log_t_r)

    def without(self, places: Places) -> SubsetProblem:
        """The same with fewer times to choose from."""
        rest = np.setdiff1d(np.arange(self.log_t.size), places)
        return replace(self, log_t=self.log_t[rest], required=np.searchsorted(rest, self.required))


class PathGraph:
    """All sets of kept times in which no interval alone exceeds a limit."""

    places: Places
    """Candidates: places in the question's times."""

    def __init__(self, question: SubsetProblem, *, edges_limit: int = EDGES_LIMIT) -> None:
        self.places = np.arange(question.log_t.size)
        self._asked, self._errors2_of_all = question, question.errors2(self.places)
        first = _first_places(question)
        while (edges := np.arange(first.size) - first).sum() > edges_limit:
            # Where many edges end the times are close together for what they cost: half of those are left out.
            left_out = np.setdiff1d(np.flatnonzero(edges >= edges.mean())[-2::-2], question.required)
            if not left_out.size:
                break
            question = question.without(left_out)
            self.places = np.delete(self.places, left_out)
            first = _first_places(question)
        self._question = question
        self._first = first
        self._offset = np.append(0, np.cumsum(np.arange(first.size) - first))
        self._weight = weight = question.cost.weights(question.log_t, question.log_t_r)
        begun = np.asarray((question.cost.from_zero * weight <= question.limit2 * SLACK).all(1))
        begun[question.required.min(initial=first.size) + 1 :] = False
        begun[0] = True
        self._begun = begun
        self._find_nodes()

    def _find_nodes(self) -> None:
        """The previous time of every edge, and where its width lies in the table of costs; edges lie row by row."""
        edges, log_t = int(self._offset[-1]), self._question.log_t
        self._previous = np.empty(edges, np.int32)
        self._node = np.empty(edges, np.int32)  # in the flattened table [rows of the block, nodes]
        self._share = np.empty(edges, np.float32)
        for rows, of_rows in self._blocks():
            row = np.repeat(np.arange(rows.start, rows.stop), np.diff(self._offset[rows.start : rows.stop + 1]))
            previous = np.arange(of_rows.start, of_rows.stop) - self._offset[row] + self._first[row]
            self._previous[of_rows] = previous
            node, self._share[of_rows] = self._question.cost.places(log_t[row] - log_t[previous])
            self._node[of_rows] = node + (row - rows.start) * self._question.cost.widths.size

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows to treat at once, and their edges."""
        rows = max(1, _PRODUCT_SIZE // self._question.cost.log_cost.size)
        for begin in range(0, self._first.size, rows):
            end = min(begin + rows, self._first.size)
            yield slice(begin, end), slice(int(self._offset[begin]), int(self._offset[end]))

    def priced(self, share: FloatArray) -> EdgeCosts:
        """Costs of all edges when the room of each target costs as much as its share, [targets]."""
        return self.priced_by(share / self._asked.slack2)

    def priced_by(self, weight_of_error2: FloatArray) -> EdgeCosts:
        """Costs of all edges when the squared error of each target counts with its weight, [targets]."""
        cost, edges = self._question.cost, np.empty(self._previous.size, np.float32)
        # float32 with the largest cost of each node set apart: exact to 1e-5, and several times faster.
        largest = cost.log_cost.max(1)
        # What is too small to matter is 0: products of denormal numbers are slow.
        table = _in_float32(np.exp(cost.log_cost - largest[:, None]).T)
        weight = _in_float32(self._weight * weight_of_error2)
        for rows, of_rows in self._blocks():
            log_cost = np.log(np.maximum(weight[rows] @ table, np.float32(1e-37))) + largest.astype(np.float32)
            below = log_cost.take(self._node[of_rows])
            rise = log_cost.take(self._node[of_rows] + 1) - below
            edges[of_rows] = np.exp(below + self._share[of_rows] * rise)
        start = np.where(self._begun, self._weight @ (weight_of_error2 * cost.from_zero), np.inf)
        allowance = float((weight_of_error2 * self._asked.limit2).sum()) * SLACK
        aim = float((weight_of_error2 * (self._errors2_of_all + self._asked.slack2)).sum())
        return EdgeCosts(edges, start, allowance, min(aim, allowance))

    def overshoot(self, places: Places) -> FloatArray:
        """What a set adds to the squared errors of all times, as fractions of the room, [targets]."""
        return np.asarray((self._asked.errors2(places) - self._errors2_of_all) / self._asked.slack2)

    def cheapest(self, prices: EdgeCosts) -> tuple[Places, float]:
        """The path of least cost, where each kept time costs 1 more, and its cost."""
        size = self._first.size
        best, previous = prices.start + 1.0, np.full(size, -1)
        first, offset, edges = self._first.tolist(), self._offset.tolist(), prices.edges
        for j in range(1, size):
            through = best[first[j] : j] + edges[offset[j] : offset[j + 1]]
            k = int(through.argmin())
            if through[k] + 1.0 < best[j]:
                best[j] = through[k] + 1.0
                previous[j] = first[j] + k
        path, j = [], size - 1
        while j >= 0:
            path.append(j)
            j = int(previous[j])
        return self.places[path[::-1]], float(best[-1])

    def by_count(self, prices: EdgeCosts, *, most: int, enough: float = 0.0) -> list[FloatArray]:
        """Least cost of reaching each candidate in exactly 1, 2, ... times, [candidates] each.

        Ends with ``most`` times, or with the first number of times whose whole path costs at most ``enough``.
        """
        layers = [prices.start]
        while len(layers) < most and layers[-1][-1] > enough:
            layers.append(self.one_more(prices, layers[-1]))
        return layers

    def one_more(self, prices: EdgeCosts, layer: FloatArray) -> FloatArray:
        """Least cost of reaching each candidate in one time more than in ``layer``, [candidates]."""
        through = layer.take(self._previous)
        through += prices.edges
        longer = np.full(layer.size, np.inf)
        if through.size:
            longer[1:] = np.minimum.reduceat(through, self._offset[1:-1])
        return longer

    def path(self, prices: EdgeCosts, layers: Sequence[FloatArray]) -> Places:
        """The path of least cost with as many times as there are layers."""
        j = self._first.size - 1
        path = [j]
        for layer in reversed(layers[:-1]):
            row = slice(self._first[j], j)
            j = row.start + int((layer[row] + prices.edges[self._offset[j] : self._offset[j + 1]]).argmin())
            path.append(j)
        return self.places[path[::-1]]

    @property
    def can_do(self) -> bool:
        """Whether all candidates together are within the limits."""
        return bool((self._asked.errors2(self.places) <= self._asked.limit2 * SLACK).all())

    @property
    def edges(self) -> int:
        """Number of intervals that are allowed."""
        return int(self._previous.size)


@dataclass(frozen=True, slots=True, eq=False)
class EdgeCosts:
    """One cost for every interval."""

    edges: NDArray[np.float32]  # between two times, row by row
    start: FloatArray  # from time 0 to each time, infinite where that is not allowed
    allowance: float  # no set within the limits costs more
    aim: float  # a set that costs more adds more than there is room for


def _in_float32(values: FloatArray) -> NDArray[np.float32]:
    """Values between 1e-18 and 1e30, smaller ones as 0 and larger ones as 1e30: the product of two stays normal."""
    return np.where(values < 1e-18, 0.0, np.minimum(values, 1e30)).astype(np.float32)


def _first_places(question: SubsetProblem) -> Places:
    """The earliest time from which an interval to each time is allowed."""
    log_t, cost = question.log_t, question.cost
    allowed = question.limit2 / np.maximum(cost.weights(log_t, question.log_t_r), 1e-300) * SLACK
    widest = np.full(log_t.size, np.inf)
    ends = np.append(cost.widths, np.inf)
    for m in range(allowed.shape[1]):
        node = np.searchsorted(cost.log_cost[:, m], np.log(allowed[:, m]), side="right")
        widest = np.minimum(widest, ends[node])
    place = np.arange(log_t.size)
    first = np.minimum(np.searchsorted(log_t, log_t - widest - 1e-12, side="left"), np.maximum(place - 1, 0))
    last_required = np.searchsorted(question.required, place, side="left") - 1  # before each time
    at_least = np.append(question.required, 0)[last_required]
    return np.asarray(np.maximum(first, np.where(last_required >= 0, at_least, 0)), dtype=np.intp)
