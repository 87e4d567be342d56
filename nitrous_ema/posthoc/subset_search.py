"""The best sets of kept times: the fewest within limits, and of a given number those with the least worst error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nitrous_ema.posthoc.shortest_paths import SLACK, PathGraph, Places, SubsetProblem
from nitrous_ema.profile import FloatArray

# With more edges than this the multipliers are found on fewer candidates first.
_ROUGH_EDGES = 100_000
_ROUNDS, _FINE_ROUNDS, _CLOSING_ROUNDS = 20, 8, 12
# Edges times steps that the closing rounds may look at: some 0.3 s.
_CLOSING_WORK = 60_000_000
_MORE_TIMES = 4  # than the bound, that a closing round tries
_TIES = 4
_SMALL = 32  # times of a set of which each is tried to be left out: 0.1 s
# Multiplier of the errors, in steps per limit, that the search begins with; any would do.
_FIRST_MULTIPLIER = 10.0
_LEAST_ERROR_ROUNDS, _ROUNDS_TO_PRUNE = 16, 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fewest:
    """What ``fewest_times`` found."""

    places: Places
    lower_bound: int
    candidates: int
    ties: int


def fewest_times(question: SubsetProblem, judge: Callable[[Places], float | None]) -> Fewest:
    """The fewest times that keep every target within its limit.

    Args:
        question: Times, targets and limits. All times together must be within the limits.
        judge: Tells exactly whether a set is within the limits: its amplification of rounding, or None.
    """
    search, paths, rounds = _SubsetSearch(question, judge), PathGraph(question), _ROUNDS
    if paths.edges > _ROUGH_EDGES:
        rough = PathGraph(question, edges_limit=_ROUGH_EDGES)
        if rough.can_do:  # else the multipliers would grow without end
            search.find_multipliers(rough, _ROUNDS, certify=False)
            rounds = _FINE_ROUNDS
    if paths.can_do:
        search.find_multipliers(paths, rounds, certify=True)
        search.close_gap(paths)
    search.leave_out_more()
    return Fewest(places=search.best, lower_bound=search.lower_bound, candidates=paths.places.size, ties=search.ties)


class _SubsetSearch:
    """The best set so far, the bound on all others, and the multipliers of the targets that led there."""

    def __init__(self, question: SubsetProblem, judge: Callable[[Places], float | None]) -> None:
        self.question, self.judge = question, judge
        self.best = np.arange(question.log_t.size)
        self.amplification = np.inf
        self.lower_bound = question.required.size
        self.ties = 1
        self.share = np.full(question.limit2.size, 1 / question.limit2.size)
        self.multiplier = _FIRST_MULTIPLIER
        self._judged: set[bytes] = set()

    def consider(self, places: Places) -> bool:
        """Keep this set if it is within the limits and smaller, or as small and amplifying less; tell if it is."""
        smaller, key = places.size < self.best.size, places.tobytes()
        if places.size > self.best.size or key in self._judged or not (smaller or self.ties < _TIES):
            return False
        if (self.question.errors2(places) > self.question.limit2 * SLACK).any():
            return False
        self._judged.add(key)
        amplification = self.judge(places)
        if amplification is None:
            return False
        self.ties = 1 if smaller else self.ties + 1
        if smaller or amplification < self.amplification:
            self.best, self.amplification = places, amplification
        return True

    def find_multipliers(self, paths: PathGraph, rounds: int, *, certify: bool) -> None:
        """Look for multipliers of the errors at which the cheapest path is just within all limits.

        No set costs less than the cheapest path, and one within the limits costs at most the allowance beyond its
        number of times: at any multipliers this bounds that number.
        """
        order, share, best_dual = 2 * self.question.cost.orders, self.share, -np.inf
        for k in range(rounds):
            prices = paths.priced(self.multiplier * share)
            places, cost = paths.cheapest(prices)
            dual = cost - prices.allowance
            if dual > best_dual:
                self.share, best_dual = share, dual
            if certify:
                self.lower_bound = max(self.lower_bound, int(np.ceil(dual - 1e-6)))
            self.consider(places)
            if self.best.size <= self.lower_bound:
                return
            overshoot = paths.overshoot(places)
            share = _updated(share, overshoot, 0.8 / (1 + k / 8))
            # Squared errors fall with the number of times to the power -order, and the best number pays for itself.
            worst = max(float(overshoot.max()), 1e-12)
            self.multiplier *= float(np.clip(worst ** (1 + 1 / order), 1e-3, 1e3))

    def close_gap(self, paths: PathGraph) -> None:
        """Look at the best path of each number of times: the first that costs no more than the allowance is a bound."""
        work = 0
        for k in range(_CLOSING_ROUNDS):
            work += paths.edges * self.best.size
            if self.best.size <= self.lower_bound or work > _CLOSING_WORK:
                return
            prices = paths.priced(self.share)
            layers = paths.by_count(prices, most=self.best.size - 1, enough=prices.allowance)
            enough = layers[-1][-1] <= prices.allowance
            self.lower_bound = max(self.lower_bound, len(layers) if enough else self.best.size)
            if not enough:
                return
            while layers[-1][-1] > prices.aim and len(layers) < self.best.size - 1:
                layers.append(paths.one_more(prices, layers[-1]))
            overshoot = paths.overshoot(paths.path(prices, layers))
            for _ in range(min(_MORE_TIMES, self.best.size - len(layers))):
                if self.consider(paths.path(prices, layers)):
                    break
                layers.append(paths.one_more(prices, layers[-1]))
            self.share = _updated(self.share, overshoot, 0.8 / (1 + k / 4))

    def leave_out_more(self) -> None:
        """Leave out single times of a small set while the limits hold.

        Paths do not know that weights sum to 1. Where few times give a target badly that makes much of its error, and
        the best paths are not within the limits.
        """
        while self.lower_bound < self.best.size <= _SMALL:
            free = np.setdiff1d(np.arange(self.best.size), np.searchsorted(self.best, self.question.required))
            smaller = [np.delete(self.best, place) for place in free]
            smaller.sort(key=lambda places: float((self.question.errors2(places) / self.question.limit2).max()))
            if not any(map(self.consider, smaller)):
                return


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeastError:
    """What ``least_error`` found."""

    places: Places
    lower_bound: float
    candidates: int


def least_error(question: SubsetProblem, count: int) -> LeastError:
    """The ``count`` times with the least error of the worst target, before the condition that weights sum to 1.

    Args:
        question: Times and targets. Its limits are not used.
        count: Times to keep, at least as many as are required and fewer than there are.

    Returns:
        The times, and an error that no ``count`` of the candidates go below for all targets (relative, not squared).
    """
    best = _spread_evenly(question, count)
    weight, bound2, candidates = np.ones(question.limit2.size), 0.0, 0
    for k in range(_LEAST_ERROR_ROUNDS):
        if k % _ROUNDS_TO_PRUNE == 0:  # the better the best set, the fewer intervals can be in a better one
            worst2 = max(float(question.errors2(best).max()), 1e-300)
            paths = PathGraph(replace(question, limit2=np.full(weight.size, worst2 * SLACK)))
            candidates = max(candidates, paths.places.size)
        weight = weight / weight.sum()
        prices = paths.priced_by(weight / worst2)
        layers = paths.by_count(prices, most=count)
        bound2 = max(bound2, float(layers[-1][-1]) * worst2 / SLACK)
        places = paths.path(prices, layers)
        errors2 = question.errors2(places)
        if errors2.max() < question.errors2(best).max():
            best = places
        weight = weight * np.maximum(np.sqrt(errors2 / max(float(errors2.max()), 1e-300)), 1e-6)
    return LeastError(places=best, lower_bound=float(np.sqrt(bound2)), candidates=candidates)


def _spread_evenly(question: SubsetProblem, count: int) -> Places:
    """The best of some simple sets of ``count`` times: even in a power of time, from even to nearly geometric."""
    best, least = np.arange(0), np.inf
    tau = np.exp(question.log_t)
    free = count - question.required.size
    for power in (1, 1.5, 2, 3, 5, 8):
        wanted = (np.arange(1, free + 1) / (free + 1)) ** power
        places = np.union1d(np.searchsorted(tau, wanted), question.required)
        worst = float(question.errors2(places).max())
        if worst < least:
            best, least = places, worst
    rest = np.setdiff1d(np.arange(tau.size), best)  # where times were too few, or too close
    return np.union1d(best, rest[::-1][: count - best.size])


def _updated(share: FloatArray, overshoot: FloatArray, power: float) -> FloatArray:
    """More of the cost for the targets that are further off, as in Lawson's algorithm."""
    share = share * np.clip(overshoot / max(float(overshoot.max()), 1e-300), 1e-3, 1.0) ** power
    return np.asarray(share / share.sum())
