"""Training with keep=: the snapshots on disk at every moment, and the averages that they give afterwards."""

from __future__ import annotations

import errno
import os
import warnings

import numpy as np
import pytest
import torch

from nitrous_ema import AsyncPostHocEMA, KeepBytes, KeepCount, KeepGeometric, NitrousWarning, PostHocEMA, SnapshotStore
from nitrous_ema.errors import SnapshotNotFound
from nitrous_ema.profile import sigma_rel_to_gamma
from tests.support.fakes import TIMEOUT_SECONDS, QuickFiles, StalledFiles, nothing_left_behind, use_files
from tests.support.keep_losses import PAIR, least_score
from tests.support.models import Vector
from tests.support.weighing_files import WeighingFiles

BOTH = pytest.mark.parametrize("cls", [PostHocEMA, AsyncPostHocEMA])
STEPS = 30


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Makes an EMA of a weight that is the s-th unit vector at step s: the average then is its own profile."""
    use_files(monkeypatch, QuickFiles())
    made = []

    def make(cls, *, folder="snapshots", **options):
        model = Vector(2 * STEPS)
        options = {"update_every": 1, "checkpoint_every_num_steps": 1, **options}
        ema = cls(model, checkpoint_folder=tmp_path / folder, **options)
        made.append(ema)
        return ema

    with nothing_left_behind():
        yield make
        for ema in made:
            ema.close(TIMEOUT_SECONDS)
        made.clear()


def run(ema, last):
    """Train up to a step."""
    for step in range(ema.step + 1, last + 1):
        ema.fence()
        with torch.no_grad():
            ema.model.weight.zero_()
            ema.model.weight[step] = 1
        ema.update()
        yield step


def copied_state(ema):
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in ema.state_dict().items()}


def settled(ema, last):
    """Train up to a step; yield the snapshots on disk after each step."""
    for step in run(ema, last):
        ema.flush(TIMEOUT_SECONDS)
        yield step, on_disk(ema)


def on_disk(ema):
    """Steps of the snapshots, from the names of the files alone."""
    return sorted(int(path.name[5:17]) for path in ema.snapshots.root.glob("step-*"))


def snapshot_size(make):
    ema = make(PostHocEMA, folder="one")
    list(run(ema, 1))
    return ema.snapshots.get().bytes


def assert_cheapest_is_dropped(before, after, now, count, pinned=frozenset()):
    """Check that the dropped snapshots cost least, by solving over all that could have been kept."""
    t = np.array([*before, now], float)
    gone = sorted({*before, now} - {*after})
    assert set(after) <= {*before, now}
    assert len(gone) == (len(t) > count)
    for step in gone:
        fixed = {place for place, time in enumerate(t) if time in pinned or time == now}
        best, scores = least_score(t, PAIR, np.geomspace(0.05, 0.25, 16), t[sorted(fixed)], 2.0, fixed)
        assert scores[int(np.flatnonzero(t == step)[0])] <= scores[best] * 1.01 + 1e-25


@BOTH
def test_a_number_of_snapshots_is_kept(cls, train):
    ema, before = train(cls, keep=8), []
    for step, after in settled(ema, STEPS):
        assert_cheapest_is_dropped(before, after, step, 8)
        before = after
    assert len(after) == 8
    assert ema.stats().dropped == STEPS - 8
    assert_average_is_its_profile(ema)


@BOTH
def test_snapshots_are_kept_at_growing_times(cls, train):
    ema = train(cls, keep=KeepGeometric(1.5))
    grown = [1, 2, 3, 5, 8, 12, 18, 27]  # each at least 1.5 times the one before
    for step, after in settled(ema, STEPS):
        assert after == sorted({*(t for t in grown if t < step), step})


@BOTH
def test_as_many_as_fit_into_a_budget_are_kept(cls, train, monkeypatch, tmp_path):
    size = snapshot_size(train)
    files = WeighingFiles(tmp_path / "snapshots")
    use_files(monkeypatch, files)
    options = {"max_pending": 3, "num_writers": 3} if cls is AsyncPostHocEMA else {}
    ema = train(cls, keep=f"{9.5 * size / 1000}kB", **options)
    list(run(ema, STEPS))  # as fast as it goes
    ema.flush(TIMEOUT_SECONDS)
    assert len(on_disk(ema)) == 8
    assert files.most <= 9.5 * size
    assert ema.stats().bytes_freed == (STEPS - 9) * size
    assert_average_is_its_profile(ema)


def assert_average_is_its_profile(ema):
    """Of 8 kept snapshots, within what the rule promises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NitrousWarning)  # 8 snapshots are few, which causes a warning
        average = ema.synthesize_ema_model(sigma_rel=0.08).state_dict()["ema_model.weight"].double()
    exact = profile(0.08, STEPS)
    assert float((average - exact).norm() / exact.norm()) < 0.05


