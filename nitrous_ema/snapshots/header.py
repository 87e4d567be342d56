"""The bytes of a snapshot file: one rank's part of all averages at one step, readable by any safetensors reader.

byte 0        8 bytes, little-endian: length of the header
byte 8        header: JSON, padded with spaces. ``__metadata__`` comes first: the fields of this snapshot (stamp,
              optional fields, checksums), then the fields that all snapshots of a run share (layout). The tensors'
              entries follow
data_begin    a multiple of 4096. One section per profile, its tensors back to back in file order, then the section of
              the copied tensors. Each section is divided anew into chunks of ``chunk_bytes``, each with its CRC-32

The writer needs the size of the header before it knows the checksums, because the data is written first. The reader
must not trust any byte of a file before its checksum is verified, and no field before its type and range are checked.
Both follow from one rule: a layout, a stamp and checksums have exactly one encoding. Its size is computed from upper
bounds, and the reader encodes the decoded values again and compares the bytes.

Later versions may add two kinds of content. An optional field adds information only: it stands between ``trainer`` and
``crc32``, in alphabetical order, and a reader that does not know it ignores it. Everything else changes the meaning of
the file: other tensors' records, sections or fields of the layout. ``requires`` names such a feature and the first
version that reads it, and a reader that does not know the feature refuses the file by this name.

HEADER-1  The size of a header is known before its numbers are: it    test_header_size_is_known_before_its_numbers_are
    depends on layout, offsets, lineage and trainer only. So data
    is written first.
HEADER-2  There is one byte string for each (layout, stamp,           test_header_of_version_1_has_exactly_these_bytes
    checksums). The reader encodes the decoded values again and
    compares: overlapping offsets and duplicate names cannot pass.
HEADER-3  ``header_crc32`` has a fixed position and covers every      test_flipped_bit_anywhere_in_a_header_is_damage
    byte before the data. It is verified before any field is used.
HEADER-4  For arbitrary bytes, reading raises SnapshotDamaged or      test_forged_header_is_damage_and_nothing_else
    SnapshotUnsupported only, and holds a small multiple of the
    file's own header in memory.
HEADER-5  An unknown optional field changes nothing that is read.     test_unknown_optional_field_is_ignored
    An unknown feature in ``requires`` is named, and nothing          test_feature_of_a_newer_version_is_refused_by_name
    after it is parsed.

Longer than 300 lines because writing and reading one header belong on one page.
"""

from __future__ import annotations

import functools
import json
import re
import reprlib
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from nitrous_ema._version import __version__
from nitrous_ema.errors import SnapshotUnsupported
from nitrous_ema.snapshots.bounded_json import (
    MAX_HEADER_BYTES,
    MAX_HEADER_VALUES,
    brief,
    check_encodable,
    json_bytes,
    json_text,
    parse_header_json,
)
from nitrous_ema.snapshots.layout import Layout, Role, TensorRecord, is_tuple_of, tensor_entry
from nitrous_ema.snapshots.names import INCOMPLETE_COPY, damaged, exclusion_hint, is_run_id, parse_folder_name

FORMAT_VERSION = 1
ALIGNMENT_BYTES = 4096  # of the data in the file: page cache, O_DIRECT

Lineage = tuple[tuple[str, int | None], ...]
"""Runs with the step at which each was left, oldest first; the last one has None."""

