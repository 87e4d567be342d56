"""Which snapshots to keep while training goes on, by what the averages lose.

The squared error of an average is a sum over the intervals between kept times, so what a step is worth is known
exactly: the cost of the interval that its going would leave, less that of the two it would join.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nitrous_ema._base.arguments import format_bytes, parse_bytes
from nitrous_ema.posthoc.interval_cost import IntervalCost
from nitrous_ema.posthoc.selection import log_ratio
from nitrous_ema.profile import FloatArray, exponents, gamma_to_sigma_rel, numbers_between, sigma_rel_to_gamma

__all__ = ["Keep", "KeepAll", "KeepBytes", "KeepCount", "KeepGeometric", "KeepRule", "keep_rule", "wanted_lengths"]

Times = Sequence[float] | FloatArray
"""In the run's own unit."""

_LENGTHS = 16
_LONGEST, _REACH = 0.25, 2.5
_LEAST_SNAPSHOTS = 3


@runtime_checkable
class KeepRule(Protocol):
    """Tells which kept steps go. It has no memory: what is kept is all it looks at."""

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Places in ``t`` of the steps to drop.

        Args:
            t: Times of all kept steps, ascending; the last one is the newest and is never dropped.
            gammas: Exponents of the tracked profiles.
            snapshot_bytes: Size of a snapshot on disk; of the largest, if they differ.
            pinned: Places of steps that are never dropped.
        """

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """Raise ValueError if it makes no sense for these profiles and snapshots of this size."""

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """How many are on disk at once at most, with the one being written; None if there is no bound."""


Keep = KeepRule | int | str
"""What users may say: a rule; ``"all"``; a number of snapshots; or an amount of bytes such as ``"100GB"``."""


def keep_rule(keep: Keep) -> KeepRule:
    """The rule that is meant.

    Raises:
        TypeError: It is nothing that can be meant.
        ValueError: It is a number or an amount that makes no sense.
    """
    if isinstance(keep, KeepRule) and not isinstance(keep, type):
        return keep
    given: Any = keep  # numpy's integers are fine
    if not isinstance(keep, bool) and isinstance(given, Integral):
        return KeepCount(int(given))
    if isinstance(keep, str) and keep == "all":
        return KeepAll()
    if isinstance(keep, str) and not keep.strip().isdecimal() and _is_amount(keep):
        return KeepBytes(keep)
    raise (ValueError if isinstance(keep, str) else TypeError)(
        f"keep is {keep!r}; expected 'all', a number of snapshots such as 32, an amount of bytes such as '100GB', or a "
        "rule such as KeepGeometric(1.05)."
    )


def _is_amount(text: str) -> bool:
    try:
        parse_bytes(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep every step."""

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Nothing."""
        return ()

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """It always makes sense."""

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """Any number."""
        return None


@dataclass(frozen=True, slots=True)
class KeepGeometric:
    """Keep steps whose times grow by a ratio: O(log t) of them, with the same error at every time."""

    ratio: float
    """Each kept step is at least this many times as late as the one before, > 1. The newest is always kept."""

    def __post_init__(self) -> None:
        numbers_between("ratio", self.ratio, 1.0, remedy="1.05 keeps 47 steps per tenfold of training.")

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Steps nearer than the ratio to the last one that stays before them."""
        dropped, last = [], -np.inf
        for place, time in enumerate(t[:-1]):
            if place in pinned or time >= self.ratio * last * (1 - 1e-9):
                last = time
            else:
                dropped.append(place)
        return tuple(dropped)

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """It always makes sense."""

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """There is no bound: their number grows with the logarithm of the time."""
        return None


@dataclass(frozen=True, slots=True)
class KeepCount:
    """Keep at most a number of steps: with each arrival the one goes that costs least.

    It minimizes ``sum (error**2 + loss)**exponent`` over lengths in the range, for the newest step and each pinned one
    as targets, where ``loss`` is what dropping adds to ``error**2``. It needs not know how long training will be; its
    worst error was 1.2 to 2.4 times that of the best set of that size. Costs O(steps * lengths) an arrival.
    """

    count: int
    """Steps to keep, >= 2. Pinned ones count; if they alone are more, only they and the newest are kept."""
    _: KW_ONLY
    sigma_rels: tuple[float, float] | None = None
    """Shortest and longest length that is wanted later; by default from the shortest tracked one to 2.5 times the
    longest, but not past 0.25."""
    exponent: float = 2.0
    """1 looks at the mean squared error over the range, more at the worst. 1 is better for two profiles and
    lengths far beyond the longest tracked one."""

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 2:
            raise ValueError(f"count is {self.count!r}; expected at least 2: the newest step and one more.")
        _check_loss(self.sigma_rels, self.exponent)

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """The steps that cost least, one after the other."""
        return _least_loss(t, self.count, gammas, self.sigma_rels, self.exponent, pinned)

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """Also makes the table of costs, which takes a tenth of a second that training need not wait for later."""
        _cost(gammas, self.sigma_rels)

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """One more is being written, or was dropped and not removed yet."""
        return self.count + 1


