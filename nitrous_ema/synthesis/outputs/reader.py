"""Read synthesized averages back from their files: ``.safetensors``, ``.pt``, or several files and their index.

``open_average`` checks a file without reading its tensors. It returns one of three classes with the same attributes:
``metadata``, ``skipped``, ``described`` (type and shape of each tensor) and ``read(key)``. A file may be damaged or
hostile, so every size in a header is checked against the file before memory is allocated for it.

Longer than 300 lines because the three kinds of files share their checks and their errors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotNotFound
from nitrous_ema.snapshots.bounded_json import MAX_HEADER_BYTES, MAX_HEADER_VALUES, brief, parse_json
from nitrous_ema.snapshots.disk_space import explained
from nitrous_ema.snapshots.filesystem import FileSystem, is_folder, is_there, open_regular, size_of
from nitrous_ema.snapshots.names import INCOMPLETE_COPY
from nitrous_ema.snapshots.torch_archive import load_torch_file, locate_storages, plain_tensor, verify_archive

if TYPE_CHECKING:
    import torch


def read_average(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return a synthesized average as a ``state_dict``: tensors on the CPU, in the types of the file.

    Args:
        path: A ``.safetensors`` or ``.pt`` file, or the ``.safetensors.index.json`` of several parts.

    Raises:
        SnapshotNotFound: There is no such file, or a part is missing.
        SnapshotDamaged: The file is not one that synthesis writes, or is damaged.
        SnapshotError: The file cannot be read.
    """
    average = open_average(Path(path))
    return {key: average.read(key) for key in average.described}


def open_average(path: Path) -> TorchFile | SafetensorsFile | ShardedFile:
    """Open a synthesized average and check its header. Tensors stay on disk until they are read.

    Args:
        path: As in ``read_average``.

    Raises:
        SnapshotNotFound: There is no such file, it is a folder, or a part is missing.
        SnapshotDamaged: The file is not one that synthesis writes, or is damaged.
        SnapshotError: The file cannot be read.
    """
    with named_errors(path):
        if is_folder(path):
            raise SnapshotNotFound(
                f"{path} is a folder; expected the file of one average (.safetensors or .pt), or the "
                ".safetensors.index.json of its parts.",
                path=path,
                nearest=(),
            )
        if path.name.endswith(".index.json"):
            return ShardedFile(path)
        return TorchFile.open(path) if path.suffix == ".pt" else SafetensorsFile(path)


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """Type, shape and place of one tensor of a file."""

    dtype: str
    """Its safetensors code."""
    shape: tuple[int, ...]
    begin: int = 0
    """First byte in the file; 0 in a ``.pt`` file."""
    end: int = 0
    """Byte after the last; 0 in a ``.pt`` file."""


class SafetensorsFile:
    """A safetensors file whose header has been checked. Tensors are read one at a time.

    Args:
        path: The file.

    Raises:
        ValueError: It is not a safetensors file that synthesis writes.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.metadata, described = _describe(*read_header(path))
        self.skipped = _names_in(self.metadata, "skipped")
        self.described = _with_complex(described, _names_in(self.metadata, "complex"))

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor, on the CPU.

        Raises:
            SnapshotDamaged: The file became shorter after it was opened.
            SnapshotError: The file cannot be read, or this version of torch does not have the tensor's type.
        """
        import torch

        from nitrous_ema._base.torch_dtypes import READABLE_DTYPES

        described = self.described[key]
        if described.dtype not in READABLE_DTYPES:
            raise SnapshotError(
                f"{self._path}: {brief(repr(key))} is {described.dtype}, a type that torch {torch.__version__} lacks. "
                "Upgrade torch.",
                path=self._path,
            )
        tensor = torch.empty(described.shape, dtype=READABLE_DTYPES[described.dtype], device="cpu")
        if described.end > described.begin:
            # Read into the tensor's own memory, without a second copy. The file is opened for each tensor, so that an
            # average in many parts keeps no descriptors open.
            flat = tensor.view(-1).view(torch.uint8).numpy().data
            with named_errors(self._path), open_regular(self._path) as file:
                file.seek(described.begin)
                if file.readinto(flat) < len(flat):
                    raise ValueError("the file became shorter while it was read")
        return tensor


