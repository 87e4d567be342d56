"""A coverage-guided fuzzer: inputs that reach new steps between two lines of the readers are collected and mutated.

It is small on purpose. atheris is faster, but it takes over the process, has wheels for one platform only, and no
single release supports all Python versions of this package.
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Collection
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from tests.fuzz.targets import TRACED, Finding, Target

_MAX_INPUT_BYTES = 1 << 16
_MOST_FINDINGS = 10


class TooMuchWork(BaseException):
    """A reader runs without end. A BaseException, so that no ``except Exception`` catches it."""


class Coverage:
    """Steps between lines of some files, counted while the block runs."""

    def __init__(self, paths: Collection[str], max_lines: int) -> None:
        self.edges: set[tuple[str, int, int]] = set()
        self.lines = 0
        self._paths, self._max_lines = paths, max_lines

    def __enter__(self) -> Coverage:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self._paths:
            return None
        previous, path, edges = 0, frame.f_code.co_filename, self.edges

        def step(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal previous
            if event == "line":
                edges.add((path, previous, frame.f_lineno))
                previous = frame.f_lineno
                self.lines += 1
                if self.lines > self._max_lines:
                    raise TooMuchWork
            return step

        return step


@dataclass
class Found:
    """An input, and the wrong answer that a reader gave."""

    content: bytes
    message: str
    execution: int


@dataclass
class Report:
    """The result of a campaign."""

    executions: int = 0
    taken: int = 0
    edges: int = 0
    corpus: list[bytes] = field(default_factory=list)
    findings: dict[str, Found] = field(default_factory=dict)
    """By signature."""


def fuzz(
    target: Target,
    *,
    seed: int,
    executions: int = sys.maxsize,
    seconds: float = float("inf"),
    stop_at_first: bool = False,
) -> Report:
    """Mutate files until the budget is spent, and return the wrong answers.

    Args:
        target: The reader.
        seed: Seed of the mutations; the same seed gives the same executions.
        executions: Upper limit of files to try.
        seconds: Time after which no further file is tried.
        stop_at_first: Whether the first finding ends the campaign, without minimizing its input.
    """
    rng, report, ends = random.Random(seed), Report(), time.monotonic() + seconds
    seen: set[tuple[str, int, int]] = set()
    seeds, right = target.seeds(), list[bytes]()
    while report.executions < executions and time.monotonic() < ends and len(report.findings) < _MOST_FINDINGS:
        if report.executions < len(seeds):
            content = seeds[report.executions]
        else:
            pool = rng.choice((right, report.corpus[-20:], report.corpus)) or seeds
            content = target.mutate(rng, rng.choice(pool), rng.choice(report.corpus))[:_MAX_INPUT_BYTES]
        report.executions += 1
        message, edges = run(target, content)
        report.taken += message == "taken"
        if message == "taken" and len(right) < 100:  # each check is there for one wrong value in a valid file
            right.append(content)
        if edges - seen:
            seen |= edges
            report.corpus.append(content)
            message = _memory(target, content) or message
        if message.startswith("!") and signature(message) not in report.findings:
            if not stop_at_first:
                content = minimized(target, content, message, seeds)
            report.findings[signature(message)] = Found(content, message[1:], report.executions)
            if stop_at_first:
                break
    report.edges = len(seen)
    return report


def run(target: Target, content: bytes) -> tuple[str, set[tuple[str, int, int]]]:
    """Return the outcome, with a leading "!" for a finding, and the edges that were executed."""
    with Coverage(TRACED, max_lines=20_000 + 40 * len(content)) as coverage:
        try:
            message = target.execute(content)
        except Finding as finding:
            message = f"!{finding}"
        except TooMuchWork:
            message = f"!more than {coverage.lines - 1} lines of Python for {len(content)} bytes"
        except Exception as error:  # of a call outside of refused(), such as verify()
            message = f"!{type(error).__name__}: {error}"
    return message, coverage.edges


def signature(message: str) -> str:
    """Return the part of a message that findings of one cause share."""
    return "".join(letter for letter in message if letter.isalpha() or letter == " ")[:60]


def minimized(target: Target, content: bytes, message: str, seeds: list[bytes], budget: int = 200) -> bytes:
    """Return a file with the same finding that differs less from a valid file."""
    nearest = min(seeds, key=lambda seed: sum(a != b for a, b in zip(seed, content, strict=False)))
    block = max(len(content) // 2, 1)
    while block and budget > 0:
        for begin in range(0, len(content), block):
            same = content[:begin] + nearest[begin : begin + block] + content[begin + block :]
            for candidate in (same, target.sealed(same)):
                if candidate != content and _distance(candidate, nearest) < _distance(content, nearest) and budget > 0:
                    budget -= 1
                    if signature(run(target, candidate)[0]) == signature(message):
                        content = candidate
        block //= 4
    return content


def _distance(one: bytes, other: bytes) -> int:
    return abs(len(one) - len(other)) + sum(a != b for a, b in zip(one, other, strict=False))


def _memory(target: Target, content: bytes) -> str | None:
    """Return a finding if reading a file takes many times its size in memory."""
    if tracemalloc.is_tracing():
        return None
    tracemalloc.start()
    try:
        target.execute(content)
    except Exception:
        return None  # reported by run() already
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return f"!{peak} bytes of memory for a file of {len(content)}" if peak > (1 << 20) + 64 * len(content) else None
