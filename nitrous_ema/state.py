"""Saving and loading the averages as part of a ``state_dict``: the keys of nitrous-ema 0.0.1, with canonical names.

For each profile: ``ema_model.{name}`` holds the average (float32, or float64, whatever the model's type is), copied
tensors likewise, and ``_extra_state`` the counters and the lineage. States of 0.0.1 load too: only the step is known
there, and names may carry wrapper modules' attributes.

Nothing is touched unless all of it can be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nitrous_ema.averager import Averager
from nitrous_ema.pipeline import neutral_modes
from nitrous_ema.tracked import TrackedTensor

EXTRA = "_extra_state"


@dataclass(slots=True)
class Problems:
    """What stands in the way of loading, in the words of ``Module.load_state_dict``."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def save(averager: Averager, profile: int, destination: dict[str, Any], prefix: str) -> None:
    """Put one profile into a state_dict. The tensors are the averages themselves, not copies."""
    for tracked, value in _values(averager, profile):
        for key in tracked.keys if tracked.persistent else ():
            destination[f"{prefix}ema_model.{key}"] = value
    schedule = averager.schedule
    destination[prefix + EXTRA] = {
        "initted": schedule.updates > 0,
        **schedule.state(),
        "gamma": averager.policy.gammas[profile],
        "update_every": schedule.update_every,
        "step_size_correction": schedule.correction,
        "lineage": averager.history.state(),
    }


def load(
    averager: Averager, root: str, profiles: Mapping[int, str], state: Mapping[str, Any], *, partial: bool = False
) -> Problems:
    """Load profiles from a state_dict.

    Args:
        averager: What to load into.
        root: Prefix of all keys that belong to this EMA.
        profiles: The prefix of each profile's keys, beginning with ``root``.
        state: Keys that do not begin with ``root`` are left alone.
        partial: Load what is there although keys are missing or unexpected.

    Returns:
        What is wrong. Nothing was touched if there are errors, or missing or unexpected keys unless ``partial``.
    """
    problems, found, used = Problems(), [], set()
    for profile, prefix in profiles.items():
        used |= {prefix + EXTRA, *_skipped(averager, prefix)}
        for tracked, value in _values(averager, profile):
            keys = [f"{prefix}ema_model.{name}" for name in (*tracked.keys, *tracked.wrapped_names)]
            present = [key for key in keys if key in state]
            used.update(present)
            if present:
                found.append((value, state[present[0]]))
                problems.errors += _mismatch(present[0], state[present[0]], value)
            elif tracked.persistent:
                problems.missing.append(keys[0])
        _check_extra(averager, profile, prefix, state, problems)
    problems.unexpected = [key for key in state if key.startswith(root) and key not in used]
    if not problems.errors and (partial or not (problems.missing or problems.unexpected)):
        _apply(averager, found, state.get(next(iter(profiles.values())) + EXTRA))
    return problems


def _values(averager: Averager, profile: int) -> Iterator[tuple[TrackedTensor, Tensor]]:
    yield from averager.arena.averages(profile)
    yield from averager.arena.copies()


def _mismatch(key: str, saved: Any, value: Tensor) -> list[str]:
    if not isinstance(saved, Tensor) or saved.shape != value.shape:
        found = f"shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        return [f"{key!r} has {found} in the state but shape {tuple(value.shape)} in the model."]
    widens = torch.promote_types(saved.dtype, value.dtype) == value.dtype
    if not widens or saved.is_floating_point() != value.is_floating_point():
        return [f"{key!r} is {saved.dtype} in the state but {value.dtype} here; an average is never cast down."]
    return []


def _skipped(averager: Averager, prefix: str) -> Iterator[str]:
    """Keys of tensors that are skipped here; 0.0.1 saved those too."""
    for tracked in averager.arena.tracked:
        if tracked.role == "skipped":
            yield from (f"{prefix}ema_model.{name}" for name in (*tracked.keys, *tracked.wrapped_names))


def _check_extra(averager: Averager, profile: int, prefix: str, state: Mapping[str, Any], problems: Problems) -> None:
    extra = state.get(prefix + EXTRA)
    if extra is None:
        problems.missing.append(prefix + EXTRA)
    elif not isinstance(extra, Mapping) or not isinstance(extra.get("step"), int):
        problems.errors.append(f"{prefix + EXTRA!r} is {extra!r}; expected a dict with the number of steps.")
    elif abs(extra.get("gamma", averager.policy.gammas[profile]) - averager.policy.gammas[profile]) > 1e-9:
        problems.errors.append(
            f"{prefix + EXTRA!r}: the state was averaged with gamma {extra['gamma']!r} but this EMA has "
            f"{averager.policy.gammas[profile]!r}. Construct it with the profiles that the state has."
        )


def _apply(averager: Averager, found: Sequence[tuple[Tensor, Tensor]], extra: Mapping[str, Any] | None) -> None:
    with neutral_modes():
        for value, saved in found:
            value.copy_(saved)
    if extra is not None:
        averager.schedule.load(extra)
        averager.history.continue_from(extra.get("lineage", ()), averager.schedule.step)
    averager.loaded()
