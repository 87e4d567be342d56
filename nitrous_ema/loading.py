"""A synthesized average into a model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitrous_ema.errors import SnapshotDamaged, SnapshotMismatch, SnapshotNotFound
from nitrous_ema.snapshots.format import DTYPE_BYTES, MAX_HEADER_BYTES

if TYPE_CHECKING:
    import torch


def load_average(model: torch.nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> dict[str, str]:
    """Copy a synthesized average into a model, in place, cast to the types the model has.

    The model may be wrapped (``torch.compile``, DDP) and have tied tensors; names are those of the unwrapped model's
    ``state_dict()``. Everything is checked before the first tensor is touched. Tensors that were skipped while
    training are in no file; they keep what the model has.

    Args:
        model: Any device, any floating types.
        path: What the synthesis wrote: ``.safetensors``, or ``.pt``.
        strict: Demand that file and model have the same tensors; otherwise those that both have are loaded.

    Returns:
        What the file says it is made of (``step``, ``sigma_rel``, ``profile_error``...); empty for ``.pt``.

    Raises:
        SnapshotNotFound: No such file.
        SnapshotDamaged: The file is not what the synthesis writes.
        SnapshotMismatch: Names or shapes differ from the model's, or complex numbers meet real ones.
    """
    from nitrous_ema.tracked import canonical_tensors

    return load_tensors(canonical_tensors(model), path, strict=strict)


def load_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], *, strict: bool = True
) -> dict[str, str]:
    """``load_average`` into tensors by name, of whatever types they are."""
    import torch

    path = Path(path)
    stored = _open_torch(path) if path.suffix == ".pt" else _SafetensorsFile(path)
    _check(path, stored, tensors, strict=strict)
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in stored.described:
                tensor.copy_(stored.read(key))
    return stored.metadata


@dataclass(frozen=True, slots=True)
class _Described:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    """In the file, in bytes."""
    end: int = 0


class _TorchFile:
    """A dict of tensors as torch writes it, its bytes left on disk until they are read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.metadata: dict[str, str] = {}
        self.described = {
            key: _Described("C64" if each.is_complex() else str(each.dtype), tuple(each.shape))
            for key, each in tensors.items()
        }

    def read(self, key: str) -> torch.Tensor:
        return self._tensors[key]


def _open_torch(path: Path) -> _TorchFile:
    import pickle

    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, IsADirectoryError) as missing:
        raise SnapshotNotFound(f"{path}: no such file.", path=path, nearest=()) from missing
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise _not_ours(path, str(error)) from error
    if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
        raise _not_ours(path, "it does not hold a dict of tensors")
    return _TorchFile(tensors)


class _SafetensorsFile:
    """A safetensors file, its header checked; tensors are read one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                file_bytes = os.fstat(file.fileno()).st_size
                header_bytes = int.from_bytes(file.read(8), "little")
                if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
                    raise _not_ours(path, f"its header would be {header_bytes} of {file_bytes} bytes")
                header = json.loads(file.read(header_bytes))
            self.metadata, self.described = _describe(header, 8 + header_bytes, file_bytes)
        except (FileNotFoundError, IsADirectoryError) as missing:
            raise SnapshotNotFound(f"{path}: no such file.", path=path, nearest=()) from missing
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _not_ours(path, str(error)) from error

    def read(self, key: str) -> torch.Tensor:
        import torch

        from nitrous_ema.tracked import TORCH_DTYPES

        described = self.described[key]
        tensor = torch.empty(described.shape, dtype=TORCH_DTYPES[described.dtype], device="cpu")
        if described.end > described.begin:
            flat = tensor.view(-1).view(torch.uint8).numpy().data
            with self._path.open("rb", buffering=0) as file:
                file.seek(described.begin)
                while flat:
                    count = file.readinto(flat)
                    if not count:
                        raise _not_ours(self._path, "it became shorter while it was read")
                    flat = flat[count:]
        return tensor


def _describe(header: Any, data_begin: int, file_bytes: int) -> tuple[dict[str, str], dict[str, _Described]]:
    """Metadata and tensors of a header. Raises what comes when a field is missing or not what it should be."""
    metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
    described = {}
    for key, entry in header.items():
        begin, end = (data_begin + int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(size) for size in entry["shape"])
        num_bytes = math.prod(shape) * DTYPE_BYTES[entry["dtype"]]
        if not data_begin <= begin <= end <= file_bytes or end - begin != num_bytes or min(shape, default=0) < 0:
            raise ValueError(f"{key!r} is said to be at bytes {begin} to {end} of {file_bytes}")
        described[key] = _Described(entry["dtype"], shape, begin, end)
    return metadata, described


def _not_ours(path: Path, found: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"{path}: not a synthesized average, or a damaged one: {found}. Synthesize it again.",
        path=path,
        step=None,
        chunk=None,
    )


def _check(
    path: Path, stored: _TorchFile | _SafetensorsFile, tensors: Mapping[str, torch.Tensor], *, strict: bool
) -> None:
    """Refuse a file that does not fit the model."""
    if "layout_sha256" in stored.metadata:
        raise SnapshotMismatch(
            f"{path} is a snapshot, not an average made of snapshots. Synthesize one with "
            "`python -m nitrous_ema.async_.synthesize_worker` and load that.",
            path=path,
        )
    skipped = set(json.loads(stored.metadata.get("skipped", "[]")))
    missing = [key for key in tensors if key not in stored.described and key not in skipped]
    unexpected = [key for key in stored.described if key not in tensors]
    problems = []
    if strict and missing:
        problems.append(f"missing in the file: {_some(missing)}")
    if strict and unexpected:
        problems.append(f"missing in the model: {_some(unexpected)}")
    if not strict and len(missing) + len(skipped) >= len(tensors) and not tensors.keys() & stored.described.keys():
        problems.append("no tensor has the same name in both")
    for key in tensors.keys() & stored.described.keys():
        found, tensor = stored.described[key], tensors[key]
        if found.shape != tuple(tensor.shape):
            problems.append(f"{key!r} is {found.shape} in the file and {tuple(tensor.shape)} in the model")
        elif (found.dtype == "C64") != tensor.is_complex():
            problems.append(f"{key!r} is {found.dtype} in the file and {tensor.dtype} in the model")
    if problems:
        raise SnapshotMismatch(
            f"{path} does not fit the model; {'; '.join(problems[:5])}. Nothing was loaded. Load it into the "
            "architecture that was trained, or with strict=False to take what both have.",
            path=path,
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