_OPENING = b'{"__metadata__":{"header_crc32":"'
_UNSIGNED = b"00000000"  # stands for the checksum while it is computed
_CRC_BEGIN = 8 + len(_OPENING)
_VERSION = re.compile(rb'","format_version":"([0-9]{1,9})"')
_REQUIRES = re.compile(rb',"requires":("(?:[^"\\]|\\.)*")')
# An unescaped quote cannot stand inside a JSON string, so the first match is where the layout begins.
_LAYOUT_OPENING = b',"layout_sha256":"'
_WIDEST_NUMBER = "-2.2250738585072014e-308"  # no repr of a float is longer, nor is that of any 64-bit integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """The fields in which snapshots of one run differ."""

    step: int
    """Number of update() calls so far, counted from 1."""
    t: int | float
    """Training time of the last applied update, in the run's own unit."""
    t_first: int | float
    """Training time of the first update, ``0 < t_first <= t``."""
    run: str
    """Id of the run that wrote the snapshot."""
    lineage: Lineage
    """Ancestors and the step at which each was left, oldest first; the run itself with None comes last."""
    rank: int = 0
    """Rank that wrote this file, ``0 <= rank < world_size``."""
    world_size: int = 1
    """Number of ranks, and of files of the snapshot."""
    offsets: tuple[tuple[int, ...], ...] | None = None
    """Of each record that has a part, in their order: index in the whole tensor at which the part begins. None if no
    record has a part."""
    trainer: Mapping[str, str | int | float] = field(default_factory=dict)
    """The process that wrote the snapshot: host, pid, process start time."""
    created_ns: int = field(default_factory=time.time_ns)
    """Wall clock, nanoseconds since 1970."""
    library_version: str = __version__
    """Version of this library that wrote the snapshot."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Optional fields of a newer library, as they stand in the file. They are not interpreted."""

    def __post_init__(self) -> None:
        for name, low, high in (("step", 1, 10**18), ("created_ns", 0, 2**63), ("world_size", 1, 10**9)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value < high:
                raise ValueError(f"{name} is {value!r}; expected an integer in [{low}, {high})")
        if type(self.rank) is not int or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank is {self.rank!r} of {self.world_size}; expected an integer in [0, {self.world_size})"
            )
        for name, time_ in (("t", self.t), ("t_first", self.t_first)):
            # The upper bound also excludes infinity; NaN fails both comparisons.
            if type(time_) not in (int, float) or not 0 < time_ < 2**63:
                raise ValueError(f"{name} is {time_!r}; expected a positive int or float below 2**63")
        if self.t_first > self.t:
            raise ValueError(f"t_first is {self.t_first!r}, after t = {self.t!r}")
        _check_lineage(self.run, self.lineage)
        check_encodable((self.library_version,))
        # Encoded and parsed again: a mapping that JSON changes (keys that are no texts, NaN) has no single encoding.
        restored = json.loads(json_bytes(dict(self.trainer)))
        if restored != self.trainer or not all(map(_is_scalar, self.trainer.values())):
            raise ValueError(f"trainer is {self.trainer!r}; expected a mapping of names to strings and numbers")


class ShortFile(ValueError):
    """A file is shorter than it states: its copy or its writing is not complete."""


# All other fields before the layout are optional fields of a newer version.
_KNOWN_FIELDS = {each.name for each in fields(Stamp)} | {
    "header_crc32",
    "format_version",
    "requires",
    "nonfinite",
    "crc32",
}

BOXES = "boxes"
"""Feature of files that have only parts of tensors."""
FEATURES = {BOXES: "1.0.0"}
"""What ``requires`` may name: features, with the first version of this library that reads them."""


class NonFinite(NamedTuple):
    """Values of one average that are not finite: NaN, or beyond the range of the type in which it is stored."""

    num_values: int
    """Number of these values in the section of the average."""
    record: int
    """Index in ``Layout.records`` of the first tensor that has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The decoded header of one file: enough to read any part of the file at its position."""

    layout: Layout
    stamp: Stamp
    crc32: tuple[int, ...]
    """CRC-32 of each chunk of the layout."""
    data_begin: int
    """Position in the file of the layout's position 0."""
    file_bytes: int
    """Size of the whole file."""
    nonfinite: tuple[NonFinite | None, ...] | None = None
    """For each average: its values that are not finite, or None. None for the whole field: the file has no record."""


