"""Prevents writes to weights that a lane is still reading, and detects writes that bypass this protection.

A lane reads the live parameters some time after ``update()`` has returned. Between that read and the next write to the
parameters there must be a *fence*: a point that orders the writer after the lane (on an accelerator the writer's stream
waits; on the CPU the writer's thread waits). A hook in front of the step of every torch optimizer fences; ``fence()``
is for all other code that writes weights. Writes without a fence are detected where torch's version counters see them,
and then raise an error, or make the EMA copy parameters in update() from then on.

state      meaning                                                        leaves by
IDLE       parameters were never read live                                after_update()      -> READING
READING    the lane may be reading them, and no writer was ordered yet    fence() or the hook -> ORDERED
ORDERED    the first writer was ordered; each further writer is ordered   after_update()      -> READING
           as well, because it may be on another thread or stream

GUARD-1  An optimizer that holds a tracked parameter never      test_optimizer_waits_until_the_weights_were_read
    writes before the lane has read it, on all threads and      test_every_writer_is_ordered_not_only_the_first
    streams, also where several optimizers share parameters.    test_optimizers_on_two_streams_are_both_ordered
GUARD-2  step(closure) of torch's optimizers waits after the    test_closure_runs_before_the_wait
    closure's first call: forward and backward overlap with     test_optimizer_that_may_write_before_its_closure_waits
    the averaging. Other optimizers, some of which write first
    (SAM), wait before the closure.
GUARD-3  Until a first optimizer step or fence() is observed,   test_first_updates_are_safe_without_any_optimizer
    update() fences by itself: the loop may have no fence.
GUARD-4  A write that torch's version counters see while        test_guarded_names_the_weight_that_was_written
    READING, or an update() in that state with no optimizer     test_guarded_refuses_a_loop_without_optimizer
    over the parameters anywhere, or with an optimizer whose    test_replay_without_fence_is_detected
    step was captured into a graph, is an error of the next     test_refused_update_raises_a_violation_once
    call ("guarded"), or one warning and copies from then on    test_write_after_the_last_update_is_reported
    ("auto"). Writes are also looked for whenever the averages
    are requested.
GUARD-5  An update() in state READING whose weights have not    test_step_skipped_by_a_gradient_scaler_is_no_violation
    changed follows a step that a gradient scaler skipped; it
    is not a violation.
GUARD-6  While a graph is captured nothing waits and no state   test_nothing_waits_while_a_graph_is_captured
    changes: the wait would become part of every replay.        test_fence_before_a_replay_waits
GUARD-7  Writes of this library into a model are ordered after  test_average_in_the_model_waits_for_every_ema_of_it
    the reads of every EMA of that model.

GUARD-8  update() may be called inside the closure of a step,   test_update_inside_the_closure_is_no_violation
    also the first update().

The counters do not see every write: writes through ``.data``, numpy, fused optimizers' kernels, graph replays and
foreach on DTensors are not counted. Such writes are safe behind an optimizer step or ``fence()``, and nowhere else.

Longer than 300 lines: the guard and the hooks that call it share one table of states.
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
        read: ``"guarded"``, ``"auto"``, or ``"copied"``. With ``"copied"`` no lane reads live parameters, and writers
            need no fence.
        order_writer: Orders the calling thread's next work after all reads so far. It is also called when nothing
            has been read since the last call; never by two threads at the same time.
        is_capturing: Returns whether the calling thread's work is now being captured into a graph.
    """

    def __init__(
        self, read: ReadMode, order_writer: Callable[[], None], is_capturing: Callable[[], bool] = lambda: False
    ) -> None:
        self._read = read
        self._order_writer = order_writer
        self._is_capturing = is_capturing
        self._process = os.getpid()
        # Optimizers in backward step on autograd's threads. Held across order_writer(): two writers must not be ordered
        # at the same time.
        self._lock = threading.RLock()
        # All guarded by _lock:
        self._has_read = False  # not IDLE
        self._reading = False  # READING
        self._fence_expected = False  # a step or fence() was observed, or an optimizer holds the parameters
        self._captured: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers whose steps a graph may replay
        self._tensors: Sequence[Tensor] = ()
        self._names: Sequence[str] = ()
        self._versions: list[int] | None = []  # None: a capture has moved the counters without any write
        # Detected where nothing may be raised, and reported by the next raise_violation().
        self._violation: str | None = None
        self._violation_name = ""  # the tensor that was written
        self._identities: set[int] = set()

    @property
    def copies(self) -> bool:
        """Whether parameters are copied on the caller's stream instead of being read live."""
        return self._read == "copied"

    @property
    def is_reading(self) -> bool:
        """Whether the lane may be reading live parameters, and no writer was ordered since the last update()."""
        return self._reading

    def raise_violation(self) -> None:
        """Report a violation that was detected since the last call: raise under "guarded", warn once under "auto".

        Raises:
            UnsafeReadError: See GUARD-4.
        """
        # Without the lock first: this runs at every call on the EMA. A violation that is recorded a moment later is
        # reported by the next call.
        if self._violation is None:
            return
        with self._lock:
            violation, self._violation = self._violation, None
        if self._read == "guarded":
            raise UnsafeReadError(f"{violation} {_REMEDY}", name=self._violation_name)
        self._read = "copied"
        warn(
            f"{violation} From now on the EMA copies the parameters in every update(), which needs memory for one "
            "extra copy of them in their own type. Pass read='copied' to silence this warning, or call fence() on the "
            "EMA before writing weights."
        )

    def before_update(self) -> None:
        """Check for violations; to be called before parameters are read for another ``update()``.

        Raises:
            UnsafeReadError: See GUARD-4.
        """
        with self._lock:
            self.detect_writes()
            if self._reading and not self.copies:
                self._detect_missing_fence()
        self.raise_violation()

    def detect_writes(self) -> None:
        """Look for writes since the last update; to be called before the averages are read or saved.

        The averages may already contain the written values.
        """
        with self._lock:
            if self._reading and not self.copies:
                self._compare_versions()
                self._versions = _versions(self._tensors)  # so that one write is reported once

    def after_update(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Note that reads of these live parameters have been queued."""
        if self.copies:
            self._end_live_reads()
            return
        with self._lock:
            # Identities are computed anew only for other tensors: this runs at every update.
            if len(tensors) != len(self._tensors) or not all(map(operator.is_, tensors, self._tensors)):
                self._tensors, self._names = tensors, names
                self._identities = {id(tensor) for tensor in tensors}
            self._versions = _versions(tensors)
            self._has_read = self._reading = True
            if not self._fence_expected:
                self._order_writer()  # GUARD-3

    def _end_live_reads(self) -> None:
        """Order the caller after the last live reads, since parameters are copied from now on.

        This covers writers without a fence as well: they run where the caller runs. A writer that runs elsewhere
        could write while the caller copies, whatever this method does.
        """
        with self._lock:
            if self._has_read:
                self._order_writer()
                self._has_read = self._reading = False

    def fence(self) -> None:
        """Order the calling thread's next work after all reads of the parameters so far. Never raises."""
        if self._process != os.getpid():
            return  # a forked child has no copy of the lane's thread, and would wait for ever
        with self._lock:
            if not self._has_read or self._is_capturing():
                return  # during a capture the wait would become part of every replay (GUARD-6)
            if self._reading and not self.copies:  # otherwise only the last live read is still to be waited for
                self._compare_versions()
            # Also when a writer was ordered before: this writer may be on another thread or stream (GUARD-1).
            self._order_writer()
            self._reading = False
            self._fence_expected = self._fence_expected or self._violation is None

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether one of these tensors was read by the last update()."""
        return not self._identities.isdisjoint(map(id, tensors))

    def needs_fence(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer's next step may write parameters that are being read; False during a capture."""
        if self._process != os.getpid():
            return False
        if self._is_capturing():
            # The step is recorded and writes nothing now, but torch's counters move as if it did.
            with self._lock:
                self._captured.add(optimizer)
                self._versions = None
            return False
        return self._has_read and _holds(optimizer, self._identities)

    def _compare_versions(self) -> None:
        """Record a violation if a version counter has moved since the last update."""
        # One violation is enough: the next call reports it.
        if self._violation is not None or self._versions is None:
            return
        now = _versions(self._tensors)
        if now == self._versions:
            return
        moved = map(operator.ne, now, self._versions)
        name = next(itertools.compress(self._names, moved))
        self._record_violation(
            f"{name!r} was written between update() and the next optimizer step or fence(), while the EMA may "
            "still have been reading it (a model that changes its weights in forward, or code that writes them "
            "without an optimizer). For this one update the averages may contain the changed weights.",
            name,
        )

    def _detect_missing_fence(self) -> None:
        """Record a violation if no fence can have come between this update() and the last."""
        # Unchanged weights alone are no violation, because a scaler may have skipped the step (GUARD-5). Only loops in
        # which no hook runs before the write are reported.
        if self._violation is not None:
            return
        if any(_holds(optimizer, self._identities) for optimizer in self._captured):
            self._record_violation(
                "update() was called again with no fence() in between, and the step of an optimizer that holds the "
                "model's parameters was captured into a graph: a replay writes them while they may still be read."
            )
        elif not (self._fence_expected or self._optimizer_exists()):
            self._record_violation(
                "update() was called again with neither an optimizer step nor fence() in between, and no torch "
                "optimizer holds the model's parameters, so they may be modified while the EMA is still reading them."
            )

    def _record_violation(self, message: str, name: str = "") -> None:
        self._violation, self._violation_name = message, name

    def _optimizer_exists(self) -> bool:
        """Return whether any torch optimizer holds the parameters.

        A gradient scaler skips steps without any sign of it, and typically the very first steps, so that an optimizer
        may exist whose step was never observed. The search visits every object, so it is not repeated once it succeeds.
        """
        found = any(
            issubclass(type(each), Optimizer)  # isinstance would resolve lazy proxies
            # The constructor of the base class sets this mark. Without it no hook runs before the step.
            and hasattr(type(each).step, "hooked")
            and _holds(each, self._identities)
            for each in gc.get_objects()
        )
        self._fence_expected = found
        return found


# Weak, so that an EMA that is dropped is freed: the hooks and this set must not hold its guard.
_guards: weakref.WeakSet[WriteGuard] = weakref.WeakSet()
_guards_lock = threading.Lock()  # guards the set; not held while a guard fences, which may block


def fence_all(tensors: Sequence[Tensor]) -> None:
    """Fence for every EMA that may be reading one of these tensors, before this library writes them itself."""
    with _guards_lock:
        guards = list(_guards)
    for guard in guards:
        if guard.reads(tensors):
            guard.fence()


def install_hooks(guard: WriteGuard, model: Module) -> Callable[[], None]:
    """Install hooks that fence before every optimizer step and before the model loads a state.

    The hooks hold the guard weakly and do nothing once it is freed.

    Returns:
        A function that removes the hooks.
    """
    reference = weakref.ref(guard)
    with _guards_lock:
        _guards.add(guard)
    # Compiled optimizers trace into their hooks, and cannot trace a weak reference. disable() imports torch's
    # compiler, which every optimizer's constructor imports as well.
    hook = torch.compiler.disable(_StepHook(reference).__call__)  # type: ignore[no-untyped-call]
    step = register_optimizer_step_pre_hook(hook)
    # The public method would add a weak reference to the module, which is dead in copies of models whose pickles hold
    # their own source (the persistent classes of EDM2): such a copy could neither load a state nor be copied.
    load = model._register_load_state_dict_pre_hook(_LoadHook(reference))  # type: ignore[no-untyped-call]

    def remove() -> None:
        step.remove()
        load.remove()

    return remove


class _StepHook:
    """Runs in front of ``Optimizer.step``, on the thread that calls it."""

    def __init__(self, guard: weakref.ref[WriteGuard]) -> None:
        self._guard = guard

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guard = self._guard()
        if guard is None:
            return None
        # args[0] is the optimizer itself. Some callers pass the closure by keyword (Lightning).
        is_keyword = kwargs.get("closure") is not None
        closure = kwargs["closure"] if is_keyword else args[1] if len(args) > 1 and callable(args[1]) else None
        # The fence follows the closure, so that its forward and backward overlap with the averaging (GUARD-2).
        if (closure is None or not _calls_closure_first(optimizer)) and guard.needs_fence(optimizer):
            guard.fence()
        if closure is None:
            return None
        fencing = _FencingClosure(closure, guard, optimizer)
        if is_keyword:
            return args, {**kwargs, "closure": fencing}
        return (args[0], fencing, *args[2:]), kwargs


class _FencingClosure:
    """An optimizer's closure (forward and backward), which fences after its first call: then the optimizer writes.

    It also fences after a later call, and where nothing was read before the step, if the closure itself has called
    update() (GUARD-8).
    """

    def __init__(self, closure: Callable[[], Any], guard: WriteGuard, optimizer: Optimizer) -> None:
        self._closure, self._guard, self._optimizer = closure, guard, optimizer
        self._is_first_call = True

    def __call__(self) -> Any:
        result = self._closure()
        if (self._is_first_call or self._guard.is_reading) and self._guard.needs_fence(self._optimizer):
            self._guard.fence()
        self._is_first_call = False
        return result


class _LoadHook:
    """Runs in front of the model's ``load_state_dict``.

    The model holds this hook, so copies and pickles of the model do too. They get a callable that does nothing and that
    needs torch alone: neither a copy nor an unpickled model belongs to this EMA.
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
    """Return whether the optimizer calls the closure of ``step`` before it writes any parameter.

    All of torch's own optimizers do. The most used implementation of SAM (davda54/sam, ``sam.py``) writes first.
    """
    module = getattr(type(optimizer).step, "__module__", None) or ""  # of the function that torch's hooks wrap
    return module.partition(".")[0] == "torch"


def _holds(optimizer: Optimizer, identities: set[int]) -> bool:
    groups = getattr(optimizer, "param_groups", ())  # missing while the optimizer is being constructed
    return not all(identities.isdisjoint(map(id, group["params"])) for group in groups)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the count of in-place writes of each tensor; 0 for a frozen inference tensor, which has no counter."""
    try:
        return list(map(operator.attrgetter("_version"), tensors))
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
