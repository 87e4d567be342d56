"""AsyncPostHocEMA as a whole: failures, limits, endings."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import nitrous_ema.async_.ema
from nitrous_ema import AsyncPostHocEMA, NitrousError, NitrousWarning, PostHocEMA, SnapshotStore
from nitrous_ema.async_.lanes import ThreadLane
from nitrous_ema.errors import ClosedError, SnapshotError, SnapshotWriteError
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    FaultyFiles,
    Gate,
    GatedLane,
    LateLane,
    StalledFiles,
    assert_same_bits,
    averages_of,
    background_threads,
    make_gradients,
    make_model,
    nothing_left_behind,
    use_files,
    use_lane,
)

MANUAL = {"checkpoint_every_num_steps": "manual"}


class Training:
    """A model in training with an EMA that is closed at the end of the test."""

    def __init__(self, folder, kind="plain", cls=AsyncPostHocEMA, **options):
        self.folder = folder
        self.model = make_model(kind)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        if cls is AsyncPostHocEMA:
            options = {"wait_timeout": TIMEOUT_SECONDS, **options}
        self.ema = cls(self.model, checkpoint_folder=folder, **{**MANUAL, **options})

    def steps(self, number):
        for of_step in make_gradients(number, self.model):
            for parameter, gradient in zip(self.model.parameters(), of_step, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self.ema.update()

    def on_disk(self):
        return [snapshot.step for snapshot in SnapshotStore(self.folder).snapshots()]


@pytest.fixture
def training(tmp_path):
    made = []

    def make(**options):
        made.append(Training(tmp_path / "snapshots", **options))
        return made[-1]

    with nothing_left_behind():
        yield make
        for each in made:
            try:
                each.ema.close(TIMEOUT_SECONDS)
            except (NitrousError, TimeoutError):
                each.ema.close(TIMEOUT_SECONDS)
        made.clear()


def test_a_model_is_all_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    ema = AsyncPostHocEMA(model)
    assert ema.sigma_rels == (0.05, 0.10)
    ema.update()
    ema.checkpoint()
    ema.close(TIMEOUT_SECONDS)
    assert SnapshotStore("ema-checkpoints").get().step == 1


@pytest.mark.thread_lane
def test_update_returns_before_anything_was_averaged(training, monkeypatch):
    gate = Gate(is_open=True)
    use_lane(monkeypatch, GatedLane(run=gate))
    training = training()
    training.steps(2)
    training.ema.fence()
    before = averages_of(training.ema)
    gate.shut()
    training.ema.update()
    training.ema.checkpoint()
    assert training.ema.step == 3
    gate.open()
    assert not all(torch.equal(before[key], value) for key, value in averages_of(training.ema).items())


def test_few_parameters_are_averaged_where_they_are(training, monkeypatch):
    monkeypatch.setattr(nitrous_ema.async_.ema, "_FEW_ELEMENTS", 1 << 16)
    training = training()
    training.steps(1)
    seen = training.model[0].bias.clone()
    training.ema.update()
    with torch.no_grad():
        training.model[0].bias.fill_(7.0)
    assert not any("averaging" in name for name in background_threads())
    training.ema.checkpoint()
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [2]
    assert torch.equal(training.ema.ema_models[0].ema_model[0].bias, seen)


# Failures of averaging


class FailingLane(ThreadLane):
    """Fails at one piece of averaging work."""

    fail_next = False

    def enqueue_write(self, work):
        super().enqueue_write((lambda: 1 / 0) if self.fail_next else work)


@pytest.mark.thread_lane
def test_averages_are_refused_after_a_failure(training, monkeypatch):
    lane = FailingLane()
    use_lane(monkeypatch, lane)
    training = training(max_pending=2)
    ema, model = training.ema, training.model
    training.steps(3)
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in ema.state_dict().items()}
    lane.fail_next = True
    training.steps(1)  # fails in the background
    lane.drain(TIMEOUT_SECONDS)
    for call in (ema.update, ema.checkpoint, ema.state_dict, ema.flush, lambda: ema(torch.ones(1, 16))):
        with pytest.raises(NitrousError, match=r"averaging failed \(division by zero\).*load_state_dict") as caught:
            call()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    training.optimizer.step()  # training itself is untouched
    lane.fail_next = False
    with pytest.raises(RuntimeError, match="Missing key"):
        ema.load_state_dict({})
    with pytest.raises(NitrousError, match="averaging failed"):  # nothing was loaded
        ema.update()
    ema.load_state_dict(state)
    training.steps(2)
    assert ema.step == 5
    ema.checkpoint()
    ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [5]
    assert model is ema.model


@pytest.mark.thread_lane
def test_failure_found_only_when_a_state_is_loaded_is_not_raised(training, monkeypatch):
    lane = FailingLane()
    use_lane(monkeypatch, lane)
    training = training()
    training.steps(2)
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in training.ema.state_dict().items()}
    lane.fail_next = True
    training.ema.update()
    lane.fail_next = False
    training.ema.load_state_dict(state)
    training.steps(1)
    assert training.ema.step == 3


@pytest.mark.thread_lane
def test_failure_found_by_a_refused_state_is_still_raised(training, monkeypatch):
    lane = FailingLane()
    use_lane(monkeypatch, lane)
    training = training()
    training.steps(2)
    lane.fail_next = True
    training.ema.update()
    with pytest.raises(RuntimeError, match="Missing key"):
        training.ema.load_state_dict({})
    with pytest.raises(NitrousError, match="averaging failed"):
        training.ema.state_dict()


@pytest.mark.thread_lane
def test_no_snapshot_is_written_of_averages_that_failed(training, monkeypatch):
    gate = Gate()
    lane = FailingLane()
    use_lane(monkeypatch, lane)
    training = training(max_pending=2)
    training.steps(2)
    training.ema.flush(TIMEOUT_SECONDS)
    lane.enqueue_write(gate.pass_through)
    lane.fail_next = True
    training.ema.update()
    lane.fail_next = False
    training.ema.checkpoint()
    gate.open()
    lane.drain(TIMEOUT_SECONDS)
    with pytest.raises(NitrousError, match="averaging failed"):
        training.ema.update()
    assert training.ema.stats().pending == 0
    assert SnapshotStore(training.folder).snapshots() == []


def test_failed_update_counts_nothing(training):
    training = training()
    training.steps(2)
    expected = averages_of(training.ema)
    weight = training.model[0].weight
    del training.model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight"):
        training.ema.update()
    training.model[0].weight = weight
    with pytest.raises(ValueError, match="t_delta"):
        training.ema.update(t_delta=-1)
    assert (training.ema.step, training.ema.t) == (2, 2)
    assert_same_bits(averages_of(training.ema), expected)


# Failures of writing


def test_failed_write_is_raised_once_at_the_next_call(training, monkeypatch):
    files = FaultyFiles()
    use_files(monkeypatch, files)
    training = training()
    training.steps(2)
    files.broken = True
    training.ema.checkpoint()
    with pytest.raises(SnapshotWriteError, match="step-000000000002") as caught:
        training.ema.flush(TIMEOUT_SECONDS)
    assert caught.value.step == 2
    assert isinstance(caught.value.__cause__, OSError)
    training.steps(1)  # once
    files.broken = False
    training.ema.checkpoint()
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [3]
    assert training.ema.stats().failed == 1


def test_failed_write_is_raised_by_close_which_closes_all_the_same(training, monkeypatch):
    files = FaultyFiles()
    use_files(monkeypatch, files)
    training = training()
    training.steps(2)
    files.broken = True
    training.ema.checkpoint()
    with pytest.raises(SnapshotWriteError, match="No space left"):
        training.ema.close(TIMEOUT_SECONDS)
    assert background_threads() == []
    files.broken = False
    training.ema.close(TIMEOUT_SECONDS)
    with pytest.raises(ClosedError):
        training.ema.update()


def test_a_snapshot_that_failed_may_be_requested_again(training, monkeypatch):
    files = FaultyFiles()
    use_files(monkeypatch, files)
    training = training()
    training.steps(2)
    files.broken = True
    training.ema.checkpoint()
    with pytest.raises(SnapshotWriteError):
        training.ema.flush(TIMEOUT_SECONDS)
    files.broken = False
    assert training.ema.checkpoint()
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [2]


def test_with_warnings_a_full_disk_does_not_end_training(training, monkeypatch):
    files = FaultyFiles()
    use_files(monkeypatch, files)
    training = training(on_error="warn", max_pending=1)
    files.broken = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):  # far more than there are slots
            training.steps(1)
            training.ema.checkpoint()
        training.ema.flush(TIMEOUT_SECONDS)
        training.ema.update()
    assert len([each for each in caught if issubclass(each.category, NitrousWarning)]) == 8
    files.broken = False
    training.ema.checkpoint()
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [9]
    assert training.ema.step == 9


def test_an_unwritable_folder_is_an_error_that_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("")
    with nothing_left_behind(), pytest.raises(SnapshotError, match="file"):
        AsyncPostHocEMA(make_model(), checkpoint_folder=tmp_path / "file" / "snapshots")


@pytest.mark.parametrize(
    "argument",
    [
        {"max_pending": 0},
        {"read": "live"},
        {"on_full": "drop"},
        {"sigma_rels": (9,)},
        {"scratch": -1},
        {"scratch": "much"},
        {"offload": "disk"},
    ],
)
def test_a_wrong_argument_leaves_nothing_behind(tmp_path, argument):
    message = next(iter(argument)).replace("sigma_rels", "sigma_rel")
    with nothing_left_behind(), pytest.raises(ValueError, match=message):
        AsyncPostHocEMA(make_model(), checkpoint_folder=tmp_path / "new", **argument)


# Limits


@pytest.fixture
def stalled(training, monkeypatch):
    """A training whose disk hangs; one snapshot is on its way."""

    def make(**options):
        files = StalledFiles()
        use_files(monkeypatch, files)
        made = training(max_pending=1, **options)
        made.gate = files.gate
        made.steps(2)
        made.ema.checkpoint()
        files.gate.wait_entered()
        made.steps(1)
        return made

    return make


def test_full_queue_waits_no_longer_than_asked(stalled):
    training = stalled(wait_timeout=0.05)
    with pytest.raises(TimeoutError, match=r"step 3.*wait_timeout"):
        training.ema.checkpoint()
    training.gate.open()
    assert training.ema.checkpoint()
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [2, 3]
    assert training.ema.stats().seconds_waited >= 0.05


def test_full_queue_skips_or_raises_as_configured(stalled):
    training = stalled(on_full="skip")
    assert training.ema.checkpoint() is False
    training.gate.open()
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.ema.checkpoint()  # the skipped one may be taken later
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [2, 3]
    assert training.ema.stats().skipped == 1


def test_full_queue_raises_and_nothing_is_lost(stalled):
    training = stalled(on_full="raise")
    with pytest.raises(NitrousError, match=r"step 3.*max_pending"):
        training.ema.checkpoint()
    training.gate.open()
    training.steps(1)
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [2]


def test_flush_times_out_and_works_again(stalled):
    training = stalled()
    with pytest.raises(TimeoutError, match=r"steps \[2\]"):
        training.ema.flush(0.01)
    training.steps(1)
    training.gate.open()
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [2]


def test_close_times_out_and_works_again(stalled):
    training = stalled()
    with pytest.raises(TimeoutError, match=r"steps \[2\]"):
        training.ema.close(0.01)
    with pytest.raises(ClosedError, match=r"update\(\): the EMA was closed"):
        training.ema.update()
    training.gate.open()
    training.ema.close(TIMEOUT_SECONDS)
    assert training.on_disk() == [2]
    assert list(Path(training.folder).glob("closed-*"))


@pytest.mark.thread_lane
def test_timeout_names_the_steps_although_the_lane_is_what_hangs(training, monkeypatch):
    gate = Gate()
    use_lane(monkeypatch, GatedLane(copy=gate))
    training = training()
    training.steps(2)
    training.ema.checkpoint()
    with pytest.raises(TimeoutError, match=r"queued.*steps \[2\]"):
        training.ema.flush(0.01)
    gate.open()
    training.ema.flush(TIMEOUT_SECONDS)
    assert training.on_disk() == [2]


def test_stats_count_what_was_done(training):
    training = training()
    training.steps(3)
    training.ema.checkpoint()
    training.ema.flush(TIMEOUT_SECONDS)
    stats = training.ema.stats()
    (file,) = training.folder.glob("step-*/*.safetensors")
    assert (stats.updates, stats.snapshots, stats.pending, stats.failed, stats.skipped) == (3, 1, 0, 0, 0)
    assert stats.bytes_written == file.stat().st_size
    assert stats.write_bandwidth > 0
    assert stats.last_error is None


# Endings


@pytest.mark.thread_lane
def test_block_writes_what_is_pending(tmp_path, monkeypatch):
    with nothing_left_behind():
        use_lane(monkeypatch, LateLane())
        training = Training(tmp_path)
        with training.ema as ema:
            training.steps(2)
            ema.checkpoint()
        assert training.on_disk() == [2]


def test_closed_ema_refuses_updates_and_shows_its_averages(training):
    training = training(kind="batch norm")
    training.steps(3)
    training.ema.checkpoint()
    expected = averages_of(training.ema)
    training.ema.close(TIMEOUT_SECONDS)
    training.ema.close(TIMEOUT_SECONDS)
    for call in (training.ema.update, training.ema.checkpoint):
        with pytest.raises(ClosedError, match=r"the EMA was closed\. Construct another one"):
            call()
    assert_same_bits(averages_of(training.ema), expected)
    training.ema.flush(TIMEOUT_SECONDS)
    with training.ema.average_parameters():
        assert torch.equal(training.model[0].weight, expected["ema_models.0.ema_model.0.weight"])
    with pytest.raises(ClosedError):
        training.ema.update()
    training.ema.ema_models[0].ema_model(torch.ones(2, 16))


def test_closing_while_averages_are_in_the_model_stays_closed(training):
    training = training()
    training.steps(2)
    with training.ema.average_parameters():
        training.ema.close(TIMEOUT_SECONDS)
    with pytest.raises(ClosedError):
        training.ema.update()


@pytest.mark.thread_lane
def test_dropped_ema_leaves_no_thread_or_hook_behind(tmp_path, monkeypatch):
    """Without a garbage collection, as when a notebook's cell is run again; what is pending is written."""
    with nothing_left_behind():
        use_lane(monkeypatch, LateLane())
        training = Training(tmp_path, kind="batch norm")
        _ = training.ema.ema_models[0].ema_model
        training.steps(2)
        training.ema.checkpoint()
        gone = weakref.ref(training.ema), weakref.ref(training.ema._engine)
        assert background_threads()
        gc.disable()
        try:
            del training.ema
            assert [each() for each in gone] == [None, None]
            assert background_threads() == []
        finally:
            gc.enable()
        assert training.on_disk() == [2]
        assert not training.model._load_state_dict_pre_hooks


