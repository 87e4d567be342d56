"""The fake device as torch sees it: `register()` makes "laggy" a device of this process, permanently.

Call it only in a process of its own (`run.py` does): it renames torch's PrivateUse1 backend, and from then on
`torch.accelerator.current_accelerator()` is laggy.
"""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import torch

NAME = "laggy"
DEVICES = 2
POLICIES = {"eager": 0, "lazy": 1, "random": 2}
COUNTERS = ("submitted", "ran", "pending", "allocations", "frees", "reuses")

_library: ctypes.CDLL | None = None


class KernelFailed(RuntimeError):
    """A queued op raised when it ran, and no caller has waited for the device since."""


class Stream(torch.Stream):
    """The counterpart of `torch.cuda.Stream`. The generic `torch.Stream` is not an instance of it."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        if kwargs:
            return super().__new__(cls, **kwargs)
        index = torch.accelerator.current_device_index() if device is None else torch.device(device).index
        return super().__new__(cls, device=torch.device(NAME, index or 0), priority=priority)


class Event(torch.Event):
    """The counterpart of `torch.cuda.Event`, with the arguments that the generic `torch.Event` ignores.

    It is not interchangeable with a generic event, and a generic stream is refused. On CUDA the two are structures of
    different layout and torch does not check which is given (torch/csrc/Stream.cpp, torch/csrc/cuda/Event.cpp). Here a
    generic stream that waits for this event waits for nothing, which a test sees as wrong numbers. `record()` with no
    argument, while the stream is current, is right everywhere.
    """

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        return super().__new__(cls, NAME, enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._event = torch.Event(NAME, enable_timing=enable_timing)
        self.blocking = blocking

    def record(self, stream: Stream | None = None) -> None:
        self._event.record(_own(stream))

    def wait(self, stream: Stream | None = None) -> None:
        self._event.wait(_own(stream))

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed_time(self, end_event: Event) -> float:
        return self._event.elapsed_time(end_event._event)


class device:
    """Makes a laggy device current for a block."""

    def __init__(self, which: Any) -> None:
        self.index = which if isinstance(which, int) else torch.device(which).index
        self.before = -1

    def __enter__(self) -> device:
        self.before = torch.accelerator.current_device_index()
        if self.index is not None and self.index >= 0:
            torch.accelerator.set_device_index(self.index)
        return self

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_device_index(self.before)


def current_stream(which: Any = None) -> Stream:
    """Return the current stream of a device as a device-specific stream, as `torch.cuda.current_stream()` does."""
    generic = torch.accelerator.current_stream(which)
    return Stream(
        stream_id=generic.stream_id,
        device_index=generic.device_index,
        device_type=generic.device_type,
    )


def set_policy(policy: str, seed: int = 0) -> None:
    """Start a new schedule; queued work runs to its end under the old schedule.

    Raises:
        KernelFailed: an op failed under the old schedule.
    """
    error = _library.laggy_reset(POLICIES[policy], seed).decode()
    if error:
        raise KernelFailed(f"laggy: a kernel failed under the schedule that ends here: {error}")


def hold_copies(let_through: int = 0) -> None:
    """Hold copies to the host from now on, with all work behind them, as if they took long.

    The hold ends with ``release_copies()``, or when this thread waits for the device.

    Args:
        let_through: How many copies still run.
    """
    if _library is not None:
        _library.laggy_hold_copies(let_through)


def release_copies() -> None:
    """End the hold of ``hold_copies``."""
    if _library is not None:
        _library.laggy_release_copies()


def is_held_up(index: int = 0) -> bool:
    """Return whether work that this thread queues next on a device would come after a held copy."""
    return _library is not None and bool(_library.laggy_is_held_up(index))


def counters() -> dict[str, int]:
    """Return counts since the process began: tasks submitted, run and pending; blocks allocated, freed and reused."""
    return {name: _library.laggy_counter(index) for index, name in enumerate(COUNTERS)}


def take_host_waits() -> list[str]:
    """Return the calls of *this thread* since its last call here that may stop the host on a real device.

    Empty where laggy is not a device of this process, so that a scenario may call this on the CPU too.
    """
    if _library is None:
        return []
    return _library.laggy_take_host_waits().decode().splitlines()


def synchronous_ops() -> list[str]:
    """Return the ops of all threads that were not queued but drained the device, each with the reason."""
    return _library.laggy_synchronous_ops().decode().splitlines()


def register(library: Path) -> None:
    """Make "laggy" a device type of this process, with two devices and `torch.laggy` as its module."""
    global _library
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(str(library))
    _library = ctypes.CDLL(str(library))
    _library.laggy_reset.argtypes = [ctypes.c_int, ctypes.c_uint64]
    _library.laggy_hold_copies.argtypes = [ctypes.c_int64]
    _library.laggy_counter.restype = ctypes.c_int64
    for function in (_library.laggy_reset, _library.laggy_take_host_waits, _library.laggy_synchronous_ops):
        function.restype = ctypes.c_char_p
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()


def _own(stream: Stream | None) -> Stream:
    if stream is not None and not isinstance(stream, Stream):
        raise TypeError(f"torch.laggy.Event takes a torch.laggy.Stream or None, not {type(stream).__name__}")
    return current_stream() if stream is None else stream


def _module() -> types.ModuleType:
    """Return `torch.laggy`: the part of a device module that torch itself and portable code use."""
    module = types.ModuleType(f"torch.{NAME}")
    contents: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "device": device,
        "current_stream": current_stream,
        "set_stream": torch.accelerator.set_stream,
        "synchronize": torch.accelerator.synchronize,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: DEVICES,
        "current_device": torch.accelerator.current_device_index,
        "set_device": torch.accelerator.set_device_index,
        # One generator for host and device: a program draws the same numbers on both.
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda which=None: torch.get_rng_state(),
        "set_rng_state": lambda state, which=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16, torch.float32],
    }
    module.__dict__.update(contents)
    sys.modules[module.__name__] = module
    return module
