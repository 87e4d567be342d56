"""What the synthesis process prints on stderr: log lines and progress. Results on stdout are in ``output_record``."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema._base.exit_status import to_stderr
from nitrous_ema.errors import printable

if TYPE_CHECKING:
    from nitrous_ema.synthesis.plan import Plan

WARNING = "synthesize: warning: "
"""Start of a line that warns about the averages that are going to be written."""
PROGRESS = '{"progress": '
"""Start of a line that reports the progress to a program."""

_TEXT_SECONDS = 0.5
_JSON_SECONDS = 0.1


def log(line: str) -> None:
    """Print one line to stderr, with the name of this program and control characters escaped."""
    to_stderr(f"synthesize: {printable(line)}\n")


def log_warning(text: str) -> None:
    """Print a warning about the averages, which a job also has in its ``warnings``."""
    to_stderr(f"{WARNING}{printable(text)}\n")


def log_plan(plan: Plan, condition: float, *, verbose: bool) -> None:
    """Print what a plan reads and how accurate its averages will be, with the plan's warnings.

    Args:
        plan: The averages that are going to be written.
        condition: Condition number of the stored averages that the plan reads.
        verbose: Print condition, rounding and the bounds of the choice of snapshots, too.
    """
    target, report = plan.target, plan.report
    log(
        f"step {target.step} of run {target.run}: {pluralize(len(plan.gammas), 'average')} from "
        f"{pluralize(len(plan.columns), 'stored average')} of {pluralize(len(plan.steps), 'snapshot')}, "
        f"{format_bytes(plan.bytes_to_read)} to read, profile error up to {max(report.profile_error):.2g}"
    )
    if verbose:
        log(
            f"rounding error of a weight {max(report.rounding):.1e}, {max(report.weight_l2):.3g} times that of one "
            f"snapshot; condition number {condition:.3g}"
        )
    if verbose and plan.tolerance > 0:
        log(
            f"using {len(plan.steps)} of {plan.candidates} snapshots ({plan.lower_bound} is the proven minimum for "
            f"tolerance {plan.tolerance:g}); profile error with all snapshots {max(plan.profile_error_of_all):.2g}; "
            f"rounding amplification without the tolerance {max(plan.least_error_l2):.3g}"
        )
    for warning in report.warnings:
        log_warning(warning)


class TextProgress:
    """Progress as text: bytes read, rate and remaining time. On a terminal one line is overwritten."""

    def __init__(self) -> None:
        self._began = self._printed = time.monotonic()
        self._on_terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Print the progress if it is complete, or if the last line is old enough.

        Args:
            done: Bytes read so far.
            total: Bytes to read.
        """
        now = time.monotonic()
        if done < total and now - self._printed < _TEXT_SECONDS:
            return
        self._printed = now
        rate = done / max(now - self._began, 1e-9)
        remaining = f"{(total - done) / rate:.0f} s left" if done < total else f"{now - self._began:.1f} s"
        line = f"read {format_bytes(done)} of {format_bytes(total)} ({done / total:.0%}), {format_bytes(rate)}/s, "
        line += remaining
        to_stderr(f"\r{line}\x1b[K" if self._on_terminal else f"{line}\n")

    def end(self) -> None:
        """End the overwritten line, so that the next log line begins on its own."""
        if self._on_terminal:
            to_stderr("\n")


class JsonProgress:
    """Progress as lines of JSON, which a job parses.

    Args:
        step: The target step.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._printed = -_JSON_SECONDS

    def __call__(self, done: int, total: int) -> None:
        """Print the progress if it is complete, or if the last line is old enough; arguments as ``TextProgress``."""
        now = time.monotonic()
        if done < total and now - self._printed < _JSON_SECONDS:
            return
        self._printed = now
        to_stderr(f"{PROGRESS}{json.dumps({'step': self._step, 'done': done, 'total': total})}}}\n")

    def end(self) -> None:
        """Do nothing: every line is complete."""


def progress_of(step: int, *, as_json: bool, as_text: bool) -> TextProgress | JsonProgress | None:
    """Return the progress display for one target step; None if progress was not requested and stderr is no terminal.

    Args:
        step: The target step.
        as_json: Lines of JSON, which take precedence.
        as_text: Text, even if stderr is not a terminal.
    """
    if as_json:
        return JsonProgress(step)
    return TextProgress() if as_text or sys.stderr.isatty() else None
