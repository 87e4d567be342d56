"""Averages by their definition, in float64 on the host, for models with parameters in unusual memory layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, PostHocEMA

STEPS = 12
GAMMAS = (16.97, 3.9, 2.5)  # arbitrary; passed to the EMA unchanged


class Odd(nn.Module):
    """Parameters that are channels last, transposed, unaligned, empty, a single number, or many blocks large."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.channels_last = nn.Parameter(random(8, 6, 5, 5).to(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(random(70, 33).t())
        self.single = nn.Parameter(random(1))
        self.empty = nn.Parameter(random(0, 4))
        self.unaligned = nn.Parameter(random(5001)[1:])
        self.large = nn.Parameter(random(257, 129))
        self.mixed = nn.Parameter(torch.randn(77, generator=generator))  # float32 among the others


def move_to(model: Odd, device: str) -> None:
    """Move a model without ``Module.to``, which would align its unaligned parameter."""
    for name, parameter in model.named_parameters():
        if name == "unaligned":
            whole = torch.empty(parameter.numel() + 1, dtype=parameter.dtype, device=device)
            parameter.data = whole[1:].copy_(parameter.data)
        else:
            parameter.data = parameter.data.to(device)


def worst_error(device: str, folder: str, dtype: torch.dtype, *, background: bool, **options: Any) -> float:
    """Return the largest difference from the definition, in units of float32's rounding of the largest value."""
    model = Odd(dtype)
    move_to(model, device)
    cls = AsyncPostHocEMA if background else PostHocEMA
    options |= {"gammas": GAMMAS, "update_every": 1, "checkpoint_every_num_steps": "manual"}
    ema = cls(model, checkpoint_folder=folder, **options)
    right: dict[tuple[int, str], np.ndarray] = {}
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            ema.fence()
            for index, parameter in enumerate(model.parameters()):
                parameter.mul_(0.5).add_(0.1 * step + 0.01 * index)
        ema.update()
        for name, parameter in model.named_parameters():
            value = parameter.detach().cpu().double().numpy()
            for profile, gamma in enumerate(GAMMAS):
                decay = (1 - 1 / step) ** (gamma + 1)
                right[profile, name] = decay * right.get((profile, name), 0 * value) + (1 - decay) * value
    worst = 0.0
    for (profile, name), expected in right.items():
        obtained = ema.state_dict()[f"ema_models.{profile}.ema_model.{name}"].cpu().double().numpy()
        if expected.size:
            worst = max(worst, float(np.abs(obtained - expected).max() / np.abs(expected).max()) * 2**23)
    ema.close(60)
    return worst
