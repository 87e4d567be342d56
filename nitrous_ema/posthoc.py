"""The average of any length as a weighted sum of snapshots (Karras et al. 2023, arXiv:2312.02696, appendix C, Alg. 3).

Between two kept times every power-function average is a combination of the tracked powers ``t**gamma``. The least
squares of Alg. 3 over all snapshots (Eq. 128-143) is therefore one small fit per interval between kept times, and its
squared error is the sum over the intervals. Nothing here forms the dense system, which is numerically singular from
about a thousand steps of three profiles on; the cost is linear in the number of steps.

The file is longer than most here: the solve, its error and the report share every quantity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nitrous_ema.intervals import PROFILES_LIMIT, Fits, fit_intervals
from nitrous_ema.profile import SIGMA_REL_LIMIT, FloatArray, exponents, gamma_to_sigma_rel, numbers_between, times

__all__ = ["SynthesisReport", "solve_weights", "synthesis_report"]

Normalize: TypeAlias = Literal["constrain", "edm2"] | None

# Exponents closer than this (relative to gamma + 1) are one profile: written by two roundings of one sigma_rel.
_SAME_GAMMA = 1e-12

_FRACTION_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
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


def solve_weights(
    t_i: ArrayLike, gamma_i: ArrayLike, t_r: ArrayLike, gamma_r: ArrayLike, *, normalize: Normalize = "constrain"
) -> FloatArray:
    """Weights of the snapshots whose sum has the profiles asked for, as nearly as least squares can.

    Costs O(steps * profiles**3) and is accurate to rounding at any number of steps. An input that is exactly an output
    gets weight 1 and all others 0.

    Args:
        t_i: Training times of the given averages, shape [inputs], > 0; any unit, any order.
        gamma_i: Their exponents, shape [inputs], > -0.5.
        t_r: Training times wanted, shape [outputs]. At each there must be an average at that time or before; what lies
            between the last of those and t_r cannot be made up for and counts as error.
        gamma_r: Exponents wanted, shape [outputs], > -0.5.
        normalize: ``"constrain"``: sum 1 is a condition of the fit. ``"edm2"``: the fit is divided by its sum, as
            EDM2's code does; never better. ``None``: the plain least squares of the paper.

    Returns:
        Weights, shape [inputs, outputs]. They are 0 for averages later than t_r and for repetitions of an earlier row.

    Raises:
        ValueError: Shapes that do not fit, numbers out of range, or no average at or before a wanted time.

    Source:
        Karras et al. 2023, arXiv:2312.02696, Algorithm 3 and Eq. 128-143. The paper does not normalize.
    """
    problem = _Problem.of(t_i, gamma_i, t_r, gamma_r)
    return _solve(problem, normalize)[0]


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
    problem = _Problem.of(t_i, gamma_i, t_r, gamma_r)
    if checkpoint_dtype not in _FRACTION_BITS:
        raise ValueError(f"checkpoint_dtype is {checkpoint_dtype!r}; expected one of {', '.join(_FRACTION_BITS)}.")
    if weights is None:
        used, error = _solve(problem, normalize)
    else:
        used = _checked_weights(problem, weights)
        error = _error_of_weights(problem, used)
    mean_time, sigma_rel = _moments(problem, used)
    weight_l2 = np.sqrt((used**2).sum(0))
    rounding = weight_l2 * _RMS_ROUNDING * 2.0 ** -_FRACTION_BITS[checkpoint_dtype]
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


# ---------------------------------------------------------------------------------------------------------------------
# The question: which averages there are, and which are wanted


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """Given averages sorted into a table of kept times and profiles, and the outputs."""

    t_i: FloatArray  # as given, [inputs]
    gamma_i: FloatArray
    t_r: FloatArray  # as given, [outputs]
    gamma_r: FloatArray
    t: FloatArray  # kept times, ascending, [steps]
    gamma: FloatArray  # profiles, descending, [profiles]
    at_time: NDArray[np.intp]  # place of each input in t
    at_gamma: NDArray[np.intp]  # place of each input in gamma
    row: NDArray[np.intp]  # first input with that time and profile, -1 where there is none, [steps, profiles]

    @classmethod
    def of(cls, t_i: ArrayLike, gamma_i: ArrayLike, t_r: ArrayLike, gamma_r: ArrayLike) -> _Problem:
        ti, gi = _averages(("t_i", t_i), ("gamma_i", gamma_i))
        tr, gr = _averages(("t_r", t_r), ("gamma_r", gamma_r))
        if tr.min() < ti.min():
            raise ValueError(
                f"t_r has {tr.min():g}, but the earliest given average is of t = {ti.min():g}; expected a given "
                "average at or before every wanted time. Ask for a later time."
            )
        t, at_time = np.unique(ti, return_inverse=True)
        gamma, at_gamma = _profiles(gi)
        if gamma.size > PROFILES_LIMIT:
            raise ValueError(
                f"gamma_i has {gamma.size} different exponents; expected at most {PROFILES_LIMIT}. "
                "Leave some profiles out: more than four hardly help."
            )
        places, first = np.unique(at_time * gamma.size + at_gamma, return_index=True)
        row = np.full((t.size, gamma.size), -1, dtype=np.intp)
        row.flat[places] = first
        return cls(ti, gi, tr, gr, t, gamma, at_time, at_gamma, row)

    def targets(self) -> Iterator[_Target]:
        """Outputs grouped by time, each group with the averages that may be used for it."""
        powers = np.unique(np.append(self.gamma_r, 0.0))
        fits = fit_intervals(self.t, self.gamma, powers)
        for t_r in np.unique(self.t_r):
            steps = int(np.searchsorted(self.t, t_r, side="right"))
            outputs = np.flatnonzero(self.t_r == t_r)
            place = np.searchsorted(powers, self.gamma_r[outputs])
            yield _Target(
                outputs=outputs,
                row=self.row[:steps],
                tau=self.t[:steps] / t_r,
                ratio=self.t[: steps - 1] / self.t[1:steps],
                gamma=self.gamma,
                power=self.gamma_r[outputs],
                fit=Fits(fits.coefficients[:steps, :, place], fits.residual[:steps, place], fits.factor[:steps]),
                constant=fits.coefficients[:steps, :, np.searchsorted(powers, [0.0])],
            )

    def given_outputs(self) -> Iterator[tuple[int, int]]:
        """Outputs that are inputs, with their row."""
        for output, (t_r, gamma_r) in enumerate(zip(self.t_r, self.gamma_r, strict=True)):
            same = np.abs(self.gamma_i - gamma_r) <= _SAME_GAMMA * (gamma_r + 1)
            rows = np.flatnonzero(same & (self.t_i == t_r))
            if rows.size:
                yield output, int(rows[0])


class _Target(NamedTuple):
    """Everything about the outputs of one time t_r. Times are fractions of it, and so are integrals over time."""

    outputs: NDArray[np.intp]  # places in the problem's outputs
    row: NDArray[np.intp]  # [steps, profiles], inputs, -1 where there is none
    tau: FloatArray  # kept times / t_r, [steps]
    ratio: FloatArray  # each kept time but the last / the next one, [steps - 1]
    gamma: FloatArray  # [profiles]
    power: FloatArray  # exponents wanted, [outputs]
    fit: Fits
    constant: FloatArray  # coefficients of the fit of the constant 1, [steps, profiles, 1]


def _averages(given_times: tuple[str, ArrayLike], given_gammas: tuple[str, ArrayLike]) -> tuple[FloatArray, FloatArray]:
    """Times and exponents of averages, by their names, as two arrays [averages]."""
    t, gamma = times(*given_times), exponents(*given_gammas)
    if t.ndim != 1 or t.shape != gamma.shape or not t.size:
        raise ValueError(
            f"{given_times[0]} and {given_gammas[0]} have the shapes {t.shape} and {gamma.shape}; expected two 1-d "
            "arrays of one length, at least 1. Give one time and one exponent for each average."
        )
    return t, gamma


def _profiles(gamma_i: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """Distinct exponents, descending, and the place of each input among them."""
    gamma, inverse = np.unique(-gamma_i, return_inverse=True)
    new = np.append(True, np.diff(gamma) > _SAME_GAMMA * (1 - gamma[1:]))
    return -gamma[new], (np.cumsum(new) - 1)[inverse]


# ---------------------------------------------------------------------------------------------------------------------
# All intervals: weights and errors


def _solve(problem: _Problem, normalize: Normalize) -> tuple[FloatArray, FloatArray]:
    """Weights [inputs, outputs] and relative errors [outputs]."""
    if normalize not in ("constrain", "edm2", None):
        raise ValueError(f"normalize is {normalize!r}; expected 'constrain', 'edm2' or None.")
    weights = np.zeros((problem.t_i.size, problem.t_r.size))
    error = np.empty(problem.t_r.size)
    for target in problem.targets():
        table, error2 = _least_squares(target)
        table, error2 = _normalized(target, table, error2, normalize)
        given = target.row >= 0
        weights[np.ix_(target.row[given], target.outputs)] = table[given]
        error[target.outputs] = np.sqrt(error2)
    for output, row in problem.given_outputs():
        weights[:, output] = 0.0
        weights[row, output] = 1.0
    return weights, error


def _least_squares(target: _Target) -> tuple[FloatArray, FloatArray]:
    """Weights [steps, profiles, outputs + 1] of the plain least squares, and squared relative errors [outputs].

    The last column is the fit of the constant 1 (the profile of exponent 0).
    """
    power = np.append(target.power, 0.0)
    coefficients = np.concatenate([target.fit.coefficients, target.constant], axis=-1)
    coefficients = coefficients * _profile_heights(target, power)[:, None]
    error2 = _unreachable(target)
    if (target.row < 0).any():
        coefficients, added = _fit_around_gaps(target, coefficients)
        error2 = error2 + added[:-1] / _norm2(target.power)
    following = np.zeros_like(coefficients)
    following[:-1] = coefficients[1:] * _carry(target)[..., None]
    per_profile = (target.tau[:, None] / (target.gamma + 1))[..., None]
    weights = (coefficients - following) * per_profile
    return np.where((target.row < 0)[..., None], 0.0, weights), error2


def _normalized(
    target: _Target, table: FloatArray, error2: FloatArray, normalize: Normalize
) -> tuple[FloatArray, FloatArray]:
    """The weights [steps, profiles, outputs] with the sum that was asked for, and their squared errors."""
    weights, constant = table[..., :-1], table[..., -1:]
    excess = weights.sum((0, 1)) - 1
    if normalize == "constrain":
        # The least change of the profile that changes the sum is along the fit of the constant 1, whose sum of weights
        # is its own squared norm.
        norm2 = constant.sum()
        return weights - constant * (excess / norm2), error2 + excess**2 / norm2 / _norm2(target.power)
    if normalize == "edm2":
        if (excess <= -1).any():
            raise ValueError(
                "the weights of the least squares do not have a positive sum; expected one to divide by. The given "
                'averages are far from the wanted ones: use normalize="constrain" or later averages.'
            )
        # The fit is orthogonal to what it misses, so scaling it adds the square of what the scaling takes away.
        return weights / (1 + excess), error2 + (excess / (1 + excess)) ** 2 * np.maximum(1 - error2, 0.0)
    return weights, error2


def _profile_heights(target: _Target, power: FloatArray) -> FloatArray:
    """Profiles of these exponents (Eq. 121) at the kept times, [steps, powers]."""
    return np.asarray((power + 1) * target.tau[:, None] ** power)


def _norm2(power: FloatArray) -> FloatArray:
    """Squared L2 norm of the profiles of these exponents (Eq. 151 with itself)."""
    return (power + 1) ** 2 / (2 * power + 1)


def _carry(target: _Target) -> FloatArray:
    """Coefficient of v**gamma per coefficient on the next interval, where the power goes on, [steps - 1, profiles]."""
    return np.asarray(target.ratio[:, None] ** target.gamma)


def _unreachable(target: _Target) -> FloatArray:
    """Squared error, relative to the norm, of the best fit on each interval and of nothing after the last one."""
    missed = _profile_heights(target, target.power) * target.fit.residual
    after_last = -np.expm1((2 * target.power + 1) * np.log(target.tau[-1]))
    return np.asarray(after_last + (missed**2 * target.tau[:, None]).sum(0) / _norm2(target.power))


def _fit_around_gaps(target: _Target, wanted: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Coefficients nearest to ``wanted`` where not every time has every profile, and the squared errors this adds.

    Where a time lacks a profile, that profile's coefficient just before it is carried over from the next interval. The
    least squares is then block-bidiagonal: one QR of the factor, eliminated forward in time, then back-substitution.

    Args:
        target: Times, profiles and factors.
        wanted: Coefficients of v**gamma fitted on each interval alone, [steps, profiles, powers].
    """
    steps, profiles, powers = wanted.shape
    absent, carry = target.row < 0, np.vstack([_carry(target), np.zeros(profiles)])  # nothing goes on after the last
    factor = target.fit.factor * np.sqrt(target.tau)[:, None, None]
    added, eliminated = np.zeros(powers), []
    prior, prior_wanted = np.zeros((0, profiles)), np.zeros((0, powers))
    for j in range(steps):
        free, tied = np.flatnonzero(~absent[j]), np.flatnonzero(absent[j])
        rows = np.vstack([prior, factor[j]])[:, np.append(free, tied)]
        rows[:, free.size :] *= carry[j, tied]
        values = np.vstack([prior_wanted, factor[j] @ wanted[j]])
        q, r = np.linalg.qr(rows)
        inside = q.T @ values
        added += ((values - q @ inside) ** 2).sum(0)
        eliminated.append((free, tied, r[: free.size], inside[: free.size]))
        prior, prior_wanted = np.zeros((tied.size, profiles)), inside[free.size :]
        prior[:, tied] = r[free.size :, free.size :]
    coefficients = np.zeros((steps + 1, profiles, powers))
    for j in reversed(range(steps)):
        free, tied, r, inside = eliminated[j]
        coefficients[j, tied] = coefficients[j + 1, tied] * carry[j, tied, None]
        rest = inside - r[:, free.size :] @ coefficients[j + 1, tied]
        coefficients[j, free] = _smallest_solution(r[:, : free.size], rest)
    return coefficients[:steps], added + (prior_wanted**2).sum(0)


