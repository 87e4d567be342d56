"""Pending snapshots of given averages."""

from __future__ import annotations

import torch

from nitrous_ema.averaging.execution.interfaces import PendingSnapshot
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers
from nitrous_ema.averaging.model.tracking import track
from nitrous_ema.snapshots.header import Stamp

RUN = "20261122T101530.123456-1a2b3c4d"


def pending_snapshot(model, layout):
    """Return a function that makes a pending snapshot of a step, and the averages."""
    with torch.no_grad():
        flat_buffers = FlatBuffers(track(model), layout)
        for group in flat_buffers.groups:
            for number, flat in enumerate(group.flats):
                flat.copy_(torch.arange(flat.numel()) + number)

    def pending(step):
        return PendingSnapshot(flat_buffers, Stamp(step=step, t=step, t_first=1, run=RUN, lineage=((RUN, None),)))

    return pending, flat_buffers
