"""The bytes of a snapshot file: one rank's part of all averages at one step, readable by any safetensors reader.

byte 0        8 bytes, little-endian: length of the header
byte 8        header: JSON, filled up with spaces. ``__metadata__`` comes first: what is particular to this snapshot
              (stamp, checksums), then what all snapshots of a run share (layout), then the tensors' entries
data_begin    a multiple of 4096. One section per profile, its tensors back to back in file order, then the section of
              the copied tensors. Each section is cut anew into chunks of ``chunk_bytes``, each with its CRC-32

F1  A header's size is known before anything in it is: it depends     test_header_size_is_known_before_its_numbers_are
    on layout, lineage and trainer only. So data is written first.
F2  There is one byte string for each (layout, stamp, checksums).     test_header_of_version_1_has_exactly_these_bytes
    Reading encodes again what it understood and compares:
    overlapping offsets, duplicate names, foreign fields cannot pass.
F3  ``header_crc32`` stands at a fixed place and covers every byte    test_flipped_bit_anywhere_in_a_header_is_damage
    before the data; it is checked before any field is believed.
F4  Reading raises SnapshotDamaged for any bytes whatever, and        test_forged_header_is_damage_and_nothing_else
    holds a small multiple of the file's own header in memory.

Longer than the house's 300 lines because writing and reading one header belong on one page.
"""

from __future__ import annotations

import functools
import json
import re
import reprlib
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitrous_ema._version import __version__
from nitrous_ema.snapshots.bounded_json import (
    MAX_HEADER_BYTES,
    MAX_HEADER_VALUES,
    _parse,
    _text,
    as_json,
    brief,
    parse_json,
)
from nitrous_ema.snapshots.layout import Layout, Role, TensorRecord, _encodable, _is_tuple_of, tensor_entry
from nitrous_ema.snapshots.names import _RUN, damaged

FORMAT_VERSION = 1
ALIGNMENT_BYTES = 4096  # of the data in the file: page cache, O_DIRECT


Lineage = tuple[tuple[str, int | None], ...]

_OPENING = b'{"__metadata__":{"header_crc32":"'
_UNSIGNED = b"00000000"  # stands for the checksum while it is computed
_CRC_BEGIN = 8 + len(_OPENING)
_VERSION = re.compile(rb'","format_version":"([0-9]{1,9})"')
# An unescaped quote cannot stand inside a JSON string, so the first match is where the layout begins.
_LAYOUT_OPENING = b',"layout_sha256":"'
_WIDEST_NUMBER = "-2.2250738585072014e-308"  # no repr of a float is longer, nor that of any 64-bit integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What is particular to one snapshot."""

    step: int
    """Number of update() calls so far, counted from 1."""
    t: int | float
    """Training time of the last applied update, in the run's own unit."""
    t_first: int | float
    """Training time of the first update, ``0 < t_first <= t``."""
    run: str
    """Run that wrote it."""
    lineage: Lineage
    """Ancestors and the step at which each was left, oldest first; the run itself with None comes last."""
    rank: int = 0
    """Which of the files of this snapshot."""
    world_size: int = 1
    """How many files the snapshot has."""
    trainer: Mapping[str, str | int | float] = field(default_factory=dict)
    """The process that wrote it: host, pid, process start time."""
    created_ns: int = field(default_factory=time.time_ns)
    """Wall clock, nanoseconds since 1970."""
    library_version: str = __version__
    """Version of this library that wrote it."""

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
            if type(time_) not in (int, float) or not 0 < time_ < 2**63:
                raise ValueError(f"{name} is {time_!r}; expected a positive int or float below 2**63")
        if self.t_first > self.t:
            raise ValueError(f"t_first is {self.t_first!r}, after t = {self.t!r}")
        _check_lineage(self.run, self.lineage)
        _encodable((self.library_version,))
        if json.loads(as_json(dict(self.trainer))) != self.trainer or not all(map(_is_scalar, self.trainer.values())):
            raise ValueError(f"trainer is {self.trainer!r}; expected texts and numbers by name")


def _check_lineage(run: str, lineage: Lineage) -> None:
    if type(run) is not str or not _RUN.fullmatch(run):
        raise ValueError(f"run is {run!r}; expected one from new_run_id()")
    if not _is_tuple_of(lineage, tuple) or any(len(link) != 2 for link in lineage) or lineage[-1:] != ((run, None),):
        raise ValueError(f"lineage is {lineage!r}; expected pairs of run and step, the last one being ({run!r}, None)")
    runs, steps = zip(*lineage, strict=True)
    if len(set(runs)) < len(runs) or not all(type(name) is str and _RUN.fullmatch(name) for name in runs):
        raise ValueError(f"lineage is {lineage!r}; expected a different run id in each pair")
    if (
        not _is_tuple_of(steps[:-1], int)
        or list(steps[:-1]) != sorted(steps[:-1])
        or not all(s > 0 for s in steps[:-1])
    ):
        raise ValueError(f"lineage is {lineage!r}; expected the steps to be positive and not to decrease")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """All that one file says about itself; enough to read any part of it at its position."""

    layout: Layout
    stamp: Stamp
    crc32: tuple[int, ...]
    """One per chunk of the layout."""
    data_begin: int
    """Position in the file of the layout's position 0."""
    file_bytes: int
    """Size of the whole file."""


