from __future__ import annotations

import functools
import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema.posthoc import solve_weights, synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma, update_weight

PAIR, TRIPLE, FOUR = (0.05, 0.1), (0.03, 0.1, 0.25), (0.03, 0.06, 0.1, 0.2)
LENGTHS = (0.03001, 0.06, 0.15, 0.24)


def every_profile_at(times, sigma_rels):
    """Inputs when each of these times has every profile."""
    return np.repeat(np.asarray(times, float), len(sigma_rels)), np.tile(sigma_rel_to_gamma(sigma_rels), len(times))


def outputs_at(t_r, sigma_rels=LENGTHS):
    return np.full(len(sigma_rels), float(t_r)), sigma_rel_to_gamma(sigma_rels)


# --- Oracle 1: Alg. 3 in exact rational arithmetic, for whole times and exponents -------------------------------------


def exact_product(t_a, g_a, t_b, g_b):
    """Eq. 151 as a fraction."""
    g_of_later = g_b if t_a < t_b else g_a
    overlap = Fraction(min(t_a, t_b), max(t_a, t_b)) ** g_of_later
    return Fraction((g_a + 1) * (g_b + 1), g_a + g_b + 1) * overlap / max(t_a, t_b)


def exact_solve(matrix, right):
    """Gauss-Jordan elimination of a system of fractions."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next(r for r in range(i, len(rows)) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(len(rows)):
            if r != i and rows[r][i]:
                factor = rows[r][i]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


@functools.cache
def exact_weights(inputs, output, normalize):  # inputs: a tuple, so that the elimination is done once
    """Alg. 3 from the paper (dense), and with the sum as a Lagrange multiplier or a divisor."""
    n = len(inputs)
    a = [[exact_product(*x, *y) for y in inputs] for x in inputs]
    b = [exact_product(*x, *output) for x in inputs]
    if normalize == "constrain":
        a = [[*row, Fraction(1)] for row in a] + [[Fraction(1)] * n + [Fraction(0)]]
        return exact_solve(a, [*b, Fraction(1)])[:n]
    if normalize == "edm2":
        weights = exact_weights(inputs, output, None)
        return [w / sum(weights) for w in weights]
    return exact_solve(a, b)


def exact_error(inputs, output, weights):
    """Relative error of the profile that these weights (floats or fractions) give, without any rounding."""
    w = [Fraction(x) for x in weights]
    norm2 = exact_product(*output, *output)
    both = sum(x * exact_product(*p, *output) for x, p in zip(w, inputs, strict=True))
    own = sum(
        x * y * exact_product(*p, *q) for (x, p), (y, q) in itertools.product(zip(w, inputs, strict=True), repeat=2)
    )
    return math.sqrt((norm2 - 2 * both + own) / norm2)


def pairs(inputs, output):
    """Fractions' inputs as the library's arguments."""
    return [i[0] for i in inputs], [i[1] for i in inputs], [output[0]], [output[1]]


TIMES = {
    "even": (2, 4, 6, 8, 10),
    "doubling": (1, 2, 4, 8, 16),
    "ratio of a million": (1, 10**6, 10**12, 2 * 10**12),
    "one apart at 1e12": (5 * 10**11, 10**12, 10**12 + 1, 10**12 + 2),
    "very narrow and very wide": (1, 10**9, 10**9 + 1, 10**12),
    "single": (7,),
}
PROFILES = {"one": (7,), "pair": (17, 7), "triple": (32, 7, 1), "four": (32, 14, 7, 2), "steep": (60, 17)}


@pytest.mark.parametrize("normalize", ["constrain", "edm2", None])
@pytest.mark.parametrize("profiles", PROFILES)
@pytest.mark.parametrize("times", TIMES)
def test_profile_is_as_near_as_exact_arithmetic_gets(times, profiles, normalize):
    inputs = list(itertools.product(TIMES[times], PROFILES[profiles]))
    for gamma_r in (4, 10):
        output = (TIMES[times][-1], gamma_r)
        best = exact_error(inputs, output, exact_weights(tuple(inputs), output, normalize))
        arguments = pairs(inputs, output)
        found = exact_error(inputs, output, solve_weights(*arguments, normalize=normalize)[:, 0])
        report = synthesis_report(*arguments, normalize=normalize)
        assert found == pytest.approx(best, rel=1e-6, abs=1e-14)
        assert report.profile_error[0] == pytest.approx(best, rel=1e-9, abs=0)


def test_very_short_averages_are_as_near_as_exact_arithmetic_gets():
    inputs, output = list(itertools.product((3, 9, 10, 40), (900, 500, 30))), (40, 700)
    best = exact_error(inputs, output, exact_weights(tuple(inputs), output, "constrain"))
    found = exact_error(inputs, output, solve_weights(*pairs(inputs, output))[:, 0])
    assert found == pytest.approx(best, rel=1e-9, abs=0)


def test_twelve_profiles_are_as_near_as_exact_arithmetic_gets():
    inputs, output = [(4, g) for g in range(1, 24, 2)] + [(9, g) for g in range(1, 24, 2)], (9, 30)
    best = exact_error(inputs, output, exact_weights(tuple(inputs), output, None))
    assert synthesis_report(*pairs(inputs, output), normalize=None).profile_error[0] == pytest.approx(
        best, rel=1e-6, abs=0
    )


@pytest.mark.parametrize("normalize", ["constrain", None])
def test_weights_are_those_of_the_dense_system_where_it_is_well_conditioned(normalize):
    inputs, output = list(itertools.product((1, 3, 9, 27), (17, 7))), (27, 11)
    wanted = [float(x) for x in exact_weights(tuple(inputs), output, normalize)]
    np.testing.assert_allclose(solve_weights(*pairs(inputs, output), normalize=normalize)[:, 0], wanted, atol=1e-13)


@pytest.mark.parametrize("normalize", ["constrain", "edm2", None])
@pytest.mark.parametrize(
    "missing",
    [
        [(4, 7)],
        [(2, 17), (6, 7)],
        [(10, 7)],
        [(10, 17), (8, 7), (6, 17)],
        [(2, 7), (4, 7), (6, 7), (8, 7), (10, 7)],
        [(2, 17), (4, 17), (6, 17), (8, 7)],
    ],
    ids=str,
)
def test_a_time_may_lack_a_profile(missing, normalize):
    inputs = [p for p in itertools.product(TIMES["even"], (17, 7)) if p not in missing]
    output = (10, 11)
    best = exact_error(inputs, output, exact_weights(tuple(inputs), output, normalize))
    weights = solve_weights(*pairs(inputs, output), normalize=normalize)[:, 0]
    assert exact_error(inputs, output, weights) == pytest.approx(best, rel=1e-9, abs=0)
    assert synthesis_report(*pairs(inputs, output), normalize=normalize).profile_error[0] == pytest.approx(
        best, rel=1e-9, abs=0
    )


@pytest.mark.parametrize("times", ["ratio of a million", "one apart at 1e12", "very narrow and very wide"])
def test_a_time_may_lack_a_profile_among_times_near_and_far(times):
    last = TIMES[times][-1]
    inputs = [p for p in itertools.product(TIMES[times], (32, 17, 7)) if p not in [(TIMES[times][2], 17), (last, 7)]]
    best = exact_error(inputs, (last, 11), exact_weights(tuple(inputs), (last, 11), "constrain"))
    weights = solve_weights(*pairs(inputs, (last, 11)))[:, 0]
    assert np.abs(weights).max() < 1e6
    assert exact_error(inputs, (last, 11), weights) == pytest.approx(best, rel=1e-6, abs=1e-9)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_small_set_of_averages_is_used_as_well_as_exact_arithmetic_can(data):
    gammas = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True))
    times = data.draw(st.lists(st.integers(1, 1000), min_size=1, max_size=4, unique=True))
    table = list(itertools.product(times, gammas))
    inputs = data.draw(st.lists(st.sampled_from(table), min_size=1, max_size=8, unique=True))
    output = (max(t for t, _ in inputs) + data.draw(st.integers(0, 5)), data.draw(st.integers(0, 40)))
    best = exact_error(inputs, output, exact_weights(tuple(inputs), output, "constrain"))
    weights = solve_weights(*pairs(inputs, output))[:, 0]
    rounding = 1e-14 * np.abs(weights).sum() * 40
    assert exact_error(inputs, output, weights) == pytest.approx(best, rel=1e-6, abs=rounding)


def test_error_of_given_weights_is_the_exact_one():
    inputs = [(2, 17), (4, 7), (4, 17), (8, 7), (8, 17), (4, 17)]  # the last is given twice and adds up
    weights = [0.3, -0.2, 0.11, 0.5, 0.4, 0.2]
    report = synthesis_report(*pairs(inputs, (9, 11)), weights=np.array(weights)[:, None])
    assert report.profile_error[0] == pytest.approx(exact_error(inputs, (9, 11), weights), rel=1e-13, abs=0)


def test_time_after_the_last_average_counts_as_error():
    inputs, output = list(itertools.product((4, 6, 8), (17, 7))), (10, 11)
    best = exact_error(inputs, output, exact_weights(tuple(inputs), output, "constrain"))
    assert best > 0.5
    assert synthesis_report(*pairs(inputs, output)).profile_error[0] == pytest.approx(best, rel=1e-12, abs=0)


# --- Oracle 2: the profile integrated in long double -----------------------------------------------------------------


def profile_error_by_integration(times, sigma_rels, weights, sigma_rel, t_r):
    """L2 distance of the profile from the one wanted, 12 Gauss nodes on each of several pieces between kept times."""
    real = np.longdouble
    t, w = np.asarray(times, real) / real(t_r), weights.reshape(len(times), len(sigma_rels)).astype(real)
    edges = np.concatenate([t[0] * real(0.5) ** np.arange(40)[::-1], t[1:]])
    x, wx = (a.astype(real) for a in np.polynomial.legendre.leggauss(12))
    widths = np.diff(np.append(real(0), edges))
    u = (edges - widths)[:, None] + widths[:, None] * (x + 1) / 2
    u, quadrature = u.ravel(), (widths[:, None] * wx / 2).ravel()
    found = np.zeros_like(u)
    for a, gamma in enumerate(sigma_rel_to_gamma(sigma_rels).astype(real)):
        height = np.append(np.cumsum((w[:, a] * (gamma + 1) * t ** -(gamma + 1))[::-1])[::-1], real(0))
        found += height[np.searchsorted(t, u)] * u**gamma
    gamma = real(sigma_rel_to_gamma(sigma_rel))
    wanted2 = (gamma + 1) ** 2 / (2 * gamma + 1)
    return float(np.sqrt((quadrature * (found - (gamma + 1) * u**gamma) ** 2).sum() / wanted2))


@pytest.mark.parametrize(
    ("steps", "sigma_rels", "floor"),
    [(20, PAIR, 0), (300, PAIR, 0), (2000, PAIR, 0), (1000, TRIPLE, 1e-14), (3000, FOUR, 2e-14)],
)
@pytest.mark.parametrize("normalize", ["constrain", "edm2", None])
def test_predicted_error_is_the_integrated_one(steps, sigma_rels, floor, normalize):
    times = np.arange(1, steps + 1)
    arguments = (*every_profile_at(times, sigma_rels), *outputs_at(steps))
    weights = solve_weights(*arguments, normalize=normalize)
    report = synthesis_report(*arguments, normalize=normalize)
    for m, sigma_rel in enumerate(LENGTHS):
        integrated = profile_error_by_integration(times, sigma_rels, weights[:, m], sigma_rel, steps)
        assert report.profile_error[m] == pytest.approx(integrated, rel=1e-6, abs=floor)


def test_predicted_error_holds_for_irregular_times():
    times = np.unique(np.random.default_rng(0).integers(1, 10**7, 200))
    arguments = (*every_profile_at(times, TRIPLE), *outputs_at(times[-1]))
    weights, report = solve_weights(*arguments), synthesis_report(*arguments)
    for m, sigma_rel in enumerate(LENGTHS):
        integrated = profile_error_by_integration(times, TRIPLE, weights[:, m], sigma_rel, times[-1])
        assert report.profile_error[m] == pytest.approx(integrated, rel=1e-6, abs=1e-14)


def test_normalized_error_is_the_error_and_the_scaling_added_in_squares():
    arguments = (*every_profile_at([4, 7, 11], PAIR), *outputs_at(11))
    plain = synthesis_report(*arguments, normalize=None).profile_error
    excess = solve_weights(*arguments, normalize=None).sum(0) - 1
    normalized = synthesis_report(*arguments, normalize="edm2").profile_error
    wanted = np.sqrt(plain**2 + (excess / (1 + excess)) ** 2 * (1 - plain**2))
    np.testing.assert_allclose(normalized, wanted, rtol=1e-12)


def test_constrained_is_never_worse_than_divided():
    for steps in (2, 3, 8, 20):
        arguments = (*every_profile_at(np.arange(1, steps + 1), PAIR), *outputs_at(steps))
        constrained, divided = (synthesis_report(*arguments, normalize=n).profile_error for n in ("constrain", "edm2"))
        assert (constrained <= divided * (1 + 1e-12)).all()


@pytest.mark.parametrize("normalize", ["constrain", "edm2"])
@pytest.mark.parametrize(("steps", "sigma_rels"), [(1, (0.1,)), (5, PAIR), (2000, PAIR), (2000, FOUR)])
def test_weights_sum_to_one(steps, sigma_rels, normalize):
    arguments = (*every_profile_at(np.arange(1, steps + 1), sigma_rels), *outputs_at(steps))
    weights = solve_weights(*arguments, normalize=normalize)
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-14 * max(1, np.abs(weights).sum(0).max()))


def test_errors_of_given_weights_equal_those_of_the_solution():
    arguments = (*every_profile_at(np.arange(1, 101), TRIPLE), *outputs_at(100))
    for normalize in ("constrain", "edm2", None):
        weights = solve_weights(*arguments, normalize=normalize)
        of_weights = synthesis_report(*arguments, weights=weights).profile_error
        predicted = synthesis_report(*arguments, normalize=normalize).profile_error
        np.testing.assert_allclose(of_weights, predicted, rtol=1e-7)


# --- Oracle 3: the trainings themselves ------------------------------------------------------------------------------


def snapshots_of_unit_vectors(t, sigma_rels, kept, dtype):
    """Averages at the kept updates of a training in which the weights of each update are a unit vector of its own."""
    gammas = sigma_rel_to_gamma(sigma_rels)
    averages = np.zeros((len(sigma_rels), t.size), dtype)
    snapshots = []
    for i, t_now in enumerate(t):
        weight = np.array([update_weight(g, t_now, t_now - (t[i - 1] if i else 0)) for g in gammas], dtype)
        averages -= weight[:, None] * averages
        averages[:, i] += weight
        if i in kept:
            snapshots += [(t_now, g, average.copy()) for g, average in zip(gammas, averages, strict=True)]
    t_i, gamma_i, rows = zip(*snapshots, strict=True)
    return np.array(t_i), np.array(gamma_i), np.array(rows, np.float64)


@pytest.mark.parametrize(("dtype", "rounding"), [(np.float64, 1e-12), (np.float32, 3e-6)])
@pytest.mark.parametrize("clock", ["even", "random batches"])
def test_synthesized_average_is_off_by_no_more_than_the_report_predicts(clock, dtype, rounding):
    rng = np.random.default_rng(1)
    t = np.cumsum(np.full(600, 10) if clock == "even" else rng.integers(1, 64, 600)).astype(float)
    t_i, gamma_i, rows = snapshots_of_unit_vectors(t, PAIR, set(range(9, 600, 10)), dtype)
    outputs = outputs_at(t[-1], (0.03, 0.05, 0.08, 0.15, 0.25))
    share = solve_weights(t_i, gamma_i, *outputs).T @ rows
    predicted = synthesis_report(t_i, gamma_i, *outputs).profile_error
    for found, error, gamma in zip(share, predicted, outputs[1], strict=True):
        wanted = np.diff(np.append(0.0, (t / t[-1]) ** (gamma + 1)))
        density2 = (found - wanted) ** 2 / (np.diff(np.append(0.0, t)) / t[-1])
        off = math.sqrt(density2.sum() / ((gamma + 1) ** 2 / (2 * gamma + 1)))
        assert off <= error + rounding
        assert off >= 0.9 * error - rounding  # ten updates lie between two snapshots


def test_report_gives_the_mean_and_width_that_the_training_has():
    t = np.arange(1.0, 3001)
    t_i, gamma_i, rows = snapshots_of_unit_vectors(t, PAIR, {99, 299, 999, 1999, 2999}, np.float64)
    outputs = outputs_at(3000, (0.08, 0.15, 0.25))
    share = solve_weights(t_i, gamma_i, *outputs).T @ rows
    mean = share @ (t - 0.5)
    width = np.sqrt(share @ (t - 0.5) ** 2 - mean**2)
    report = synthesis_report(t_i, gamma_i, *outputs)
    np.testing.assert_allclose(report.mean_time, mean / 3000, rtol=1e-5)
    np.testing.assert_allclose(report.sigma_rel, width / 3000, rtol=1e-4)


# --- Against the peer ------------------------------------------------------------------------------------------------


def test_without_normalization_the_profile_is_that_of_ema_pytorch():
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("ema_pytorch.post_hoc_ema")
    times = np.arange(1, 21) * 500
    arguments = (*every_profile_at(times, PAIR), *outputs_at(10_000))
    theirs = peer.solve_weights(*(torch.tensor(a) for a in arguments)).numpy()
    ours = solve_weights(*arguments, normalize=None)
    same = synthesis_report(*arguments, weights=theirs).profile_error
    np.testing.assert_allclose(synthesis_report(*arguments, normalize=None).profile_error, same, rtol=1e-9)
    np.testing.assert_allclose(ours.sum(0), theirs.sum(0), atol=1e-9)


# --- What the arguments may be ---------------------------------------------------------------------------------------


def test_a_given_average_is_returned_as_it_is():
    times = [3, 10, 11, 40]
    t_i, gamma_i = every_profile_at(times, FOUR)
    for normalize in ("constrain", "edm2", None):
        weights = solve_weights(t_i, gamma_i, t_i, gamma_i, normalize=normalize)
        np.testing.assert_array_equal(weights, np.eye(len(t_i)))


def test_a_given_average_is_found_among_missing_ones():
    weights = solve_weights([1, 2, 3, 3], [7, 17, 7, 17], [2, 3], [17, 7])
    np.testing.assert_array_equal(weights.T, [[0, 1, 0, 0], [0, 0, 1, 0]])


def test_nearly_a_given_average_is_nearly_returned():
    weights = solve_weights(*every_profile_at([3, 10, 11, 40], PAIR), [40], sigma_rel_to_gamma([0.05 + 1e-9]))
    np.testing.assert_allclose(weights[:, 0], [0, 0, 0, 0, 0, 0, 1, 0], atol=1e-6)


def test_unit_of_time_does_not_matter():
    t_i, gamma_i = every_profile_at([3, 10, 11, 40, 90], TRIPLE)
    t_r, gamma_r = outputs_at(95)
    in_steps = solve_weights(t_i, gamma_i, t_r, gamma_r)
    for unit in (1e-9, 7.3, 2048 * 512, 1e12):
        np.testing.assert_allclose(solve_weights(t_i * unit, gamma_i, t_r * unit, gamma_r), in_steps, atol=1e-9)


def test_order_of_the_inputs_does_not_matter():
    t_i, gamma_i = every_profile_at([3, 10, 11, 40, 90], TRIPLE)
    order = np.random.default_rng(2).permutation(t_i.size)
    sorted_first = solve_weights(t_i, gamma_i, *outputs_at(90))
    np.testing.assert_array_equal(solve_weights(t_i[order], gamma_i[order], *outputs_at(90)), sorted_first[order])


def test_later_rows_of_a_repeated_average_are_zero():
    t_i, gamma_i = every_profile_at([3, 10, 40], PAIR)
    once = solve_weights(t_i, gamma_i, *outputs_at(40))
    repeated = solve_weights(np.append(t_i, [10, 40]), np.append(gamma_i, gamma_i[[2, 5]]), *outputs_at(40))
    np.testing.assert_array_equal(repeated[:6], once)
    assert not repeated[6:].any()


def test_two_roundings_of_one_exponent_are_one_profile():
    t_i, gamma_i = every_profile_at([3, 10, 40], PAIR)
    once = solve_weights(t_i, gamma_i, *outputs_at(40))
    shaken = gamma_i * (1 + np.array([0, 2, 0, -2, 1, 0]) * 2.0**-52)
    np.testing.assert_allclose(solve_weights(t_i, shaken, *outputs_at(40)), once, atol=1e-12)


def test_each_output_uses_only_averages_up_to_its_time():
    t_i, gamma_i = every_profile_at([3, 10, 40, 90], PAIR)
    t_r, gamma_r = np.array([90, 10, 45, 90.0]), sigma_rel_to_gamma([0.08, 0.08, 0.08, 0.2])
    together = solve_weights(t_i, gamma_i, t_r, gamma_r)
    assert not together[t_i[:, None] > t_r].any()
    for m in range(4):
        present = t_i <= t_r[m]
        alone = solve_weights(t_i[present], gamma_i[present], t_r[m : m + 1], gamma_r[m : m + 1])
        np.testing.assert_allclose(together[present, m], alone[:, 0], atol=1e-14)


def test_a_profile_tracked_only_later_does_not_disturb_earlier_outputs():
    t_i, gamma_i = [1, 2, 3, 3], [7, 7, 7, 17]
    both = solve_weights(t_i, gamma_i, [2, 3], [10, 10])
    np.testing.assert_allclose(both[:2, 0], solve_weights(t_i[:2], gamma_i[:2], [2], [10])[:, 0], atol=1e-15)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12, 2e-16])
def test_nearly_equal_times_give_finite_small_weights(gap):
    times = [0.5, 1.0, 1.0 + max(gap, 2.0**-52), 2.0]
    arguments = (*every_profile_at(times, FOUR), *outputs_at(2, (0.05, 0.15, 0.25)))
    weights = solve_weights(*arguments)
    without = synthesis_report(*every_profile_at([0.5, 1.0, 2.0], FOUR), *outputs_at(2, (0.05, 0.15, 0.25)))
    assert np.abs(weights).max() < 20
    np.testing.assert_allclose(synthesis_report(*arguments).profile_error, without.profile_error, rtol=10 * gap + 1e-9)


def test_neighbouring_floating_point_times_late_in_a_run_are_two_times():
    times = [5e11, 1e12, np.nextafter(1e12, 2e12), 2e12]
    weights = solve_weights(*every_profile_at(times, FOUR), *outputs_at(2e12))
    assert np.abs(weights).max() < 20
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-13)


def test_thousands_of_steps_with_gaps_stay_exact():
    t_i, gamma_i = every_profile_at(np.arange(1, 1001), PAIR)
    present = np.random.default_rng(3).random(t_i.size) < 0.9
    present[-2:] = True
    arguments = (t_i[present], gamma_i[present], *outputs_at(1000))
    weights, report = solve_weights(*arguments), synthesis_report(*arguments)
    whole = np.zeros((t_i.size, len(LENGTHS)))
    whole[present] = weights
    for m, sigma_rel in enumerate(LENGTHS):
        integrated = profile_error_by_integration(np.arange(1, 1001), PAIR, whole[:, m], sigma_rel, 1000)
        assert report.profile_error[m] == pytest.approx(integrated, rel=1e-6, abs=0)


def test_gaps_at_scale_are_filled_as_well_as_a_dense_factor_does():
    """Oracle: numpy's least squares on the profiles themselves, sampled on Gauss nodes."""
    t_i, gamma_i = every_profile_at(np.arange(1, 13), PAIR)
    present = np.random.default_rng(5).random(t_i.size) < 0.6
    t_i, gamma_i = t_i[present], gamma_i[present]
    x, wx = np.polynomial.legendre.leggauss(30)
    u = (np.arange(12)[:, None] + (x + 1) / 2).ravel()
    root = np.sqrt(np.tile(wx / 2, 12))
    sampled = np.where(u[:, None] <= t_i, (gamma_i + 1) / t_i * (u[:, None] / t_i) ** gamma_i, 0) * root[:, None]
    t_r, gamma_r = outputs_at(12, (0.08, 0.2))
    wanted = (gamma_r + 1) / 12 * (u[:, None] / 12) ** gamma_r * root[:, None]
    dense = np.linalg.lstsq(sampled, wanted, rcond=None)[0]
    ours = solve_weights(t_i, gamma_i, t_r, gamma_r, normalize=None)
    np.testing.assert_allclose(sampled @ ours, sampled @ dense, atol=1e-12)


