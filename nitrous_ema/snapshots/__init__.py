"""Snapshots of averages on disk: their file format, and the folder that holds them."""

from nitrous_ema.snapshots.files import FileSystem
from nitrous_ema.snapshots.format import Entry, Header, Layout, Span, Stamp, TensorRecord, new_run_id
from nitrous_ema.snapshots.snapshot import Incomplete, Listing, Problem, Snapshot, Temporary
from nitrous_ema.snapshots.store import SnapshotStore

__all__ = [
    "Entry",
    "FileSystem",
    "Header",
    "Incomplete",
    "Layout",
    "Listing",
    "Problem",
    "Snapshot",
    "SnapshotStore",
    "Span",
    "Stamp",
    "Temporary",
    "TensorRecord",
    "new_run_id",
]
