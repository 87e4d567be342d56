"""``PostHocEMA``, whose work is done when ``update()`` returns, and ``KarrasEMA`` for one average.

Drop-in replacements for the classes of nitrous-ema 0.0.1, with the same arguments and methods. ``AsyncPostHocEMA`` uses
the same engine with its work in the background.

Longer than 300 lines: it is mostly what users read, arguments and docstrings of the public methods.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import Module

from nitrous_ema._base.arguments import check_not_excluded, check_sequence, nearest_note, nearest_to, pluralize
from nitrous_ema._base.paths import local_path
from nitrous_ema.averaging.averaged_module import AveragedModule
from nitrous_ema.averaging.base import EMABase
from nitrous_ema.averaging.config import Background, EMAConfig, OnNonFinite
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.inline import InlineSnapshotSink, SilentSnapshotSink
from nitrous_ema.averaging.execution.interfaces import SnapshotSink
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.fill_average import check_records, copy_missing, fill_average
from nitrous_ema.averaging.model.ranks import find_ranks, join
from nitrous_ema.averaging.model.tracking import BufferPolicy, NameFilter, check_module
from nitrous_ema.averaging.positional import refuse_length_by_position
from nitrous_ema.averaging.restore import resized_shapes, restore
from nitrous_ema.averaging.resumable_run import resumable_run_warning
from nitrous_ema.averaging.schedule import StepSizeCorrection
from nitrous_ema.averaging.state_dict import LoadProblems
from nitrous_ema.errors import NitrousError, SnapshotError, SnapshotUnreadable, warn
from nitrous_ema.posthoc.keep_rules import Keep
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.names import IMPORTED
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis import DEFAULT_TOLERANCE, plan_from_store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Template = Module | Callable[[], Module]


class KarrasEMA(EMABase):
    """One exponential moving average (EMA) of a model's weights, with a power-function profile.

    It writes no snapshots, so its length is fixed at construction; with ``PostHocEMA`` the length can be chosen after
    training. Call ``update()`` once per optimizer step, after the step. Evaluate with ``ema(x)``, with
    ``ema.ema_model``, or inside ``with ema.average_parameters():``.

    Args:
        model: The online model, wrapped (``torch.compile``, DDP, ...) or not.
        sigma_rel: Length of the average: the standard deviation of its profile as a fraction of the training time, in
            (0, 12 ** -0.5); or
        gamma: the same length as an exponent, greater than 0. Pass exactly one of the two.
        ema_model: A module of the same architecture that shows the average, or a function that builds it, for models
            that cannot be copied. None copies the structure of ``model``.
        update_every: Calls of update() from one applied update to the next, at least 1.
        frozen: Count steps, but leave the average as it is after the first update.
        param_or_buffer_names_no_ema: Names, or a function of a name: tensors that are copied instead of averaged.
        ignore_names: Names, or a function of a name: tensors that are left out entirely.
        ignore_startswith_names: Prefixes of names: tensors that are left out entirely.
        trainable_only: Whether parameters that require no gradients are left out: ``ema_model`` shares those of the
            online model. None averages all, and warns if most of the bytes require no gradients.
        share_skipped: Whether ``ema_model`` shares the tensors that are left out with the online model, or has copies.
        buffers: Which floating-point buffers are averaged: "auto", running means and variances; "average", all that
            state_dict() saves, as nitrous-ema 0.0.1 does; "copy", none; or names, or a function of a name.
        allow_different_devices: The average may live on another device than the parameters, which each update then
            copies over.
        move_ema_to_online_device: The average follows parameters that are found on another device.
        step_size_correction: ``"exact"``: the profile is exact at any ``update_every``. True or False: the numbers of
            nitrous-ema 0.0.1 (table in ``averaging/schedule.py``).

    Raises:
        ValueError: Both or neither of sigma_rel and gamma are given, an argument is outside its range, or a filter
            matches no tensor.
        UntrackableModelError: A tensor cannot be averaged, or the model has no tensor to average.

    Source:
        Karras et al. 2023, arXiv:2312.02696, section 3.1.
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
        share_skipped: bool = True,
        buffers: BufferPolicy = "auto",
        trainable_only: bool | None = None,
    ) -> None:
        if (sigma_rel is None) == (gamma is None):
            raise ValueError("Give either sigma_rel or gamma: the length of the average, or its exponent.")
        config = EMAConfig(
            sigma_rels=None if sigma_rel is None else (sigma_rel,),
            gammas=None if gamma is None else (gamma,),
            checkpoint_every_num_steps="manual",
            update_every=update_every,
            frozen=frozen,
            param_or_buffer_names_no_ema=param_or_buffer_names_no_ema,
            ignore_names=ignore_names,
            ignore_startswith_names=ignore_startswith_names,
            trainable_only=trainable_only,
            share_skipped=share_skipped,
            buffers=buffers,
            allow_different_devices=allow_different_devices,
            move_ema_to_online_device=move_ema_to_online_device,
            step_size_correction=step_size_correction,
        )
        engine = AveragingEngine(model, config)
        self._show(engine, 0, ema_model)

    @classmethod
    def _view(cls, engine: AveragingEngine, index: int, template: Template | None) -> KarrasEMA:
        """Return the EMA object of one profile of an engine that averages several."""
        view = cls.__new__(cls)
        view._show(engine, index, template)
        return view

    def _show(self, engine: AveragingEngine, index: int, template: Template | None) -> None:
        super().__init__(engine)
        self._profile = index
        self._template = (template,)  # in a tuple, because a module attribute would become a submodule
        self._averaged_module = AveragedModule(engine, index, template)

    @property
    def gamma(self) -> float:
        """Exponent of the profile."""
        return self._engine.config.profiles.gammas[self._profile]

    @property
    def sigma_rel(self) -> float:
        """Length of the average as a fraction of the training time."""
        return self._engine.config.profiles.sigma_rels[self._profile]

    @property
    def ema_model(self) -> Module:
        """A module with the average as its weights, in eval mode, built at the first access.

        Its weights are up to date at each access and before each forward, compiled or not, also after the module was
        cast or moved. Attributes that are no tensors are those of the online model at each access. It is always the
        same object.

        ``copy.deepcopy`` and pickles of it are plain modules, which share nothing with the averages and can be trained.
        Compiled with ``torch.compile``, it receives copies of its tensor arguments.

        Raises:
            UncopyableModelError: The model cannot be copied; pass ``ema_model`` at construction.
            NitrousError: A parameter of the module was replaced by another one; or the model's own code failed.
            NitrousError: The averages are swapped into the model, or averaging failed.
        """
        try:
            return self._averaged_module.module()
        except AttributeError as error:
            # torch's modules would replace it by "no attribute 'ema_model'", which hides what failed.
            raise NitrousError(f"ema_model could not be made: {error}") from error

    def eval(self) -> Any:
        """Return ``ema_model``, which is always in eval mode (as in nitrous-ema 0.0.1)."""
        return self.ema_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of ``ema_model``."""
        return self.ema_model(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return the profile and the step, for ``repr()``."""
        return f"sigma_rel={self.sigma_rel:.4g}, gamma={self.gamma:.4g}, step={self.step}"

    def _prefixes(self) -> Mapping[int, str]:
        return {self._profile: ""}

    def _averaged_module_of(self, profile: int) -> AveragedModule:
        return self._averaged_module