# --- The report ------------------------------------------------------------------------------------------------------


def test_report_of_a_given_average_is_its_own_profile():
    t_i, gamma_i = every_profile_at([3, 10, 40], PAIR)
    report = synthesis_report(t_i, gamma_i, *outputs_at(40, PAIR))
    np.testing.assert_allclose(report.profile_error, 0, atol=1e-14)
    np.testing.assert_allclose(report.sigma_rel, PAIR, rtol=1e-12)
    np.testing.assert_allclose(report.mean_time, (gamma_i[:2] + 1) / (gamma_i[:2] + 2))
    np.testing.assert_array_equal([report.weight_l1, report.weight_l2], 1)
    assert report.warnings == ()


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "BF16"])
def test_rounding_matches_stored_numbers(dtype):
    mantissa = np.exp2(np.random.default_rng(4).uniform(0, 1, 200_000).astype(np.longdouble))
    numpy_types = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    stored = mantissa.astype(numpy_types[dtype]) if dtype in numpy_types else np.rint(mantissa * 2**7) / 2**7
    unit = math.sqrt(np.mean((stored.astype(np.longdouble) / mantissa - 1) ** 2))
    arguments = (*every_profile_at([3, 10, 40], PAIR), *outputs_at(40))
    report = synthesis_report(*arguments, checkpoint_dtype=dtype)
    np.testing.assert_allclose(report.rounding, np.sqrt((solve_weights(*arguments) ** 2).sum(0)) * unit, rtol=0.01)