def header_bytes(layout: Layout, stamp: Stamp) -> int:
    """Return the size of a header with its 8 length bytes and its padding: the position of the data in the file.

    The size depends on layout, offsets, lineage and trainer only, so that data can be written before its checksums are
    known.

    Raises:
        ValueError: The header would be larger than safetensors readers accept.
    """
    # Each number is counted as the longest possible number, so that no value changes the size (HEADER-1).
    widest = dict.fromkeys(("step", "t", "t_first", "rank", "world_size", "created_ns"), _WIDEST_NUMBER)
    lists_bytes = len(layout.chunks) * len("4294967295,") + len(layout.gammas) * len(
        "[9223372036854775807,4294967295],"
    )
    fixed_bytes = len(_opening_json(_stamp_metadata(layout, stamp, (), ()) | widest)) + len(layout.header_json)
    size_bytes = 8 + fixed_bytes + lists_bytes
    num_offsets = sum(map(len, stamp.offsets or ()))
    num_values = layout.num_values + num_offsets + len(layout.chunks) + 2 * len(layout.gammas)
    if size_bytes > MAX_HEADER_BYTES - ALIGNMENT_BYTES or num_values > MAX_HEADER_VALUES:
        raise ValueError(
            f"{len(layout.entries)} tensors in {len(layout.chunks)} chunks need a header of {size_bytes} bytes; "
            f"readers accept {MAX_HEADER_BYTES} bytes and {MAX_HEADER_VALUES} values. Track fewer tensors or profiles."
        )
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def encode_header(
    layout: Layout, stamp: Stamp, crc32: Sequence[int], nonfinite: Sequence[NonFinite | None] | None = None
) -> bytes:
    """Return all bytes of the file before the data.

    Args:
        layout: Positions of all tensors.
        stamp: The fields of this snapshot.
        crc32: CRC-32 of each of ``layout.chunks``.
        nonfinite: For each average its values that are not finite, or None; None for the whole if that is not known.

    Raises:
        ValueError: Not one checksum per chunk, parts outside of their tensors, or a header beyond what readers accept.
    """
    _check_offsets(layout, stamp.offsets)
    if len(crc32) != len(layout.chunks):
        raise ValueError(f"{len(crc32)} checksums; the layout has {len(layout.chunks)} chunks")
    size_bytes = header_bytes(layout, stamp)
    body = _opening_json(_stamp_metadata(layout, stamp, crc32, nonfinite)) + layout.header_json
    unsigned = (size_bytes - 8).to_bytes(8, "little") + body.ljust(size_bytes - 8)
    return unsigned[:_CRC_BEGIN] + b"%08x" % zlib.crc32(unsigned) + unsigned[_CRC_BEGIN + 8 :]


def header_end(prefix: bytes, *, path: Path, file_bytes: int) -> int:
    """Return the size of the header with its length bytes, checked before a buffer of this size is allocated.

    Args:
        prefix: The first 8 bytes of the file.
        path: The file, for messages.
        file_bytes: Size of the file.

    Raises:
        SnapshotDamaged: No header of this length fits in a file of this size.
    """
    try:
        return _header_end(prefix, file_bytes)
    except ValueError as error:
        raise damaged(path, f"invalid header: {error}") from error


def decode_header(blob: bytes, *, path: Path, file_bytes: int) -> Header:
    """Return the decoded header of a file, after checking all bytes before the data.

    Args:
        blob: The beginning of the file, with the whole header.
        path: The file, for messages.
        file_bytes: Size of the file.

    Raises:
        SnapshotDamaged: The bytes are not exactly a header of this library for a file of this size.
        SnapshotUnsupported: The header is intact, and needs a newer version of this library.
    """
    try:
        return _decode(blob, path, file_bytes)
    except KeyError as error:
        raise damaged(path, f"invalid header: field {brief(str(error))} is missing") from error
    except (ValueError, TypeError) as error:
        raise damaged(path, f"invalid header: {brief(str(error))}") from error


@functools.lru_cache(maxsize=16)
def _check_lineage(run: str, lineage: Lineage) -> None:
    if not is_run_id(run):
        raise ValueError(f"run is {run!r}; expected a run id from new_run_id()")
    if not is_tuple_of(lineage, tuple) or any(len(link) != 2 for link in lineage) or lineage[-1:] != ((run, None),):
        raise ValueError(f"lineage is {lineage!r}; expected pairs of run and step, ending with ({run!r}, None)")
    runs, steps = zip(*lineage, strict=True)
    if len(set(runs)) < len(runs) or not all(map(is_run_id, runs)):
        raise ValueError(f"lineage is {lineage!r}; expected a different run id in each pair")
    left_at = steps[:-1]
    if not is_tuple_of(left_at, int) or list(left_at) != sorted(left_at) or not all(step > 0 for step in left_at):
        raise ValueError(f"lineage is {lineage!r}; expected positive steps in ascending order")