@dataclass(frozen=True, slots=True)
class KeepBytes:
    """Keep as many steps as fit into a number of bytes, chosen as ``KeepCount`` does.

    The budget is for all that one training history has on disk: the next snapshot while it is written, and the one
    that was dropped last, which stays for readers until then. Only pinned steps can exceed it.
    """

    budget: int | str
    """Bytes, room for at least 3 snapshots: a number or an amount such as ``"100GB"`` or ``"1.5TiB"``."""
    _: KW_ONLY
    sigma_rels: tuple[float, float] | None = None
    """As in ``KeepCount``."""
    exponent: float = 2.0
    """As in ``KeepCount``."""

    def __post_init__(self) -> None:
        if not isinstance(self.budget, (int, str)) or isinstance(self.budget, bool):
            raise TypeError(f"budget is {self.budget!r}; expected whole bytes, or an amount such as '100GB'.")
        if self.budget_bytes <= 0:
            raise ValueError(f"budget is {self.budget!r}; expected more than no bytes.")
        _check_loss(self.sigma_rels, self.exponent)

    @property
    def budget_bytes(self) -> int:
        """The budget as a number."""
        return parse_bytes(self.budget) if isinstance(self.budget, str) else self.budget

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """The steps that cost least, one after the other, until the rest and one more snapshot fit."""
        count = self.budget_bytes // snapshot_bytes - 1
        return _least_loss(t, count, gammas, self.sigma_rels, self.exponent, pinned)

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """Room for 3 snapshots: two that stay, and the one that is being written."""
        _cost(gammas, self.sigma_rels)
        fit = self.budget_bytes // snapshot_bytes
        if fit < _LEAST_SNAPSHOTS:
            raise ValueError(
                f"keep has a budget of {self.budget_bytes:,} bytes, which holds {fit} snapshots of "
                f"{snapshot_bytes:,} bytes ({format_bytes(snapshot_bytes)}); expected room for at least {_LEAST_SNAPSHOTS}: "
                "two that stay, and one that is being written. Raise the budget, store averages in half the bytes "
                "(checkpoint_dtype=torch.bfloat16), or track fewer profiles."
            )

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """As many as fit."""
        return self.budget_bytes // snapshot_bytes


def wanted_lengths(gammas: FloatArray, sigma_rels: tuple[float, float] | None) -> FloatArray:
    """Lengths over a range, evenly spaced in their logarithm, [lengths].

    Args:
        gammas: Exponents of the tracked profiles, which the default range is made of.
        sigma_rels: Shortest and longest length; default as in ``KeepCount``.

    Raises:
        ValueError: The range makes no sense.
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
    sigma_rel_to_gamma((low, high))  # says what is wrong with them
    return np.unique(np.geomspace(low, high, _LENGTHS)) if low < high else np.array([low])


def _check_loss(sigma_rels: tuple[float, float] | None, exponent: float) -> None:
    numbers_between("exponent", exponent, 0.0, remedy="2 is a good choice.")
    if sigma_rels is not None:
        wanted_lengths(np.empty(0), sigma_rels)


def _least_loss(
    t: Times,
    count: int,
    gammas: Sequence[float],
    sigma_rels: tuple[float, float] | None,
    exponent: float,
    pinned: Collection[int],
) -> tuple[int, ...]:
    """Places of the steps that go, so that at most ``count`` stay; see ``KeepCount``."""
    times = np.asarray(t, dtype=np.float64)
    fixed = np.zeros(times.size, dtype=bool)
    fixed[[*pinned, times.size - 1]] = True
    kept = np.arange(times.size)
    if kept.size <= count or fixed.all():
        return ()
    cost = _cost(gammas, sigma_rels)
    while kept.size > count and not fixed[kept].all():
        score = _scores(cost, times[kept], times[fixed], exponent)
        score[fixed[kept]] = np.inf
        kept = np.delete(kept, int(score.argmin()))
    return tuple(np.setdiff1d(np.arange(times.size), kept).tolist())


def _cost(gammas: Sequence[float], sigma_rels: tuple[float, float] | None) -> IntervalCost:
    tracked = exponents("gammas", gammas)
    return IntervalCost.of(tracked, sigma_rel_to_gamma(wanted_lengths(tracked, sigma_rels)))


def _scores(cost: IntervalCost, t: FloatArray, targets: FloatArray, exponent: float) -> FloatArray:
    """What is left to minimize when each step goes, [steps]; that of the last one means nothing."""
    log_t = log_ratio(t, t[-1])
    width = np.diff(log_t, prepend=-np.inf)
    alone, joined = cost.of_widths(width), cost.of_widths(width[:-1] + width[1:])
    scores = np.zeros(t.size)
    for log_t_r in log_ratio(targets, t[-1]):
        weight = cost.weights(log_t, np.full(cost.powers.shape, log_t_r))
        present = alone * weight
        loss = joined * weight[1:] - present[:-1] - present[1:]
        scores[:-1] += ((present.sum(0) + np.maximum(loss, 0.0)) ** exponent).sum(1)
    return scores
