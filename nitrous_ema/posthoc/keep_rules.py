"""Retention during training: rules that choose which snapshots to drop, by the error this adds to averages.

The squared error of an average is a sum over the intervals between snapshot times. So the error added by dropping a
step is known without a solve: the cost of the joined interval, less the costs of the two intervals it joins. Retention
after training is in ``pruning``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nitrous_ema._base.arguments import format_bytes, parse_bytes, pluralize
from nitrous_ema.posthoc.drop_losses import DropLosses
from nitrous_ema.posthoc.interval_cost import IntervalCost
from nitrous_ema.posthoc.wanted_lengths import wanted_lengths
from nitrous_ema.profile import FloatArray, exponents, numbers_between, sigma_rel_to_gamma

__all__ = ["Keep", "KeepAll", "KeepBytes", "KeepCount", "KeepGeometric", "KeepRule", "keep_rule"]

Times = Sequence[float] | FloatArray
"""Training times, in the unit of the run."""

_MIN_SNAPSHOTS = 3  # two to keep, and one being written


@runtime_checkable
class KeepRule(Protocol):
    """A rule that chooses the steps to drop. It has no state: it depends on the existing steps alone."""

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Return the places in ``t`` of the steps to drop.

        Args:
            t: Times of all existing steps, ascending; the last one is the newest and is never dropped.
            gammas: Exponents of the tracked profiles.
            snapshot_bytes: Size of a snapshot on disk; of the largest snapshot, if sizes differ.
            pinned: Places of steps that are never dropped.
        """

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """Raise ValueError if the rule cannot work with these profiles or with snapshots of this size."""

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """Return the largest number of snapshots on disk at once, with the one being written; None if unbounded."""


Keep = KeepRule | int | str
"""Values of ``keep=``: a rule; ``"all"``; a number of snapshots; or an amount of bytes such as ``"100GB"``."""


def keep_rule(keep: Keep) -> KeepRule:
    """Return the rule for a value of ``keep=``.

    Raises:
        TypeError: The value has an unsupported type.
        ValueError: The text is neither ``"all"`` nor an amount of bytes, or the number or amount is out of range.
    """
    if isinstance(keep, KeepRule) and not isinstance(keep, type):
        return keep
    number: Any = keep  # Any: numpy integers are Integral, which mypy does not accept for int
    if not isinstance(keep, bool) and isinstance(number, Integral):
        return KeepCount(int(number))
    if isinstance(keep, str) and keep == "all":
        return KeepAll()
    # A number as text is refused: "32" may mean snapshots or bytes.
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
        """Drop nothing."""
        return ()

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """Accept all profiles and sizes."""

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """Return None: the number is unbounded."""
        return None


@dataclass(frozen=True, slots=True)
class KeepGeometric:
    """Keep steps whose times grow by a ratio: O(log t) of them, with the same error at every time."""

    ratio: float
    """Least ratio of the times of neighboring kept steps, > 1. The newest step is always kept."""

    def __post_init__(self) -> None:
        numbers_between("ratio", self.ratio, 1.0, remedy="1.05 keeps 47 steps per tenfold of training.")

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Drop steps that are closer than the ratio to the last kept step before them."""
        dropped, last = [], -np.inf
        for place, time in enumerate(t[:-1]):
            # 1e-9, because times that grow by exactly the ratio may miss it by a rounding.
            if place in pinned or time >= self.ratio * last * (1 - 1e-9):
                last = time
            else:
                dropped.append(place)
        return tuple(dropped)

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """Accept all profiles and sizes."""

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """Return None: the number grows with the logarithm of the time."""
        return None


@dataclass(frozen=True, slots=True)
class KeepCount:
    """Keep at most a number of steps: each new step beyond it drops the step whose loss adds least error.

    The rule minimizes ``sum (error**2 + loss)**exponent`` over lengths in the range, with the newest step and each
    pinned step as targets. ``loss`` is the error that dropping adds to ``error**2``. The rule does not need to know how
    long training will be. Its worst error was 1.2 to 2.4 times that of the best set of that size. Each new step costs
    O(steps * lengths).
    """

    count: int
    """Steps to keep, >= 2, including pinned steps. Where more are pinned, only these and the newest step are kept."""
    _: KW_ONLY
    sigma_rels: tuple[float, float] | None = None
    """Shortest and longest length that you may request later; by default from the shortest tracked length to 2.5 times
    the longest, but at most 0.25."""
    exponent: float = 2.0
    """1 minimizes the mean squared error over the range; larger exponents give the worst lengths more influence. 1 is
    better for two profiles and lengths far beyond the longest tracked one."""

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 2:
            raise ValueError(
                f"keep is {self.count!r}; expected a whole number of at least 2: the newest snapshot and another."
            )
        _check_loss(self.sigma_rels, self.exponent)

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Drop the steps that add least error, one after the other."""
        return _drops_of_least_loss(t, self.count, gammas, self.sigma_rels, self.exponent, pinned)

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """Raise ValueError for a range of lengths out of range; also compute the table of costs.

        The table takes a tenth of a second. Computed here, it does not delay training later.
        """
        _cost(gammas, self.sigma_rels)

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """Return ``count + 1``: one more snapshot is being written, or has been dropped but not removed yet."""
        return self.count + 1


