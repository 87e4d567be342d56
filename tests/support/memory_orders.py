"""A model with parameters in every memory order there is, and flat buffers of a model."""

from __future__ import annotations

import torch
from torch import nn

from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, snapshot_layout
from nitrous_ema.averaging.model.tracking import TrackingPolicy, track


def flat_buffers_of(model: nn.Module, profiles: int = 2, dtype: torch.dtype = torch.float32, **policy) -> FlatBuffers:
    tracked = track(model, TrackingPolicy(**policy))
    gammas = tuple(float(profile + 5) for profile in range(profiles))
    return FlatBuffers(tracked, snapshot_layout(tracked, gammas, gammas, dtype))


class Orders(nn.Module):
    """Parameters in every memory order there is."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.empty(3, 4))
        self.last = nn.Parameter(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(torch.empty(4, 3).t())
        self.expanded = nn.Parameter(torch.empty(1, 3).expand(4, 3))
        self.holes = nn.Parameter(torch.empty(3, 8)[:, ::2])
        self.scalar = nn.Parameter(torch.empty(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.pairs = nn.Parameter(torch.empty(5, dtype=torch.complex64))
        self.flipped = nn.Parameter(torch.empty(3, 2, dtype=torch.complex64).t())
        self.wide = nn.Parameter(torch.empty(3, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.empty(7, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("byte", torch.zeros((), dtype=torch.uint8))
