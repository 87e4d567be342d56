"""``nitrous-ema synthesize``: the synthesis process in this one. On a terminal its outputs are rows of a table.

In a pipe, or with ``--json``, stdout gets the JSON lines of ``python -m nitrous_ema.async_.synthesize_worker``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nitrous_ema._base.arguments import format_bytes
from nitrous_ema.async_ import synthesize_worker
from nitrous_ema.cli.terminal import percent, show

if TYPE_CHECKING:
    from nitrous_ema.synthesis.worker.output_record import Output

_WIDTHS = (10, 9, 10, 9, 7)  # of the columns, except for the last one
_ERASE_LINE = "\r\x1b[K"


def main(arguments: Sequence[str]) -> int:
    """Run the worker in this process; return its exit status.

    Args:
        arguments: Command line arguments after ``synthesize``.
    """
    synthesize_worker.use_one_thread_per_product()
    table = OutputTable() if sys.stdout.isatty() else None
    return synthesize_worker.main(arguments, program="nitrous-ema synthesize", show=table)


class OutputTable:
    """A table on stdout that gets one row for each output, as soon as the output is durable."""

    def __init__(self) -> None:
        self._has_head = False

    def __call__(self, output: Output) -> None:
        """Print the row of one output; the first row comes after the names of the columns."""
        if sys.stderr.isatty():  # the row takes the place of the line of progress, which is printed again below it
            sys.stderr.write(_ERASE_LINE)
            sys.stderr.flush()
        if not self._has_head:
            show(_row("step", "sigma_rel", "error", "size", "", "file"))
            self._has_head = True
        size, error = format_bytes(output.file_bytes), percent(output.profile_error)
        show(_row(str(output.step), f"{output.sigma_rel:.6g}", error, size, output.state, str(output.path)))


def _row(*cells: str) -> str:
    return "  ".join([*(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=False)), cells[-1]])
