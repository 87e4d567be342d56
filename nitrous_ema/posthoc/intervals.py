"""Least-squares fits of a power of time by other powers, on each interval between snapshot times.

A direct fit of the powers loses digits to cancellation where the interval is narrow or exponents are close. So part of
the fit is computed in closed form. On an interval ``(t_0, t_1]`` with ``v = t / t_1`` a power splits, for any number of
tracked exponents, into

    v**target = sum_a lagrange_a(target) v**gamma_a  +  prod_a (target - gamma_a) * remainder(v)

with Newton's divided difference ``remainder = [gamma_1, ..., gamma_P, target] v**g``. Only the remainder is fitted, in
the basis of the lower divided differences, which has no cancellation. Narrow intervals, close exponents and errors far
below machine precision are computed with full relative accuracy. A tracked target has exactly one coefficient, 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nitrous_ema.profile import FloatArray

_NODES = 24  # of one Gauss rule
# Largest exponent * log-width of the piece next to v = 1: 24 Gauss nodes integrate its exponentials to rounding.
_FIRST_PIECE_REACH = 8.0
# Numbers in one temporary array of the interval fits (2 MiB). About six such arrays exist at once.
_BATCH_NUMBERS = 1 << 18

PROFILES_LIMIT = 12
"""Largest number of tracked profiles: the nodes integrate products of two divided differences of this order."""


class Fits(NamedTuple):
    """Least-squares fits of v**power on every interval (t_{j-1}, t_j], where v = t / t_j."""

    coefficients: FloatArray  # of v**gamma, [steps, profiles, powers]
    residual: FloatArray  # L2 norm over v of the difference to the best combination, [steps, powers]
    factor: FloatArray  # maps coefficients to coordinates in an orthonormal basis, [steps, profiles, profiles]


def fit_intervals(t: FloatArray, gamma: FloatArray, power: FloatArray) -> Fits:
    """Return the fits on (0, t_1], (t_1, t_2], ... ; ``gamma`` descends."""
    first = fit_from_zero(gamma, power)
    width = np.log1p(np.diff(t) / t[:-1])  # the logarithm of the ratio would lose the digits of nearly equal times
    later = fit_widths(width, gamma, power)
    return Fits(*(np.concatenate([one[None], many]) for one, many in zip(first, later, strict=True)))


def fit_widths(width: FloatArray, gamma: FloatArray, power: FloatArray) -> Fits:
    """Return the fits on intervals of these log-widths, each ending at v = 1, [widths, ...]; ``gamma`` descends."""
    profiles, powers = gamma.size, power.size
    shapes = ((profiles, powers), (powers,), (profiles, profiles))
    fits = Fits(*(np.empty((width.size, *shape)) for shape in shapes))
    rate = max(gamma[0], power.max()) + 0.5
    pieces = 1 + np.ceil(np.log2(np.maximum(width * rate / _FIRST_PIECE_REACH, 1.0))).astype(int)
    # Batches share one number of quadrature pieces; wide intervals need more of them.
    for count in np.unique(pieces):
        members = np.flatnonzero(pieces == count)
        numbers = members.size * _NODES * int(count) * powers
        for part in np.array_split(members, -(-numbers // _BATCH_NUMBERS)):
            for array, values in zip(fits, _fit_within(width[part], gamma, power, int(count)), strict=True):
                array[part] = values
    return fits


def interval_errors2(residual: FloatArray, power: FloatArray, tau: FloatArray) -> FloatArray:
    """Return the squared relative error that each interval adds to the profiles of these exponents.

    Args:
        residual: ``Fits.residual`` of the fit of v**power on each interval, [intervals, powers].
        power: Exponents of the profiles, [powers].
        tau: End of each interval as a fraction of the profiles' time, [intervals].

    Returns:
        Squared errors divided by the profiles' squared norms, [intervals, powers].

    Source:
        Karras et al. 2023, arXiv:2312.02696, Eq. 121 (height of the profile at tau) and 151 (norm).
    """
    return np.asarray((2 * power + 1) * tau[:, None] ** (2 * power + 1) * residual**2)


def fit_from_zero(gamma: FloatArray, power: FloatArray) -> Fits:
    """Return the fits on (0, 1] in closed form: the Muentz distance and the inverse of a Cauchy matrix, as products.

    The residual's Mellin transform is rational, with the exponents as zeros. ``factor`` contains the inner products
    with the orthonormal Muentz-Legendre functions.
    """
    sums = gamma[:, None] + gamma + 1
    with_power = gamma[:, None] + power + 1
    shrink = np.prod(sums, axis=1)[:, None] / np.prod(with_power, axis=0)
    distance = np.abs(np.prod((power - gamma[:, None]) / with_power, axis=0))
    numerator = _newton_from_powers(gamma)
    factor = np.sqrt(2 * gamma + 1)[:, None] * numerator / np.cumprod(sums, axis=0)
    return Fits(_lagrange(gamma, power) * shrink, distance / np.sqrt(2 * power + 1), factor)


def _fit_within(width: FloatArray, gamma: FloatArray, power: FloatArray, pieces: int) -> Fits:
    """Return the fits on intervals of log-width ``width`` that end at v = 1: Lagrange's part exact, the rest by QR."""
    rule = _quadrature(pieces)
    root = np.sqrt(width[:, None] * rule.weights * np.exp(-width[:, None] * rule.nodes))[..., None]  # dv = v dlog v
    basis = np.concatenate([*_divided_differences(gamma[None], width, rule)], axis=-1) * root
    # The target joins the tracked exponents; _divided_differences needs them in descending order.
    extended = -np.sort(-np.column_stack([np.tile(gamma, (power.size, 1)), power]))
    *_, remainder = _divided_differences(extended, width, rule)
    remainder = remainder * root
    # QR, because normal equations would square the condition number of the basis.
    q, r = np.linalg.qr(basis)
    inside = q.transpose(0, 2, 1) @ remainder
    # The difference is formed before it is squared: a difference of squared norms loses all digits of small errors.
    outside = remainder - q @ inside
    order = np.arange(gamma.size + 1)
    scale = (-width[:, None]) ** order  # _divided_differences divides by it
    newton = np.linalg.solve(r, inside) * (scale[:, -1:] / scale[:, :-1])[..., None]
    to_newton = _newton_from_powers(gamma)
    gap = np.prod(power - gamma[:, None], axis=0)
    return Fits(
        _lagrange(gamma, power) + gap * (_powers_from_newton(gamma) @ newton),
        np.abs(gap * scale[:, -1:]) * np.sqrt((outside**2).sum(1)),
        r @ (scale[:, :-1, None] * to_newton),
    )


