"""``request_drain()``: everything is on disk before a job ends that got a signal to end. Also with a real signal.

The drain at the interpreter's exit is tested in tests/unit/async_/test_ema.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nitrous_ema import AsyncPostHocEMA, NitrousError, NitrousWarning, PostHocEMA, SnapshotStore
from nitrous_ema.averaging.shutdown import DrainRequest
from nitrous_ema.errors import SnapshotWriteError
from tests.support.fakes import TIMEOUT_SECONDS, FaultyFiles, StalledFiles, nothing_left_behind, use_files
from tests.support.models import Vector

CLASSES = [PostHocEMA, AsyncPostHocEMA]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def make(tmp_path):
    """Makes EMAs in one folder, and closes them."""
    made = []

    def build(cls: type[PostHocEMA] = AsyncPostHocEMA, **options) -> PostHocEMA:
        defaults = {"update_every": 1, "checkpoint_every_num_steps": "manual", "checkpoint_folder": tmp_path / "ema"}
        made.append(cls(Vector(3000), **{**defaults, **options}))
        return made[-1]

    with nothing_left_behind():
        yield build
        for ema in made:
            ema.close(TIMEOUT_SECONDS)
        made.clear()


def steps(ema: PostHocEMA, number: int) -> None:
    for _ in range(number):
        ema.fence()
        ema.update()


def on_disk(ema: PostHocEMA) -> list[int]:
    return [snapshot.step for snapshot in SnapshotStore(ema.snapshots.root).snapshots()]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("options", [{}, {"update_every": 10}, {"frozen": True}, {"checkpoint_every_num_steps": 3}])
def test_next_update_takes_a_snapshot_and_waits_until_it_is_on_disk(options, cls, make):
    ema = make(cls, **options)
    steps(ema, 2)
    assert not ema.drained
    ema.request_drain()
    assert not ema.drained
    assert ema.stats().snapshots == 0
    steps(ema, 1)
    assert ema.drained
    assert (ema.stats().snapshots, ema.stats().pending) == (1, 0)
    assert on_disk(ema) == [3]
    steps(ema, 1)
    assert ema.drained  # it stays so
    assert ema.stats().snapshots == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_drain_may_be_requested_again_and_from_any_thread(cls, make):
    ema = make(cls)
    for step in (1, 3):
        asking = threading.Thread(target=ema.request_drain)
        asking.start()
        asking.join(TIMEOUT_SECONDS)
        assert not ema.drained  # although the one before was done
        steps(ema, 1)
        assert ema.drained
        assert on_disk(ema)[-1] == step
        steps(ema, 1)
    assert on_disk(ema) == [1, 3]


def test_full_queue_is_waited_for_where_it_would_skip(make, monkeypatch):
    files = StalledFiles()
    use_files(monkeypatch, files)
    ema = make(max_pending=1, on_full="skip", checkpoint_every_num_steps=1)
    steps(ema, 1)
    files.gate.wait_entered()
    ema.request_drain()
    threading.Timer(0.05, files.gate.open).start()
    steps(ema, 1)
    assert on_disk(ema) == [1, 2]


def test_drain_waits_no_longer_than_its_timeout_and_training_may_go_on(make, monkeypatch):
    files = StalledFiles()
    use_files(monkeypatch, files)
    ema = make(wait_timeout=0.05)
    ema.request_drain()
    with pytest.raises(TimeoutError, match=r"steps \[1\] are still being written"):
        ema.update()
    assert not ema.drained
    steps(ema, 1)  # requests no second wait
    files.gate.open()
    ema.flush(TIMEOUT_SECONDS)
    ema.request_drain()
    steps(ema, 1)
    assert ema.drained
    assert on_disk(ema) == [1, 3]


@pytest.mark.parametrize("cls", CLASSES)
def test_drain_that_cannot_write_raises_and_is_done(cls, make, monkeypatch):
    files = FaultyFiles()
    use_files(monkeypatch, files)
    ema = make(cls)
    files.broken = True
    ema.request_drain()
    with pytest.raises(SnapshotWriteError, match="No space left"):
        ema.update()
    assert ema.drained  # nothing is pending, and the error was raised
    assert ema.step == 1
    files.broken = False


def test_drain_that_cannot_write_is_a_warning_where_failures_are(make, monkeypatch):
    files = FaultyFiles()
    use_files(monkeypatch, files)
    ema = make(on_error="warn")
    files.broken = True
    ema.request_drain()
    with pytest.warns(NitrousWarning, match="No space left"):
        ema.update()
    assert ema.drained
    files.broken = False


def test_refused_update_leaves_the_request(make):
    ema = make()
    ema.update()
    ema.request_drain()
    with ema.average_parameters(), pytest.raises(NitrousError):
        ema.update()
    steps(ema, 1)
    assert ema.drained
    assert on_disk(ema) == [2]


def test_request_that_comes_during_a_drain_is_answered_by_the_next():
    request = DrainRequest()
    request.request()
    assert request.take()
    request.request()  # a handler, while the first one is being answered
    request.mark_done()
    assert not request.is_done
    assert request.take()
    request.mark_done()
    assert request.is_done
    assert not request.take()


# ---- real processes

SCRIPT = """
import json, signal, sys, torch
from nitrous_ema import {cls}
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
ema = {cls}(model, checkpoint_folder=sys.argv[1], checkpoint_every_num_steps="manual", update_every=1)
signal.signal(signal.SIGTERM, lambda *_: ema.request_drain())
for step in range(1, 10**6):
    model(torch.ones(2, 300)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update()
    if ema.drained:
        break
    if step == 5:
        print("in step 5", flush=True)
print(json.dumps({{"step": ema.step, "pending": ema.stats().pending}}), flush=True)
sys.exit(0)
"""


@pytest.mark.parametrize("cls", ["PostHocEMA", "AsyncPostHocEMA"])
def test_sigterm_ends_the_loop_with_a_snapshot_of_its_last_step(cls, tmp_path):
    command = [sys.executable, "-c", SCRIPT.format(cls=cls), str(tmp_path / "ema")]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    with subprocess.Popen(command, **piped) as process:
        too_late = threading.Timer(100, process.kill)  # also where the process never prints anything
        too_late.start()
        try:
            line = process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            rest, errors = process.communicate()
        finally:
            process.kill()
            too_late.cancel()
    assert line == "in step 5\n", errors
    assert process.returncode == 0, errors
    printed = json.loads(rest)
    assert printed["step"] > 5
    assert printed["pending"] == 0
    store = SnapshotStore(tmp_path / "ema")
    assert [snapshot.step for snapshot in store.snapshots()] == [printed["step"]]
    assert store.verify() == []
