"""``AsyncPostHocEMA``: post-hoc EMA whose work runs in the background of training."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import Module
from torch.nn.parameter import is_lazy

from nitrous_ema._base import exit_status
from nitrous_ema.async_.background_writer import BackgroundSnapshotSink
from nitrous_ema.async_.lanes import AcceleratorLane, ThreadLane
from nitrous_ema.averaging.config import AsyncEMAConfig, Background, OnNonFinite
from nitrous_ema.averaging.ema import PostHocEMA, Template
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.inline import InlineLane
from nitrous_ema.averaging.execution.interfaces import Lane
from nitrous_ema.averaging.execution.write_guard import ReadMode
from nitrous_ema.averaging.load_average import load_tensors
from nitrous_ema.averaging.model.tracking import BufferPolicy, NameFilter, check_module
from nitrous_ema.averaging.positional import refuse_length_by_position
from nitrous_ema.averaging.schedule import StepSizeCorrection
from nitrous_ema.errors import SnapshotUnreadable, WorkerError, warn
from nitrous_ema.posthoc.keep_rules import Keep
from nitrous_ema.snapshots.layout import Layout
from nitrous_ema.snapshots.retention import RetainingWriter
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.synthesis.worker.launch import launch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FEW_ELEMENTS = 1 << 16  # on the CPU, averaging so few elements takes less time than handing them to a thread


class AsyncPostHocEMA(PostHocEMA):
    """Post-hoc EMA in the background: ``update()`` queues the averaging and returns.

    A drop-in replacement for ``PostHocEMA``: it has the same arguments and methods, and from the same training run it
    computes the same averages, bit for bit. On an accelerator the averaging runs on a side stream, ordered by events.
    On the CPU it runs in a worker thread; models of at most 65,536 parameters are averaged inside update(), which is
    quicker. Snapshots are copied to host memory and written to disk by separate threads.

    Weights may be written by torch optimizers at any time. Call ``fence()`` before writing them in another way, or pass
    ``read="copied"``. Call ``close()`` at the end of training, or use the EMA as a context manager: that waits for the
    last snapshots.

    Args:
        model, sigma_rels, gammas, ...: As in ``PostHocEMA``, except for the default of ``update_every``, which is 1.
        read: How the background reads parameters. ``"guarded"`` reads them live; writing them without an optimizer step
            or ``fence()`` in between is an error. ``"copied"`` copies them in update(), for training loops that write
            weights in other ways; it needs memory for one extra copy of the parameters, in their own types. ``"auto"``
            starts guarded and switches to copying, with one warning, after the first violation.
        max_pending: Snapshots in flight at once, at most. Each costs host memory of a snapshot's size.
        on_full: What to do when ``max_pending`` snapshots are in flight: ``"wait"``, ``"skip"`` this snapshot, or
            ``"raise"``.
        wait_timeout: Seconds that a wait for a free slot, a requested drain, and the drain at the end of the
            interpreter take at most.
        on_error: ``"raise"`` a failed write at the next call, or ``"warn"`` and continue.
        num_writers: Threads that write snapshots.
        scratch: The most device memory, per device, in bytes or as in ``"4GiB"``, for stashed parameters: parameters
            that the optimizer writes while a snapshot's copy to the host still reads their averages. The memory is
            allocated when first needed, if copying a snapshot takes longer than a training step, and then held. None:
            as much as the parameters take, and up to 96 MiB more. Where the memory does not suffice, the optimizer
            waits for the copy.
        offload: ``"host"`` stores the averages in host memory and averages there, in a thread. No device memory is used
            for them, but pinned host memory for two more copies of the parameters, in their own types. Each update
            copies the parameters to the host, and the next optimizer step waits for that copy. Choose ``update_every``
            so that the host keeps up; ``stats().held_up`` counts how often update() had to wait.

    Raises:
        ValueError: An argument is outside its range, a filter matches no tensor, or ``keep`` has no space for 3
            snapshots.
        UntrackableModelError: A tensor cannot be averaged, or the model has no tensor to average.
        SnapshotError: Snapshots cannot be written to the folder, or its disk has no space for a single snapshot.
        NitrousError: There is not enough host memory for the slots.
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
        update_every: int = 1,
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
        read: ReadMode = "auto",
        max_pending: int = 2,
        on_full: Literal["wait", "skip", "raise"] = "wait",
        wait_timeout: float = 600.0,
        on_error: Literal["raise", "warn"] = "raise",
        num_writers: int = 2,
        scratch: int | str | None = None,
        offload: Literal["host"] | None = None,
    ) -> None:
        config = AsyncEMAConfig(
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
            read=read,
            max_pending=max_pending,
            on_full=on_full,
            wait_timeout=wait_timeout,
            on_error=on_error,
            num_writers=num_writers,
            scratch=scratch,
            offload=offload,
        )
        check_module(model)
        offloads = config.offload == "host"
        num_elements = sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
        is_small = not offloads and num_elements <= _FEW_ELEMENTS
        on_accelerator = any(parameter.device.type != "cpu" for parameter in model.parameters())
        background = Background(
            config, lambda device: InlineLane() if is_small and device.type == "cpu" else make_lane(device)
        )

        def make_sink(writer: RetainingWriter, layout: Layout) -> BackgroundSnapshotSink:
            return BackgroundSnapshotSink(writer, layout, config, pin=on_accelerator and not offloads)

        self._start(model, config, ema_model, make_sink, background=background)
        self._engine.drain_timeout_seconds = config.wait_timeout

    def _synthesize(
        self, engine: AveragingEngine, gamma: float, target: Snapshot, exclude: Collection[int], tolerance: float
    ) -> Sequence[str]:
        """Synthesize in a worker process, and load the file that it writes. Return its warnings."""
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
                exclude=list(exclude),
                tolerance=tolerance,
                dtype="float64" if exact else "float32",
            )
            try:
                (output,) = job.result()
            except WorkerError as error:
                if error.exit_code != exit_status.DAMAGED:
                    raise
                raise SnapshotUnreadable(str(error), path=self.snapshots.root, step=None) from error
            # Not strict: the target was checked, and one of the two may skip a tensor of the other.
            load_tensors(tensors, output.path, strict=False)
        return job.warnings


def make_lane(device: torch.device) -> Lane:
    """Return a lane for averages on a device: a thread for the CPU, a side stream for an accelerator.

    A device without streams and events gets a lane that runs everything inside update(), and a warning.
    """
    if device.type == "cpu":
        return ThreadLane()
    try:
        return AcceleratorLane(device)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        warn(f"{device} has no streams and events for background work ({error}); averaging runs inside update().")
        return InlineLane()
