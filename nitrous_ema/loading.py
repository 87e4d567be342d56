"""A synthesized average into a model.

Longer than the house's 300 lines because three kinds of files and one check of all of them belong on one page.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotMismatch, SnapshotNotFound
from nitrous_ema.snapshots.bounded_json import brief, parse_json
from nitrous_ema.snapshots.format import DTYPE_BYTES, MAX_HEADER_BYTES, MAX_HEADER_VALUES
from nitrous_ema.snapshots.safetensors_header import read_header
from nitrous_ema.snapshots.torch_files import check_numbers, check_places, load_torch_file, open_regular, plain_tensor

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
    from nitrous_ema.tracked import canonical_tensors, check_module

    check_module(model)
    return load_tensors(canonical_tensors(model), path, strict=strict)


def load_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], *, strict: bool = True
) -> dict[str, str]:
    """``load_average`` into tensors by name, of whatever types they are."""
    from nitrous_ema.guard import fence_all
    from nitrous_ema.tracked import writable, write

    path = Path(path)
    with _told(path):
        stored = _opened(path)
    tensors = _under_names_of(stored, tensors)
    _check(path, stored, tensors, strict=strict)
    fence_all(list(tensors.values()))
    for key, tensor in tensors.items():
        if key in stored.described:
            write(*writable(tensor, stored.read(key)))
    return stored.metadata


def read_average(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """A synthesized average as a ``state_dict``: tensors on the CPU, in the types of the file.

    Raises:
        SnapshotNotFound: No such file.
        SnapshotDamaged: The file is not what the synthesis writes.
        SnapshotError: The file cannot be read.
    """
    path = Path(path)
    with _told(path):
        stored = _opened(path)
    return {key: stored.read(key) for key in stored.described}


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
        from nitrous_ema.tracked import dtype_code

        self._tensors = tensors
        self.metadata: dict[str, str] = {}
        self.skipped: tuple[str, ...] = ()
        self.described = {key: _Described(dtype_code(each.dtype), tuple(each.shape)) for key, each in tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        return self._tensors[key]


def _open_torch(path: Path) -> _TorchFile:
    import torch

    from nitrous_ema.tracked import TORCH_DTYPES

    file_bytes, tensors = path.stat().st_size, load_torch_file(path)
    check_numbers(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(each, torch.Tensor) and each.dtype in TORCH_DTYPES.values()
        for key, each in tensors.items()
    ):
        raise ValueError("it does not hold tensors by name")
    plain = {key: plain_tensor(each, file_bytes=file_bytes) for key, each in tensors.items()}
    check_places(path, tensors.values())
    return _TorchFile(plain)


def _opened(path: Path) -> _TorchFile | _SafetensorsFile | _Parts:
    if path.is_dir():
        raise SnapshotNotFound(
            f"{path} is a folder; expected one average: a .safetensors or .pt file, or the .safetensors.index.json of "
            "its parts.",
            path=path,
            nearest=(),
        )
    if path.name.endswith(".index.json"):
        return _Parts(path)
    return _open_torch(path) if path.suffix == ".pt" else _SafetensorsFile(path)


class _SafetensorsFile:
    """A safetensors file, its header checked; tensors are read one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.metadata, self.described = _describe(*read_header(path))
        skipped = parse_json(self.metadata.get("skipped", "[]"), max_values=MAX_HEADER_VALUES)
        if type(skipped) is not list or not all(type(name) is str for name in skipped):
            raise ValueError("the names that it says were skipped are none")
        self.skipped: tuple[str, ...] = tuple(skipped)

    def read(self, key: str) -> torch.Tensor:
        import torch

        from nitrous_ema.tracked import TORCH_DTYPES

        described = self.described[key]
        tensor = torch.empty(described.shape, dtype=TORCH_DTYPES[described.dtype], device="cpu")
        if described.end > described.begin:
            flat = tensor.view(-1).view(torch.uint8).numpy().data
            with _told(self._path), open_regular(self._path) as file:
                file.seek(described.begin)
                if file.readinto(flat) < len(flat):
                    raise ValueError("it became shorter while it was read")
        return tensor


