"""The child process: runs one scenario on the laggy device under many schedules.

`runner.py` starts it as `python -m tests.support.laggy.run LIBRARY` with a request as JSON on stdin. It reads one JSON
object per line from stdout: `{"started": ...}` before a schedule, `{"outcome": ...}` after it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.laggy import device

Scenario = Callable[..., Mapping[str, Any]]


def main() -> None:
    request = json.load(sys.stdin)
    faulthandler.dump_traceback_later(request["timeout_seconds"], exit=True)
    torch.set_num_threads(1)  # the same sums in the same order, and the cores are left to the executor
    scenario = _import(request["scenario"])
    reference = _import(request["reference"] or request["scenario"])
    # Before any backward pass, also one on the CPU: torch counts the devices when it runs the first.
    device.register(Path(sys.argv[1]))
    expected = [_snapshot(reference("cpu", **case)) for case in request["cases"]]
    for case, right in zip(request["cases"], expected, strict=True):
        for schedule in request["schedules"]:
            _send(started={"schedule": schedule, "case": case})
            verdict, detail = _try(scenario, schedule, case, right)
            _send(outcome={"schedule": schedule, "case": case, "verdict": verdict, "detail": detail})
            if request["until_different"] and verdict == "different":
                break
    faulthandler.cancel_dump_traceback_later()


def _try(scenario: Scenario, schedule: str, case: dict[str, Any], right: dict[str, Any]) -> tuple[str, str]:
    policy, _, seed = schedule.partition(":")
    device.set_policy(policy, int(seed or 0))
    device.take_host_waits()
    try:
        obtained = _snapshot(scenario(device.NAME, **case))
        device.set_policy("eager")  # work that is still queued runs now, and an error in it is raised
    except (Exception, pytest.fail.Exception):
        _forget_failed_kernels()
        return "error", traceback.format_exc()
    wrong = [key for key in {**right, **obtained} if right.get(key) != obtained.get(key)]
    if not wrong:
        return "same", ""
    return "different", "\n".join(f"{key}: {_difference(right.get(key), obtained.get(key))}" for key in wrong)


def _snapshot(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results in the form in which they are compared: tensors bit for bit, NaN equal to the same NaN."""
    return {key: _bits(value) if isinstance(value, torch.Tensor) else value for key, value in results.items()}


class _Bits:
    """A tensor's type, shape and bytes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach().cpu().contiguous().clone()
        self.raw = self.tensor.reshape(-1).view(torch.uint8)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Bits)
            and (self.tensor.dtype, self.tensor.shape) == (other.tensor.dtype, other.tensor.shape)
            and torch.equal(self.raw, other.raw)
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"{self.tensor.dtype} {list(self.tensor.shape)} {self.tensor.flatten()[:4].tolist()}"


def _bits(tensor: torch.Tensor) -> _Bits:
    return _Bits(tensor)


def _difference(right: Any, obtained: Any) -> str:
    if isinstance(right, _Bits) and isinstance(obtained, _Bits) and right.tensor.shape == obtained.tensor.shape:
        wrong = int((right.tensor != obtained.tensor).sum())
        return f"{wrong} of {right.tensor.numel()} elements, expected {right}..., found {obtained}..."
    return f"expected {str(right)[:500]}, found {str(obtained)[:500]}"


def _forget_failed_kernels() -> None:
    try:
        device.set_policy("eager")
    except device.KernelFailed as failure:
        print(failure, file=sys.stderr)


def _import(name: str) -> Scenario:
    module, _, function = name.partition(":")
    found: Scenario = getattr(importlib.import_module(module), function)
    return found


def _send(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