def test_accurate_synthesis_has_no_warnings():
    arguments = (*every_profile_at(np.arange(1, 101), PAIR), *outputs_at(100, (0.05, 0.08, 0.15)))
    assert synthesis_report(*arguments, t_first=1, updates=100).warnings == ()


def warnings_of(t_i, gamma_i, t_r, gamma_r, **options):
    return synthesis_report(t_i, gamma_i, t_r, gamma_r, **options).warnings


def test_large_error_is_reported_with_its_length():
    (warning,) = warnings_of(*every_profile_at([4, 8], PAIR), *outputs_at(8, (0.05, 0.25)))
    assert "sigma_rel=0.25 (" in warning
    assert "sigma_rel=0.05 " not in warning
    assert "cannot be reconstructed accurately. Keep more snapshots, including early ones" in warning


def test_amplified_rounding_is_reported_with_its_dtype():
    arguments = (*every_profile_at(np.arange(1, 101), PAIR), *outputs_at(100, (0.02, 0.08)))
    (warning,) = warnings_of(*arguments, checkpoint_dtype="F16")
    assert "The rounding of snapshots stored as F16 is amplified at" in warning
    assert "Store snapshots as float32" in warning
    assert "sigma_rel=0.02 (" in warning
    assert warnings_of(*arguments) == ()


