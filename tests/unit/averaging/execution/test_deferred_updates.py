"""Averaging around readbacks, on steps, lanes and readbacks that only log their calls.

``tests/ordering/test_on_laggy.py`` tests that the averages are right on a device that reorders work.
"""

from __future__ import annotations

import pytest
import torch

from nitrous_ema.averaging.execution.deferred_updates import DeferredUpdates, PlacedStep, StashPool
from nitrous_ema.snapshots.layout import Span
from tests.support.noting import BATCHES, STASH_BYTES, NotingLane, NotingStep

CPU = torch.device("cpu")


class NotingReadbacks:
    """Readbacks that log waits, and have finished for the batches in ``finished``."""

    def __init__(self, log, finished=()):
        self.log = log
        self.finished = set(finished)

    def wait_on_device(self, begin, end):
        self.log.append(f"wait for readback {begin // 10}")

    @property
    def num_finished(self):
        return len(self.finished)

    def have_finished(self, begin, end):
        return begin // 10 in self.finished


class Rig:
    """Deferred updates, and everything that they use."""

    def __init__(self, finished=(), limit_bytes=1000):
        self.log = []
        self.readbacks = NotingReadbacks(self.log, finished)
        self.lane = NotingLane(self.log)
        self.placed = PlacedStep(NotingStep(self.log), [[Span(*batch)] for batch in NotingStep.batches])
        self.deferred = DeferredUpdates(self.lane, lambda: self.readbacks, StashPool(self.lane, CPU, limit_bytes))

    def update(self, name):
        self.deferred.enqueue_update(self.placed, name, (0.5,))

    def taken(self):
        """Return the log since the last call."""
        log = self.log[:]
        self.log.clear()
        return log


def test_without_readbacks_an_update_is_one_run():
    rig = Rig()
    rig.readbacks = None
    rig.update("a")
    assert (rig.taken(), rig.deferred.has_deferred) == (["average a0", "average a1", "average a2"], False)


def test_batch_waits_for_the_copy_of_its_range_only():
    rig = Rig(finished={0, 2})
    rig.update("a")
    assert rig.taken() == ["average a0", "average a2"]
    rig.readbacks.finished.add(1)
    rig.deferred.stash_live()
    assert rig.taken() == ["average a1"]


def test_parameters_are_stashed_before_they_are_written():
    rig = Rig(finished={0})
    rig.update("a")
    rig.deferred.stash_live()
    assert rig.taken() == ["average a0", "stash a1", "stash a2", "stashed"]
    rig.readbacks.finished |= {1, 2}
    rig.update("b")
    assert rig.taken() == ["average stashed a1", "average stashed a2", "average b0", "average b1", "average b2"]


def test_stashed_parameters_are_not_stashed_twice():
    rig = Rig()
    rig.update("a")
    rig.deferred.stash_live()
    rig.taken()
    rig.deferred.stash_live()
    assert rig.taken() == []


def test_updates_of_a_batch_keep_their_order():
    rig = Rig()
    for name in "ab":
        rig.update(name)
        rig.deferred.stash_live()
    rig.taken()
    rig.readbacks.finished.add(1)
    rig.update("c")
    assert rig.taken() == ["average stashed a1", "average stashed b1", "average c1"]


def test_later_update_does_not_overtake_even_if_its_copies_end_in_between():
    """The readbacks of a batch finish after the poll for the older update, and before the poll for the newer."""
    rig = Rig()
    rig.update("a")
    answers = iter([False] * BATCHES + [True] * 2 * BATCHES)
    rig.readbacks.have_finished = lambda begin, end: next(answers)
    rig.update("b")
    assert rig.taken() == []


def test_nothing_on_the_lane_waits_for_a_copy():
    rig = Rig()
    for name in "abc":
        rig.update(name)
        rig.deferred.stash_live()
    assert not any("wait" in entry or "average" in entry for entry in rig.taken())
    assert rig.lane.reads == []


def test_optimizer_does_not_wait_for_averaging_from_the_stash():
    rig = Rig(finished={0})
    rig.update("a")
    rig.deferred.stash_live()
    rig.readbacks.finished |= {1, 2}
    rig.deferred.stash_live()
    assert rig.lane.reads == [True, False]


