from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nitrous_ema.cli.prune_plan import PrunePlan, PruneTarget, lines, plan_pruning
from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.posthoc import synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.snapshots.snapshot import Snapshot
from tests.support.snapshot_folders import layout_of, record, run_id, write_snapshot

LAYOUT = layout_of([record("w", (2,))])
STEPS = (10, 20, 30, 40, 60, 80, 110, 150, 200)


@pytest.fixture
def written(tmp_path):
    def write(steps=STEPS, times=None, layout=LAYOUT, nonfinite=()) -> list[Snapshot]:
        run = run_id()
        return [
            write_snapshot(
                tmp_path,
                layout,
                step,
                [np.full(2, np.nan if step in nonfinite else 0.0)] * len(layout.gammas),
                run=run,
                t=t,
            )
            for step, t in zip(steps, times or steps, strict=True)
        ]

    return write


def worst_error(steps, target: int, sigma_rels=(0.05, 0.25)) -> float:
    """The largest error in the report on a synthesis from these steps, at more lengths than the plan looks at."""
    steps = [step for step in steps if step <= target]
    lengths = np.geomspace(*sigma_rels, 60)
    t_i, gamma_i = np.repeat(np.array(steps, float), 2), np.tile(LAYOUT.gammas, len(steps))
    report = synthesis_report(t_i, gamma_i, np.full(60, float(target)), sigma_rel_to_gamma(lengths))
    return report.profile_error.max()


def subsets(size: int, *fixed: int):
    return [each for each in combinations(STEPS, size) if {STEPS[-1], *fixed} <= set(each)]


@pytest.mark.parametrize("keep", [2, 4, 6, 8])
def test_no_other_set_of_the_size_is_better(written, keep):
    found = plan_pruning(written(), (), PruneTarget(keep=keep, sigma_rels=(0.05, 0.25)))
    best = min(worst_error(each, 200) for each in subsets(keep))
    assert len(found.kept) == keep
    assert worst_error(found.kept, 200) <= best * 1.02
    assert found.described()["lower_bound"]["value"] <= best * (1 + 1e-9)


@pytest.mark.parametrize("error", [0.5, 0.3, 0.2])
def test_no_smaller_set_has_the_error(written, error):
    found = plan_pruning(written(), (), PruneTarget(error=error, sigma_rels=(0.05, 0.2)))
    assert worst_error(found.kept, 200, (0.05, 0.2)) <= error * 1.001
    smaller = subsets(len(found.kept) - 1)
    assert all(worst_error(each, 200, (0.05, 0.2)) > error for each in smaller)
    bound = found.described()["lower_bound"]
    assert bound["of"] == "steps"
    assert bound["value"] <= len(found.kept)


def test_pinned_step_keeps_the_snapshots_that_it_needs_as_a_target(written):
    found = plan_pruning(written(), [80], PruneTarget(keep=5, sigma_rels=(0.05, 0.25)))

    def worst(steps) -> float:
        return max(worst_error(steps, 80), worst_error(steps, 200))

    assert {80, 200} <= found.kept
    assert worst(found.kept) <= 1.02 * min(map(worst, subsets(5, 80)))
    assert [target["step"] for target in found.described()["targets"]] == [80, 200]


def test_errors_are_those_of_a_synthesis(written):
    found = plan_pruning(written(), [110], PruneTarget(keep=5))
    for target in found.described()["targets"]:
        for length in target["lengths"]:
            for when, steps in (("error_before", STEPS), ("error_after", found.kept)):
                one = worst_error(sorted(steps), target["step"], (length["sigma_rel"], length["sigma_rel"]))
                assert length[when] == pytest.approx(one, rel=1e-6, abs=1e-9)


def test_budget_is_a_number_of_the_largest_snapshots(written):
    snapshots = written()
    largest = max(each.bytes for each in snapshots)
    for budget, number in ((4 * largest, 4), (5 * largest - 1, 4), (5 * largest, 5)):
        found = plan_pruning(snapshots, (), PruneTarget(budget_bytes=budget))
        assert len(found.kept) == number
        assert found.described()["bytes_after"] <= budget


def test_fewer_than_the_newest_and_the_pinned_snapshots_are_refused(written):
    snapshots = written()
    least = 3 * max(each.bytes for each in snapshots)
    for target, remedy in (
        (PruneTarget(keep=2), "Pass --keep 3 or more, or unpin snapshots."),
        (PruneTarget(budget_bytes=least - 1), f"Pass --budget {least} or more, or unpin snapshots."),
    ):
        with pytest.raises(ValueError, match=r"the newest snapshot and the 2 pinned snapshots must be kept") as error:
            plan_pruning(snapshots, [20, 40], target)
        assert str(error.value).endswith(remedy)
    assert len(plan_pruning(snapshots, [20, 40], PruneTarget(budget_bytes=least)).kept) == 3


def test_snapshots_of_one_time_are_one_unless_pinned(written):
    """An EMA that is frozen, or is written between two updates, has the same averages at several steps."""
    snapshots = written(times=(10, 20, 30, 40, 40, 40, 110, 150, 200))
    assert plan_pruning(snapshots, (), PruneTarget(keep=9)).kept == {10, 20, 30, 80, 110, 150, 200}
    found = plan_pruning(snapshots, [40, 60], PruneTarget(keep=6))
    assert {40, 60, 200} <= found.kept
    assert 80 not in found.kept
    assert len(found.kept) == 6


