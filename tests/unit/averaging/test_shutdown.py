"""The end of an EMA when something fails. What it drains and writes then is in tests/unit/async_/test_ema.py."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, NitrousWarning
from nitrous_ema.averaging import shutdown
from tests.support.fakes import TIMEOUT_SECONDS, Gate, GatedLane, use_lane

NEVER_ENDS = """
import sys, threading
import torch
from nitrous_ema import AsyncPostHocEMA

model = torch.nn.Linear(300, 300)
optimizer = torch.optim.SGD(model.parameters())
ema = AsyncPostHocEMA(model, checkpoint_folder=sys.argv[1], wait_timeout=0.5)
ema.update()
ema.flush()
optimizer.step()
began = threading.Event()

def never_ends(*arguments, **options):
    began.set()
    threading.Event().wait()

torch.Tensor.lerp_ = torch._foreach_lerp_ = never_ends
ema.update()
assert began.wait(60)
raise RuntimeError("loss is nan")
"""


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


def test_interpreter_ends_beside_work_that_never_ends(tmp_path):
    """As on a rank that raises, while the stream of its device waits for a collective of another one."""
    command = [sys.executable, "-c", NEVER_ENDS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert "loss is nan" in done.stderr
    assert "timeout at the end of the EMA: averaging work is still queued: 1 piece" in done.stderr


def test_memory_of_work_that_never_ends_is_held(monkeypatch, tmp_path):
    gate = Gate(is_open=True)
    lane = GatedLane(run=gate)
    use_lane(monkeypatch, lane)
    monkeypatch.setattr(shutdown, "_unfinished", [])
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters())
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, wait_timeout=0.05)
    ema.update()
    ema.flush()
    optimizer.step()
    gate.shut()
    ema.update()
    dispatch = ema._engine._dispatch
    del ema
    gc.collect()
    assert shutdown._unfinished == [dispatch]
    gate.open()
    lane.close(TIMEOUT_SECONDS)


def storages():
    """Return the bytes of all tensors that Python knows, by address."""
    held = [each.untyped_storage() for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


@pytest.mark.parametrize("read", ["auto", "copied"])
def test_closed_ema_holds_only_the_averages(tmp_path, read):
    model = nn.Linear(300, 300)
    before = storages()
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps="manual", read=read)
    ema.update()
    ema.checkpoint()
    ema.close(TIMEOUT_SECONDS)
    place = model.weight.data_ptr()
    model.weight.data = model.weight.data.clone()  # as model.to("cpu") does, to give a device's memory back
    gc.collect()
    held = storages()
    assert place not in held
    averages = sum(average.nbytes for profile in (0, 1) for _, average in ema._engine.flat_buffers.averages(profile))
    new = sum(size for address, size in held.items() if address not in before)
    assert new <= model.weight.nbytes + 1.2 * averages
    assert ema.stats().held_up == 0
