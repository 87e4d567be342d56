"""What the synthesis process says to people, and to the process that started it, on stderr."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema._base.exit_status import to_stderr

if TYPE_CHECKING:
    from nitrous_ema.synthesis.plan import Plan

WARNING = "synthesize: warning: "
"""How a line begins that warns of the averages that are going to be written."""
PROGRESS = '{"progress": '
"""How a line begins that tells the progress to a program."""

_TEXT_SECONDS = 0.5
_JSON_SECONDS = 0.1


def log(line: str) -> None:
    """Tell something."""
    to_stderr(f"synthesize: {line}\n")


def log_plan(plan: Plan, condition: float) -> None:
    """Tell what is read, and how good the averages will be."""
    target = plan.target
    log(
        f"step {target.step} of run {target.run}: {pluralize(len(plan.gammas), 'average')} from "
        f"{pluralize(len(plan.columns), 'column')} of {pluralize(len(plan.steps), 'snapshot')}, "
        f"{format_bytes(plan.bytes_to_read)} to read"
    )
    report = plan.report
    log(
        f"profile error {max(report.profile_error):.2g}; rounding of a weight {max(report.rounding):.1e}, "
        f"{max(report.weight_l2):.3g} times that of one snapshot; condition {condition:.3g}"
    )
    if plan.tolerance > 0:
        log(
            f"tolerance {plan.tolerance:g}: {len(plan.steps)} of {plan.candidates} snapshots, not less than "
            f"{plan.lower_bound} give all averages so well; with all, profile error "
            f"{max(plan.profile_error_of_all):.2g}; at the least error, rounding times {max(plan.least_error_l2):.3g}"
        )
    for warning in plan.report.warnings:
        to_stderr(f"{WARNING}{warning}\n")


class TextProgress:
    """Bytes read, rate and time left: one line that is written over on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()
        self._on_terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Tell it, if that is due."""
        now = time.monotonic()
        if done < total and now - self._told < _TEXT_SECONDS:
            return
        self._told = now
        rate = done / max(now - self._began, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if done < total else f"{now - self._began:.1f} s"
        line = (
            f"read {format_bytes(done)} of {format_bytes(total)} ({done / total:.0%}), {format_bytes(rate)}/s, {left}"
        )
        to_stderr(f"\r{line}\x1b[K" if self._on_terminal else f"{line}\n")

    def end(self) -> None:
        """Leave the line."""
        if self._on_terminal:
            to_stderr("\n")


class JsonProgress:
    """The same as lines of JSON."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._told = -_JSON_SECONDS

    def __call__(self, done: int, total: int) -> None:
        """Tell it, if that is due."""
        now = time.monotonic()
        if done < total and now - self._told < _JSON_SECONDS:
            return
        self._told = now
        to_stderr(f"{PROGRESS}{json.dumps({'step': self._step, 'done': done, 'total': total})}}}\n")

    def end(self) -> None:
        """Nothing is left to do."""


def progress_of(step: int, *, as_json: bool, as_text: bool) -> TextProgress | JsonProgress | None:
    """How the progress at one step is told, if it is."""
    if as_json:
        return JsonProgress(step)
    return TextProgress() if as_text or sys.stderr.isatty() else None
