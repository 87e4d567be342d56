"""Weights that amplify less: equal to a dense solve, within the limit, and without needless profile error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.posthoc import least_amplifying_weights, select_steps, solve_weights, synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma

TRIPLE = (0.03, 0.1, 0.25)


def arguments_of(t, sigma_rels, lengths):
    gammas, wanted = sigma_rel_to_gamma(sigma_rels), sigma_rel_to_gamma(lengths)
    t = np.asarray(t, np.float64)
    return np.repeat(t, gammas.size), np.tile(gammas, t.size), np.full(wanted.size, t[-1]), wanted


def norms(weights):
    return np.linalg.norm(weights, axis=0)


def errors(arguments, weights):
    return synthesis_report(*arguments, weights=weights).profile_error


# --- Oracle: the profiles themselves on Gauss nodes, and numpy's dense least squares with a penalty on the norm -------


def sampled(t_i, gamma_i, t_r, gamma_r):
    """Profiles of the given averages [nodes, inputs] and of the wanted one [nodes], in the L2 norm of a vector."""
    edges = np.concatenate([[0.0], t_i.min() * 0.5 ** np.arange(30, 0, -1), np.unique(t_i)]) / t_r
    x, wx = np.polynomial.legendre.leggauss(16)
    width = np.diff(edges)[:, None]
    u, root = (edges[:-1, None] + width * (x + 1) / 2).ravel(), np.sqrt((width * wx / 2).ravel())
    t = t_i / t_r
    own = np.where(u[:, None] <= t, (gamma_i + 1) / t * (u[:, None] / t) ** gamma_i, 0.0) * root[:, None]
    return own, (gamma_r + 1) * u**gamma_r * root


def least_error_at_norm(own, wanted, norm):
    """The least error of weights with sum 1 and this norm, relative."""
    low, high = -60.0, 10.0
    for _ in range(200):
        penalty = np.exp((low + high) / 2)
        weights = ridge(own, wanted, penalty)
        low, high = ((low + high) / 2, high) if np.linalg.norm(weights) > norm else (low, (low + high) / 2)
    return np.linalg.norm(own @ weights - wanted) / np.linalg.norm(wanted)


def ridge(own, wanted, penalty):
    """Ridge: one weight is 1 less the sum of the others, so that no condition is left."""
    differences = own[:, :-1] - own[:, -1:]
    inputs = own.shape[1]
    ridge = np.sqrt(penalty) * np.vstack([np.eye(inputs - 1), -np.ones(inputs - 1)])
    right = np.concatenate([wanted - own[:, -1], np.append(np.zeros(inputs - 1), -np.sqrt(penalty))])
    others = np.linalg.lstsq(np.vstack([differences, ridge]), right, rcond=None)[0]
    return np.append(others, 1 - others.sum())


@pytest.mark.parametrize("sigma_rels", [(0.05, 0.1), TRIPLE])
@pytest.mark.parametrize("length", [0.02, 0.04])
def test_no_weights_of_that_norm_have_a_smaller_error(sigma_rels, length):
    t_i, gamma_i, t_r, gamma_r = arguments = arguments_of([2, 3, 5, 7, 8, 9, 10], sigma_rels, (length,))
    plain = solve_weights(*arguments)
    within = 2 * errors(arguments, plain)
    found = least_amplifying_weights(*arguments, within=within)
    assert norms(found) < 0.95 * norms(plain)
    own, wanted = sampled(t_i, gamma_i, t_r[0], gamma_r[0])
    best = least_error_at_norm(own, wanted, norms(found)[0])
    assert errors(arguments, found)[0] == pytest.approx(best, rel=1e-6, abs=0)
    assert 0.9 * within < errors(arguments, found)[0] <= within


# --- What is promised -------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 60),
    unit=st.sampled_from([1e-3, 1.0, 1e12]),
    sigma_rels=st.sampled_from([(0.1,), (0.05, 0.1), TRIPLE, (0.03, 0.06, 0.1, 0.2)]),
    added=st.sampled_from([1e-1, 1e-2, 1e-3, 1e-5]),
)
def test_limit_holds_and_the_norm_never_grows(seed, steps, unit, sigma_rels, added):
    rng = np.random.default_rng(seed)
    arguments = arguments_of(
        np.cumsum(rng.exponential(1, steps) ** 3 + 1e-3) * unit, sigma_rels, rng.uniform(0.015, 0.28, 4)
    )
    plain = solve_weights(*arguments)
    within = np.hypot(synthesis_report(*arguments).profile_error, added)
    found = least_amplifying_weights(*arguments, within=within)
    assert (errors(arguments, found) <= within * (1 + 1e-6)).all()
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-12 * (1 + np.abs(found).sum(0).max()))
    assert (norms(found) <= norms(plain) * (1 + 1e-12)).all()
    changed = (found != plain).any(0)
    assert (norms(plain)[changed] > 1).all()
    below_one = norms(found) < 1 - 1e-12  # only without added error
    assert (errors(arguments, found) <= errors(arguments, plain) + 1e-11 * norms(plain))[changed & below_one].all()


def test_rest_of_the_tolerance_of_a_selection_lowers_amplification_to_a_fifth():
    lengths = (0.015, 0.02, 0.04, 0.2)
    chosen = select_steps(np.arange(1, 2001), sigma_rel_to_gamma(TRIPLE), 2000, sigma_rel_to_gamma(lengths))
    arguments = arguments_of(np.arange(1, 2001)[chosen.places], TRIPLE, lengths)
    found = least_amplifying_weights(*arguments, within=np.hypot(chosen.profile_error_of_all, 1e-3))
    assert chosen.weight_l2[2] > 5 * norms(found)[2]  # 9.4 and 1.7
    assert (errors(arguments, found) <= 1e-3 * 1.01).all()


def test_no_error_is_added_where_nothing_is_amplified():
    arguments = arguments_of(np.arange(1, 101), (0.05, 0.1), (0.05, 0.06, 0.1, 0.15))
    np.testing.assert_array_equal(least_amplifying_weights(*arguments, within=0.5), solve_weights(*arguments))


def test_no_more_error_is_added_than_lowers_the_norm_to_one():
    arguments = arguments_of(np.arange(1, 101), TRIPLE, (0.04,))
    found = least_amplifying_weights(*arguments, within=0.5)
    assert 1 <= norms(found)[0] < 1.1
    assert errors(arguments, found)[0] < 0.1


@pytest.mark.parametrize("within", [0.0, 1e-12])
def test_limit_that_cannot_be_met_returns_the_least_error(within):
    arguments = arguments_of(np.arange(1, 11), TRIPLE, (0.02, 0.04))
    np.testing.assert_array_equal(least_amplifying_weights(*arguments, within=within), solve_weights(*arguments))


@pytest.mark.parametrize("case", ["a time lacks a profile", "many averages"])
def test_unsupported_problems_return_the_least_error(case):
    arguments = arguments_of(np.arange(1, 400 if case == "many averages" else 21), TRIPLE, (0.02, 0.04))
    if case == "a time lacks a profile":
        arguments = (np.delete(arguments[0], 7), np.delete(arguments[1], 7), *arguments[2:])
    found = least_amplifying_weights(*arguments, within=0.1)
    np.testing.assert_array_equal(found, solve_weights(*arguments))


def test_outputs_of_several_times_and_any_order_of_inputs_are_found():
    t_i, gamma_i, _, _ = arguments_of(np.arange(1, 21), TRIPLE, (0.02,))
    t_r, gamma_r = np.array([20.0, 11.0, 20.0]), sigma_rel_to_gamma([0.02, 0.04, 0.04])
    order = np.random.default_rng(0).permutation(t_i.size)
    found = least_amplifying_weights(t_i[order], gamma_i[order], t_r, gamma_r, within=0.05)
    for m in range(3):
        present = t_i <= t_r[m]
        alone = least_amplifying_weights(
            t_i[present], gamma_i[present], t_r[m : m + 1], gamma_r[m : m + 1], within=0.05
        )
        np.testing.assert_allclose(found[np.argsort(order), m][present], alone[:, 0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("within", "message"), [(-1.0, "within is -1"), ([0.1, 0.1], r"within has the shape \(2,\); expected one number")]
)
def test_bad_limit_is_named(within, message):
    with pytest.raises(ValueError, match=message):
        least_amplifying_weights([1.0], [7.0], [1.0], [10.0], within=within)
