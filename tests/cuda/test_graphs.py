"""CUDA graphs: captured steps, calls that are refused during a capture, and writers that do not end a capture.

``test_scenarios.py`` has the averages of replayed steps.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from nitrous_ema import AsyncPostHocEMA, NitrousError
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    StalledFiles,
    assert_same_bits,
    averages_of,
    make_gradients,
    make_model,
    small_pieces,
    snapshot_bytes,
)
from tests.support.late import late
from tests.support.slow_snapshots import files_of_new_emas

pytestmark = pytest.mark.cuda


def make_trainee(folder: Any, **options: Any) -> tuple[Any, ...]:
    model = make_model("plain", "cuda")
    (gradients,) = make_gradients(1, model)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    ema = AsyncPostHocEMA(model, checkpoint_folder=folder, checkpoint_every_num_steps="manual", **options)
    optimizer.step()
    ema.update()
    return model, optimizer, ema


@pytest.mark.parametrize("what", ["update", "checkpoint"])
def test_refused_while_capturing_and_the_capture_goes_on(tmp_path, what):
    model, optimizer, ema = make_trainee(tmp_path)
    before = averages_of(ema)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
        with pytest.raises(NitrousError, match="being captured into a graph"):
            getattr(ema, what)()
    weights = [parameter.clone() for parameter in model.parameters()]
    ema.fence()
    graph.replay()
    assert not any(map(torch.equal, weights, model.parameters()))
    assert_same_bits(averages_of(ema), before)
    assert ema.step == 1
    ema.close(TIMEOUT_SECONDS)


def test_captured_step_waits_for_nothing(tmp_path):
    # A wait for an event from outside the capture would end it: cudaErrorStreamCaptureIsolation.
    with late("updates"):
        _, optimizer, ema = make_trainee(tmp_path, read="guarded")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        ema.fence()
        graph.replay()
        ema.update()
        ema.close(TIMEOUT_SECONDS)


class CountedFiles(StalledFiles):
    """Counts the pieces that writers have written behind the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Semaphore(0)

    def write_at(self, descriptor: int, buffer: Any, offset: int) -> int:
        written = super().write_at(descriptor, buffer, offset)
        self.written.release()
        return written


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_writers_at_work_do_not_end_a_capture(tmp_path, mode):
    """Their waits for events are among the calls that a capture in "global" mode forbids to all threads."""
    files = CountedFiles()
    with small_pieces(), files_of_new_emas(files):
        _, optimizer, ema = make_trainee(tmp_path)
        ema.checkpoint()
        files.gate.wait_entered()  # before the first piece, so that the writer must still wait for all other pieces
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode=mode):
            optimizer.step()
            files.gate.open()
            for _ in range(3):
                assert files.written.acquire(timeout=TIMEOUT_SECONDS)
            optimizer.step()
        ema.fence()
        graph.replay()
        ema.update()
        ema.close(TIMEOUT_SECONDS)  # raises the error of a writer
    assert list(snapshot_bytes(tmp_path)) == [1]


def test_writer_may_wait_already_when_a_capture_begins(tmp_path):
    with small_pieces(), late("copies, for long"):
        _, optimizer, ema = make_trainee(tmp_path)
        ema.checkpoint()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="global")  # torch.cuda.graph would wait for the copy first
            optimizer.step()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        ema.close(TIMEOUT_SECONDS)
    assert list(snapshot_bytes(tmp_path)) == [1]
