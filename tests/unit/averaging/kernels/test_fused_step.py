"""Averaging by one launch: what it computes, in Triton's interpreter, and where it is chosen."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn

from nitrous_ema.averaging.kernels import fused_step
from nitrous_ema.averaging.kernels.foreach_step import ForeachStep
from nitrous_ema.averaging.kernels.fused_step import step_for, triton_backend
from nitrous_ema.errors import NitrousWarning
from tests.support.interpreted import cases, needs_triton, run_interpreted
from tests.support.memory_orders import flat_buffers_of

CASES = "tests.support.fused_step_cases"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    return run_interpreted(CASES, tmp_path_factory.mktemp("triton"))


@needs_triton
@pytest.mark.parametrize("case", cases(CASES))
def test_interpreted(outcomes, case):
    if outcomes[case]:
        pytest.fail(outcomes[case], pytrace=False)


@pytest.fixture
def group():
    """Averages that the kernel could move if they were elsewhere."""
    return flat_buffers_of(nn.Linear(3, 3)).groups[0]


@pytest.fixture
def on_nvidia(monkeypatch, tmp_path):
    """The CPU passes for a GPU that Triton supports."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused_step, "triton_backend", lambda device: "nvidia")
    fused_step._works.cache_clear()
    yield
    fused_step._works.cache_clear()


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps", "privateuseone:0"])
def test_nothing_is_tried_on_devices_for_which_triton_has_no_compiler(kind):
    assert triton_backend(torch.device(kind)) is None


def test_averages_on_the_cpu_are_moved_by_torch(group):
    assert type(step_for(group)) is ForeachStep


@needs_triton
def test_kernel_that_cannot_run_is_warned_of_once_and_not_used(on_nvidia, group):
    with pytest.warns(NitrousWarning, match=r"kernel does not work on cpu: .* The EMA uses torch's own operations"):
        assert type(step_for(group)) is ForeachStep
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(step_for(group)) is ForeachStep


def test_without_triton_averages_are_moved_by_torch(on_nvidia, group, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert type(step_for(group)) is ForeachStep


@needs_triton
def test_triton_without_a_compiler_for_the_device_is_not_tried(on_nvidia, group, monkeypatch):
    monkeypatch.setattr(fused_step, "triton_backend", lambda device: "somebody's")
    assert type(step_for(group)) is ForeachStep


def test_group_of_empty_tensors_is_left_alone(on_nvidia):
    (group,) = flat_buffers_of(nn.ParameterList([nn.Parameter(torch.empty(0))])).groups
    assert type(step_for(group)) is ForeachStep
