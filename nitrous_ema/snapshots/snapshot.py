"""Records of a folder of snapshots: snapshots, incomplete ones, listings, temporary files, failed checks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from nitrous_ema._base.arguments import format_bytes, pluralize
from nitrous_ema._base.processes import ProcessState, process_state
from nitrous_ema.errors import SnapshotMismatch, SnapshotUnreadable
from nitrous_ema.snapshots.header import Header, Lineage, Stamp
from nitrous_ema.snapshots.layout import Layout, TensorRecord


@dataclass(frozen=True, slots=True)
class RankFiles(Sequence[Path]):
    """The files of several ranks, in their order.

    A path is made when it is used: a listing of 500 snapshots of 256 ranks would make 128 000.
    """

    folder: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> RankFiles: ...

    def __getitem__(self, index: int | slice) -> Path | RankFiles:
        if isinstance(index, slice):
            return RankFiles(self.folder, self.names[index])
        return self.folder / self.names[index]


def rank_files(folder: Path, names: tuple[str, ...]) -> Sequence[Path]:
    """Return the paths of a snapshot's files."""
    return (folder / names[0],) if len(names) == 1 else RankFiles(folder, names)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Snapshot:
    """A committed snapshot: its files, and the header of the first one. ``sharded`` reads those of the other ranks."""

    paths: Sequence[Path]
    """One file per rank. A snapshot that ``write`` returned has only the file of the writing rank."""
    headers: tuple[Header, ...]
    """The header of the first file. Of files that a newer version merged, the header of each."""

    @property
    def stamp(self) -> Stamp:
        """Step, time, run and lineage, from the first file."""
        return self.headers[0].stamp

    @property
    def layout(self) -> Layout:
        """Tensors and profiles, and their positions in the data of the first file."""
        return self.headers[0].layout

    @property
    def path(self) -> Path:
        """The first file."""
        return self.paths[0]

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The model's tensors."""
        return self.layout.records

    @property
    def step(self) -> int:
        """Number of update() calls before the snapshot."""
        return self.stamp.step

    @property
    def t(self) -> int | float:
        """Training time of the last update before the snapshot."""
        return self.stamp.t

    @property
    def run(self) -> str:
        """Run that wrote the snapshot."""
        return self.stamp.run

    def trainer_state(self) -> ProcessState:
        """Return whether the process that wrote the snapshot still runs (see ``processes.process_state``)."""
        return process_state(self.stamp.trainer, silent_seconds=time.time() - self.stamp.created_ns / 1e9)

    @property
    def is_finite(self) -> bool:
        """Whether no average has a value that is not finite, as far as the first file records it."""
        return not any(any(header.nonfinite or ()) for header in self.headers)

    @property
    def data_begin(self) -> int:
        """Position in the first file at which the data begins: position 0 of the layout."""
        return self.headers[0].data_begin

    @property
    def bytes(self) -> int:
        """Size of all files. For several ranks it is an upper bound, since the first rank has the largest parts."""
        return self.headers[0].file_bytes * len(self.paths)

    def __repr__(self) -> str:
        lengths = ", ".join(f"{length:g}" for length in self.layout.sigma_rels)
        return (
            f"<Snapshot of step {self.step}, t={self.t}, run {self.run}: {pluralize(len(self.records), 'tensor')}, "
            f"sigma_rels ({lengths}) as {self.layout.checkpoint_dtype}, {format_bytes(self.bytes)} in "
            f"{str(self.path.parent)!r}>"
        )


@dataclass(frozen=True, slots=True)
class Incomplete:
    """A snapshot's folder that holds no whole snapshot: it is still being written, or was never finished."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The snapshots of one training history, valid and damaged."""

    lineage: Lineage
    """The runs of the history, each with the step at which it was left. Only the last run if all of its snapshots are
    damaged. Empty if the folder has no snapshot."""
    snapshots: tuple[Snapshot, ...]
    """The valid snapshots, ascending by step."""
    damaged: tuple[SnapshotUnreadable | SnapshotMismatch, ...]
    """The errors of the damaged snapshots, by step; each has a ``path`` and a ``step``."""


@dataclass(frozen=True, slots=True)
class TemporaryFile:
    """A file that is being written, or that a process left when it died."""

    path: Path
    bytes: int
    writer: ProcessState
    """State of the process that wrote the file. The next run that starts removes only files whose writer is "gone"."""


@dataclass(frozen=True, slots=True)
class VerificationFailure:
    """A failed check of one file, found by ``verify``."""

    path: Path
    step: int
    chunk: int | None
    """Index of the chunk with the wrong checksum; None if another check failed."""
    message: str
