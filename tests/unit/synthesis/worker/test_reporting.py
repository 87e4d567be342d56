from __future__ import annotations

import json

import pytest

from nitrous_ema.synthesis.worker import reporting


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    return now


def test_text_has_rate_and_time_left_and_comes_rarely(clock, capsys):
    progress = reporting.progress_of(7, as_json=False, as_text=True)
    for seconds, done in ((0.1, 1 << 20), (2.0, 2 << 20), (2.1, 3 << 20), (4.0, 4 << 20)):
        clock[0] = 100.0 + seconds
        progress(done, 4 << 20)
    progress.end()
    assert capsys.readouterr().err.splitlines() == [
        "read 2.0 MiB of 4.0 MiB (50%), 1.0 MiB/s, 2 s left",
        "read 4.0 MiB of 4.0 MiB (100%), 1.0 MiB/s, 4.0 s",
    ]


def test_lines_for_programs_have_the_first_and_the_last(clock, capsys):
    progress = reporting.progress_of(7, as_json=True, as_text=True)
    for done in (1, 2, 3, 10):
        clock[0] += 0.01
        progress(done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(reporting.PROGRESS) for line in lines)
    assert [json.loads(line)["progress"] for line in lines] == [
        {"step": 7, "done": done, "total": 10} for done in (1, 10)
    ]


def test_no_progress_is_printed_unless_requested_or_on_a_terminal():
    assert reporting.progress_of(7, as_json=False, as_text=False) is None
