"""Which snapshots a plan reads: the fewest within the tolerance; and the numbers that the plan reports."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

from nitrous_ema.posthoc import select_steps, solve_weights, synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.synthesis import DEFAULT_TOLERANCE, plan_from_store, synthesize
from tests.support.snapshot_folders import layout_of, record, run_id, snapshot_file, write_run

LENGTHS = (0.06, 0.08, 0.15)
STEPS = range(1, 61)
PAIR, TRIPLE = (0.05, 0.1), (0.03, 0.1, 0.25)


def layout(sigma_rels=PAIR, shape=(7,), **more):
    return layout_of([record("w", shape)], sigma_rels, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("snapshots")
    write_run(root, layout(), STEPS)
    return root


def columns_at(steps, sigma_rels=PAIR):
    gammas = sigma_rel_to_gamma(sigma_rels)
    return np.repeat(np.asarray(steps, float), gammas.size), np.tile(gammas, len(steps))


def outputs_at(step, lengths=LENGTHS):
    return np.full(len(lengths), float(step)), sigma_rel_to_gamma(lengths)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
def test_fewest_steps_are_read_and_solved_on(folder, tolerance):
    plan = plan_from_store(folder, sigma_rels=LENGTHS, tolerance=tolerance)
    gammas, requested = sigma_rel_to_gamma(PAIR), sigma_rel_to_gamma(LENGTHS)
    chosen = select_steps(list(STEPS), gammas, STEPS[-1], requested, tolerance=tolerance)
    assert plan.steps == tuple(np.array(STEPS)[chosen.places])
    assert (plan.lower_bound, plan.candidates, plan.tolerance) == (chosen.lower_bound, 60, tolerance)
    assert len(plan.columns) == 2 * len(plan.steps) < 2 * len(STEPS)
    assert plan.bytes_to_read == len(plan.columns) * 7 * 4
    exact = solve_weights(*columns_at(plan.steps), *outputs_at(60))
    np.testing.assert_array_equal(plan.weights, exact)  # nothing is amplified here, so no error is spent
    np.testing.assert_array_equal(plan.least_error_l2, np.linalg.norm(exact, axis=0))


def test_error_stays_within_the_tolerance_of_that_of_all(folder):
    plan = plan_from_store(folder, sigma_rels=LENGTHS)
    of_all = synthesis_report(*columns_at(STEPS), *outputs_at(60)).profile_error
    np.testing.assert_allclose(plan.profile_error_of_all, of_all)
    assert (plan.report.profile_error <= np.hypot(of_all, DEFAULT_TOLERANCE) * (1 + 1e-9)).all()
    assert plan.tolerance == DEFAULT_TOLERANCE


def test_tolerance_of_zero_reads_all(folder):
    plan = plan_from_store(folder, sigma_rels=LENGTHS, tolerance=0)
    assert plan.steps == tuple(STEPS)
    assert plan.lower_bound == plan.candidates == 60
    np.testing.assert_array_equal(plan.weights, solve_weights(*columns_at(STEPS), *outputs_at(60)))
    np.testing.assert_allclose(plan.report.profile_error, plan.profile_error_of_all, rtol=1e-6)


def test_averages_are_those_of_the_steps_read(folder):
    result = synthesize(folder, sigma_rels=LENGTHS, tolerance=1e-2, dtype=np.float64)
    files = [safetensors.numpy.load_file(snapshot_file(folder, step)) for step in result.plan.steps]
    columns = np.array([file[f"ema{profile}.w"] for file in files for profile in range(2)], np.float64)
    np.testing.assert_allclose(result.flats, result.plan.weights.T @ columns, rtol=1e-12)


def test_remaining_tolerance_is_spent_on_less_amplification(tmp_path):
    write_run(tmp_path, layout(TRIPLE, checkpoint_dtype="F16"), range(1, 201))
    plan = plan_from_store(tmp_path, sigma_rels=(0.015, 0.04))
    assert plan.report.weight_l2[1] < 0.3 * plan.least_error_l2[1]
    assert (plan.report.profile_error <= np.hypot(plan.profile_error_of_all, 1e-3) * (1 + 1e-6)).all()
    unit = plan.report.rounding / plan.report.weight_l2
    np.testing.assert_allclose(unit, 2.1e-4, rtol=0.03)


def test_snapshots_of_other_tensors_are_left_out_with_a_note(tmp_path):
    """Training went on with a longer vocabulary: the later averages contain the earlier weights all the same."""
    run = run_id()
    write_run(tmp_path, layout(shape=(3,)), [1, 2], run=run)
    write_run(tmp_path, layout(), range(3, 61), run=run)
    plan = plan_from_store(tmp_path, sigma_rels=LENGTHS, tolerance=0)
    assert plan.steps == tuple(range(3, 61))
    assert plan.left_out == (1, 2)
    (note,) = [each for each in plan.report.warnings if "other tensors" in each]
    assert note == (
        "Left out 2 snapshots with other tensors than step 60. In the last one, of step 2, 'w' is (3,) instead of (7,)."
    )
    early = plan_from_store(tmp_path, sigma_rels=LENGTHS, step=2, tolerance=0)
    assert early.steps == (1, 2)
    assert not any("other tensors" in each for each in early.report.warnings)


def test_run_that_went_on_with_other_profiles_is_read_sparsely(tmp_path):
    run = run_id()
    write_run(tmp_path, layout(PAIR), range(1, 101), run=run)
    write_run(tmp_path, layout(TRIPLE), range(101, 201), run=run)
    plan, whole = (plan_from_store(tmp_path, sigma_rels=LENGTHS, tolerance=tolerance) for tolerance in (1e-2, 0))
    assert len(plan.steps) < 30
    assert (plan.lower_bound, plan.candidates) == (1, 200)
    np.testing.assert_allclose(plan.profile_error_of_all, whole.report.profile_error, rtol=1e-6, atol=1e-12)
    assert (plan.report.profile_error <= np.hypot(whole.report.profile_error, 1e-2) * (1 + 1e-6)).all()
    assert len(plan.columns) == sum(2 if step <= 100 else 3 for step in plan.steps)


def test_negative_tolerance_is_named(folder):
    with pytest.raises(ValueError, match="tolerance is -1"):
        plan_from_store(folder, sigma_rels=LENGTHS, tolerance=-1)
