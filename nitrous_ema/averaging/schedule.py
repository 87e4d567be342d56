"""When an update is applied, and which weight the new parameters get in it. Plain numbers, no tensors.

``step`` counts the calls of ``update()``; snapshots are named by it. ``now`` is the training time (steps, images or
tokens). ``t`` is the training time of the last applied update; only the mathematics uses it. With ``update_every = k``
an update is applied at calls 1, 1 + k, 1 + 2 k, ...

===================  ==================================================================  ==========================
step_size_correction fraction of the old average that an applied update retains          a checkpoint first
===================  ==================================================================  ==========================
``"exact"``          ``(1 - t_delta / t) ** (gamma + 1)``, t_delta = time since the one  brings the averages up to
                     before: the profile is exact at any stride or batch size            now
``True``             nitrous-ema 0.0.1's: geometric mean over the coming interval        changes nothing
``False``            ema-pytorch's and 0.0.1's default: as if every call were applied,   changes nothing
                     so the real sigma_rel differs when k > 1
===================  ==================================================================  ==========================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Number, Real
from typing import Any, Literal

from nitrous_ema.errors import warn
from nitrous_ema.profile import gamma_to_sigma_rel, update_weight

Time = int | float
_LEAST_WEIGHT = 1e-4
_LARGEST_JUMP = 8  # of the interval between updates at a resume; batch sizes rarely change by more
StepSizeCorrection = Literal["exact"] | bool


class Schedule:
    """The clock of one EMA and the weights of its updates.

    Args:
        gammas: Exponents of the tracked profiles.
        update_every: Calls of ``update()`` from one applied update to the next, at least 1.
        correction: See the module's table.
        frozen: Only the first update is applied, which copies the parameters.
    """

    def __init__(
        self, gammas: Sequence[float], update_every: int, correction: StepSizeCorrection, frozen: bool = False
    ) -> None:
        self.gammas = tuple(gammas)
        self.update_every = update_every
        self.correction: StepSizeCorrection = correction
        self.frozen = frozen
        self.step = 0
        self.now: Time = 0
        self.t: Time = 0
        self.t_first: Time = 0
        self.updates = 0  # applied ones
        self.least_weight = _LEAST_WEIGHT
        """``warn_of_small`` warns below this weight of the parameters; 0 for float64 averages and after a warning."""
        self._applied_at: int | None = None  # step of the last applied update; None at first and after load()
        self._usual_delta: float | None = None  # of a loaded state, until the first call of update() after it
        self._interval_was_whole = False  # no checkpoint and no resume between the last two applied updates
        if correction is False and update_every > 1:
            self._warn_uncorrected()

    @property
    def is_due(self) -> bool:
        """Whether the next call of ``update()`` is applied."""
        return self.step % self.update_every == 0 and not (self.frozen and self.updates)

    @property
    def is_behind(self) -> bool:
        """Whether ``catch_up`` would return weights."""
        return self.correction == "exact" and self.t != self.now and not self.frozen

    def advance(self, t_delta: Time) -> tuple[float, ...] | None:
        """Count one call of ``update()``.

        Args:
            t_delta: Training time since the call before, in the run's unit; positive and finite.

        Returns:
            The weight of the new parameters for each profile (1.0: plain copy), or None if nothing is applied.

        Raises:
            ValueError: ``t_delta`` is not positive and finite, or not 1 without the exact correction. Nothing changed.
        """
        t_delta = self.check_t_delta(t_delta)
        is_due = self.is_due
        self.step += 1
        self.now += t_delta
        return self._apply() if is_due else None

    def catch_up(self) -> tuple[float, ...] | None:
        """Return the weights that bring the averages up to ``now`` for a checkpoint; None if they are up to date.

        The calls at which updates are applied stay the same.
        """
        return self._apply() if self.is_behind else None

    def warn_of_small(self, weights: Sequence[float]) -> None:
        """Warn, once, that float32 averages lose small changes of the weights.

        Args:
            weights: As returned by ``advance``.
        """
        weight = min(weights)
        # With evenly spaced updates each one would have this weight. A single short interval, after a checkpoint for
        # example, has a small weight too, but does not mean that small changes are lost in general.
        usual_weight = (min(self.gammas) + 1) / max(self.updates, 1)
        if not self._interval_was_whole or max(weight, usual_weight) >= self.least_weight:
            return
        self.least_weight = 0.0
        sigma_rel = gamma_to_sigma_rel(self.gammas[weights.index(weight)])
        warn(
            f"Each update now contributes only {weight:.1e} to the sigma_rel={sigma_rel:.3f} average. In float32, "
            f"relative weight changes smaller than {2**-24 / weight:.1e} are lost to rounding. Average less often: "
            f"with step_size_correction='exact', update_every={10 * self.update_every} gives the same profile, more "
            "precisely and at a tenth of the cost."
        )

    def state(self) -> dict[str, Time]:
        """Return the counters as plain numbers, for a state_dict."""
        return {
            "step": self.step,
            "now": self.now,
            "t": self.t,
            "t_first": self.t_first,
            "updates": self.updates,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the counters of ``state()``, or from a step alone: then training time is counted in steps."""
        step, self._applied_at = int(state["step"]), None
        # 0.0.1 and ema-pytorch apply an update at calls 1, 1 + k, ...: the last applied one follows from the step.
        last = (step - 1) // self.update_every * self.update_every + 1 if step else 0
        self.step = step
        self.now = state.get("now", step)
        self.t = state.get("t", last)
        self.t_first = state.get("t_first", min(step, 1))
        self.updates = int(state.get("updates", -(-step // self.update_every)))
        self._usual_delta = self.now / step if step else None

    def warn_of_jump(self, t_delta: Time) -> None:
        """Warn if the first interval after a load suggests that training time is counted in another unit since then."""
        usual, self._usual_delta = self._usual_delta, None
        if usual is not None and not 1 / _LARGEST_JUMP <= t_delta / usual <= _LARGEST_JUMP:
            warn(
                f"t_delta is {t_delta:g}, but training time had advanced by {usual:g} per update() in the state that "
                f"was loaded (to {self.now:g} in {self.step} steps). If the unit has changed, from steps to images for "
                "example, the averages forget their past too early or too late: pass t_delta in the unit of the state, "
                "or begin a new EMA. If the batch size has changed, all is well."
            )

    def _apply(self) -> tuple[float, ...]:
        before, self.t = self.t, self.now
        self._interval_was_whole = self._applied_at is not None and self.step - self._applied_at >= self.update_every
        self._applied_at = self.step
        self.updates += 1
        if self.updates == 1:
            self.t_first = self.now
            return (1.0,) * len(self.gammas)
        if self.correction == "exact":
            return tuple(update_weight(gamma, self.now, self.now - before) for gamma in self.gammas)
        return tuple(1.0 - self._legacy_decay(gamma) for gamma in self.gammas)

    def _legacy_decay(self, gamma: float) -> float:
        """Return what ``KarrasEMA.beta`` of nitrous-ema 0.0.1 returns; its ``step`` has already counted the call."""
        decay = (1 - 1 / (self.step + 1)) ** (1 + gamma)
        if not self.correction:
            return float(decay)
        ahead = (1 - 1 / (self.step + 1 + self.update_every)) ** (1 + gamma)
        return float((decay * ahead) ** (self.update_every / 2))

    def check_t_delta(self, t_delta: Any) -> Time:
        """Return ``t_delta`` as a plain number, or raise what ``advance`` raises. Numbers of numpy are accepted."""
        if hasattr(t_delta, "item") and not isinstance(t_delta, Number):
            raise TypeError(
                f"t_delta is {t_delta!r}; expected a number. Pass t_delta.item(), or better the number from which the "
                "tensor was made: item() waits for the device."
            )
        if isinstance(t_delta, bool) or not _is_time(t_delta):
            raise ValueError(
                f"t_delta is {t_delta!r}: training time must move forward. Pass the steps, images or tokens since the "
                "last update() (a positive, finite number)."
            )
        if t_delta != 1 and self.correction != "exact":
            raise ValueError(
                f"t_delta is {t_delta!r}, but step_size_correction={self.correction!r} counts calls. "
                "Use step_size_correction='exact' to count time in images or tokens."
            )
        return int(t_delta) if isinstance(t_delta, Integral) else float(t_delta)

    def _warn_uncorrected(self) -> None:
        # The product of (1 - 1/n)^(gamma+1) over n = 1, 1+k, ... falls as t^-((gamma+1)/k): another power function.
        real = [gamma_to_sigma_rel((gamma + 1) / self.update_every - 1) for gamma in self.gammas]
        requested = [gamma_to_sigma_rel(gamma) for gamma in self.gammas]
        warn(
            f"step_size_correction=False with update_every={self.update_every} does not give the requested profiles: "
            f"sigma_rel {_listed(requested)} becomes {_listed(real)}. Use step_size_correction='exact'."
        )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, Real) and 0 < float(value) < math.inf
    except OverflowError:  # an integer beyond all floats
        return False
