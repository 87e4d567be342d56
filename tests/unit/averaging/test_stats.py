"""The counts of an EMA: those of its snapshots, and those of its updates."""

from __future__ import annotations

from dataclasses import asdict, fields

from nitrous_ema.averaging.stats import Stats
from nitrous_ema.snapshots.stats import WriteStats


def test_counts_of_updates_are_added_to_those_of_snapshots():
    written = WriteStats(snapshots=2, bytes_written=600, seconds_writing=1.5, last_error="disk full")
    stats = Stats(**asdict(written), updates=7, scratch_bytes=64, held_up=1)
    assert (stats.snapshots, stats.updates, stats.scratch_bytes, stats.held_up) == (2, 7, 64, 1)
    assert (stats.last_error, stats.write_bandwidth) == ("disk full", 400)


def test_metrics_are_flat_numbers():
    stats = Stats(snapshots=3, failed=1, last_error="disk full", bytes_written=100, seconds_writing=2.0, updates=7)
    metrics = stats.as_metrics()
    assert metrics["ema/updates"] == 7
    assert metrics["ema/write_bandwidth"] == 50.0
    assert {name.removeprefix("ema/") for name in metrics} == {
        *(field.name for field in fields(Stats) if field.name != "last_error"),
        "write_bandwidth",
    }
    assert all(type(value) in (int, float) for value in metrics.values())
    assert stats.as_metrics(prefix="")["failed"] == 1
