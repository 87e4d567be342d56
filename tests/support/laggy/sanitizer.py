"""torch's CUDA sanitizer on the laggy device: the same rules, fed by Python instead of by hooks that only CUDA has.

The programs that the CUDA tests run under ``TORCH_CUDA_SANITIZER=1`` run under this sanitizer first. A report on CUDA
is then not caused by how the sanitizer sees this library; for instance, it ignores ``query()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.cuda import _sanitizer
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nitrous_ema.async_ import lanes
from tests.support.laggy.device import NAME

_Event, _Stream = torch.Event, torch.Stream
_handler = _sanitizer.EventHandler()  # of the block that was entered last


def _key(stream: Any = None) -> int:
    stream = torch.accelerator.current_stream() if stream is None else stream
    return 1000 * stream.device_index + stream.stream_id


class _TracedEvent(_Event):
    def record(self, stream: Any = None) -> None:
        super().record(*[] if stream is None else [stream])
        _handler._handle_event_record(id(self), _key(stream))

    def wait(self, stream: Any = None) -> None:
        super().wait(*[] if stream is None else [stream])
        _handler._handle_event_wait(id(self), _key(stream))

    def synchronize(self) -> None:
        super().synchronize()
        _handler._handle_event_synchronization(id(self))


class _TracedStream(_Stream):
    def wait_event(self, event: Any) -> None:
        super().wait_event(event)
        _handler._handle_event_wait(id(event), _key(self))

    def wait_stream(self, other: Any) -> None:
        event = _TracedEvent(NAME)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        super().synchronize()
        _handler._handle_stream_synchronization(_key(self))


class _Arguments(_sanitizer.ArgumentHandler):
    def _handle_argument(self, value: Any, is_write: bool, metadata_only: bool, *names: Any, **more: Any) -> None:
        if isinstance(value, torch.Tensor) and value.device.type == NAME and value.numel():
            if is_write:
                self.dataptrs_written.add(value.data_ptr())
            elif not metadata_only:
                self.dataptrs_read.add(value.data_ptr())
            self.tensor_aliases.setdefault(value.data_ptr(), [])


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.races: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_factory = bool(_sanitizer.FACTORY_FUNCTION_REGEX.match(func._schema.name))
        arguments = _Arguments()
        arguments.parse_inputs(func._schema, args, kwargs, is_factory=is_factory)
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        outputs = func(*args, **kwargs)
        arguments.parse_outputs(func._schema, outputs, is_factory=is_factory)
        for leaf in _tensors(outputs):
            if leaf.untyped_storage().data_ptr() not in given:  # allocated now: earlier accesses are over
                _handler._handle_memory_allocation(leaf.data_ptr())
        written = arguments.dataptrs_written
        read = arguments.dataptrs_read - written
        errors = _handler._handle_kernel_launch(
            _key(), read, written, arguments.outputs, func._schema, arguments.tensor_aliases
        )
        self.races += [f"{error.previous_access.operator} / {error.current_access.operator}" for error in errors]
        return outputs


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = _pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type == NAME]


@contextmanager
def sanitized() -> Iterator[list[str]]:
    """Yield a list, to which the sanitizer adds every race that it sees in the block."""
    global _handler
    _handler = _sanitizer.EventHandler()
    mode = _Mode()

    def current_stream(device: torch.device) -> _TracedStream:
        stream = torch.accelerator.current_stream(device)
        return _TracedStream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Event", _TracedEvent))
        stack.enter_context(mock.patch.object(torch, "Stream", _TracedStream))
        stack.enter_context(mock.patch.object(lanes, "_current_stream", current_stream))
        stack.enter_context(mode)
        yield mode.races
