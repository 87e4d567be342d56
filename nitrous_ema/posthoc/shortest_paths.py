"""Sets of snapshot times as paths in a graph, whose edges cost the errors of the intervals between two times.

Choosing the best of all sets of snapshots looks exponential. But the squared error of every target is the sum of its
interval costs, so the best set of times is a shortest path. One weight per target turns the errors of several targets
into one cost. Shortest paths at *any* weights also bound every other set: a set with all targets within their limits
costs at most the weighted sum of the limits.

An edge exists only where its interval alone exceeds no target's limit. This leaves few edges: in the best path an
average interval uses only its share of the limit, and costs grow with a high power of the width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.posthoc.interval_cost import INTERPOLATION_ERROR, IntervalCost
from nitrous_ema.profile import FloatArray

Places = NDArray[np.intp]
"""Indices into an array of times."""

# A graph with more edges (about 80 MB in all, every pair of 2048 times) drops every second time where edges are many.
# Graphs only grow so large at limits so wide that a handful of times meets them.
EDGES_LIMIT = 1 << 21
# Multiplications in one matrix product. BLAS runs larger products on several threads, which wait for each other: on a
# busy machine this took a hundred times longer than the product.
_PRODUCT_SIZE = 200_000
# Factor on limits that are compared with costs from the table, so that no allowed edge or path is rejected.
SLACK = 1 + INTERPOLATION_ERROR


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SubsetProblem:
    """Times to choose from, the targets at some of these times, and the error limit of each target."""

    log_t: FloatArray
    """Logarithms of the times to choose from, [times], ascending. The last time is always chosen."""
    log_t_r: FloatArray
    """Logarithms of the times of the targets, [targets]."""
    cost: IntervalCost
    """Table of interval costs, for the exponents of the targets."""
    limit2: FloatArray
    """Largest squared relative error of each target, [targets], > 0."""
    slack2: FloatArray
    """Squared error that leaving out times may add to each target, [targets], > 0: the scale on which sets compare."""
    required: Places
    """Places of the times that every set must contain, ascending."""

    def errors2(self, places: Places) -> FloatArray:
        """Return the squared relative errors [targets] with snapshots at these times only."""
        return self.cost.errors2(self.log_t[places], self.log_t_r)

    def without(self, places: Places) -> SubsetProblem:
        """Return the problem without the times at ``places``, which must not be required."""
        rest = np.setdiff1d(np.arange(self.log_t.size), places)
        return replace(self, log_t=self.log_t[rest], required=np.searchsorted(rest, self.required))


class PathGraph:
    """Graph whose paths are the sets of times in which no interval alone exceeds a limit."""

    places: Places
    """Candidates: places of the graph's nodes in the problem's times."""

    def __init__(self, problem: SubsetProblem, *, edges_limit: int = EDGES_LIMIT) -> None:
        self.places = np.arange(problem.log_t.size)
        self._full_problem, self._errors2_of_all = problem, problem.errors2(self.places)
        first = _first_edges(problem)
        while (edges := np.arange(first.size) - first).sum() > edges_limit:
            # A time at which many edges end has near neighbors that save little error: drop half of these times.
            left_out = np.setdiff1d(np.flatnonzero(edges >= edges.mean())[-2::-2], problem.required)
            if not left_out.size:
                break
            problem = problem.without(left_out)
            self.places = np.delete(self.places, left_out)
            first = _first_edges(problem)
        self._problem = problem
        self._first = first  # earliest time with an edge to each time; edges also exist from all times between
        self._offset = np.append(0, np.cumsum(np.arange(first.size) - first))
        self._weight = weight = problem.cost.weights(problem.log_t, problem.log_t_r)
        may_start = np.asarray((problem.cost.from_zero * weight <= problem.limit2 * SLACK).all(1))
        may_start[problem.required.min(initial=first.size) + 1 :] = False  # no path may skip a required time
        may_start[0] = True  # the set of all candidates is always a path
        self._may_start = may_start
        self._find_nodes()

    def _find_nodes(self) -> None:
        """Look up the previous time of every edge and the place of its width in the table of costs.

        Edges are stored row by row: all edges that end at one time are next to each other.
        """
        edges, log_t = int(self._offset[-1]), self._problem.log_t
        self._previous = np.empty(edges, np.int32)
        self._node = np.empty(edges, np.int32)  # in the flattened table [rows of the block, nodes]
        self._fraction = np.empty(edges, np.float32)
        for rows, of_rows in self._blocks():
            row = np.repeat(np.arange(rows.start, rows.stop), np.diff(self._offset[rows.start : rows.stop + 1]))
            previous = np.arange(of_rows.start, of_rows.stop) - self._offset[row] + self._first[row]
            self._previous[of_rows] = previous
            node, self._fraction[of_rows] = self._problem.cost.locate(log_t[row] - log_t[previous])
            self._node[of_rows] = node + (row - rows.start) * self._problem.cost.widths.size

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield slices of rows to compute at once, each with the slice of their edges."""
        rows = max(1, _PRODUCT_SIZE // self._problem.cost.log_cost.size)
        for begin in range(0, self._first.size, rows):
            end = min(begin + rows, self._first.size)
            yield slice(begin, end), slice(int(self._offset[begin]), int(self._offset[end]))

    def costs_with_shares(self, share: FloatArray) -> EdgeCosts:
        """Return the costs of all edges if the slack of each target costs its share, [targets]."""
        return self.costs_with_weights(share / self._full_problem.slack2)

    def costs_with_weights(self, weight_of_error2: FloatArray) -> EdgeCosts:
        """Return the costs of all edges if the squared error of each target counts with its weight, [targets]."""
        cost, edges = self._problem.cost, np.empty(self._previous.size, np.float32)
        # float32, with the largest cost of each node factored out: accurate to 1e-5, and several times faster.
        largest = cost.log_cost.max(1)
        # Negligible costs become 0, because products of denormal numbers are slow.
        table = _in_float32(np.exp(cost.log_cost - largest[:, None]).T)
        weight = _in_float32(self._weight * weight_of_error2)
        for rows, of_rows in self._blocks():
            log_cost = np.log(np.maximum(weight[rows] @ table, np.float32(1e-37))) + largest.astype(np.float32)
            below = log_cost.take(self._node[of_rows])
            rise = log_cost.take(self._node[of_rows] + 1) - below
            edges[of_rows] = np.exp(below + self._fraction[of_rows] * rise)
        start = np.where(self._may_start, self._weight @ (weight_of_error2 * cost.from_zero), np.inf)
        allowance = float((weight_of_error2 * self._full_problem.limit2).sum()) * SLACK
        aim = float((weight_of_error2 * (self._errors2_of_all + self._full_problem.slack2)).sum())
        return EdgeCosts(edges, start, allowance, min(aim, allowance))

    def overshoot(self, places: Places) -> FloatArray:
        """Return the squared errors that a set adds to those of all times, as fractions of the slack, [targets]."""
        return np.asarray((self._full_problem.errors2(places) - self._errors2_of_all) / self._full_problem.slack2)

    def shortest_path(self, costs: EdgeCosts) -> tuple[Places, float]:
        """Return the path of least cost if each time on it costs 1 more, and its cost."""
        size = self._first.size
        best, previous = costs.start + 1.0, np.full(size, -1)
        first, offset, edges = self._first.tolist(), self._offset.tolist(), costs.edges
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

    def least_costs_by_count(self, costs: EdgeCosts, *, most: int, enough: float = 0.0) -> list[FloatArray]:
        """Return the least costs of reaching each candidate with exactly 1, 2, ... times, [candidates] each.

        The list ends at ``most`` times, or at the first number of times whose whole path costs at most ``enough``.
        """
        layers = [costs.start]
        while len(layers) < most and layers[-1][-1] > enough:
            layers.append(self.with_one_more_time(costs, layers[-1]))
        return layers

    def with_one_more_time(self, costs: EdgeCosts, layer: FloatArray) -> FloatArray:
        """Return the least cost of reaching each candidate with one time more than in ``layer``, [candidates]."""
        through = layer.take(self._previous)
        through += costs.edges
        longer = np.full(layer.size, np.inf)
        if through.size:
            longer[1:] = np.minimum.reduceat(through, self._offset[1:-1])
        return longer

    def path(self, costs: EdgeCosts, layers: Sequence[FloatArray]) -> Places:
        """Return the path of least cost with as many times as there are layers, by walking back through the layers."""
        j = self._first.size - 1
        path = [j]
        for layer in reversed(layers[:-1]):
            row = slice(self._first[j], j)
            j = row.start + int((layer[row] + costs.edges[self._offset[j] : self._offset[j + 1]]).argmin())
            path.append(j)
        return self.places[path[::-1]]

    @property
    def is_feasible(self) -> bool:
        """Whether the set of all candidates is within the limits."""
        return bool((self._full_problem.errors2(self.places) <= self._full_problem.limit2 * SLACK).all())

    @property
    def num_edges(self) -> int:
        """Number of edges between two times."""
        return int(self._previous.size)


@dataclass(frozen=True, slots=True, eq=False)
class EdgeCosts:
    """The cost of every edge, at one choice of weights of the targets."""

    edges: NDArray[np.float32]  # between two times, row by row
    start: FloatArray  # from time 0 to each time, infinite where a limit forbids this interval
    allowance: float  # no set within the limits costs more
    aim: float  # at most the allowance; a set that costs more adds more than the slack to some target


def _in_float32(values: FloatArray) -> NDArray[np.float32]:
    """Return values below 1e-18 as 0 and values above 1e30 as 1e30, so that the product of two stays normal."""
    return np.where(values < 1e-18, 0.0, np.minimum(values, 1e30)).astype(np.float32)


def _first_edges(problem: SubsetProblem) -> Places:
    """Return, for each time, the place of the earliest time from which an edge to it is allowed."""
    log_t, cost = problem.log_t, problem.cost
    # 1e-300, because weights after a target are 0: there its limit allows every width.
    allowed = problem.limit2 / np.maximum(cost.weights(log_t, problem.log_t_r), 1e-300) * SLACK
    widest = np.full(log_t.size, np.inf)
    ends = np.append(cost.widths, np.inf)
    # Costs never decrease with the width, so each target allows all widths up to its own limit.
    for m in range(allowed.shape[1]):
        node = np.searchsorted(cost.log_cost[:, m], np.log(allowed[:, m]), side="right")
        widest = np.minimum(widest, ends[node])
    place = np.arange(log_t.size)
    # The edge from the time just before always exists, so that every time can be reached.
    first = np.minimum(np.searchsorted(log_t, log_t - widest - 1e-12, side="left"), np.maximum(place - 1, 0))
    # An edge that passes over a required time would leave this time out of the set.
    last_required = np.searchsorted(problem.required, place, side="left") - 1  # before each time
    # The appended 0 is only a valid index for -1 (no required time before).
    at_least = np.append(problem.required, 0)[last_required]
    return np.asarray(np.maximum(first, np.where(last_required >= 0, at_least, 0)), dtype=np.intp)