def header_bytes(layout: Layout, stamp: Stamp) -> int:
    """Size of the header with its 8 length bytes and its padding: where the data begins in the file.

    Depends on layout, lineage and trainer only, so that data can be written before its checksums are known.

    Raises:
        ValueError: The header would be larger than safetensors readers accept.
    """
    widest = dict.fromkeys(("step", "t", "t_first", "rank", "world_size", "created_ns"), _WIDEST_NUMBER)
    checksums_bytes = len(layout.chunks) * len("4294967295,")
    fixed_bytes = len(_particular_json(_particulars(stamp, ()) | widest)) + len(layout.header_json)
    size_bytes = 8 + fixed_bytes + checksums_bytes
    if size_bytes > MAX_HEADER_BYTES - ALIGNMENT_BYTES or layout.num_values + len(layout.chunks) > MAX_HEADER_VALUES:
        raise ValueError(
            f"{len(layout.entries)} tensors in {len(layout.chunks)} chunks need a header of {size_bytes} bytes; "
            f"readers accept {MAX_HEADER_BYTES} bytes and {MAX_HEADER_VALUES} values. Track fewer tensors or profiles."
        )
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def encode_header(layout: Layout, stamp: Stamp, crc32: Sequence[int]) -> bytes:
    """All bytes before the data.

    Args:
        layout: Where everything lies.
        stamp: What is particular to this snapshot.
        crc32: CRC-32 of each of ``layout.chunks``.

    Raises:
        ValueError: Not one checksum per chunk, or a header beyond what readers accept.
    """
    if len(crc32) != len(layout.chunks):
        raise ValueError(f"{len(crc32)} checksums; the layout has {len(layout.chunks)} chunks")
    size_bytes = header_bytes(layout, stamp)
    body = _particular_json(_particulars(stamp, crc32)) + layout.header_json
    unsigned = (size_bytes - 8).to_bytes(8, "little") + body.ljust(size_bytes - 8)
    return unsigned[:_CRC_BEGIN] + b"%08x" % zlib.crc32(unsigned) + unsigned[_CRC_BEGIN + 8 :]


def header_end(prefix: bytes, *, path: Path, file_bytes: int) -> int:
    """Size of the header with its length bytes, judged before it is read.

    Args:
        prefix: The first 8 bytes of the file.
        path: The file, for messages.
        file_bytes: Its size.

    Raises:
        SnapshotDamaged: No such header can be in such a file.
    """
    try:
        return _header_end(prefix, file_bytes)
    except ValueError as error:
        raise damaged(path, f"its header cannot be read: {error}") from error


def decode_header(blob: bytes, *, path: Path, file_bytes: int) -> Header:
    """Understand all bytes before the data, and believe none of them unchecked.

    Args:
        blob: The beginning of the file, with the whole header.
        path: The file, for messages.
        file_bytes: Its size.

    Raises:
        SnapshotDamaged: The bytes are not exactly a header of this library for a file of this size.
    """
    try:
        return _decode(blob, file_bytes)
    except KeyError as error:
        raise damaged(path, f"its header cannot be believed: {brief(str(error))} is missing") from error
    except (ValueError, TypeError) as error:
        raise damaged(path, f"its header cannot be believed: {brief(str(error))}") from error


