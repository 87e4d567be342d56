"""Snapshots of averages on disk: file format, commit, retention, removal and reading. Begin with ``store.py``."""

from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.header import Header, Stamp
from nitrous_ema.snapshots.layout import Entry, Layout, Span, TensorRecord
from nitrous_ema.snapshots.names import new_run_id
from nitrous_ema.snapshots.snapshot import Incomplete, Listing, Snapshot, TemporaryFile, VerificationFailure
from nitrous_ema.snapshots.store import SnapshotStore

__all__ = [
    "Entry",
    "FileSystem",
    "Header",
    "Incomplete",
    "Layout",
    "Listing",
    "Snapshot",
    "SnapshotStore",
    "Span",
    "Stamp",
    "TemporaryFile",
    "TensorRecord",
    "VerificationFailure",
    "new_run_id",
]
