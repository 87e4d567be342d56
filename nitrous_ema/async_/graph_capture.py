"""Prevents the package's threads from ending a graph capture of the trainer.

While a stream is captured in the default mode (``capture_error_mode="global"``), a call that may not be part of a graph
ends the capture, also when another thread makes the call. Waiting for an event and querying an event are such calls.
A thread in the driver's *relaxed* mode may make them. torch has no binding that sets this mode (its NCCL watchdog sets
it in C++), so this module calls the driver directly. The relaxed mode still forbids events that were recorded in a
capture; the package's events never are.

CAPTURE-1  A thread sets the mode once, before its first wait    test_thread_is_relaxed_once_before_it_waits
    for an event or its first query of one.                      test_thread_is_relaxed_before_it_queries
CAPTURE-2  Where the driver has no such call, nothing else       test_driver_without_the_call_is_left_alone
    changes.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import suppress

import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED, hipStreamCaptureModeRelaxed

_thread = threading.local()  # the mode belongs to a thread, in the driver as well


def let_others_capture() -> None:
    """Put this thread in the relaxed mode, once."""
    if getattr(_thread, "is_relaxed", False):
        return
    # Set before the call: where the driver has no such function, it is not looked up again at every wait.
    _thread.is_relaxed = True
    library, function = _driver()
    with suppress(OSError, AttributeError):
        exchange = getattr(ctypes.CDLL(library), function)
        exchange(ctypes.byref(ctypes.c_int(_RELAXED)))


def _driver() -> tuple[str, str]:
    """Return the driver's library, and the name of its function that exchanges the mode at an address."""
    if torch.version.hip is not None:
        return "libamdhip64.so", "hipThreadExchangeStreamCaptureMode"
    return ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"), "cuThreadExchangeStreamCaptureMode"
