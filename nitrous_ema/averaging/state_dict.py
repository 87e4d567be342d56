"""Save and load the averages as part of a ``state_dict``: the keys of nitrous-ema 0.0.1, with canonical names.

For each profile, ``ema_model.{name}`` holds an average (float32 or float64, also for models of other types) or a copied
tensor, and ``_extra_state`` holds the counters and the lineage. States of nitrous-ema 0.0.1 load as well: they have no
counter but the step, and their names may contain the attributes of wrapper modules.

Nothing is changed unless the whole state can be loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nitrous_ema.averaging.engine import AveragingEngine
from nitrous_ema.averaging.model.tracking import TrackedTensor, without_wrappers
from nitrous_ema.errors import NitrousError

EXTRA = "_extra_state"
_PEER_COUNTERS = ("step", "initted")  # of ema-pytorch, as tensors


@dataclass(slots=True)
class LoadProblems:
    """The reasons why a state cannot be loaded, sorted as ``Module.load_state_dict`` sorts them."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def save(engine: AveragingEngine, profile: int, destination: dict[str, Any], prefix: str) -> None:
    """Add one profile to a state_dict. The tensors have the memory of the averages, not copies."""
    for tracked, value in _values(engine, profile):
        alias = value.detach()
        engine.saved_versions[id(value)] = value._version
        for key in tracked.keys if tracked.persistent else ():
            destination[f"{prefix}ema_model.{key}"] = alias
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
        engine: The engine whose averages, counters and lineage are set.
        root: Prefix of all keys that belong to this EMA.
        profiles: The prefix of each profile's keys, beginning with ``root``.
        state: The state_dict. Keys that do not begin with ``root`` are ignored.
        partial: Load the known keys even if keys are missing or unexpected.

    Returns:
        The problems. Nothing was changed if there are errors, or missing or unexpected keys unless ``partial``.
    """
    problems, found, used = LoadProblems(), [], set()
    for profile, prefix in profiles.items():
        head = f"{prefix}ema_model."
        names = _saved_names(engine.flat_buffers.tracked, [key[len(head) :] for key in state if key.startswith(head)])
        # Keys of skipped tensors are expected, too, because nitrous-ema 0.0.1 saved them.
        used |= {
            prefix + EXTRA,
            *(prefix + name for name in _PEER_COUNTERS),
            *(head + name for present in names.values() for name in present),
        }
        for tracked, value in _values(engine, profile):
            if names[tracked.name]:
                key = head + names[tracked.name][0]
                found.append((tracked.name, value, state[key]))
                problems.errors += _mismatch(key, state[key], value, may_resize=tracked.may_resize)
            elif tracked.persistent:
                problems.missing.append(head + tracked.name)
        _check_extra(engine, profile, prefix, _extra(state, prefix), problems)
    counters = next(filter(None, (_extra(state, prefix) for prefix in profiles.values())), None)
    # An error also with strict=False: the next update() would be the first, which copies the model over the averages.
    if counters is None and found and not engine.schedule.updates:
        problems.errors.append(
            f"{root + EXTRA!r} is missing: the state has averages without the number of steps. Load a state of this "
            "library, of nitrous-ema 0.0.1 or of ema-pytorch (with its 'step' and 'initted')."
        )
    problems.unexpected = [key for key in state if key.startswith(root) and key not in used]
    if not problems.errors and (partial or not (problems.missing or problems.unexpected)):
        _apply(engine, found, counters)
    else:
        _refuse_overwritten(engine, found)
    return problems


def _refuse_overwritten(engine: AveragingEngine, found: Sequence[tuple[str, Tensor, Any]]) -> None:
    """Refuse the averages until a load succeeds, if a state that cannot be loaded has already been written into them.

    ``torch.distributed.checkpoint.load`` asks for a ``state_dict()`` and reads the file into its tensors, which have
    the memory of the averages, before it calls ``load_state_dict()``.
    """
    for _, value, saved in found:
        is_alias = isinstance(saved, Tensor) and saved.numel() > 0 and saved.data_ptr() == value.data_ptr()
        if is_alias and value._version != engine.saved_versions.get(id(value)):
            error = NitrousError("the state was read into the averages before it could be compared with this EMA")
            engine.mark_invalid("load_state_dict()", error)
            return


def _values(engine: AveragingEngine, profile: int) -> Iterator[tuple[TrackedTensor, Tensor]]:
    yield from engine.flat_buffers.averages(profile)
    yield from engine.flat_buffers.copies()


def _mismatch(key: str, saved: Any, value: Tensor, *, may_resize: bool) -> list[str]:
    if not isinstance(saved, Tensor) or (saved.shape != value.shape and not may_resize):
        found = f"shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        return [f"{key!r} has {found} in the state but shape {tuple(value.shape)} in the model."]
    widens = torch.promote_types(saved.dtype, value.dtype) == value.dtype
    if not widens or saved.is_floating_point() != value.is_floating_point():
        return [f"{key!r} is {saved.dtype} in the state but {value.dtype} here; an average is never cast down."]
    return []


def _saved_names(tracked: Sequence[TrackedTensor], saved: Collection[str]) -> dict[str, list[str]]:
    """Return the names of each tensor in a state: canonical names, wrapped names, or names with other wrappers.

    All names of a state are read in one of these three ways. In a model with a submodule called ``module``, the same
    name means one tensor in a state of the model and another tensor in a state of the model under DDP.

    Args:
        tracked: The tensors of the model.
        saved: The names in the state, without prefix.
    """
    needed = [tensor for tensor in tracked if tensor.persistent and tensor.role != "skipped"]
    existing = frozenset(saved)
    canonical = {tensor.name: [key for key in tensor.keys if key in existing] for tensor in tracked}
    wrapped = {tensor.name: [name for name in tensor.wrapped_names if name in existing] for tensor in tracked}
    for names in (canonical, wrapped):
        if all(names[tensor.name] for tensor in needed):
            return names
    plain = {without_wrappers(name): name for name in existing}
    keys = [without_wrappers(key) for tensor in tracked for key in tensor.keys]
    if len(plain) < len(existing) or len(set(keys)) < len(keys):
        return canonical  # two names are equal without their wrappers, so tensors cannot be matched by name
    return {
        tensor.name: [plain[key] for key in map(without_wrappers, tensor.keys) if key in plain] for tensor in tracked
    }


def _extra(state: Mapping[str, Any], prefix: str) -> Any:
    """Return the counters of one profile in a state, or None; those of ema-pytorch are tensors of their own."""
    step, initted = (state.get(prefix + name) for name in _PEER_COUNTERS)
    if prefix + EXTRA in state or step is None or initted is None:
        return state.get(prefix + EXTRA)
    return {"step": int(step) if bool(initted) else 0}


def _check_extra(engine: AveragingEngine, profile: int, prefix: str, extra: Any, problems: LoadProblems) -> None:
    gamma = engine.config.profiles.gammas[profile]
    if extra is None:
        problems.missing.append(prefix + EXTRA)
    elif not isinstance(extra, Mapping) or not isinstance(extra.get("step"), int):
        problems.errors.append(f"{prefix + EXTRA!r} is {extra!r}; expected a dict with the number of steps.")
    elif abs(extra.get("gamma", gamma) - gamma) > 1e-9:
        problems.errors.append(
            f"{prefix + EXTRA!r}: the state was averaged with gamma {extra['gamma']!r} but this EMA has {gamma!r}. "
            "Construct the EMA with the profiles of the state."
        )


def _apply(
    engine: AveragingEngine, found: Sequence[tuple[str, Tensor, Tensor]], extra: Mapping[str, Any] | None
) -> None:
    engine.resize({name: saved.shape for name, value, saved in found if saved.shape != value.shape})
    copies = {tracked.name: value for tracked, value in engine.flat_buffers.copies()}  # new ones after a resize
    for name, value, saved in found:
        copies.get(name, value).copy_(saved)
    if extra is not None:
        engine.schedule.load(extra)
        engine.continue_run(extra.get("lineage", ()), engine.schedule.step)
    engine.mark_valid()
