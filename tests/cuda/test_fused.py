"""The fused kernel on a device: right for every layout, the same bits whatever it reads from, and what replaces it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nitrous_ema import AsyncPostHocEMA
from nitrous_ema.averaging.kernels import fused_step
from nitrous_ema.averaging.kernels.foreach_step import ForeachStep
from nitrous_ema.averaging.kernels.fused_step import FusedStep
from tests.cuda.definition import Odd, move_to, worst_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS = 12.0  # one per step at most, and a few for the weights


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_are_those_of_the_definition(tmp_path, device, dtype, background):
    assert worst_error(device, str(tmp_path), dtype, background=background) < ROUNDINGS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_are_right_without_the_kernel(tmp_path, monkeypatch, device, dtype):
    monkeypatch.setattr("nitrous_ema.averaging.execution.dispatch.step_for", ForeachStep)
    assert worst_error(device, str(tmp_path), dtype, background=True) < ROUNDINGS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_in_host_memory_are_those_of_the_definition(tmp_path, device, dtype):
    assert worst_error(device, str(tmp_path), dtype, background=True, offload="host") < ROUNDINGS


def steps_of(folder, device: str) -> list[object]:
    model = Odd(torch.bfloat16)
    move_to(model, device)
    with AsyncPostHocEMA(model, checkpoint_folder=folder) as ema:
        return [placed.step for _, placed in ema._engine._dispatch._steps]


def can_be_fused() -> bool:
    return (
        importlib.util.find_spec("triton") is not None and fused_step.triton_backend(torch.device("cuda")) is not None
    )


@pytest.mark.cuda
def test_kernel_is_used_where_triton_is_there(tmp_path):
    if not can_be_fused():
        pytest.skip("there is no Triton for this device")
    assert all(isinstance(step, FusedStep) for step in steps_of(tmp_path, "cuda"))


@pytest.mark.cuda
def test_kernel_that_fails_is_told_and_replaced(tmp_path, monkeypatch):
    if not can_be_fused():
        pytest.skip("there is no Triton for this device")
    from nitrous_ema.averaging.kernels import fused_kernel

    def fail(*_: object) -> None:
        raise RuntimeError("no ptxas here")

    monkeypatch.setattr(fused_kernel, "rehearse", fail)
    fused_step._works.cache_clear()
    try:
        with pytest.warns(match="no ptxas here"):
            steps = steps_of(tmp_path, "cuda")
    finally:
        fused_step._works.cache_clear()
    assert all(isinstance(step, ForeachStep) for step in steps)


@pytest.mark.cuda
def test_every_device_has_a_kernel_of_its_own(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one device")
    device = f"cuda:{torch.cuda.device_count() - 1}"
    assert worst_error(device, str(tmp_path), torch.bfloat16, background=True) < ROUNDINGS
    assert torch.cuda.current_device() == 0


def test_steps_can_be_told_on_the_cpu(tmp_path):
    assert all(isinstance(step, ForeachStep) for step in steps_of(tmp_path, "cpu"))
