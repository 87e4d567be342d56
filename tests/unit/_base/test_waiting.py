"""Waits whose process is stopped for a while: a clock that jumps stands for the stop."""

from __future__ import annotations

import threading

import pytest

from nitrous_ema._base.waiting import wait_for

TIMEOUT_SECONDS = 60


class Stopped(threading.Condition):
    """Each wait takes the seconds of ``waits``; its clock shows them."""

    def __init__(self, *waits):
        super().__init__()
        self.waits, self.now, self.asked = list(waits), 0.0, []

    def wait(self, timeout=None):
        self.asked.append(timeout)
        self.now += self.waits.pop(0)
        return False

    def clock(self):
        return self.now


@pytest.fixture
def waiting():
    def wait(condition, predicate, timeout_seconds):
        with condition:
            return wait_for(condition, predicate, timeout_seconds, clock=condition.clock)

    return wait


def test_a_stopped_process_does_not_use_up_its_timeout(waiting):
    condition = Stopped(900.0, 0.5, 1.0)
    assert waiting(condition, lambda: not condition.waits, 10)
    assert condition.now == 901.5


def test_timeout_counts_the_time_that_passes(waiting):
    condition = Stopped(1.0, 0.25, 1.0, 0.25, 9)
    assert not waiting(condition, lambda: False, 2.5)
    assert condition.asked == [1.0, 1.0, 1.0, 0.25]


def test_no_time_is_no_wait(waiting):
    condition = Stopped()
    assert not waiting(condition, lambda: False, 0)
    assert waiting(condition, lambda: True, 0)


def test_notified_wait_ends_at_once():
    condition, done = threading.Condition(), []

    def notify():
        with condition:
            done.append(True)
            condition.notify_all()

    for timeout_seconds in (None, TIMEOUT_SECONDS):
        done.clear()
        thread = threading.Thread(target=notify)
        with condition:
            thread.start()
            assert wait_for(condition, lambda: bool(done), timeout_seconds)
        thread.join(TIMEOUT_SECONDS)