def test_reader_of_the_averages_makes_the_lane_wait_but_not_the_optimizer():
    rig = Rig(finished={0})
    rig.update("a")
    rig.deferred.flush()
    assert rig.taken() == [
        "average a0", "stash a1", "stash a2", "stashed",
        "wait for readback 1", "average stashed a1", "wait for readback 2", "average stashed a2",
    ]  # fmt: skip
    assert rig.lane.reads == [True, False]
    assert not rig.deferred.has_deferred


def test_updates_after_a_forced_wait_are_stashed_too():
    rig = Rig()
    rig.update("a")
    rig.deferred.flush()
    rig.taken()
    rig.readbacks.finished |= {0, 1, 2}  # finished, but the forced work has not run yet
    rig.update("b")
    rig.deferred.stash_live()
    assert rig.taken() == ["stash b0", "stash b1", "stash b2", "stashed"]
    for mark in rig.lane.marks:
        mark.reached = True
    rig.update("c")
    assert rig.taken()[:3] == ["average stashed b0", "average stashed b1", "average stashed b2"]


@pytest.mark.parametrize("is_read", [False, True])
def test_stash_is_not_written_while_it_is_read(is_read):
    rig = Rig()
    rig.update("a")
    rig.deferred.stash_live()
    rig.readbacks.finished |= {0, 1, 2}
    rig.update("b")
    for mark in rig.lane.marks:
        mark.reached = is_read
    rig.readbacks.finished.clear()
    rig.update("c")
    rig.deferred.stash_live()
    assert rig.deferred.stash_pool.num_bytes == (BATCHES if is_read else 2 * BATCHES) * STASH_BYTES


def test_trainer_waits_where_the_stash_is_used_up():
    rig = Rig(limit_bytes=STASH_BYTES)
    rig.update("a")
    rig.deferred.stash_live()
    assert rig.taken() == [
        "stash a0", "stashed",
        "wait for readback 0", "average stashed a0", "wait for readback 1", "average a1",
        "wait for readback 2", "average a2",
    ]  # fmt: skip
    assert rig.lane.reads == [True]  # the optimizer comes after this
    assert rig.deferred.num_held_up == 1
    assert rig.deferred.stash_pool.num_bytes == STASH_BYTES


def test_last_block_is_used_again_behind_a_wait():
    rig = Rig(limit_bytes=BATCHES * STASH_BYTES)
    rig.update("a")
    rig.deferred.stash_live()
    rig.readbacks.finished |= {0, 1, 2}
    rig.update("b")  # averages a from the stash, as far as the host knows not yet
    rig.readbacks.finished.clear()
    rig.update("c")
    rig.deferred.stash_live()
    assert [mark.waits for mark in rig.lane.marks] == [1, 1, 1]
    assert rig.deferred.num_held_up == 0


def test_refused_memory_is_asked_for_once():
    asked = []

    def no_memory(num_bytes, device):
        asked.append(num_bytes)
        raise torch.OutOfMemoryError("simulated")

    rig = Rig()
    rig.lane.allocate = no_memory
    for late in range(1, 4):
        rig.update("a")
        rig.deferred.stash_live()
        assert "stash a0" not in rig.taken()
        assert rig.deferred.num_held_up == late  # not an error
        for mark in rig.lane.marks:
            mark.reached = True
    assert asked == [STASH_BYTES]


def test_hook_with_nothing_to_do_costs_one_query():
    rig = Rig(finished={0})
    rig.update("a")
    rig.deferred.stash_live()
    rig.readbacks.have_finished = None  # would be called for a batch
    rig.deferred.stash_live()
    del rig.readbacks.have_finished
    rig.taken()
    rig.readbacks.finished |= {1}
    rig.deferred.stash_live()
    assert rig.taken() == ["average stashed a1"]


def interrupt_after(rig, name):
    """Make a call of the lane raise KeyboardInterrupt when its work is queued, once."""
    call = getattr(rig.lane, name)

    def interrupted(*arguments, **options):
        setattr(rig.lane, name, call)
        call(*arguments, **options)
        raise KeyboardInterrupt

    setattr(rig.lane, name, interrupted)


