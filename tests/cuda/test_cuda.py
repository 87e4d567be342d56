"""The scenarios of tests/test_on_laggy.py on a real device: the same bits in the background as at once.

The reference is ``PostHocEMA`` on the same device, since its kernels round as they like. What reorders work here is a
stream that is held up: the side streams begin each piece of work with a kernel that does nothing for a while.
"""

from __future__ import annotations

import pytest
import torch

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema.async_ import lane as lanes
from tests.fakes import (
    TIMEOUT_SECONDS,
    assert_same_bits,
    averages_of,
    backward,
    make_batches,
    make_gradients,
    make_model,
    small_pieces,
    snapshot_bytes,
)

pytestmark = pytest.mark.cuda

STALL_CYCLES = 20_000_000  # some 10 ms
KINDS = ["plain", "batch norm", "bfloat16", "tied", "transposed", "forced norm"]


class StalledUpdates(lanes.AcceleratorLane):
    """Averaging is late: the optimizer, readers and snapshot copies must wait for it."""

    def run(self, work):
        super().run(lambda: (torch.cuda._sleep(STALL_CYCLES), work()))


class StalledCopies(lanes.AcceleratorLane):
    """Snapshot copies are late: the next averaging must wait for them, and so must the writer."""

    def copy_out(self, work, abandon):
        super().copy_out(lambda: (torch.cuda._sleep(STALL_CYCLES), work()), abandon)


LANES = {"as it comes": lanes.AcceleratorLane, "late updates": StalledUpdates, "late copies": StalledCopies}


def train(cls, folder, kind="plain", steps=7, stall_caller=False, **options):
    with small_pieces():
        model = make_model(kind, "cuda")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
        options = {"sigma_rels": (0.05, 0.15), "update_every": 1, "checkpoint_every_num_steps": 2, **options}
        ema = cls(model, checkpoint_folder=folder, **options)
        for batch, gradients in zip(make_batches(steps, model), make_gradients(steps, model), strict=True):
            model(batch)  # writes buffers, or weights
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            if stall_caller:
                torch.cuda._sleep(STALL_CYCLES)
            optimizer.step()
            ema.update()
        ema.checkpoint()
        averages = averages_of(ema)
        ema.close(TIMEOUT_SECONDS)
        return averages


@pytest.fixture
def lane(request, monkeypatch):
    monkeypatch.setattr("nitrous_ema.async_.service.AcceleratorLane", LANES[request.param])


@pytest.mark.parametrize("lane", LANES, indirect=True)
@pytest.mark.parametrize("stall_caller", [False, True], ids=["", "caller is late"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_at_once_whoever_is_late(tmp_path, lane, kind, stall_caller):
    read = "copied" if kind == "forced norm" else "guarded"
    expected = train(PostHocEMA, tmp_path / "sync", kind)
    obtained = train(AsyncPostHocEMA, tmp_path / "async", kind, stall_caller=stall_caller, read=read, max_pending=4)
    assert_same_bits(obtained, expected)
    assert snapshot_bytes(tmp_path / "async") == snapshot_bytes(tmp_path / "sync")


@pytest.mark.parametrize("lane", LANES, indirect=True)
@pytest.mark.parametrize("read", ["guarded", "copied", "auto"])
@pytest.mark.parametrize("update_every", [1, 3])
def test_same_bits_however_parameters_are_read(tmp_path, lane, read, update_every):
    expected = train(PostHocEMA, tmp_path / "sync", update_every=update_every)
    obtained = train(AsyncPostHocEMA, tmp_path / "async", update_every=update_every, read=read)
    assert_same_bits(obtained, expected)
    assert snapshot_bytes(tmp_path / "async") == snapshot_bytes(tmp_path / "sync")


@pytest.mark.parametrize("lane", ["late updates"], indirect=True)
def test_nothing_in_the_loop_waits_for_the_device(tmp_path, lane):
    model = make_model("batch norm", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = AsyncPostHocEMA(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps=3, max_pending=4)
    batches = make_batches(8, model)
    backward(model, batches[0])
    optimizer.step()
    ema.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            backward(model, batch)
            optimizer.step()
            ema.update()
            ema.fence()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ema.close(TIMEOUT_SECONDS)


@pytest.mark.parametrize("lane", ["late updates"], indirect=True)
def test_averages_can_be_read_at_any_time(tmp_path, lane):
    def outputs_of(cls, folder):
        model = make_model("plain", "cuda")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
        ema = cls(model, checkpoint_folder=folder, update_every=1, checkpoint_every_num_steps="manual")
        seen = {}
        batches, gradients = make_batches(4, model), make_gradients(4, model)
        for step, (batch, of_step) in enumerate(zip(batches, gradients, strict=True)):
            for parameter, gradient in zip(model.parameters(), of_step, strict=True):
                parameter.grad = gradient
            optimizer.step()
            ema.update()
            with torch.no_grad():
                seen[f"model {step}"] = ema.ema_models[1].ema_model(batch)
                with ema.average_parameters(0):
                    seen[f"swapped {step}"] = model(batch)
            seen |= {f"{step} {key}": value for key, value in averages_of(ema).items()}
        ema.close(TIMEOUT_SECONDS)
        return seen

    assert_same_bits(outputs_of(AsyncPostHocEMA, tmp_path / "async"), outputs_of(PostHocEMA, tmp_path / "sync"))


def test_another_stream_than_the_default_one_may_be_current(tmp_path):
    expected = train(PostHocEMA, tmp_path / "sync")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        obtained = train(AsyncPostHocEMA, tmp_path / "async")
        assert torch.cuda.current_stream() == stream
    stream.synchronize()
    assert_same_bits(obtained, expected)