@pytest.mark.thread_lane
def test_cell_may_be_run_again_and_again(tmp_path):
    with nothing_left_behind():
        for _ in range(3):
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, **MANUAL)
            optimizer.step()
            ema.update()
            assert len(background_threads()) == 3
        del ema


@pytest.mark.thread_lane
def test_ema_that_is_collected_on_its_own_thread_is_ended_elsewhere(tmp_path):
    """The garbage collector runs on whatever thread allocates; a lane cannot wait for itself to end."""
    with nothing_left_behind():
        training = Training(tmp_path)
        training.steps(2)
        training.ema.checkpoint()
        lane = training.ema._engine._dispatch.lane(torch.device("cpu"))
        gate, collected = Gate(), threading.Event()
        gc.disable()
        try:
            training.ema._cycle = [training.ema]  # so that only the collector can end it
            gone = weakref.ref(training.ema)
            lane.enqueue_write(lambda: (gate.pass_through(), gc.collect(), collected.set()))
            del training.ema
            assert gone() is not None
            gate.open()
            assert collected.wait(TIMEOUT_SECONDS)
        finally:
            gc.enable()
        assert gone() is None
        for thread in threading.enumerate():
            if thread.name == "nitrous-ema-shutdown":
                thread.join(TIMEOUT_SECONDS)
        assert training.on_disk() == [2]
        assert background_threads() == []