def _header_end(prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < 8:
        raise ShortFile(f"the file has only {file_bytes} bytes. {INCOMPLETE_COPY}")
    end = 8 + int.from_bytes(prefix[:8], "little")
    if end > MAX_HEADER_BYTES or end % ALIGNMENT_BYTES:
        raise ValueError(
            f"its length is {end - 8} bytes; expected at most {MAX_HEADER_BYTES - 8}, "
            f"and 8 less than a multiple of {ALIGNMENT_BYTES}"
        )
    if end > file_bytes:
        raise ShortFile(f"its length is {end - 8} bytes, but the file has only {file_bytes}. {INCOMPLETE_COPY}")
    return end


def _decode(blob: bytes, path: Path, file_bytes: int) -> Header:
    end = _header_end(blob, file_bytes)
    blob = blob[:end]
    if len(blob) < end or not blob.startswith(_OPENING, 8):
        raise ValueError("it does not begin like a header written by nitrous_ema")
    crc_end = _CRC_BEGIN + 8
    # In three parts, of views: a copy of the header with zeros for its checksum would double the memory.
    crc32 = zlib.crc32(memoryview(blob)[crc_end:], zlib.crc32(_UNSIGNED, zlib.crc32(memoryview(blob)[:_CRC_BEGIN])))
    if blob[_CRC_BEGIN:crc_end] != b"%08x" % crc32:
        stored = reprlib.repr(blob[_CRC_BEGIN:crc_end])
        raise ValueError(f"checksum mismatch: its bytes have {crc32:08x}, its field header_crc32 has {stored}")
    _check_supported(blob, crc_end, path)
    text = blob.rstrip(b" ")
    split = text.find(_LAYOUT_OPENING)
    if split < 0:
        raise ValueError("it has no layout")
    layout = _decode_layout(text[split:])
    stamp, chunk_crcs, nonfinite = _decode_stamp(text[8:split], layout)
    # The metadata is compared as encoded with zeros for the checksum, whose right value was verified above.
    unsigned = text[8:_CRC_BEGIN] + _UNSIGNED + text[crc_end:split]
    encoded = _opening_json(_stamp_metadata(layout, stamp, chunk_crcs, nonfinite))
    if encoded != unsigned or len(chunk_crcs) != len(layout.chunks):
        raise ValueError("it is not in canonical form (duplicate, unexpected or missing values)")
    # The amount of padding is part of the one encoding too (HEADER-2). A newer library may have kept space for the
    # widest value of a field that this one does not know.
    expected = header_bytes(layout, stamp)
    if end < expected or (end > expected and not stamp.unknown):
        raise ValueError(f"it has {end} bytes, expected {expected} for its layout")
    if file_bytes != end + layout.data_bytes:
        found = f"the file has {file_bytes} bytes, expected {end + layout.data_bytes} for its layout"
        if file_bytes < end + layout.data_bytes:
            raise ShortFile(f"{found}. {INCOMPLETE_COPY}")
        raise ValueError(found)
    return Header(
        layout=layout, stamp=stamp, crc32=chunk_crcs, data_begin=end, file_bytes=file_bytes, nonfinite=nonfinite
    )


def _check_supported(blob: bytes, crc_end: int, path: Path) -> None:
    """Raise an error if a header, whose checksum is right, needs a newer version of this library."""
    # Checked with patterns, before any JSON is parsed: the JSON of another version may have another structure.
    version = _VERSION.match(blob, crc_end)
    if version is None:
        raise ValueError("it has no format version")
    if int(version[1]) != FORMAT_VERSION:
        raise _unsupported(path, (f"format version {int(version[1])}",), f"format version {int(version[1])}")
    if found := _REQUIRES.match(blob, version.end()):
        needed = parse_header_json(json.loads(found[1]))
        if type(needed) is not dict or not needed or not all(type(since) is str for since in needed.values()):
            raise ValueError("its field requires is not an object of features and versions")
        unknown = {name: since for name, since in needed.items() if name not in FEATURES}
        if unknown:
            features = (f"`{brief(name)}`, from nitrous_ema {brief(since)} on" for name, since in unknown.items())
            raise _unsupported(path, tuple(unknown), " and ".join(features))


def _unsupported(path: Path, requires: tuple[str, ...], features: str) -> SnapshotUnsupported:
    known = parse_folder_name(path.parent.name)
    or_exclude = f" {exclusion_hint(known[0])}" if known else ""
    return SnapshotUnsupported(
        f"{path} needs {features}; this is nitrous_ema {__version__}, which does not read it. The file "
        f"is intact: upgrade nitrous_ema.{or_exclude}",
        path=path,
        step=known[0] if known else None,
        requires=requires,
    )


# Snapshots of a run share these bytes: 2000 of them with 2000 tensors each list in seconds instead of a minute. Ranks
# with parts of equal shapes share them too.
@functools.lru_cache(maxsize=16)
def _decode_layout(header_json: bytes) -> Layout:
    text = b'{"__metadata__":{' + header_json[1:]
    metadata = _parse_part(text)[1]  # drops the entries of all tensors, which are large, before the layout is built
    layout = Layout(
        records=tuple(_record(*values) for values in parse_header_json(metadata["tensors"])),
        gammas=tuple(parse_header_json(metadata["gammas"])),
        sigma_rels=tuple(parse_header_json(metadata["sigma_rels"])),
        checkpoint_dtype=metadata["checkpoint_dtype"],
        chunk_bytes=int(metadata["chunk_bytes"]),
    )
    # One comparison covers all entries and the digest; a difference is looked for only to name it.
    if layout.header_json != header_json:
        header = _parse_part(text)[0]
        for name, dtype, shape, begin, end in layout.entries:
            expected = tensor_entry(dtype, shape, begin, end)
            if header.get(name) != expected:
                raise ValueError(
                    f"the entry of tensor {name!r} is {reprlib.repr(header.get(name))}, expected {expected}"
                )
        raise ValueError("it is not in canonical form, or lists tensors that its layout does not have")
    return layout


def _record(
    keys: list[str], dtype: str, role: Role, persistent: bool, shape: list[int], part: list[int] | None = None
) -> TensorRecord:
    return TensorRecord(
        name=keys[0] if keys else "",
        keys=tuple(keys),
        dtype=dtype,
        shape=tuple(shape),
        role=role,
        persistent=persistent,
        part=None if part is None else tuple(part),
    )


def _decode_stamp(
    opening_json: bytes, layout: Layout
) -> tuple[Stamp, tuple[int, ...], tuple[NonFinite | None, ...] | None]:
    """Return the stamp, the checksums of the chunks and the record of non-finite values: the JSON before the layout."""
    _, metadata = _parse_part(opening_json + b"}}")
    stamp = Stamp(
        step=int(metadata["step"]),
        t=parse_header_json(metadata["t"]),
        t_first=parse_header_json(metadata["t_first"]),
        run=metadata["run"],
        lineage=_decode_lineage(metadata["lineage"]),
        rank=int(metadata["rank"]),
        world_size=int(metadata["world_size"]),
        offsets=_decode_offsets(metadata["offsets"]) if "offsets" in metadata else None,
        trainer=parse_header_json(metadata["trainer"]),
        created_ns=int(metadata["created_ns"]),
        library_version=metadata["library_version"],
        unknown={name: text for name, text in metadata.items() if name not in _KNOWN_FIELDS},
    )
    _check_offsets(layout, stamp.offsets)
    crc32 = tuple(parse_header_json(metadata["crc32"]))
    if not is_tuple_of(crc32, int) or not all(0 <= value < 2**32 for value in crc32):
        raise ValueError("its field crc32 is not a list of 32-bit unsigned integers")
    return stamp, crc32, _decode_nonfinite(metadata["nonfinite"], layout) if "nonfinite" in metadata else None


# All snapshots of a run have the same lineage, which is long where training was resumed often. One object for all of
# them also saves their memory.
@functools.lru_cache(maxsize=16)
def _decode_lineage(text: str) -> Lineage:
    return tuple(tuple(link) for link in parse_header_json(text))


# One object for all snapshots of a rank: the offsets of thousands of tensors are large.
@functools.lru_cache(maxsize=16)
def _decode_offsets(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, parse_header_json(text)))


