"""A happens-before race detector for work on lanes, in pure Python on the CPU.

The laggy device (`tests/support/laggy`) runs the real stream calls and looks for wrong numbers. This detector checks
the order itself: one run proves, for the accesses that were declared, that *every* legal schedule is free of races.

- An *agent* is a lane or a host thread. Each has a vector clock {agent: count of its last known action}. An access,
  the n-th action of agent A, happened before B's next action if and only if n <= B's clock[A].
- Clocks are joined where one agent waits for another: a lane takes over its submitter's clock at submit(), and the
  clock of an event's lane at wait(); a host thread takes over a lane's clock at event.synchronize(), and another
  thread's clock by send() and receive() around a hand-off.
- Two accesses conflict if their bytes overlap and one of them writes. Conflicting accesses must be ordered.
- A freed tensor counts as written by its allocation lane: unordered readers lack a record_stream().

Work is also *executed*, eagerly, lazily or in random legal order, under a dispatch mode that sees the actual writes
of ops: a wrong declaration is an error, and the values are a second, independent verdict.

Not covered: whether an adapter maps lanes to real streams correctly (laggy tests that), deadlocks, work that bypasses
lanes.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]


class Race(AssertionError):
    """Two accesses to the same bytes with no order between them."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a storage. Two views of one flat buffer meet only where they overlap."""

    storage: int
    begin: int
    end: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Span:
        begin = tensor.storage_offset() * tensor.element_size()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = begin + (reach + 1) * tensor.element_size() if tensor.numel() else begin
        return cls(tensor.untyped_storage()._cdata, begin, end)

    def overlaps(self, other: Span) -> bool:
        return self.storage == other.storage and self.begin < other.end and other.begin < self.end

    def contains(self, other: Span) -> bool:
        return self.storage == other.storage and self.begin <= other.begin and other.end <= self.end


@dataclass(frozen=True, slots=True)
class Access:
    """One agent's read or write of a span, at its count-th action."""

    span: Span
    writes: bool
    agent: str
    count: int
    label: str


class _WriteObserver(TorchDispatchMode):
    """Collects the memory that ops write, by the alias annotations of their schemas."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Span] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            self.written += [Span.of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        return func(*args, **kwargs)


@dataclass(eq=False, slots=True)
class _Job:
    lane: str
    count: int
    run: Callable[[], None]
    after: list[_Job]
    done: bool = False


class Checker:
    """The clocks, the history of accesses, and the execution of the lanes' work.

    Args:
        execute: "eager", "lazy" (only work that a caller waits for, as late as possible) or the seed of a random order.
        compare_clocks: False leaves the verdict to the values alone.
    """

    def __init__(self, execute: str | int = "eager", *, compare_clocks: bool = True) -> None:
        self.execute = execute
        self.compare_clocks = compare_clocks
        self.lock = threading.RLock()  # guards all below, and the lanes
        self._clocks: dict[str, Clock] = {}
        self._history: dict[int, list[Access]] = {}
        self._pending: list[_Job] = []
        self._random = random.Random(execute)
        self._allocated: dict[int, tuple[str, torch.Tensor]] = {}  # kept alive: a storage's address names it
        self._also_used: dict[int, set[str]] = {}

    # ---- clocks

    def clock(self, agent: str) -> Clock:
        return self._clocks.setdefault(agent, {})

    def learn(self, agent: str, known: Clock) -> None:
        clock = self.clock(agent)
        for other, count in known.items():
            clock[other] = max(clock.get(other, 0), count)

    def act(self, agent: str) -> int:
        clock = self.clock(agent)
        clock[agent] = clock.get(agent, 0) + 1
        return clock[agent]

    @property
    def this_thread(self) -> str:
        return f"host:{threading.current_thread().name}"

    # ---- hand-off between host threads: around queue.put and get, Thread.start, Future.result

    def send(self) -> Clock:
        with self.lock:
            self.act(self.this_thread)
            return dict(self.clock(self.this_thread))

    def receive(self, known: Clock) -> None:
        with self.lock:
            self.learn(self.this_thread, known)

    # ---- accesses

    def host_access(
        self, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), label: str
    ) -> None:
        """Declare that this host thread accesses tensors itself, now."""
        with self.lock:
            self.act(self.this_thread)
            self.note(self.this_thread, reads, writes, label)

    def note(self, agent: str, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor], label: str) -> list[Span]:
        """Check accesses of an agent's current action against all earlier accesses; return the written spans."""
        written = [Span.of(tensor) for tensor in writes]
        accesses = [(Span.of(tensor), False) for tensor in reads] + [(span, True) for span in written]
        for span, is_write in accesses:
            access = Access(span, is_write, agent, self.clock(agent)[agent], label)
            earlier = self._history.setdefault(span.storage, [])
            for other in earlier:
                self._check_order(other, access)
            earlier.append(access)
        return written

    def _check_order(self, earlier: Access, access: Access) -> None:
        conflict = (access.writes or earlier.writes) and access.span.overlaps(earlier.span)
        known = self.clock(access.agent).get(earlier.agent, 0)
        if self.compare_clocks and conflict and earlier.count > known:
            kinds = ["write" if one.writes else "read" for one in (access, earlier)]
            raise Race(
                f"the {kinds[0]} by {access.agent} in {access.label!r} is not ordered after "
                f"the {kinds[1]} by {earlier.agent} in {earlier.label!r}"
            )

    # ---- memory

    def allocated(self, tensor: torch.Tensor, lane: Lane) -> None:
        with self.lock:
            self._allocated[tensor.untyped_storage()._cdata] = (lane.name, tensor)

    def record_stream(self, tensor: torch.Tensor, lane: Lane) -> None:
        with self.lock:
            self._also_used.setdefault(tensor.untyped_storage()._cdata, set()).add(lane.name)

    def free(self, tensor: torch.Tensor, label: str = "free") -> None:
        """Free a tensor: from now on the allocation lane's next work may use its block."""
        with self.lock:
            storage = tensor.untyped_storage()._cdata
            lane, _ = self._allocated[storage]
            known = dict(self.clock(lane))
            for agent, count in self.clock(self.this_thread).items():
                known[agent] = max(known.get(agent, 0), count)
            for access in self._history.pop(storage, []):
                is_kept = access.agent in self._also_used.get(storage, ())
                if not is_kept and access.count > known.get(access.agent, 0):
                    raise Race(
                        f"{label!r}: lane {lane} may use the block again while {access.agent} still runs "
                        f"{access.label!r}: record_stream is missing"
                    )

    # ---- execution

    def enqueue(self, job: _Job) -> None:
        self._pending.append(job)
        if self.execute == "eager":
            self.run()

    def run(self, upto: Clock | None = None) -> None:
        """Execute queued work until the lanes have done their actions up to a clock; None executes all work."""
        with self.lock:
            wanted = [job for job in self._pending if upto is None or job.count <= upto.get(job.lane, 0)]
            while any(not job.done for job in wanted):
                job = self._random.choice(self._legal(wanted))
                job.run()
                job.done = True
            self._pending = [job for job in self._pending if not job.done]

    def _legal(self, wanted: list[_Job]) -> list[_Job]:
        allowed = _with_ancestors(wanted) if self.execute == "lazy" else self._pending
        return [job for job in allowed if not job.done and all(earlier.done for earlier in job.after)]


