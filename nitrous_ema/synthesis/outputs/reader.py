"""Read synthesized averages back from their files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotNotFound
from nitrous_ema.snapshots.bounded_json import MAX_HEADER_BYTES, MAX_HEADER_VALUES, brief, parse_json
from nitrous_ema.snapshots.filesystem import open_regular
from nitrous_ema.snapshots.torch_archive import check_numbers, check_places, load_torch_file, plain_tensor

if TYPE_CHECKING:
    import torch


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
        from nitrous_ema._base.torch_dtypes import TORCH_CODES

        self._tensors = tensors
        self.metadata: dict[str, str] = {}
        self.skipped: tuple[str, ...] = ()
        self.described = {key: _Described(TORCH_CODES[each.dtype], tuple(each.shape)) for key, each in tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        return self._tensors[key]


def _open_torch(path: Path) -> _TorchFile:
    import torch

    from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

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

        from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

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


def read_header(path: Path) -> tuple[Any, int, int]:
    """What a file says of its tensors.

    Returns:
        The header, of whatever JSON type; where the tensors begin, in bytes; and the file's size.

    Raises:
        ValueError: It is no such file.
        OSError: It cannot be opened.
    """
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"its header would be {header_bytes} of {file_bytes} bytes")
        return parse_json(file.read(header_bytes), max_values=MAX_HEADER_VALUES), 8 + header_bytes, file_bytes