class TorchFile:
    """A dict of tensors as ``torch.save`` writes it. Its bytes are mapped, and stay on disk until they are read.

    Args:
        tensors: The tensors by key.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from nitrous_ema._base.torch_dtypes import TORCH_CODES

        self._tensors = tensors
        self.metadata: dict[str, str] = {}  # such a file has none
        self.skipped: tuple[str, ...] = ()
        self.described = {
            key: TensorDescription(TORCH_CODES[each.dtype], tuple(each.shape)) for key, each in tensors.items()
        }

    @classmethod
    def open(cls, path: Path) -> TorchFile:
        """Map a ``.pt`` file and check it.

        Raises:
            ValueError: It is not a dict of plain tensors, or damaged.
            OSError: It cannot be opened.
        """
        import torch

        from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

        file_bytes, tensors = FileSystem().status(path).st_size, load_torch_file(path)
        verify_archive(path)
        if not isinstance(tensors, dict) or not all(
            isinstance(key, str) and isinstance(each, torch.Tensor) and each.dtype in TORCH_DTYPES.values()
            for key, each in tensors.items()
        ):
            raise ValueError("it does not contain a dict of tensors by name")
        plain = {key: plain_tensor(each, file_bytes=file_bytes) for key, each in tensors.items()}
        locate_storages(path, tensors.values())
        return cls(plain)

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor, on the CPU."""
        return self._tensors[key]


class ShardedFile:
    """One average in several safetensors files, and the index that names them.

    Args:
        path: The index.

    Raises:
        ValueError: It is not such an index, or does not describe its parts.
        SnapshotNotFound: A part is missing.
        SnapshotDamaged: A part is damaged.
        OSError: The index cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            index = parse_json(file.read(MAX_HEADER_BYTES), max_values=MAX_HEADER_VALUES)
        weight_map = index.get("weight_map") if type(index) is dict else None
        if type(weight_map) is not dict or not weight_map:
            raise ValueError("it is not an index of tensors ('weight_map')")
        # Only files beside the index: a name with a path could open any file of this machine.
        if not all(type(name) is str and name == os.path.basename(name) != "" for name in weight_map.values()):
            raise ValueError("the index names files in other folders")
        self._weight_map: dict[str, str] = weight_map
        self._parts = {name: _open_part(path, name) for name in sorted(set(weight_map.values()))}
        first = next(iter(self._parts.values()))
        self.metadata, self.skipped = first.metadata, first.skipped
        # Parts of two syntheses could otherwise be mixed: their tensors have the same names and shapes.
        if any(part.metadata != self.metadata for part in self._parts.values()):
            raise ValueError(f"the files are parts of different averages: {brief(', '.join(self._parts))}")
        self.described = {key: each for part in self._parts.values() for key, each in part.described.items()}
        described = {(key, name) for name, part in self._parts.items() for key in part.described}
        if described != set(weight_map.items()):
            raise ValueError("the files do not contain the tensors that the index lists")
        self._check_bytes(index.get("metadata"))

    def _check_bytes(self, metadata: Any) -> None:
        """Refuse parts that were rounded to other types than the index was written for."""
        expected = metadata.get("total_size") if type(metadata) is dict else None
        found = sum(each.end - each.begin for each in self.described.values())
        if type(expected) is int and found != expected:
            raise ValueError(
                f"the index lists tensors of {expected} bytes, and the files contain {found}: the parts were written "
                "with different values of --dtype"
            )

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor, on the CPU; raises as ``SafetensorsFile.read``."""
        return self._parts[self._weight_map[key]].read(key)


def _open_part(index: Path, name: str) -> SafetensorsFile:
    path = index.with_name(name)
    try:
        with named_errors(path):
            return SafetensorsFile(path)
    except SnapshotNotFound as missing:
        raise SnapshotNotFound(
            f"{path}: this part of {index.name} is missing. The process that writes it has not finished, or failed. "
            "Synthesize again with the same number of processes.",
            path=path,
            nearest=(),
        ) from missing


