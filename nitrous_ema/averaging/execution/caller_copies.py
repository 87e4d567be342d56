"""Copies of live tensors, made where the caller is, for a lane that will read them later."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nitrous_ema.averaging.kernels.copied_step import copy_each


class CallerSideCopies:
    """One copy per tensor, allocated once and written again at each update."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    @property
    def are_held(self) -> bool:
        """Whether there are copies from the last call."""
        return bool(self._copies)

    def take(
        self, live: Mapping[str, Tensor], devices: Mapping[str, torch.device], order_writers: Callable[[], None]
    ) -> Mapping[str, Tensor]:
        """Copy tensors.

        Args:
            live: What to copy.
            devices: Where each copy is to be.
            order_writers: Orders what the caller does next after every read by a lane so far.

        Returns:
            The copies, in the type and memory order of the originals; valid until the next call.
        """
        if self._copies:
            order_writers()  # the lane may still be reading the last ones
        if not live:
            self._copies = {}
            return {}
        self._copies = {name: self._place(name, tensor, devices[name]) for name, tensor in live.items()}
        copy_each([self._copies[name] for name in live], list(live.values()))
        return self._copies

    def _place(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        kept = self._copies.get(name)
        if kept is not None and (kept.device, kept.shape, kept.dtype) == (device, tensor.shape, tensor.dtype):
            return kept
        return torch.empty_like(tensor, device=device, requires_grad=False)