def _check_offsets(layout: Layout, offsets: tuple[tuple[int, ...], ...] | None) -> None:
    """Raise ValueError unless there is one offset for each part, inside of its tensor."""
    parts = [record for record in layout.records if record.part is not None]
    if (offsets is None) != (not parts) or (offsets is not None and len(offsets) != len(parts)):
        found = "no" if offsets is None else len(offsets)
        raise ValueError(f"{found} offsets; expected one for each of {len(parts)} tensors with a part")
    for record, offset in zip(parts, offsets or (), strict=True):
        part = record.part or ()
        if (
            not is_tuple_of(offset, int)
            or len(offset) != len(part)
            or not all(
                0 <= begin <= whole - size for begin, whole, size in zip(offset, record.shape, part, strict=True)
            )
        ):
            raise ValueError(
                f"the part of {record.name!r} begins at {reprlib.repr(offset)}; expected a position at which "
                f"{reprlib.repr(part)} fits into {reprlib.repr(record.shape)}"
            )


@functools.lru_cache(maxsize=16)
def _lineage_text(lineage: Lineage) -> str:
    return json_text(lineage)


def _decode_nonfinite(text: str, layout: Layout) -> tuple[NonFinite | None, ...]:
    averages = parse_header_json(text)
    if type(averages) is not list or len(averages) != len(layout.gammas):
        raise ValueError(f"its field nonfinite is not a list of {len(layout.gammas)} averages")
    found = tuple(each if each is None else NonFinite(*each) for each in averages)
    for each in filter(None, found):
        if (
            not is_tuple_of(tuple(each), int)
            or not 0 < each.num_values <= layout.average_elements
            or not 0 <= each.record < len(layout.records)
            or layout.records[each.record].role != "averaged"
        ):
            raise ValueError(f"its field nonfinite has {reprlib.repr(tuple(each))}, which no average can have")
    return found