@dataclass(frozen=True, slots=True)
class KeepBytes:
    """Keep as many steps as fit into a number of bytes, chosen as ``KeepCount`` does.

    The budget covers all snapshots of one training history on disk. This includes the next snapshot while it is being
    written, and the snapshot dropped last, which stays on disk for readers until then. Only pinned steps can exceed the
    budget.
    """

    budget: int | str
    """Bytes, space for at least 3 snapshots: a number, or an amount such as ``"100GB"`` or ``"1.5TiB"``."""
    _: KW_ONLY
    sigma_rels: tuple[float, float] | None = None
    """As in ``KeepCount``."""
    exponent: float = 2.0
    """As in ``KeepCount``."""

    def __post_init__(self) -> None:
        if not isinstance(self.budget, (int, str)) or isinstance(self.budget, bool):
            raise TypeError(f"budget is {self.budget!r}; expected a number of bytes, or an amount such as '100GB'.")
        if self.budget_bytes <= 0:
            raise ValueError(f"budget is {self.budget!r}; expected more than 0 bytes.")
        _check_loss(self.sigma_rels, self.exponent)

    @property
    def budget_bytes(self) -> int:
        """The budget as a number of bytes."""
        return parse_bytes(self.budget) if isinstance(self.budget, str) else self.budget

    def drop(
        self, t: Times, *, gammas: Sequence[float], snapshot_bytes: int, pinned: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Drop the steps that add least error, one after the other, until the others and one more snapshot fit."""
        count = self.budget_bytes // snapshot_bytes - 1  # space for the next snapshot while it is being written
        return _drops_of_least_loss(t, count, gammas, self.sigma_rels, self.exponent, pinned)

    def check(self, gammas: Sequence[float], snapshot_bytes: int) -> None:
        """Raise ValueError if fewer than 3 snapshots fit: two to keep, and the one being written."""
        _cost(gammas, self.sigma_rels)
        fit = self.budget_bytes // snapshot_bytes
        if fit < _MIN_SNAPSHOTS:
            raise ValueError(
                f"keep= has a budget of {self.budget_bytes:,} bytes, which holds {pluralize(fit, 'snapshot')} of "
                f"{snapshot_bytes:,} bytes ({format_bytes(snapshot_bytes)}); expected space for at least "
                f"{_MIN_SNAPSHOTS}: two to keep, and one being written. Raise the budget, store averages in half the "
                "bytes (checkpoint_dtype=torch.bfloat16), or track fewer profiles."
            )

    def most_snapshots(self, snapshot_bytes: int) -> int | None:
        """Return the number of snapshots that fit into the budget."""
        return self.budget_bytes // snapshot_bytes


def _check_loss(sigma_rels: tuple[float, float] | None, exponent: float) -> None:
    numbers_between("exponent", exponent, 0.0, remedy="2 is a good choice.")
    if sigma_rels is not None:
        wanted_lengths(np.empty(0), sigma_rels)


def _drops_of_least_loss(
    t: Times,
    count: int,
    gammas: Sequence[float],
    sigma_rels: tuple[float, float] | None,
    exponent: float,
    pinned: Collection[int],
) -> tuple[int, ...]:
    """Return the places of the steps to drop so that at most ``count`` remain; see ``KeepCount``."""
    times = np.asarray(t, dtype=np.float64)
    fixed = np.zeros(times.size, dtype=bool)
    fixed[[*pinned, times.size - 1]] = True
    num_dropped = min(times.size - count, int((~fixed).sum()))
    if num_dropped <= 0:
        return ()
    losses = DropLosses(_cost(gammas, sigma_rels), times, times[fixed], exponent)
    dropped = []
    # One step at a time: each drop changes the intervals, and so the scores, of the neighboring steps.
    for _ in range(num_dropped):
        scores = losses.scores()
        scores[fixed] = np.inf
        dropped.append(int(scores.argmin()))
        losses.drop(dropped[-1])
    return tuple(sorted(dropped))


def _cost(gammas: Sequence[float], sigma_rels: tuple[float, float] | None) -> IntervalCost:
    tracked = exponents("gammas", gammas)
    return IntervalCost.of(tracked, sigma_rel_to_gamma(wanted_lengths(tracked, sigma_rels)))
