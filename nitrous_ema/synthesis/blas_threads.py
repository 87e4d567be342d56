"""Limit numpy's matrix products to one thread each while the engine runs.

Each thread of the engine computes one tile. A BLAS library that divided a product among threads of its own would
compete with them, and its results would depend on the division. The synthesis process sets environment variables before
numpy is loaded. In the user's process numpy is loaded already, so this module calls the functions of the BLAS library.
For an unknown library it does nothing.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np  # noqa: F401 - loads the BLAS library that this module limits

# Functions that read and set the number of threads: of numpy's own packages, of distributions, and of conda (MKL).
_NAMES = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)

_lock = threading.Lock()
_users = 0  # guarded by _lock; contexts that are entered
_threads_before = 1  # guarded by _lock; to be restored when the last context is left


@contextmanager
def one_thread_per_product() -> Iterator[None]:
    """Limit numpy's matrix products to one thread in all threads of this process. May be entered several times at once.

    The number of threads belongs to the whole process: the last context that is left restores it.
    """
    global _users, _threads_before
    read, write = _library()
    with _lock:
        if _users == 0:
            _threads_before = read()
            write(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                write(_threads_before)


@functools.cache
def _library() -> tuple[Callable[[], int], Callable[[int], object]]:
    """Return the functions that read and set the number of threads of a product; no-ops for unknown libraries."""
    linked = sys.modules.get("numpy._core._multiarray_umath") or sys.modules["numpy.core._multiarray_umath"]
    try:
        # A name that is looked up in numpy's extension module is also searched in the libraries that it links.
        library = ctypes.CDLL(linked.__file__ or "")
    except OSError:
        return (lambda: 1), (lambda _: None)
    for read, write in _NAMES:
        if hasattr(library, read) and hasattr(library, write):
            return getattr(library, read), getattr(library, write)
    return (lambda: 1), (lambda _: None)
