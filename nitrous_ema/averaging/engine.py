"""The machine behind every EMA class: when to average what on which lane, and when to take a snapshot.

It owns no thread and no stream. The lanes (``pipeline.Lane``) decide where work runs, the sink where snapshots go,
the guard whether parameters may be read live; ``PostHocEMA`` gives it lanes that run everything at once,
``AsyncPostHocEMA`` lanes in the background. The sequence of work is the same, and so is every bit of the averages.

A1  Parameters are resolved and arguments checked before      test_failed_update_counts_nothing
    anything counts: an update() that refuses has changed
    nothing.
A2  Buffers change in forward, so a background lane never     test_batch_norm_statistics_are_those_of_the_step
    reads them live: they are copied where the caller is.
A3  The caller's copies are written again only after the      test_copies_are_not_overwritten_while_they_are_read
    lane has read them.
A4  After a lane has failed the averages are refused until a  test_averages_are_refused_after_a_failure
    state is loaded or a snapshot restored.                   test_restore_heals_a_failed_lane
A5  Queued work holds no reference to this object, so that    test_dropped_ema_leaves_no_thread_or_hook_behind
    dropping the EMA ends it, on the thread that dropped it.

Longer than the house's 300 lines: what may happen to averages, and in which order, is one table.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module

from nitrous_ema._base.arguments import clamp_timeout
from nitrous_ema.averaging.config import AveragingPolicy, Background
from nitrous_ema.averaging.execution.dispatch import UpdateDispatcher
from nitrous_ema.averaging.execution.interfaces import PendingSnapshot, SnapshotSink, neutral_modes
from nitrous_ema.averaging.execution.write_guard import WriteGuard, fence_all, install_hooks
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, snapshot_layout
from nitrous_ema.averaging.lineage import RunLineage
from nitrous_ema.averaging.model.live_tensors import LiveTensors, hold_averages
from nitrous_ema.averaging.model.tracking import TrackedTensor, TrackingPolicy, track, unwrap, writable_view, write
from nitrous_ema.averaging.schedule import Schedule, Time
from nitrous_ema.averaging.shutdown import DrainRequest, shut_down
from nitrous_ema.averaging.stats import Stats
from nitrous_ema.errors import ClosedError, NitrousError, SnapshotWriteError, warn
from nitrous_ema.snapshots.stats import WriteStats

_HOST = torch.device("cpu")


class Viewer(Protocol):
    """Somebody who holds views of the averages."""

    def rebind(self) -> None:
        """The averages have moved to other buffers."""


class AveragingEngine:
    """Averages of one model; at first, and until the first update, they are the model's weights.

    Args:
        model: The online model, wrapped or not. Held for as long as this object lives.
        tracking: Which tensors are averaged, copied or skipped.
        policy: How.
        background: None if everything runs at once.
        tracked: The model's tensors, if they are known: a role may depend on the values that a buffer had.
    """

    def __init__(
        self,
        model: Module,
        tracking: TrackingPolicy,
        policy: AveragingPolicy,
        *,
        background: Background | None = None,
        tracked: Sequence[TrackedTensor] | None = None,
    ) -> None:
        self.schedule = Schedule(policy.gammas, policy.update_every, policy.correction, policy.frozen)
        self.model, self.tracking, self.policy, self.run_lineage = model, tracking, policy, RunLineage()
        tracked = track(model, tracking) if tracked is None else tracked
        layout = snapshot_layout(tracked, policy.gammas, policy.sigma_rels, policy.checkpoint_dtype)
        self._offloads = background is not None and background.offloads
        with neutral_modes():
            self.flat_buffers = FlatBuffers(tracked, layout, _HOST if self._offloads else policy.device)
        if all(group.dtype == torch.float64 for group in self.flat_buffers.groups):
            self.schedule.least_weight = 0.0
        with neutral_modes():
            self._dispatch = _dispatch(self.flat_buffers, background)
        self.guard: WriteGuard | None = None
        if background is not None:
            self.guard = WriteGuard(background.read, self._dispatch.order_writers, self._dispatch.is_capturing)
        self._tensors = LiveTensors(model, tracked)
        self._parameters = [tensor.name for tensor in tracked if tensor.is_parameter and tensor.role != "skipped"]
        self._refusal: NitrousError | None = None  # why nothing may be updated or read for now
        self._closed = False
        self._failure: BaseException | None = None  # what a lane or restore() failed with
        self._failed = "averaging"  # which of the two
        self._find_resumable_run: Callable[[str], str | None] = lambda run: None
        self.drain_request = DrainRequest()
        self.drain_timeout_seconds: float | None = None
        """How long a requested drain may take."""
        self._process = os.getpid()
        self.viewers: weakref.WeakSet[Viewer] = weakref.WeakSet()
        self._checked: Mapping[str, Tensor] | None = None  # live tensors whose devices were found right
        self.copy_from_model()
        remove_hooks = install_hooks(self.guard, unwrap(model)) if self.guard is not None else _nothing
        self._finalizer = weakref.finalize(self, shut_down, self._dispatch, self.guard, remove_hooks, self._process)

    def attach(self, sink: SnapshotSink, find_resumable_run: Callable[[str], str | None] = lambda run: None) -> None:
        """Give it somewhere to put snapshots; without, none are taken.

        Args:
            sink: Takes them.
            find_resumable_run: Given the run, says what is to be warned of when that begins without a state.
        """
        self._dispatch.sinks.append(sink)
        self._find_resumable_run = find_resumable_run

    @property
    def _sink(self) -> SnapshotSink | None:
        return self._dispatch.sinks[0] if self._dispatch.sinks else None

    def frozen_copy(
        self, gammas: tuple[float, ...], sigma_rels: tuple[float, ...], device: torch.device | None
    ) -> AveragingEngine:
        """Room for other averages of the same tensors, that no update changes."""
        policy = replace(
            self.policy,
            gammas=gammas,
            sigma_rels=sigma_rels,
            update_every=1,
            frozen=True,
            device=device,
            allow_different_devices=True,
        )
        return AveragingEngine(self.model, self.tracking, policy, tracked=self.flat_buffers.tracked)

    # ---- during training

    def update(self, t_delta: Time = 1) -> None:
        """Count one step; average if an update is due, take a snapshot if one is."""
        if not self.is_usable("update()", failed_writes=False):
            return
        self._refuse_capture("update()")
        self.schedule.check(t_delta)
        live = None
        if self.schedule.is_due:
            if self.guard is not None:
                self.guard.before_update()
            live = self._live()
        if self.run_lineage.is_fresh:
            self._begin()
        weights = self.schedule.advance(t_delta)
        if live is not None and weights is not None:
            self._average(live, weights)
        every = self.policy.checkpoint_every_steps
        if self.drain_request.take():
            self._drain()
        elif every is not None and self.schedule.step % every == 0:
            self._checkpoint()
        if weights is not None:
            self.schedule.warn_of_small(weights)
        if self._sink is not None:
            self._sink.raise_failures()  # last: whoever catches it and goes on has lost neither step nor snapshot

    def checkpoint(self) -> bool:
        """Take a snapshot of the averages as they are now; False if the sink skipped it."""
        if not self.is_usable("checkpoint()"):
            return False
        self._refuse_capture("checkpoint()")
        if self._sink is None:
            raise NitrousError("checkpoint(): this EMA keeps no snapshots. Use PostHocEMA or AsyncPostHocEMA.")
        if not self.schedule.updates:
            raise NitrousError("checkpoint() before the first update(): there is no average yet. Call update() first.")
        return self._checkpoint()

    def _checkpoint(self) -> bool:
        if self._sink is None or (
            self.schedule.step in self.run_lineage.written and not self._sink.has_lost(self.schedule.step)
        ):
            return True
        if self.schedule.is_behind:
            if self.guard is not None:
                self.guard.before_update()
            live = self._live()
            weights = self.schedule.catch_up()
            if weights is not None:
                self._average(live, weights)
        self._attempt(self._dispatch.flush_deferred, "checkpoint()")
        taken = self._sink.take_snapshot(
            PendingSnapshot(self.flat_buffers, self.run_lineage.stamp(self.schedule)), self._dispatch.lane
        )
        if taken:
            self.run_lineage.written.add(self.schedule.step)
        return taken

    def fence(self) -> None:
        """What the caller does next with the weights comes after every read of them so far."""
        if self.guard is not None and self._process == os.getpid():
            self.guard.fence()

    def fence_everybody(self) -> None:
        """The same for every EMA that reads these weights."""
        if self._process == os.getpid():
            fence_all([tracked.live() for tracked in self.flat_buffers.averaged])

    def stats(self) -> Stats:
        """What was done so far."""
        written = self._sink.stats() if self._sink is not None and self._process == os.getpid() else WriteStats()
        dispatch = self._dispatch
        return Stats(
            **asdict(written),
            updates=self.schedule.updates,
            scratch_bytes=dispatch.scratch_bytes,
            held_up=dispatch.num_held_up,
        )

    # ---- reading the averages, and ending

    def order_readers(self, what: str) -> None:
        """The caller's reads of the averages come after all updates so far. Raises what ``is_usable`` raises."""
        if self.is_usable(what, reading=True):
            self._dispatch.order_readers()
            self._raise_failures(what)  # also of the work that was waited for

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Block until every update is done and every snapshot is on disk or told failed. Raises TimeoutError."""
        if self.is_usable("flush()", reading=True):
            self._dispatch.drain(clamp_timeout(timeout_seconds))
            self._raise_failures("flush()")

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Drain, write what is pending, end threads and remove hooks; updates are refused from then on.

        Returns:
            False if it was closed before.

        Raises:
            TimeoutError: Something is still pending; close() may be called again.
        """
        if self._process != os.getpid() or not self._finalizer.alive:
            return False
        self._closed = True
        self._dispatch.drain(clamp_timeout(timeout_seconds))
        if self.guard is not None:
            self.guard.fence()  # nothing is read any more: whoever writes from now on is right
        try:
            self._raise_failures("close()")
            if self.guard is not None:
                self.guard.check()
        finally:
            self._finalizer()
        return True

    @property
    def is_open(self) -> bool:
        """Whether close() has not ended it yet."""
        return self._finalizer.alive

    def refuse(self, reason: NitrousError) -> None:
        """Refuse everything that changes or reads the averages from now on."""
        self._refusal = reason

    def end_refusal(self, reason: NitrousError) -> None:
        """End what ``refuse`` began, unless something else (closing) has been refusing since."""
        if self._refusal is reason:
            self._refusal = None

    def is_usable(self, what: str, *, reading: bool = False, failed_writes: bool = True) -> bool:
        """Whether ``what`` may go on: False, always, in a forked child, where this object does nothing.

        Args:
            what: Named in the error.
            reading: It changes nothing, so that it is allowed after close().
            failed_writes: Tell those of the background now; otherwise the caller does it.

        Raises:
            NitrousError: The EMA is closed or its averages are swapped into the model; a lane failed.
            SnapshotWriteError: A background write failed since the last call (told once).
            UnsafeReadError: Weights were written while they were read (told once).
        """
        if self._process != os.getpid():
            return False
        if self._closed and not reading:
            raise ClosedError(f"{what}: the EMA was closed. Construct another one.")
        if self._refusal is not None:
            raise type(self._refusal)(f"{what}: {self._refusal}")
        self._raise_failures(what, failed_writes=failed_writes)
        if self.guard is not None:
            if failed_writes:
                self.guard.detect_writes()  # update() does where it reads
            self.guard.check()
        return True

    def move(self, device: torch.device) -> None:
        """Move every average and copy to a device, unless they are kept in host memory on purpose."""
        if self._offloads:
            return
        self.order_readers("to()")
        self._dispatch.drain()
        with neutral_modes():
            self.flat_buffers.to(device)
            self._dispatch.place()
            self._checked = None
            for viewer in self.viewers:
                viewer.rebind()

    def copy_from_model(self) -> None:
        """Set every average to the model's present weights."""
        if self.is_usable("copy_params_from_model_to_ema()"):
            self._run(self._live(), (1.0,) * len(self.policy.gammas))
            self._dispatch.order_writers()  # whoever writes the weights next need not know that they were read
            self._raise_failures("copy_params_from_model_to_ema()")

    def copy_to_model(self, profile: int) -> None:
        """Set the model's weights to an average."""
        self.order_readers("copy_params_from_ema_to_model()")
        self.fence_everybody()
        with neutral_modes():
            for tracked, average in self.flat_buffers.averages(profile):
                write(*writable_view(tracked.live(), average))

    def prepare_loading(self, what: str = "load_state_dict()", *, with_snapshots: bool = False) -> bool:
        """The averages are about to be set from outside: whatever is queued or failed does not matter any more.

        Args:
            what: Named in errors.
            with_snapshots: Wait also until snapshots that were taken are on disk.

        Returns:
            False in a forked child, where this object does nothing.
        """
        if self._process != os.getpid():
            return False
        if self._closed:
            raise ClosedError(f"{what}: the EMA was closed. Construct another one.")
        if self._refusal is not None:
            raise type(self._refusal)(f"{what}: {self._refusal}")
        self._dispatch.drain(with_snapshots=with_snapshots)
        self._note_error()  # stands until something has been loaded
        return True

    def loaded(self) -> None:
        """They have been set."""
        self._failure = None

    def fail(self, what: str, error: BaseException) -> None:
        """They have been set in part only."""
        self._failure, self._failed = error, what

    # ---- inside

    def _begin(self) -> None:
        self.run_lineage.is_fresh = False
        told = self._find_resumable_run(self.run_lineage.run)
        if told is not None:  # before anything counts: where warnings are errors, this update is refused
            warn(told)

    def _drain(self) -> None:
        """What ``drain_request`` asks for, at the end of an update."""
        timeout = clamp_timeout(self.drain_timeout_seconds)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._dispatch.drain(timeout)  # first, so that there is room for one more snapshot whatever ``on_full`` says
        try:
            if self.schedule.updates:
                self._checkpoint()
        except SnapshotWriteError:
            self.drain_request.answer()  # there is nothing left to wait for, and whoever asked is told
            raise
        self._dispatch.drain(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        self.drain_request.answer()
        self._raise_failures("update()", failed_writes=False)

    def _live(self) -> Mapping[str, Tensor]:
        """Every tensor that is averaged or copied, as the model holds it now."""
        live = self._tensors.find()
        if live is not self._checked and not self._offloads and not self.policy.allow_different_devices:
            self._check_devices(live)
        self._checked = live
        if hold_averages(live.values()):
            raise NitrousError(
                "an average of another EMA is in the place of the model's weights. Leave its "
                "`with ema.average_parameters()` block first."
            )
        return live

    def _check_devices(self, live: Mapping[str, Tensor]) -> None:
        for name, tensor in live.items():
            if tensor.device != self._dispatch.devices[name]:
                if self.policy.move_to_online_device:
                    self.move(tensor.device)
                    return
                place = self._dispatch.devices[name]
                raise NitrousError(
                    f"{name!r} is on {tensor.device} but its average is on {place}. Move the EMA as well "
                    f"(ema.to({str(tensor.device)!r})) or construct it with move_ema_to_online_device=True; "
                    "allow_different_devices=True copies the parameters over at each update."
                )

    def _average(self, live: Mapping[str, Tensor], weights: Sequence[float]) -> None:
        self._run(live, weights)
        if self.guard is not None and self._dispatch.reads_later:
            self.guard.after_update(self._parameters, [live[name] for name in self._parameters])

    def _run(self, live: Mapping[str, Tensor], weights: Sequence[float]) -> None:
        copy_all = self.guard is not None and self.guard.copies
        self._attempt(partial(self._dispatch.queue, live, weights, copy_all=copy_all), "update()")

    def _attempt(self, queue_work: Callable[[], None], what: str) -> None:
        try:
            with neutral_modes():
                queue_work()
        except BaseException as error:
            self.fail("averaging", error)  # part may be queued: also Ctrl-C leaves averages that are not right
            if not isinstance(error, Exception):
                raise
            self._raise_failures(what, failed_writes=False)

    def _refuse_capture(self, what: str) -> None:
        if self._dispatch.is_capturing():
            raise NitrousError(
                f"{what}: the current stream is being captured into a graph, which would replay the averaging of this "
                "one step, with its weights, at every replay. Call it outside the captured region, after each replay; "
                "and fence() before each replay, since no optimizer hook runs in one."
            )

    def _note_error(self) -> None:
        error = self._dispatch.take_error()
        if error is not None:
            self.fail("averaging", error)

    def _raise_failures(self, what: str, *, failed_writes: bool = True) -> None:
        self._note_error()
        if self._failure is not None:
            snapshots = ", or go back to a snapshot (restore)" if self._sink is not None else ""
            raise NitrousError(
                f"{what}: {self._failed} failed ({self._failure}); the averages are not what the training made of "
                f"them. Load a state that was saved before (load_state_dict){snapshots}."
            ) from self._failure
        if failed_writes and self._sink is not None:
            self._sink.raise_failures()


def _dispatch(flat_buffers: FlatBuffers, background: Background | None) -> UpdateDispatcher:
    if background is None:
        return UpdateDispatcher(flat_buffers)
    return UpdateDispatcher(
        flat_buffers,
        background.make_lane,
        reads_later=True,
        scratch_bytes=background.scratch_bytes,
        offloads=background.offloads,
    )


def _nothing() -> None:
    pass
