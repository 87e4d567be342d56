"""Read files without any code of the package: with ``safetensors``, ``json``, ``zlib`` and plain torch."""

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
    """The contents of a file that is valid by this reading."""

    facts: dict[str, str]
    tensors: Tensors
    """Type code, shape and bytes by name."""


def read_safetensors(content: bytes) -> Reading | None:
    """Read a file with the safetensors package; None if the package refuses it, or if a name stands twice in it."""
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
    """Read a snapshot file whose header and chunks have the stored checksums; None for any other file."""
    reading = read_safetensors(content)
    if reading is None:
        return None
    try:
        return reading if _is_sealed(content, reading) else None
    except (KeyError, ValueError, TypeError):
        return None


def read_torch(content: bytes) -> dict[str, torch.Tensor] | None:
    """Load a file with torch, without the tensors whose checksums are wrong; None if torch refuses the file."""
    try:
        wrong = [part for part, crc32 in stored_parts(content) if zlib.crc32(part) != crc32]
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:
        return None
    return {
        key: each
        for key, each in state.items()
        if isinstance(each, torch.Tensor) and not (each.numel() and bytes(each.untyped_storage()) in wrong)
    }


def stored_parts(content: bytes) -> list[tuple[bytes, int]]:
    """Return bytes and stored checksum of each member of an uncompressed archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    parts = []
    for member in members:
        at = member.header_offset + 30 + sum(struct.unpack_from("<HH", content, member.header_offset + 26))
        parts.append((content[at : at + member.file_size], member.CRC))
    return parts


def header_crc32(blob: bytes) -> str:
    """Return the checksum of the bytes before the data, with zeros in place of the stored checksum."""
    at = blob.index(b'"header_crc32":"') + 16
    return f"{zlib.crc32(blob[:at] + b'00000000' + blob[at + 8 :]):08x}"


def sections(content: bytes) -> list[tuple[int, int]]:
    """Return the ranges of the sections in the file: ``ema0.*``, ``ema1.*`` and so on, then the copied tensors."""
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
    """Return the checksums of the chunks of the data; each section is divided anew."""
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
        raise ValueError("duplicate name")
    return dict(pairs)
