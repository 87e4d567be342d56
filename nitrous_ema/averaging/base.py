"""What all EMA classes have in common: a ``Module`` around the machine of ``engine.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _IncompatibleKeys

from nitrous_ema.averaging.averaged_module import swapped
from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.execution.torch_modes import neutral_modes
from nitrous_ema.averaging.schedule import Time
from nitrous_ema.averaging.state_dict import LoadProblems, load, save
from nitrous_ema.averaging.stats import Stats
from nitrous_ema.errors import NitrousError

Self = TypeVar("Self", bound="EMABase")  # typing.Self needs Python 3.11


class EMABase(Module):
    """What all EMA classes share: a module without parameters, buffers or submodules of its own.

    So that DDP does not broadcast the averages at each forward and ``.half()`` of a parent does not round them, they
    show up in none of these, but do in ``state_dict()`` and follow ``.to(device)``.
    """

    _holds_averages = True

    def __init__(self, engine: AveragingEngine) -> None:
        super().__init__()
        self._engine = engine

    # ---- during training

    def update(self, t_delta: Time = 1) -> None:
        """Count one training step, and average the model's weights if an update is due.

        Call it once per optimizer step, after the step. Reads the parameters and never writes them; does not wait for
        the device.

        Args:
            t_delta: Training time since the last call, in the unit of the run: 1 to count optimizer steps, or the
                number of images or tokens of the *global* batch. Positive and finite.

        Raises:
            ValueError: ``t_delta`` is not positive and finite, or not 1 without the exact correction.
            UntrackableModelError: A tensor of the model is gone or has another shape or type.
            NitrousError: The EMA is closed, averages are swapped into the model, or averaging failed.
            SnapshotWriteError: A snapshot could not be written: in the background one of an earlier step, told once;
                otherwise the one of this step, which is then counted and averaged all the same.
            TimeoutError: There was no room for a snapshot, or a requested drain did not end, in ``wait_timeout``.

        Nothing has changed when one of the first three is raised.
        """
        if torch.compiler.is_compiling():  # in a compiled training step: not to be traced, which breaks the graph here
            _outside_the_graph(self._engine, t_delta)
        else:
            self._engine.update(t_delta)

    def fence(self) -> None:
        """Order what the caller does next with the weights after every read of them so far.

        Call it before writing weights in any other way than by a torch optimizer's step or ``load_state_dict``.
        """
        self._engine.fence()

    @property
    def model(self) -> Module:
        """The online model."""
        return self._engine.model

    @property
    def step(self) -> int:
        """Number of calls of ``update()``."""
        return self._engine.schedule.step

    @property
    def t(self) -> Time:
        """Training time of the last applied update, in the run's unit."""
        return self._engine.schedule.t

    @property
    def initted(self) -> bool:
        """Whether an update was applied yet."""
        return self._engine.schedule.updates > 0

    # ---- the averages

    def copy_params_from_model_to_ema(self) -> None:
        """Set every average to the model's present weights. The counters stay."""
        self._engine.copy_from_model()

    def copy_params_from_ema_to_model(self) -> None:
        """Set the model's weights to the last profile's average, as nitrous-ema 0.0.1 does.

        To evaluate with an average, use ``average_parameters``, which puts the weights back.
        """
        self._engine.copy_to_model(len(self._engine.config.profiles.gammas) - 1)

    @contextmanager
    def average_parameters(self, index: int = 0) -> Iterator[None]:
        """Put an average into the model, in place, for the duration of a ``with`` block.

        The storages stay the same, so compiled models and CUDA graphs stay valid. The weights are put back at the end,
        whatever happens. Meanwhile update(), checkpoint() and state_dict() of this EMA are refused.

        Args:
            index: Which of the tracked profiles.
        """
        with swapped(self._engine, self._index(index)):
            yield

    def _index(self, index: int) -> int:
        profiles = len(self._engine.config.profiles.gammas)
        if not -profiles <= index < profiles:
            raise IndexError(f"profile {index} of {profiles}.")
        return index % profiles

    def stats(self) -> Stats:
        """What was done so far, in numbers. Waits for nothing."""
        return self._engine.stats()

    # ---- ending

    def flush(self, timeout: float | None = None) -> None:
        """Block until every update is done and every snapshot on disk.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: Something is still pending. Nothing is lost; call it again.
            SnapshotWriteError: A snapshot could not be written.
        """
        self._engine.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Flush, then end: threads stop, hooks are removed, further updates are refused. Closing again does nothing.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: Something is still pending. Nothing is lost; call it again.
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
        """For each profile, what stands before its keys in the state_dict."""
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
        # ``strict`` is always true here (torch filters afterwards), so all is loaded or nothing is.
        problems = self._load(state_dict, prefix, partial=False)
        missing_keys += problems.missing
        unexpected_keys += problems.unexpected
        error_msgs += problems.errors

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load averages and counters, of this library or of nitrous-ema 0.0.1.

        Args:
            state_dict: From ``state_dict()``, with the same profiles.
            strict: With False, what is missing keeps its value and what is unknown is passed over.
            assign: No effect: averages are always copied into their buffers.

        Returns:
            ``missing_keys`` and ``unexpected_keys``.

        Raises:
            RuntimeError: Keys are missing or unexpected (if strict), shapes or profiles differ, or an average would be
                cast down. Nothing was touched.
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
        """``.to(device)`` and ``.cuda()`` move the averages; ``.half()`` and ``.to(dtype)`` leave them as they are."""
        before = self._engine.flat_buffers.devices
        after = [fn(torch.empty(0, dtype=torch.float32, device=device)).device for device in before]
        if any(device.type == "meta" for device in after):
            raise NitrousError("to('meta'): averages have values, which cannot move to the meta device.")
        if after != [*before]:
            self._engine.move(after[0])
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be copied: it stands for the averages of one training run. "
            "Use state_dict() and load_state_dict()."
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be pickled. Save its state_dict() instead.")


def _outside_the_graph(engine: AveragingEngine, t_delta: Time) -> None:
    torch.compiler.disable(engine.update)(t_delta)  # type: ignore[no-untyped-call]


_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]  # as torch.compiler.disable, not imported yet
