"""Writes snapshots until the disk refuses, then checks the folder: ``python -m tests.crash.fill FOLDER``.

It runs as a process of its own, for faults that must hit all of a process. Needs no torch. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from nitrous_ema.errors import SnapshotError
from nitrous_ema.snapshots import FileSystem, Layout, SnapshotStore, Stamp, TensorRecord
from tests.crash.runs import LINEAGES, A, content

LAYOUT = Layout(
    records=(TensorRecord(name="w", keys=("w",), dtype="F32", shape=(1000,), role="averaged"),),
    gammas=(6.94, 16.97),
    sigma_rels=(0.10, 0.05),
    chunk_bytes=2048,
)


class Blind(FileSystem):
    """A full disk is noticed when a file is preallocated."""

    def free_bytes(self, path: Path) -> int:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


class WithoutPreallocation(Blind):
    """A full disk is noticed in the middle of a file."""

    def preallocate(self, descriptor: int, size_bytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


NOTICED = {"before": FileSystem, "preallocating": Blind, "writing": WithoutPreallocation}


def fill(root: Path, files: FileSystem, most: int, limit_after: int | None) -> dict[str, object]:
    """Write up to ``most`` snapshots. Returns which were acknowledged, the errors, and the content of the folder."""
    store = SnapshotStore(root, files=files)
    acknowledged, errors = [], []
    for step in range(1, most + 1):
        if step - 1 == limit_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        try:
            if step == 1:
                store.prepare()
            data = content(LAYOUT.data_bytes, step, A, 0)
            stamp = Stamp(step=step, t=step, t_first=1, run=A, lineage=LINEAGES[A])
            store.write(LAYOUT, stamp, lambda data=data: [data[begin:end] for begin, end in LAYOUT.chunks])
            acknowledged.append(step)
        except SnapshotError as error:
            errors.append(str(error))
    return {
        "acknowledged": acknowledged,
        "errors": errors,
        "listed": [s.step for s in store.snapshots() if _data(s) == content(LAYOUT.data_bytes, s.step, A, 0)],
        "problems": [problem.message for problem in store.verify()],
        "left": [path.name for path in root.rglob(".*")],
        "open": [name for name in _open_files() if str(root) in name],
    }


def _data(snapshot: object) -> bytes:
    return snapshot.paths[0].read_bytes()[snapshot.data_begin :]


def _open_files() -> list[str]:
    links = Path("/proc/self/fd")
    return [os.readlink(links / number) for number in os.listdir(links) if os.path.lexists(links / number)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.fill", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=10, help="snapshots to write")
    parser.add_argument("--noticed", choices=NOTICED, default="before", help="when a full disk is noticed")
    parser.add_argument("--limit-after", type=int, help="after so many snapshots, limit files to 6000 bytes")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    print(json.dumps(fill(options.folder, NOTICED[options.noticed](), options.most, options.limit_after)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
