"""Lanes by themselves. Averages on lanes are in test_async_equality.py (CPU) and test_on_laggy.py (accelerator)."""

from __future__ import annotations

import gc
import tempfile
import threading
import warnings
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from unittest import mock

import pytest
import torch

from nitrous_ema.async_ import lanes
from nitrous_ema.async_.lanes import ThreadLane
from nitrous_ema.averaging.execution.background_thread import BackgroundThread
from nitrous_ema.averaging.execution.inline import InlineLane
from tests.support.fakes import TIMEOUT_SECONDS, Gate, averages_of, background_threads, make_gradients, make_model
from tests.support.laggy import device as laggy
from tests.support.laggy.cases import HELD, MANUAL
from tests.support.laggy.loops import train
from tests.support.laggy.runner import SCHEDULES, assert_right_on_laggy, run_on_laggy
from tests.support.scenarios import make_ema, make_optimizer


def nothing() -> None:
    pass


@pytest.fixture
def lane():
    lane = ThreadLane()
    yield lane
    lane.close(TIMEOUT_SECONDS)
    assert not lane._thread.is_alive()


def test_work_runs_in_the_order_it_was_queued(lane):
    ran = []
    for number in range(40):
        if number % 3:
            lane.enqueue_write(partial(ran.append, number))
        else:
            lane.enqueue_read(partial(ran.append, number), nothing)
    lane.drain(TIMEOUT_SECONDS)
    assert ran == list(range(40))


def test_enqueue_write_returns_before_its_work_has_begun(lane):
    gate = Gate()
    lane.enqueue_write(gate.pass_through)
    gate.wait_entered()
    gate.open()
    lane.drain(TIMEOUT_SECONDS)


def test_caller_waits_for_averaging_but_not_for_readbacks(lane):
    copy, ran = Gate(), []
    lane.enqueue_write(lambda: ran.append("averaged"))
    lane.enqueue_read(copy.pass_through, nothing)
    lane.order_reader()  # would never return if it waited for the copy
    assert ran == ["averaged"]
    copy.open()


@pytest.mark.parametrize("order", [ThreadLane.order_writer, ThreadLane.order_reader])
def test_caller_waits_until_the_last_averaging_has_ended(lane, order):
    gate, ordered = Gate(), threading.Event()
    lane.enqueue_write(gate.pass_through)
    caller = threading.Thread(target=lambda: (order(lane), ordered.set()))
    caller.start()
    gate.wait_entered()
    assert not ordered.is_set()
    gate.open()
    assert ordered.wait(TIMEOUT_SECONDS)
    caller.join(TIMEOUT_SECONDS)


def test_writer_does_not_wait_for_work_that_reads_no_parameters(lane):
    gate, ran = Gate(), []
    lane.enqueue_write(lambda: ran.append("read"))
    lane.enqueue_write(gate.pass_through, reads_parameters=False)
    lane.order_writer()  # would never return if it waited for the second
    assert ran == ["read"]
    gate.open()


def test_queue_is_bounded(lane):
    gate, all_queued = Gate(), threading.Event()

    def queue_many():
        for _ in range(lanes._MAX_QUEUED + 3):
            lane.enqueue_write(gate.pass_through)
        all_queued.set()

    caller = threading.Thread(target=queue_many)
    caller.start()
    gate.wait_entered()
    assert len(lane._queue) <= lanes._MAX_QUEUED
    assert not all_queued.is_set()
    gate.open()
    assert all_queued.wait(TIMEOUT_SECONDS)
    caller.join(TIMEOUT_SECONDS)


def test_work_that_was_queued_behind_a_failure_is_not_run(lane):
    """Also not after the failure was taken: a snapshot of invalid averages would be written."""
    gate, second, ran, abandoned = Gate(), Gate(), [], []

    def fail():
        gate.pass_through()
        raise OSError("broken")

    lane.enqueue_write(fail)
    lane.enqueue_read(lambda: ran.append("copy"), lambda: (second.pass_through(), abandoned.append("copy")))
    lane.enqueue_write(lambda: ran.append("write"))
    lane.enqueue_read(lambda: ran.append("late copy"), lambda: abandoned.append("late copy"))
    gate.open()
    second.wait_entered()  # the failure is known, and half of the later work is still queued
    assert isinstance(lane.take_error(), OSError)
    second.open()
    lane.drain(TIMEOUT_SECONDS)
    assert (ran, abandoned) == ([], ["copy", "late copy"])
    assert lane.take_error() is None
    lane.enqueue_write(lambda: ran.append("new"))
    lane.drain(TIMEOUT_SECONDS)
    assert ran == ["new"]


def test_drain_times_out_and_works_again(lane):
    gate = Gate()
    lane.enqueue_write(gate.pass_through)
    with pytest.raises(TimeoutError, match="1 piece"):
        lane.drain(0.01)
    gate.open()
    lane.drain(TIMEOUT_SECONDS)