@pytest.mark.thread_lane
def test_averaging_failure_that_was_never_raised_is_logged(tmp_path, monkeypatch, caplog):
    lane = FailingLane()
    use_lane(monkeypatch, lane)
    training = Training(tmp_path)
    training.steps(2)
    lane.fail_next = True
    training.ema.update()
    del training.ema
    assert "averaging failed after the last chance to report it" in caplog.text


SCRIPT = """
import sys, torch
from nitrous_ema import AsyncPostHocEMA
torch.set_num_threads(1)  # a child cannot use the OpenMP threads of the process that it was forked from
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.SGD(model.parameters(), lr=.1)
ema = AsyncPostHocEMA(model, checkpoint_folder=sys.argv[1], checkpoint_every_num_steps=1, max_pending=8)
for step in range(6):
    model(torch.ones(2, 300)).sum().backward()
    optimizer.step()
    ema.update()
"""
FORKS = """
import os, signal, threading
signal.alarm(250)  # ends the process; faulthandler's own thread would not survive the fork
ema.flush()
from torch.utils.data import DataLoader, Dataset

engine = ema._engine
lane = engine._dispatch.lane(torch.device("cpu"))
gate = threading.Event()
lane.enqueue_write(lambda: gate.wait(200))  # pending when the process forks: the child has no thread that would do it
pid = os.fork()
if pid == 0:
    signal.alarm(120)
    optimizer.step()
    model.load_state_dict(model.state_dict())
    ema.update(); ema.fence(); ema.flush(); ema.state_dict()
    assert ema.checkpoint() is False
    ema.load_state_dict(ema.state_dict())
    assert ema.step == 6
    ema.close()
    sys.exit(7)  # with everything that runs at exit
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
gate.set()

class Data(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        ema.update()
        optimizer.step()
        return ema.step
with_workers = DataLoader(Data(), num_workers=1, multiprocessing_context="fork")
assert [int(step) for step in with_workers] == [6] * 4
assert ema.step == 6
model(torch.ones(2, 300)).sum().backward(); optimizer.step(); ema.update()
"""


