"""The arguments of the EMA classes: one configuration per class, checked once, documented field by field.

``EMAConfig`` has the arguments of ``PostHocEMA``, ``AsyncEMAConfig`` adds the arguments of ``AsyncPostHocEMA``. The
engine, the schedule, tracking and the snapshot sinks read the fields from the configuration itself. A new argument is
therefore a field here with its check in ``__post_init__``, a parameter of its class (signature, docstring, and the
call that builds the configuration), and a row in docs/arguments.md. ``test_arguments_have_one_definition`` compares
these places, and ``test_every_argument_reaches_the_configuration`` finds a parameter that is not passed on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from nitrous_ema._base.arguments import parse_bytes
from nitrous_ema._base.paths import local_path
from nitrous_ema._base.torch_dtypes import CHECKPOINT_DTYPES
from nitrous_ema.averaging.execution.interfaces import Lane
from nitrous_ema.averaging.execution.write_guard import ReadMode
from nitrous_ema.averaging.model.tracking import TrackingPolicy
from nitrous_ema.averaging.schedule import StepSizeCorrection
from nitrous_ema.posthoc.keep_rules import Keep, KeepRule, keep_rule
from nitrous_ema.profile import checked_lengths, gamma_to_sigma_rel, sigma_rel_to_gamma

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_SIGMA_RELS = (0.05, 0.10)

OnNonFinite = Literal["warn", "raise", "skip"]
"""What happens when weights, or values in a snapshot, are not finite."""


class Profiles(NamedTuple):
    """The tracked profiles, in the order in which the user listed them."""

    gammas: tuple[float, ...]
    """Exponents, each greater than 0."""
    sigma_rels: tuple[float, ...]
    """Lengths of the same profiles as fractions of the training time, each in (0, 12 ** -0.5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EMAConfig(TrackingPolicy):
    """The arguments of ``PostHocEMA``, and with other names for the length those of ``KarrasEMA``.

    The filters by name (``param_or_buffer_names_no_ema``, ``ignore_names``, ``ignore_startswith_names``) are inherited,
    so that ``track`` accepts a configuration.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range, or both sigma_rels and gammas are given.
    """

    sigma_rels: Sequence[float] | None = None
    """Lengths to track as fractions of the training time, each in (0, 12 ** -0.5); None tracks 0.05 and 0.10."""
    gammas: Sequence[float] | None = None
    """The same lengths as exponents, each greater than 0; pass either ``sigma_rels`` or ``gammas``."""
    checkpoint_every_num_steps: float | Literal["manual"] = 1000
    """Calls of update() between two snapshots, or "manual": snapshots are taken by checkpoint() only."""
    checkpoint_folder: str | os.PathLike[str] = "./ema-checkpoints"
    """The folder that snapshots are written to; created if it does not exist."""
    checkpoint_dtype: torch.dtype = torch.float32
    """Type of the averages in snapshots: float64, float32, float16 or bfloat16."""
    keep: Keep = "all"
    """Retention: "all", a number of snapshots, an amount of bytes such as "100GB", or a rule (``posthoc.KeepRule``)."""
    update_every: int = 100
    """Calls of update() from one applied update to the next, at least 1."""
    frozen: bool = False
    """Count steps, but leave the averages as they are after the first update."""
    share_skipped: bool = True
    """Whether modules of averages share the tensors that are left out with the online model, or have copies."""
    allow_different_devices: bool = False
    """Averages may live on another device than the parameters, which each update then copies over."""
    move_ema_to_online_device: bool = False
    """Averages follow parameters that are found on another device."""
    step_size_correction: StepSizeCorrection = "exact"
    """How an applied update weights the parameters; see the table in ``averaging/schedule.py``."""
    on_nonfinite: OnNonFinite = "warn"
    """Warn of values in a snapshot that are not finite, or raise an error at the next call, once per run; or skip each
    update with a tensor that is not finite, and warn as well."""
    process_group: ProcessGroup | Literal["self"] | None = None
    """The ranks that hold the model, of which the first one writes: a group, ``"self"`` for this rank alone, or None
    for the group of a ``DistributedDataParallel`` around the model, else all ranks."""
    profiles: Profiles = field(init=False)
    """The profiles that ``sigma_rels`` or ``gammas`` describe."""

    def __post_init__(self) -> None:
        # Not super(): dataclass(slots=True) replaces the class by a new one, which super() does not know.
        TrackingPolicy.__post_init__(self)
        for name in ("sigma_rels", "gammas"):
            value = getattr(self, name)
            if value is not None:  # stored, because dataclasses.replace() could not read an iterator a second time
                object.__setattr__(self, name, _numbers(name, value))
        object.__setattr__(self, "profiles", resolve_profiles(self.sigma_rels, self.gammas, default=DEFAULT_SIGMA_RELS))
        for name in ("frozen", "share_skipped", "allow_different_devices", "move_ema_to_online_device"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected True or False.")
        object.__setattr__(self, "update_every", _checked_update_every(self.update_every))
        if self.step_size_correction != "exact" and not isinstance(self.step_size_correction, bool):
            raise ValueError(f"step_size_correction is {self.step_size_correction!r}; expected 'exact', True or False.")
        if self.on_nonfinite not in get_args(OnNonFinite):
            expected = ", ".join(map(repr, get_args(OnNonFinite)))
            raise ValueError(f"on_nonfinite is {self.on_nonfinite!r}; expected one of {expected}.")
        object.__setattr__(self, "checkpoint_folder", local_path("checkpoint_folder", self.checkpoint_folder))
        _check_interval(self.checkpoint_every_num_steps)
        if self.checkpoint_dtype not in CHECKPOINT_DTYPES:
            known = ", ".join(map(str, CHECKPOINT_DTYPES))
            raise ValueError(f"checkpoint_dtype is {self.checkpoint_dtype!r}; expected one of {known}.")
        keep_rule(self.keep)

    @property
    def checkpoint_every_steps(self) -> float | None:
        """Calls of update() between two snapshots; None if only checkpoint() takes snapshots."""
        every = self.checkpoint_every_num_steps
        return None if isinstance(every, str) else every

    @property
    def retention_rule(self) -> KeepRule:
        """The rule that ``keep`` stands for."""
        return keep_rule(self.keep)


@dataclass(frozen=True, kw_only=True, slots=True)
class AsyncEMAConfig(EMAConfig):
    """The arguments of ``AsyncPostHocEMA``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is outside its range.
    """

    update_every: int = 1
    """Calls of update() from one applied update to the next, at least 1."""
    read: ReadMode = "auto"
    """How the background reads parameters: "guarded" reads them live and raises if they were written without a fence,
    "copied" copies them in update(), "auto" starts guarded and switches to copying after the first violation."""
    max_pending: int = 2
    """Snapshots in flight at once, at most; each costs host memory of a snapshot's size."""
    on_full: Literal["wait", "skip", "raise"] = "wait"
    """What to do when ``max_pending`` snapshots are in flight: wait, skip this snapshot, or raise."""
    wait_timeout: float = 600.0
    """Seconds that a wait for a free slot, a requested drain, and the drain at the interpreter's exit take at most."""
    on_error: Literal["raise", "warn"] = "raise"
    """Raise a failed write at the next call, or only warn about it."""
    num_writers: int = 2
    """Threads that write snapshots."""
    scratch: int | str | None = None
    """The most device memory, per device, in bytes or as in "4GiB", for parameters that the optimizer writes while a
    readback still reads their averages; None: as much as the parameters take."""
    offload: Literal["host"] | None = None
    """None, or "host": the averages are in host memory and are updated there."""

    def __post_init__(self) -> None:
        EMAConfig.__post_init__(self)
        for name in ("max_pending", "num_writers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least 1.")
        if not isinstance(self.wait_timeout, (int, float)) or not self.wait_timeout > 0:
            raise ValueError(f"wait_timeout is {self.wait_timeout!r}; expected a positive number of seconds.")
        for name, expected in (("on_full", ("wait", "skip", "raise")), ("on_error", ("raise", "warn"))):
            if getattr(self, name) not in expected:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, expected))}."
                )
        if self.read not in ("auto", "guarded", "copied"):
            raise ValueError(f"read is {self.read!r}; expected 'auto', 'guarded' or 'copied'.")
        if self.offload not in (None, "host"):
            raise ValueError(f"offload is {self.offload!r}; expected None or 'host'.")
        _scratch_bytes(self.scratch)

    @property
    def scratch_bytes(self) -> int | None:
        """``scratch`` in bytes; None: as much as the parameters take."""
        return _scratch_bytes(self.scratch)