def test_late_start_is_reported():
    arguments = (*every_profile_at(np.arange(1, 101), PAIR), *outputs_at(100, (0.08, 0.2)))
    (warning,) = warnings_of(*arguments, t_first=20)  # 0.2 ** 2.85 = 1 %
    assert "first update (t = 20)" in warning
    assert "sigma_rel=0.2 (1." in warning
    assert warnings_of(*arguments, t_first=10) == ()


def test_few_updates_are_reported():
    arguments = (*every_profile_at(np.arange(1, 101), PAIR), *outputs_at(100, (0.08, 0.15)))
    (warning,) = warnings_of(*arguments, updates=29)
    assert "29 updates" in warning
    assert warnings_of(*arguments, updates=30) == ()
    assert "sigma_rel=0.08 " not in warnings_of(*arguments, updates=np.array([30, 10]))[0]


def test_at_most_eight_outputs_are_named():
    (warning,) = warnings_of([1.0], [7.0], np.full(11, 1.0), np.linspace(17, 30, 11))
    assert warning.count("sigma_rel") == 8
    assert "and 3 more" in warning


def test_outputs_of_several_times_are_named_with_their_time():
    (warning,) = warnings_of([1.0, 2.0], [7.0, 7.0], [1.0, 2.0], [17.0, 7.0])
    assert "at t = 1 (profile error" in warning


