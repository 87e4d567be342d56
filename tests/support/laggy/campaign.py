"""All scenarios and all missing lines on many seeds: ``python -m tests.support.laggy.campaign --seeds 2000``.

Prints two tables in Markdown: how many runs of each scenario were wrong (0 is expected), and on how many seeds each
missing line was detected. Exit status 1 if a run was wrong or a missing line was never detected.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support.laggy.cases import SCENARIOS
from tests.support.laggy.loops import train
from tests.support.laggy.runner import run_on_laggy
from tests.support.laggy.without import LINES

_SEEDS_PER_CHILD = 200
_SECONDS_PER_RUN = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.laggy.campaign", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=200, help="random schedules per scenario and per line (%(default)s)"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed (%(default)s)")
    parser.add_argument("--only", default="", help="scenarios and lines whose name contains this")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    failed = False
    print("| scenario | runs | wrong |\n|---|---|---|")
    for name, case in SCENARIOS.items():
        if arguments.only in name:
            found = count(case, ["eager", "lazy"], seeds, show=True)
            wrong = found["different"] + found["error"]
            failed = failed or wrong > 0
            print(f"| {name} | {found.total()} | {wrong} |", flush=True)
    print("\n| | line left out | where | shown on |\n|---|---|---|---|")
    for name, line in LINES.items():
        if arguments.only in name:
            found = count({**line.case, "bug": name}, [], seeds, show=False)
            failed = failed or not (found["different"] or line.is_rare)
            where = f"`{line.module.removeprefix('nitrous_ema.')}`: `{line.function}`"
            print(f"| {line.guards} | {name} | {where} | {found['different']} of {found.total()} |", flush=True)
    return int(failed)


def count(case: Mapping[str, Any], schedules: Sequence[str], seeds: Sequence[int], *, show: bool) -> Counter[str]:
    """Return the number of runs with each verdict."""
    found: Counter[str] = Counter()
    for begin in range(0, len(seeds), _SEEDS_PER_CHILD):
        some = [*(schedules if begin == 0 else []), *(f"random:{seed}" for seed in seeds[begin:][:_SEEDS_PER_CHILD])]
        outcomes = run_on_laggy(train, cases=[case], schedules=some, timeout_seconds=60 + _SECONDS_PER_RUN * len(some))
        found.update(outcome.verdict for outcome in outcomes)
        for outcome in outcomes:
            if show and outcome.verdict != "same":
                print(f"{outcome.schedule} {dict(case)}: {outcome.verdict}\n{outcome.detail[:2000]}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