def test_work_holds_nothing_when_it_is_done(lane):
    class Held:
        pass

    held = Held()
    alive = [True]
    weakref.finalize(held, alive.clear)
    lane.enqueue_write(lambda held=held: None)
    del held
    lane.enqueue_write(nothing)
    lane.drain(TIMEOUT_SECONDS)
    gc.collect()
    assert not alive


def test_gradients_are_disabled_and_the_number_of_threads_is_unchanged(lane):
    seen, threads = [], torch.get_num_threads()
    lane.enqueue_write(lambda: seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
    lane.drain(TIMEOUT_SECONDS)
    assert seen == [(False, False)]
    assert torch.get_num_threads() == threads


def test_closing_ends_the_thread_and_closing_again_does_nothing():
    before = background_threads()
    lane = ThreadLane()
    lane.enqueue_write(nothing)
    lane.close(TIMEOUT_SECONDS)
    lane.close(TIMEOUT_SECONDS)
    assert background_threads() == before
    with pytest.raises(RuntimeError, match="bug in nitrous_ema"):
        lane.enqueue_write(nothing)


# On the accelerator. test_on_laggy.py shows that a schedule detects each of these waits when it is left out.


CASES = {
    "plain": MANUAL,
    "snapshots": {**MANUAL, "then": "checkpoint"},
    "load": {**MANUAL, "then": "load other values"},
    "read": {"then": "state_dict"},
    "read elsewhere": {"then": "state_dict elsewhere"},
    "deferred, then elsewhere": {**HELD, **MANUAL, "then": "checkpoint elsewhere", "max_pending": 6},
    "late, then elsewhere": {"hold": [[1, 3], []], "then": "late state_dict elsewhere"},
    "long copy": HELD,
    "stashed": {**MANUAL, "writes": "two streams between copies"},
    "stashed on another stream": {**HELD, "writes": "two streams"},
}


@pytest.fixture(scope="module")
def wrong():
    """Return for each case the schedules under which its results differed, with details."""
    outcomes = run_on_laggy(train, cases=list(CASES.values()))
    assert len(outcomes) == len(CASES) * len(SCHEDULES)
    return {
        name: [(o.schedule, o.detail) for o in outcomes if o.case == case and o.verdict != "same"]
        for name, case in CASES.items()
    }


@pytest.mark.slow
def test_update_reads_the_weights_of_its_own_step(wrong):
    assert wrong["plain"] == []


@pytest.mark.slow
def test_optimizer_does_not_write_what_is_still_read(wrong):
    assert wrong["plain"] == []


@pytest.mark.slow
def test_snapshot_holds_the_averages_of_its_step(wrong):
    assert wrong["snapshots"] == []
    assert wrong["load"] == []


@pytest.mark.slow
def test_next_update_waits_for_the_snapshot_copy(wrong):
    assert wrong["snapshots"] == []


@pytest.mark.slow
def test_averages_can_be_read_at_any_time(wrong):
    assert wrong["read"] == []


@pytest.mark.slow
def test_averages_can_be_read_on_another_stream(wrong):
    assert wrong["read elsewhere"] == []


@pytest.mark.slow
def test_deferred_update_is_ordered_whoever_asks_for_it(wrong):
    assert wrong["deferred, then elsewhere"] == []
    assert wrong["late, then elsewhere"] == []


@pytest.mark.slow
def test_optimizer_does_not_wait_for_a_snapshot_copy(wrong):
    assert wrong["long copy"] == []


@pytest.mark.slow
def test_stashed_parameters_are_averaged_after_the_copy(wrong):
    assert wrong["stashed"] == []


@pytest.mark.slow
def test_parameters_are_written_after_they_were_stashed(wrong):
    assert wrong["stashed on another stream"] == []


def current_after_each_call(device):
    """Train while another stream, and another device than that of the averages, are current."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("plain", f"{device}:1" if device != "cpu" else device)
        optimizer = make_optimizer(model)
        _, users_streams = current(device)
        if device != "cpu":
            torch.accelerator.set_stream(torch.Stream(device=f"{device}:1"))
            torch.accelerator.set_stream(torch.Stream(device=f"{device}:0"))
        # The constructor is the first call that enters the lane's streams.
        before, ema = current(device), make_ema(model, folder)
        found = [] if current(device) == before else ["the constructor"]
        for of_step in make_gradients(3, model):
            for parameter, gradient in zip(model.parameters(), of_step, strict=True):
                parameter.grad = gradient
            for call in (optimizer.step, ema.update, ema.checkpoint, ema.fence, ema.flush, ema.state_dict):
                before = current(device)
                call()
                found += [call.__name__] if current(device) != before else []
        ema.close()
        averages = averages_of(ema)
        if device != "cpu":
            torch.accelerator.synchronize()
        for stream in reversed(users_streams):
            torch.accelerator.set_stream(stream)
        return {"changed by": found, **averages}


def current(device):
    if device == "cpu":
        return 0, []
    streams = [torch.accelerator.current_stream(f"{device}:{index}") for index in range(2)]
    return torch.accelerator.current_device_index(), streams


@pytest.mark.slow
def test_current_stream_and_device_are_left_alone():
    assert_right_on_laggy(current_after_each_call, schedules=["eager", "lazy", "random:0", "random:1"])


def current_without(device, line):
    with mock.patch.object(lanes, line) if device != "cpu" else nullcontext():
        return current_after_each_call(device)


def test_device_that_is_not_restored_is_noticed():
    (outcome,) = run_on_laggy(current_without, cases=[{"line": "_restore_device_index"}], schedules=["eager"])
    assert (outcome.verdict, "changed by" in outcome.detail) == ("different", True)


def devices_of_writers(device):
    """Take a snapshot of a model on the second device; its file fails before the first page, and another does not."""
    found = set()

    def note(call):
        def noted(event):
            if isinstance(threading.current_thread(), BackgroundThread):
                found.add(torch.accelerator.current_device_index())
            return call(event)

        return noted

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if device != "cpu":
            for name in ("query", "synchronize"):
                patch = mock.patch.object(laggy.Event, name, note(getattr(laggy.Event, name)))
                stack.enter_context(patch)
        ema = make_ema(make_model("plain", f"{device}:1" if device != "cpu" else device), folder)
        ema.update()
        ema.checkpoint()
        ema.close()
    return {"devices": found - {1}, "any": bool(found) or device == "cpu"}


def test_writers_wait_on_the_device_of_the_averages():
    assert_right_on_laggy(devices_of_writers, schedules=["eager", "lazy"])


def without_calls(device, *names):
    class Stream(torch.Stream):
        pass

    def refuse(self):
        raise NotImplementedError("simulated")

    for name in names:
        setattr(Stream, name, refuse)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with mock.patch.object(torch, "Stream", Stream):
            model = make_model("plain", device)
            ema = make_ema(model, folder)
            ema.update()
            ema.flush()
            ema.close()
    return {"warned": device == "cpu" or any("no streams and events" in str(each.message) for each in warned)}


def without_query(device):
    return without_calls(device, "query")


def without_synchronize(device):
    return without_calls(device, "synchronize")


@pytest.mark.parametrize("scenario", [without_query, without_synchronize])
def test_backend_whose_streams_lack_a_call_averages_inside_update(scenario):
    """As MPS, whose streams can be neither queried nor waited for."""
    assert_right_on_laggy(scenario, schedules=["eager"])


# One lane alone, on the laggy device.


def lane_and_values(device):
    """Return a lane and two tensors of ones, written where the caller is."""
    lane = lanes.AcceleratorLane(torch.device(device, 0)) if device != "cpu" else InlineLane()
    return lane, *(torch.ones(64, device=device) for _ in range(2))


@contextmanager
def on_a_stream(device):
    if device == "cpu":
        yield
        return
    home, other = torch.accelerator.current_stream(), torch.Stream(device=device)
    other.wait_stream(home)
    torch.accelerator.set_stream(other)
    yield
    torch.accelerator.set_stream(home)


def stashes_on_two_streams(device):
    lane, *values = lane_and_values(device)
    stashed = [torch.zeros_like(value) for value in values]
    for stash, value in zip(stashed, values, strict=True):
        with on_a_stream(device):
            lane.stash(partial(stash.copy_, value))
    lane.order_writer()
    for value in values:
        value.fill_(7)
    if device != "cpu":
        torch.accelerator.synchronize()
    return dict(enumerate(stashed))


def work_that_fails_in_the_middle(device):
    lane, average, _ = lane_and_values(device)

    def fail():
        average.add_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lane.enqueue_write(fail)
    lane.order_reader()
    return {"average": average.clone()}


def drained(device, first, timeout):
    """Drain work of both streams; the later one does not wait for the earlier one where that reads."""
    lane, average, copy = lane_and_values(device)
    calls = [lambda: lane.enqueue_write(lambda: average.add_(1)), lambda: lane.enqueue_read(copy.zero_, nothing)]
    for call in calls if first == "write" else calls[::-1]:
        call()
    lane.drain(timeout)
    streams = [] if device == "cpu" else [lane._update_stream, lane._copy_stream]
    return {"unfinished": [index for index, stream in enumerate(streams) if not stream.query()]}


def flags_of_marks(device):
    return {"block": device == "cpu" or lanes._DeviceMark(torch.device(device, 0))._event.blocking}


@pytest.mark.parametrize(
    ("scenario", "cases"),
    [
        (stashes_on_two_streams, [{}]),
        (work_that_fails_in_the_middle, [{}]),
        (drained, [{"first": first, "timeout": end} for first in ("write", "read") for end in (None, TIMEOUT_SECONDS)]),
        (flags_of_marks, [{}]),
    ],
)
def test_lane_alone(scenario, cases):
    assert_right_on_laggy(scenario, cases=cases, schedules=SCHEDULES[:12])
