"""The run that an EMA belongs to, and its lineage."""

from __future__ import annotations

import os

from nitrous_ema.averaging.lineage import RunLineage
from nitrous_ema.averaging.schedule import Schedule


def test_new_lineage_has_no_ancestors_and_a_name_of_its_own():
    first, second = RunLineage(), RunLineage()
    assert first.run != second.run
    assert first.lineage == ((first.run, None),)


def test_run_goes_on_from_the_step_of_the_state_it_loads():
    old, new = RunLineage(), RunLineage()
    new.continue_from(old.state(), 100)
    assert new.lineage == ((old.run, 100), (new.run, None))


def test_ancestors_count_up_to_the_step_that_was_loaded():
    first, second, third = RunLineage(), RunLineage(), RunLineage()
    second.continue_from(first.state(), 100)
    third.continue_from(second.state(), 70)  # a state that the second run saved before it reached step 100
    assert third.lineage == ((first.run, 70), (second.run, 70), (third.run, None))


def test_state_of_step_zero_makes_no_ancestor():
    old, new = RunLineage(), RunLineage()
    new.continue_from(old.state(), 0)
    assert new.lineage == ((new.run, None),)


def test_loading_ones_own_state_before_anything_was_written_changes_nothing():
    lineage = RunLineage()
    lineage.continue_from(lineage.state(), 50)
    assert lineage.lineage == ((lineage.run, None),)


def test_going_back_after_a_snapshot_was_written_begins_a_new_run():
    lineage = RunLineage()
    before, state = lineage.run, lineage.state()
    lineage.written.add(100)
    lineage.continue_from(state, 60)
    assert lineage.run != before
    assert lineage.lineage == ((before, 60), (lineage.run, None))
    assert lineage.written == set()


def test_state_without_a_lineage_has_no_ancestors():
    lineage = RunLineage()
    lineage.continue_from((), 100)
    assert lineage.lineage == ((lineage.run, None),)


def test_run_that_continues_a_newer_one_takes_a_name_that_sorts_after_it():
    """Readers select the newest run, so the run that continues must be the newest."""
    older, newer = RunLineage(), RunLineage()
    older.run, newer.run = "20260101T000000.000000-ffffffff", "29990101T000000.999999-ffffffff"  # a clock that is ahead
    older.continue_from(newer.state(), 60)
    assert older.run > newer.run
    assert older.run.startswith("29990101T000001.000000-")
    assert older.lineage == ((newer.run, 60), (older.run, None))


def test_run_that_begins_takes_a_name_after_those_in_the_folder_until_it_has_written():
    lineage = RunLineage()
    before, ahead = lineage.run, "29990101T000000.999999-ffffffff"
    lineage.begin_after("20200101T000000.000000-ffffffff")
    lineage.begin_after("")
    assert lineage.run == before
    lineage.begin_after(ahead)
    assert lineage.run.startswith("29990101T000001.000000-")
    now = lineage.run
    lineage.written.add(10)
    lineage.begin_after("29990202T000000.000000-ffffffff")
    assert lineage.run == now


def test_lineage_with_names_of_other_libraries_is_retained():
    lineage = RunLineage()
    lineage.continue_from([["another-run", None]], 60)
    assert lineage.ancestors == (("another-run", 60),)


def test_lineage_is_fresh_until_a_state_is_loaded():
    lineage = RunLineage()
    assert lineage.is_fresh
    lineage.continue_from((), 0)
    assert not lineage.is_fresh


def test_stamp_names_step_times_run_and_process():
    lineage, schedule = RunLineage(), Schedule([7.0], 2, "exact")
    for _ in range(4):
        schedule.advance(8)
    stamp = lineage.stamp(schedule)
    assert (stamp.step, stamp.t, stamp.t_first, stamp.run) == (4, 24, 8, lineage.run)
    assert stamp.lineage == lineage.lineage
    assert stamp.trainer["pid"] == os.getpid()
    assert stamp.trainer["started"] > 0
