"""A synthesized average into a model.

Longer than the house's 300 lines because three kinds of files and one check of all of them belong on one page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.synthesis.outputs.reader import _opened, _Parts, _SafetensorsFile, _told, _TorchFile

if TYPE_CHECKING:
    import torch


def load_average(model: torch.nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> dict[str, str]:
    """Copy a synthesized average into a model, in place, cast to the types the model has.

    The model may be wrapped (``torch.compile``, DDP) and have tied tensors; names are those of the unwrapped model's
    ``state_dict()``. Names that a wrapper has left in the file (old folders of a wrapped model) are understood where
    they leave no doubt. Everything is checked before the first tensor is touched, and an EMA that reads this model in
    the background is waited for. Tensors that were skipped while training are in no file; they keep what the model has.

    ema-pytorch stores whole numbers as float16 like all else. They become what the model has if they are still whole,
    and so small (below 2048 in float16, else 256) that no rounding can have changed them.

    Args:
        model: Any device, any floating types.
        path: What the synthesis wrote: ``.safetensors``, ``.pt``, or the ``.safetensors.index.json`` of several parts.
        strict: Demand that file and model have the same tensors; otherwise those that both have are loaded.

    Returns:
        What the file says it is made of (``step``, ``sigma_rel``, ``profile_error``...); empty for ``.pt``.

    Raises:
        SnapshotNotFound: No such file.
        SnapshotDamaged: The file is not what the synthesis writes.
        SnapshotMismatch: Names or shapes differ from the model's, or whole, real and complex numbers meet, or a number
            is too large for the model's type, or a tensor of the model has no values of its own to be written (meta,
            sharded).
        SnapshotError: The file cannot be read.
        TypeError: ``model`` is no module.
    """
    from nitrous_ema.averaging.model.tracking import canonical_tensors, check_module

    check_module(model)
    return load_tensors(canonical_tensors(model), path, strict=strict)


def load_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], *, strict: bool = True
) -> dict[str, str]:
    """``load_average`` into tensors by name, of whatever types they are."""
    from nitrous_ema.averaging.execution.write_guard import fence_all
    from nitrous_ema.averaging.model.tracking import writable_view, write

    path = Path(path)
    with _told(path):
        stored = _opened(path)
    tensors = _under_names_of(stored, tensors)
    _check(path, stored, tensors, strict=strict)
    fence_all(list(tensors.values()))
    for key, tensor in tensors.items():
        if key in stored.described:
            write(*writable_view(tensor, stored.read(key)))
    return stored.metadata


def _under_names_of(
    stored: _TorchFile | _SafetensorsFile | _Parts, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The tensors under the file's names, if these differ by the names of wrappers only; else as they are."""
    from nitrous_ema.averaging.model.tracking import without_wrappers

    wanted = {key: without_wrappers(key) for key in tensors if key not in stored.skipped}
    there = {without_wrappers(key): key for key in stored.described}
    one_to_one = len(there) == len(stored.described) and len(set(wanted.values())) == len(wanted)
    if wanted.keys() == stored.described.keys() or not one_to_one or set(wanted.values()) != there.keys():
        return tensors
    return {there[plain]: tensors[key] for key, plain in wanted.items()}


def _check(
    path: Path, stored: _TorchFile | _SafetensorsFile | _Parts, tensors: Mapping[str, torch.Tensor], *, strict: bool
) -> None:
    """Refuse a file that does not fit the model."""
    from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

    if "layout_sha256" in stored.metadata:
        raise SnapshotMismatch(
            f"{path} is a snapshot, not an average made of snapshots. Synthesize one with "
            "`python -m nitrous_ema.async_.synthesize_worker` and load that.",
            path=path,
        )
    skipped = set(stored.skipped)
    missing = [key for key in tensors if key not in stored.described and key not in skipped]
    unexpected = [key for key in stored.described if key not in tensors]
    problems = []
    if strict and missing:
        problems.append(f"missing in the file: {_some(missing)}")
    if strict and unexpected:
        problems.append(f"missing in the model: {_some(unexpected)}")
    if not strict and len(missing) + len(skipped) >= len(tensors) and not tensors.keys() & stored.described.keys():
        problems.append("no tensor has the same name in both")
    for key in (key for key in tensors if key in stored.described):
        found, tensor = stored.described[key], tensors[key]
        if (unwritable := _unwritable(tensor)) is not None:
            problems.append(f"{key!r} of the model {unwritable}")
        elif found.shape != tuple(tensor.shape):
            problems.append(f"{key!r} is {found.shape} in the file and {tuple(tensor.shape)} in the model")
        elif found.dtype in TORCH_DTYPES and _overflows(stored, key, tensor.dtype):
            problems.append(f"{key!r} has numbers in the file that are too large for {tensor.dtype} in the model")
        elif found.dtype not in TORCH_DTYPES or (
            _kind(TORCH_DTYPES[found.dtype]) != _kind(tensor.dtype) and not _are_whole(stored.read(key), tensor.dtype)
        ):
            problems.append(f"{key!r} is {found.dtype} in the file and {tensor.dtype} in the model")
    if problems:
        raise SnapshotMismatch(
            f"{path} does not fit the model; {'; '.join(problems[:5])}. Nothing was loaded. Load it into the "
            "architecture that was trained, or with strict=False to take what both have.",
            path=path,
        )


def _unwritable(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be given values, if so."""
    import torch
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return "is uninitialized (run one forward pass first)"
    if tensor.is_meta:
        return "is on the meta device and holds no values (give it memory first, with to_empty())"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}, not a plain tensor (load before the model is sharded or converted)"
    return None


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    """Real, complex or whole numbers: none is rounded to another silently."""
    return dtype.is_floating_point, dtype.is_complex


def _are_whole(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether floating numbers are whole ones of this type, which no rounding to a floating type can have changed."""
    import torch

    if not values.is_floating_point() or dtype.is_floating_point or dtype.is_complex:
        return False
    limit = 2048 if values.dtype == torch.float16 else 256  # which bfloat16 still holds
    values = values.double()
    if not bool(((values == values.round()) & (values.abs() < limit)).all()):
        return False
    return torch.equal(values.to(dtype).double(), values)  # nothing negative, and only 0 and 1 where that is all


def _overflows(stored: _TorchFile | _SafetensorsFile | _Parts, key: str, dtype: torch.dtype) -> bool:
    """Whether numbers of a file would become infinite; it is read only where the model's type is far narrower."""
    import torch

    from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

    found = TORCH_DTYPES[stored.described[key].dtype]
    if not (found.is_floating_point and dtype.is_floating_point):
        return False
    if torch.finfo(dtype).max * 2 > torch.finfo(found).max:  # bfloat16 ends a little before float32
        return False
    values = stored.read(key)
    return bool((values.isfinite() & ~values.to(dtype).float().isfinite()).any())


def _some(names: list[str]) -> str:
    shown = brief(", ".join(map(repr, names[:5])))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
