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
import hashlib
import json
import math
import re
import reprlib
import secrets
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from nitrous_ema.errors import SnapshotDamaged
from nitrous_ema.snapshots.bounded_json import brief, parse_json

FORMAT_VERSION = 1
ALIGNMENT_BYTES = 4096  # of the data in the file: page cache, O_DIRECT
CHUNK_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_HEADER_VALUES = 2_000_000  # bounds what a hostile header makes of memory; some 50 000 tensors in four profiles
MAX_CHUNKS = 2**17
MAX_GAMMA = 1e9  # a billionth of the training time; products of some larger ones are no float64

DTYPE_BYTES: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes per element, by safetensors code."""

_FLOATING = frozenset(("F64", "F32", "F16", "BF16", "C64", "F8_E4M3", "F8_E5M2"))

CHECKPOINT_DTYPES = ("F32", "F64", "F16", "BF16")

Role = Literal["averaged", "copied", "skipped"]
Lineage = tuple[tuple[str, int | None], ...]

_RUN = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}-[0-9a-f]{8}")
_FOLDER = re.compile(rf"step-([0-9]{{12,18}})-({_RUN.pattern})")
_HIDDEN = re.compile(rf"\.trash-({_FOLDER.pattern})(?:\.[0-9a-f]{{8}})?")
_OLD_FILE = re.compile(r"(0|[1-9][0-9]{0,8})\.([1-9][0-9]{0,17})\.pt")  # one name for each profile and step
_RANK_FILE = re.compile(r"rank-([0-9]{5,9})-of-([0-9]{5,9})\.safetensors")
_OPENING = b'{"__metadata__":{"header_crc32":"'
_UNSIGNED = b"00000000"  # stands for the checksum while it is computed
_CRC_BEGIN = 8 + len(_OPENING)
_VERSION = re.compile(rb'","format_version":"([0-9]{1,9})"')
# An unescaped quote cannot stand inside a JSON string, so the first match is where the layout begins.
_LAYOUT_OPENING = b',"layout_sha256":"'
_WIDEST_NUMBER = "-2.2250738585072014e-308"  # no repr of a float is longer, nor that of any 64-bit integer


class Span(NamedTuple):
    """A half-open range."""

    begin: int
    end: int


class Entry(NamedTuple):
    """One tensor as a safetensors reader sees it. Offsets are in bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One tensor of the model, and what became of it."""

    name: str
    """Canonical name; the first of ``keys``."""
    keys: tuple[str, ...]
    """Every ``state_dict()`` key under which the model has this tensor; several if parameters are tied."""
    dtype: str
    """The model's own type, as a safetensors code; free text if the tensor is skipped."""
    shape: tuple[int, ...]
    """The model's own shape."""
    role: Role
    """``averaged`` tensors are in every profile's section, ``copied`` ones once, ``skipped`` ones nowhere."""
    persistent: bool = True
    """False for a buffer that ``state_dict()`` leaves out."""

    def __post_init__(self) -> None:
        if not _is_tuple_of(self.keys, str) or not self.keys or "" in self.keys or self.name != self.keys[0]:
            raise ValueError(f"keys of {self.name!r}: {self.keys!r}; expected its names, the first one being its own")
        _encodable(self.keys)
        if not _is_tuple_of(self.shape, int) or len(self.shape) > 64 or not all(0 <= n < 2**63 for n in self.shape):
            raise ValueError(
                f"shape of {self.name!r}: {reprlib.repr(self.shape)}; expected up to 64 sizes in [0, 2**63)"
            )
        if self.role not in get_args(Role) or type(self.persistent) is not bool:
            raise ValueError(f"{self.name!r} has role {self.role!r} and persistent={self.persistent!r}")
        if type(self.dtype) is not str or (self.role != "skipped" and self.dtype not in DTYPE_BYTES):
            raise ValueError(f"dtype of {self.name!r}: {self.dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
        if self.role == "averaged" and self.dtype not in _FLOATING:
            raise ValueError(
                f"{self.name!r} has dtype {self.dtype}; only floating tensors are averaged, copy it instead"
            )
        _encodable((self.dtype,))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file: complex numbers are pairs, along a last axis of their own."""
        return (*self.shape, 2) if self.dtype == "C64" else self.shape

    @property
    def stored_elements(self) -> int:
        """Numbers in the file; a complex one counts two."""
        return math.prod(self.stored_shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies in the data: what all snapshots of one run share.

    All positions are in bytes from the start of the data, unless said otherwise.
    """

    records: tuple[TensorRecord, ...]
    """All tensors of the model, in file order."""
    gammas: tuple[float, ...]
    """Exponents of the profiles, in the order of their sections."""
    sigma_rels: tuple[float, ...]
    """Relative widths of the same profiles."""
    checkpoint_dtype: str = "F32"
    """Type of the averages in the file, as a safetensors code."""
    chunk_bytes: int = CHUNK_BYTES
    """Size of the pieces that are checksummed; a power of two, so that no number lies across two of them."""

    def __post_init__(self) -> None:
        if self.checkpoint_dtype not in CHECKPOINT_DTYPES:
            expected = ", ".join(CHECKPOINT_DTYPES)
            raise ValueError(f"checkpoint_dtype is {self.checkpoint_dtype!r}; averages are stored as one of {expected}")
        if type(self.chunk_bytes) is not int or self.chunk_bytes < 16 or self.chunk_bytes & (self.chunk_bytes - 1):
            raise ValueError(f"chunk_bytes is {self.chunk_bytes!r}; expected a power of two, 16 or more")
        for name, numbers in (("gammas", self.gammas), ("sigma_rels", self.sigma_rels)):
            if not _is_tuple_of(numbers, float) or not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name} is {numbers!r}; expected a tuple of finite floats")
        if not all(-0.5 < gamma <= MAX_GAMMA for gamma in self.gammas):
            raise ValueError(f"gammas is {self.gammas!r}; expected exponents in (-0.5, {MAX_GAMMA:g}]")
        if not self.gammas or len(self.gammas) != len(self.sigma_rels):
            raise ValueError(
                f"{len(self.gammas)} gammas and {len(self.sigma_rels)} sigma_rels; expected one each per profile"
            )
        if not _is_tuple_of(self.records, TensorRecord):
            raise TypeError("records: expected a tuple of TensorRecord")
        seen: set[str] = set()
        for key in (key for record in self.records for key in record.keys):
            if key in seen:
                raise ValueError(f"{key!r} names two tensors; expected every key once")
            seen.add(key)
        num_chunks = sum(-(-(end - begin) // self.chunk_bytes) for begin, end in self.sections)
        if num_chunks > MAX_CHUNKS or self.data_bytes >= 2**63:
            raise ValueError(
                f"{self.data_bytes} bytes of data in chunks of {self.chunk_bytes}: more than {MAX_CHUNKS} chunks"
            )

    @functools.cached_property
    def averaged(self) -> tuple[TensorRecord, ...]:
        """Averaged tensors, in file order."""
        return tuple(record for record in self.records if record.role == "averaged")

    @functools.cached_property
    def average_spans(self) -> tuple[Span, ...]:
        """For each of ``averaged``: its range in a profile's section, in *elements*."""
        return _back_to_back(record.stored_elements for record in self.averaged)

    @functools.cached_property
    def average_elements(self) -> int:
        """Elements of one profile; complex tensors count two for each of theirs."""
        return self.average_spans[-1].end if self.average_spans else 0

    @functools.cached_property
    def copied(self) -> tuple[TensorRecord, ...]:
        """Copied tensors as they lie in their section: largest elements first, which aligns all of them."""
        copied = (record for record in self.records if record.role == "copied")
        return tuple(sorted(copied, key=lambda record: -_copied_item_bytes(record)))

    @functools.cached_property
    def copied_spans(self) -> tuple[Span, ...]:
        """For each of ``copied``: its range in the data."""
        first = self.sections[-1].begin + self.padding_bytes if self.copied else 0
        return _back_to_back((record.stored_elements * _copied_item_bytes(record) for record in self.copied), first)

    @functools.cached_property
    def padding_bytes(self) -> int:
        """Zeros at the start of the section of copied tensors, to align its first one; fewer than 8.

        They are a tensor of their own (``padding``), since safetensors files have no holes. Without them torch could
        not view what a reader has loaded: it wants a tensor's offset to be a multiple of its element size.
        """
        return -self._profiles_end % _copied_item_bytes(self.copied[0]) if self.copied else 0

    @functools.cached_property
    def sections(self) -> tuple[Span, ...]:
        """One range per profile, then one for the copied tensors if there are any."""
        profile_bytes = self.average_elements * DTYPE_BYTES[self.checkpoint_dtype]
        sections = _back_to_back([profile_bytes] * len(self.gammas))
        if not self.copied:
            return sections
        copied_bytes = sum(record.stored_elements * _copied_item_bytes(record) for record in self.copied)
        return (*sections, Span(self._profiles_end, self._profiles_end + self.padding_bytes + copied_bytes))

    @functools.cached_property
    def chunks(self) -> tuple[Span, ...]:
        """What is checksummed, copied and written at a time; covers the data without gaps."""
        return tuple(
            Span(begin, min(begin + self.chunk_bytes, section.end))
            for section in self.sections
            for begin in range(section.begin, section.end, self.chunk_bytes)
        )

    @functools.cached_property
    def data_bytes(self) -> int:
        """Size of the data: of the file without its header."""
        return self.sections[-1].end

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Tensors as a safetensors reader sees them, in the order of their bytes."""
        item_bytes = DTYPE_BYTES[self.checkpoint_dtype]
        entries = [
            Entry(
                f"ema{profile}.{record.name}",
                self.checkpoint_dtype,
                record.stored_shape,
                section.begin + span.begin * item_bytes,
                section.begin + span.end * item_bytes,
            )
            for profile, section in zip(range(len(self.gammas)), self.sections, strict=False)
            for record, span in zip(self.averaged, self.average_spans, strict=True)
        ]
        if self.padding_bytes:
            entries.append(
                Entry("padding", "U8", (self.padding_bytes,), self._profiles_end, self.copied_spans[0].begin)
            )
        for record, span in zip(self.copied, self.copied_spans, strict=True):
            entries.append(Entry(f"model.{record.name}", _copied_dtype(record), record.stored_shape, *span))
        return tuple(entries)

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of tensors, profiles, type and chunk size: equal for snapshots that can be summed."""
        return hashlib.sha256(as_json(self._facts)).hexdigest()

    @functools.cached_property
    def header_json(self) -> bytes:
        """The part of a header that all snapshots with this layout share: from the comma before it to the end."""
        facts = as_json({"layout_sha256": self.sha256, **self._facts})
        entries = (
            entry_json(name, described(dtype, shape, begin, end)) for name, dtype, shape, begin, end in self.entries
        )
        return b"".join((b",", facts[1:], *entries, b"}"))

    @functools.cached_property
    def num_values(self) -> int:
        """Upper bound of the JSON values in ``header_json``."""
        return self.header_json.count(b",")

    @functools.cached_property
    def _profiles_end(self) -> int:
        return self.average_elements * DTYPE_BYTES[self.checkpoint_dtype] * len(self.gammas)

    @functools.cached_property
    def _facts(self) -> dict[str, str]:
        records = [(r.keys, r.dtype, r.role, r.persistent, r.shape) for r in self.records]
        return {
            "gammas": _text(self.gammas),
            "sigma_rels": _text(self.sigma_rels),
            "checkpoint_dtype": self.checkpoint_dtype,
            "chunk_bytes": repr(self.chunk_bytes),
            "tensors": _text(records),
        }


def library_version() -> str:
    """Version of this library, as it goes into files."""
    from nitrous_ema import __version__  # the package itself, which imports nothing

    return __version__


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
    library_version: str = field(default_factory=library_version)
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
            expected = described(dtype, shape, begin, end)
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


def new_run_id(now: datetime | None = None) -> str:
    """Draw the name of a run: when it started, and 8 random digits. Sorts by time; safe in file names.

    Args:
        now: Start of the run, with its time zone; the present moment by default.
    """
    started = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    return f"{started:%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}"


def folder_name(step: int, run: str) -> str:
    """Name of a snapshot's folder."""
    return f"step-{step:012d}-{run}"


def parse_folder_name(name: str) -> tuple[int, str] | None:
    """Step and run of a snapshot's folder; None for any other name."""
    found = _FOLDER.fullmatch(name)
    return (int(found[1]), found[2]) if found and folder_name(int(found[1]), found[2]) == name else None


def hidden_name(name: str) -> str:
    """Name of a snapshot's folder that no listing shows any more."""
    return f".trash-{name}"


def parse_hidden_name(name: str) -> tuple[int, str] | None:
    """Step and run of a hidden snapshot's folder, also one that is being removed; None for any other name."""
    found = _HIDDEN.fullmatch(name)
    return parse_folder_name(found[1]) if found else None


def places(path: Path) -> tuple[Path, ...]:
    """Where to look for a file, in this order: a snapshot's may have been hidden since, or hidden and brought back."""
    if parse_folder_name(path.parent.name) is None:
        return (path,)
    return path, path.parent.with_name(hidden_name(path.parent.name)) / path.name, path


def rank_file_name(rank: int, world_size: int) -> str:
    """Name of one rank's file in the folder."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def parse_rank_file_name(name: str) -> tuple[int, int] | None:
    """Rank and world size of a final file name; None for any other name."""
    found = _RANK_FILE.fullmatch(name)
    if not found or rank_file_name(int(found[1]), int(found[2])) != name or int(found[1]) >= int(found[2]):
        return None
    return int(found[1]), int(found[2])


def parse_old_file_name(name: str) -> tuple[int, int] | None:
    """Profile and step of a file of nitrous-ema 0.0.1 or ema-pytorch, by its name; None for any other name."""
    found = _OLD_FILE.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def damaged(path: Path, what: str, *, chunk: int | None = None) -> SnapshotDamaged:
    """The error for a file that does not hold what was written, with the way to go on without it.

    Args:
        path: The file, under its final name.
        what: What was found, and what was expected.
        chunk: Index of the chunk with the wrong checksum, if it is that.
    """
    known = parse_folder_name(path.parent.name)
    step = known[0] if known else None
    remedy = f" Leave this snapshot out with exclude=[{step}] (on the command line: --exclude {step})." if known else ""
    where = "" if chunk is None else f"chunk {chunk}: "
    return SnapshotDamaged(f"{path} is damaged: {where}{what}.{remedy}", path=path, step=step, chunk=chunk)


def _copied_dtype(record: TensorRecord) -> str:
    # Complex numbers as pairs here too: older safetensors packages have no complex type.
    return "F32" if record.dtype == "C64" else record.dtype


def _copied_item_bytes(record: TensorRecord) -> int:
    return DTYPE_BYTES[_copied_dtype(record)]


def _back_to_back(sizes: Iterable[int], begin: int = 0) -> tuple[Span, ...]:
    spans = []
    for size in sizes:
        spans.append(Span(begin, begin + size))
        begin += size
    return tuple(spans)


def described(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """What a safetensors header says of a tensor."""
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]}


def entry_json(name: str, description: dict[str, Any]) -> bytes:
    """A tensor in a safetensors header, from the comma before it on. One by one: thousands of dicts are large."""
    return b",%b:%b" % (as_json(name), as_json(description))


def as_json(value: Any) -> bytes:
    """JSON as it stands in headers."""
    return _text(value).encode()


_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _parse_part(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The object that this JSON is, and its metadata."""
    header = parse_json(text, max_values=MAX_HEADER_VALUES)
    facts = header["__metadata__"]
    if type(facts) is not dict or not all(type(fact) is str for fact in facts.values()):
        raise ValueError("its metadata are not texts by name")
    return header, facts


def _parse(text: str) -> Any:
    return parse_json(text, max_values=MAX_HEADER_VALUES)  # counted again: the outer text may escape its commas


def _is_tuple_of(values: object, kind: type) -> bool:
    return type(values) is tuple and all(type(value) is kind for value in values)


def _is_scalar(value: object) -> bool:
    return type(value) in (str, int, float)


def _encodable(texts: Iterable[str]) -> None:
    for text in texts:
        if type(text) is not str:
            raise TypeError(f"found {text!r} where a text belongs")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{text!r} is not valid Unicode and cannot be written") from None