@pytest.mark.parametrize("step", ["stash_live", "flush"])
@pytest.mark.parametrize("call", ["enqueue_write", "stash"])
def test_interrupt_averages_nothing_twice(call, step):
    rig = Rig(finished={0})
    rig.update("a")
    rig.readbacks.finished.add(1)
    interrupt_after(rig, call)
    with pytest.raises(KeyboardInterrupt):
        getattr(rig.deferred, step)()
    assert not rig.deferred.take_interrupted()
    rig.deferred.flush()
    log = [entry for entry in rig.taken() if entry.startswith(("average", "stash a"))]
    assert log == ["average a0", "average a1", "stash a2", "average stashed a2"]


def test_interrupt_inside_the_averaging_is_known():
    rig = Rig()
    rig.update("a")
    rig.readbacks.finished |= {0, 1, 2}

    def run(*arguments):
        raise KeyboardInterrupt

    rig.placed.step.run = run
    with pytest.raises(KeyboardInterrupt):
        rig.deferred.stash_live()
    assert rig.deferred.take_interrupted()
    assert not rig.deferred.take_interrupted()


# Updates that are skipped


class Averages:
    """A step of one batch per element, which adds its sources where the flag allows it."""

    batches = tuple((index, index + 1) for index in range(3))

    def __init__(self):
        self.values = torch.zeros(3)

    def run(self, sources, weights, batches=None, allowed=None):
        for batch in range(3) if batches is None else batches:
            self.run_stashed((batch, sources[batch]), weights, allowed)

    def stash_bytes(self, batch):
        return STASH_BYTES

    def stash(self, sources, batch, memory):
        return batch, sources[batch].clone()

    def run_stashed(self, stashed, weights, allowed=None):
        batch, value = stashed
        self.values[batch] += torch.where(allowed, value, torch.zeros(()))


class SkippingRig(Rig):
    def __init__(self, finished=(), limit_bytes=1000):
        super().__init__(finished, limit_bytes)
        self.step, self.num_skipped = Averages(), torch.zeros((), dtype=torch.int64)
        self.placed = PlacedStep(self.step, [[Span(10 * batch, 10 * batch + 10)] for batch in range(3)])

    def update(self, *values):
        sources = torch.tensor(values)
        flag = self.deferred.enqueue_check([sources], self.num_skipped)
        self.deferred.enqueue_update(self.placed, sources, (0.5,), flag)
        return sources


def test_update_is_skipped_as_a_whole():
    rig = SkippingRig()
    rig.readbacks = None
    for values in ((1.0, 2.0, 3.0), (1.0, 1.0, torch.nan), (torch.inf, 1.0, 1.0), (10.0, 20.0, 30.0)):
        rig.update(*values)
    assert rig.step.values.tolist() == [11, 22, 33]
    assert rig.num_skipped == 2


@pytest.mark.parametrize("stashed", [False, True])
def test_late_batches_follow_the_flag_of_their_update(stashed):
    rig = SkippingRig(finished={0})
    rig.update(1.0, 2.0, 3.0)
    bad = rig.update(1.0, torch.nan, 1.0)
    if stashed:
        rig.deferred.stash_live()
        bad.fill_(5.0)  # the trainer has written them, so their late batches are finite
    rig.update(10.0, 20.0, 30.0)
    assert rig.step.values.tolist() == [11, 0, 0]
    rig.readbacks.finished |= {1, 2}
    rig.deferred.flush()
    assert rig.step.values.tolist() == [11, 22, 33]
    assert rig.num_skipped == 1


def test_flag_does_not_wait_for_a_copy():
    """Behind a forced wait the caller computes the flag; the lane only takes it over, and reads no parameters."""
    rig = SkippingRig()
    rig.update(1.0, 2.0, 3.0)
    rig.deferred.flush()
    rig.taken(), rig.lane.reads.clear()
    for values in ((1.0, torch.nan, 1.0), (10.0, 20.0, 30.0)):
        rig.update(*values)
        assert rig.taken() == ["stashed"]
        rig.deferred.stash_live()
        rig.taken()
    assert rig.lane.reads == [False, False]
    for mark in rig.lane.marks:
        mark.reached = True
    rig.readbacks.finished |= {0, 1, 2}
    rig.deferred.flush()
    assert rig.step.values.tolist() == [11, 22, 33]
    assert rig.num_skipped == 1