def test_report_cannot_be_changed():
    report = synthesis_report([1.0], [7.0], [1.0], [7.0])
    with pytest.raises(AttributeError):
        report.warnings = ("mine",)


def test_solution_for_thousands_of_steps_takes_well_under_a_second():
    arguments = (*every_profile_at(np.arange(1, 2001), PAIR), *outputs_at(2000, np.linspace(0.05, 0.15, 11)))
    started = time.process_time()
    solve_weights(*arguments)
    assert time.process_time() - started < 5  # cubic growth would take minutes


# --- Bad input -------------------------------------------------------------------------------------------------------

GOOD = {"t_i": [1, 2], "gamma_i": [7, 7], "t_r": [2], "gamma_r": [10]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"t_i": [1, 2, 3]}, r"t_i and gamma_i have the shapes \(3,\) and \(2,\); expected .* Give one time"),
        ({"t_r": [2, 2]}, r"t_r and gamma_r have the shapes"),
        ({"t_i": [[1, 2]], "gamma_i": [[7, 7]]}, r"expected two 1-d arrays"),
        ({"t_i": [], "gamma_i": []}, r"at least 1"),
        ({"t_r": 2, "gamma_r": 10}, r"expected two 1-d arrays"),
        ({"t_i": [0, 2]}, r"t_i has 0\.0; expected numbers greater than 0"),
        ({"t_i": [1, math.inf]}, r"t_i has inf"),
        ({"t_i": ["x", 2]}, r"t_i is .*expected real numbers"),
        ({"gamma_i": [7, math.nan]}, r"gamma_i has nan"),
        ({"gamma_i": [7, -0.5]}, r"gamma_i has -0\.5; expected numbers greater than -0\.5"),
        ({"gamma_r": [-0.7]}, r"gamma_r has -0\.7"),
        ({"t_r": [0.5]}, r"t_r has 0\.5, but the earliest average in t_i has t = 1; .*Request a later time"),
        ({"t_i": [1] * 13, "gamma_i": range(13)}, r"gamma_i has 13 different exponents; expected at most 12"),
        ({"normalize": "sum"}, r"normalize is 'sum'; expected 'constrain', 'edm2' or None"),
    ],
)
def test_bad_input_is_named_with_what_was_expected(bad, message):
    for call in (solve_weights, synthesis_report):
        with pytest.raises(ValueError, match=message):
            call(**(GOOD | bad))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"weights": [1.0, 0.0]}, r"weights has the shape \(2,\); expected \[inputs, outputs\] = \(2, 1\)"),
        ({"weights": [[math.nan], [1]]}, r"weights has nan"),
        ({"weights": [[0.5], [0.5]], "t_r": [1]}, r"weights is not 0 for an average later than the requested time"),
        ({"checkpoint_dtype": "float32"}, r"checkpoint_dtype is 'float32'; expected one of F64, F32, F16, BF16"),
        ({"t_first": 0}, r"t_first is 0"),
        ({"updates": 0}, r"updates is 0; expected one number of at least 1"),
        ({"updates": np.array([1, 2])}, r"updates is .*one per output"),
    ],
)
def test_bad_input_of_the_report_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        synthesis_report(**(GOOD | bad))


def test_dividing_by_a_sum_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"positive sum.*use normalize=\"constrain\""):
        solve_weights([1e-200], [7.0], [1.0], [17.0], normalize="edm2")
