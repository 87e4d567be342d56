"""Errors and warnings of the package, each under one root class.

A mistake in an argument raises a plain ``ValueError`` or ``TypeError``. Failures outside the caller's control (files,
disks, other processes, weights that change while they are read) have a class here. Their evidence is in attributes, so
that a caller can handle them without parsing the message.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The package's folder with a separator at the end. It is derived from the place of this file, the package's root.
_PACKAGE = str(Path(__file__).parent / "_")[:-1]


class NitrousError(Exception):
    """Root of the package's errors.

    Args:
        message: The text of the error.
        **evidence: Values that become attributes of the same names.
    """

    def __init__(self, message: str, **evidence: Any) -> None:
        super().__init__(message)
        for name, value in evidence.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        return _printable_lines(super().__str__())


class NitrousWarning(UserWarning):
    """Root of the package's warnings: the result differs from the request, or is less accurate than expected."""


def warn(message: str) -> None:
    """Issue a ``NitrousWarning`` that points at the line of the caller's code, outside this package."""
    depth, frame = 2, sys._getframe(1)  # stacklevel 1 is the call below, 2 is the caller of this function
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(_printable_lines(message), NitrousWarning, stacklevel=depth)


def printable(text: str) -> str:
    r"""Return text with everything escaped that no terminal should interpret.

    Text from files, such as the host name in a snapshot's header, may contain escape sequences, line breaks that forge
    a line, or marks that reverse the direction of writing. File names may contain bytes that are not UTF-8, which no
    stream can write. All of them become escapes such as ``\x1b`` or ``\udcff``.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _printable_lines(text: str) -> str:
    """Return a message of several lines as ``printable`` does, with its line breaks unchanged."""
    return "\n".join(map(printable, text.split("\n")))


def bug(what: str) -> RuntimeError:
    """Return the error for a state that this package must never reach, whatever its caller does."""
    return RuntimeError(f"{what}; this is a bug in nitrous_ema, please report it.")


class ClosedError(NitrousError, RuntimeError):
    """The EMA is closed: it can neither average nor write any more."""


class UntrackableModelError(NitrousError, ValueError):
    """A tensor or module of the model does not support averaging."""

    name: str
    """Canonical name of the tensor or module, empty if the whole model is concerned."""


class UncopyableModelError(NitrousError, TypeError):
    """The model cannot be copied into a second module. It can still be tracked, snapshotted and synthesized."""

    name: str
    """Name of the submodule that cannot be copied, empty for the root."""


class UnsafeReadError(NitrousError, RuntimeError):
    """Weights were written while the EMA could still have been reading them (``read="guarded"``)."""

    name: str
    """Canonical name of the tensor that was written, empty if no single tensor is known."""


class SnapshotError(NitrousError):
    """A snapshot or its folder cannot be used: root of the errors about snapshots."""

    path: Path
    """The snapshot's file or folder."""


class SnapshotNotFound(SnapshotError, LookupError):
    """No committed snapshot has the requested step or run."""

    nearest: Sequence[int]
    """Committed steps nearest to the requested step, ascending; empty if the folder contains no snapshots."""


class SnapshotUnreadable(SnapshotError):
    """A committed file cannot be read: it is damaged, its disk fails, or it needs a newer version of this library."""

    step: int | None
    """Step of the snapshot; None if the file name contains no step."""


class SnapshotUnsupported(SnapshotUnreadable):
    """An intact file needs features of a newer version of this library."""

    requires: Sequence[str]
    """The features that this version does not know."""


class SnapshotUnavailable(SnapshotUnreadable):
    """A snapshot cannot be looked at: its disk or network file system fails, or this user may not read it.

    Nothing is known about the file itself.
    """


class SnapshotDamaged(SnapshotUnreadable):
    """A committed file differs from what was written: wrong size, invalid header or checksum mismatch."""

    chunk: int | None
    """Index of the chunk with the checksum mismatch; None for damage elsewhere."""


class SnapshotMismatch(SnapshotError):
    """Two snapshots, or a snapshot and a model, differ in their tensors, profiles or run."""


class SnapshotWriteError(SnapshotError):
    """A snapshot could not be written. The training state is not affected; the cause is chained."""

    step: int
    """Step of the snapshot that was not written."""


class NonFiniteError(SnapshotError, ArithmeticError):
    """An average in a snapshot has values that are not finite (``on_nonfinite="raise"``)."""

    step: int
    """Step of the snapshot."""
    name: str
    """Canonical name of the first tensor with such a value."""


class WorkerError(NitrousError):
    """The synthesis process failed."""

    exit_code: int
    """Exit status of the process."""
    stderr: str
    """The end of the process's stderr."""


class EvaluationError(NitrousError):
    """The caller's evaluation function raised during a sweep. Its error is chained; earlier results stay recorded."""

    step: int
    """Target step of the evaluated average."""
    sigma_rel: float
    """Length of the evaluated average."""


class ResultsError(NitrousError):
    """A file does not contain the results of a sweep."""

    path: Path
    """The file."""
    line: int
    """Number of the line that is not a result; 0 if the whole file is concerned."""


class MissingExtraError(NitrousError, ImportError):
    """An optional dependency is not installed; the message contains the pip command."""
