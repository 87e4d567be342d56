"""The counts of an EMA: those of its snapshots, and those of its updates."""

from __future__ import annotations

from dataclasses import asdict

from nitrous_ema.averaging.stats import Stats
from nitrous_ema.snapshots.stats import WriteStats


def test_counts_of_updates_are_added_to_those_of_snapshots():
    written = WriteStats(snapshots=2, bytes_written=600, seconds_writing=1.5, last_error="disk full")
    stats = Stats(**asdict(written), updates=7, scratch_bytes=64, held_up=1)
    assert (stats.snapshots, stats.updates, stats.scratch_bytes, stats.held_up) == (2, 7, 64, 1)
    assert (stats.last_error, stats.write_bandwidth) == ("disk full", 400)
