"""The detector finds every ordering bug that a background average can have, and reports no correct program."""

from __future__ import annotations

import queue
import threading

import pytest
import torch

from tests.support.race_detector import Checker, Clock, Event, Lane, Race

ORDERS = ["eager", "lazy", *range(20)]
STEPS = 4
TIMEOUT_SECONDS = 60
BUGS = {
    "no wait before reading": r"read by side in 'average 0' .* write by main in 'optimizer 0'",
    "event recorded too early": r"read by side in 'average 0' .* write by main in 'optimizer 0'",
    "no wait before writing": r"write by main in 'optimizer 1' .* read by side in 'average 0'",
    "no host wait": r"read by host:writer in 'write the file' .* write by side in 'copy 0'",
    "slot filled again": r"write by side in 'copy 1' .* read by host:writer in 'write the file'",
    "undeclared write": r"'optimizer 0' writes bytes",
}


class Writer:
    """A host thread that reads the one pinned slot after each copy and returns it."""

    def __init__(self, checker: Checker, slot: torch.Tensor, *, waits: bool) -> None:
        self.checker, self.slot, self.waits = checker, slot, waits
        self.filled: queue.Queue[tuple[Clock, Event] | None] = queue.Queue()
        self.emptied: queue.Queue[Clock | BaseException] = queue.Queue()
        self.snapshots: list[torch.Tensor] = []
        self.thread = threading.Thread(target=self._run, name="writer")
        self.thread.start()

    def read(self, copied: Event) -> Clock:
        self.filled.put((self.checker.send(), copied))
        answer = self.emptied.get(timeout=TIMEOUT_SECONDS)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        self.filled.put(None)
        self.thread.join(TIMEOUT_SECONDS)

    def _run(self) -> None:
        try:
            for known, copied in iter(self.filled.get, None):
                self.checker.receive(known)
                if self.waits:
                    copied.synchronize()
                self.checker.host_access(reads=[self.slot], label="write the file")
                self.snapshots.append(self.slot.clone())
                self.emptied.put(self.checker.send())
        except Race as race:
            self.emptied.put(race)


def run_pipeline(order: str | int, bug: str | None = None) -> torch.Tensor:
    """Run an optimizer on one lane, average and copy on another, and a writer thread, with one wait left out."""
    checker = Checker(order)
    main, side = Lane(checker, "main"), Lane(checker, "side")
    flat, average, slot = torch.zeros(8), torch.zeros(4), torch.zeros(4)
    weights, other = flat[:4], flat[4:]
    writer = Writer(checker, slot, waits=bug != "no host wait")
    weights_read: Event | None = None
    emptied: Clock | None = None
    try:
        for step in range(STEPS):
            if weights_read is not None and bug != "no wait before writing":
                main.wait(weights_read)
            early = main.record()
            declared = other if bug == "undeclared write" else weights
            main.submit(lambda value=step + 1.0: weights.fill_(value), writes=[declared], label=f"optimizer {step}")
            written = main.record()
            if bug != "no wait before reading":
                side.wait(early if bug == "event recorded too early" else written)
            side.submit(
                lambda: average.lerp_(weights, 0.5), reads=[weights, average], writes=[average], label=f"average {step}"
            )
            weights_read = side.record()
            if emptied is not None and bug != "slot filled again":
                checker.receive(emptied)
            side.submit(lambda: slot.copy_(average), reads=[average], writes=[slot], label=f"copy {step}")
            emptied = writer.read(side.record())
    finally:
        writer.close()
    side.synchronize()
    main.synchronize()
    return torch.stack(writer.snapshots)


@pytest.mark.parametrize("order", ORDERS)
def test_the_correct_pipeline_has_no_race_in_any_order_and_correct_averages(order):
    averages = [0.0]
    for step in range(STEPS):
        averages.append(averages[-1] + 0.5 * (step + 1 - averages[-1]))
    assert torch.equal(run_pipeline(order), torch.tensor(averages[1:])[:, None].expand(STEPS, 4))


@pytest.mark.parametrize("bug", BUGS)
def test_a_missing_wait_is_found_in_one_run_and_named(bug):
    with pytest.raises(Race, match=BUGS[bug]):
        run_pipeline("eager", bug)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_block_freed_while_another_lane_reads_it_needs_record_stream(is_recorded):
    checker = Checker("lazy")
    main, side, tensor = Lane(checker, "main"), Lane(checker, "side"), torch.zeros(4)
    checker.allocated(tensor, main)
    main.submit(lambda: tensor.fill_(1), writes=[tensor], label="fill")
    side.wait(main.record())
    side.submit(tensor.sum, reads=[tensor], label="sum")
    if is_recorded:
        checker.record_stream(tensor, side)
        checker.free(tensor)
        return
    with pytest.raises(Race, match="record_stream is missing"):
        checker.free(tensor)


def test_views_of_one_buffer_conflict_only_where_they_overlap():
    checker, flat = Checker(), torch.zeros(8)
    first, second = Lane(checker, "first"), Lane(checker, "second")
    first.submit(lambda: flat[:4].fill_(1), writes=[flat[:4]], label="left half")
    second.submit(lambda: flat[4:].fill_(2), writes=[flat[4:]], label="right half")
    with pytest.raises(Race, match="middle"):
        second.submit(lambda: flat[3:5].fill_(3), writes=[flat[3:5]], label="middle")


def test_a_wait_of_one_thread_does_not_excuse_another():
    checker, tensor = Checker(), torch.zeros(4)
    lane = Lane(checker, "lane")
    submitted = threading.Thread(target=lambda: lane.submit(tensor.zero_, writes=[tensor], label="zero"))
    submitted.start()
    submitted.join(TIMEOUT_SECONDS)
    waiter = threading.Thread(target=lane.synchronize)
    waiter.start()
    waiter.join(TIMEOUT_SECONDS)
    with pytest.raises(Race, match="host:MainThread"):
        checker.host_access(reads=[tensor], label="look")
    lane.synchronize()
    checker.host_access(reads=[tensor], label="look")


def test_values_alone_show_a_missing_wait_in_some_orders():
    wrong = 0
    for order in ORDERS:
        checker = Checker(order, compare_clocks=False)
        main, side = Lane(checker, "main"), Lane(checker, "side")
        weights, average = torch.zeros(2), torch.zeros(2)
        main.submit(lambda weights=weights: weights.fill_(1), writes=[weights], label="optimizer")
        side.submit(lambda a=average, w=weights: a.copy_(w), reads=[weights], writes=[average], label="average")
        side.synchronize()
        wrong += bool(average[0] != 1)
    assert wrong >= 5
