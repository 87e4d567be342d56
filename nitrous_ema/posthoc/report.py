"""Report on a synthesis: profile error, rounding error and warnings (Karras et al. 2023, arXiv:2312.02696, app. C)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema._base.arguments import pluralize
from nitrous_ema._base.dtypes import STORED_DTYPES
from nitrous_ema.posthoc.least_squares import (
    LeastSquaresProblem,
    Normalize,
    profile_heights,
    profile_norms2,
    solve,
    unreachable,
)
from nitrous_ema.profile import SIGMA_REL_LIMIT, FloatArray, gamma_to_sigma_rel, numbers_between, times

# rms relative rounding error in units of the last fraction bit: uniform within half a unit (12 ** -0.5) at a mantissa m
# that is distributed as 1 / m on [1, 2), where the mean of m**-2 is (3 / 8) / log(2). F16: 2.1e-4, BF16: 1.7e-3.
_RMS_ROUNDING = math.sqrt(3 / 8 / math.log(2) / 12)

# Limits beyond which an output is named in a warning.
_ERROR_TO_WARN = 0.05
_ROUNDING_TO_WARN = 1e-3
_START_SHARE_TO_WARN = 0.01
_UPDATES_TO_WARN = 30
_MAX_OUTPUTS_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SynthesisReport:
    """Expected accuracy of a synthesis. All arrays are float64, one number per output."""

    profile_error: FloatArray
    """L2 distance between the obtained and the requested profile, relative to the norm of the requested profile."""
    mean_time: FloatArray
    """Mean time of the obtained profile as a fraction of t_r. Requested: (gamma + 1) / (gamma + 2), Eq. 122."""
    sigma_rel: FloatArray
    """Standard deviation of the obtained profile as a fraction of t_r. NaN where negative weights make the variance
    negative."""
    weight_l1: FloatArray
    """Sum of the absolute weights."""
    weight_l2: FloatArray
    """Root of the sum of the squared weights: the amplification of independent rounding errors."""
    rounding: FloatArray
    """Expected rms rounding error of a synthesized weight, relative to its size, from the dtype of the snapshots."""
    warnings: tuple[str, ...]
    """One text for each problem, with its outputs and remedies. Empty if there are no problems."""


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
    """Return the profile error and the rounding error of each output, with warnings.

    The profile error is computed for the continuous profile. The error of the discrete updates is never larger in
    absolute terms, and within 5 % of it if three or more updates lie between snapshots.

    Args:
        t_i: As in ``solve_weights``, like ``gamma_i``, ``t_r``, ``gamma_r`` and ``normalize``.
        gamma_i: Exponents of the stored averages, shape [inputs].
        t_r: Training times of the requested averages, shape [outputs].
        gamma_r: Exponents of the requested averages, shape [outputs].
        weights: Weights to report on instead of the solution, shape [inputs, outputs]; ``normalize`` is then ignored.
            Errors below about 1e-14 times the sum of |weights| are rounding.
        normalize: Normalization of the solution to report on.
        checkpoint_dtype: Dtype of the stored averages: ``"F64"``, ``"F32"``, ``"F16"`` or ``"BF16"``.
        t_first: Training time of the first update, in the unit of t_i; None to skip the warning about a late start.
        updates: Number of updates up to t_r, one number or one per output; None to skip the warning about few updates.

    Returns:
        The report.

    Raises:
        ValueError: As ``solve_weights``; also weights of a wrong shape, or not 0 for an average later than t_r.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 122 (mean time), 128-143 (error).
    """
    problem = LeastSquaresProblem.of(t_i, gamma_i, t_r, gamma_r)
    if checkpoint_dtype not in STORED_DTYPES:
        raise ValueError(f"checkpoint_dtype is {checkpoint_dtype!r}; expected one of {', '.join(STORED_DTYPES)}.")
    if weights is None:
        used, error = solve(problem, normalize)
    else:
        used = _checked_weights(problem, weights)
        error = _error_of_weights(problem, used)
    mean_time, sigma_rel = _moments(problem, used)
    weight_l2 = np.sqrt((used**2).sum(0))
    rounding = weight_l2 * rounding_of(checkpoint_dtype)
    warnings = [_warn_of_error(problem, error), _warn_of_rounding(problem, rounding, checkpoint_dtype)]
    warnings += [_warn_of_late_start(problem, t_first), _warn_of_few_updates(problem, updates)]
    return SynthesisReport(
        profile_error=error,
        mean_time=mean_time,
        sigma_rel=sigma_rel,
        weight_l1=np.abs(used).sum(0),
        weight_l2=weight_l2,
        rounding=rounding,
        warnings=tuple(text for text in warnings if text),
    )


def rounding_of(checkpoint_dtype: str) -> float:
    """Return the expected rms rounding error of a number stored in this dtype, relative to the number.

    Args:
        checkpoint_dtype: ``"F64"``, ``"F32"``, ``"F16"`` or ``"BF16"``.
    """
    return float(_RMS_ROUNDING * 2 * STORED_DTYPES[checkpoint_dtype].half_unit)


# ---------------------------------------------------------------------------------------------------------------------
# Errors of the caller's weights, and moments


def _checked_weights(problem: LeastSquaresProblem, weights: ArrayLike) -> FloatArray:
    expected = (problem.t_i.size, problem.t_r.size)
    used = numbers_between("weights", weights, -math.inf, remedy="Pass the weights of solve_weights.")
    if used.shape != expected:
        raise ValueError(f"weights has the shape {used.shape}; expected [inputs, outputs] = {expected}.")
    if used[problem.t_i[:, None] > problem.t_r].any():
        raise ValueError(
            "weights is not 0 for an average later than the requested time; expected 0, because the requested profile "
            "ends there. Request a later time, or remove that average."
        )
    return used


def _error_of_weights(problem: LeastSquaresProblem, weights: FloatArray) -> FloatArray:
    """Return the relative errors [outputs] of the profiles with these weights: the unreachable part and the rest."""
    table = np.zeros((*problem.row.shape, problem.t_r.size))
    # add.at, because an average may be given several times, and its weights add up.
    np.add.at(table, (problem.at_time, problem.at_gamma), weights)
    error = np.empty(problem.t_r.size)
    for target in problem.targets():
        heights = (target.gamma + 1) / target.tau[:, None]
        own = table[: target.tau.size, :, target.outputs] * heights[..., None]
        # The coefficient on an interval sums the averages at its end and later (least_squares).
        for j in reversed(range(len(own) - 1)):
            own[j] += own[j + 1] * (target.ratio[j] ** target.gamma)[:, None]
        wrong = own - target.fit.coefficients * profile_heights(target, target.power)[:, None]
        wrong2 = ((target.fit.factor @ wrong) ** 2).sum(1)
        error2 = (wrong2 * target.tau[:, None]).sum(0) / profile_norms2(target.power)
        error[target.outputs] = np.sqrt(error2 + unreachable(target))
    return error


def _moments(problem: LeastSquaresProblem, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mean time and standard deviation of the obtained profiles, as fractions of t_r.

    Computed from the moments of 1 - t / t_r (Eq. 122 and 123 combined). They are small where t is near t_r, so the
    variance does not cancel there.
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
# Warnings


def _warn_of_error(problem: LeastSquaresProblem, error: FloatArray) -> str:
    return _warning(
        problem,
        error > _ERROR_TO_WARN,
        [f"profile error {100 * e:.3g} %" for e in error],
        "{outputs} cannot be reconstructed accurately. Keep more snapshots, including early ones; track a profile "
        "closer to the requested length; or choose a length between the tracked ones.",
    )


def _warn_of_rounding(problem: LeastSquaresProblem, rounding: FloatArray, checkpoint_dtype: str) -> str:
    remedy = "choose a length between the tracked ones, or track a profile closer to the requested length."
    if checkpoint_dtype not in ("F32", "F64"):
        remedy = f"store snapshots as float32 (checkpoint_dtype=torch.float32), {remedy}"
    return _warning(
        problem,
        rounding > _ROUNDING_TO_WARN,
        [f"relative rounding error {r:.2g}" for r in rounding],
        f"The rounding of snapshots stored as {checkpoint_dtype} is amplified at {{outputs}}. "
        f"{remedy[0].upper()}{remedy[1:]}",
    )


def _warn_of_late_start(problem: LeastSquaresProblem, t_first: float | None) -> str:
    if t_first is None:
        return ""
    first = float(times("t_first", t_first))
    # The share of the time before t_first in the profile: the integral of Eq. 121.
    share = np.minimum(first / problem.t_r, 1.0) ** (problem.gamma_r + 1)
    return _warning(
        problem,
        share > _START_SHARE_TO_WARN,
        [f"{100 * s:.3g} % of the average" for s in share],
        f"The weights of the first update (t = {first:g}) represent all training time before it, with a large share at "
        "{outputs}. Update from the start of training, or choose a shorter length or a later time.",
    )


def _warn_of_few_updates(problem: LeastSquaresProblem, updates: int | NDArray[np.integer] | None) -> str:
    if updates is None:
        return ""
    count = np.asarray(updates)
    if count.ndim > 1 or count.size not in (1, problem.t_r.size) or (count < 1).any():
        raise ValueError(f"updates is {updates!r}; expected one number of at least 1, or one per output.")
    count = np.broadcast_to(count, problem.t_r.shape)
    return _warning(
        problem,
        count < _UPDATES_TO_WARN,
        [pluralize(int(c), "update") for c in count],
        f"With fewer than {_UPDATES_TO_WARN} updates the profile is coarse and shorter than requested at {{outputs}}. "
        "Update more often, or choose a later time.",
    )


def _warning(problem: LeastSquaresProblem, affected: NDArray[np.bool_], values: list[str], template: str) -> str:
    """Return ``template`` with the affected outputs and their values; an empty text if no output is affected."""
    if not affected.any():
        return ""
    several_times = np.ptp(problem.t_r) > 0
    outputs = [
        f"{_length(problem.gamma_r[m])}{f' at t = {problem.t_r[m]:.6g}' if several_times else ''} ({values[m]})"
        for m in np.flatnonzero(affected)
    ]
    if len(outputs) > _MAX_OUTPUTS_NAMED:
        outputs[_MAX_OUTPUTS_NAMED:] = [f"and {len(outputs) - _MAX_OUTPUTS_NAMED} more"]
    return template.format(outputs=", ".join(outputs))


def _length(gamma: float) -> str:
    sigma = gamma_to_sigma_rel(float(gamma))
    return f"sigma_rel={sigma:.4g}" if gamma > 0 and sigma < SIGMA_REL_LIMIT else f"gamma={gamma:.4g}"
