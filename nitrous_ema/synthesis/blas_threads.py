"""Products of matrices on one thread each, whoever calls.

Threads of our own compute one tile each. A BLAS that divides a product among its threads again would hold them up, and
its results depend on how it divides. In a process of our own, variables of the environment say so before numpy is
loaded; in the user's process this is the way. Where the library is none of those known here, nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np  # noqa: F401 - its library is what this is about

# What numpy's own packages link, what distributions do, and what conda may: (read, set).
_NAMES = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)

_lock = threading.Lock()
_users = 0  # guarded by _lock, as is the next
_before = 1


@contextmanager
def one_thread_per_product() -> Iterator[None]:
    """Have numpy's matrix products use no threads of their own. May be entered several times at once."""
    global _users, _before
    read, write = _library()
    with _lock:
        if _users == 0:
            _before = read()
            write(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                write(_before)


@functools.cache
def _library() -> tuple[Callable[[], int], Callable[[int], object]]:
    """How many threads a product uses: to read, and to set."""
    linked = sys.modules.get("numpy._core._multiarray_umath") or sys.modules["numpy.core._multiarray_umath"]
    try:
        library = ctypes.CDLL(linked.__file__ or "")  # what is looked up in it is also searched in what it links
    except OSError:
        return (lambda: 1), (lambda _: None)
    for read, write in _NAMES:
        if hasattr(library, read) and hasattr(library, write):
            return getattr(library, read), getattr(library, write)
    return (lambda: 1), (lambda _: None)
