"""Copies of live tensors, made where the caller's work runs, for a lane that reads them later.

Buffers change in forward, and with ``read="copied"`` parameters may change at any time. A lane in the background must
not read them live: it reads these copies, which are made before update() returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nitrous_ema.averaging.kernels.copied_step import copy_each


class CallerSideCopies:
    """One copy per tensor, allocated once and overwritten at each update."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    @property
    def are_held(self) -> bool:
        """Whether copies of the last call are held."""
        return bool(self._copies)

    def take(
        self, live: Mapping[str, Tensor], devices: Mapping[str, torch.device], order_writers: Callable[[], None]
    ) -> Mapping[str, Tensor]:
        """Copy tensors and return the copies.

        Args:
            live: The tensors, by name.
            devices: The device of each copy, by name.
            order_writers: Orders the caller's next work after every read by a lane so far.

        Returns:
            The copies, in the type and memory order of the originals; valid until the next call.
        """
        if self._copies:
            # Also if no tensor is copied this time: the old copies are then freed, and their memory may be reused.
            order_writers()  # the lane may still be reading the last copies
        if not live:
            self._copies = {}
            return {}
        self._copies = {name: self._allocated(name, tensor, devices[name]) for name, tensor in live.items()}
        copy_each([self._copies[name] for name in live], list(live.values()))
        return self._copies

    def _allocated(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """Return the memory of the last copy if it fits the tensor, otherwise new memory."""
        last = self._copies.get(name)
        if last is not None and (last.device, last.shape, last.dtype) == (device, tensor.shape, tensor.dtype):
            return last
        return torch.empty_like(tensor, device=device, requires_grad=False)
