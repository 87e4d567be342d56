"""Fuzz the readers: ``python -m tests.fuzz.campaign --seconds 60 --seed 0``. Exit status 1 after a wrong answer."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.fuzz.engine import fuzz
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each reader")
    parser.add_argument("--executions", type=int, default=sys.maxsize, help="upper limit of files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--out", type=Path, help="folder for files with a wrong answer")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    wrong = 0
    for name in TARGETS if options.target == "all" else [options.target]:
        with tempfile.TemporaryDirectory() as folder:
            target = TARGETS[name](Path(folder))
            report = fuzz(target, seed=options.seed, seconds=options.seconds, executions=options.executions)
        print(
            f"{name}: {report.executions} files, {report.taken} accepted, {report.edges} edges, "
            f"{len(report.corpus)} in the corpus, {len(report.findings)} wrong answers",
            flush=True,
        )
        for number, found in enumerate(report.findings.values()):
            print(f"  execution {found.execution}: {found.message}")
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"{name}-{number}").write_bytes(found.content)
        wrong += len(report.findings)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
