"""What a listing of a snapshot folder is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nitrous_ema.snapshots.format import Header, Layout, Stamp


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


@dataclass(frozen=True, slots=True)
class Problem:
    """What ``verify`` found wrong with one file."""

    path: Path
    step: int
    chunk: int | None
    """Index of the chunk with the wrong checksum; None where something else is wrong."""
    message: str
