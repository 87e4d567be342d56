"""A coverage-guided fuzzer: inputs that reach new steps between two lines of the readers are kept and changed further.

Small on purpose. atheris does it faster, but takes the process over, has wheels for one platform, and no one release
for all the Pythons that are supported.
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
    """A reader does not come to an end; no ``except Exception`` holds it."""


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
    """An input and what it does."""

    content: bytes
    message: str
    execution: int


@dataclass
class Report:
    """What a campaign has done."""

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
    """Change files until the budget is spent.

    Args:
        target: The reader.
        seed: Same seed, same executions.
        executions: Most files to try.
        seconds: Time after which no further file is tried.
        stop_at_first: Whether a finding ends it, as it was found.
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
        if message == "taken" and len(right) < 100:  # one lie in a right file is what each check is for
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
    """The outcome, with "!" before that of a finding, and the edges that it went along."""
    with Coverage(TRACED, max_lines=20_000 + 40 * len(content)) as coverage:
        try:
            message = target.execute(content)
        except Finding as finding:
            message = f"!{finding}"
        except TooMuchWork:
            message = f"!more than {coverage.lines - 1} lines of Python for {len(content)} bytes"
        except Exception as error:  # of an unguarded call, as verify()
            message = f"!{type(error).__name__}: {error}"
    return message, coverage.edges


def signature(message: str) -> str:
    """What findings of one cause have in common."""
    return "".join(letter for letter in message if letter.isalpha() or letter == " ")[:60]


def minimized(target: Target, content: bytes, message: str, seeds: list[bytes], budget: int = 200) -> bytes:
    """The same finding from a file that is nearer to a right one: what need not be changed is as it was."""
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
    """A finding if reading a file takes many times its size."""
    if tracemalloc.is_tracing():
        return None
    tracemalloc.start()
    try:
        target.execute(content)
    except Exception:
        return None  # told already
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return f"!{peak} bytes of memory for a file of {len(content)}" if peak > (1 << 20) + 64 * len(content) else None
