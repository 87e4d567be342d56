from __future__ import annotations

import pytest

from nitrous_ema._base.options import unknown_exclusions
from nitrous_ema.errors import SnapshotNotFound
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.plan import plan_from_store
from nitrous_ema.synthesis.worker.inputs import RequestedAverages, StoredSnapshots
from tests.support.snapshot_folders import layout_of, record, run_id, write_run

LAYOUT = layout_of([record("w", (20,))])


def opened(root, run=None, exclude=()):
    return StoredSnapshots(root, RequestedAverages(sigma_rels=[0.07], gammas=None, exclude=exclude, tolerance=0), run)


@pytest.mark.parametrize(("steps", "found"), [(None, [300]), ("all", [100, 200, 300]), ([300, 100], [300, 100])])
def test_targets_are_the_newest_all_or_those_listed(tmp_path, steps, found):
    write_run(tmp_path, LAYOUT, [100, 200, 300])
    assert [each.step for each in opened(tmp_path).targets(steps)] == found


@pytest.mark.parametrize("steps", [None, "all", [100]])
def test_folder_without_snapshots_has_no_targets(tmp_path, steps):
    with pytest.raises(SnapshotNotFound):
        opened(tmp_path).targets(steps)


def test_missing_step_is_reported_with_the_nearest_steps(tmp_path):
    write_run(tmp_path, LAYOUT, [100, 200, 300])
    with pytest.raises(SnapshotNotFound, match="100 and 200"):
        opened(tmp_path).targets([300, 150])
    with pytest.raises(ValueError, match="is excluded"):
        opened(tmp_path, exclude=[200]).targets([200])


def test_snapshot_committed_after_the_listing_is_found(tmp_path, monkeypatch):
    write_run(tmp_path, LAYOUT, [100])
    listed = SnapshotStore.snapshots

    def late(self, *arguments, **options):
        found = listed(self, *arguments, **options)
        if len(found) == 1:
            write_run(tmp_path, LAYOUT, [200], run=found[0].run)
        return found

    monkeypatch.setattr(SnapshotStore, "snapshots", late)
    folder = opened(tmp_path)
    assert [each.step for each in folder.targets([200])] == [200]
    assert [each.step for each in folder.listed] == [100, 200]


def test_plan_of_a_target_is_that_of_its_step(tmp_path):
    write_run(tmp_path, LAYOUT, range(100, 600, 100))
    folder = opened(tmp_path, exclude=[200])
    (target,) = folder.targets([400])
    expected = plan_from_store(tmp_path, sigma_rels=[0.07], step=400, exclude=[200], tolerance=0)
    plan = folder.plan(target)
    assert plan.steps == expected.steps == (100, 300, 400)
    assert plan.weights.tolist() == expected.weights.tolist()


def test_closed_and_unrelated_refer_to_the_newest_run(tmp_path):
    old = write_run(tmp_path, LAYOUT, [100], run=run_id(1))
    new = write_run(tmp_path, LAYOUT, [50], run=run_id(2))
    SnapshotStore(tmp_path).close_run(old)
    newest, other = opened(tmp_path), opened(tmp_path, run=old)
    newest.refresh()
    other.refresh()
    assert (newest.is_closed, newest.unrelated_runs()) == (False, [old])
    assert (other.is_closed, other.unrelated_runs()) == (True, [new])


def test_excluded_steps_without_a_snapshot_are_reported(tmp_path):
    write_run(tmp_path, LAYOUT, [100, 200, 300])
    told = unknown_exclusions([200, 7, 5], opened(tmp_path, exclude=[200, 7, 5]).steps())
    assert told == "--exclude: there is no snapshot of step 5, 7"
    assert unknown_exclusions([200], opened(tmp_path, exclude=[200]).steps()) == ""
