"""Saving and loading the averages as part of a ``state_dict``: the keys of nitrous-ema 0.0.1, with canonical names.

For each profile: ``ema_model.{name}`` holds the average (float32, or float64, whatever the model's type is), copied
tensors likewise, and ``_extra_state`` the counters and the lineage. States of 0.0.1 load too: only the step is known
there, and names may carry wrapper modules' attributes.

Nothing is touched unless all of it can be loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.model.tracking import TrackedTensor, without_wrappers

EXTRA = "_extra_state"


@dataclass(slots=True)
class LoadProblems:
    """What stands in the way of loading, in the words of ``Module.load_state_dict``."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def save(engine: AveragingEngine, profile: int, destination: dict[str, Any], prefix: str) -> None:
    """Put one profile into a state_dict. The tensors are the averages themselves, not copies."""
    for tracked, value in _values(engine, profile):
        for key in tracked.keys if tracked.persistent else ():
            destination[f"{prefix}ema_model.{key}"] = value
    schedule = engine.schedule
    destination[prefix + EXTRA] = {
        "initted": schedule.updates > 0,
        **schedule.state(),
        "gamma": engine.config.profiles.gammas[profile],
        "update_every": schedule.update_every,
        "step_size_correction": schedule.correction,
        "lineage": engine.run_lineage.state(),
    }


def load(
    engine: AveragingEngine,
    root: str,
    profiles: Mapping[int, str],
    state: Mapping[str, Any],
    *,
    partial: bool = False,
) -> LoadProblems:
    """Load profiles from a state_dict.

    Args:
        engine: What to load into.
        root: Prefix of all keys that belong to this EMA.
        profiles: The prefix of each profile's keys, beginning with ``root``.
        state: Keys that do not begin with ``root`` are left alone.
        partial: Load what is there although keys are missing or unexpected.

    Returns:
        What is wrong. Nothing was touched if there are errors, or missing or unexpected keys unless ``partial``.
    """
    problems, found, used = LoadProblems(), [], set()
    for profile, prefix in profiles.items():
        head = f"{prefix}ema_model."
        names = _saved_names(engine.flat_buffers.tracked, [key[len(head) :] for key in state if key.startswith(head)])
        # Also those of tensors that are skipped here: 0.0.1 saved them.
        used |= {prefix + EXTRA, *(head + name for present in names.values() for name in present)}
        for tracked, value in _values(engine, profile):
            if names[tracked.name]:
                key = head + names[tracked.name][0]
                found.append((value, state[key]))
                problems.errors += _mismatch(key, state[key], value)
            elif tracked.persistent:
                problems.missing.append(head + tracked.name)
        _check_extra(engine, profile, prefix, state, problems)
    problems.unexpected = [key for key in state if key.startswith(root) and key not in used]
    if not problems.errors and (partial or not (problems.missing or problems.unexpected)):
        _apply(engine, found, state.get(next(iter(profiles.values())) + EXTRA))
    return problems


def _values(engine: AveragingEngine, profile: int) -> Iterator[tuple[TrackedTensor, Tensor]]:
    yield from engine.flat_buffers.averages(profile)
    yield from engine.flat_buffers.copies()


def _mismatch(key: str, saved: Any, value: Tensor) -> list[str]:
    if not isinstance(saved, Tensor) or saved.shape != value.shape:
        found = f"shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        return [f"{key!r} has {found} in the state but shape {tuple(value.shape)} in the model."]
    widens = torch.promote_types(saved.dtype, value.dtype) == value.dtype
    if not widens or saved.is_floating_point() != value.is_floating_point():
        return [f"{key!r} is {saved.dtype} in the state but {value.dtype} here; an average is never cast down."]
    return []


def _saved_names(tracked: Sequence[TrackedTensor], saved: Collection[str]) -> dict[str, list[str]]:
    """For each tensor the names that a state has it under: canonical ones, those of now, or those of other wrappers.

    A state is read in one of these ways, never in a mixture: in a model with a submodule called ``module``, the same
    name means one tensor in a state of the model and another in a state of the model under DDP.
    """
    needed = [tensor for tensor in tracked if tensor.persistent and tensor.role != "skipped"]
    there = frozenset(saved)
    canonical = {tensor.name: [key for key in tensor.keys if key in there] for tensor in tracked}
    wrapped = {tensor.name: [name for name in tensor.wrapped_names if name in there] for tensor in tracked}
    for names in (canonical, wrapped):
        if all(names[tensor.name] for tensor in needed):
            return names
    plain = {without_wrappers(name): name for name in there}
    keys = [without_wrappers(key) for tensor in tracked for key in tensor.keys]
    if len(plain) < len(there) or len(set(keys)) < len(keys):
        return canonical  # names alone do not tell which is which
    return {
        tensor.name: [plain[key] for key in map(without_wrappers, tensor.keys) if key in plain] for tensor in tracked
    }


def _check_extra(
    engine: AveragingEngine, profile: int, prefix: str, state: Mapping[str, Any], problems: LoadProblems
) -> None:
    extra = state.get(prefix + EXTRA)
    if extra is None:
        problems.missing.append(prefix + EXTRA)
    elif not isinstance(extra, Mapping) or not isinstance(extra.get("step"), int):
        problems.errors.append(f"{prefix + EXTRA!r} is {extra!r}; expected a dict with the number of steps.")
    elif (
        abs(extra.get("gamma", engine.config.profiles.gammas[profile]) - engine.config.profiles.gammas[profile]) > 1e-9
    ):
        problems.errors.append(
            f"{prefix + EXTRA!r}: the state was averaged with gamma {extra['gamma']!r} but this EMA has "
            f"{engine.config.profiles.gammas[profile]!r}. Construct it with the profiles that the state has."
        )


def _apply(engine: AveragingEngine, found: Sequence[tuple[Tensor, Tensor]], extra: Mapping[str, Any] | None) -> None:
    for value, saved in found:
        value.copy_(saved)
    if extra is not None:
        engine.schedule.load(extra)
        engine.run_lineage.continue_from(extra.get("lineage", ()), engine.schedule.step)
    engine.mark_valid()
