"""Names of runs, snapshot folders and files."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from nitrous_ema.snapshots.names import folder_name, new_run_id, parse_folder_name, parse_rank_file_name, rank_file_name

RUN = "20261122T101530.123456-1a2b3c4d"


def test_run_ids_sort_by_time_and_differ_for_runs_started_at_once():
    start = datetime(2026, 11, 22, 11, 15, 30, 123456, tzinfo=timezone(timedelta(hours=1)))
    assert new_run_id(start).startswith("20261122T101530.123456-")
    assert new_run_id(start) != new_run_id(start)
    assert new_run_id(start) < new_run_id(start + timedelta(microseconds=1)) < new_run_id()
    assert parse_folder_name(folder_name(7, new_run_id())) is not None


@pytest.mark.parametrize("step", [1, 10**12 - 1, 10**12, 10**18 - 1])
def test_step_and_run_are_parsed_from_a_folder_name(step):
    assert parse_folder_name(folder_name(step, RUN)) == (step, RUN)


@pytest.mark.parametrize(
    "name",
    [
        f"step-1-{RUN}",
        f"step-0000000000001-{RUN}",
        f"step-000000000001-{RUN}x",
        f".step-000000000001-{RUN}",
        f"step-000000000001-{RUN}\n",
        f"step-00000000000\N{ARABIC-INDIC DIGIT ONE}-{RUN}",
        ".trash-step-000000000001",
        f"closed-{RUN}",
        f"pin-1-{RUN}",
    ],
)
def test_other_names_are_no_snapshots(name):
    assert parse_folder_name(name) is None


def test_rank_and_world_size_are_parsed_from_a_file_name():
    assert rank_file_name(3, 8) == "rank-00003-of-00008.safetensors"
    assert parse_rank_file_name(rank_file_name(123456, 1234567)) == (123456, 1234567)
    for name in ("rank-0-of-1.safetensors", "rank-00001-of-00001.safetensors", ".rank-00000-of-00001.safetensors"):
        assert parse_rank_file_name(name) is None