def _stamp_metadata(
    layout: Layout, stamp: Stamp, crc32: Sequence[int], nonfinite: Sequence[NonFinite | None] | None
) -> dict[str, str]:
    requires = [BOXES] if layout.is_sharded else []
    # The order of these fields is part of the format: header_crc32 has a fixed position (HEADER-3).
    metadata = {
        "header_crc32": _UNSIGNED.decode(),
        "format_version": repr(FORMAT_VERSION),
        **({"requires": json_text({name: FEATURES[name] for name in requires})} if requires else {}),
        "library_version": stamp.library_version,
        "step": repr(stamp.step),
        "t": repr(stamp.t),
        "t_first": repr(stamp.t_first),
        "run": stamp.run,
        "lineage": _lineage_text(stamp.lineage),
        "rank": repr(stamp.rank),
        "world_size": repr(stamp.world_size),
        "created_ns": repr(stamp.created_ns),
        "trainer": json_text(dict(stamp.trainer)),
    }
    optional = dict(stamp.unknown)
    if nonfinite is not None:
        optional["nonfinite"] = json_text([each and list(each) for each in nonfinite])
    if stamp.offsets is not None:
        optional["offsets"] = json_text(stamp.offsets)
    return metadata | dict(sorted(optional.items())) | {"crc32": json_text(list(crc32))}


def _opening_json(metadata: dict[str, str]) -> bytes:
    """Return the beginning of a header's JSON, up to where ``Layout.header_json`` continues it."""
    return b'{"__metadata__":' + json_bytes(metadata)[:-1]


def _parse_part(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the object that is encoded here, and its ``__metadata__``."""
    header = parse_header_json(text)
    metadata = header["__metadata__"]
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its __metadata__ is not an object of strings")
    return header, metadata


def _is_scalar(value: object) -> bool:
    return type(value) in (str, int, float)
