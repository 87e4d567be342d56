"""``AsyncPostHocEMA``: post-hoc EMA that training does not wait for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch.nn import Module

from nitrous_ema._base import exit_status
from nitrous_ema._base.arguments import parse_bytes
from nitrous_ema.async_.background_writer import BackgroundSnapshotSink, WritePolicy
from nitrous_ema.async_.lanes import AcceleratorLane, ThreadLane
from nitrous_ema.averaging.config import Background, EMAConfig
from nitrous_ema.averaging.ema import PostHocEMA, Template
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.inline import InlineLane
from nitrous_ema.averaging.execution.interfaces import Lane
from nitrous_ema.averaging.execution.write_guard import ReadMode
from nitrous_ema.averaging.load_average import load_tensors
from nitrous_ema.averaging.model.tracking import NameFilter, check_module
from nitrous_ema.averaging.schedule import StepSizeCorrection
from nitrous_ema.errors import SnapshotDamaged, WorkerError, warn
from nitrous_ema.posthoc.keep_rules import Keep
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.synthesis.worker.launch import launch

_FEW_ELEMENTS = 1 << 16  # on the CPU, averaging so few takes less time than handing them to a thread


class AsyncPostHocEMA(PostHocEMA):
    """Post-hoc EMA in the background: ``update()`` queues the averaging and returns.

    On an accelerator the averaging runs on a side stream, ordered by events; on the CPU in a worker thread (of a few
    thousand parameters inside update(), which is quicker). Snapshots go through host memory to disk by threads of their
    own. For the same training run the averages have the same bits as
    those of ``PostHocEMA`` with the same settings.

    Args:
        model, sigma_rels, gammas, ...: As in ``PostHocEMA``, but ``update_every`` is 1.
        read: How parameters are read in the background. ``"guarded"``: live, and writing them without an optimizer step
            or ``fence()`` in between is an error; ``"copied"``: copied at update(), for models that change their
            weights elsewhere (one more copy of the parameters in their own type); ``"auto"``: guarded until that goes
            wrong, then, with one warning, copied.
        max_pending: Snapshots on their way to disk at once; each costs host memory of a snapshot's size.
        on_full: What happens when that many are: ``"wait"``, ``"skip"`` the snapshot, or ``"raise"``.
        wait_timeout: Seconds to wait at most, there and when the interpreter ends.
        on_error: A failed write raises at the next call (``"raise"``), or warns (``"warn"``) and training goes on.
        num_writers: Threads that write snapshots.
        scratch: The most device memory, per device, in bytes or as in ``"4GiB"``, for parameters that the optimizer
            writes while a snapshot copy still reads their averages. It is taken when first needed, which is where
            copying a snapshot out takes longer than a training step, and held. By default as much as the parameters
            take; where it does not suffice, the optimizer waits for the copy.
        offload: ``"host"`` keeps the averages in host memory and averages there, by a thread: no device memory is used,
            but 2 more copies of the parameters, in their own types, of pinned host memory. Each update copies the
            parameters out, behind which the next optimizer step waits; take ``update_every`` so that the host keeps up
            (``stats().held_up`` counts where it did not, and update() waited).

    Raises:
        ValueError: An argument is outside its range; a filter matches nothing; ``keep`` has no room for 3 snapshots.
        UntrackableModelError: A tensor cannot be averaged, or there is none.
        SnapshotError: Snapshots cannot be written to the folder, or not even one fits on its disk.
        NitrousError: There is no host memory for the slots.
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
        update_every: int = 1,
        frozen: bool = False,
        param_or_buffer_names_no_ema: NameFilter | None = (),
        ignore_names: NameFilter | None = (),
        ignore_startswith_names: Collection[str] | None = (),
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
        step_size_correction: StepSizeCorrection = "exact",
        read: ReadMode = "auto",
        max_pending: int = 2,
        on_full: Literal["wait", "skip", "raise"] = "wait",
        wait_timeout: float = 600.0,
        on_error: Literal["raise", "warn"] = "raise",
        num_writers: int = 2,
        scratch: int | str | None = None,
        offload: Literal["host"] | None = None,
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
        writing = WritePolicy(
            max_pending=max_pending,
            on_full=on_full,
            wait_timeout=wait_timeout,
            on_error=on_error,
            num_writers=num_writers,
        )
        if offload not in (None, "host"):
            raise ValueError(f"offload is {offload!r}; expected None or 'host'.")
        check_module(model)
        at_once = offload is None and sum(parameter.numel() for parameter in model.parameters()) <= _FEW_ELEMENTS
        background = Background(
            make_lane=lambda device: InlineLane() if at_once and device.type == "cpu" else make_lane(device),
            read=read,
            scratch_bytes=_scratch_bytes(scratch),
            offloads=offload == "host",
        )
        pin = not background.offloads and any(parameter.device.type != "cpu" for parameter in model.parameters())

        def make_sink(writer: RetainingWriter, layout: Layout) -> BackgroundSnapshotSink:
            return BackgroundSnapshotSink(writer, layout, writing, pin)

        self._start(model, settings, ema_model, make_sink, background=background)
        self._engine.drain_timeout_seconds = wait_timeout

    def _synthesize(self, engine: AveragingEngine, gamma: float, target: Snapshot, tolerance: float) -> Sequence[str]:
        """Have the worker do it, in a process of its own, and load what it wrote."""
        flat_buffers = engine.flat_buffers
        tensors = {
            key: value
            for tracked, value in [*flat_buffers.averages(0), *flat_buffers.copies()]
            for key in (tracked.keys if tracked.persistent else ())
        }
        exact = any(group.dtype == torch.float64 for group in flat_buffers.groups)
        with tempfile.TemporaryDirectory(prefix="nitrous-ema-") as folder:
            job = launch(
                self.snapshots.root,
                out=folder,
                gammas=[gamma],
                step=target.step,
                run=target.run,
                tolerance=tolerance,
                dtype="float64" if exact else "float32",
            )
            try:
                (output,) = job.result()
            except WorkerError as error:
                if error.exit_code != exit_status.DAMAGED:
                    raise
                raise SnapshotDamaged(str(error), path=self.snapshots.root, step=None, chunk=None) from error
            load_tensors(tensors, output.path)
        engine.schedule.load({"step": target.step, "now": target.t, "t": target.t, "updates": 1})
        return job.warnings


def _scratch_bytes(scratch: int | str | None) -> int | None:
    if isinstance(scratch, str):
        try:
            return parse_bytes(scratch)
        except ValueError as error:
            raise ValueError(f"scratch: {error}.") from None
    if scratch is not None and (not isinstance(scratch, int) or isinstance(scratch, bool) or scratch < 0):
        raise ValueError(f"scratch is {scratch!r}; expected a number of bytes, an amount such as '4GiB', or None.")
    return scratch


def make_lane(device: torch.device) -> Lane:
    """The lane for averages on a device: a side stream where there are streams, else a thread (CPU)."""
    if device.type == "cpu":
        return ThreadLane()
    try:
        return AcceleratorLane(device)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        warn(f"{device} has no streams and events for background work ({error}); averaging runs inside update().")
        return InlineLane()
