"""What a synthesis really gives, and the warnings about it (Karras et al. 2023, arXiv:2312.02696, appendix C)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema._base.dtypes import AVERAGE_DTYPES
from nitrous_ema.posthoc.least_squares import (
    LeastSquaresProblem,
    Normalize,
    profile_heights,
    profile_norms2,
    solve,
    unreachable,
)
from nitrous_ema.profile import SIGMA_REL_LIMIT, FloatArray, gamma_to_sigma_rel, numbers_between, times

_FRACTION_BITS = {
    code: dtype.fraction_bits for code, dtype in AVERAGE_DTYPES.items() if dtype.fraction_bits is not None
}
# rms relative rounding error in units of the last fraction bit: uniform within half a unit (12 ** -0.5) at a mantissa m
# that is distributed as 1 / m on [1, 2), where the mean of m**-2 is (3 / 8) / log(2). F16: 2.1e-4, BF16: 1.7e-3.
_RMS_ROUNDING = math.sqrt(3 / 8 / math.log(2) / 12)

_ERROR_TO_TELL = 0.05
_ROUNDING_TO_TELL = 1e-3
_START_WEIGHT_TO_TELL = 0.01
_UPDATES_TO_TELL = 30
_OUTPUTS_TO_NAME = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SynthesisReport:
    """What a synthesis really gives. All arrays are float64, one number per output."""

    profile_error: FloatArray
    """L2 distance between the profile obtained and the one asked for, relative to the norm of the latter."""
    mean_time: FloatArray
    """Mean time of the profile obtained, as a fraction of t_r (asked: Eq. 122, (gamma + 1) / (gamma + 2))."""
    sigma_rel: FloatArray
    """Standard deviation of the profile obtained, as a fraction of t_r. NaN where negative weights make its variance
    negative."""
    weight_l1: FloatArray
    """Sum of the absolute weights."""
    weight_l2: FloatArray
    """Root of the sum of the squared weights: the amplification of independent rounding errors."""
    rounding: FloatArray
    """Expected rms rounding error of a synthesized weight, relative to its size, from how the snapshots are stored."""
    warnings: tuple[str, ...]
    """One sentence per thing that may surprise, with what would help."""


def synthesis_report(
    t_i: ArrayLike,
    gamma_i: ArrayLike,
    t_r: ArrayLike,
    gamma_r: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    normalize: Normalize = "constrain",
    checkpoint_dtype: str = "F32",
    t_first: float | None = None,
    updates: int | NDArray[np.integer] | None = None,
) -> SynthesisReport:
    """How well the sum of the snapshots has the profiles asked for, and what rounding it amplifies.

    The error is that of the continuous profile. That of the discrete updates is never larger in absolute terms, and
    within 5 % of it when three updates or more lie between snapshots.

    Args:
        t_i: As in ``solve_weights``, and so are ``gamma_i``, ``t_r``, ``gamma_r`` and ``normalize``.
        gamma_i: Exponents of the given averages, shape [inputs].
        t_r: Training times wanted, shape [outputs].
        gamma_r: Exponents wanted, shape [outputs].
        weights: Judge these instead of the solution, shape [inputs, outputs]; ``normalize`` is then not used. Errors
            below about 1e-14 times the sum of |weights| are rounding.
        normalize: Which solution to judge.
        checkpoint_dtype: How the given averages are stored: ``"F64"``, ``"F32"``, ``"F16"`` or ``"BF16"``.
        t_first: Training time of the first update, in the unit of t_i, if a late start is to be judged.
        updates: Updates applied up to t_r, one number or one per output, if their number is to be judged.

    Returns:
        A frozen report. ``warnings`` is empty when there is nothing to tell.

    Raises:
        ValueError: As in ``solve_weights``; also weights of a wrong shape, or not 0 for an average later than t_r.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 122 (mean time), 128-143 (error).
    """
    problem = LeastSquaresProblem.of(t_i, gamma_i, t_r, gamma_r)
    if checkpoint_dtype not in _FRACTION_BITS:
        raise ValueError(f"checkpoint_dtype is {checkpoint_dtype!r}; expected one of {', '.join(_FRACTION_BITS)}.")
    if weights is None:
        used, error = solve(problem, normalize)
    else:
        used = _checked_weights(problem, weights)
        error = _error_of_weights(problem, used)
    mean_time, sigma_rel = _moments(problem, used)
    weight_l2 = np.sqrt((used**2).sum(0))
    rounding = weight_l2 * rounding_of(checkpoint_dtype)
    told = [_told_error(problem, error), _told_rounding(problem, rounding, checkpoint_dtype)]
    told += [_told_start(problem, t_first), _told_updates(problem, updates)]
    return SynthesisReport(
        profile_error=error,
        mean_time=mean_time,
        sigma_rel=sigma_rel,
        weight_l1=np.abs(used).sum(0),
        weight_l2=weight_l2,
        rounding=rounding,
        warnings=tuple(sentence for sentence in told if sentence),
    )


def rounding_of(checkpoint_dtype: str) -> float:
    """Expected rms error of a number stored as ``"F64"``, ``"F32"``, ``"F16"`` or ``"BF16"``, relative to its size."""
    return float(_RMS_ROUNDING * 2.0 ** -_FRACTION_BITS[checkpoint_dtype])


# ---------------------------------------------------------------------------------------------------------------------
# Given weights, and moments


def _checked_weights(problem: LeastSquaresProblem, weights: ArrayLike) -> FloatArray:
    expected = (problem.t_i.size, problem.t_r.size)
    used = numbers_between("weights", weights, -math.inf, remedy="Give the weights of solve_weights.")
    if used.shape != expected:
        raise ValueError(f"weights has the shape {used.shape}; expected [inputs, outputs] = {expected}.")
    if used[problem.t_i[:, None] > problem.t_r].any():
        raise ValueError(
            "weights is not 0 for an average later than the wanted time; expected 0, for the wanted profile has ended "
            "there. Ask for a later time or leave that average out."
        )
    return used


def _error_of_weights(problem: LeastSquaresProblem, weights: FloatArray) -> FloatArray:
    """Relative errors [outputs] of the profiles that these weights give: the unreachable part, and the rest."""
    table = np.zeros((*problem.row.shape, problem.t_r.size))
    np.add.at(table, (problem.at_time, problem.at_gamma), weights)
    error = np.empty(problem.t_r.size)
    for target in problem.targets():
        heights = (target.gamma + 1) / target.tau[:, None]
        own = table[: target.tau.size, :, target.outputs] * heights[..., None]
        for j in reversed(range(len(own) - 1)):
            own[j] += own[j + 1] * (target.ratio[j] ** target.gamma)[:, None]
        wrong = own - target.fit.coefficients * profile_heights(target, target.power)[:, None]
        wrong2 = ((target.fit.factor @ wrong) ** 2).sum(1)
        error2 = (wrong2 * target.tau[:, None]).sum(0) / profile_norms2(target.power)
        error[target.outputs] = np.sqrt(error2 + unreachable(target))
    return error


def _moments(problem: LeastSquaresProblem, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean time and standard deviation of the profiles obtained, as fractions of t_r.

    From the moments of the time before t_r, which is small where t itself is near t_r (Eq. 122 and 123 combined).
    """
    tau, g = problem.t_i[:, None] / problem.t_r, problem.gamma_i[:, None]
    back = 1 - tau
    first = back + tau / (g + 2)
    second = back**2 + 2 * tau / (g + 2) * (back + tau / (g + 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = weights / weights.sum(0)
        mean_back = (share * first).sum(0)
        sigma = np.sqrt((share * second).sum(0) - mean_back**2)
    return 1 - mean_back, sigma


# ---------------------------------------------------------------------------------------------------------------------
# What is told


def _told_error(problem: LeastSquaresProblem, error: FloatArray) -> str:
    return _sentence(
        problem,
        error > _ERROR_TO_TELL,
        [f"{100 * e:.3g} % of its norm" for e in error],
        "The profile obtained differs from the one asked for at",
        "Keep more snapshots, earlier ones too, track a profile nearer to that length, or ask for a length in between.",
    )


def _told_rounding(problem: LeastSquaresProblem, rounding: FloatArray, checkpoint_dtype: str) -> str:
    return _sentence(
        problem,
        rounding > _ROUNDING_TO_TELL,
        [f"{r:.2g} of a weight" for r in rounding],
        f"The rounding of snapshots stored as {checkpoint_dtype} is amplified at",
        ("" if checkpoint_dtype in ("F32", "F64") else 'Store them as "F32". ')
        + "Ask for a length between the tracked ones, or track one nearer to it.",
    )


def _told_start(problem: LeastSquaresProblem, t_first: float | None) -> str:
    if t_first is None:
        return ""
    first = float(times("t_first", t_first))
    weight = np.minimum(first / problem.t_r, 1.0) ** (problem.gamma_r + 1)
    return _sentence(
        problem,
        weight > _START_WEIGHT_TO_TELL,
        [f"{100 * w:.3g} % of the average" for w in weight],
        f"The weights of the first update (t = {first:g}) stand for all of the time before it and weigh much at",
        "Update from the start of training on, ask for a shorter length or for a later time.",
    )


def _told_updates(problem: LeastSquaresProblem, updates: int | NDArray[np.integer] | None) -> str:
    if updates is None:
        return ""
    count = np.asarray(updates)
    if count.ndim > 1 or count.size not in (1, problem.t_r.size) or (count < 1).any():
        raise ValueError(f"updates is {updates!r}; expected one number of at least 1, or one per output.")
    count = np.broadcast_to(count, problem.t_r.shape)
    return _sentence(
        problem,
        count < _UPDATES_TO_TELL,
        [f"{c} updates" for c in count],
        f"Fewer than {_UPDATES_TO_TELL} updates make a coarse profile, shorter than asked for, at",
        "Update more often, or ask for a later time.",
    )


def _sentence(problem: LeastSquaresProblem, tell: NDArray[np.bool_], values: list[str], what: str, remedy: str) -> str:
    """``what`` is the matter at which outputs, and ``remedy``; empty if there are none."""
    if not tell.any():
        return ""
    several_times = np.ptp(problem.t_r) > 0
    where = [
        f"{_length(problem.gamma_r[m])}{f', t = {problem.t_r[m]:.6g}' if several_times else ''} ({values[m]})"
        for m in np.flatnonzero(tell)
    ]
    if len(where) > _OUTPUTS_TO_NAME:
        where[_OUTPUTS_TO_NAME:] = [f"and {len(where) - _OUTPUTS_TO_NAME} more"]
    return f"{what} {'; '.join(where)}. {remedy}"


def _length(gamma: float) -> str:
    sigma = gamma_to_sigma_rel(float(gamma))
    return f"sigma_rel {sigma:.4g}" if gamma > 0 and sigma < SIGMA_REL_LIMIT else f"gamma {gamma:.4g}"
