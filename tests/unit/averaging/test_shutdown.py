"""The end of an EMA when something fails. What it drains and writes then is in tests/unit/async_/test_ema.py."""

from __future__ import annotations

import shutil

import pytest
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousWarning


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_end_that_cannot_be_noted_is_a_warning(tmp_path, on_error):
    """Everything is on disk, so that a job should not fail for it."""
    ema = AsyncPostHocEMA(nn.Linear(3, 2), checkpoint_folder=tmp_path / "snapshots", on_error=on_error)
    ema.update()
    ema.checkpoint()
    ema.flush(timeout=60)
    shutil.rmtree(tmp_path / "snapshots")
    with pytest.warns(NitrousWarning, match="has ended"):
        ema.close(timeout=60)
    ema.close()


def test_interrupt_inside_a_lane_leaves_no_lock_behind(tmp_path):
    """Ctrl-C may come at any bytecode: a lock that is entered in Python code could be left held for ever."""
    ema = AsyncPostHocEMA(nn.Linear(3, 2), checkpoint_folder=tmp_path)
    ema.update()
    (lane,) = ema._engine._dispatch.lanes()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lane._lock:
        interrupt()
    assert type(lane._lock).__module__ == "_thread"  # entered and left in C
    assert type(ema._engine._sink._pool._lock).__module__ == "_thread"
    ema.close(timeout=60)
