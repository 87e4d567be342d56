"""A process of its own, under ``TORCH_CUDA_SANITIZER=1``: trains with an EMA; a race that is seen is an error.

The sanitizer sees events, streams and torch's operators, and compares accesses at equal addresses. Two things that it
does not see are replaced here:

- It does not see ``query()``, by which the lane finds that a readback has finished. Here every successful query is
  followed by a ``synchronize()`` of the same event, which the sanitizer sees and which waits for nothing.
- It does not see Triton kernels, so averaging uses torch's operators here.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch

from nitrous_ema.async_ import lanes
from nitrous_ema.averaging.kernels.foreach_step import ForeachStep
from tests.support.laggy.cases import SCENARIOS
from tests.support.laggy.loops import train
from tests.support.laggy.without import without
from tests.support.scenarios import same_stream_after
from tests.support.slow_snapshots import long_copy

NAMES = (
    "guarded", "guarded, every third", "copied", "copied, every third", "bfloat16", "batch norm", "tied", "transposed",
    "weights written in forward", "snapshots in bfloat16", "streams", "ema_model", "saved and loaded",
)  # fmt: skip
"""Names in ``SCENARIOS``."""


def main(device: str, *lines: str) -> None:
    """Train in every way that ``NAMES`` names, and then without each of these lines (``laggy/without.py``)."""
    with (
        mock.patch.object(lanes._DeviceMark, "is_reached", is_reached_and_seen),
        mock.patch("nitrous_ema.averaging.execution.dispatch.step_for", ForeachStep),
    ):
        for name in NAMES:
            with same_stream_after(device):
                train(device, background=True, **SCENARIOS[name])
            print("no race:", name)
        long_copy(device, "chunks", background=True)
        print("no race: long copy")
        for line in lines:
            with without(line):
                train(device, background=True)


def is_reached_and_seen(mark: Any) -> bool:
    is_reached = bool(mark._event.query())
    if is_reached:
        mark._event.synchronize()
    return is_reached


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    print("to the end")
