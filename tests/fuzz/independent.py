"""What files say, read without any of our code: the ``safetensors`` package, ``json``, ``zlib`` and plain torch."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass

import safetensors
import torch

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


@dataclass(frozen=True)
class Reading:
    """A file that is right by this reading."""

    facts: dict[str, str]
    tensors: Tensors
    """Type code, shape and bytes by name."""


def read_safetensors(content: bytes) -> Reading | None:
    """A file as the safetensors package understands it; None if it refuses it, or names something twice."""
    try:
        tensors = {
            name: (each["dtype"], tuple(each["shape"]), bytes(each["data"]))
            for name, each in safetensors.deserialize(content)
        }
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length].decode(), object_pairs_hook=_once)
    except (safetensors.SafetensorError, ValueError):
        return None
    return Reading(header.get("__metadata__", {}), tensors)


def read_snapshot(content: bytes) -> Reading | None:
    """A snapshot file whose header and chunks have the checksums that it says; None for any other."""
    reading = read_safetensors(content)
    if reading is None:
        return None
    try:
        return reading if _is_sealed(content, reading) else None
    except (KeyError, ValueError, TypeError):
        return None


def read_torch(content: bytes) -> dict[str, torch.Tensor] | None:
    """A file as torch loads it into memory, without the tensors whose checksums are wrong; None if it refuses it."""
    try:
        wrong = [part for part, crc32 in stored_parts(content) if zlib.crc32(part) != crc32]  # torch compares none
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:
        return None
    return {
        key: each
        for key, each in state.items()
        if isinstance(each, torch.Tensor) and not (each.numel() and bytes(each.untyped_storage()) in wrong)
    }


def stored_parts(content: bytes) -> list[tuple[bytes, int]]:
    """Bytes and checksum of each part of an archive that is not compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    parts = []
    for member in members:
        at = member.header_offset + 30 + sum(struct.unpack_from("<HH", content, member.header_offset + 26))
        parts.append((content[at : at + member.file_size], member.CRC))
    return parts


def header_crc32(blob: bytes) -> str:
    """The checksum of the bytes before the data, with zeros where it stands."""
    at = blob.index(b'"header_crc32":"') + 16
    return f"{zlib.crc32(blob[:at] + b'00000000' + blob[at + 8 :]):08x}"


def sections(content: bytes) -> list[tuple[int, int]]:
    """Where the profiles and the copied tensors lie in the file: ``ema0.*``, ``ema1.*`` and so on, then the others."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    found: dict[tuple[bool, int], list[int]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            prefix = name.partition(".")[0]
            profile = int(prefix[3:]) if prefix.startswith("ema") else -1
            found.setdefault((profile < 0, profile), []).extend(8 + length + each for each in entry["data_offsets"])
    places = [(min(found[key]), max(found[key])) for key in sorted(found)]
    if any(not 0 <= begin <= end <= len(content) for begin, end in places):
        raise ValueError("outside the file")
    return places


def chunk_crc32(content: bytes, chunk_bytes: int) -> list[int]:
    """The checksums of the data, each section cut anew."""
    return [
        zlib.crc32(content[at : min(at + chunk_bytes, end)])
        for begin, end in sections(content)
        for at in range(begin, end, chunk_bytes)
    ]


def _is_sealed(content: bytes, reading: Reading) -> bool:
    blob = content[: 8 + int.from_bytes(content[:8], "little")]
    chunk_bytes = int(reading.facts["chunk_bytes"])
    return (
        reading.facts["format_version"] == "1"
        and reading.facts["header_crc32"] == header_crc32(blob)
        and chunk_bytes >= 16
        and json.loads(reading.facts["crc32"]) == chunk_crc32(content, chunk_bytes)
    )


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)
