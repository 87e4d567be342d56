"""Validate files of ``torch.save`` from untrusted sources before torch reads them, and load them.

With ``weights_only=True`` torch does not run code from a file. It still waits for a pipe, inflates a small archive into
a large memory, and returns tensors that are larger than their file or hold no numbers at all. Mapped bytes are not
compared with a checksum. For a damaged file, torch raises exceptions of any class. The functions here check all of this
and raise ValueError for an invalid file.

Two weaknesses remain. A file can be made to load very slowly (a pickle whose keys take long to hash). A file that is
truncated while it is mapped ends the process, as for every mapped file.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from nitrous_ema.snapshots.bounded_json import MAX_HEADER_BYTES, brief
from nitrous_ema.snapshots.filesystem import open_regular, size_of
from nitrous_ema.snapshots.names import INCOMPLETE_COPY

if TYPE_CHECKING:
    import torch

Checksums = Mapping[int, frozenset[int]]
"""By the address of a mapped storage: the CRC-32 that its bytes may have."""

_BEGINS = b"PK\x03\x04"
_PIECE_BYTES = 1 << 20
_ENCRYPTED = 0x1 | 0x20 | 0x40  # encrypted, patched, or strongly encrypted: flags in the archive's directory


def load_torch_file(path: Path) -> Any:
    """Load a file of ``torch.save`` to the CPU. Its numbers are mapped, and not yet compared with their checksums.

    Returns:
        The saved object.

    Raises:
        ValueError: The file is not what torch writes; the message has the first problem.
        OSError: The file cannot be opened.
    """
    with open_regular(path) as file:
        try:
            _check_archive(file)
        except Exception as error:  # zipfile raises exceptions of eight classes
            # The directory is at the end of an archive, so an archive that was cut has none.
            file.seek(0)
            hint = f". {INCOMPLETE_COPY}" if isinstance(error, zipfile.BadZipFile) and file.read(4) == _BEGINS else ""
            raise ValueError(f"it is not an archive written by torch: {brief(str(error))}{hint}") from error
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of any class: the pickle in the file decides what torch does
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"torch cannot load it ({type(error).__name__}: {brief(first_line)})") from error


class _BoundedFile:
    """A file of which no single read takes more memory than the largest header may have.

    ``zipfile`` reads the directory of an archive at once, with the size that the archive claims for it.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its directory, or a member, claims {size} bytes")
        return self._file.read(size)


def open_archive(file: BufferedReader) -> zipfile.ZipFile:
    """Open the archive in a file. A directory of more than MAX_HEADER_BYTES bytes raises ValueError."""
    return zipfile.ZipFile(cast("IO[bytes]", _BoundedFile(file)))


def verify_archive(path: Path) -> None:
    """Read all of a file that ``load_torch_file`` accepts, and compare every member with its checksum.

    Raises:
        ValueError: A checksum is wrong.
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        try:
            with open_archive(file) as archive:
                for member in archive.infolist():
                    _read(archive, member)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(brief(str(error))) from error


def locate_storages(path: Path, tensors: Iterable[torch.Tensor]) -> Checksums:
    """Match the storages of mapped tensors with the members of their archive, and return their expected checksums.

    torch does not check that a storage has the size of its member: it would read beyond the end of a shorter member.

    Args:
        path: The file.
        tensors: All tensors that ``load_torch_file`` has returned for it.

    Returns:
        The argument of ``verify_storage`` for these tensors.

    Raises:
        ValueError: A storage is not exactly a member of the archive.
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        try:
            members = _members_by_offset(file)
        except Exception as error:
            raise ValueError(f"it is not an archive written by torch: {brief(str(error))}") from error
    storages = {(each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()) for each in tensors}
    found = sorted(each for each in storages if each[1])
    # torch does not expose the address at which it maps the file. An address is possible if it lies at the start of a
    # page and puts every storage on a member of its size; the members of the first storage's size give the candidates.
    bases = [found[0][0] - offset for offset, member in members.items() if member.size == found[0][1]] if found else [0]
    fitting = [
        base
        for base in bases
        if base % mmap.PAGESIZE == 0
        and all(members.get(begin - base, _NO_MEMBER).size == size for begin, size in found)
    ]
    if not fitting:
        raise ValueError("the sizes of its tensors are not the sizes of its archive members")
    return {begin: frozenset(members[begin - base].crc32 for base in fitting) for begin, _ in found}


