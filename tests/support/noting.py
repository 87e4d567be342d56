"""Steps, lanes and marks that only log their calls, for tests of which calls are made and in which order."""

from __future__ import annotations

import torch

from nitrous_ema.averaging.execution.inline import attempt

BATCHES = 3
STASH_BYTES = 16


class NotingStep:
    """A step of three batches of ten elements; its sources are names of updates."""

    batches = tuple((10 * batch, 10 * batch + 10) for batch in range(BATCHES))

    def __init__(self, log):
        self.log = log

    def run(self, sources, weights, batches=None, allowed=None):
        self.log.extend(f"average {sources}{batch}" for batch in (range(BATCHES) if batches is None else batches))

    def stash_bytes(self, batch):
        return STASH_BYTES

    def stash(self, sources, batch, memory):
        self.log.append(f"stash {sources}{batch}")
        return f"{sources}{batch}", memory

    def run_stashed(self, stashed, weights, allowed=None):
        self.log.append(f"average stashed {stashed[0]}")


class NotingMark:
    """A mark that is reached when the test sets ``reached``."""

    def __init__(self):
        self.reached = True
        self.waits = 0

    def record(self):
        self.reached = False

    def wait_on_host(self):
        pass

    def wait_on_device(self):
        self.waits += 1

    def is_reached(self):
        return self.reached


class NotingLane:
    """Runs everything at once; its work counts as done only when its marks are reached."""

    def __init__(self, log):
        self.log = log
        self.marks = []
        self.reads = []  # for each piece of work, whether it reads parameters

    def enqueue_write(self, work, *, reads_parameters=True, abandon=None):
        self.reads.append(reads_parameters)
        attempt(work, abandon)

    def stash(self, work):
        work()
        self.log.append("stashed")

    def allocate(self, num_bytes, device):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def order_deferred(self):
        pass

    def mark(self):
        self.marks.append(NotingMark())
        return self.marks[-1]
