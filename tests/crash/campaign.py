"""Check every crash state of every run, deeper than the test suite does: ``python -m tests.crash.campaign``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence

from tests.crash import runs
from tests.crash.checks import Depth, Tally, check_crashes, check_forgetful_disk, check_rot
from tests.crash.subject import load_subject


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.campaign", description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="orders of calls in runs where several write at once")
    parser.add_argument("--subsets", type=int, default=1024, help="subsets of uncertain names for each moment")
    parser.add_argument("--samples", type=int, default=4, help="contents of uncertain files for each subset")
    options = parser.parse_args(argv)
    logging.disable(logging.ERROR)
    depth = Depth(subsets=options.subsets, samples=options.samples, second_crash_of=10)
    subject, total, started = load_subject(), Tally(), time.monotonic()
    print(
        "| run | crash points | disks built | distinct | restarts | after a second crash |\n|---|---|---|---|---|---|"
    )
    for name in runs.NAMES:
        of_run = Tally()
        for seed in runs.KILLS.get(name, range(options.seeds if name in runs.SEEDED else 1)):
            of_run.add(check_crashes(runs.record(name, subject, seed), subject, depth))
        _print(name, of_run)
        total.add(of_run)
    _print("all", total)
    recording = runs.record("one rank", subject)
    forgetful = [check_forgetful_disk(recording, subject, orderly=orderly) for orderly in (False, True)]
    print(f"\ndisks that forget: {forgetful[0]} in any order, {forgetful[1]} in order; damaged: {check_rot(subject)}")
    print(f"all promises kept, {time.monotonic() - started:.0f} s")
    return 0


def _print(name: str, tally: Tally) -> None:
    numbers = (tally.crash_points, tally.built, tally.distinct, tally.restarts, tally.second)
    print(f"| {name} | {' | '.join(map(str, numbers))} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