def _divided_differences(gamma: FloatArray, width: FloatArray, rule: _Quadrature) -> Iterator[FloatArray]:
    """Yield the divided differences of ``g -> v**g`` over the first 1, 2, ... exponents of each row of ``gamma``.

    Each divided difference is the convolution of the previous one with a power. This is an integral of positive
    functions, so close exponents and narrow intervals lose no digits. Because exponents descend, the integrand falls
    and no exponential overflows.

    Args:
        gamma: Exponents, shape [rows, order], each row descending.
        width: Log-widths of the intervals, shape [intervals].
        rule: Nodes from v = 1 down, as fractions of the log-width.

    Yields:
        Arrays [intervals, nodes, rows], the k-th (from 0) divided by ``(-width)**k``.
    """
    depth = (width[:, None] * rule.nodes)[..., None]  # -log v
    integral = np.ones((*depth.shape[:2], gamma.shape[0]))
    for k in range(gamma.shape[1]):
        if k:
            integral = rule.integral @ (np.exp(-depth * (gamma[:, k - 1] - gamma[:, k])) * integral)
        yield np.exp(-depth * gamma[:, k]) * integral


def _lagrange(gamma: FloatArray, power: FloatArray) -> FloatArray:
    """Return Lagrange's polynomials in the exponent: 1 at power = gamma_a, 0 at the others, [profiles, powers]."""
    others = ~np.eye(gamma.size, dtype=bool)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (power - gamma[:, None]) / (gamma[:, None, None] - gamma[:, None])  # [a, b, power]
    return np.asarray(np.prod(ratio, axis=1, where=others), dtype=np.float64)


def _newton_from_powers(gamma: FloatArray) -> FloatArray:
    """Return Newton's coefficients of v**gamma_a, one column for each a: prod_{b < k} (gamma_a - gamma_b) in row k."""
    below = np.tri(gamma.size, k=-1, dtype=bool)[..., None]  # [k, b]
    return np.asarray(np.prod(np.broadcast_to(gamma - gamma[:, None], (gamma.size,) * 3), axis=1, where=below))


def _powers_from_newton(gamma: FloatArray) -> FloatArray:
    """Return the factors of v**gamma_a in divided difference k, 1 / prod_{b <= k, b != a} (gamma_a - gamma_b)."""
    difference = gamma[:, None] - gamma + np.eye(gamma.size)
    return np.triu(1 / np.cumprod(difference, axis=1))


class _Quadrature(NamedTuple):
    """Gauss-Legendre rules on [0, 1], on pieces that double in length away from 0."""

    nodes: FloatArray  # [nodes]
    weights: FloatArray  # [nodes]
    integral: FloatArray  # maps values at the nodes to integrals from 0 to each node, [nodes, nodes]


@functools.cache
def _quadrature(pieces: int) -> _Quadrature:
    x, w = np.polynomial.legendre.leggauss(_NODES)
    degree = np.arange(_NODES)
    legendre = np.polynomial.legendre.legvander(x, _NODES)
    lower = np.column_stack([-np.ones(_NODES), legendre[:, : _NODES - 1]])
    antiderivative = (legendre[:, 1:] - lower) / (2 * degree + 1)  # of each polynomial, from -1 to x
    within = antiderivative @ ((degree[:, None] + 0.5) * legendre[:, :_NODES].T * w)
    # Pieces are short next to v = 1 (node 0), where the exponentials change fastest.
    length = np.diff(np.append(0.0, 0.5 ** np.arange(pieces)[::-1])) / 2
    start = np.cumsum(length) * 2 - length * 2
    weights = (length[:, None] * w).ravel()
    integral = np.kron(np.tri(pieces, k=-1), np.ones((_NODES, _NODES))) * weights + np.kron(np.diag(length), within)
    return _Quadrature((start[:, None] + length[:, None] * (x + 1)).ravel(), weights, integral)
