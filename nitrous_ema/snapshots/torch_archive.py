"""Files that torch wrote, of somebody who may not be trusted, looked at before torch reads them.

``weights_only=True`` keeps torch from running code. It does not keep it from waiting for a pipe, from unpacking a
small archive into a large memory, from handing out tensors that are larger than their file or have no numbers at all,
and mapped bytes are compared with no checksum. What it raises for a damaged file is any exception whatever.

A file that is made to be slow (a pickle whose keys take for ever to hash) still is; and one that becomes shorter while
it is mapped ends the process, as with every mapped file.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.snapshots.filesystem import open_regular

if TYPE_CHECKING:
    import torch

Checksums = Mapping[int, frozenset[int]]
"""CRC-32 of the part that is mapped there, by address."""

_PIECE_BYTES = 1 << 20
_ENCRYPTED = 0x1 | 0x20 | 0x40  # or patched, or strongly encrypted: flags in the list of an archive's parts


def load_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU, its numbers mapped and not yet compared with their checksums.

    Raises:
        ValueError: It is not what torch writes; says what was found.
        OSError: It cannot be opened.
    """
    with open_regular(path) as file:
        try:
            _check_archive(file)
        except Exception as error:  # zipfile raises eight kinds
            raise ValueError(f"it is no archive that torch wrote: {brief(str(error))}") from error
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the pickle in it leads to
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"torch cannot load it ({type(error).__name__}: {brief(first_line)})") from error


def check_numbers(path: Path) -> None:
    """Read all of a file that ``load_torch_file`` takes, and compare each part with its checksum.

    Raises:
        ValueError: One is wrong.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    _read(archive, member)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(brief(str(error))) from error


def check_places(path: Path, tensors: Iterable[torch.Tensor]) -> Checksums:
    """Compare where mapped tensors lie with the parts of their file: torch does not, and would read on into the next.

    Returns:
        What ``check_part`` needs to know of these tensors.

    Raises:
        ValueError: One is not exactly a part of the file.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        try:
            parts = _places(file)
        except Exception as error:
            raise ValueError(f"it is no archive that torch wrote: {brief(str(error))}") from error
    storages = {(each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()) for each in tensors}
    found = sorted(each for each in storages if each[1])
    # Where the file is mapped is not told. It is where one storage is its part, and then all must be theirs.
    bases = [found[0][0] - place for place, part in parts.items() if part.size == found[0][1]] if found else [0]
    fitting = [
        base
        for base in bases
        if base % mmap.PAGESIZE == 0 and all(parts.get(begin - base, _NO_PART).size == size for begin, size in found)
    ]
    if not fitting:
        raise ValueError("the sizes of its tensors are not those of its parts")
    return {begin: frozenset(parts[begin - base].crc32 for base in fitting) for begin, _ in found}


def check_part(tensor: torch.Tensor, checksums: Checksums) -> None:
    """Compare all mapped bytes of which a tensor is made with their checksum.

    Args:
        tensor: As ``load_torch_file`` gave it.
        checksums: What ``check_places`` said. Where it could not tell which of several parts is this one, because they
            have one size and one distance, that of either will do: a changed bit fits none of them.

    Raises:
        ValueError: It is another one.
    """
    import torch

    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return
    found = zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
    expected = checksums[storage.data_ptr()]
    if found not in expected:
        raise ValueError(f"bad CRC-32: {found:08x}, expected {' or '.join(f'{each:08x}' for each in sorted(expected))}")


def plain_tensor(tensor: torch.Tensor, *, file_bytes: int) -> torch.Tensor:
    """A loaded tensor as numbers in memory that the file really has, without autograd.

    Raises:
        ValueError: It is sparse, quantized, on no device, or larger than its file.
    """
    import torch

    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"it is no plain tensor but {brief(f'{tensor.dtype}, {tensor.layout}, on {tensor.device}')}")
    if tensor.numel() * tensor.element_size() > file_bytes:
        raise ValueError(f"it has the shape {tuple(tensor.shape)}, which is more than the whole file")
    return tensor.detach().resolve_conj().resolve_neg()


def _check_archive(file: BufferedReader) -> None:
    """Names, places and sizes as torch writes them; of the contents all but the numbers."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = {member.filename for member in members}
        if len(names) < len(members):
            raise ValueError("two parts have one name")
        end = 0
        for member in sorted(members, key=lambda each: each.header_offset):
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise ValueError(f"{member.filename!r} is compressed")
            if member.flag_bits & _ENCRYPTED:
                raise ValueError(f"{member.filename!r} is encrypted")
            if member.header_offset < end:
                raise ValueError(f"{member.filename!r} overlaps another part")
            end = member.header_offset + member.file_size
            if "/data/" not in member.filename:
                _read(archive, member)
        if end > os.fstat(file.fileno()).st_size:
            raise ValueError("its parts are longer than the file")


class _Member(NamedTuple):
    size: int
    crc32: int


_NO_PART = _Member(-1, 0)


def _places(file: BufferedReader) -> dict[int, _Member]:
    """The parts by where their bytes begin."""
    parts = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    for member in members:
        file.seek(member.header_offset)
        signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))  # a local header
        encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
        if signature != b"PK\x03\x04" or file.read(name_bytes) != member.orig_filename.encode(encoding):
            raise ValueError(f"{brief(repr(member.filename))} does not lie where it says")
        parts[member.header_offset + 30 + name_bytes + extra_bytes] = _Member(member.file_size, member.CRC)
    return parts


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    with archive.open(member) as part:  # compares the checksum at the end
        while part.read(_PIECE_BYTES):
            pass