class PostHocEMA(EMABase):
    """Averages of a model with several profiles, and snapshots from which an EMA of any length can be synthesized.

    Call ``update()`` once per optimizer step, after the step. Every ``checkpoint_every_num_steps`` calls it writes a
    snapshot of all averages to ``checkpoint_folder``. After training, ``synthesize_ema_model(sigma_rel=...)`` makes the
    average of any other length from the snapshots, and ``nitrous_ema.sweep`` finds the best length.

    Everything is done when ``update()`` returns. ``AsyncPostHocEMA`` does the same work in the background.

    Args:
        model: The online model, wrapped (``torch.compile``, DDP, ...) or not.
        sigma_rels: Lengths to track: the standard deviation of each profile as a fraction of the training time, in
            (0, 12 ** -0.5). None tracks 0.05 and 0.10. Or
        gammas: the same lengths as exponents, each greater than 0.
        checkpoint_every_num_steps: Calls of update() between two snapshots, also as a float such as 1e10; or
            ``"manual"``: snapshots are taken by checkpoint() only.
        checkpoint_folder: The folder that snapshots are written to; created if it does not exist.
        checkpoint_dtype: Type of the averages in snapshots: float32, float64, float16 or bfloat16.
        keep: Retention, the rule by which snapshots are dropped as training goes on: ``"all"`` drops none; a number of
            snapshots, at least 2; an amount of bytes such as ``"100GB"``; or a rule (``KeepGeometric``, ``KeepCount``,
            ``KeepBytes``). The rule covers the snapshots of this run and of the runs that it continues. Snapshots
            shared with a run that was closed at a later step are never dropped.
        ema_model: A function that builds the module of an average, for models that cannot be copied; or one module,
            which then shows the first profile. None copies the structure of ``model``.
        update_every: Calls of update() from one applied update to the next, at least 1.
        frozen: Count steps, but leave the averages as they are after the first update.
        param_or_buffer_names_no_ema: Names, or a function of a name: tensors that are copied instead of averaged.
        ignore_names: Names, or a function of a name: tensors that are left out entirely.
        ignore_startswith_names: Prefixes of names: tensors that are left out entirely.
        trainable_only: Whether parameters that require no gradients are left out: ``ema_model`` shares those of the
            online model. None averages all, and warns if most of the bytes require no gradients.
        share_skipped: Whether ``ema_model`` shares the tensors that are left out with the online model, or has copies.
        buffers: Which floating-point buffers are averaged: "auto", running means and variances; "average", all that
            state_dict() saves, as nitrous-ema 0.0.1 does; "copy", none; or names, or a function of a name.
        allow_different_devices: Averages may live on another device than the parameters, which each update then copies
            over.
        move_ema_to_online_device: Averages follow parameters that are found on another device.
        step_size_correction: ``"exact"``: the profile is exact at any ``update_every``. True or False: the numbers of
            nitrous-ema 0.0.1 (table in ``averaging/schedule.py``).
        on_nonfinite: What happens when a snapshot has values that are not finite, because weights were not, or because
            they exceed the range of ``checkpoint_dtype``: ``"warn"``, or ``"raise"`` NonFiniteError. Both once per run,
            at the end of the update() that has written the snapshot, or at the next call. ``"skip"`` warns as well, and
            skips each update for which an averaged tensor is not finite: averages and copied tensors stay, and the
            update counts as applied. All tensors must be on one device.
        process_group: The ranks of ``torch.distributed`` that hold the model. Each averages, and the first one writes
            the snapshots. None: the group of a ``DistributedDataParallel`` around the model, else all ranks; or a
            group; or ``"self"``, if this rank trains a model of its own.

    Raises:
        ValueError: An argument is outside its range, a filter matches no tensor, or ``keep`` has no space for 3
            snapshots.
        UntrackableModelError: A tensor cannot be averaged, or the model has no tensor to average.
        SnapshotError: Snapshots cannot be written to the folder, or its disk has no space for a single snapshot.

    Source:
        Karras et al. 2023, arXiv:2312.02696, section 3.2.
    """

    @refuse_length_by_position(3, "gammas", "sigma_rels")
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
        trainable_only: bool | None = None,
        share_skipped: bool = True,
        buffers: BufferPolicy = "auto",
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
        step_size_correction: StepSizeCorrection = "exact",
        on_nonfinite: OnNonFinite = "warn",
        process_group: ProcessGroup | Literal["self"] | None = None,
    ) -> None:
        config = EMAConfig(
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
            trainable_only=trainable_only,
            share_skipped=share_skipped,
            buffers=buffers,
            allow_different_devices=allow_different_devices,
            move_ema_to_online_device=move_ema_to_online_device,
            step_size_correction=step_size_correction,
            on_nonfinite=on_nonfinite,
            process_group=process_group,
        )
        self._start(model, config, ema_model, lambda writer, layout: InlineSnapshotSink(writer))

    _ASSIGNABLE = ("frozen", "checkpoint_folder", "checkpoint_every_num_steps")

    def _start(
        self,
        model: Module,
        config: EMAConfig,
        ema_model: Template | None,
        make_sink: Callable[[RetainingWriter, Layout], SnapshotSink],
        *,
        background: Background | None = None,
    ) -> None:
        check_module(model)
        ranks = find_ranks(model, config.process_group, Path(config.checkpoint_folder))
        engine = AveragingEngine(model, config, background=background)
        super().__init__(engine)
        self._store = SnapshotStore(config.checkpoint_folder)
        self._retaining_writer = RetainingWriter(
            self._store, config.retention_rule, raises_nonfinite=config.on_nonfinite == "raise"
        )
        try:
            layout = engine.flat_buffers.layout
            self._retaining_writer.check(layout, engine.run_lineage.first_stamp())
            engine.run_lineage.run = run = join(ranks, engine.run_lineage.run, _agreed_settings(config, layout))
            if ranks.is_writer:
                if len(ranks.members) > 1 and self._store.files.exists(self._store.root) and run in self._store.runs():
                    raise NitrousError(
                        f"{self._store.root} already has snapshots of run {run}, which this run would be: the store of "
                        "torch.distributed still has the keys of an earlier start. Start the job with a new store."
                    )
                self._store.prepare()
                self._retaining_writer.check_disk_space(layout, engine.run_lineage.first_stamp())
                # Slots that are allocated in inference mode could not be written outside of it.
                with neutral_modes():
                    sink = make_sink(self._retaining_writer, layout)
                find = partial(_resumable_run_warning, self._retaining_writer)
                engine.attach(sink, find_resumable_run=find, on_begin=self._retaining_writer.begin, ranks=ranks)
            else:
                engine.attach(
                    SilentSnapshotSink(ranks.check_writer), on_begin=self._retaining_writer.begin, ranks=ranks
                )
        except BaseException:
            engine.close()  # the exception's traceback would keep the engine alive, with its hooks and threads
            raise
        views = []
        for profile in range(len(engine.config.profiles.gammas)):
            one_module = isinstance(ema_model, Module) and profile > 0
            views.append(KarrasEMA._view(engine, profile, None if one_module else ema_model))
        # In a tuple, not a ModuleList: the averages stay out of modules() and parameters().
        self._views = _Views(views)

    @property
    def ema_models(self) -> tuple[KarrasEMA, ...]:
        """One EMA for each tracked profile, in the order of the profiles."""
        return self._views

    @property
    def checkpoint_every_num_steps(self) -> float | Literal["manual"]:
        """Calls of update() between two snapshots, or "manual"; may be assigned."""
        return self._engine.config.checkpoint_every_num_steps

    @checkpoint_every_num_steps.setter
    def checkpoint_every_num_steps(self, value: float | Literal["manual"]) -> None:
        self._engine.reconfigure(checkpoint_every_num_steps=value)

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the snapshots; may be assigned: later snapshots of this run are then written to another folder.

        The assignment waits until all earlier snapshots are on disk.
        """
        return self._store.root

    @checkpoint_folder.setter
    def checkpoint_folder(self, folder: str | os.PathLike[str]) -> None:
        self._engine.check_open("the assignment of checkpoint_folder")
        store = SnapshotStore(local_path("checkpoint_folder", folder))
        if self._engine.ranks.is_writer:
            store.prepare()
        self.flush()
        self._engine.reconfigure(checkpoint_folder=store.root)
        self._store = store
        self._retaining_writer.move(store)

    def checkpoint(self) -> bool:
        """Take a snapshot of the averages as they are now.

        With the exact correction the averages are first brought up to the current step. If this run already has a
        snapshot of this step, no second one is written.

        Returns:
            False if the snapshot was skipped (``on_full="skip"``), else True.

        Raises:
            NitrousError: There was no update() yet, the EMA is closed, the averages are swapped into the model, or
                averaging failed.
            SnapshotWriteError: A snapshot could not be written; the averages are not affected. With writes in the
                background, it is a snapshot of an earlier call.
            TimeoutError: No slot for the snapshot became free within ``wait_timeout`` (``AsyncPostHocEMA``).
        """
        return self._engine.checkpoint()

    def pin(self, step: int | None = None) -> None:
        """Protect a snapshot from retention, together with the snapshots needed to synthesize averages at its step.

        The pin is a note in the snapshot folder, so it also holds for ``nitrous-ema prune`` and for runs that continue
        this one.

        Args:
            step: Step of a snapshot in this run's lineage; None pins the newest. It may still be on its way to disk.

        Raises:
            TypeError: ``step`` is not an integer.
            SnapshotNotFound: There is no snapshot of that step; the message names the nearest ones.
            SnapshotError: The note could not be written.
        """
        if self._engine.is_inherited or not self._engine.ranks.is_writer:
            return
        self._engine.check_failures("pin()")
        step = _checked(step)
        # Paused, because retention could otherwise drop the snapshot between the look-up and the note.
        with self._retaining_writer.paused(self.run) as pending:
            step = pending[-1] if step is None and pending else step
            if step in pending:
                self._store.pin(step, self.run, must_exist=False)
            else:
                found = self._target(step)
                self._store.pin(found.step, found.run)

    def unpin(self, step: int) -> None:
        """Remove the pin of a snapshot in this run's lineage, so that ``keep`` decides about it again.

        Does nothing if the snapshot is not pinned.

        Args:
            step: Step of the pinned snapshot.

        Raises:
            TypeError: ``step`` is not an integer.
            SnapshotError: The note could not be removed.
        """
        pinned_step = _checked(step)
        if pinned_step is None:
            raise TypeError(f"step is {step!r}; expected the step of a pinned snapshot.")
        if self._engine.is_inherited or not self._engine.ranks.is_writer:
            return
        self._engine.check_failures("unpin()")
        for run, left_at in self._engine.run_lineage.lineage:
            if left_at is None or pinned_step <= left_at:
                self._store.unpin(pinned_step, run)

    def restore(self, step: int | str | None = None, run: str | None = None) -> int:
        """Restore averages, copied tensors, step, training time and lineage from a snapshot.

        Use it to resume training without a saved ``state_dict()`` of the EMA. As after ``load_state_dict``, this run
        then continues the run of the snapshot; later snapshots of that run are abandoned. The online model is
        not changed: load its own weights of that step into it. Waits until all queued work is done and on disk.

        Averages are restored bit for bit from files of their own type: ``checkpoint_dtype=torch.float32``, or float64
        for models of float64. A warning (NitrousWarning) reports averages that were rounded when they were stored, and
        averages with values that are not finite.

        Args:
            step: Step of a snapshot in the run's lineage; None restores the newest. ``"nearest:1234"`` restores the one
                nearest to step 1234; a warning names its step.
            run: Id of the run to continue. None: this run if it has snapshots, else the newest run in the folder.

        Returns:
            The step at which training continues.

        Raises:
            TypeError: ``step`` is not an integer.
            SnapshotNotFound: There is no such snapshot or run; the message names the nearest ones.
            SnapshotMismatch: The snapshot has other profiles or does not fit the model; the message names what differs.
            SnapshotDamaged: The snapshot does not contain what was written.
            SnapshotUnsupported: The snapshot needs a newer version of this library.
            NitrousError: The EMA is closed, or the averages are swapped into the model.

        Nothing has changed when one of these is raised, with one exception: if the file was damaged while it was being
        read, the averages are refused until something is loaded.
        """
        step = _checked(step, nearest=True)
        engine = self._engine
        if not engine.prepare_loading("restore()", with_snapshots=True):
            return self.step
        if run is None and engine.run_lineage.written and self.run in self._store.runs():
            run = self.run
        try:
            snapshot = self._store.get(step, run)
            # Another rank may see a newer snapshot by now. All restore that of the first rank to come here.
            chosen_step, chosen_run = json.loads(
                engine.ranks.first("restored snapshot", json.dumps([snapshot.step, snapshot.run]))
            )
            if (chosen_step, chosen_run) != (snapshot.step, snapshot.run):
                snapshot = self._store.get(chosen_step, chosen_run)
            with neutral_modes():
                warnings = restore(engine, snapshot)
        except SnapshotUnreadable as error:
            error.args = (f"restore(): {error} Restore another snapshot with restore(step=...).",)
            raise
        for each in filter(None, (nearest_note(step, snapshot.step), *warnings)):
            warn(each)
        return snapshot.step

    def request_drain(self) -> None:
        """Request that the next update() take a snapshot and wait until everything is on disk.

        Then ``drained`` is True, and the training loop can end. This method only sets a flag, so a signal handler
        (SIGTERM) and any thread may call it. The update() waits for at most ``wait_timeout`` seconds, then raises
        TimeoutError. Pending snapshots are not lost by that: the end of the interpreter waits once more. A drain may be
        requested again after it was done.
        """
        self._engine.drain_request.request()

    @property
    def drained(self) -> bool:
        """Whether a requested drain is done and no other drain was requested since."""
        return self._engine.drain_request.is_done

    @property
    def gammas(self) -> tuple[float, ...]:
        """Exponents of the tracked profiles."""
        return self._engine.config.profiles.gammas

    @property
    def sigma_rels(self) -> tuple[float, ...]:
        """Lengths of the tracked profiles as fractions of the training time."""
        return self._engine.config.profiles.sigma_rels

    @property
    def run(self) -> str:
        """Id of this run, as in the names of its snapshot files."""
        return self._engine.run_lineage.run

    @property
    def snapshots(self) -> SnapshotStore:
        """The snapshot folder: lists, verifies and reads snapshots."""
        return self._store

    def close(self, timeout: float | None = None) -> None:
        """Flush, then end the EMA: threads stop, hooks are removed, further updates are refused.

        A note in the folder records that this run writes no more snapshots, so that readers that follow the run can
        stop. Snapshots that ``keep`` has dropped last are removed. Closing again does nothing.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: Updates or snapshots are still pending. Nothing is lost; call close() again.
            SnapshotWriteError: A snapshot could not be written.
        """
        was_open = self._engine.is_open
        try:
            self._engine.close(timeout)
        finally:  # the engine may be closed although it raised: a failed write is raised after the end
            has_written = self._engine.run_lineage.written and self._engine.ranks.is_writer
            if was_open and not self._engine.is_open and has_written:
                self._note_end()

    def _note_end(self) -> None:
        try:
            self._store.close_run(self.run)
        except SnapshotError as error:  # only warned about: no snapshot is lost, and close() may be raising already
            warn(f"{error} Readers that follow this run will not see that it has ended.")
        self._retaining_writer.end()

    @refuse_length_by_position(1, "gamma", "sigma_rel")
    def synthesize_ema_model(
        self,
        gamma: float | None = None,
        sigma_rel: float | None = None,
        step: int | str | None = None,
        *,
        run: str | None = None,
        exclude: Collection[int] = (),
        tolerance: float = DEFAULT_TOLERANCE,
        device: torch.device | str | None = None,
    ) -> KarrasEMA:
        """Synthesize an average of any length from the snapshots of this run and of the runs that it continues.

        An EMA that was never updated and has loaded no state reads the newest run of its folder, as ``restore()`` does.
        So an average of a finished training needs nothing but the model and the folder. The profiles of this EMA have
        no effect on the average.

        Args:
            gamma: Exponent of the requested average; or
            sigma_rel: its length as a fraction of the training time, in (0, 12 ** -0.5). Pass exactly one of the two.
            step: Step of a snapshot, at which the average ends; None ends it at the newest. ``"nearest:1234"`` ends it
                at the snapshot nearest to step 1234; a warning names its step.
            run: Id of the run whose snapshots are read, with the runs that it continues; None reads those of this EMA.
            exclude: Steps to ignore, for example damaged snapshots.
            tolerance: Relative profile error that may be added by reading only a few of the snapshots; 0 reads all.
            device: Device of the average; None: each tensor is on the device of its parameter.

        Returns:
            A frozen EMA: call it, or use its ``ema_model``. Skipped tensors are those of the online model.

        Raises:
            ValueError: Both or neither of gamma and sigma_rel are given, one is outside its domain, ``tolerance`` is
                negative, or the target step is excluded.
            TypeError: ``step`` is not an integer.
            SnapshotNotFound: There is no snapshot of that step; the message names the nearest ones.
            SnapshotMismatch: The snapshots are of another model.
            SnapshotDamaged: A file does not contain what was written.

        A warning (NitrousWarning) reports a length that the snapshots cannot reconstruct accurately, and snapshots with
        values that are not finite, each with a remedy.
        """
        if (sigma_rel is None) == (gamma is None):
            raise ValueError("Give either sigma_rel or gamma: the length of the average, or its exponent.")
        config = self._engine.frozen_config(
            sigma_rels=None if sigma_rel is None else (sigma_rel,), gammas=None if gamma is None else (gamma,)
        )
        check_sequence("exclude", exclude, "steps")
        step = _checked(step, nearest=True)
        self.flush()
        target = self._target(step, run=run, exclude=exclude)
        engine = self._engine.frozen_copy(config, None if device is None else torch.device(device))
        engine.resize(resized_shapes(engine.flat_buffers, target.records))
        check_records(engine.flat_buffers, target.records, target.path)
        with neutral_modes():
            copy_missing(engine.flat_buffers, target.records)
            warnings = self._synthesize(engine, config.profiles.gammas[0], target, exclude, tolerance)
        engine.schedule.load({"step": target.step, "now": target.t, "t": target.t, "updates": 1})
        for warning in filter(None, [nearest_note(step, target.step), *warnings]):
            warn(warning)
        (template,) = self.ema_models[0]._template
        return KarrasEMA._view(engine, 0, None if isinstance(template, Module) else template)

    def _target(
        self, step: int | str | None = None, *, run: str | None = None, exclude: Collection[int] = ()
    ) -> Snapshot:
        """Return the snapshot at which an average ends. It may still be on its way to disk: ``flush()`` first.

        Args:
            step: Step of a snapshot in this run's lineage; None is the newest, and ``"nearest:1234"`` is that nearest
                to 1234.
            run: Id of the last run of the lineage; None: this run. An EMA that was never updated and has loaded no
                state has no run yet, and reads the newest.
            exclude: Steps to ignore.

        Raises:
            ValueError: The step is excluded.
            SnapshotNotFound: There is no such snapshot; the message names the nearest ones.
        """
        check_not_excluded(step, exclude)
        if run is not None or self._engine.run_lineage.is_fresh:
            return self._store.get(step, run, exclude=exclude)
        ancestors = self._engine.run_lineage.ancestors
        if not ancestors or self.run in self._store.runs():
            return self._store.get(step, self.run, exclude=exclude)
        # This run has no snapshot of its own yet, so the folder does not know it. Its last ancestor stands in for it,
        # without the snapshots that the ancestor took after the step at which this run left it.
        run, left_at = ancestors[-1]
        abandoned = [snapshot.step for snapshot in self._store.snapshots(run) if snapshot.step > (left_at or 0)]
        return self._store.get(step, run, exclude=[*exclude, *abandoned])

    def _synthesize(
        self, engine: AveragingEngine, gamma: float, target: Snapshot, exclude: Collection[int], tolerance: float
    ) -> Sequence[str]:
        """Write an average into ``engine``, which the target fits. Return the warnings about it."""
        plan = plan_from_store(
            self._store, gammas=[gamma], step=target.step, run=target.run, exclude=exclude, tolerance=tolerance
        )
        fill_average(engine.flat_buffers, plan)
        return [self._store.legacy_note(), *plan.report.warnings]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the outputs of all averages' modules, in the order of the profiles."""
        return tuple(view(*args, **kwargs) for view in self.ema_models)

    def extra_repr(self) -> str:
        """Return profiles, step and snapshots, for ``repr()``."""
        lengths = ", ".join(f"{length:.4g}" for length in self.sigma_rels)
        stats = self.stats()
        state = "" if self._engine.is_open else ", closed"
        return (
            f"sigma_rels=({lengths}), step={self.step}, t={self.t}, "
            f"{pluralize(stats.snapshots, 'snapshot')} written to {str(self.checkpoint_folder)!r}{state}"
        )

    def _prefixes(self) -> Mapping[int, str]:
        return {profile: f"ema_models.{profile}." for profile in range(len(self.gammas))}

    def _load(self, state_dict: Mapping[str, Any], prefix: str, *, partial: bool) -> LoadProblems:
        problems = super()._load(state_dict, prefix, partial=partial)
        is_loaded = not problems.errors and (partial or not (problems.missing or problems.unexpected))
        # Only a state of nitrous-ema 0.0.1 leaves an EMA without ancestors: it records no lineage.
        if is_loaded and self.step > 0 and not self._engine.run_lineage.ancestors:
            self._continue_import()
        return problems

    def _continue_import(self) -> None:
        """Continue the run in the folder if it was imported from the same profiles and tensors, and warn of it."""
        try:
            newest = self._store.get()
            check_records(self._engine.flat_buffers, newest.records, newest.path)
        except NitrousError:
            return
        gammas, first = newest.layout.gammas, self._store.snapshots(newest.run)[0].step
        same = len(gammas) == len(self.gammas) and all(
            abs(one - other) <= 1e-9 for one, other in zip(gammas, self.gammas, strict=True)
        )
        if IMPORTED not in newest.stamp.trainer or not same or first > self.step:
            return
        self._engine.continue_run(newest.stamp.lineage, self.step)
        warn(
            f"The loaded state names no run, as states of nitrous-ema 0.0.1 do not. {self._store.root} holds run "
            f"{newest.run}, which was imported from snapshots of the same profiles and tensors, so this run continues "
            f"it from step {self.step}. If those snapshots are of another training, construct the EMA with another "
            "checkpoint_folder."
        )

    def _averaged_module_of(self, profile: int) -> AveragedModule:
        return self.ema_models[profile]._averaged_module


