"""Runs that share a folder while both live. Oracle: lineages put together by hand."""

from __future__ import annotations

import shutil

import pytest

from nitrous_ema.snapshots import SnapshotStore
from nitrous_ema.snapshots.other_runs import OtherRuns
from tests.support.small_snapshots import A, B, C, commit

BRANCH = ((A, 20), (B, None))


@pytest.fixture
def store(tmp_path):
    made = SnapshotStore(tmp_path / "snapshots")
    made.prepare()
    return made


def test_what_was_there_before_the_run_began_concerns_it_not(store):
    """The predecessor was killed: nothing is spared for it, however far it went."""
    first = commit(store, 10, A)
    commit(store, 30, B, ((A, 20), (B, None)))
    others = OtherRuns(store)
    others.begin()
    assert others.look(C) is None
    commit(store, 20, C, ((A, 10), (C, None)))
    assert others.look(C) is None  # its own snapshot
    assert not others.need(first)


def test_run_that_branches_off_needs_its_ancestors_up_to_where_it_left_them(store):
    found = {step: commit(store, step, A) for step in (10, 20)}
    others = OtherRuns(store)
    others.begin()
    own = commit(store, 30, A)
    assert others.look(A) is None
    theirs = commit(store, 30, B, BRANCH)
    message = others.look(A)
    for words in (f"run {B} has written a snapshot of step 30", f"this run, {A}", f"newest run, which is {B}", "run="):
        assert words in message
    assert others.look(A) is None  # warned once
    assert [others.need(each) for each in (found[10], found[20], own, theirs)] == [True, True, False, True]


def test_run_that_was_closed_since_needs_its_own(store):
    ancestor = commit(store, 10, A)
    others = OtherRuns(store)
    others.begin()
    store.close_run(A)
    assert others.look(B) is None  # it writes no more, so there is nothing to warn of
    assert others.need(ancestor)


def test_run_without_a_readable_snapshot_is_asked_again(store):
    ancestor = commit(store, 10, A)
    others = OtherRuns(store)
    others.begin()
    folder = commit(store, 30, B, BRANCH).paths[0].parent
    content = shutil.move(folder / "rank-00000-of-00001.safetensors", store.root / "aside")
    assert others.look(A) is not None
    assert not others.need(ancestor)
    shutil.move(content, folder / "rank-00000-of-00001.safetensors")
    others.look(A)
    assert others.need(ancestor)


def test_new_beginning_forgets_the_runs_before(store):
    ancestor = commit(store, 10, A)
    others = OtherRuns(store)
    others.begin()
    commit(store, 30, B, BRANCH)
    others.look(C)
    assert others.need(ancestor)
    others.begin()
    others.look(C)
    assert not others.need(ancestor)