def profile(sigma_rel, steps):
    """The share of each step in the average, by the definition."""
    edges = (np.arange(steps + 1) / steps) ** (sigma_rel_to_gamma(sigma_rel) + 1)
    shares = torch.zeros(2 * STEPS, dtype=torch.float64)
    shares[1 : steps + 1] = torch.from_numpy(np.diff(edges))
    return shares


@BOTH
def test_resumed_training_goes_on_with_what_was_kept(cls, train):
    first = train(cls, keep=6)
    for step, _ in settled(first, 20):
        if step == 12:
            state = copied_state(first)
    left = {step for step in on_disk(first) if step > 12}
    shared = {*on_disk(first)} - left
    second = train(cls, keep=6)
    second.load_state_dict(state)
    for step, _ in settled(second, 30):
        own = {snapshot.step for snapshot in second.snapshots.snapshots(second.run)}
        assert left <= set(on_disk(second))  # no run may drop snapshots of an abandoned future
        assert step in own
        assert len(own) == min(6, len(shared) + step - 12)
    assert own & shared


@BOTH
def test_state_that_is_loaded_in_mid_run_goes_on_in_its_own_lineage(cls, train):
    ema = train(cls, keep=4)
    for step, _ in settled(ema, 14):
        if step == 6:
            state = copied_state(ema)
    ema.load_state_dict(state)
    for step, _ in settled(ema, 20):
        own = [snapshot.step for snapshot in ema.snapshots.snapshots(ema.run)]
        assert own[-1] == step
        assert len(own) <= 4


@BOTH
def test_pinned_step_stays_and_its_neighbours_weigh_in(cls, train):
    ema, before = train(cls, keep=8), []
    for step, after in settled(ema, STEPS):
        pinned = {10} if step > 10 else set()
        assert_cheapest_is_dropped(before, after, step, 8, pinned)
        before = after
        if step == 10:
            ema.pin()
    assert 10 in after
    assert any(6 <= step < 10 for step in after)
    ema.unpin(10)
    for step, after in settled(ema, STEPS + 5):
        assert_cheapest_is_dropped(before, after, step, 8)
        before = after


def test_snapshot_on_its_way_to_disk_can_be_pinned(train, monkeypatch):
    files = StalledFiles()
    use_files(monkeypatch, files)
    ema = train(AsyncPostHocEMA, keep=2, checkpoint_every_num_steps="manual")
    list(run(ema, 3))
    ema.checkpoint()
    files.gate.wait_entered()
    ema.pin()
    ema.pin(3)
    assert ema.snapshots.pins() == {(3, ema.run)}
    files.gate.open()
    for step in (4, 5, 6):
        list(run(ema, step))
        ema.checkpoint()
    ema.flush(TIMEOUT_SECONDS)
    assert on_disk(ema) == [3, 6]


@BOTH
def test_step_without_a_snapshot_cannot_be_pinned(cls, train):
    ema = train(cls, keep=2, checkpoint_every_num_steps=3)
    with pytest.raises(SnapshotNotFound):
        ema.pin()
    list(run(ema, 7))
    ema.flush(TIMEOUT_SECONDS)
    with pytest.raises(SnapshotNotFound, match="nearest") as caught:
        ema.pin(5)
    assert list(caught.value.nearest) == [3, 6]
    assert ema.snapshots.pins() == frozenset()
    ema.unpin(5)


def test_ancestors_can_be_pinned(train):
    first = train(PostHocEMA, keep=3)
    list(run(first, 4))
    second = train(PostHocEMA, keep=3)
    second.load_state_dict(first.state_dict())
    second.pin()
    assert second.snapshots.pins() == {(4, first.run)}
    list(run(second, 12))
    assert 4 in on_disk(second)
    second.unpin(4)
    assert second.snapshots.pins() == frozenset()


class StubbornFiles(QuickFiles):
    """Files that cannot be removed once ``stubborn`` is True."""

    stubborn = False

    def unlink(self, path):
        if self.stubborn:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        super().unlink(path)


