"""Put a synthesized average into a model.

The whole file is checked against the whole model before the first tensor is written, so a file that does not fit leaves
the model as it was. ``synthesis.outputs.reader`` reads the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nitrous_ema.errors import SnapshotMismatch
from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.synthesis.outputs.reader import TensorDescription, open_average

if TYPE_CHECKING:
    import torch

    from nitrous_ema.snapshots.layout import TensorRecord


class _Average(Protocol):
    """What ``open_average`` returns, or an average that is only planned."""

    metadata: dict[str, str]
    skipped: tuple[str, ...]
    described: dict[str, TensorDescription]

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor."""


_REMEDY = (
    "Load it into the architecture that was trained, or with strict=False to load only the tensors that both have."
)


def load_average(model: torch.nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> dict[str, str]:
    """Copy a synthesized average into a model, in place, cast to the model's types.

    The model may be wrapped (``torch.compile``, DDP) and have tied tensors; names are those of the unwrapped model's
    ``state_dict()``. Wrappers' prefixes in the file (old folders of a wrapped model) are removed where that is
    unambiguous. All tensors are checked before the first one is written, and an EMA that reads this model in the
    background is waited for. The vectors of torch's spectral norms are then computed from the loaded weights; after a
    plain ``load_state_dict`` of the file they are the online model's of that step. The file does not contain tensors
    that were skipped while training; the model's stay.

    ema-pytorch stores whole numbers as float16 like all other tensors. They become the model's whole numbers if they
    are still whole, and so small (below 2048 in float16, else 256) that no rounding can have changed them.

    Args:
        model: Any device, any floating types.
        path: A file of a synthesis: ``.safetensors``, ``.pt``, or the ``.safetensors.index.json`` of several parts.
        strict: Require that file and model have the same tensors; otherwise only tensors that both have are loaded.

    Returns:
        The file's metadata (``step``, ``sigma_rel``, ``profile_error``...); empty for ``.pt``.

    Raises:
        SnapshotNotFound: There is no such file.
        SnapshotDamaged: The file is not one that synthesis writes, or is damaged.
        SnapshotMismatch: Names or shapes differ from the model's; or a tensor has whole, real or complex numbers in the
            file and another kind in the model; or a number is too large for the model's type; or a tensor of the model
            has no values of its own that can be written (meta, sharded).
        SnapshotError: The file cannot be read.
        TypeError: ``model`` is not a module.
    """
    from nitrous_ema.averaging.model.spectral_norm import fit_spectral_norms
    from nitrous_ema.averaging.model.tracking import canonical_tensors, check_module

    check_module(model)
    metadata = load_tensors(canonical_tensors(model), path, strict=strict)
    fit_spectral_norms(model)
    return metadata


def check_fits(
    tensors: Mapping[str, torch.Tensor],
    records: Sequence[TensorRecord],
    path: Path,
    *,
    dtype: str | None,
    subject: str,
    remedy: str,
) -> None:
    """Check that an average fits a model before it is synthesized.

    Args:
        tensors: The tensors of the model, by name.
        records: The tensors of the target snapshot.
        path: The snapshot.
        dtype: Type to which floating-point numbers will be rounded, as a safetensors code; None for the model's types.
        subject: What the message calls the average.
        remedy: The last sentence of the message.

    Raises:
        SnapshotMismatch: As ``load_average``, except for numbers that are too large.
    """
    planned = _PlannedAverage(records, dtype)
    tensors = _named_as_in_file(planned, tensors)
    _check(path, planned, tensors, strict=True, subject=subject, remedy=remedy)


class _PlannedAverage:
    """An average that does not exist yet, with the attributes of an open file. Its values are zeros, which always fit.

    Args:
        records: The tensors of the target snapshot.
        dtype: Type of its floating-point numbers, as a safetensors code; None for each tensor's own type.
    """

    def __init__(self, records: Sequence[TensorRecord], dtype: str | None) -> None:
        from nitrous_ema.synthesis.outputs.layout import output_dtype

        self.metadata: dict[str, str] = {}
        stored = [record for record in records if record.role != "skipped" and record.persistent]
        self.skipped = tuple(key for record in records if record.role == "skipped" for key in record.keys)
        self.described = {
            key: TensorDescription(output_dtype(each, dtype), each.shape) for each in stored for key in each.keys
        }

    def read(self, key: str) -> torch.Tensor:
        """Return zeros in the shape of a tensor, which take no memory."""
        import torch

        from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

        described = self.described[key]
        return torch.zeros((), dtype=TORCH_DTYPES[described.dtype]).expand(described.shape)


def load_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    subject: str | None = None,
    remedy: str = _REMEDY,
) -> dict[str, str]:
    """Copy a synthesized average into tensors, in place: ``load_average`` for tensors by name, of any types.

    Args:
        tensors: The tensors by name.
        path: The file.
        strict: As in ``load_average``.
        subject: What the message of a SnapshotMismatch calls the average; by default the path.
        remedy: The last sentence of this message.
    """
    from nitrous_ema.averaging.execution.write_guard import fence_all
    from nitrous_ema.averaging.model.tracking import writable_view, write

    path = Path(path)
    average = open_average(path)
    tensors = _named_as_in_file(average, tensors)
    _check(path, average, tensors, strict=strict, subject=subject or str(path), remedy=remedy)
    fence_all(list(tensors.values()))  # an EMA in the background may still read these tensors
    for key, tensor in tensors.items():
        if key in average.described:
            write(*writable_view(tensor, average.read(key)))
    return average.metadata


