"""Snapshots of a few hundred bytes, and file systems that log their calls, for tests of the protocols."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from nitrous_ema.snapshots import FileSystem, Layout, Stamp, TensorRecord

A, B, C = (f"2026112{day}T101530.123456-1a2b3c4d" for day in (1, 2, 3))

LAYOUT = Layout(
    records=(
        TensorRecord(name="w", keys=("w",), dtype="F32", shape=(10, 10), role="averaged"),
        TensorRecord(name="n", keys=("n",), dtype="I64", shape=(3,), role="copied"),
    ),
    gammas=(6.94, 16.97),
    sigma_rels=(0.10, 0.05),
    chunk_bytes=256,
)


def stamp(step=5, run=A, lineage=None, **more):
    return Stamp(step=step, t=step, t_first=1, run=run, lineage=lineage or ((run, None),), **more)


def content(step=5):
    return np.random.default_rng(step).integers(0, 256, LAYOUT.data_bytes, np.uint8)


def chunks_of(step=5, layout=LAYOUT):
    return lambda: (content(step)[begin:end] for begin, end in layout.chunks)


def commit(store, step=5, run=A, lineage=None, **more):
    return store.write(LAYOUT, stamp(step, run, lineage, **more), chunks_of(step))


def steps(snapshots):
    return [(snapshot.step, snapshot.run) for snapshot in snapshots]


def everything_in(root):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(root).rglob("*"))}


class Recorded(FileSystem):
    """Logs every call that changes or syncs something, such as ("write_at", name of the file, position, bytes)."""

    def __init__(self):
        self.calls = []
        self.open = {}

    def note(self, call, name, *more):
        self.calls.append((call, str(name), *more))

    def open_exclusive(self, path):
        self.note("open", path.name)
        descriptor = super().open_exclusive(path)
        self.open[descriptor] = path.name
        return descriptor

    def preallocate(self, descriptor, size_bytes):
        self.note("preallocate", self.open[descriptor], size_bytes)
        super().preallocate(descriptor, size_bytes)

    def write_at(self, descriptor, buffer, offset):
        self.note("write", self.open[descriptor], offset, len(buffer))
        return super().write_at(descriptor, buffer, offset)

    def fsync(self, descriptor):
        self.note("fsync", self.open[descriptor])
        super().fsync(descriptor)

    def close(self, descriptor):
        super().close(descriptor)
        self.note("close", self.open.pop(descriptor, "read"))

    def rename(self, source, target):
        self.note("rename", source.name, target.name)
        super().rename(source, target)

    def rename_new(self, source, target):
        self.note("rename", source.name, target.name)
        super().rename_new(source, target)

    def unlink(self, path):
        self.note("unlink", path.name)
        super().unlink(path)

    def make_folder(self, path):
        self.note("make_folder", path.name)
        super().make_folder(path)

    def remove_folder(self, path):
        self.note("remove_folder", path.name)
        super().remove_folder(path)

    def fsync_folder(self, path):
        self.note("fsync_folder", path.name)
        super().fsync_folder(path)


class KeepsFolders(Recorded):
    """Renames no folder, as object stores that are mounted."""

    def __init__(self, number=errno.EXDEV):
        super().__init__()
        self.number = number

    def rename(self, source, target):
        if source.is_dir():
            raise OSError(self.number, os.strerror(self.number))
        super().rename(source, target)

    rename_new = rename


class OnePass(Recorded):
    """Takes the bytes of a file in their order only, and renames nothing, as object stores that are mounted."""

    def __init__(self, *, takes_offsets=False, renames=False):
        super().__init__()
        self.takes_offsets, self.renames = takes_offsets, renames

    def write_at(self, descriptor, buffer, offset):
        if not self.takes_offsets and offset != os.fstat(descriptor).st_size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().write_at(descriptor, buffer, offset)

    def rename(self, source, target):
        if not self.renames:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        super().rename(source, target)

    rename_new = rename


class Failing(Recorded):
    """Fails some calls, after they were logged: {(call, number of such calls before): errno}."""

    def __init__(self, failures):
        super().__init__()
        self.failures = dict(failures)
        self.counts = {}

    def note(self, call, name, *more):
        super().note(call, name, *more)
        count = self.counts.get(call, 0)
        self.counts[call] = count + 1
        if (number := self.failures.get((call, count))) is not None:
            raise OSError(number, os.strerror(number))
