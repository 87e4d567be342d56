"""Search for the best sets of snapshot times: the fewest within limits, or the least worst error at a given number.

A set must satisfy the limits of several targets, but a shortest path minimizes one cost. So the search looks for
weights of the targets at which the shortest path is just within all limits (Lagrangian multipliers). At any weights the
shortest path also gives a lower bound on the size of every set within the limits. ``fewest_times`` stops when the best
set meets the bound. Paths ignore the condition that weights sum to 1, so each set that may improve on the best one is
evaluated by the exact solve. The set may be larger than the smallest one; the bound always holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nitrous_ema.posthoc.shortest_paths import SLACK, PathGraph, Places, SubsetProblem
from nitrous_ema.profile import FloatArray

# With more edges than this the multipliers are first searched on a coarser graph, whose paths are found faster.
_COARSE_EDGES = 100_000
_ROUNDS, _FINE_ROUNDS, _CLOSING_ROUNDS = 20, 8, 12
_CLOSING_WORK = 60_000_000  # edges times steps that the closing rounds may compute: about 0.3 s
_MORE_TIMES = 4  # numbers of times above the bound that a closing round tries
_TIES = 4  # sets of the least size that are compared by amplification
_SMALL = 32  # largest set from which drop_single_times tries to drop: takes 0.1 s
_FIRST_MULTIPLIER = 10.0  # of the errors, in steps per limit; the search corrects any start
_LEAST_ERROR_ROUNDS, _ROUNDS_PER_GRAPH = 16, 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FewestTimes:
    """Result of ``fewest_times``."""

    places: Places
    """Places of the chosen times in the problem's times, ascending."""
    lower_bound: int
    """No set of fewer candidates is within the limits."""
    candidates: int
    """Number of times in the graph that was searched."""
    ties: int
    """Number of evaluated sets of that size within the limits."""


def fewest_times(problem: SubsetProblem, evaluate: Callable[[Places], float | None]) -> FewestTimes:
    """Return the fewest times with which every target is within its limit.

    Args:
        problem: Times, targets and limits. The set of all times must be within the limits.
        evaluate: Solves exactly with a set of times. Returns the set's amplification of rounding, or None for a set
            that exceeds a limit.
    """
    search, graph, rounds = _SubsetSearch(problem, evaluate), PathGraph(problem), _ROUNDS
    if graph.num_edges > _COARSE_EDGES:
        coarse = PathGraph(problem, edges_limit=_COARSE_EDGES)
        if coarse.is_feasible:  # otherwise the multipliers would grow without bound
            search.find_multipliers(coarse, _ROUNDS, certify=False)
            rounds = _FINE_ROUNDS
    if graph.is_feasible:
        search.find_multipliers(graph, rounds, certify=True)
        search.close_gap(graph)
    search.drop_single_times()
    return FewestTimes(
        places=search.best, lower_bound=search.lower_bound, candidates=graph.places.size, ties=search.ties
    )


