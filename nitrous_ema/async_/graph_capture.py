"""What threads of ours do so as not to end a graph capture of the trainer's.

While a stream is captured in the default mode (``capture_error_mode="global"``), a call that may not be part of a graph
ends the capture, from whichever thread it comes; waiting for an event and asking for one are such calls. A thread that
has put itself in the relaxed mode may make them. torch has no binding for that (its NCCL watchdog does the same in
C++), so the driver is asked directly. The relaxed mode still forbids events that were recorded in a capture; ours are
not.

C1  A thread asks once, before its first wait for an event.   test_thread_is_relaxed_once_before_it_waits
C2  Where the driver has no such call, nothing else changes.  test_driver_without_the_call_is_left_alone
"""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import suppress

import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED, hipStreamCaptureModeRelaxed

_thread = threading.local()


def let_others_capture() -> None:
    """Put this thread in the relaxed mode, once."""
    if getattr(_thread, "is_relaxed", False):
        return
    _thread.is_relaxed = True
    library, function = _driver()
    with suppress(OSError, AttributeError):
        exchange = getattr(ctypes.CDLL(library), function)
        exchange(ctypes.byref(ctypes.c_int(_RELAXED)))


def _driver() -> tuple[str, str]:
    """The library of the driver, and its function that takes a mode by address."""
    if torch.version.hip is not None:
        return "libamdhip64.so", "hipThreadExchangeStreamCaptureMode"
    return ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"), "cuThreadExchangeStreamCaptureMode"
