"""``EMABase``, the base class of all EMA classes: a ``Module`` around the engine of ``engine.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.optim.swa_utils
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _IncompatibleKeys

from nitrous_ema._base.arguments import pluralize
from nitrous_ema.averaging.averaged_module import AveragedModule
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.schedule import Time
from nitrous_ema.averaging.state_dict import LoadProblems, load, save
from nitrous_ema.averaging.stats import Stats
from nitrous_ema.averaging.swap import swapped
from nitrous_ema.errors import NitrousError

Self = TypeVar("Self", bound="EMABase")  # typing.Self needs Python 3.11


class EMABase(Module):
    """Base class of all EMA classes: a module without parameters, buffers or submodules of its own.

    The averages are not among them, so DDP does not broadcast the averages in each forward, and ``.half()`` of a parent
    does not round them. They are part of ``state_dict()`` and follow ``.to(device)``.
    """

    _holds_averages = True
    _ASSIGNABLE: tuple[str, ...] = ("frozen",)

    def __init__(self, engine: AveragingEngine) -> None:
        super().__init__()
        self._engine = engine

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute that can be changed during training; any other public name raises AttributeError."""
        # A class of the user's may have attributes of its own.
        is_own = not type(self).__module__.startswith("nitrous_ema.")
        if not (is_own or name.startswith("_") or name == "training" or name in self._ASSIGNABLE):
            raise AttributeError(
                f"{type(self).__name__}.{name} cannot be assigned, and an assignment would have no effect; these can: "
                f"{', '.join(self._ASSIGNABLE)}. Pass other values to the constructor."
            )
        super().__setattr__(name, value)

    @property
    def frozen(self) -> bool:
        """Whether averages stay as they are after the first update; may be assigned."""
        return self._engine.config.frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self._engine.reconfigure(frozen=value)

    # ---- during training

    def update(self, t_delta: Time = 1) -> None:
        """Count one training step, and average the model's weights if an update is due.

        Call it once per optimizer step, after the step. It reads the parameters, never writes them, and does not wait
        for the device.

        Args:
            t_delta: Training time since the last call, in the unit of the run: 1 to count optimizer steps, or the
                number of images or tokens of the *global* batch. Positive and finite.

        Raises:
            ValueError: ``t_delta`` is not positive and finite, or not 1 without the exact correction.
            UntrackableModelError: A tensor of the model is gone or has another shape or type.
            NitrousError: The EMA is closed, averages are swapped into the model, or averaging failed.
            UnsafeReadError: Weights were written while they were being read (``AsyncPostHocEMA``); raised once.
            SnapshotWriteError: A snapshot could not be written. With writes in the background, it is a snapshot of an
                earlier step, and the error is raised once. Otherwise it is the snapshot of this step. In both cases
                this step was counted and averaged.
            NonFiniteError: A snapshot has values that are not finite (``on_nonfinite="raise"``); raised once per run.
                The snapshot is written, and this step was counted and averaged.
            TimeoutError: No slot for a snapshot became free, or a requested drain did not end, in ``wait_timeout``.

        Nothing has changed when one of the first three is raised.
        """
        if torch.compiler.is_compiling():  # a compiled training step: the call breaks the graph and is not traced
            _update_outside_graph(self._engine, t_delta)
        else:
            self._engine.update(t_delta)

    def fence(self) -> None:
        """Order the caller's next use of the weights after every read of them so far.

        Call it before writing weights in any other way than with a torch optimizer's step or ``load_state_dict``. Does
        nothing for EMAs that read the weights inside update().
        """
        self._engine.fence()

    @property
    def model(self) -> Module:
        """The online model."""
        return self._engine.model

    @property
    def step(self) -> int:
        """Number of calls of ``update()`` so far."""
        return self._engine.schedule.step

    @property
    def t(self) -> Time:
        """Training time of the last applied update, in the run's unit."""
        return self._engine.schedule.t

    @property
    def initted(self) -> bool:
        """Whether an update has been applied (the name is that of nitrous-ema 0.0.1)."""
        return self._engine.schedule.updates > 0

    # ---- the averages

    def copy_params_from_model_to_ema(self) -> None:
        """Set every average to the model's current weights. The counters stay the same."""
        self._engine.copy_from_model()

    def copy_params_from_ema_to_model(self) -> None:
        """Set the model's weights to the last profile's average, as nitrous-ema 0.0.1 does.

        To evaluate with an average, use ``average_parameters``, which restores the weights.
        """
        self._engine.copy_to_model(self._index(-1))

    @contextmanager
    def average_parameters(self, index: int = 0, *, restore_buffers: bool = False) -> Iterator[None]:
        """Put an average into the model, in place, for the duration of a ``with`` block.

        The storages stay the same, so compiled models and CUDA graphs stay valid. At the end of the block the weights
        are restored, also if it raises. Meanwhile update(), checkpoint() and state_dict() of this EMA raise
        NitrousError.

        Args:
            index: Index of the profile among the tracked ones.
            restore_buffers: Restore every buffer of the model as well, averaged or not. Without it, a forward in train
                mode inside the block leaves counters such as ``num_batches_tracked`` changed.

        Raises:
            IndexError: There is no profile with this index.
        """
        with swapped(self._engine, self._index(index), restore_buffers=restore_buffers):
            yield

    def _index(self, index: int) -> int:
        """Return the index of a profile among the engine's, given its index among the profiles of this object."""
        profiles = tuple(self._prefixes())
        if not -len(profiles) <= index < len(profiles):
            expected = "0" if len(profiles) == 1 else f"0 to {len(profiles) - 1}"
            raise IndexError(f"index is {index}; expected {expected} ({pluralize(len(profiles), 'tracked profile')}).")
        return profiles[index]

    def update_bn(self, loader: Iterable[Any], index: int = 0, *, device: torch.device | str | None = None) -> Module:
        """Return a copy of an average's module whose batch norm statistics are those of the data.

        The averages stay as they are, and so does ``ema_model``. The copy is a plain module in eval mode.

        Args:
            loader: Batches in train mode; of a list or tuple the first element is passed to the module
                (``torch.optim.swa_utils.update_bn``).
            index: Index of the profile among the tracked ones.
            device: Where batches are moved to; None: they stay where they are.

        Raises:
            IndexError: There is no profile with this index.
            UncopyableModelError: The model cannot be copied; pass ``ema_model`` at construction.
        """
        module = copy.deepcopy(self._averaged_module_of(self._index(index)).module())
        torch.optim.swa_utils.update_bn(loader, module, None if device is None else torch.device(device))
        return module

    def _averaged_module_of(self, profile: int) -> AveragedModule:
        """Return the owner of the module of one of the engine's profiles."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """Return counts of updates, snapshots and waits so far. Never blocks."""
        return self._engine.stats()

    # ---- ending

    def flush(self, timeout: float | None = None) -> None:
        """Block until every update is done and every snapshot is on disk.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: Updates or snapshots are still pending. Nothing is lost; call flush() again.
            SnapshotWriteError: A snapshot could not be written.
        """
        self._engine.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Flush, then end the EMA: threads stop, hooks are removed, further updates are refused.

        Closing again does nothing.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: Updates or snapshots are still pending. Nothing is lost; call close() again.
            SnapshotWriteError: A snapshot could not be written.
        """
        self._engine.close(timeout)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- as a module

    def _prefixes(self) -> Mapping[int, str]:
        """Return the prefix of each profile's keys in the state_dict."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._engine.order_readers("state_dict()")
        with neutral_modes():
            for profile, name in self._prefixes().items():
                save(self._engine, profile, destination, prefix + name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch passes strict=True here, also for load_state_dict(strict=False) of a parent, which filters the reported
        # keys afterwards. So either the whole state is loaded or nothing.
        problems = self._load(state_dict, prefix, partial=False)
        missing_keys += problems.missing
        unexpected_keys += problems.unexpected
        error_msgs += problems.errors

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load averages, counters and lineage from a state of this library or of nitrous-ema 0.0.1.

        Args:
            state_dict: From ``state_dict()``, with the same profiles.
            strict: Whether missing and unexpected keys are errors. With False, values of missing keys stay the same and
                unexpected keys are ignored.
            assign: No effect: averages are always copied into their buffers.

        Returns:
            A named tuple of ``missing_keys`` and ``unexpected_keys``.

        Raises:
            RuntimeError: Keys are missing or unexpected (if strict), shapes or profiles differ, or an average would be
                cast down. Nothing was changed.
            NitrousError: The EMA is closed, or the averages are swapped into the model.
        """
        problems = self._load(state_dict, "", partial=not strict)
        wrong = list(problems.errors)
        if strict:
            wrong += [f"Missing key(s): {problems.missing}."] if problems.missing else []
            wrong += [f"Unexpected key(s): {problems.unexpected}."] if problems.unexpected else []
        if wrong:
            raise RuntimeError(
                f"Cannot load this state into {type(self).__name__}; nothing was changed. {' '.join(wrong)}"
            )
        return _IncompatibleKeys(problems.missing, problems.unexpected)

    def _load(self, state_dict: Mapping[str, Any], prefix: str, *, partial: bool) -> LoadProblems:
        self._engine.prepare_loading()
        prefixes = {profile: prefix + name for profile, name in self._prefixes().items()}
        with neutral_modes():
            return load(self._engine, prefix, prefixes, state_dict, partial=partial)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the averages with ``.to(device)`` and ``.cuda()``; ``.half()`` and ``.to(dtype)`` do not change them."""
        before = self._engine.flat_buffers.devices
        after = [fn(torch.empty(0, dtype=torch.float32, device=device)).device for device in before]
        if any(device.type == "meta" for device in after):
            raise NitrousError(
                "to('meta'): the meta device cannot hold the values of the averages. Pass a device with memory."
            )
        if after != [*before]:
            self._engine.move(after[0])
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be copied, because it owns the averages of one training run. "
            "Use state_dict() and load_state_dict()."
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be pickled. Save its state_dict() instead.")


def _update_outside_graph(engine: AveragingEngine, t_delta: Time) -> None:
    torch.compiler.disable(engine.update)(t_delta)  # type: ignore[no-untyped-call]


# The attribute that torch.compiler.disable sets. Calling it here would import the compiler with the package.
_update_outside_graph._torchdynamo_disable = True  # type: ignore[attr-defined]