class _SubsetSearch:
    """State of one search: the best set so far, the lower bound on all sets, and the multipliers of the targets.

    The multipliers are ``multiplier * share``: the shares sum to 1 and distribute the cost among the targets.
    """

    def __init__(self, problem: SubsetProblem, evaluate: Callable[[Places], float | None]) -> None:
        self.problem, self.evaluate = problem, evaluate
        self.best = np.arange(problem.log_t.size)
        self.amplification = np.inf
        self.lower_bound = problem.required.size
        self.ties = 1
        self.share = np.full(problem.limit2.size, 1 / problem.limit2.size)
        self.multiplier = _FIRST_MULTIPLIER
        self._evaluated: set[bytes] = set()  # different multipliers often lead to the same path

    def consider(self, places: Places) -> bool:
        """Evaluate a set unless it cannot be the best one; return whether it was evaluated and is within the limits.

        It becomes the best set if it is smaller, or equally small with less amplification.
        """
        smaller, key = places.size < self.best.size, places.tobytes()
        if places.size > self.best.size or key in self._evaluated or not (smaller or self.ties < _TIES):
            return False
        # The table rejects most sets; the exact solve costs much more.
        if (self.problem.errors2(places) > self.problem.limit2 * SLACK).any():
            return False
        self._evaluated.add(key)
        amplification = self.evaluate(places)
        if amplification is None:
            return False
        self.ties = 1 if smaller else self.ties + 1
        if smaller or amplification < self.amplification:
            self.best, self.amplification = places, amplification
        return True

    def find_multipliers(self, graph: PathGraph, rounds: int, *, certify: bool) -> None:
        """Search for multipliers of the errors at which the shortest path is just within all limits.

        A path also costs 1 per time. No set costs less than the shortest path, and the errors of a set within the
        limits cost at most the allowance. At any multipliers the difference is a lower bound on the number of times.

        Args:
            graph: The candidates.
            rounds: Multipliers to try.
            certify: Whether the bound holds for the search's candidates. It does not on a coarser graph.
        """
        order, share, best_dual = 2 * self.problem.cost.orders, self.share, -np.inf
        for k in range(rounds):
            costs = graph.costs_with_shares(self.multiplier * share)
            places, cost = graph.shortest_path(costs)
            dual = cost - costs.allowance
            if dual > best_dual:  # close_gap continues from the shares with the best bound
                self.share, best_dual = share, dual
            if certify:
                # A number of times is whole, so the bound rounds up; 1e-6 absorbs the rounding of the dual.
                self.lower_bound = max(self.lower_bound, int(np.ceil(dual - 1e-6)))
            self.consider(places)
            if self.best.size <= self.lower_bound:
                return
            overshoot = graph.overshoot(places)
            share = _shifted_shares(share, overshoot, 0.8 / (1 + k / 8))
            # Squared errors fall with the number of times to the power -order. At the optimum one more time costs as
            # much as the errors it saves. Together these give the exponent of the correction.
            worst = max(float(overshoot.max()), 1e-12)
            self.multiplier *= float(np.clip(worst ** (1 + 1 / order), 1e-3, 1e3))

    def close_gap(self, graph: PathGraph) -> None:
        """Raise the bound by the shortest path of each number of times, and try the paths just above the bound.

        A set within the limits costs at most the allowance. So the first number of times whose shortest path costs no
        more is a lower bound.
        """
        work = 0
        for k in range(_CLOSING_ROUNDS):
            work += graph.num_edges * self.best.size
            if self.best.size <= self.lower_bound or work > _CLOSING_WORK:
                return
            costs = graph.costs_with_shares(self.share)
            layers = graph.least_costs_by_count(costs, most=self.best.size - 1, enough=costs.allowance)
            enough = layers[-1][-1] <= costs.allowance
            self.lower_bound = max(self.lower_bound, len(layers) if enough else self.best.size)
            if not enough:  # no smaller set of the candidates is within the limits
                return
            # A path that costs more than the aim exceeds the slack of at least one target.
            while layers[-1][-1] > costs.aim and len(layers) < self.best.size - 1:
                layers.append(graph.with_one_more_time(costs, layers[-1]))
            overshoot = graph.overshoot(graph.path(costs, layers))
            for _ in range(min(_MORE_TIMES, self.best.size - len(layers))):
                if self.consider(graph.path(costs, layers)):
                    break
                layers.append(graph.with_one_more_time(costs, layers[-1]))
            self.share = _shifted_shares(self.share, overshoot, 0.8 / (1 + k / 4))

    def drop_single_times(self) -> None:
        """Drop single times from a small set while the limits hold.

        Paths ignore the condition that weights sum to 1. With few times this condition can cause much of a target's
        error, and the shortest paths then exceed the limits.
        """
        while self.lower_bound < self.best.size <= _SMALL:
            free = np.setdiff1d(np.arange(self.best.size), np.searchsorted(self.best, self.problem.required))
            smaller = [np.delete(self.best, place) for place in free]
            smaller.sort(key=lambda places: float((self.problem.errors2(places) / self.problem.limit2).max()))
            if not any(map(self.consider, smaller)):
                return


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeastErrorTimes:
    """Result of ``least_error_times``."""

    places: Places
    """Places of the chosen times in the problem's times, ascending."""
    lower_bound: float
    """No set of that size of the candidates has a smaller worst error (relative, not squared)."""
    candidates: int
    """Number of times in the largest graph that was searched."""


def least_error_times(problem: SubsetProblem, count: int) -> LeastErrorTimes:
    """Return the ``count`` times with the least error of the worst target, without the condition that weights sum to 1.

    Args:
        problem: Times and targets. Its limits are not used.
        count: Number of times, at least as many as are required and fewer than all.
    """
    best = _spread_evenly(problem, count)
    weight, bound2, candidates = np.ones(problem.limit2.size), 0.0, 0
    for k in range(_LEAST_ERROR_ROUNDS):
        if k % _ROUNDS_PER_GRAPH == 0:  # the better the best set, the fewer edges can be part of a better one
            worst2 = max(float(problem.errors2(best).max()), 1e-300)
            graph = PathGraph(replace(problem, limit2=np.full(weight.size, worst2 * SLACK)))
            candidates = max(candidates, graph.places.size)
        weight = weight / weight.sum()
        costs = graph.costs_with_weights(weight / worst2)
        layers = graph.least_costs_by_count(costs, most=count)
        # Weights sum to 1. So the worst error of a set is at least its weighted error, which is at least the path's.
        bound2 = max(bound2, float(layers[-1][-1]) * worst2 / SLACK)
        places = graph.path(costs, layers)
        errors2 = problem.errors2(places)
        if errors2.max() < problem.errors2(best).max():
            best = places
        weight = weight * np.maximum(np.sqrt(errors2 / max(float(errors2.max()), 1e-300)), 1e-6)
    return LeastErrorTimes(places=best, lower_bound=float(np.sqrt(bound2)), candidates=candidates)


def _spread_evenly(problem: SubsetProblem, count: int) -> Places:
    """Return the best of some simple sets of ``count`` times: even in a power of time, up to nearly geometric."""
    best, least = np.arange(0), np.inf
    tau = np.exp(problem.log_t)
    free = count - problem.required.size
    for power in (1, 1.5, 2, 3, 5, 8):
        wanted = (np.arange(1, free + 1) / (free + 1)) ** power
        places = np.union1d(np.searchsorted(tau, wanted), problem.required)
        worst = float(problem.errors2(places).max())
        if worst < least:
            best, least = places, worst
    rest = np.setdiff1d(np.arange(tau.size), best)  # fills up sets in which several wanted times are one
    return np.union1d(best, rest[::-1][: count - best.size])


def _shifted_shares(share: FloatArray, overshoot: FloatArray, power: float) -> FloatArray:
    """Return shares of sum 1 that shift cost to the targets with larger overshoot, as in Lawson's algorithm."""
    share = share * np.clip(overshoot / max(float(overshoot.max()), 1e-300), 1e-3, 1.0) ** power
    return np.asarray(share / share.sum())
