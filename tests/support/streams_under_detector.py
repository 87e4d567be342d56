"""The library's own lanes on streams and events of the race detector: one run covers all its legal orders.

``AcceleratorLane`` gets these streams and events in place of torch's. Every op on tensors is declared on the current
stream, with the reads and writes of its schema. Queries of the host (``is_reached``) are answered at random, because
the answers decide which work is queued where: each sequence of answers is a program of its own.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nitrous_ema.async_ import lanes
from tests.support import race_detector
from tests.support.race_detector import Checker


class Streams:
    """Streams of one made-up device; ``home`` is the trainer's.

    Args:
        seed: Of the answers to the host's queries of events.
    """

    def __init__(self, seed: int) -> None:
        self.checker = Checker()
        self.random = random.Random(seed)
        self._made = 0
        self.held: list[Any] = []  # every tensor that was used: the addresses identify them
        self.home = self.stream()
        self.current = self.home

    def stream(self) -> Stream:
        self._made += 1
        return Stream(self, f"stream {self._made}")

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def instead_of_torch(self) -> Iterator[None]:
        """Make lanes that are made and used in the block run on these streams, and declare all ops."""
        made_here = SimpleNamespace(
            Stream=lambda device: self.stream(),
            Event=lambda device=None, **options: Event(self),
            accelerator=SimpleNamespace(current_stream=lambda device: self.current, set_stream=self._set_stream),
            get_device_module=lambda device: SimpleNamespace(Event=lambda **options: Event(self)),
            no_grad=torch.no_grad,
            empty=torch.empty,
            uint8=torch.uint8,
        )
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(lanes, "torch", made_here))
            patches.enter_context(mock.patch.object(lanes, "_device_index", return_value=0))
            patches.enter_context(mock.patch.object(lanes, "_set_device_index"))
            patches.enter_context(mock.patch.object(lanes, "_restore_device_index"))
            patches.enter_context(mock.patch.object(race_detector.Span, "of", _span))
            patches.enter_context(_Declared(self))
            yield

    def _set_stream(self, stream: Stream) -> None:
        self.current = stream


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.device = torch.device("cpu")
        self.lane = race_detector.Lane(streams.checker, name)

    def wait_event(self, event: Event) -> None:
        self.lane.wait(event.event)

    def wait_stream(self, other: Stream) -> None:
        self.lane.wait(other.lane.record())

    def synchronize(self) -> None:
        self.lane.synchronize()

    def query(self) -> bool:
        self.lane.synchronize()
        return True


class Event:
    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.event = race_detector.Event(streams.checker)
        self._is_reached = True

    def record(self, stream: Stream | None = None) -> None:
        (stream or self._streams.current).lane.record(self.event)
        self._is_reached = False

    def wait(self) -> None:
        self._streams.current.wait_event(self)

    def synchronize(self) -> None:
        self.event.synchronize()
        self._is_reached = True

    def query(self) -> bool:
        """Return whether the event is reached, at a random time after its record; then the host is ordered after it."""
        if not self._is_reached and self._streams.random.random() < 0.2:
            self.synchronize()
        return self._is_reached


def _span(tensor: torch.Tensor) -> race_detector.Span:
    """Return a tensor's span by address, because the averages have several storages in the same memory."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return race_detector.Span(0, begin, begin + (reach + 1) * tensor.element_size() if tensor.numel() else begin)


class _Declared(TorchDispatchMode):
    """Queues every op that accesses memory on the current stream."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func.namespace != "aten":
            return func(*args, **kwargs)
        reads: list[torch.Tensor] = []
        writes: list[torch.Tensor] = []
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            (writes if is_write else reads).extend(tensors)
        results: list[Any] = []
        self._streams.held += [reads, writes, results]
        work: Callable[[], None] = lambda: results.append(func(*args, **kwargs))  # noqa: E731
        self._streams.current.lane.submit(work, reads=reads + writes, writes=writes, label=f"{func}")
        return results[0]


def in_thread(streams: Streams, work: Callable[[], None], name: str) -> race_detector.Clock:
    """Run work on a host thread of that name, ordered after this thread.

    Returns the clock to receive before anything that is ordered after the work. Raises what the work raised.
    """
    known, raised, ended = streams.checker.send(), [], []

    def run() -> None:
        streams.checker.receive(known)
        try:
            work()
        except BaseException as error:
            raised.append(error)
        ended.append(streams.checker.send())

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join(60)
    if raised:
        raise raised[0]
    return ended[0]