@dataclass(frozen=True, slots=True)
class Background:
    """How averaging runs in the background of the trainer: the options, and the lanes that do the work."""

    config: AsyncEMAConfig
    make_lane: Callable[[torch.device], Lane]
    """Makes the lane of a device."""


def resolve_profiles(
    sigma_rels: Sequence[float] | None, gammas: Sequence[float] | None, default: Sequence[float] | None = None
) -> Profiles:
    """Return exponents and lengths of the requested profiles.

    Args:
        sigma_rels: Lengths as fractions of the training time, each in (0, 12 ** -0.5); or
        gammas: exponents, each greater than 0.
        default: Lengths if neither is given.

    Raises:
        ValueError: Both are given, both are missing without a default, one is outside its domain, or two are equal.
    """
    if sigma_rels is not None and gammas is not None:
        raise ValueError(
            "Both sigma_rels and gammas are given; they are two names for the same profiles. Pass only one of them."
        )
    lengths = _numbers("sigma_rels", default if sigma_rels is None else sigma_rels) if gammas is None else ()
    checked_lengths("sigma_rels", lengths)
    exponents = _numbers("gammas", gammas) if gammas is not None else tuple(map(sigma_rel_to_gamma, lengths))
    if not exponents:
        raise ValueError("Neither sigma_rels nor gammas is given. Pass the profiles to track, e.g. (0.05, 0.10).")
    if not all(math.isfinite(gamma) and gamma > 0 for gamma in exponents):
        raise ValueError(f"gammas is {exponents}; expected exponents greater than 0 (sigma_rel below 12 ** -0.5).")
    if len(set(exponents)) != len(exponents):
        name, given = ("gammas", exponents) if gammas is not None else ("sigma_rels", lengths)
        raise ValueError(f"{name} is {given}: two profiles are equal. Pass each profile once.")
    return Profiles(exponents, lengths or tuple(map(gamma_to_sigma_rel, exponents)))


