"""Everything the package raises on purpose, under one root.

A user's mistake at construction or in an argument is a plain ``ValueError`` or ``TypeError``. What the world does to
us (files, disks, other processes, weights that change behind our back) has a class here, with the evidence as
attributes, so that a caller can act on it without reading the message.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parent / "_")[:-1]  # with the separator


class NitrousError(Exception):
    """Root of the package's errors. Keyword arguments become attributes."""

    def __init__(self, message: str, **evidence: Any) -> None:
        super().__init__(message)
        for name, value in evidence.items():
            setattr(self, name, value)


class NitrousWarning(UserWarning):
    """Root of the package's warnings: something was done differently from what was asked, or will surprise."""


def warn(message: str) -> None:
    """Warn the user, by a ``NitrousWarning`` that names the line outside of this package from which it was called."""
    depth, frame = 2, sys._getframe(1)  # 1 would be this line
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, NitrousWarning, stacklevel=depth)


class ClosedError(NitrousError, RuntimeError):
    """The EMA was closed; nothing more can be averaged or written with it."""


class UntrackableModelError(NitrousError, ValueError):
    """A tensor of the model cannot be averaged as it is."""

    name: str
    """Canonical name of the tensor or module, empty if it concerns the whole model."""


class UncopyableModelError(NitrousError, TypeError):
    """No second module can be built from the model; it can still be tracked, snapshotted and synthesized."""

    name: str
    """Name of the submodule that cannot be copied, empty for the root."""


class UnsafeReadError(NitrousError, RuntimeError):
    """Weights were written while the EMA could still have been reading them (``read="guarded"``)."""

    name: str
    """Canonical name of the tensor that was written, or empty where no single tensor is known."""


class SnapshotError(NitrousError):
    """Something is wrong with a snapshot or its folder."""

    path: Path
    """The file or folder in question."""


class SnapshotNotFound(SnapshotError, LookupError):
    """No committed snapshot has the asked step or run."""

    nearest: Sequence[int]
    """Committed steps nearest to the asked one, ascending; empty where there are none."""


class SnapshotDamaged(SnapshotError):
    """A committed file does not hold what was written: wrong size, header or checksum."""

    step: int | None
    """Step of the damaged snapshot, where the file name tells it."""
    chunk: int | None
    """Index of the chunk whose checksum is wrong; None where the damage is elsewhere."""


class SnapshotMismatch(SnapshotError):
    """Two snapshots, or a snapshot and a model, do not belong together."""


class SnapshotWriteError(SnapshotError):
    """A snapshot could not be written. The training state is untouched; the cause is chained."""

    step: int
    """Step of the snapshot that does not exist."""


class WorkerError(NitrousError):
    """The synthesis process failed."""

    exit_code: int
    """Exit status of the process."""
    stderr: str
    """The last part of what it wrote to stderr."""


class EvaluationError(NitrousError):
    """The function that a sweep evaluates averages with failed; its own error is chained. Results so far are kept."""

    step: int
    """Step at which the average ends that it was given."""
    sigma_rel: float
    """Length of that average."""


class ResultsError(NitrousError):
    """A file is not one of a sweep's results."""

    path: Path
    """The file."""
    line: int
    """Number of the line that is no result; 0 if there is none at all."""


class MissingExtraError(NitrousError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""
