"""Snapshots of averages on disk: their file format, committing, reading and removing them; start at ``store.py``."""

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