@BOTH
def test_failure_to_remove_is_a_warning_and_training_goes_on(cls, train, monkeypatch):
    files = StubbornFiles()
    use_files(monkeypatch, files)
    ema = train(cls, keep=2)
    for _ in settled(ema, 3):
        pass
    files.stubborn = True
    with pytest.warns(NitrousWarning, match="Read-only file system.*Training goes on"):
        for _ in settled(ema, 4):
            pass
    files.stubborn = False
    for _ in settled(ema, 6):
        pass
    assert len(on_disk(ema)) == 2
    assert len(list(ema.snapshots.root.glob(".trash-*"))) == 1
    assert ema.stats().failed == 0


@BOTH
@pytest.mark.parametrize("keep", ["9kB", KeepBytes(9000)])
def test_budget_without_room_for_three_is_refused_and_leaves_nothing_behind(cls, keep, tmp_path):
    with (
        nothing_left_behind(),
        pytest.raises(ValueError, match=r"holds (0 snapshots|1 snapshot|2 snapshots) of .*checkpoint_dtype"),
    ):
        cls(Vector(1000), keep=keep, checkpoint_folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("keep", [1, "most", 1.5, None])
def test_keep_that_makes_no_sense_is_named(keep, tmp_path):
    with pytest.raises((ValueError, TypeError), match=r"keep|count"):
        PostHocEMA(Vector(3), keep=keep, checkpoint_folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rule_holds_for_readers_of_the_folder(train):
    """A reader of the folder finds the snapshots that the rule keeps, all of them valid."""
    ema = train(PostHocEMA, keep=KeepCount(5, sigma_rels=(0.05, 0.1)))
    list(run(ema, 20))
    store = SnapshotStore(ema.snapshots.root)
    assert len(store.snapshots()) == 5
    assert store.verify() == []
    assert store.incomplete() == []


@BOTH
def test_closing_removes_what_was_dropped_last(train, cls):
    ema = train(cls, keep=4)
    list(run(ema, 10))
    ema.flush(TIMEOUT_SECONDS)
    assert len(ema.snapshots.hidden()) == 1
    ema.close(TIMEOUT_SECONDS)
    assert ema.snapshots.hidden() == []
    assert len(on_disk(ema)) == 4


@BOTH
def test_branch_leaves_what_it_shares_with_a_finished_run_alone(train, cls):
    finished = train(cls)
    list(run(finished, 20))
    finished.close(TIMEOUT_SECONDS)
    branch = train(cls, keep=4)
    branch.restore(10)
    list(run(branch, 25))
    branch.close(TIMEOUT_SECONDS)
    store = SnapshotStore(branch.snapshots.root)
    assert [each.step for each in store.snapshots(finished.run)] == list(range(1, 21))
    assert len([each for each in store.snapshots(branch.run) if each.run == branch.run]) == 4


@BOTH
def test_run_that_continues_a_closed_one_from_its_end_thins_its_lineage_too(train, cls):
    first = train(cls)
    list(run(first, 10))
    first.close(TIMEOUT_SECONDS)
    second = train(cls, keep=4)
    second.restore()
    list(run(second, 15))
    second.close(TIMEOUT_SECONDS)
    assert len(on_disk(second)) == 4


@BOTH
@pytest.mark.parametrize("step", ["2", 2.0, True])
def test_step_that_is_no_integer_is_refused(train, cls, step):
    ema = train(cls)
    list(run(ema, 2))
    for call in (ema.pin, ema.unpin, ema.restore):
        with pytest.raises(TypeError, match="expected the step of a snapshot"):
            call(step)
    with pytest.raises(TypeError, match="expected the step of a pinned snapshot"):
        ema.unpin(None)
    assert ema.snapshots.pins() == frozenset()


@BOTH
@pytest.mark.parametrize("call", ["flush", "close"])
def test_warning_names_the_line_that_called(train, cls, call):
    class Broken(KeepCount):
        def drop(self, t, **_):
            raise KeyError("a mistake in it")

    ema = train(cls, keep=Broken(2))
    list(run(ema, 1))
    ema.flush(TIMEOUT_SECONDS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(run(ema, 2))
        getattr(ema, call)()
    assert all("a mistake in it" in str(warning.message) for warning in caught)
    assert {warning.filename for warning in caught} == {__file__}