def _header_end(prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < 8:
        raise ValueError(f"the file has only {file_bytes} bytes")
    end = 8 + int.from_bytes(prefix[:8], "little")
    if end > MAX_HEADER_BYTES or end % ALIGNMENT_BYTES:
        raise ValueError(f"its length is given as {end - 8} bytes, which is no length that is ever written")
    if end > file_bytes:
        raise ValueError(f"its length is given as {end - 8} bytes, but the file has only {file_bytes}")
    return end


def _decode(blob: bytes, file_bytes: int) -> Header:
    end = _header_end(blob, file_bytes)
    blob = blob[:end]
    if len(blob) < end or not blob.startswith(_OPENING, 8):
        raise ValueError("it is not one that nitrous_ema writes")
    crc_end = _CRC_BEGIN + 8
    crc32 = zlib.crc32(memoryview(blob)[crc_end:], zlib.crc32(_UNSIGNED, zlib.crc32(memoryview(blob)[:_CRC_BEGIN])))
    if blob[_CRC_BEGIN:crc_end] != b"%08x" % crc32:
        raise ValueError(f"its checksum is {crc32:08x}, not {reprlib.repr(blob[_CRC_BEGIN:crc_end])} as it says")
    version = _VERSION.match(blob, crc_end)
    if version is None or int(version[1]) != FORMAT_VERSION:
        found = version[1].decode() if version else "none"
        raise ValueError(
            f"format version {found}; this library reads version {FORMAT_VERSION}, a newer one may read it"
        )
    text = blob.rstrip(b" ")
    split = text.find(_LAYOUT_OPENING)
    if split < 0:
        raise ValueError("it has no layout")
    layout = _decode_layout(text[split:])
    stamp, chunk_crcs = _decode_particulars(text[8:split])
    unsigned = text[8:_CRC_BEGIN] + _UNSIGNED + text[crc_end:split]
    if _particular_json(_particulars(stamp, chunk_crcs)) != unsigned or len(chunk_crcs) != len(layout.chunks):
        raise ValueError("it says something twice, or in other words than this library does")
    if end != header_bytes(layout, stamp):
        raise ValueError(f"it has {end} bytes, but for this layout {header_bytes(layout, stamp)} are written")
    if file_bytes != end + layout.data_bytes:
        raise ValueError(f"it describes a file of {end + layout.data_bytes} bytes, this one has {file_bytes}")
    return Header(layout=layout, stamp=stamp, crc32=chunk_crcs, data_begin=end, file_bytes=file_bytes)


# Snapshots of a run share these bytes: 2000 of them with 2000 tensors each list in seconds instead of a minute.
@functools.lru_cache(maxsize=4)
def _decode_layout(header_json: bytes) -> Layout:
    text = b'{"__metadata__":{' + header_json[1:]
    facts = _parse_part(text)[1]  # the entries of all tensors go at once: they are large
    layout = Layout(
        records=tuple(_record(*described) for described in _parse(facts["tensors"])),
        gammas=tuple(_parse(facts["gammas"])),
        sigma_rels=tuple(_parse(facts["sigma_rels"])),
        checkpoint_dtype=facts["checkpoint_dtype"],
        chunk_bytes=int(facts["chunk_bytes"]),
    )
    if layout.header_json != header_json:
        header = _parse_part(text)[0]
        for name, dtype, shape, begin, end in layout.entries:
            expected = tensor_entry(dtype, shape, begin, end)
            if header.get(name) != expected:
                raise ValueError(f"tensor {name!r} is {reprlib.repr(header.get(name))}, expected {expected}")
        raise ValueError("it does not list exactly the tensors that its layout has")
    return layout


def _record(keys: list[str], dtype: str, role: Role, persistent: bool, shape: list[int]) -> TensorRecord:
    name = keys[0] if keys else ""
    return TensorRecord(name=name, keys=tuple(keys), dtype=dtype, shape=tuple(shape), role=role, persistent=persistent)


def _decode_particulars(json_begin: bytes) -> tuple[Stamp, tuple[int, ...]]:
    _, facts = _parse_part(json_begin + b"}}")
    stamp = Stamp(
        step=int(facts["step"]),
        t=_parse(facts["t"]),
        t_first=_parse(facts["t_first"]),
        run=facts["run"],
        lineage=tuple(tuple(link) for link in _parse(facts["lineage"])),
        rank=int(facts["rank"]),
        world_size=int(facts["world_size"]),
        trainer=_parse(facts["trainer"]),
        created_ns=int(facts["created_ns"]),
        library_version=facts["library_version"],
    )
    crc32 = tuple(_parse(facts["crc32"]))
    if not _is_tuple_of(crc32, int) or not all(0 <= value < 2**32 for value in crc32):
        raise ValueError("its checksums are not 32-bit numbers")
    return stamp, crc32


def _particulars(stamp: Stamp, crc32: Sequence[int]) -> dict[str, str]:
    return {
        "header_crc32": _UNSIGNED.decode(),
        "format_version": repr(FORMAT_VERSION),
        "library_version": stamp.library_version,
        "step": repr(stamp.step),
        "t": repr(stamp.t),
        "t_first": repr(stamp.t_first),
        "run": stamp.run,
        "lineage": _text(stamp.lineage),
        "rank": repr(stamp.rank),
        "world_size": repr(stamp.world_size),
        "created_ns": repr(stamp.created_ns),
        "trainer": _text(dict(stamp.trainer)),
        "crc32": _text(list(crc32)),
    }


def _particular_json(facts: dict[str, str]) -> bytes:
    return b'{"__metadata__":' + as_json(facts)[:-1]


def _parse_part(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The object that this JSON is, and its metadata."""
    header = parse_json(text, max_values=MAX_HEADER_VALUES)
    facts = header["__metadata__"]
    if type(facts) is not dict or not all(type(fact) is str for fact in facts.values()):
        raise ValueError("its metadata are not texts by name")
    return header, facts


def _is_scalar(value: object) -> bool:
    return type(value) in (str, int, float)
