"""A file system that records the most bytes that a folder ever held."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from nitrous_ema.snapshots.filesystem import FileSystem
from tests.support.fakes import QuickFiles


class WeighingFiles(QuickFiles):
    """Records the most bytes that were ever in a folder, hidden and unfinished files included."""

    def __init__(self, root):
        self.root, self.most = root, 0
        self.lock = threading.Lock()

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if not hasattr(FileSystem, name):
            return found

        def weighed(*args, **kwargs):
            result = found(*args, **kwargs)
            with self.lock:
                self.most = max(self.most, weight(self.root))
            return result

        return weighed


def weight(root):
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):  # renamed or removed meanwhile
                total += os.stat(Path(folder) / name).st_size
    return total
