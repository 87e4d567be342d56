"""A miniature of averaging in the background, with one wait left out at a time.

The device must find every one of these bugs, and must report no bug in the correct version.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping

import torch

ELEMENTS = 4096
STEPS = 6
WEIGHT = 0.25
TIMEOUT_SECONDS = 60

BUGS = {
    "no wait before reading": "the side stream reads parameters that the optimizer has not written yet",
    "event recorded too early": "the event that it waits for was recorded before the write",
    "no wait before writing": "the optimizer overwrites parameters that the side stream has not read yet",
    "no record_stream": "a freed temporary is used again while the side stream reads it",
    "no host wait": "the writer reads pinned memory before the copy into it has finished",
    "slot filled again": "a pinned slot is filled again before the writer has read it",
}


def on_cpu(device: str, bug: str | None = None) -> Mapping[str, torch.Tensor]:
    """Return the expected snapshot of every step, computed by plain sequential code."""
    gradients = _gradients()
    weights, average, average_of_squares = (torch.zeros(ELEMENTS) for _ in range(3))
    snapshots = []
    for gradient in gradients:
        weights.add_(gradient)
        average.lerp_(weights, WEIGHT)
        average_of_squares.lerp_(weights * weights, WEIGHT)
        snapshots.append(torch.cat([average, average_of_squares]))
    return {"snapshots": torch.stack(snapshots)}


def on_laggy(device: str, bug: str | None = None) -> Mapping[str, torch.Tensor]:
    """Return the same snapshots, computed with a side stream, pinned slots and a writer thread."""
    main, side = torch.accelerator.current_stream(), torch.Stream(device=device)
    gradients = [gradient.to(device) for gradient in _gradients()]
    weights = torch.zeros(ELEMENTS, device=device)
    averages = torch.zeros(2, ELEMENTS, device=device)
    side.wait_stream(main)
    writer = _Writer(bug)
    weights_read: torch.Event | None = None
    try:
        for step, gradient in enumerate(gradients):
            if weights_read is not None and bug != "no wait before writing":
                main.wait_event(weights_read)
            early = main.record_event()
            weights.add_(gradient)
            squares = weights * weights
            written = main.record_event()
            if bug != "no wait before reading":
                side.wait_event(early if bug == "event recorded too early" else written)
            _use(side)
            averages[0].lerp_(weights, WEIGHT)
            averages[1].lerp_(squares, WEIGHT)
            weights_read = side.record_event()
            if bug != "no record_stream":
                squares.record_stream(side)
            slot = writer.claim(step)
            slot.copy_(averages, non_blocking=True)
            copied = side.record_event()
            _use(main)
            writer.filled.put((slot, copied))
            # The trainer goes on at once, and takes the freed memory.
            del squares
            torch.full((ELEMENTS,), 1e3, device=device)
    finally:
        _use(main)
        snapshots = writer.finish()
    torch.accelerator.synchronize()
    return {"snapshots": torch.stack(snapshots)}


class _Writer:
    """Two pinned slots and a thread that reads them."""

    def __init__(self, bug: str | None) -> None:
        self.bug = bug
        self.slots = [torch.empty(2, ELEMENTS, pin_memory=True) for _ in range(2)]
        self.free: queue.Queue[torch.Tensor] = queue.Queue()
        self.filled: queue.Queue[tuple[torch.Tensor, torch.Event] | None] = queue.Queue()
        self.may_read = threading.Event()  # a slow disk: kept shut only where nothing waits for a free slot
        self.snapshots: list[torch.Tensor] = []
        for slot in self.slots:
            self.free.put(slot)
        if bug != "slot filled again":
            self.may_read.set()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def claim(self, step: int) -> torch.Tensor:
        if self.bug == "slot filled again":
            return self.slots[step % 2]
        return self.free.get(timeout=TIMEOUT_SECONDS)

    def finish(self) -> list[torch.Tensor]:
        self.may_read.set()
        self.filled.put(None)
        self.thread.join(TIMEOUT_SECONDS)
        return self.snapshots

    def _run(self) -> None:
        self.may_read.wait(TIMEOUT_SECONDS)
        for slot, copied in iter(self.filled.get, None):
            if self.bug != "no host wait":
                copied.synchronize()
            self.snapshots.append(slot.flatten().clone())
            self.free.put(slot)


def _gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ELEMENTS, generator=generator) for _ in range(STEPS)]


def _use(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)
