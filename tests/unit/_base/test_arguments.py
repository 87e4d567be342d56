from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from nitrous_ema._base.arguments import check_sequence, clamp_timeout


def test_endless_time_is_one_that_threads_can_wait_for():
    threading.Lock().acquire(timeout=clamp_timeout(math.inf))
    assert (clamp_timeout(None), clamp_timeout(3.5)) == (None, 3.5)


@pytest.mark.parametrize("given", [5, 0.1, "0.1,0.2", b"5", None])
def test_what_is_no_sequence_is_told_with_what_belongs_there(given):
    with pytest.raises(TypeError, match=r"lengths is .*; expected a sequence of steps, such as \[1\]\."):
        check_sequence("lengths", given, "steps, such as [1]")


@pytest.mark.parametrize("given", [[], (1,), range(2), np.zeros(3), {0.1}])
def test_whatever_holds_several_is_taken(given):
    check_sequence("lengths", given)
