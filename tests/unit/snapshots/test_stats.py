"""Counts of snapshots, from several threads."""

from __future__ import annotations

import threading

from nitrous_ema.snapshots.stats import Ledger, WriteStats


def test_counts_of_all_threads_are_added_up():
    ledger = Ledger()
    start = threading.Barrier(4)

    def count() -> None:
        start.wait(timeout=60)
        for _ in range(500):
            ledger.add(snapshots=1, bytes_written=3, seconds_writing=0.5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert ledger.read() == WriteStats(snapshots=2000, bytes_written=6000, seconds_writing=1000.0)


def test_last_error_stays_until_another_one():
    ledger = Ledger()
    ledger.add(failed=1, last_error="disk full")
    ledger.add(snapshots=1)
    assert ledger.read().last_error == "disk full"


def test_bandwidth_is_bytes_per_second_of_writing_and_zero_before_the_first():
    assert WriteStats().write_bandwidth == 0
    assert WriteStats(bytes_written=600, seconds_writing=1.5).write_bandwidth == 400
