"""Keeps weights from being written while a lane still reads them, and notices where that cannot be kept.

A lane reads the live parameters some time after ``update()`` returned. Between that and the next write to them there
must be a *fence*: whoever writes is ordered after the lane (on the device; on CPU its thread waits). A hook in front of
every torch optimizer's step fences; ``fence()`` is for anything else that writes.

state      meaning                                                        leaves by
IDLE       no read of the parameters is outstanding                       after_update()      -> READING
READING    the lane may be reading them; nobody may write                 fence() or the hook -> IDLE

G1  An optimizer that holds a tracked parameter never writes    test_optimizer_waits_until_the_weights_were_read
    before the lane has read it.
G2  step(closure) waits after the closure's first call, not     test_closure_runs_before_the_wait
    before: forward and backward overlap with the averaging.
G3  Until a first optimizer step or fence() was seen, update()  test_first_updates_are_safe_without_any_optimizer
    fences by itself: nobody has shown yet that he will.
G4  A write that torch's version counters see while READING,    test_guarded_names_the_weight_that_was_written
    or an update() in that state with no optimizer over the     test_guarded_refuses_a_loop_without_optimizer
    parameters anywhere, is an error of the next call
    ("guarded"), or one warning and copies from then on
    ("auto").
G5  An update() in state READING whose weights have not moved   test_step_skipped_by_a_gradient_scaler_is_no_mistake
    follows a step that a gradient scaler skipped; it is fine.

The counters are a net, not a proof: writes through ``.data``, numpy, fused optimizers' kernels and foreach on DTensors
do not count. They are safe behind an optimizer step or ``fence()``, and nowhere else.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Sequence
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


class Guard:
    """Orders writers of the parameters after the lane's reads.

    Args:
        read: ``"guarded"``, ``"auto"``, or ``"copied"``: then no lane reads live parameters, and writers are free.
        order_writer: Orders what the calling thread does next after all reads so far.
    """

    def __init__(self, read: ReadMode, order_writer: Callable[[], None]) -> None:
        if read not in ("auto", "guarded", "copied"):
            raise ValueError(f"read is {read!r}; expected 'auto', 'guarded' or 'copied'.")
        self._read = read
        self._order_writer = order_writer
        self._process = os.getpid()
        self._lock = threading.RLock()  # optimizers in backward step on autograd's threads
        # All guarded by _lock:
        self._reading = False
        self._writer_is_known = False  # an optimizer step or fence() was seen
        self._tensors: Sequence[Tensor] = ()
        self._names: Sequence[str] = ()
        self._versions: list[int] = []
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
        with self._lock:
            mistake, self._mistake = self._mistake, None
        if mistake is None:
            return
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
            if self._reading and not self.copies:
                self._notice_writes()
                self._versions = [_version(tensor) for tensor in self._tensors]  # what was noticed is told once
                if not (self._mistake or self._writer_is_known or self._optimizer_exists()):
                    self._mistake, self._mistaken_name = (
                        "update() was called again with neither an optimizer step nor fence() in between, and no torch "
                        "optimizer holds the model's parameters: whatever writes them may do so while they are read.",
                        "",
                    )
        self.check()

    def after_update(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Call when reads of these live parameters have been queued."""
        if self.copies:
            return
        with self._lock:
            if len(tensors) != len(self._tensors) or any(
                new is not old for new, old in zip(tensors, self._tensors, strict=True)
            ):
                self._tensors, self._names = tensors, names
                self._identities = {id(tensor) for tensor in tensors}
            self._versions = [_version(tensor) for tensor in tensors]
            self._reading = True
            if not self._writer_is_known:
                self._order_writer()

    def fence(self) -> None:
        """What the calling thread does next comes after all reads of the parameters so far. Never raises."""
        if self._process != os.getpid():
            return  # a forked child has none of the threads that it could wait for
        with self._lock:
            if not self._reading:
                return
            if not self.copies:  # else it is the last live read, before copies were taken up
                self._notice_writes()
            self._order_writer()
            self._reading = False
            self._writer_is_known = self._writer_is_known or self._mistake is None

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's next step may write parameters that are being read."""
        return self._reading and self._process == os.getpid() and _holds(optimizer, self._identities)

    def _notice_writes(self) -> None:
        if self._mistake is not None:
            return
        for name, tensor, version in zip(self._names, self._tensors, self._versions, strict=True):
            if _version(tensor) != version:
                self._mistake, self._mistaken_name = (
                    f"{name!r} was written between update() and the next optimizer step or fence(), while the EMA may "
                    "still have been reading it (a model that changes its weights in forward, or code that writes them "
                    "without an optimizer). The averages may hold that one update's weights as they were changed.",
                    name,
                )
                return

    def _optimizer_exists(self) -> bool:
        """Whether any torch optimizer holds the parameters: asked once, when no step of one was ever seen.

        A gradient scaler skips steps without any sign of it, and typically the very first ones.
        """
        found = any(
            issubclass(type(each), Optimizer) and _holds(each, self._identities)  # isinstance would wake lazy proxies
            for each in gc.get_objects()
        )
        self._writer_is_known = found
        return found


def install_hooks(guard: Guard, model: Module) -> Callable[[], None]:
    """Fence before every optimizer step, and before the model loads a state. Returns what removes the hooks again.

    The hooks hold the guard weakly and do nothing once it is gone.
    """
    reference = weakref.ref(guard)
    # Compiled optimizers trace into their hooks, and cannot see through a weak reference. The import that this costs is
    # paid by every optimizer's constructor as well.
    hook = torch.compiler.disable(_StepHook(reference).__call__)  # type: ignore[no-untyped-call]
    step = register_optimizer_step_pre_hook(hook)
    load = model.register_load_state_dict_pre_hook(_LoadHook(reference))  # type: ignore[no-untyped-call]

    def remove() -> None:
        step.remove()
        load.remove()

    return remove


class _StepHook:
    """Runs in front of ``Optimizer.step``, on whatever thread that is called."""

    def __init__(self, guard: weakref.ref[Guard]) -> None:
        self._guard = guard

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guard = self._guard()
        if guard is None or not guard.concerns(optimizer):
            return None
        # args[0] is the optimizer itself. Some callers name the closure.
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": _FenceAfterFirstCall(kwargs["closure"], guard)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], _FenceAfterFirstCall(args[1], guard), *args[2:]), kwargs
        guard.fence()
        return None


class _FenceAfterFirstCall:
    """An optimizer's closure: forward and backward, after which the optimizer writes."""

    def __init__(self, closure: Callable[[], Any], guard: Guard) -> None:
        self._closure = closure
        self._guard = guard

    def __call__(self) -> Any:
        result = self._closure()
        self._guard.fence()
        return result


class _LoadHook:
    """Runs in front of the model's ``load_state_dict``. Copies and pickles of the model keep one that does nothing."""

    def __init__(self, guard: weakref.ref[Guard] | None = None) -> None:
        self._guard = guard

    def __call__(self, *_: Any) -> None:
        guard = self._guard() if self._guard is not None else None
        if guard is not None:
            guard.fence()

    def __reduce__(self) -> tuple[type[_LoadHook], tuple[()]]:
        return _LoadHook, ()


def _holds(optimizer: Optimizer, identities: set[int]) -> bool:
    groups = getattr(optimizer, "param_groups", ())  # not there yet while one is being made
    return any(id(parameter) in identities for group in groups for parameter in group["params"])


def _version(tensor: Tensor) -> int:
    """Counts in-place writes; 0 for an inference tensor, which has no counter (a frozen part of a model)."""
    return 0 if tensor.is_inference() else tensor._version