def test_forked_children_do_nothing_and_the_parent_goes_on(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT + FORKS, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=300)
    assert ended.returncode == 0, ended.stderr
    store = SnapshotStore(tmp_path)
    assert [snapshot.step for snapshot in store.snapshots()] == [1, 2, 3, 4, 5, 6, 7]
    assert store.verify() == []


# Synthesis


def test_synthesized_average_is_that_of_the_synchronous_service(tmp_path):
    """The worker's own process makes it; only float32 rounding of the same sum may differ."""
    made = {}
    for cls in (PostHocEMA, AsyncPostHocEMA):
        training = Training(tmp_path / cls.__name__, kind="batch norm", cls=cls, update_every=1)
        for _ in range(4):
            training.steps(3)
            training.ema.checkpoint()
        made[cls] = training.ema.synthesize_ema_model(sigma_rel=0.08)
        older = training.ema.synthesize_ema_model(gamma=12.0, step=6) if cls is AsyncPostHocEMA else None
        training.ema.close(TIMEOUT_SECONDS)
    ours, theirs = made[AsyncPostHocEMA], made[PostHocEMA]
    assert (ours.step, ours.t) == (12, 12)
    assert older.step == 6
    expected = theirs.ema_model.state_dict()
    for key, value in ours.ema_model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
    assert isinstance(ours.ema_model, nn.Sequential)