def test_different_profiles_are_refused(written):
    snapshots = [*written([10]), *written([20, 30], layout=layout_of([record("w", (2,))], sigma_rels=(0.03, 0.1)))]
    with pytest.raises(SnapshotMismatch, match="--exclude 10"):
        plan_pruning(snapshots, (), PruneTarget(keep=2))


# As text


def text_of(found: PrunePlan) -> str:
    return " ".join(" ".join(lines(found.described(), verbose=True)).split())


def test_text_has_kept_and_dropped_snapshots_and_the_loss(written):
    found = plan_pruning(written(), [30], PruneTarget(keep=4, sigma_rels=(0.05, 0.2)))
    text = text_of(found)
    assert "4 of 9 snapshots kept" in text
    assert "(pinned 30)" in text
    assert "No choice of 4 snapshots has a largest error below" in text
    assert "largest error in the wanted range at step 30, which is pinned" in text
    assert "largest error from 0.015 to 0.045, where guided EDM2 models were best" in text
    for length in found.described()["targets"][-1]["lengths"]:
        if not length["wanted"]:
            assert f" {length['sigma_rel']:.3g} " in text


def test_text_for_an_error_has_the_least_number(written):
    found = plan_pruning(written(), (), PruneTarget(error=0.2, sigma_rels=(0.05, 0.2)))
    least = round(found.described()["lower_bound"]["value"])
    expected = (
        f"Errors in the wanted range of up to 20.0 % need at least {least} snapshots; this choice has {len(found.kept)}"
    )
    assert expected in text_of(found)


def test_error_that_not_all_steps_reach_is_reported(written):
    found = plan_pruning(written(), (), PruneTarget(error=1e-9, sigma_rels=(0.06, 0.2)))
    assert "Errors in the wanted range as close to the limit as all snapshots allow need at least" in text_of(found)
    assert "even with all snapshots" in text_of(found)


def test_snapshots_of_other_tensors_are_left_alone(written):
    """Training went on with a longer vocabulary: averages at the newest step cannot be made from them."""
    before, after = written(STEPS[:4]), written(STEPS[4:], layout=layout_of([record("w", (2,)), record("x", (0,))]))
    target = PruneTarget(keep=3, sigma_rels=(0.05, 0.25))
    found, alone = (plan_pruning(each, {20, 80}, target) for each in ([*before, *after], after))
    assert found.kept == alone.kept
    assert [each.step for each in found.dropped] == [each.step for each in alone.dropped]
    described, expected = found.described(), alone.described()
    assert described.pop("warnings") == [
        *expected.pop("warnings"),
        "Left out 4 snapshots with other tensors than step 200. In the last one, of step 40, 'x' is not averaged.",
    ]
    assert described == expected


# Snapshots with values that are not finite


@pytest.mark.parametrize("keep", [2, 4, 6])
def test_best_set_is_chosen_among_the_finite_snapshots(written, keep):
    bad = {20, 60, 150}
    found = plan_pruning(written(nonfinite=bad), (), PruneTarget(keep=keep, sigma_rels=(0.05, 0.25)))
    best = min(worst_error(each, 200) for each in subsets(keep) if not bad & set(each))
    assert not bad & found.kept
    assert worst_error(found.kept, 200) <= best * 1.02
    described = found.described()
    assert described["nonfinite"] == sorted(bad)
    assert "note: 3 snapshots with values that are not finite: dropped before any finite one." in lines(
        described, verbose=False
    )


def test_best_of_the_others_fill_a_number_that_the_finite_ones_do_not_reach(written):
    bad = {20, 40, 60, 80, 150}
    found = plan_pruning(written(nonfinite=bad), (), PruneTarget(keep=6, sigma_rels=(0.05, 0.25)))
    finite = set(STEPS) - bad
    assert finite <= found.kept
    assert len(found.kept) == 6
    assert worst_error(found.kept, 200) <= 1.02 * min(worst_error(each, 200) for each in subsets(6, *finite))


@pytest.mark.parametrize(("error", "kept_bad"), [(0.6, False), (0.2, True)])
def test_others_are_kept_for_an_error_that_the_finite_ones_miss(written, error, kept_bad):
    bad = {60, 80, 110, 150}
    found = plan_pruning(written(nonfinite=bad), (), PruneTarget(error=error, sigma_rels=(0.05, 0.2)))
    assert bool(bad & found.kept) == kept_bad
    assert worst_error(found.kept, 200, (0.05, 0.2)) <= error * 1.001
    assert not kept_bad or set(STEPS) - bad <= found.kept


def test_snapshots_are_chosen_as_usual_where_none_is_finite(written):
    found = plan_pruning(written(nonfinite=STEPS), (), PruneTarget(keep=4))
    usual = plan_pruning(written([step + 1000 for step in STEPS], STEPS)[:], (), PruneTarget(keep=4))
    assert found.kept == {step - 1000 for step in usual.kept}


def test_finite_snapshot_of_a_time_is_its_candidate(written):
    snapshots = written([10, 20, 21, 30], [10, 20, 20, 30], nonfinite=[21])
    assert plan_pruning(snapshots, (), PruneTarget(keep=3)).kept == {10, 20, 30}
    assert plan_pruning(snapshots, [21], PruneTarget(keep=3)).kept == {10, 21, 30}


def test_newest_and_pinned_snapshots_stay_though_they_are_not_finite(written):
    found = plan_pruning(written(nonfinite=[40, 200]), [40], PruneTarget(keep=4))
    assert {40, 200} <= found.kept
