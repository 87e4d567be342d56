"""What a listing of a snapshot folder is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nitrous_ema._base.processes import ProcessState
from nitrous_ema.errors import SnapshotDamaged, SnapshotMismatch
from nitrous_ema.snapshots.header import Header, Lineage, Stamp
from nitrous_ema.snapshots.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A committed snapshot: enough to read any part of it at its position."""

    paths: tuple[Path, ...]
    """One file per rank. A snapshot that ``write`` returned has only the file of the writing rank."""
    headers: tuple[Header, ...]
    """What each of these files says about itself."""

    @property
    def stamp(self) -> Stamp:
        """Step, time, run and lineage; those of the first file."""
        return self.headers[0].stamp

    @property
    def layout(self) -> Layout:
        """Tensors and profiles, and where they lie."""
        return self.headers[0].layout

    @property
    def step(self) -> int:
        """Number of update() calls before it."""
        return self.stamp.step

    @property
    def t(self) -> int | float:
        """Training time of the last update before it."""
        return self.stamp.t

    @property
    def run(self) -> str:
        """Run that wrote it."""
        return self.stamp.run

    @property
    def data_begin(self) -> int:
        """Position in the first file of its layout's position 0."""
        return self.headers[0].data_begin

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(header.file_bytes for header in self.headers)


@dataclass(frozen=True, slots=True)
class Incomplete:
    """A snapshot's folder without a snapshot: still being written, or never finished."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One training history, as far as its files can be believed."""

    lineage: Lineage
    """Its runs, each with the step at which it was left; of a run with damaged snapshots only, just that run. Empty if
    the folder has no snapshot."""
    snapshots: tuple[Snapshot, ...]
    """The good ones, ascending by step."""
    damaged: tuple[SnapshotDamaged | SnapshotMismatch, ...]
    """What is wrong with the others, by step; each has a ``path`` and a ``step``."""


@dataclass(frozen=True, slots=True)
class TemporaryFile:
    """A file that is being written, or that a process left when it died."""

    path: Path
    bytes: int
    writer: ProcessState
    """What became of its writer. Only a file whose writer is "gone" is removed when the next run starts."""


@dataclass(frozen=True, slots=True)
class VerificationFailure:
    """What ``verify`` found wrong with one file."""

    path: Path
    step: int
    chunk: int | None
    """Index of the chunk with the wrong checksum; None where something else is wrong."""
    message: str
