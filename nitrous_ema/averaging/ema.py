"""The synchronous service: ``PostHocEMA``, and ``KarrasEMA`` for one average.

Drop-in for nitrous-ema 0.0.1, whose arguments and methods these are. Everything happens before ``update()`` returns;
``AsyncPostHocEMA`` is the same machine with its work in the background.

Longer than the house's 300 lines: it is mostly what users read, arguments and docstrings of the public methods.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch.nn import Module

from nitrous_ema.averaging.averaged_module import AveragedModule
from nitrous_ema.averaging.base import EMABase
from nitrous_ema.averaging.config import AveragingPolicy, Background, EMAConfig, profiles
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.inline import InlineSnapshotSink
from nitrous_ema.averaging.execution.interfaces import SnapshotSink, neutral_modes
from nitrous_ema.averaging.model.tracking import NameFilter, TrackingPolicy
from nitrous_ema.averaging.restore import restore, warn_about_other_runs
from nitrous_ema.averaging.schedule import StepSizeCorrection
from nitrous_ema.errors import SnapshotDamaged, SnapshotError, warn
from nitrous_ema.posthoc.keep_rules import Keep
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis import DEFAULT_TOLERANCE, plan_from_store, stream, stream_copied

Template = Module | Callable[[], Module]


class KarrasEMA(EMABase):
    """One average of a model's weights, with a power-function profile (Karras et al. 2023, section 3.1).

    Args:
        model: The online model, wrapped or not.
        sigma_rel: Width of the profile relative to the training time, in (0, 12 ** -0.5); or
        gamma: its exponent, greater than 0.
        ema_model: The module that shows the average, or a function that builds it; by default a copy of the model's
            structure. For models that cannot be copied.
        update_every: Calls of update() from one applied update to the next.
        frozen: Count steps, but leave the average as it is after the first update.
        param_or_buffer_names_no_ema: Names, or a function of a name: copied instead of averaged.
        ignore_names: Names, or a function of a name: left out entirely.
        ignore_startswith_names: Left out entirely if the name starts with one of these.
        allow_different_devices: The average may live on another device; parameters are then copied over.
        move_ema_to_online_device: The average follows parameters that are found on another device.
        step_size_correction: ``"exact"``, or True or False for the numbers of nitrous-ema 0.0.1 (see ``schedule``).

    Raises:
        ValueError: Both or neither of sigma_rel and gamma, one outside its domain, a filter that matches nothing.
        UntrackableModelError: A tensor cannot be averaged, or there is none.
    """

    def __init__(
        self,
        model: Module,
        sigma_rel: float | None = None,
        gamma: float | None = None,
        ema_model: Template | None = None,
        update_every: int = 100,
        frozen: bool = False,
        param_or_buffer_names_no_ema: NameFilter | None = (),
        ignore_names: NameFilter | None = (),
        ignore_startswith_names: Collection[str] | None = (),
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
        step_size_correction: StepSizeCorrection = "exact",
    ) -> None:
        if (sigma_rel is None) == (gamma is None):
            raise ValueError("Give either sigma_rel or gamma: the width of the profile, or its exponent.")
        gammas, sigma_rels = profiles(None if sigma_rel is None else (sigma_rel,), None if gamma is None else (gamma,))
        engine = AveragingEngine(
            model,
            TrackingPolicy(
                copied=param_or_buffer_names_no_ema, skipped=ignore_names, skipped_prefixes=ignore_startswith_names
            ),
            AveragingPolicy(
                gammas=gammas,
                sigma_rels=sigma_rels,
                update_every=update_every,
                correction=step_size_correction,
                frozen=frozen,
                allow_different_devices=allow_different_devices,
                move_to_online_device=move_ema_to_online_device,
            ),
        )
        self._show(engine, 0, ema_model)

    @classmethod
    def _view(cls, engine: AveragingEngine, index: int, template: Template | None) -> KarrasEMA:
        """One of several profiles that are averaged together."""
        view = cls.__new__(cls)
        view._show(engine, index, template)
        return view

    def _show(self, engine: AveragingEngine, index: int, template: Template | None) -> None:
        super().__init__(engine)
        self._profile = index
        self._template = (template,)  # in a tuple, as a module must not become a submodule
        self._shown = AveragedModule(engine, index, template)

    @property
    def gamma(self) -> float:
        """Exponent of the profile."""
        return self._engine.policy.gammas[self._profile]

    @property
    def sigma_rel(self) -> float:
        """Width of the profile relative to the training time."""
        return self._engine.policy.sigma_rels[self._profile]

    @property
    def ema_model(self) -> Module:
        """A module with the average as its weights, in eval mode; built when first asked for.

        Raises:
            UncopyableModelError: The model cannot be copied; pass ``ema_model`` at construction.
        """
        return self._shown.module()

    def eval(self) -> Any:
        """The module with the average (as in nitrous-ema 0.0.1); it always is in eval mode."""
        return self.ema_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the module with the average."""
        return self.ema_model(*args, **kwargs)

    def _prefixes(self) -> Mapping[int, str]:
        return {self._profile: ""}