def read_header(path: Path) -> tuple[Any, int, int]:
    """Read the header of a safetensors file.

    Returns:
        The header, of any JSON type; the byte at which the tensors begin; and the size of the file in bytes.

    Raises:
        ValueError: The file does not begin with such a header.
        OSError: The file cannot be opened.
    """
    with open_regular(path) as file:
        file_bytes = size_of(file)
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            # A file that was cut within its header begins like this, too.
            hint = f". {INCOMPLETE_COPY}" if 2 <= header_bytes <= MAX_HEADER_BYTES else ""
            raise ValueError(f"invalid header size: {header_bytes} bytes in a file of {file_bytes} bytes{hint}")
        return parse_json(file.read(header_bytes), max_values=MAX_HEADER_VALUES), 8 + header_bytes, file_bytes


def _describe(header: Any, data_begin: int, file_bytes: int) -> tuple[dict[str, str], dict[str, TensorDescription]]:
    """Return metadata and tensors of a header. Raises ValueError for headers that other safetensors readers refuse."""
    if type(header) is not dict:
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("the metadata is not a JSON object of strings")
    described = {key: _describe_tensor(key, entry, data_begin) for key, entry in header.items()}
    # Tensors lie back to back and end with the file, so every byte belongs to exactly one tensor.
    position = data_begin
    for key, each in sorted(described.items(), key=lambda item: (item[1].begin, item[1].end)):
        if each.begin != position:
            raise ValueError(f"tensor {brief(repr(key))} begins at byte {each.begin}, expected {position}")
        position = each.end
    if position > file_bytes:
        raise ValueError(f"the file has {file_bytes} bytes, and its header states {position}. {INCOMPLETE_COPY}")
    if position != file_bytes:
        raise ValueError(f"the tensors end at byte {position} of {file_bytes}")
    return metadata, described


def _names_in(metadata: dict[str, str], field: str) -> tuple[str, ...]:
    """Return a field of the metadata that is a JSON list of tensors' names; empty without the field."""
    names = parse_json(metadata.get(field, "[]"), max_values=MAX_HEADER_VALUES)
    if type(names) is not list or not all(type(name) is str for name in names):
        raise ValueError(f"metadata field {field!r} is not a JSON list of strings")
    return tuple(names)


def _with_complex(described: dict[str, TensorDescription], names: tuple[str, ...]) -> dict[str, TensorDescription]:
    """Return the tensors, those with these names as complex ones: they are stored as pairs of float32 numbers."""
    for name in names:
        if (pairs := described.get(name)) is None:  # it is in another part
            continue
        if pairs.dtype != "F32" or pairs.shape[-1:] != (2,):
            raise ValueError(f"the complex tensor {brief(repr(name))} is not stored as pairs of F32 numbers")
        described = {**described, name: replace(pairs, dtype="C64", shape=pairs.shape[:-1])}
    return described


def _describe_tensor(key: str, entry: Any, data_begin: int) -> TensorDescription:
    name = brief(repr(key))
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header entry of {name} does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if type(numbers) is not list or not all(type(each) is int and 0 <= each < 2**63 for each in numbers):
            raise ValueError(f"{name} has {brief(repr(numbers))} instead of a list of sizes")
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name} has the unsupported type {brief(repr(dtype))}")
    # A hostile shape of a thousand sizes would take long to multiply; no tensor has more than 64 dimensions.
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype] if len(shape) <= 64 else -1
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise ValueError(f"{name} has data_offsets {brief(repr(offsets))} for {num_bytes} bytes")
    return TensorDescription(dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn errors about a file's content and access into errors of this package that name the file."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise SnapshotNotFound(
            f"{path}: no such file.{_parts_hint(path) or ' Check the path.'}", path=path, nearest=()
        ) from missing
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {explained(error, path)}", path=path) from error
    except ValueError as error:
        raise SnapshotDamaged(
            f"{path}: not a synthesized average, or damaged: {error}. "
            f"{'Or s' if INCOMPLETE_COPY in str(error) else 'S'}ynthesize it again.",
            path=path,
            step=None,
            chunk=None,
        ) from error


def _parts_hint(path: Path) -> str:
    """Return a hint to load the index, if an average of this name was written in parts."""
    index = path.with_name(path.name.removesuffix(".safetensors") + ".safetensors.index.json")
    return f" It was written in parts: load {index}." if index != path and is_there(index) else ""