class _Parts:
    """Several safetensors files that are one average, and the index that names them."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            index = parse_json(file.read(MAX_HEADER_BYTES), max_values=MAX_HEADER_VALUES)
        places = index.get("weight_map") if type(index) is dict else None
        if type(places) is not dict or not places:
            raise ValueError("it is no index of tensors")
        if not all(type(name) is str and name == os.path.basename(name) != "" for name in places.values()):
            raise ValueError("it names files in other folders")
        self._parts = {name: _part_of(path, name) for name in sorted(set(places.values()))}
        if any(part.metadata != next(iter(self._parts.values())).metadata for part in self._parts.values()):
            raise ValueError(f"its files are parts of different averages: {brief(', '.join(self._parts))}")
        self._places: dict[str, str] = places
        self.described = {key: each for part in self._parts.values() for key, each in part.described.items()}
        listed = {(key, name) for name, part in self._parts.items() for key in part.described}
        if listed != set(places.items()):
            raise ValueError("its files do not hold the tensors that it says are there")
        self._check_bytes(index.get("metadata"))
        self.metadata = next(iter(self._parts.values())).metadata
        self.skipped = next(iter(self._parts.values())).skipped

    def _check_bytes(self, metadata: Any) -> None:
        """Refuse parts that were rounded to other types than the index was made for."""
        told = metadata.get("total_size") if type(metadata) is dict else None
        held = sum(each.end - each.begin for each in self.described.values())
        if type(told) is int and told != held:
            raise ValueError(
                f"it says that its tensors have {told} bytes, and they have {held}: not all of one --dtype"
            )

    def read(self, key: str) -> torch.Tensor:
        return self._parts[self._places[key]].read(key)


def _part_of(index: Path, name: str) -> _SafetensorsFile:
    path = index.with_name(name)
    try:
        with _told(path):
            return _SafetensorsFile(path)
    except SnapshotNotFound as missing:
        raise SnapshotNotFound(
            f"{path}: this part of {index.name} is missing. The process that was to write it has not finished, or "
            "failed; synthesize again with the same number of processes.",
            path=path,
            nearest=(),
        ) from missing


def _describe(header: Any, data_begin: int, file_bytes: int) -> tuple[dict[str, str], dict[str, _Described]]:
    """Metadata and tensors of a header. Raises ValueError for what other readers of safetensors refuse as well."""
    if type(header) is not dict:
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its metadata are not texts by name")
    described = {key: _described(key, entry, data_begin) for key, entry in header.items()}
    position = data_begin
    for key, each in sorted(described.items(), key=lambda item: (item[1].begin, item[1].end)):
        if each.begin != position:
            raise ValueError(f"{brief(repr(key))} is said to be at byte {each.begin}, expected {position}")
        position = each.end
    if position != file_bytes:
        raise ValueError(f"its tensors end at byte {position} of {file_bytes}")
    return metadata, described


def _described(key: str, entry: Any, data_begin: int) -> _Described:
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"what it says of {brief(repr(key))} is no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if type(numbers) is not list or not all(type(each) is int and 0 <= each < 2**63 for each in numbers):
            raise ValueError(f"{brief(repr(key))} has {brief(repr(numbers))} where sizes belong")
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise ValueError(f"{brief(repr(key))} has the type {brief(repr(dtype))}, which cannot be read here")
    # A product of a thousand sizes is a number that takes long to multiply; no tensor has so many.
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype] if len(shape) <= 64 else -1
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise ValueError(f"{brief(repr(key))} is said to be at {brief(repr(offsets))} and has {num_bytes} bytes")
    return _Described(dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file is told with its name."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise SnapshotNotFound(f"{path}: no such file.{_in_parts(path)}", path=path, nearest=()) from missing
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error}", path=path) from error
    except ValueError as error:
        raise _not_ours(path, str(error)) from error


def _in_parts(path: Path) -> str:
    """What to do if an average of this name was written by several processes."""
    index = path.with_name(path.name.removesuffix(".safetensors") + ".safetensors.index.json")
    return f" It was written in parts: load {index}." if index != path and index.exists() else ""


def _not_ours(path: Path, found: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"{path}: not a synthesized average, or a damaged one: {found}. Synthesize it again.",
        path=path,
        step=None,
        chunk=None,
    )


def _under_names_of(
    stored: _TorchFile | _SafetensorsFile | _Parts, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The tensors under the file's names, if these differ by the names of wrappers only; else as they are."""
    from nitrous_ema.tracked import without_wrappers

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
    from nitrous_ema.tracked import TORCH_DTYPES

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

    from nitrous_ema.tracked import TORCH_DTYPES

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
