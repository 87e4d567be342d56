"""Reads a trace of ``torch.profiler``: which kernels ran at the same time, and whether the host waited."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCHES = ("cuda_runtime", "cuda_driver")
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize")


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran."""

    name: str
    stream: int
    begin: float
    end: float
    """Microseconds, as ``begin``."""
    launched_by: str | None
    """The name of the range in which it was launched."""


class Trace:
    """The events of an exported trace (``prof.export_chrome_trace``).

    Args:
        path: The file.
        ranges: Names of ``record_function`` ranges to look for; no range may be inside another.
    """

    def __init__(self, path: Path, ranges: Sequence[str]) -> None:
        self._events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
        self._ranges = [event for event in self._of("user_annotation") if event["name"] in ranges]

    def kernels(self) -> list[Kernel]:
        """Return the kernels in the order of their beginnings."""
        launched = {
            event["args"].get("correlation"): self._range_of(event)
            for category in LAUNCHES
            for event in self._of(category)
        }
        found = [
            Kernel(
                event["name"],
                event["args"]["stream"],
                event["ts"],
                event["ts"] + event["dur"],
                launched.get(event["args"].get("correlation")),
            )
            for event in self._of("kernel")
        ]
        return sorted(found, key=lambda kernel: kernel.begin)

    def waits(self, name: str) -> list[str]:
        """Return the calls that made the host wait inside ranges of a name."""
        return [
            event["name"]
            for category in LAUNCHES
            for event in self._of(category)
            if event["name"].endswith(WAITS) and self._range_of(event) == name
        ]

    def _of(self, category: str) -> Iterator[dict[str, Any]]:
        return (event for event in self._events if event.get("cat") == category)

    def _range_of(self, event: dict[str, Any]) -> str | None:
        """Return the name of the range around an event on its own thread."""
        for each in self._ranges:
            if each["tid"] == event["tid"] and each["ts"] <= event["ts"] < each["ts"] + each["dur"]:
                return str(each["name"])
        return None


def overlaps(kernels: Sequence[Kernel], one: str, others: Sequence[str | None]) -> list[tuple[Kernel, Kernel]]:
    """Return pairs of kernels of one range and of the others (None: of no range) that overlap on different streams.

    Of the one range only the stream of its longest kernel counts, which is the averaging. The kernels between the
    chunks of a snapshot are on a stream of their own, and overlap with training in any case.
    """
    side = [kernel for kernel in kernels if kernel.launched_by == one]
    longest = max(side, key=lambda kernel: kernel.end - kernel.begin, default=None)
    side = [kernel for kernel in side if longest is not None and kernel.stream == longest.stream]
    main = [kernel for kernel in kernels if kernel.launched_by in others]
    return [(a, b) for a in side for b in main if a.stream != b.stream and max(a.begin, b.begin) < min(a.end, b.end)]