def _named_as_in_file(average: _Average, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the tensors under the file's names if the names differ by wrappers' prefixes alone; else unchanged."""
    from nitrous_ema.averaging.model.tracking import without_wrappers

    in_model = {key: without_wrappers(key) for key in tensors if key not in average.skipped}
    in_file = {without_wrappers(key): key for key in average.described}
    # Two names may become one without prefixes. A guess could then put a tensor into the wrong place.
    one_to_one = len(in_file) == len(average.described) and len(set(in_model.values())) == len(in_model)
    if in_model.keys() == average.described.keys() or not one_to_one or set(in_model.values()) != in_file.keys():
        return tensors
    return {in_file[plain]: tensors[key] for key, plain in in_model.items()}


def _check(
    path: Path, average: _Average, tensors: Mapping[str, torch.Tensor], *, strict: bool, subject: str, remedy: str
) -> None:
    """Raise SnapshotMismatch for an average that does not fit the tensors, with the first five reasons."""
    if "layout_sha256" in average.metadata:
        raise SnapshotMismatch(
            f"{path} is a snapshot, not a synthesized average. Synthesize an average with "
            "`python -m nitrous_ema.async_.synthesize_worker` and load that.",
            path=path,
        )
    problems = [*_name_problems(average, tensors, strict=strict), *_tensor_problems(average, tensors)]
    if problems:
        raise SnapshotMismatch(
            f"{subject} does not fit the model; {'; '.join(problems[:5])}. Nothing was loaded. {remedy}", path=path
        )


def _name_problems(average: _Average, tensors: Mapping[str, torch.Tensor], *, strict: bool) -> Iterator[str]:
    skipped = set(average.skipped)
    missing = [key for key in tensors if key not in average.described and key not in skipped]
    unexpected = [key for key in average.described if key not in tensors]
    if strict and missing:
        yield f"missing in the file: {_shorten(missing)}"
    if strict and unexpected:
        yield f"missing in the model: {_shorten(unexpected)}"
    # Without this, strict=False would accept the file of another model and load nothing from it.
    if not strict and len(missing) + len(skipped) >= len(tensors) and not tensors.keys() & average.described.keys():
        yield "no tensor has the same name in both"


def _tensor_problems(average: _Average, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

    for key in (key for key in tensors if key in average.described):
        found, tensor = average.described[key], tensors[key]
        if (reason := _unwritable_reason(tensor)) is not None:
            yield f"{key!r} of the model {reason}"
        elif found.shape != tuple(tensor.shape):
            yield f"{key!r} is {found.shape} in the file and {tuple(tensor.shape)} in the model"
        elif found.dtype in TORCH_DTYPES and _overflows(average, key, tensor.dtype):
            yield f"{key!r} has numbers in the file that are too large for {tensor.dtype} in the model"
        elif found.dtype not in TORCH_DTYPES or (
            _kind(TORCH_DTYPES[found.dtype]) != _kind(tensor.dtype) and not _are_whole(average.read(key), tensor.dtype)
        ):
            yield f"{key!r} is {found.dtype} in the file and {tensor.dtype} in the model"


def _unwritable_reason(tensor: torch.Tensor) -> str | None:
    """Return why no values can be written to a tensor; None if they can."""
    import torch
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return "is uninitialized (run one forward pass first)"
    if tensor.is_meta:
        return "is on the meta device and holds no values (allocate its memory first, with to_empty())"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}, not a plain tensor (load before the model is sharded or converted)"
    return None


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    """Return whether a type is real and whether it is complex. No value changes its kind silently."""
    return dtype.is_floating_point, dtype.is_complex


def _are_whole(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether floating values are whole numbers of this type that no rounding can have changed."""
    import torch

    if not values.is_floating_point() or dtype.is_floating_point or dtype.is_complex:
        return False
    # From these limits on, a neighboring whole number may have been rounded to the value: 2049 becomes 2048 in float16,
    # and 257 becomes 256 in bfloat16. The limit of bfloat16, the coarsest type, holds for all other types as well.
    limit = 2048 if values.dtype == torch.float16 else 256
    values = values.double()
    if not bool(((values == values.round()) & (values.abs() < limit)).all()):
        return False
    return torch.equal(values.to(dtype).double(), values)  # False for -1 as uint8, or 2 as bool


def _overflows(average: _Average, key: str, dtype: torch.dtype) -> bool:
    """Return whether finite values of a tensor would become infinite in this type.

    The tensor is read only if the model's type has a far smaller range.
    """
    import torch

    from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

    found = TORCH_DTYPES[average.described[key].dtype]
    if not (found.is_floating_point and dtype.is_floating_point):
        return False
    if torch.finfo(dtype).max * 2 > torch.finfo(found).max:  # bfloat16 has nearly the range of float32
        return False
    values = average.read(key)
    return bool((values.isfinite() & ~values.to(dtype).float().isfinite()).any())


def _shorten(names: list[str]) -> str:
    shown = brief(", ".join(map(repr, names[:5])))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
