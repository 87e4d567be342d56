"""Keeps weights from being written while a lane still reads them, and notices where that cannot be kept.

A lane reads the live parameters some time after ``update()`` returned. Between that and the next write to them there
must be a *fence*: whoever writes is ordered after the lane (on the device; on CPU its thread waits). A hook in front of
every torch optimizer's step fences; ``fence()`` is for anything else that writes.

state      meaning                                                        leaves by
IDLE       parameters were never read live                                after_update()      -> READING
READING    the lane may be reading them, and nobody was ordered yet       fence() or the hook -> ORDERED
ORDERED    the first writer was; each further one is as well, for he may  after_update()      -> READING
           be on another thread or stream

G1  An optimizer that holds a tracked parameter never writes    test_optimizer_waits_until_the_weights_were_read
    before the lane has read it, on whatever thread or stream   test_every_writer_is_ordered_not_only_the_first
    it steps, and however many share the parameters.            test_optimizers_on_two_streams_are_both_ordered
G2  step(closure) of torch's optimizers waits after the         test_closure_runs_before_the_wait
    closure's first call: forward and backward overlap with     test_optimizer_that_may_write_before_its_closure_waits
    the averaging. Others, of which some write first (SAM),
    wait before it.
G3  Until a first optimizer step or fence() was seen, update()  test_first_updates_are_safe_without_any_optimizer
    fences by itself: nobody has shown yet that he will.
G4  A write that torch's version counters see while READING,    test_guarded_names_the_weight_that_was_written
    or an update() in that state with no optimizer over the     test_guarded_refuses_a_loop_without_optimizer
    parameters anywhere, or with one whose step was captured    test_replay_without_fence_is_noticed
    into a graph, is an error of the next call ("guarded"), or  test_update_that_refuses_tells_a_mistake_once
    one warning and copies from then on ("auto"). Looked for    test_write_after_the_last_update_is_told
    whenever the averages are asked for, too.
G5  An update() in state READING whose weights have not moved   test_step_skipped_by_a_gradient_scaler_is_no_mistake
    follows a step that a gradient scaler skipped; it is fine.
G6  While a graph is captured nothing waits and no state        test_nothing_waits_while_a_graph_is_captured
    changes: the wait would become part of every replay.        test_fence_before_a_replay_waits
G7  What this library writes into a model itself is ordered     test_average_in_the_model_waits_for_every_ema_of_it
    after the reads of every EMA of that model.

The counters are a net, not a proof: writes through ``.data``, numpy, fused optimizers' kernels, graph replays and
foreach on DTensors do not count. They are safe behind an optimizer step or ``fence()``, and nowhere else.
"""

from __future__ import annotations

import gc
import itertools
import operator
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nitrous_ema.errors import UnsafeReadError, warn

ReadMode = Literal["auto", "guarded", "copied"]

_REMEDY = (
    "Call fence() on the EMA before writing weights, or construct it with read='copied', which copies the parameters "
    "when update() is called."
)


