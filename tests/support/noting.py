"""Steps, lanes and marks that only note what is asked of them: for tests of who is asked what, and in which order."""

from __future__ import annotations

from nitrous_ema.averaging.execution.inline import attempt

BATCHES = 3
KEPT_BYTES = 16


class NotingStep:
    """Three batches of ten elements; sources are names of updates."""

    batches = tuple((10 * batch, 10 * batch + 10) for batch in range(BATCHES))

    def __init__(self, log):
        self.log = log

    def run(self, sources, weights, batches=None):
        self.log.extend(f"average {sources}{batch}" for batch in (range(BATCHES) if batches is None else batches))

    def stash_bytes(self, batch):
        return KEPT_BYTES

    def stash(self, sources, batch, scratch):
        self.log.append(f"keep {sources}{batch}")
        return f"{sources}{batch}", scratch

    def run_stashed(self, kept, weights):
        self.log.append(f"average kept {kept[0]}")


class NotingMark:
    def __init__(self):
        self.reached = True

    def record(self):
        self.reached = False

    def wait(self):
        pass

    def is_reached(self):
        return self.reached


class NotingLane:
    """Runs everything at once; what it ran is not done before a mark says so."""

    def __init__(self, log):
        self.log = log
        self.marks = []
        self.reads = []  # of each run, whether it reads parameters

    def enqueue_write(self, work, *, reads_parameters=True, abandon=None):
        self.reads.append(reads_parameters)
        attempt(work, abandon)

    def stash(self, work):
        work()
        self.log.append("kept")

    def mark(self):
        self.marks.append(NotingMark())
        return self.marks[-1]
