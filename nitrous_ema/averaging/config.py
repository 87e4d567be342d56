"""The arguments of the EMA classes, checked once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nitrous_ema._base.torch_dtypes import CHECKPOINT_DTYPES
from nitrous_ema.averaging.execution.interfaces import Lane
from nitrous_ema.averaging.execution.write_guard import ReadMode
from nitrous_ema.averaging.model.tracking import (
    NameFilter,
    TrackingPolicy,
)
from nitrous_ema.averaging.schedule import StepSizeCorrection
from nitrous_ema.posthoc.keep_rules import Keep, KeepRule, keep_rule
from nitrous_ema.profile import gamma_to_sigma_rel, sigma_rel_to_gamma

DEFAULT_SIGMA_RELS = (0.05, 0.10)


@dataclass(frozen=True, kw_only=True, slots=True)
class EMAConfig:
    """The arguments that ``PostHocEMA`` and ``AsyncPostHocEMA`` have in common, checked."""

    sigma_rels: Sequence[float] | None = None
    """Widths of the tracked profiles relative to the training time, each in (0, 12 ** -0.5)."""
    gammas: Sequence[float] | None = None
    """Their exponents, instead."""
    checkpoint_every_num_steps: float | Literal["manual"] = 1000
    """Calls of update() between two snapshots; "manual" takes them only by checkpoint()."""
    checkpoint_folder: str | os.PathLike[str] = "./ema-checkpoints"
    """Where snapshots go; created if need be."""
    checkpoint_dtype: torch.dtype = torch.float32
    """Type of the averages in snapshots."""
    keep: Keep = "all"
    """Which snapshots stay as training goes on; see ``posthoc.keep_rules``."""
    update_every: int = 100
    """Calls of update() from one applied update to the next."""
    step_size_correction: StepSizeCorrection = "exact"
    """See ``schedule``."""
    frozen: bool = False
    """Count steps, but leave the averages as they are after the first update."""
    param_or_buffer_names_no_ema: NameFilter | None = ()
    """Copied instead of averaged."""
    ignore_names: NameFilter | None = ()
    """Left out entirely."""
    ignore_startswith_names: Collection[str] | None = ()
    """Left out entirely if the name starts with one of these."""
    allow_different_devices: bool = False
    """Averages may live on another device than their parameters, which are then copied over."""
    move_ema_to_online_device: bool = False
    """Averages follow parameters that are found on another device."""

    def __post_init__(self) -> None:
        for name in ("frozen", "allow_different_devices", "move_ema_to_online_device"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected True or False.")
        folder = self.checkpoint_folder
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"checkpoint_folder is {folder!r}; expected a folder for the snapshots, as a path.")
        if not os.fspath(folder) or "\0" in str(folder):
            raise ValueError(f"checkpoint_folder is {folder!r}; expected a folder for the snapshots.")
        every = self.checkpoint_every_num_steps
        is_number = isinstance(every, (int, float)) and not isinstance(every, bool)
        if every != "manual" and not (is_number and every >= 1 and every == every // 1):
            raise ValueError(
                f"checkpoint_every_num_steps is {every!r}; expected a whole number of update() calls (1 or more, also "
                "as a float such as 1e10) or 'manual'."
            )
        if self.checkpoint_dtype not in CHECKPOINT_DTYPES:
            known = ", ".join(map(str, CHECKPOINT_DTYPES))
            raise ValueError(f"checkpoint_dtype is {self.checkpoint_dtype!r}; expected one of {known}.")
        keep_rule(self.keep)  # says what is wrong with it

    def averaging(self) -> AveragingPolicy:
        """How averages are kept. Raises ValueError for profiles that make no sense."""
        gammas, sigma_rels = profiles(self.sigma_rels, self.gammas, default=DEFAULT_SIGMA_RELS)
        every = self.checkpoint_every_num_steps
        return AveragingPolicy(
            gammas=gammas,
            sigma_rels=sigma_rels,
            update_every=self.update_every,
            correction=self.step_size_correction,
            frozen=self.frozen,
            checkpoint_dtype=self.checkpoint_dtype,
            checkpoint_every_steps=None if every == "manual" else every,
            allow_different_devices=self.allow_different_devices,
            move_to_online_device=self.move_ema_to_online_device,
        )

    def keeping(self) -> KeepRule:
        """Which snapshots stay."""
        return keep_rule(self.keep)

    def tracking(self) -> TrackingPolicy:
        """Which tensors leave the default role."""
        return TrackingPolicy(
            copied=self.param_or_buffer_names_no_ema,
            skipped=self.ignore_names,
            skipped_prefixes=self.ignore_startswith_names,
        )


def profiles(
    sigma_rels: Sequence[float] | None, gammas: Sequence[float] | None, default: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exponents and relative widths of the profiles that were asked for.

    Args:
        sigma_rels: Widths relative to the training time, each in (0, 12 ** -0.5); or
        gammas: exponents, each greater than 0.
        default: Widths if neither is given.

    Raises:
        ValueError: Both are given, neither is where one is needed, one is outside its domain, or two are equal.
    """
    if sigma_rels is not None and gammas is not None:
        raise ValueError("Both sigma_rels and gammas are given; they are two names for the same profiles. Give one.")
    widths = _numbers("sigma_rels", default if sigma_rels is None else sigma_rels) if gammas is None else ()
    exponents = _numbers("gammas", gammas) if gammas is not None else tuple(map(sigma_rel_to_gamma, widths))
    if not exponents:
        raise ValueError("Neither sigma_rels nor gammas is given. Give the profiles to track, e.g. (0.05, 0.10).")
    if not all(math.isfinite(gamma) and gamma > 0 for gamma in exponents):
        raise ValueError(f"gammas are {exponents}; expected exponents greater than 0 (sigma_rel below 12 ** -0.5).")
    if len(set(exponents)) != len(exponents):
        raise ValueError(f"Two profiles are equal: gammas {exponents}. Each one must be a different length.")
    return exponents, widths or tuple(map(gamma_to_sigma_rel, exponents))


def _numbers(argument: str, given: Iterable[float] | None) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in (() if given is None else given))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument} is {given!r}; expected a sequence of numbers, e.g. (0.05, 0.10).") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragingPolicy:
    """How averages are kept."""

    gammas: tuple[float, ...]
    """Exponents of the tracked profiles."""
    sigma_rels: tuple[float, ...]
    """Relative widths of the same profiles."""
    update_every: int
    """Calls of update() from one applied update to the next."""
    correction: StepSizeCorrection
    """See ``schedule``."""
    frozen: bool = False
    """Count steps, but leave the averages as they are after the first update."""
    checkpoint_dtype: torch.dtype = torch.float32
    """Type of the averages in snapshot files."""
    checkpoint_every_steps: float | None = None
    """Calls of update() between snapshots; None takes them only when asked to."""
    device: torch.device | None = None
    """Where the averages live; None: each with its parameter."""
    allow_different_devices: bool = False
    """Averages may live on another device than their parameters, which are then copied over at each update."""
    move_to_online_device: bool = False
    """Averages follow parameters that are found on another device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """How averaging runs while the trainer goes on."""

    make_lane: Callable[[torch.device], Lane]
    """Makes the lane of a device."""
    read: ReadMode = "auto"
    """How parameters are read."""
    scratch_bytes: int | None = None
    """The most scratch per device for parameters that are written while their averages are copied out; None: as much
    as the parameters take."""
    offloads: bool = False
    """Averages live in host memory, wherever parameters do."""