def _numbers(argument: str, values: Iterable[float] | None) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in (() if values is None else values))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument} is {values!r}; expected a sequence of numbers, e.g. (0.05, 0.10).") from error


def _checked_update_every(update_every: Any) -> int:
    """Return the same number as a plain int; numpy's integers are accepted."""
    if isinstance(update_every, bool) or not isinstance(update_every, Integral) or int(update_every) < 1:
        raise ValueError(f"update_every is {update_every!r}; expected an integer of at least 1 (calls of update()).")
    return int(update_every)


def _check_interval(every: Any) -> None:
    is_number = isinstance(every, (int, float)) and not isinstance(every, bool)
    if every != "manual" and not (is_number and every >= 1 and every == every // 1):
        raise ValueError(
            f"checkpoint_every_num_steps is {every!r}; expected a whole number of update() calls (1 or more, also "
            "as a float such as 1e10) or 'manual'."
        )


def _scratch_bytes(scratch: Any) -> int | None:
    if isinstance(scratch, str):
        try:
            return parse_bytes(scratch)
        except ValueError as error:
            raise ValueError(f"scratch: {error}.") from None
    if scratch is not None and (not isinstance(scratch, int) or isinstance(scratch, bool) or scratch < 0):
        raise ValueError(f"scratch is {scratch!r}; expected a number of bytes, an amount such as '4GiB', or None.")
    return scratch