class PostHocEMA(EMABase):
    """Averages of a model with several profiles, and snapshots of them from which any EMA length can be synthesized.

    Args:
        model: The online model, wrapped or not.
        sigma_rels: Widths of the tracked profiles relative to the training time, each in (0, 12 ** -0.5); default
            (0.05, 0.10). Or
        gammas: their exponents, each greater than 0.
        checkpoint_every_num_steps: Calls of update() between snapshots (also a float such as 1e10), or "manual".
        checkpoint_folder: Where snapshots go; created if need be.
        checkpoint_dtype: Type of the averages in snapshots: float32, float64, float16 or bfloat16.
        keep: Which snapshots stay as training goes on: ``"all"``; a number of them, >= 2; an amount of bytes such as
            ``"100GB"``; or a rule (``KeepGeometric``, ``KeepCount``, ``KeepBytes``). Chosen among all of this run and
            of those that it continues, but for what it shares with a run that was closed at a later step.
        ema_model: A function that builds the module of an average, for models that cannot be copied; or one module,
            which then shows the first profile.
        update_every: Calls of update() from one applied update to the next.
        frozen: Count steps, but leave the averages as they are after the first update.
        param_or_buffer_names_no_ema: Names, or a function of a name: copied instead of averaged.
        ignore_names: Names, or a function of a name: left out entirely.
        ignore_startswith_names: Left out entirely if the name starts with one of these.
        allow_different_devices: Averages may live on another device; parameters are then copied over.
        move_ema_to_online_device: Averages follow parameters that are found on another device.
        step_size_correction: ``"exact"``, or True or False for the numbers of nitrous-ema 0.0.1 (see ``schedule``).

    Raises:
        ValueError: An argument is outside its range; a filter matches nothing; ``keep`` has no room for 3 snapshots.
        UntrackableModelError: A tensor cannot be averaged, or there is none.
        SnapshotError: Snapshots cannot be written to the folder, or not even one fits on its disk.
    """

    def __init__(
        self,
        model: Module,
        sigma_rels: Sequence[float] | None = None,
        gammas: Sequence[float] | None = None,
        checkpoint_every_num_steps: float | Literal["manual"] = 1000,
        checkpoint_folder: str | os.PathLike[str] = "./ema-checkpoints",
        checkpoint_dtype: torch.dtype = torch.float32,
        *,
        keep: Keep = "all",
        ema_model: Template | None = None,
        update_every: int = 100,
        frozen: bool = False,
        param_or_buffer_names_no_ema: NameFilter | None = (),
        ignore_names: NameFilter | None = (),
        ignore_startswith_names: Collection[str] | None = (),
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
        step_size_correction: StepSizeCorrection = "exact",
    ) -> None:
        settings = EMAConfig(
            sigma_rels=sigma_rels,
            gammas=gammas,
            checkpoint_every_num_steps=checkpoint_every_num_steps,
            checkpoint_folder=checkpoint_folder,
            checkpoint_dtype=checkpoint_dtype,
            keep=keep,
            update_every=update_every,
            frozen=frozen,
            param_or_buffer_names_no_ema=param_or_buffer_names_no_ema,
            ignore_names=ignore_names,
            ignore_startswith_names=ignore_startswith_names,
            allow_different_devices=allow_different_devices,
            move_ema_to_online_device=move_ema_to_online_device,
            step_size_correction=step_size_correction,
        )
        self._start(model, settings, ema_model, lambda writer, layout: InlineSnapshotSink(writer))

    def _start(
        self,
        model: Module,
        settings: EMAConfig,
        ema_model: Template | None,
        make_sink: Callable[[RetainingWriter, Layout], SnapshotSink],
        *,
        background: Background | None = None,
    ) -> None:
        engine = AveragingEngine(model, settings.tracking(), settings.averaging(), background=background)
        super().__init__(engine)
        self._settings = settings
        self._store = SnapshotStore(settings.checkpoint_folder)
        self._retaining_writer = RetainingWriter(self._store, settings.keeping())
        try:
            self._retaining_writer.check(engine.flat_buffers.layout, engine.run_lineage.first_stamp())
            self._store.prepare()
            self._retaining_writer.check_disk_space(engine.flat_buffers.layout, engine.run_lineage.first_stamp())
            engine.attach(
                make_sink(self._retaining_writer, engine.flat_buffers.layout),
                find_resumable_run=partial(warn_about_other_runs, self._store),
            )
        except BaseException:
            engine.close()  # whoever keeps the exception keeps the engine; its hooks and threads must go now
            raise
        views = []
        for profile in range(len(engine.policy.gammas)):
            one_module = isinstance(ema_model, Module) and profile > 0
            views.append(KarrasEMA._view(engine, profile, None if one_module else ema_model))
        # A tuple is no ModuleList: the averages stay out of modules() and parameters().
        self.ema_models: tuple[KarrasEMA, ...] = tuple(views)

    def checkpoint(self) -> bool:
        """Take a snapshot of the averages as they are now.

        With the exact correction the averages are first brought up to the present step. A step that this run already
        has a snapshot of is not written again.

        Returns:
            False if the snapshot was skipped (``on_full="skip"``), else True.

        Raises:
            NitrousError: Before the first update(), or after close().
            SnapshotWriteError: It could not be written; the averages are untouched.
        """
        return self._engine.checkpoint()

    def pin(self, step: int | None = None) -> None:
        """Have a snapshot stay whatever ``keep`` says, and with it the neighbours that averages ending there need.

        A note in the snapshot folder, so that it holds for ``nitrous-ema prune`` and for runs that continue this one.

        Args:
            step: Of a snapshot in this run's history; the newest by default. It may still be on its way to disk.

        Raises:
            SnapshotNotFound: No snapshot of that step; names the nearest ones.
            SnapshotError: The note could not be written.
        """
        if not self._engine.is_usable("pin()", reading=True):
            return
        step = _checked(step)
        with self._retaining_writer.paused(self.run) as coming:
            step = coming[-1] if step is None and coming else step
            if step in coming:
                self._store.pin(step, self.run, must_exist=False)
            else:
                found = self._target(step)
                self._store.pin(found.step, found.run)

    def unpin(self, step: int) -> None:
        """Have a pinned snapshot of this run's history stay only as long as ``keep`` says. Does nothing if it is none.

        Raises:
            SnapshotError: The note could not be removed.
        """
        given = _checked(step)
        if given is None:
            raise TypeError("step is None; expected the step of a pinned snapshot.")
        if not self._engine.is_usable("unpin()", reading=True):
            return
        for run, left_at in self._engine.run_lineage.lineage:
            if left_at is None or given <= left_at:
                self._store.unpin(given, run)

    def restore(self, step: int | None = None, run: str | None = None) -> int:
        """Go back to a snapshot: averages, copied tensors, step, time and lineage are again those that it was taken of.

        For whoever has no saved ``state_dict()`` of the EMA. As after ``load_state_dict``, this run continues the
        snapshot's, and snapshots taken after it are a future that was left. The online model is not touched: give it
        its own weights of that step. Waits until everything that was queued is done and on disk.

        Averages come back to the bit from files of their own type (``checkpoint_dtype=torch.float32``, or float64 for
        models of float64); rounded ones are warned of (NitrousWarning).

        Args:
            step: Of a snapshot in the run's history; the newest by default.
            run: The run to go on with. By default this one if it has snapshots, else the newest one in the folder.

        Returns:
            The step at which training goes on.

        Raises:
            SnapshotNotFound: No such snapshot or run; names the nearest ones.
            SnapshotMismatch: It has other profiles or does not fit the model; names what differs.
            SnapshotDamaged: It does not hold what was written.
            NitrousError: The EMA is closed, or an average is in the model's place.

        Nothing has changed when one of these is raised, unless the file was damaged while it was being read: then the
        averages are refused until something was loaded.
        """
        step = _checked(step)
        engine = self._engine
        if not engine.prepare_loading("restore()", with_snapshots=True):
            return self.step
        if run is None and engine.run_lineage.written and self.run in self._store.runs():
            run = self.run
        try:
            snapshot = self._store.get(step, run)
            with neutral_modes():
                told = restore(engine, snapshot)
        except SnapshotDamaged as error:
            error.args = (f"restore(): {error} Another snapshot is restored by restore(step=...).",)
            raise
        if told is not None:
            warn(told)
        return snapshot.step

    def request_drain(self) -> None:
        """Have the next update() take a snapshot and wait until everything is on disk; then ``drained`` is True.

        Only sets a flag, so that it may be called from a signal handler and from any thread. Meant for SIGTERM: the
        training loop ends when it sees ``drained``. That update waits for at most ``wait_timeout`` seconds, then raises
        TimeoutError; nothing is lost by then, and the end of the interpreter waits once more. May be used again.
        """
        self._engine.drain_request.ask()

    @property
    def drained(self) -> bool:
        """Whether a drain that was requested has been done, and none was requested since."""
        return self._engine.drain_request.is_answered

    @property
    def gammas(self) -> tuple[float, ...]:
        """Exponents of the tracked profiles."""
        return self._engine.policy.gammas

    @property
    def sigma_rels(self) -> tuple[float, ...]:
        """Widths of the tracked profiles relative to the training time."""
        return self._engine.policy.sigma_rels

    @property
    def run(self) -> str:
        """Id of this run, as in the names of its snapshots."""
        return self._engine.run_lineage.run

    @property
    def snapshots(self) -> SnapshotStore:
        """The snapshot folder."""
        return self._store

    def close(self, timeout: float | None = None) -> None:
        """Flush, then end: threads stop, hooks are removed, further updates are refused. Closing again does nothing.

        Notes in the folder that this run writes no more snapshots, so that whoever follows it can stop, and removes
        what ``keep`` has dropped last.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: Something is still pending. Nothing is lost; call it again.
            SnapshotWriteError: A snapshot could not be written.
        """
        was_open = self._engine.is_open
        try:
            self._engine.close(timeout)
        finally:  # it is closed although it may have had a failure to tell
            if was_open and not self._engine.is_open and self._engine.run_lineage.written:
                self._note_end()

    def _note_end(self) -> None:
        try:
            self._store.close_run(self.run)
        except SnapshotError as error:  # a warning: every snapshot is safe, and another failure may be on its way up
            warn(f"{error} Whoever follows this run will not see that it has ended.")
        self._retaining_writer.end()

    def synthesize_ema_model(
        self,
        gamma: float | None = None,
        sigma_rel: float | None = None,
        step: int | None = None,
        *,
        tolerance: float = DEFAULT_TOLERANCE,
        device: torch.device | str | None = None,
    ) -> KarrasEMA:
        """An average of any length, from the snapshots of this run and of those it continued.

        Args:
            gamma: Exponent of the average wanted; or
            sigma_rel: its width relative to the training time, in (0, 12 ** -0.5).
            step: A step with a snapshot, at which the average ends; default the newest.
            tolerance: Relative profile error that may be added to read only the few snapshots that matter; 0 reads all.
            device: Where the average is to be; default where its parameters are.

        Returns:
            A frozen EMA: call it, or take its ``ema_model``. Tensors that are skipped are the online model's own.

        Raises:
            ValueError: Both or neither of gamma and sigma_rel, or one outside its domain; or a negative tolerance.
            SnapshotNotFound: No snapshot of that step; names the nearest ones.
            SnapshotDamaged: A file does not hold what was written.

        Warns (NitrousWarning) where the snapshots cannot give that length well, and says what would help.
        """
        if (sigma_rel is None) == (gamma is None):
            raise ValueError("Give either sigma_rel or gamma: the length of the average, or its exponent.")
        gammas, widths = profiles(None if sigma_rel is None else (sigma_rel,), None if gamma is None else (gamma,))
        self.flush()
        engine = self._engine.frozen_copy(gammas, widths, None if device is None else torch.device(device))
        with neutral_modes():
            told = self._synthesize(engine, gammas[0], self._target(step), tolerance)
        for sentence in told:
            warn(sentence)
        (template,) = self.ema_models[0]._template
        return KarrasEMA._view(engine, 0, None if isinstance(template, Module) else template)

    def _target(self, step: int | None) -> Snapshot:
        """The snapshot at which an average is to end, in this run's history."""
        ancestors = self._engine.run_lineage.ancestors
        if not ancestors or self.run in self._store.runs():
            return self._store.get(step, self.run)
        # A run that was continued and has no snapshot of its own yet is not in the folder: its last ancestor is.
        run, left_at = ancestors[-1]
        abandoned = [snapshot.step for snapshot in self._store.snapshots(run) if snapshot.step > (left_at or 0)]
        return self._store.get(step, run, exclude=abandoned)

    def _synthesize(self, engine: AveragingEngine, gamma: float, target: Snapshot, tolerance: float) -> Sequence[str]:
        """Fill the average of ``engine``, and its counters. Returns what there is to warn of."""
        flat_buffers = engine.flat_buffers
        plan = plan_from_store(self._store, gammas=[gamma], step=target.step, run=target.run, tolerance=tolerance)
        stream(
            plan,
            lambda begin, block: flat_buffers.fill(0, begin, torch.from_numpy(block[0])),
            on_calling_thread=True,  # streams and modes of torch are a thread's own
        )
        # In files with another number of profiles another padding stands before the copied tensors.
        padding = min((begin for begin, _ in plan.target.copied_spans.values()), default=0)

        def take(begin: int, piece: memoryview) -> None:
            flat_buffers.fill_copied(begin - padding, torch.frombuffer(piece, dtype=torch.uint8))

        stream_copied(plan, take)
        engine.schedule.load({"step": target.step, "now": target.t, "t": target.t, "updates": 1})
        return plan.report.warnings

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Output of every average's module, in the order of the profiles."""
        return tuple(view(*args, **kwargs) for view in self.ema_models)

    def _prefixes(self) -> Mapping[int, str]:
        return {profile: f"ema_models.{profile}." for profile in range(len(self.gammas))}


def _checked(step: Any) -> int | None:
    """A step as a plain int (numpy's integers are fine), or None."""
    if step is None:
        return None
    if isinstance(step, bool) or not isinstance(step, Integral):
        raise TypeError(f"step is {step!r}; expected the step of a snapshot (an integer).")
    return int(step)