def _checked(step: Any, *, nearest: bool = False) -> Any:
    """Return a step as a plain int, or None; numpy's integers are accepted, and ``nearest:1234`` on request."""
    if step is None or (nearest and str(step).startswith("nearest:") and nearest_to(step) is not None):
        return step
    if isinstance(step, bool) or not isinstance(step, Integral):
        near = ", or 'nearest:1234'" if nearest else ""
        raise TypeError(f"step is {step!r}; expected the step of a snapshot (an integer){near}.")
    return int(step)


def _agreed_settings(config: EMAConfig, layout: Layout) -> dict[str, Any]:
    """Return what must be equal on all ranks that hold a model, in values that JSON can hold."""
    return {
        "the model's tensors or profiles": layout.sha256,
        "checkpoint_dtype": str(config.checkpoint_dtype),
        "checkpoint_every_num_steps": config.checkpoint_every_num_steps,
        "update_every": config.update_every,
        "step_size_correction": config.step_size_correction,
        "on_nonfinite": config.on_nonfinite,
    }


def _resumable_run_warning(writer: RetainingWriter, run: str) -> str | None:
    return resumable_run_warning(writer.store, run)


class _Views(tuple[KarrasEMA, ...]):
    """The EMAs of the profiles. ``torch.distributed`` looks up the names in a state_dict as attributes: "0", "1"."""

    __slots__ = ()

    def __getattr__(self, name: str) -> KarrasEMA:
        if name.isdecimal() and int(name) < len(self):
            return self[int(name)]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