def verify_storage(tensor: torch.Tensor, checksums: Checksums) -> None:
    """Compare all mapped bytes of a tensor's storage with their checksum.

    Args:
        tensor: A tensor of ``load_torch_file``.
        checksums: The result of ``locate_storages``. If members have equal sizes at equal distances, the address of the
            mapping is ambiguous, and a storage has several checksums. Each of them is accepted; a changed bit matches
            none.

    Raises:
        ValueError: The bytes have another checksum.
    """
    import torch

    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return
    found = zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
    expected = checksums[storage.data_ptr()]
    if found not in expected:
        raise ValueError(
            f"checksum mismatch: found {found:08x}, expected {' or '.join(f'{each:08x}' for each in sorted(expected))}"
        )


def plain_tensor(tensor: torch.Tensor, *, file_bytes: int) -> torch.Tensor:
    """Return a loaded tensor as strided numbers on the CPU, without autograd, conjugation or negation.

    Args:
        tensor: The tensor.
        file_bytes: Size of its file. A larger tensor is refused, because expanded sizes may claim any amount of memory.

    Raises:
        ValueError: The tensor is sparse, nested, quantized, not on the CPU, or larger than its file.
    """
    import torch

    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"not a dense CPU tensor: {brief(f'{tensor.dtype}, {tensor.layout}, on {tensor.device}')}")
    if tensor.numel() * tensor.element_size() > file_bytes:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is larger than the whole file")
    return tensor.detach().resolve_conj().resolve_neg()


def _check_archive(file: BufferedReader) -> None:
    """Check names, positions and sizes of all members against what torch writes, and the contents except the numbers.

    torch stores members uncompressed. Uncompressed members that neither overlap nor exceed the file cannot make a small
    file claim a large memory.
    """
    with open_archive(file) as archive:
        members = archive.infolist()
        names = {member.filename for member in members}
        # Of two members with one name, zipfile and torch may read different ones.
        if len(names) < len(members):
            raise ValueError("two members have the same name")
        end = 0
        for member in sorted(members, key=lambda each: each.header_offset):
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise ValueError(f"{member.filename!r} is compressed")
            if member.flag_bits & _ENCRYPTED:
                raise ValueError(f"{member.filename!r} is encrypted")
            if member.header_offset < end:
                raise ValueError(f"{member.filename!r} overlaps another member")
            # A lower bound without the member's header. It suffices: members together cannot claim more than the file.
            end = member.header_offset + member.file_size
            # Numbers are read and verified later, while synthesis reads them: then they come from the disk once.
            if "/data/" not in member.filename:
                if member.file_size > MAX_HEADER_BYTES:  # torch reads it whole
                    raise ValueError(f"{member.filename!r} claims {member.file_size} bytes")
                _read(archive, member)
        if end > size_of(file):
            raise ValueError("its members are longer than the file")


class _Member(NamedTuple):
    size: int
    crc32: int


_NO_MEMBER = _Member(-1, 0)


def _members_by_offset(file: BufferedReader) -> dict[int, _Member]:
    """Return the members of an archive by the offset at which their bytes begin in the file."""
    found = {}
    with open_archive(file) as archive:
        members = archive.infolist()
    for member in members:
        # The directory has the offset of the local header, whose length varies: torch aligns the numbers with its extra
        # field (caffe2/serialize/inline_container.cc).
        file.seek(member.header_offset)
        signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
        encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
        if signature != b"PK\x03\x04" or file.read(name_bytes) != member.orig_filename.encode(encoding):
            raise ValueError(f"{brief(repr(member.filename))} is not at its listed position")
        found[member.header_offset + 30 + name_bytes + extra_bytes] = _Member(member.file_size, member.CRC)
    return found


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    with archive.open(member) as part:  # compares the checksum at the end
        while part.read(_PIECE_BYTES):
            pass
