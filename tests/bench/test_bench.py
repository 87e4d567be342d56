from __future__ import annotations

import gc
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.bench_update import SKIPPING
from bench.contestants import SYNC
from bench.harness import (
    Budget,
    Comparison,
    Duels,
    Report,
    Spread,
    added_by,
    compare,
    duration,
    from_process,
    machine,
    parser,
    render,
    start,
    timed,
)

REPOSITORY = Path(__file__).resolve().parents[2]


class FakeClock:
    """Time that passes only when a fake contestant says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_sample_is_the_time_of_the_call_alone():
    clock = FakeClock()
    sample = timed(lambda: clock.spend(2.0), settle=lambda: clock.spend(50.0), clock=clock)
    assert sample() == 2.0


def test_sample_is_the_median_of_its_repeats():
    clock = FakeClock()
    costs = iter([9.0, 1.0, 2.0])
    assert timed(lambda: clock.spend(next(costs)), repeats=3, clock=clock)() == 2.0


def test_sample_of_several_steps_is_per_step():
    clock = FakeClock()
    assert timed(lambda: clock.spend(8.0), divide_by=4, clock=clock)() == 2.0


@pytest.mark.parametrize(("until", "expected"), [("done", 7.0), ("return", 3.0)])
def test_device_work_counts_only_if_the_sample_ends_when_it_is_done(until, expected):
    clock, queued = FakeClock(), [11.0]  # left behind by whoever had the turn before

    def call() -> None:
        clock.spend(3.0)
        queued.append(4.0)

    def synchronize() -> None:
        clock.spend(sum(queued))
        queued.clear()

    assert timed(call, synchronize=synchronize, until=until, clock=clock)() == expected


def test_sample_of_what_is_added_is_the_work_with_it_less_the_work_without():
    clock, calls = FakeClock(), []

    def work(extra) -> None:
        clock.spend(7.0)
        calls.append("work")
        if extra is not None:
            extra()

    def extra() -> None:
        calls.append("extra")
        clock.spend(2.5)

    sample = added_by(extra, work, settle=lambda: clock.spend(50.0), clock=clock)
    assert [sample(), sample()] == [2.5, 2.5]
    assert calls == ["work", "work", "extra", "work", "extra", "work"]  # each comes first in its turn


def test_unknown_end_of_a_sample_is_refused():
    with pytest.raises(ValueError, match="'done' or 'return'"):
        timed(lambda: None, until="later")


def test_every_round_has_every_contestant_once_and_orders_differ():
    turns: list[str] = []

    def contestant(name: str):
        return lambda: turns.append(name) or 1.0

    compare({name: contestant(name) for name in "abc"}, rounds=20, warm_up_rounds=2)
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 22
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3
    assert {each[0] for each in rounds} == set("abc")


def test_warm_up_rounds_do_not_count():
    costs = iter([100.0, 50.0, 1.0, 2.0])
    comparison = compare({"a": lambda: next(costs)}, rounds=2, warm_up_rounds=2)
    assert comparison.seconds == {"a": [1.0, 2.0]}


def test_garbage_is_not_collected_while_contestants_run_and_is_again_afterwards():
    seen = []
    with pytest.raises(RuntimeError, match="broken"):
        compare({"a": lambda: seen.append(gc.isenabled()) or _break()}, rounds=1)
    assert seen == [False]
    assert gc.isenabled()


def test_contestant_that_fails_is_left_out_with_its_reason_and_the_others_go_on():
    costs = iter([1.0, 2.0])
    failed: dict[str, str] = {}
    comparison = compare(
        {"a": lambda: 5.0, "b": lambda: next(costs), "c": _break},
        rounds=2,
        warm_up_rounds=0,
        failed=failed,
    )
    assert comparison.seconds.keys() == {"a", "b"}
    assert failed == {"c": "RuntimeError: broken"}
    assert comparison.seconds["a"] == [5.0, 5.0]


def test_no_round_begins_when_the_time_is_over_but_for_the_least_of_them():
    clock = FakeClock()

    def measure() -> float:
        clock.spend(10.0)
        return 1.0

    def rounds(seconds: float) -> int:
        done = compare({"a": measure}, rounds=9, warm_up_rounds=1, seconds_at_most=seconds, clock=clock)
        return len(done.seconds["a"])

    assert [rounds(0.0), rounds(45.0), rounds(1e9)] == [2, 4, 9]


def test_contestants_that_met_only_the_base_are_set_against_it_in_their_own_rounds():
    first, second = {"base": [1.0, 2.0], "a": [2.0, 4.0]}, {"b": [30.0], "base": [10.0]}
    lost = {"c": [1.0]}  # the base had failed there
    duels = Duels.of("base", [Comparison(each) for each in (first, second, lost)])
    assert duels.seconds == {"base": [1.0, 2.0, 10.0], "a": [2.0, 4.0], "b": [30.0]}
    assert (duels.ratio("a", "base").median, duels.ratio("b", "base").median) == (2.0, 3.0)
    assert duels.ratio("base", "b").median == pytest.approx(1 / 3)
    assert duels.difference("base", "base").median == 0.0


def test_budget_is_dealt_out_in_parts_of_what_is_left():
    clock = FakeClock()
    budget = Budget(12.0, clock)
    part = budget.part(3)
    clock.spend(3.0)
    assert (budget.left, part.left, budget.part(3).left) == (9.0, 1.0, 3.0)
    clock.spend(50.0)
    assert (budget.left, budget.part(2).left) == (0.0, 0.0)


def test_spread_is_that_of_the_textbook():
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, q1=2.0, q3=4.0, min=1.0)
    assert Spread.of([7.0]) == Spread(median=7.0, q1=7.0, q3=7.0, min=7.0)


def test_ratios_are_taken_within_rounds_so_that_noise_of_the_machine_cancels():
    slowness = [1.0, 100.0, 3.0, 40.0, 0.2]
    comparison = Comparison({"ours": [2 * s for s in slowness], "floor": slowness})
    assert comparison.ratio("ours", "floor") == Spread(median=2.0, q1=2.0, q3=2.0, min=2.0)


def test_median_ratio_is_not_the_ratio_of_medians():
    comparison = Comparison({"a": [1.0, 6.0, 2.0], "b": [1.0, 2.0, 4.0]})  # medians: 2 and 2
    assert comparison.ratio("a", "b").median == 1.0
    assert comparison.ratio("a", "b").min == 0.5
    assert comparison.difference("a", "b") == Spread(median=0.0, q1=-1.0, q3=2.0, min=-2.0)


def test_contestant_in_a_process_of_its_own_gives_its_last_line():
    sample = from_process([sys.executable, "-c", "print('warming up'); print(0.25)"], timeout_seconds=60)
    assert compare({"a": sample}, rounds=2, warm_up_rounds=0).seconds == {"a": [0.25, 0.25]}


@pytest.mark.parametrize("program", ["print('no number')", "print(1.0); raise SystemExit(3)", ""])
def test_process_without_a_sample_is_an_error_that_shows_what_it_said(program):
    with pytest.raises(RuntimeError, match="expected 0 and a number of seconds"):
        from_process([sys.executable, "-c", program], timeout_seconds=60)()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.50 s"),
        (0.0123, "12.3 ms"),
        (0.4567, "457 ms"),
        (-0.002, "-2.00 ms"),
        (3.2e-6, "3.20 us"),
        (0, "0.00 us"),
    ],
)
def test_durations_have_a_fitting_unit(seconds, text):
    assert duration(seconds) == text


def test_table_sets_everyone_against_floor_and_baseline():
    report = _report()
    text = render(report.tables[0])
    assert "floor: flat" in text
    ours = next(line for line in text.splitlines() if line.startswith("ours"))
    expected = ["ours", "3.00 s", "2.50 s - 3.50 s", "2.00 s", "2.00 [1.75-2.00]", "0.50 [0.50-0.50]"]
    assert re.split(r"  +", ours) == expected


def test_rates_are_bytes_per_second_and_percent_of_the_floors_rate():
    report = Report(bench="bench_fake", options={}, machine={})
    comparison = Comparison({"plain": [1.0, 2.0, 4.0], "ours": [2.0, 2.0, 5.0]})
    report.add("a fake", comparison, floor="plain", sample_bytes=3_000_000_000)
    plain, ours = render(report.tables[0]).splitlines()[-2:]
    assert re.split(r"  +", plain)[-2:] == ["1.500 GB/s", "100.0% [100.0%-100.0%]"]
    assert re.split(r"  +", ours)[-2:] == ["1.500 GB/s", "80.0% [65.0%-90.0%]"]  # of 50, 100 and 80
    row = report.tables[0]["rows"][1]
    assert (row["bytes_per_second"], row["rate_to_floor"]["median"]) == (1.5e9, 0.8)


def test_small_ratios_are_not_rounded_away():
    report = Report(bench="bench_fake", options={}, machine={})
    report.add("a fake", Comparison({"slow": [1.0, 1.0, 1.0], "fast": [0.001, 0.003, 0.005]}), floor="slow")
    fast = render(report.tables[0]).splitlines()[-1]
    assert re.split(r"  +", fast)[-1] == "0.0030 [0.0020-0.0040]"


def test_json_holds_machine_options_statistics_and_every_sample(tmp_path):
    file = tmp_path / "out.json"
    _report().write(file)
    written = json.loads(file.read_text())
    assert written["bench"] == "bench_fake"
    assert written["options"] == {"rounds": 3}
    assert written["machine"].keys() >= {"date", "torch", "threads", "device", "cpu", "cores", "load", "python"}
    (table,) = written["tables"]
    assert (table["floor"], table["baseline"], table["elements"]) == ("flat", "peer", 17)
    ours = next(row for row in table["rows"] if row["name"] == "ours")
    assert ours["samples"] == [2.0, 3.0, 4.0]
    assert ours["seconds"] == {"median": 3.0, "q1": 2.5, "q3": 3.5, "min": 2.0}
    assert ours["to_floor"]["median"] == 2.0
    assert ours["to_baseline"]["median"] == 0.5
    assert ours["over_baseline"]["median"] == -3.0


def test_everything_so_far_is_in_the_file_after_each_table(tmp_path):
    report = Report(bench="bench_fake", options={}, machine={}, path=tmp_path)
    for count in (1, 2):
        report.add("a fake", Comparison({"a": [1.0]}), floor="not there", failed={"b": "why"})
        (file,) = tmp_path.iterdir()
        assert len(json.loads(file.read_text())["tables"]) == count
    assert report.failures == ["a fake: b"] * 2
    assert render(report.tables[0]).splitlines()[-1] == "no row: b: why"


def test_list_shows_each_value_in_its_own_way():
    report = Report(bench="bench_fake", options={}, machine={})
    report.add_list("a fake", {"bytes": "{:.0f} B".format, "part": "{:.1%}".format}, {"a": {"bytes": 7, "part": 0.25}})
    (table,) = report.tables
    assert re.split(r"  +", render(table).splitlines()[-1]) == ["a", "7 B", "25.0%"]
    assert (table["rows"][0]["bytes"], table["rows"][0]["part"]) == (7, 0.25)


def test_json_into_a_folder_is_named_after_the_bench(tmp_path):
    _report().write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bench_fake.json"]


def test_common_options_are_applied_and_reported(capsys):
    import torch

    before = torch.get_num_threads()
    try:
        report = start("bench_fake", parser("fake").parse_args(["--threads", "1", "--quick"]))
    finally:
        torch.set_num_threads(before)
    assert report.machine["threads"] == 1
    assert report.options["quick"] is True
    assert "threads 1" in capsys.readouterr().out


def test_quick_bench_runs_and_finds_the_work_that_there_is_to_do(tmp_path):
    file = tmp_path / "update.json"
    command = [sys.executable, "-m", "bench.bench_update"]
    command += ["--quick", "--threads", "1", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "NitrousWarning" not in done.stderr  # else ours would not run in the mode that the table promises
    tables = json.loads(file.read_text())["tables"]
    kinds = [table["title"].split(":")[0] for table in tables]
    assert kinds == [*["one update"] * 3, "one update, bf16", *["one update, skip"] * 2, "one training step"]
    assert [row["name"] for row in tables[4]["rows"]] == [SYNC, SKIPPING]
    for table in (*tables[:4], tables[6]):
        names = {row["name"] for row in table["rows"]}
        assert names >= {"PostHocEMA", "AsyncPostHocEMA"}
        assert all(math.isfinite(s) and s > 0 for row in table["rows"] for s in row["samples"])
        assert table["title"] in done.stdout


def _report() -> Report:
    import torch

    report = Report(bench="bench_fake", options={"rounds": 3}, machine=machine(torch.device("cpu")))
    comparison = Comparison({"flat": [1.0, 2.0, 2.0], "ours": [2.0, 3.0, 4.0], "peer": [4.0, 6.0, 8.0]})
    report.add("a fake", comparison, floor="flat", baseline="peer", facts={"elements": 17})
    return report


def _break() -> float:
    raise RuntimeError("broken")