def _smallest_solution(matrix: FloatArray, values: FloatArray) -> FloatArray:
    """Solution of least norm, of columns made equally long first."""
    length = np.sqrt((matrix**2).sum(0))
    length[length == 0] = 1.0
    solution: FloatArray = np.linalg.lstsq(matrix / length, values, rcond=None)[0]
    return np.asarray(solution / length[:, None])


def _checked_weights(problem: _Problem, weights: ArrayLike) -> FloatArray:
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


def _error_of_weights(problem: _Problem, weights: FloatArray) -> FloatArray:
    """Relative errors [outputs] of the profiles that these weights give: the unreachable part, and the rest."""
    table = np.zeros((*problem.row.shape, problem.t_r.size))
    np.add.at(table, (problem.at_time, problem.at_gamma), weights)
    error = np.empty(problem.t_r.size)
    for target in problem.targets():
        heights = (target.gamma + 1) / target.tau[:, None]
        own = table[: target.tau.size, :, target.outputs] * heights[..., None]
        for j in reversed(range(len(own) - 1)):
            own[j] += own[j + 1] * (target.ratio[j] ** target.gamma)[:, None]
        wrong = own - target.fit.coefficients * _profile_heights(target, target.power)[:, None]
        wrong2 = ((target.fit.factor @ wrong) ** 2).sum(1)
        error2 = (wrong2 * target.tau[:, None]).sum(0) / _norm2(target.power)
        error[target.outputs] = np.sqrt(error2 + _unreachable(target))
    return error


def _moments(problem: _Problem, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
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


def _told_error(problem: _Problem, error: FloatArray) -> str:
    return _sentence(
        problem,
        error > _ERROR_TO_TELL,
        [f"{100 * e:.3g} % of its norm" for e in error],
        "The profile obtained differs from the one asked for at",
        "Keep more snapshots, earlier ones too, track a profile nearer to that length, or ask for a length in between.",
    )


def _told_rounding(problem: _Problem, rounding: FloatArray, checkpoint_dtype: str) -> str:
    return _sentence(
        problem,
        rounding > _ROUNDING_TO_TELL,
        [f"{r:.2g} of a weight" for r in rounding],
        f"The rounding of snapshots stored as {checkpoint_dtype} is amplified at",
        'Store them as "F32", or ask for a length between the tracked ones.',
    )


def _told_start(problem: _Problem, t_first: float | None) -> str:
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


def _told_updates(problem: _Problem, updates: int | NDArray[np.integer] | None) -> str:
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


def _sentence(problem: _Problem, tell: NDArray[np.bool_], values: list[str], what: str, remedy: str) -> str:
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