def test_averages_can_be_synthesized_after_close(tmp_path):
    training = Training(tmp_path)
    with training.ema:
        training.steps(3)
        training.ema.checkpoint()
    made = training.ema.synthesize_ema_model(sigma_rel=0.08)
    assert made.step == 3


@pytest.mark.thread_lane
def test_waiting_for_the_lane_keeps_no_core_busy(training, monkeypatch):
    """The training thread sleeps in a condition while it waits, it does not poll."""
    gate = Gate(is_open=True)
    use_lane(monkeypatch, GatedLane(run=gate))
    training = training()
    training.steps(3)
    gate.shut()
    training.ema.update()
    opener = threading.Timer(0.2, gate.open)
    opener.start()
    started = time.thread_time()
    training.ema.fence()
    assert time.thread_time() - started < 0.1
    opener.join(TIMEOUT_SECONDS)


@pytest.mark.parametrize("wrong", [None, nn.Linear(3, 2).parameters(), nn.Linear(3, 2).state_dict()])
def test_object_that_is_not_a_model_is_named(tmp_path, wrong):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        AsyncPostHocEMA(wrong, checkpoint_folder=tmp_path)


@pytest.mark.parametrize("seconds", [float("inf"), 1e12])
def test_infinite_timeout_is_accepted(tmp_path, seconds):
    ema = AsyncPostHocEMA(make_model(), checkpoint_folder=tmp_path, wait_timeout=seconds, max_pending=1, read="copied")
    for _ in range(3):
        ema.update()
        ema.checkpoint()
    ema.request_drain()
    ema.update()
    ema.flush(seconds)
    ema.close(seconds)