def _with_ancestors(jobs: Iterable[_Job]) -> list[_Job]:
    found: list[_Job] = []
    todo = list(jobs)
    while todo:
        job = todo.pop()
        if job not in found:
            found.append(job)
            todo += job.after
    return found


@dataclass(eq=False, slots=True)
class Event:
    """A point in a lane's work; waiting for one that was never recorded is no wait, as on CUDA."""

    checker: Checker
    known: Clock | None = None
    jobs: list[_Job] = field(default_factory=list)

    def query(self) -> bool:
        return all(job.done for job in self.jobs)

    def synchronize(self) -> None:
        with self.checker.lock:
            if self.known is not None:
                self.checker.run(self.known)
                self.checker.learn(self.checker.this_thread, self.known)


class Lane:
    """An ordered queue of device work: what a stream is."""

    def __init__(self, checker: Checker, name: str) -> None:
        self.checker = checker
        self.name = name
        self._last: _Job | None = None
        self._joined: list[_Job] = []

    def submit(
        self,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        label: str,
    ) -> None:
        """Queue work that accesses no more than it declares."""
        checker = self.checker
        with checker.lock:
            checker.act(checker.this_thread)
            checker.learn(self.name, checker.clock(checker.this_thread))
            count = checker.act(self.name)
            written = checker.note(self.name, reads, writes, label)
            known = {Span.of(tensor).storage for tensor in (*reads, *writes)}
            job = _Job(self.name, count, _watched(work, written, known, label), self._unfinished())
            self._last, self._joined = job, []
            checker.enqueue(job)

    def record(self, event: Event | None = None) -> Event:
        with self.checker.lock:
            event = event or Event(self.checker)
            event.known, event.jobs = dict(self.checker.clock(self.name)), self._unfinished()
            return event

    def wait(self, event: Event) -> None:
        with self.checker.lock:
            if event.known is not None:
                self.checker.learn(self.name, event.known)
                self._joined += event.jobs

    def synchronize(self) -> None:
        self.record().synchronize()

    def _unfinished(self) -> list[_Job]:
        return [job for job in (self._last, *self._joined) if job is not None and not job.done]


def _watched(work: Callable[[], object], written: list[Span], known: set[int], label: str) -> Callable[[], None]:
    """Return the work, made to raise if it writes a declared storage outside its declared spans."""

    def run() -> None:
        with _WriteObserver() as observer:
            work()
        for span in observer.written:
            if span.storage in known and not any(declared.contains(span) for declared in written):
                raise Race(f"{label!r} writes bytes {span.begin} to {span.end} of a storage, which it does not declare")

    return run
