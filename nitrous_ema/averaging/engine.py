"""The engine behind every EMA class: when which parameters are averaged on which lane, and when a snapshot is taken.

Averaging should cost the training loop nothing, yet give the same bits inside update() as in the background.
The engine therefore decides the sequence of the work and owns neither a thread nor a stream. Lanes run the work, a sink
takes the snapshots (``execution/interfaces.py``), and the write guard decides whether parameters may be read live.
``PostHocEMA`` uses lanes that run everything inside update(), ``AsyncPostHocEMA`` uses lanes in the background.

owner               state
RunLineage          run id, ancestors, steps with a snapshot
Schedule            step, training time, weights of an update
FlatBuffers         averages and copied tensors
UpdateDispatcher    lanes, caller-side copies, deferred updates, sink
WriteGuard          whether parameters may be read live; only with lanes in the background
AveragingEngine     refusal, failure, closed: whether the averages may be updated and read

ENGINE-1  Parameters are resolved and arguments are checked   test_failed_update_counts_nothing
    before any counter changes: a refused update() has
    changed nothing.
ENGINE-2  Buffers change in forward, so a background lane      test_batch_norm_statistics_are_those_of_the_step
    never reads them live: they are copied where the caller's
    work runs.
ENGINE-3  The caller's copies are written again only after     test_copies_are_not_overwritten_while_they_are_read
    the lane has read them.
ENGINE-4  After a lane has failed, the averages are refused    test_averages_are_refused_after_a_failure
    until a state is loaded or a snapshot is restored.         test_restore_heals_a_failed_lane
ENGINE-5  Queued work holds no reference to the engine, so     test_dropped_ema_leaves_no_thread_or_hook_behind
    dropping the EMA ends it, on the thread that dropped it.

Longer than 300 lines: the order of everything that may happen to averages stands on one page.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from nitrous_ema._base.arguments import clamp_timeout
from nitrous_ema.averaging.config import Background, EMAConfig
from nitrous_ema.averaging.execution.dispatch import UpdateDispatcher
from nitrous_ema.averaging.execution.interfaces import PendingSnapshot, SnapshotSink
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.execution.write_guard import WriteGuard, fence_all, install_hooks
from nitrous_ema.averaging.kernels.flat_buffers import FlatBuffers, snapshot_layout
from nitrous_ema.averaging.lineage import RunLineage
from nitrous_ema.averaging.model.live_tensors import LiveTensors, hold_averages
from nitrous_ema.averaging.model.ranks import ALONE, Ranks
from nitrous_ema.averaging.model.tracking import TrackedTensor, track, unwrap, writable_view, write
from nitrous_ema.averaging.schedule import Schedule, Time
from nitrous_ema.averaging.shutdown import DrainRequest, shut_down
from nitrous_ema.averaging.stats import Stats
from nitrous_ema.errors import ClosedError, NitrousError, SnapshotWriteError, warn
from nitrous_ema.snapshots.stats import WriteStats

_HOST = torch.device("cpu")


class AverageViewer(Protocol):
    """An object whose tensors have the memory of averages."""

    def rebind(self) -> None:
        """Replace the memory, because the averages have moved to other buffers."""

    def mark_written(self) -> None:
        """Move the version counters of the tensors, because the averages are written."""


class AveragingEngine:
    """Averages of one model. Until the first update they are equal to the model's weights.

    Args:
        model: The online model, wrapped or not. Referenced for as long as this object lives.
        config: Profiles, filters and options.
        background: Lanes and options of work in the background; None if everything runs inside update().
        device: Where the averages live; None: each with its parameter.
        tracked: The model's tensors with their roles, if they are known. A role may depend on the values that a buffer
            had when the roles were assigned.
    """

    def __init__(
        self,
        model: Module,
        config: EMAConfig,
        *,
        background: Background | None = None,
        device: torch.device | None = None,
        tracked: Sequence[TrackedTensor] | None = None,
    ) -> None:
        self.model, self.config, self.run_lineage = model, config, RunLineage()
        gammas, sigma_rels = config.profiles
        self.schedule = Schedule(gammas, config.update_every, config.step_size_correction, config.frozen)
        tracked = track(model, config) if tracked is None else tracked
        layout = snapshot_layout(tracked, gammas, sigma_rels, config.checkpoint_dtype)
        self._offloads = background is not None and background.config.offload == "host"
        with neutral_modes():
            self.flat_buffers = FlatBuffers(tracked, layout, _HOST if self._offloads else device)
        if all(group.dtype == torch.float64 for group in self.flat_buffers.groups):
            self.schedule.least_weight = 0.0
        with neutral_modes():
            self._dispatch = _dispatcher(self.flat_buffers, background)
        self.guard: WriteGuard | None = None
        if background is not None:
            self.guard = WriteGuard(background.config.read, self._dispatch.order_writers, self._dispatch.is_capturing)
        self._skips_nonfinite = config.on_nonfinite == "skip"
        self._tensors = LiveTensors(model, tracked)
        self._parameters = [tensor.name for tensor in tracked if tensor.is_parameter and tensor.role != "skipped"]
        self._refusal: NitrousError | None = None  # why the averages may be neither updated nor read for now
        self._closed = False
        self._failure: BaseException | None = None  # what a lane or restore() raised
        self._failed_operation = "averaging"  # or "restore()"
        self._find_resumable_run: Callable[[str], str | None] = lambda run: None
        self.saved_versions: dict[int, int] = {}
        """Version counters of averages, by ``id``, when they were last part of a state_dict()."""
        self._on_begin: Callable[[], str] = lambda: ""
        self.ranks = ALONE
        self._has_compared_ranks = False
        self.drain_request = DrainRequest()
        self.drain_timeout_seconds: float | None = None
        """How long a requested drain may take; None waits as long as it takes."""
        self._process = os.getpid()
        self.viewers: weakref.WeakSet[AverageViewer] = weakref.WeakSet()
        self._checked: Mapping[str, Tensor] | None = None  # live tensors whose devices have been checked
        self.copy_from_model()
        remove_hooks = install_hooks(self.guard, unwrap(model)) if self.guard is not None else _nothing
        # Its arguments must not refer to this object, which would then never be freed (ENGINE-5).
        timeout = None if background is None else background.config.wait_timeout
        self._finalizer = weakref.finalize(
            self, shut_down, self._dispatch, self.guard, remove_hooks, self._process, timeout
        )

    def attach(
        self,
        sink: SnapshotSink,
        find_resumable_run: Callable[[str], str | None] = lambda run: None,
        on_begin: Callable[[], str] = lambda: "",
        ranks: Ranks = ALONE,
    ) -> None:
        """Set the sink of snapshots. An engine without a sink takes no snapshots.

        Args:
            sink: Takes the snapshots.
            find_resumable_run: Called at the first update() of a run that continues no other, with the id of that run.
                Returns a warning about a run that could have been resumed, or None.
            on_begin: Called when a run begins: at its first update(), or when a state has been loaded. Returns the id
                of the newest run that has snapshots already, or "".
            ranks: The ranks that hold the model.
        """
        self.ranks = ranks
        self.run_lineage.agree = partial(ranks.first, "later run")
        self._dispatch.sinks.append(sink)
        self._find_resumable_run, self._on_begin = find_resumable_run, on_begin

    @property
    def _sink(self) -> SnapshotSink | None:
        return self._dispatch.sinks[0] if self._dispatch.sinks else None

    def frozen_copy(self, config: EMAConfig, device: torch.device | None) -> AveragingEngine:
        """Return an engine for other averages of the same tensors, which no update changes.

        Args:
            config: From ``frozen_config``.
            device: Where its averages live; None: each with its parameter.
        """
        return AveragingEngine(self.model, config, device=device, tracked=self.flat_buffers.tracked)

    def frozen_config(self, sigma_rels: Sequence[float] | None, gammas: Sequence[float] | None) -> EMAConfig:
        """Return the configuration of a ``frozen_copy`` with other profiles. Raises ValueError for invalid profiles."""
        return replace(
            self.config,
            sigma_rels=sigma_rels,
            gammas=gammas,
            update_every=1,
            frozen=True,
            allow_different_devices=True,  # the copy may be requested for another device
            on_nonfinite="warn",
        )

    # ---- during training

    def update(self, t_delta: Time = 1) -> None:
        """Count one step; average if an update is due, and take a snapshot if one is due."""
        if self.is_inherited:
            return
        self.check_open("update()")
        self.check_no_refusal("update()")
        self.check_averages("update()")
        if self.guard is not None:
            self.guard.raise_violation()
        self._refuse_capture("update()")
        self.schedule.warn_of_jump(self.schedule.check_t_delta(t_delta))
        live = None
        if self.schedule.is_due:
            if self.guard is not None:
                self.guard.before_update()
            live = self._live()
        if not self._has_compared_ranks:
            self._compare_ranks(live)
        if self.run_lineage.is_fresh:
            self._begin()
        weights = self.schedule.advance(t_delta)  # ENGINE-1: every check that may refuse the update precedes this line
        if live is not None and weights is not None:
            self._average(live, weights)
        every = self.config.checkpoint_every_steps
        if self.drain_request.take():
            self._drain()  # includes a snapshot of this step
        elif every is not None and self.schedule.step % every == 0:
            self._checkpoint()
        if weights is not None:
            self.schedule.warn_of_small(weights)
        # Failures of earlier background writes are raised last: a caller that catches the error and goes on has lost
        # neither the step nor the snapshot of this call.
        self.raise_failed_writes()

    def checkpoint(self) -> bool:
        """Take a snapshot of the averages as they are now; False if the sink skipped it."""
        if self.is_inherited:
            return False
        self.check_open("checkpoint()")
        self.check_failures("checkpoint()")
        self._refuse_capture("checkpoint()")
        if self._sink is None:
            raise NitrousError("checkpoint(): this EMA writes no snapshots. Use PostHocEMA or AsyncPostHocEMA.")
        if not self.schedule.updates:
            raise NitrousError("checkpoint() before the first update(): there is no average yet. Call update() first.")
        return self._checkpoint()

    def _checkpoint(self) -> bool:
        # A snapshot that was taken is not taken again, unless its write has failed since.
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
        # Deferred updates belong to the averages of this step, so they are written before the snapshot reads them.
        self._attempt(self._dispatch.flush_deferred, "checkpoint()")
        taken = self._sink.take_snapshot(
            PendingSnapshot(self.flat_buffers, self.run_lineage.stamp(self.schedule)), self._dispatch.lane
        )
        if taken:
            self.run_lineage.written.add(self.schedule.step)
        return taken

    def fence(self) -> None:
        """Order the caller's next use of the weights after every read of them so far."""
        if self.guard is not None and not self.is_inherited:
            self.guard.fence()

    def fence_all_readers(self) -> None:
        """Order the caller's next use of the weights after every read of them by any EMA."""
        if not self.is_inherited:
            fence_all([tracked.live() for tracked in self.flat_buffers.averaged])

    def stats(self) -> Stats:
        """Return the counts of updates and of snapshots so far."""
        written = self._sink.stats() if self._sink is not None and not self.is_inherited else WriteStats()
        dispatch = self._dispatch
        return Stats(
            **asdict(written),
            updates=self.schedule.updates,
            scratch_bytes=dispatch.scratch_bytes,
            held_up=dispatch.num_held_up,
        )

    # ---- whether the averages may be used

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child of the process that made the engine; the engine does nothing there.

        A child has the parent's memory but none of its threads, so queued work would never run.
        """
        return self._process != os.getpid()

    @property
    def is_open(self) -> bool:
        """Whether the engine still has its threads and hooks: close() has not ended them yet."""
        return self._finalizer.alive

    def check_open(self, what: str) -> None:
        """Raise ClosedError, which names ``what``, if close() was called."""
        if self._closed:
            raise ClosedError(f"{what}: the EMA was closed. Construct another one.")

    def check_no_refusal(self, what: str) -> None:
        """Raise the reason given to ``refuse``, if any; for example, that the averages are swapped into the model."""
        if self._refusal is not None:
            raise type(self._refusal)(f"{what}: {self._refusal}")

    def check_averages(self, what: str) -> None:
        """Raise NitrousError if averaging or restore() failed, so that the averages are invalid (ENGINE-4)."""
        self._collect_lane_error()
        if self._failure is not None:
            snapshots = " or restore a snapshot (restore)" if self._sink is not None else ""
            cause = str(self._failure) or type(self._failure).__name__  # KeyboardInterrupt has no text
            raise NitrousError(
                f"{what}: {self._failed_operation} failed ({cause}), so the averages are no longer valid. "
                f"Load a saved state (load_state_dict){snapshots}."
            ) from self._failure

    def raise_failed_writes(self) -> None:
        """Raise SnapshotWriteError, once for each background write that failed; or warn, with ``on_error="warn"``."""
        if self._sink is not None:
            self._sink.raise_failures()

    def check_failures(self, what: str) -> None:
        """Raise the error that prevents reading the averages, or that background work has caused since the last call.

        Args:
            what: The caller's operation, named in the error.

        Raises:
            NitrousError: The averages are swapped into the model; averaging or restore() failed.
            SnapshotWriteError: A background write failed; raised once.
            UnsafeReadError: Weights were written while they were read; raised once.
        """
        self.check_no_refusal(what)
        self.check_averages(what)
        self.raise_failed_writes()
        if self.guard is not None:
            self.guard.detect_writes()
            self.guard.raise_violation()

    def refuse(self, reason: NitrousError) -> None:
        """Refuse every update and every read of the averages from now on, with this reason."""
        self._refusal = reason

    def end_refusal(self, reason: NitrousError) -> None:
        """End the refusal with this reason. A later refusal with another reason stays."""
        if self._refusal is reason:
            self._refusal = None

    # ---- reading the averages, and ending

    def order_readers(self, what: str) -> None:
        """Order the caller's reads of the averages after all updates so far. Raises what ``check_failures`` raises."""
        if self.is_inherited:
            return
        self.check_failures(what)
        if self._dispatch.is_capturing():
            raise NitrousError(
                f"{what}: the current stream is being captured into a graph, whose replays would not wait for the "
                "averaging of later steps. Read the averages outside of the captured region, or capture a copy of them "
                "(copy.deepcopy(ema_model))."
            )
        self._dispatch.order_readers()
        self._check_outcome(what)

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Block until every update is done and every snapshot is on disk or reported as failed. Raises TimeoutError."""
        if self.is_inherited:
            return
        self.check_failures("flush()")
        self._dispatch.drain(clamp_timeout(timeout_seconds))
        self._check_outcome("flush()")

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Drain, write pending snapshots, end threads and remove hooks; updates are refused from then on.

        Returns:
            False if the engine was closed before.

        Raises:
            TimeoutError: Updates or snapshots are still pending; close() may be called again.
        """
        if self.is_inherited or not self._finalizer.alive:
            return False
        self._closed = True  # before the wait: after a TimeoutError no update may add to what is pending
        self._dispatch.drain(clamp_timeout(timeout_seconds))
        if self.guard is not None:
            self.guard.fence()  # no lane reads the weights any more, so later writes are no violations
        try:
            self._check_outcome("close()")
            if self.guard is not None:
                self.guard.raise_violation()
        finally:
            self._finalizer()
        return True

    def move(self, device: torch.device) -> None:
        """Move every average and copied tensor to a device; does nothing with ``offload="host"``."""
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

    def resize(self, shapes: Mapping[str, torch.Size]) -> None:
        """Give copied tensors new shapes. Their values are zeros then. Waits until all work is done and on disk.

        Args:
            shapes: The new shapes, by name.
        """
        if not shapes:
            return
        tracked = [
            replace(tensor, shape=shapes[tensor.name]) if tensor.name in shapes else tensor
            for tensor in self.flat_buffers.tracked
        ]
        layout = replace(self.flat_buffers.layout, records=tuple(tensor.record for tensor in tracked))
        self._dispatch.drain()
        if self._sink is not None:
            self._sink.resize(layout)
        with neutral_modes():
            self.flat_buffers.resize(tracked, layout)
            self._dispatch.place()
            self._checked = None
            for viewer in self.viewers:
                viewer.rebind()

    def copy_from_model(self) -> None:
        """Set every average to the model's current weights."""
        if self.is_inherited:
            return
        what = "copy_params_from_model_to_ema()"
        self.check_open(what)
        self.check_failures(what)
        self._run(self._live(), (1.0,) * len(self.config.profiles.gammas))
        # The caller may write the weights next without a fence, because only update() announces a read of them.
        self._dispatch.order_writers()
        self._check_outcome(what)

    def copy_to_model(self, profile: int) -> None:
        """Set the model's weights to an average."""
        self.order_readers("copy_params_from_ema_to_model()")
        self.fence_all_readers()
        with neutral_modes():
            for tracked, average in self.flat_buffers.averages(profile):
                write(*writable_view(tracked.live(), average))

    def prepare_loading(self, what: str = "load_state_dict()", *, with_snapshots: bool = False) -> bool:
        """Prepare for averages that are set from outside: wait for queued work, and discard its failures.

        Args:
            what: The caller's operation, named in errors.
            with_snapshots: Wait also until snapshots that were taken are on disk.

        Returns:
            False in a forked child, where the engine does nothing.
        """
        if self.is_inherited:
            return False
        self.check_open(what)
        self.check_no_refusal(what)
        self._dispatch.drain(with_snapshots=with_snapshots)
        self._collect_lane_error()  # the averages stay invalid until something has been loaded
        return True

    def reconfigure(self, **changes: Any) -> None:
        """Change options that may change during training.

        Raises:
            TypeError, ValueError: A value is not one that the constructor accepts.
        """
        self.config = replace(self.config, **changes)
        self.schedule.frozen = self.config.frozen

    def continue_run(self, lineage: Sequence[Sequence[Any]], step: int) -> None:
        """Continue the run of a loaded state; see ``RunLineage.continue_from``."""
        self.run_lineage.continue_from(lineage, step)
        self.run_lineage.begin_after(self._on_begin())

    def mark_valid(self) -> None:
        """End the state that ``mark_invalid`` began: the averages have been set completely."""
        self._failure = None
        self._mark_written()

    def mark_invalid(self, operation: str, error: BaseException) -> None:
        """Refuse the averages until something is loaded, because an operation has changed only a part of them."""
        self._failure, self._failed_operation = error, operation
        self._mark_written()

    # ---- inside

    def _compare_ranks(self, live: Mapping[str, Tensor] | None) -> None:
        """Check, at the first update() that averages, that the ranks hold one model."""
        self.ranks.check_initialized()
        if live is not None:
            self._has_compared_ranks = True
            self.ranks.compare_weights(
                [(each.name, live[each.name]) for each in self.flat_buffers.averaged if each.is_parameter]
            )

    def _begin(self) -> None:
        """Warn, at the first update() of a run that continues no other, of a run that could have been resumed."""
        self.run_lineage.is_fresh = False
        self.run_lineage.begin_after(self._on_begin())
        warning = self._find_resumable_run(self.run_lineage.run)
        if warning is not None:  # before any counter changes: where warnings are errors, this update is refused
            warn(warning)

    def _drain(self) -> None:
        """Carry out a requested drain, at the end of an update."""
        timeout = clamp_timeout(self.drain_timeout_seconds)
        deadline = None if timeout is None else time.monotonic() + timeout
        # Before the checkpoint, too: then a slot is free for one more snapshot, whatever ``on_full`` is.
        self._dispatch.drain(timeout)
        try:
            if self.schedule.updates:
                self._checkpoint()
        except SnapshotWriteError:
            self.drain_request.mark_done()  # nothing is left to wait for, and this error reports the failed write
            raise
        self._dispatch.drain(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        self.drain_request.mark_done()
        self.check_averages("update()")

    def _live(self) -> Mapping[str, Tensor]:
        """Return every averaged or copied tensor by name, as the model holds it now."""
        live = self._tensors.find()
        if live is not self._checked:
            self._follow_shapes(live)
        if live is not self._checked and not self._offloads and not self.config.allow_different_devices:
            self._check_devices(live)
        if live is not self._checked and self._skips_nonfinite:
            self._dispatch.check_one_device(live)
        self._checked = live
        if hold_averages(live.values()):
            raise NitrousError(
                "the model currently holds another EMA's averaged weights. Leave that EMA's "
                "`with ema.average_parameters()` block first."
            )
        return live

    def _follow_shapes(self, live: Mapping[str, Tensor]) -> None:
        """Give copied tensors the shapes that they have in the model now, and their values."""
        shapes = {
            tracked.name: live[tracked.name].shape
            for tracked in self.flat_buffers.copied
            if live[tracked.name].shape != tracked.shape
        }
        self.resize(shapes)
        with neutral_modes():
            for tracked, value in self.flat_buffers.copies() if shapes else ():
                if tracked.name in shapes:
                    value.copy_(live[tracked.name])

    def _check_devices(self, live: Mapping[str, Tensor]) -> None:
        for name, tensor in live.items():
            if tensor.device != self._dispatch.devices[name]:
                if self.config.move_ema_to_online_device:
                    self.move(tensor.device)
                    return
                device = self._dispatch.devices[name]
                raise NitrousError(
                    f"{name!r} is on {tensor.device} but its average is on {device}. Move the EMA as well "
                    f"(ema.to({str(tensor.device)!r})) or construct it with move_ema_to_online_device=True; "
                    "allow_different_devices=True copies the parameters over at each update."
                )

    def _average(self, live: Mapping[str, Tensor], weights: Sequence[float]) -> None:
        self._run(live, weights, may_skip=self._skips_nonfinite)
        if self.guard is not None and self._dispatch.reads_later:
            self.guard.after_update(self._parameters, [live[name] for name in self._parameters])

    def _run(self, live: Mapping[str, Tensor], weights: Sequence[float], *, may_skip: bool = False) -> None:
        self._mark_written()
        copy_all = self.guard is not None and self.guard.copies
        self._attempt(partial(self._dispatch.queue, live, weights, copy_all=copy_all, may_skip=may_skip), "update()")

    def _attempt(self, queue_work: Callable[[], None], what: str) -> None:
        try:
            with neutral_modes():
                queue_work()
        except BaseException as error:
            self.mark_invalid("averaging", error)  # a part may be queued, also after Ctrl-C
            if not isinstance(error, Exception):
                raise
            self.check_averages(what)

    def _mark_written(self) -> None:
        """Make autograd refuse to use values of the averages that it saved before."""
        self.flat_buffers.mark_written()
        for viewer in self.viewers:
            viewer.mark_written()

    def _refuse_capture(self, what: str) -> None:
        if self._dispatch.is_capturing():
            raise NitrousError(
                f"{what}: the current stream is being captured into a graph, which would replay the averaging of this "
                "one step, with its weights, at every replay. Call it outside the captured region, after each replay; "
                "and fence() before each replay, since no optimizer hook runs in one."
            )

    def _collect_lane_error(self) -> None:
        error = self._dispatch.take_error()
        if error is not None:
            self.mark_invalid("averaging", error)

    def _check_outcome(self, what: str) -> None:
        """Raise the failures of work that an operation has just waited for."""
        self.check_averages(what)
        self.raise_failed_writes()


def _dispatcher(flat_buffers: FlatBuffers, background: Background | None) -> UpdateDispatcher:
    if background is None:
        return UpdateDispatcher(flat_buffers)
    return UpdateDispatcher(
        flat_buffers,
        background.make_lane,
        reads_later=True,
        scratch_bytes=background.config.scratch_bytes,
        offloads=background.config.offload == "host",
    )


def _nothing() -> None:
    pass