class WriteGuard:
    """Orders writers of the parameters after the lane's reads.

    Args:
        read: ``"guarded"``, ``"auto"``, or ``"copied"``: then no lane reads live parameters, and writers are free.
        order_writer: Orders what the calling thread does next after all reads so far. Called again where nothing has
            been read since; never by two threads at once.
        is_capturing: Whether what the calling thread does now is recorded into a graph instead of done.
    """

    def __init__(
        self, read: ReadMode, order_writer: Callable[[], None], is_capturing: Callable[[], bool] = lambda: False
    ) -> None:
        if read not in ("auto", "guarded", "copied"):
            raise ValueError(f"read is {read!r}; expected 'auto', 'guarded' or 'copied'.")
        self._read = read
        self._order_writer = order_writer
        self._is_capturing = is_capturing
        self._process = os.getpid()
        self._lock = threading.RLock()  # optimizers in backward step on autograd's threads
        # All guarded by _lock:
        self._has_read = False  # not IDLE
        self._reading = False  # READING
        self._writer_is_known = False  # an optimizer step or fence() was seen
        self._captured: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # whose steps a graph may replay
        self._tensors: Sequence[Tensor] = ()
        self._names: Sequence[str] = ()
        self._versions: list[int] | None = []  # None: a capture has moved the counters without any write
        self._mistake: str | None = None  # seen where nothing may be raised; told at the next call
        self._mistaken_name = ""
        self._identities: set[int] = set()

    @property
    def copies(self) -> bool:
        """Whether parameters are copied on the caller's stream instead of read live."""
        return self._read == "copied"

    def check(self) -> None:
        """Tell what was noticed since the last call: raise under "guarded", warn once under "auto".

        Raises:
            UnsafeReadError: See G4.
        """
        if self._mistake is None:  # asked at every call on the EMA
            return
        with self._lock:
            mistake, self._mistake = self._mistake, None
        if self._read == "guarded":
            raise UnsafeReadError(f"{mistake} {_REMEDY}", name=self._mistaken_name)
        self._read = "copied"
        warn(
            f"{mistake} Parameters are copied at each update() from now on, which costs one more copy of them in their "
            f"own type; read='copied' says that this is meant. {_REMEDY}"
        )

    def before_update(self) -> None:
        """Call before the parameters are read for another ``update()``. Raises UnsafeReadError."""
        with self._lock:
            self.detect_writes()
            if self._reading and not self.copies:
                self._notice_absence()
        self.check()

    def detect_writes(self) -> None:
        """Call before the averages are shown or saved: what was written since the last update may be in them."""
        with self._lock:
            if self._reading and not self.copies:
                self._notice_writes()
                self._versions = _versions(self._tensors)  # what was noticed is told once

    def after_update(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Call when reads of these live parameters have been queued."""
        if self.copies:
            self._end_live_reads()
            return
        with self._lock:
            if len(tensors) != len(self._tensors) or not all(map(operator.is_, tensors, self._tensors)):
                self._tensors, self._names = tensors, names
                self._identities = {id(tensor) for tensor in tensors}
            self._versions = _versions(tensors)
            self._has_read = self._reading = True
            if not self._writer_is_known:
                self._order_writer()

    def _end_live_reads(self) -> None:
        """Copies were taken up. Who writes from now on comes after this update(), or would spoil the copies anyway."""
        with self._lock:
            if self._has_read:
                self._order_writer()
                self._has_read = self._reading = False

    def fence(self) -> None:
        """What the calling thread does next comes after all reads of the parameters so far. Never raises."""
        if self._process != os.getpid():
            return  # a forked child has none of the threads that it could wait for
        with self._lock:
            if not self._has_read or self._is_capturing():
                return
            if self._reading and not self.copies:  # else it is the last live read, before copies were taken up
                self._notice_writes()
            self._order_writer()
            self._reading = False
            self._writer_is_known = self._writer_is_known or self._mistake is None

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Whether one of these was read by the last update()."""
        return not self._identities.isdisjoint(map(id, tensors))

    def is_concerned(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's next step may write parameters that are being read; not while it is captured."""
        if self._process != os.getpid():
            return False
        if self._is_capturing():
            with self._lock:
                self._captured.add(optimizer)
                self._versions = None
            return False
        return self._has_read and _holds(optimizer, self._identities)

    def _notice_writes(self) -> None:
        if self._mistake is not None or self._versions is None:
            return
        now = _versions(self._tensors)
        if now == self._versions:
            return
        moved = map(operator.ne, now, self._versions)
        name = next(itertools.compress(self._names, moved))
        self._note(
            f"{name!r} was written between update() and the next optimizer step or fence(), while the EMA may "
            "still have been reading it (a model that changes its weights in forward, or code that writes them "
            "without an optimizer). The averages may hold that one update's weights as they were changed.",
            name,
        )

    def _notice_absence(self) -> None:
        """Of whoever should have come between two updates."""
        if self._mistake is not None:
            return
        if any(_holds(optimizer, self._identities) for optimizer in self._captured):
            self._note(
                "update() was called again with no fence() in between, and the step of an optimizer that holds the "
                "model's parameters was captured into a graph: a replay writes them while they may still be read."
            )
        elif not (self._writer_is_known or self._optimizer_exists()):
            self._note(
                "update() was called again with neither an optimizer step nor fence() in between, and no torch "
                "optimizer holds the model's parameters: whatever writes them may do so while they are read."
            )

    def _note(self, mistake: str, name: str = "") -> None:
        self._mistake, self._mistaken_name = mistake, name

    def _optimizer_exists(self) -> bool:
        """Whether any torch optimizer holds the parameters: asked once, when no step of one was ever seen.

        A gradient scaler skips steps without any sign of it, and typically the very first ones.
        """
        found = any(
            issubclass(type(each), Optimizer)  # isinstance would wake lazy proxies
            and hasattr(type(each).step, "hooked")  # else its base was never initialized, and no hook sees it step
            and _holds(each, self._identities)
            for each in gc.get_objects()
        )
        self._writer_is_known = found
        return found


_guards: weakref.WeakSet[WriteGuard] = weakref.WeakSet()
_guards_lock = threading.Lock()  # of the set itself


def fence_all(tensors: Sequence[Tensor]) -> None:
    """Fence for every EMA that may be reading one of these tensors: this library is about to write them itself."""
    with _guards_lock:
        guards = list(_guards)
    for guard in guards:
        if guard.reads(tensors):
            guard.fence()


def install_hooks(guard: WriteGuard, model: Module) -> Callable[[], None]:
    """Fence before every optimizer step, and before the model loads a state. Returns what removes the hooks again.

    The hooks hold the guard weakly and do nothing once it is gone.
    """
    reference = weakref.ref(guard)
    with _guards_lock:
        _guards.add(guard)
    # Compiled optimizers trace into their hooks, and cannot see through a weak reference. The import that this costs
    # is paid by every optimizer's constructor as well.
    hook = torch.compiler.disable(_StepHook(reference).__call__)  # type: ignore[no-untyped-call]
    step = register_optimizer_step_pre_hook(hook)
    load = model.register_load_state_dict_pre_hook(_LoadHook(reference))  # type: ignore[no-untyped-call]

    def remove() -> None:
        step.remove()
        load.remove()

    return remove


class _StepHook:
    """Runs in front of ``Optimizer.step``, on whatever thread that is called."""

    def __init__(self, guard: weakref.ref[WriteGuard]) -> None:
        self._guard = guard

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guard = self._guard()
        if guard is None or not guard.is_concerned(optimizer):
            return None
        if _calls_closure_first(optimizer):
            # args[0] is the optimizer itself. Some callers name the closure.
            if kwargs.get("closure") is not None:
                return args, {**kwargs, "closure": _FenceAfterFirstCall(kwargs["closure"], guard)}
            if len(args) > 1 and callable(args[1]):
                return (args[0], _FenceAfterFirstCall(args[1], guard), *args[2:]), kwargs
        guard.fence()
        return None


class _FenceAfterFirstCall:
    """An optimizer's closure: forward and backward, after which the optimizer writes."""

    def __init__(self, closure: Callable[[], Any], guard: WriteGuard) -> None:
        self._closure = closure
        self._guard: WriteGuard | None = guard  # None after the first call

    def __call__(self) -> Any:
        result = self._closure()
        if self._guard is not None:
            self._guard.fence()
            self._guard = None
        return result


class _LoadHook:
    """Runs in front of the model's ``load_state_dict``.

    Copies and pickles of the model keep something that does nothing, and is there wherever torch is.
    """

    def __init__(self, guard: weakref.ref[WriteGuard]) -> None:
        self._guard = guard

    def __call__(self, *_: Any) -> None:
        guard = self._guard()
        if guard is not None:
            guard.fence()

    def __reduce__(self) -> tuple[type[partial[Any]], tuple[type[torch.nn.Identity]]]:
        return partial, (torch.nn.Identity,)  # which takes any arguments


def _calls_closure_first(optimizer: Optimizer) -> bool:
    """Whether a closure given to ``step`` is called before anything is written.

    All of torch's own do that. The most used implementation of SAM (davda54/sam, ``sam.py``) writes first.
    """
    module = getattr(type(optimizer).step, "__module__", None) or ""  # that of the function which torch's hooks wrap
    return module.partition(".")[0] == "torch"


def _holds(optimizer: Optimizer, identities: set[int]) -> bool:
    groups = getattr(optimizer, "param_groups", ())  # not there yet while one is being made
    return not all(identities.isdisjoint(map(id, group["params"])) for group in groups)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Counts of in-place writes; 0 for an inference tensor, which has no counter (a frozen part of a model)."""
    try:
        return list(map(operator.attrgetter("_version"), tensors))
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
