"""Averaging around snapshot copies, on steps, lanes and copies that only note what is asked of them.

That the averages are right on a device that reorders work is shown in ``test_on_laggy.py``.
"""

from __future__ import annotations

import pytest
import torch

from nitrous_ema.averaging.execution.deferred_updates import DeferredUpdates, PlacedStep, StashPool
from nitrous_ema.snapshots.layout import Span
from tests.support.noting import BATCHES, KEPT_BYTES, NotingLane, NotingStep

CPU = torch.device("cpu")


class NotingCopies:
    """Of which batches' ranges the copies are over."""

    def __init__(self, log, over=()):
        self.log = log
        self.over = set(over)

    def wait_on_device(self, begin, end):
        self.log.append(f"wait for copy {begin // 10}")

    def are_over(self, begin, end):
        return begin // 10 in self.over


class Bench:
    """A follower, and everything around it."""

    def __init__(self, over=(), limit_bytes=1000):
        self.log = []
        self.copies = NotingCopies(self.log, over)
        self.lane = NotingLane(self.log)
        self.placed = PlacedStep(NotingStep(self.log), [[Span(*batch)] for batch in NotingStep.batches])
        self.follower = DeferredUpdates(self.lane, lambda: self.copies, StashPool(CPU, limit_bytes))

    def update(self, name):
        self.follower.advance(self.placed, name, (0.5,))

    def taken(self):
        """What was noted since the last call."""
        log = self.log[:]
        self.log.clear()
        return log


def test_without_copies_an_update_is_one_run():
    bench = Bench()
    bench.copies = None
    bench.update("a")
    assert (bench.taken(), bench.follower.is_late) == (["average a0", "average a1", "average a2"], False)


def test_batch_waits_for_the_copy_of_its_range_only():
    bench = Bench(over={0, 2})
    bench.update("a")
    assert bench.taken() == ["average a0", "average a2"]
    bench.copies.over.add(1)
    bench.follower.stash_live()
    assert bench.taken() == ["average a1"]


def test_parameters_are_kept_before_they_are_written():
    bench = Bench(over={0})
    bench.update("a")
    bench.follower.stash_live()
    assert bench.taken() == ["average a0", "keep a1", "keep a2", "kept"]
    bench.copies.over |= {1, 2}
    bench.update("b")
    assert bench.taken() == ["average kept a1", "average kept a2", "average b0", "average b1", "average b2"]


def test_kept_parameters_are_not_kept_twice():
    bench = Bench()
    bench.update("a")
    bench.follower.stash_live()
    bench.taken()
    bench.follower.stash_live()
    assert bench.taken() == []


def test_updates_of_a_batch_keep_their_order():
    bench = Bench()
    for name in "ab":
        bench.update(name)
        bench.follower.stash_live()
    bench.taken()
    bench.copies.over.add(1)
    bench.update("c")
    assert bench.taken() == ["average kept a1", "average kept b1", "average c1"]


def test_later_update_does_not_overtake_even_if_its_copies_end_in_between():
    """The copies of a batch end after the older update was looked at, and before the newer one is."""
    bench = Bench()
    bench.update("a")
    answers = iter([False] * BATCHES + [True] * 2 * BATCHES)
    bench.copies.are_over = lambda begin, end: next(answers)
    bench.update("b")
    assert bench.taken() == []


def test_nothing_on_the_lane_waits_for_a_copy():
    bench = Bench()
    for name in "abc":
        bench.update(name)
        bench.follower.stash_live()
    assert not any("wait" in entry or "average" in entry for entry in bench.taken())
    assert bench.lane.reads == []


def test_optimizer_does_not_wait_for_averaging_from_scratch():
    bench = Bench(over={0})
    bench.update("a")
    bench.follower.stash_live()
    bench.copies.over |= {1, 2}
    bench.follower.stash_live()
    assert bench.lane.reads == [True, False]


def test_who_asks_for_the_averages_makes_the_lane_wait_but_not_the_optimizer():
    bench = Bench(over={0})
    bench.update("a")
    bench.follower.flush()
    assert bench.taken() == [
        "average a0", "keep a1", "keep a2", "kept",
        "wait for copy 1", "average kept a1", "wait for copy 2", "average kept a2",
    ]  # fmt: skip
    assert bench.lane.reads == [True, False]
    assert not bench.follower.is_late


def test_what_comes_after_a_forced_wait_is_kept_too():
    bench = Bench()
    bench.update("a")
    bench.follower.flush()
    bench.taken()
    bench.copies.over |= {0, 1, 2}  # over, but what was forced has not run yet
    bench.update("b")
    bench.follower.stash_live()
    assert bench.taken() == ["keep b0", "keep b1", "keep b2", "kept"]
    for mark in bench.lane.marks:
        mark.reached = True
    bench.update("c")
    assert bench.taken()[:3] == ["average kept b0", "average kept b1", "average kept b2"]


@pytest.mark.parametrize("is_read", [False, True])
def test_scratch_is_not_written_while_it_is_read(is_read):
    bench = Bench()
    bench.update("a")
    bench.follower.stash_live()
    bench.copies.over |= {0, 1, 2}
    bench.update("b")
    for mark in bench.lane.marks:
        mark.reached = is_read
    bench.copies.over.clear()
    bench.update("c")
    bench.follower.stash_live()
    assert bench.follower.scratch.num_bytes == (BATCHES if is_read else 2 * BATCHES) * KEPT_BYTES


def test_trainer_waits_where_scratch_is_used_up():
    bench = Bench(limit_bytes=KEPT_BYTES)
    bench.update("a")
    bench.follower.stash_live()
    assert bench.taken() == [
        "keep a0", "kept",
        "wait for copy 0", "average kept a0", "wait for copy 1", "average a1", "wait for copy 2", "average a2",
    ]  # fmt: skip
    assert bench.lane.reads == [True]  # the optimizer comes after this
    assert bench.follower.num_held_up == 1
    assert bench.follower.scratch.num_bytes == KEPT_BYTES


def test_no_memory_for_scratch_is_no_error(monkeypatch):
    def no_memory(*sizes, **options):
        raise torch.OutOfMemoryError("made up")

    bench = Bench()
    bench.update("a")
    monkeypatch.setattr(torch, "empty", no_memory)
    bench.follower.stash_live()
    assert "keep a0" not in bench.taken()
    assert bench.follower.num_held_up == 1
