"""The solve for histories of every kind, against the profiles themselves, integrated in long double.

The oracle knows nothing of intervals, fits or factors: it evaluates the weighted sum of the profiles (Eq. 121) at Gauss
nodes between all snapshot times. Every solution is checked for two things. Its distance from the requested profile is
the reported profile error. And the distance is least: the residual has the same inner product with every given profile,
so no change of weights with the same sum reduces it.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.posthoc import least_amplifying_weights, solve_weights, synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma, update_weight

PROFILES = [(0.1,), (0.05, 0.1), (0.03, 0.1, 0.25), (0.03, 0.06, 0.1, 0.2), (0.02, 0.04, 0.08, 0.15, 0.27)]
LENGTHS = (0.015, 0.04, 0.07, 0.15, 0.28)
REAL = np.longdouble
SMALLEST = 1e-13  # errors below this are rounding, in units of the sum of |weights|


class Integral:
    """Profiles as functions of time on a fine grid: 16 Gauss nodes on pieces that end at most 1.1 times their begin."""

    def __init__(self, t_i, gamma_i, t_r):
        self.t, self.gamma = t_i.astype(REAL) / REAL(t_r), gamma_i.astype(REAL)
        ends = np.unique(np.append(self.t, REAL(1)))  # the last average may end before the target
        edges = [REAL(0), ends[0] * REAL(1e-18)]
        for end in ends:
            pieces = max(1, int(np.ceil(np.log(float(end / edges[-1])) / np.log(1.1))))
            edges += [*(edges[-1] * (end / edges[-1]) ** (REAL(k) / pieces) for k in range(1, pieces)), end]
        edges = np.array(edges, REAL)
        x, wx = (a.astype(REAL) for a in np.polynomial.legendre.leggauss(16))
        width = np.diff(edges)[:, None]
        self.u, self.quadrature = (edges[:-1, None] + width * (x + 1) / 2).ravel(), (width * wx / 2).ravel()

    def missed(self, weights, gamma_r):
        """Return the difference of the weighted sum from the requested profile, at the nodes."""
        found = np.zeros_like(self.u)
        for gamma in np.unique(self.gamma):
            own = self.gamma == gamma
            order = np.argsort(self.t[own])
            t, heights = self.t[own][order], (weights[own].astype(REAL) * (gamma + 1) * self.t[own] ** -(gamma + 1))
            reaching = np.append(np.cumsum(heights[order][::-1])[::-1], REAL(0))
            found += reaching[np.searchsorted(t, self.u)] * self.u**gamma
        return found - (gamma_r + 1) * self.u**gamma_r

    def inner_products(self, function):
        """Return the inner products with every given profile at unit norm, and the norms."""
        norm = (self.gamma + 1) / np.sqrt((2 * self.gamma + 1) * self.t)
        products = np.empty(self.t.size, REAL)
        for gamma in np.unique(self.gamma):
            until = np.append(REAL(0), np.cumsum(self.quadrature * function * self.u**gamma))
            own = self.gamma == gamma
            reached = until[np.searchsorted(self.u, self.t[own])]
            products[own] = (gamma + 1) * self.t[own] ** -(gamma + 1) * reached
        return products / norm, norm


def assert_least_and_as_reported(t_i, gamma_i, t_r, lengths=LENGTHS):
    gamma_r = sigma_rel_to_gamma(lengths)
    arguments = t_i, gamma_i, np.full(gamma_r.size, t_r), gamma_r
    weights, reported = solve_weights(*arguments), synthesis_report(*arguments).profile_error
    integral = Integral(t_i, gamma_i, t_r)
    for m, gamma in enumerate(gamma_r.astype(REAL)):
        norm, floor = (gamma + 1) / np.sqrt(2 * gamma + 1), SMALLEST * (1 + np.abs(weights[:, m]).sum())
        missed = integral.missed(weights[:, m], gamma)
        distance = np.sqrt((integral.quadrature * missed**2).sum()) / norm
        assert reported[m] == pytest.approx(float(distance), rel=1e-6, abs=floor)
        products, norms = integral.inner_products(missed / norm)
        common = (products / norms).sum() / (1 / norms**2).sum()  # of the condition that weights sum to 1
        assert np.abs(products - common / norms).max() <= 1e-9 * float(distance) + 10 * floor
        assert abs(weights[:, m].sum() - 1) <= 1e-13 * (1 + np.abs(weights[:, m]).sum())


@st.composite
def histories(draw, most):
    """Averages at times that grow by gaps of every size: (times, whole numbers of a clock's unit, from its unit on)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    steps = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["even", "random", "growing", "bursts", "nearly equal"]))
    gaps = {
        "even": np.ones(steps),
        "random": rng.exponential(1, steps) + 1e-3,
        "growing": 1.05 ** np.minimum(np.arange(steps), 300),
        "bursts": 10.0 ** rng.integers(-3, 3, steps),
        "nearly equal": np.where(rng.random(steps) < 0.3, 1e-9, 1.0),
    }[kind]
    t = np.unique(np.cumsum(gaps) * draw(st.sampled_from([1.0, 256.0, 4e6, 1e12])))
    return np.rint(t) if t[0] >= 1e6 and kind != "nearly equal" else t


@given(t=histories(60), sigma_rels=st.sampled_from(PROFILES))
@settings(deadline=None, max_examples=40)
def test_solution_is_least_and_as_reported(t, sigma_rels):
    gammas = sigma_rel_to_gamma(sigma_rels)
    assert_least_and_as_reported(np.repeat(t, gammas.size), np.tile(gammas, t.size), t[-1])


@given(t=histories(40), sigma_rels=st.sampled_from(PROFILES[1:4]), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_solution_is_least_and_as_reported_where_times_lack_profiles(t, sigma_rels, seed):
    gammas, rng = sigma_rel_to_gamma(sigma_rels), np.random.default_rng(seed)
    present = rng.random((t.size, gammas.size)) < rng.choice([0.3, 0.7, 0.95])
    present[0, rng.integers(gammas.size)] = True
    t_i, gamma_i = np.repeat(t, gammas.size)[present.ravel()], np.tile(gammas, t.size)[present.ravel()]
    assert_least_and_as_reported(t_i, gamma_i, t[-1])


@pytest.mark.parametrize("unit", [1.0, 1e12])
@pytest.mark.parametrize("sigma_rels", PROFILES[1:4])
def test_solution_is_least_and_as_reported_for_thousands_of_uneven_steps(sigma_rels, unit):
    rng = np.random.default_rng(len(sigma_rels))
    t = np.cumsum(10.0 ** rng.uniform(-2, 1, 3000)) * unit / 1e4
    gammas = sigma_rel_to_gamma(sigma_rels)
    assert_least_and_as_reported(np.repeat(t, gammas.size), np.tile(gammas, t.size), t[-1])


@given(
    seed=st.integers(0, 2**32),
    sigma_rels=st.sampled_from(PROFILES[1:]),
    updates_between=st.integers(1, 3),
    unit=st.sampled_from([1, 2048, 10**9]),
)
@settings(deadline=None, max_examples=40)
def test_fewer_updates_than_profiles_between_snapshots_are_no_worse_than_reported(
    seed, sigma_rels, updates_between, unit
):
    """The averages are then linearly dependent. The profile of the training is still right, also with small weights."""
    rng, updates = np.random.default_rng(seed), 120
    t, gammas = np.cumsum(rng.integers(1, 64, updates)) * float(unit), sigma_rel_to_gamma(sigma_rels)
    shares, snapshots = np.zeros((gammas.size, updates)), []
    for i, t_now in enumerate(t):
        weight = np.array([update_weight(gamma, t_now, t_now - (t[i - 1] if i else 0)) for gamma in gammas])
        shares -= weight[:, None] * shares
        shares[:, i] += weight
        if (i + 1) % updates_between == 0:
            snapshots.append((t_now, shares.copy()))
    t_i, rows = np.repeat([t for t, _ in snapshots], gammas.size), np.concatenate([row for _, row in snapshots])
    outputs = np.full(3, t[-1]), sigma_rel_to_gamma([min(sigma_rels) * 1.1, 0.09, max(sigma_rels) * 0.95])
    arguments = t_i, np.tile(gammas, len(snapshots)), *outputs
    report, span = synthesis_report(*arguments), np.diff(t, prepend=0) / t[-1]
    within = np.hypot(report.profile_error, 1e-3)
    quiet = least_amplifying_weights(*arguments, within=within)
    assert np.linalg.norm(quiet, axis=0).max() < 5
    for weights, limit in ((solve_weights(*arguments), report.profile_error), (quiet, within)):
        for found, error, gamma in zip(weights.T @ rows, limit, outputs[1], strict=True):
            wanted = np.diff((t / t[-1]) ** (gamma + 1), prepend=0)
            off = np.sqrt(((found - wanted) ** 2 / span).sum() * (2 * gamma + 1)) / (gamma + 1)
            assert off <= error * (1 + 1e-6) + 1e-10
