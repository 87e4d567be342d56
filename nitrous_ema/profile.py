"""Power-function averaging profiles (Karras et al. 2023, arXiv:2312.02696, section 3 and appendix C).

The average with exponent ``gamma`` at time ``t`` gives the weights of time ``s <= t`` the share
``(gamma + 1) / t * (s / t)**gamma`` (Eq. 121). Its length is given either by ``gamma`` or by ``sigma_rel``, the
standard deviation of this profile as a fraction of ``t``. Everything here is float64. ``t`` may be in any unit that
does not change during the run: steps, images, tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["correlation", "decay", "gamma_to_sigma_rel", "sigma_rel_to_gamma", "update_weight"]

FloatArray = NDArray[np.float64]

SIGMA_REL_LIMIT = 12**-0.5
"""Length (sigma_rel) of the plain mean of all weights, gamma = 0. The lengths in the paper lie below it."""

EXPONENT_LIMIT = 1e12
"""Upper limit of the exponents in a solve: the length is then 1e-12 of the training time. An average with a larger
exponent is a single snapshot, and the quadrature nodes that integrate it need more and more memory."""

# An upper bound: Newton's method stops earlier, when rounding ends its descent.
_NEWTON_STEPS = 60


def numbers_between(
    thing: str, values: ArrayLike, low: float, high: float = math.inf, *, remedy: str, or_low: bool = False
) -> FloatArray:
    """Return ``values`` as float64, checked to be finite and strictly between ``low`` and ``high``.

    Args:
        thing: Name of the argument, for the message.
        values: One number or an array of any shape.
        low: Lower limit.
        high: Upper limit.
        remedy: Last sentence of the message: what to do.
        or_low: Whether ``low`` itself is allowed.

    Raises:
        ValueError: A number is outside the limits or not finite. The message names the first such number.
    """
    expected = f"numbers of at least {low:g}" if or_low else f"numbers greater than {low:g}"
    expected += f" and less than {high:.6g}" if high < math.inf else ", finite"
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{thing} is {values!r}; expected real {expected}. {remedy}") from error
    valid = np.isfinite(numbers) & ((numbers >= low) if or_low else (numbers > low)) & (numbers < high)
    if not valid.all():
        verb = "has" if numbers.ndim else "is"
        raise ValueError(f"{thing} {verb} {float(numbers[~valid].flat[0])!r}; expected {expected}. {remedy}")
    return numbers


@overload
def sigma_rel_to_gamma(sigma_rel: float) -> float: ...
@overload
def sigma_rel_to_gamma(sigma_rel: Sequence[float] | NDArray[Any]) -> FloatArray: ...
def sigma_rel_to_gamma(sigma_rel: float | Sequence[float] | NDArray[Any]) -> float | FloatArray:
    """Return the exponent of the profile whose standard deviation is ``sigma_rel`` times the training time.

    Args:
        sigma_rel: Length of the average, in (0, 12 ** -0.5); any shape.

    Returns:
        gamma > 0, of the same shape (a float for a float).

    Raises:
        ValueError: A length lies outside (0, 12 ** -0.5). The upper limit is the length of the plain mean.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 124-126 and Algorithm 2: the largest root of
        ``(gamma + 2)**2 (gamma + 3) = (gamma + 1) / sigma_rel**2``.
    """
    sigma = checked_lengths("sigma_rel", sigma_rel)
    # Solved for root = gamma * sigma, because gamma**3 overflows for tiny lengths. The cubic is convex on [root, 1] and
    # positive at 1, so Newton's method descends from 1 to the largest root and never passes it.
    linear, constant = 16 * sigma**2 - 1, (12 * sigma**2 - 1) * sigma
    root = np.ones_like(sigma)
    for _ in range(_NEWTON_STEPS):
        value = ((root + 7 * sigma) * root + linear) * root + constant
        lower = root - value / ((3 * root + 14 * sigma) * root + linear)
        if not (lower < root).any():
            break
        root = np.minimum(root, lower)
    gamma = root / sigma
    return float(gamma) if gamma.ndim == 0 else gamma


@overload
def gamma_to_sigma_rel(gamma: float) -> float: ...
@overload
def gamma_to_sigma_rel(gamma: Sequence[float] | NDArray[Any]) -> FloatArray: ...
def gamma_to_sigma_rel(gamma: float | Sequence[float] | NDArray[Any]) -> float | FloatArray:
    """Return the standard deviation of the profile ``t**gamma`` as a fraction of the training time.

    Args:
        gamma: Exponent, > -1; any shape. ``sigma_rel_to_gamma`` inverts this for gamma > 0 only.

    Returns:
        sigma_rel, of the same shape (a float for a float).

    Raises:
        ValueError: An exponent is not greater than -1: its profile cannot be normalized.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 123.
    """
    g = numbers_between("gamma", gamma, -1.0, remedy="Give the exponent of a power-function profile.")
    sigma = np.sqrt((g + 1) / (g + 3)) / (g + 2)
    return float(sigma) if sigma.ndim == 0 else sigma


def decay(gamma: float, t_now: float, t_delta: float) -> float:
    """Return the factor of the old average in the update that adds the weights of time ``t_now``.

    The factor covers the whole of ``t_delta``: it equals the product of the decays of any parts of ``t_delta``, so
    updating less often needs no correction.

    Args:
        gamma: Exponent of the power-function profile (dimensionless, > -1).
        t_now: Training time now, counted from 0 at the start of training.
        t_delta: Time since the last update, ``0 < t_delta <= t_now``, in the unit of ``t_now``.

    Returns:
        Factor in [0, 1). It is 0 when ``t_delta == t_now``: the first update copies the weights.

    Raises:
        ValueError: ``gamma`` is not greater than -1, or ``t_delta`` lies outside ``(0, t_now]``.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 127.
    """
    return math.exp(_log_decay(gamma, t_now, t_delta))


def update_weight(gamma: float, t_now: float, t_delta: float) -> float:
    """Return the factor of the new weights in an update, ``1 - decay``, accurate also where it is tiny.

    Subtracting the decay from 1 loses digits late in a run: 5 of 16 remain at t_now = 1e12, t_delta = 1. Averages would
    no longer have the requested length.

    Args:
        gamma: Exponent of the power-function profile (dimensionless, > -1).
        t_now: Training time now, counted from 0 at the start of training.
        t_delta: Time since the last update, ``0 < t_delta <= t_now``, in the unit of ``t_now``.

    Returns:
        Factor in (0, 1], exactly 1 when ``t_delta == t_now``.

    Raises:
        ValueError: ``gamma`` is not greater than -1, or ``t_delta`` lies outside ``(0, t_now]``.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 119 and 127.
    """
    return -math.expm1(_log_decay(gamma, t_now, t_delta))


def correlation(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> FloatArray:
    """Return the inner product of two power-function profiles: the integral of their product over training time.

    Args:
        t_a: Time of the first average, > 0; broadcasts with the others.
        gamma_a: Its exponent, > -0.5.
        t_b: Time of the second average, > 0, in the unit of ``t_a``.
        gamma_b: Its exponent, > -0.5.

    Returns:
        Inner products per unit of time, of the broadcast shape.

    Raises:
        ValueError: A time is not positive, or an exponent is not between -0.5 and 1e12. The square of a profile with a
            smaller exponent has no integral.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 151.
    """
    ta, tb = (times(thing, t) for thing, t in (("t_a", t_a), ("t_b", t_b)))
    ga, gb = (exponents(thing, gamma) for thing, gamma in (("gamma_a", gamma_a), ("gamma_b", gamma_b)))
    earlier, later = np.minimum(ta, tb), np.maximum(ta, tb)
    overlap = (earlier / later) ** np.where(ta < tb, gb, ga)
    return np.asarray((ga + 1) * (gb + 1) / (ga + gb + 1) * overlap / later, dtype=np.float64)


def times(thing: str, values: ArrayLike) -> FloatArray:
    """Return ``values`` as training times in float64; raise ValueError for a time that is not positive and finite."""
    return numbers_between(thing, values, 0.0, remedy="Training time is counted from 0 and positive at every average.")


def exponents(thing: str, values: ArrayLike) -> FloatArray:
    """Return ``values`` as exponents in float64; raise ValueError for an exponent outside (-0.5, 1e12)."""
    remedy = (
        "The square of a profile must have an integral, and its sigma_rel must exceed 1e-12. "
        "sigma_rel_to_gamma gives exponents above 0."
    )
    return numbers_between(thing, values, -0.5, EXPONENT_LIMIT, remedy=remedy)


def checked_lengths(thing: str, values: ArrayLike) -> FloatArray:
    """Return ``values`` as lengths in float64; raise ValueError for a length outside (0, 12 ** -0.5)."""
    remedy = f"Give a length as a fraction of the training time, e.g. 0.05; {SIGMA_REL_LIMIT:.4f} is the plain mean."
    return numbers_between(thing, values, 0.0, SIGMA_REL_LIMIT, remedy=remedy)


def _log_decay(gamma: float, t_now: float, t_delta: float) -> float:
    """Return the logarithm of Eq. 127. Called in every update, so the checks are plain comparisons, which NaN fails."""
    if not 0 < t_delta <= t_now < math.inf:
        raise ValueError(
            f"t_delta is {t_delta!r} at t_now = {t_now!r}; expected 0 < t_delta <= t_now, both finite. "
            "Give the time since the last update; for the first update give t_now itself."
        )
    if not -1 < gamma < math.inf:
        raise ValueError(
            f"gamma is {gamma!r}; expected a finite number greater than -1. "
            "Use sigma_rel_to_gamma for a given sigma_rel."
        )
    if t_delta == t_now:
        return -math.inf
    # For small t_delta the logarithm of a ratio near 1 loses digits. For large t_delta 1 - t_delta / t_now cancels.
    log_ratio = math.log1p(-t_delta / t_now) if 2 * t_delta < t_now else math.log((t_now - t_delta) / t_now)
    return (gamma + 1) * log_ratio
