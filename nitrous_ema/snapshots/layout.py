"""Where every tensor lies in the data of a snapshot file.

The data is one section per profile, with all averaged tensors in file order, followed by one section with the copied
tensors. A ``Layout`` computes every position from the list of tensors, the profiles, the stored type and the chunk
size. All snapshots of a run share one layout, and only snapshots with equal tensors can be summed.

Layouts are also built from headers of untrusted files. Each constructor therefore checks types, ranges and sizes before
anything is computed from them, so that a decoded layout needs no second check.

Longer than 300 lines because every field is checked where it is defined.
"""

from __future__ import annotations

import functools
import hashlib
import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from nitrous_ema._base.dtypes import AVERAGEABLE, DTYPE_BYTES, STORED_DTYPES
from nitrous_ema.snapshots.bounded_json import check_encodable, json_bytes, json_text

CHUNK_BYTES = 16 * 2**20
"""Chunk size where one rank writes."""
PART_CHUNK_BYTES = 2**20
"""Chunk size where several ranks write: readers of parts must read whole chunks to verify them."""
MAX_CHUNKS = 2**17  # 2 TiB of data in chunks of CHUNK_BYTES
MAX_GAMMA = 1e9  # a length of a billionth of the training time; products of some larger gammas overflow float64

Role = Literal["averaged", "copied", "skipped"]


class Span(NamedTuple):
    """A half-open range."""

    begin: int
    end: int


class Entry(NamedTuple):
    """One tensor as a safetensors reader sees it, with offsets in bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One tensor of the model, and its role in the snapshot."""

    name: str
    """Canonical name; the first of ``keys``."""
    keys: tuple[str, ...]
    """Every ``state_dict()`` key under which the model has this tensor; several if parameters are tied."""
    dtype: str
    """The model's own type, as a safetensors code; free text if the tensor is skipped."""
    shape: tuple[int, ...]
    """The model's own shape: of the whole tensor."""
    role: Role
    """``averaged`` tensors are in every profile's section, ``copied`` ones once, ``skipped`` ones nowhere."""
    persistent: bool = True
    """False for a buffer that ``state_dict()`` leaves out."""
    part: tuple[int, ...] | None = None
    """Shape of the part that this file has of the tensor; None if the file has all of it."""

    def __post_init__(self) -> None:
        if not is_tuple_of(self.keys, str) or not self.keys or "" in self.keys or self.name != self.keys[0]:
            raise ValueError(f"keys of {self.name!r} are {self.keys!r}; expected its keys, starting with its name")
        check_encodable(self.keys)
        # At most 64 sizes below 2**63: products of sizes from a hostile header stay small integers.
        if not is_tuple_of(self.shape, int) or len(self.shape) > 64 or not all(0 <= n < 2**63 for n in self.shape):
            raise ValueError(
                f"shape of {self.name!r} is {reprlib.repr(self.shape)}; expected up to 64 sizes in [0, 2**63)"
            )
        if self.role not in get_args(Role) or type(self.persistent) is not bool:
            raise ValueError(
                f"{self.name!r} has role {self.role!r} and persistent={self.persistent!r}; expected one of "
                f"{', '.join(get_args(Role))}, and True or False"
            )
        if type(self.dtype) is not str or (self.role != "skipped" and self.dtype not in DTYPE_BYTES):
            raise ValueError(f"dtype of {self.name!r} is {self.dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
        if self.role == "averaged" and self.dtype not in AVERAGEABLE:
            raise ValueError(
                f"{self.name!r} has dtype {self.dtype}; only floating-point tensors are averaged, use role 'copied'"
            )
        check_encodable((self.dtype,))
        # A part as large as the tensor would be a second encoding of None (HEADER-2).
        if self.part is not None and (
            not is_tuple_of(self.part, int)
            or len(self.part) != len(self.shape)
            or not all(0 <= part <= whole for part, whole in zip(self.part, self.shape, strict=True))
            or self.part == self.shape
        ):
            raise ValueError(
                f"part of {self.name!r} is {reprlib.repr(self.part)}; expected a smaller shape than "
                f"{reprlib.repr(self.shape)}, or None"
            )

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file: complex numbers are pairs, along a last axis of their own."""
        shape = self.shape if self.part is None else self.part
        return (*shape, 2) if self.dtype == "C64" else shape

    @property
    def stored_elements(self) -> int:
        """Numbers in the file; a complex number counts two."""
        return math.prod(self.stored_shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Positions of all tensors in the data, shared by all snapshots of one run.

    Positions are in bytes from the start of the data, unless their docstring names another unit.
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
    """Bytes per checksum; a power of two, so that no number of an average lies across two chunks."""

    def __post_init__(self) -> None:
        if self.checkpoint_dtype not in STORED_DTYPES:
            expected = ", ".join(STORED_DTYPES)
            raise ValueError(f"checkpoint_dtype is {self.checkpoint_dtype!r}; averages are stored as one of {expected}")
        if type(self.chunk_bytes) is not int or self.chunk_bytes < 16 or self.chunk_bytes & (self.chunk_bytes - 1):
            raise ValueError(f"chunk_bytes is {self.chunk_bytes!r}; expected a power of two, 16 or more")
        for name, numbers in (("gammas", self.gammas), ("sigma_rels", self.sigma_rels)):
            if not is_tuple_of(numbers, float) or not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name} is {numbers!r}; expected a tuple of finite floats")
        # The square of a profile with an exponent of -0.5 or less has no finite integral (profile.py).
        if not all(-0.5 < gamma <= MAX_GAMMA for gamma in self.gammas):
            raise ValueError(f"gammas is {self.gammas!r}; expected exponents in (-0.5, {MAX_GAMMA:g}]")
        if not self.gammas or len(self.gammas) != len(self.sigma_rels):
            raise ValueError(
                f"{len(self.gammas)} gammas and {len(self.sigma_rels)} sigma_rels; expected one of each per profile"
            )
        if not is_tuple_of(self.records, TensorRecord):
            raise TypeError("records: expected a tuple of TensorRecord")
        seen: set[str] = set()
        for key in (key for record in self.records for key in record.keys):
            if key in seen:
                raise ValueError(f"{key!r} is a key of two tensors; expected every key once")
            seen.add(key)
        # Counted without listing them: the sizes in a hostile header may amount to 2**60 chunks.
        num_chunks = sum(-(-(end - begin) // self.chunk_bytes) for begin, end in self.sections)
        if num_chunks > MAX_CHUNKS or self.data_bytes >= 2**63:
            raise ValueError(
                f"{self.data_bytes} bytes of data are more than {MAX_CHUNKS} chunks of {self.chunk_bytes} bytes"
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
        """Elements of one profile; each element of a complex tensor counts two."""
        return self.average_spans[-1].end if self.average_spans else 0

    @functools.cached_property
    def copied(self) -> tuple[TensorRecord, ...]:
        """Copied tensors in the order of their section: largest elements first, which aligns all of them."""
        # sorted() is stable, so that tensors with elements of one size stay in file order.
        copied = (record for record in self.records if record.role == "copied")
        return tuple(sorted(copied, key=lambda record: -_copied_item_bytes(record)))

    @functools.cached_property
    def copied_spans(self) -> tuple[Span, ...]:
        """For each of ``copied``: its range in the data."""
        first = self.sections[-1].begin + self.padding_bytes if self.copied else 0
        return _back_to_back((record.stored_elements * _copied_item_bytes(record) for record in self.copied), first)

    @functools.cached_property
    def copied_places(self) -> dict[str, Span]:
        """For each of ``copied``, by name: its range in bytes, from the start of the section of copied tensors."""
        begin = self.sections[-1].begin
        return {
            record.name: Span(span.begin - begin, span.end - begin)
            for record, span in zip(self.copied, self.copied_spans, strict=True)
        }

    @functools.cached_property
    def padding_bytes(self) -> int:
        """Zeros at the start of the section of copied tensors, to align its first tensor; fewer than 8.

        The zeros are a tensor of their own (``padding``), because safetensors files must not have holes. Without them,
        torch could not view the loaded bytes: it requires that a tensor's offset is a multiple of its element size.
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
        """Ranges that are checksummed, copied and written one at a time; they cover the data without gaps."""
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
            for profile, section in zip(range(len(self.gammas)), self.sections, strict=False)  # without the copied ones
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
    def is_sharded(self) -> bool:
        """Whether the file has only a part of some tensor."""
        return any(record.part is not None for record in self.records)

    @functools.cached_property
    def whole(self) -> Layout:
        """The layout of the same tensors in one file."""
        if not self.is_sharded:
            return self
        return replace(self, records=tuple(replace(record, part=None) for record in self.records))

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of tensors, profiles and stored type: equal for the snapshots of one run, on any number of ranks.

        The chunk size is left out, because it only concerns how the bytes are checked.
        """
        metadata = {name: value for name, value in self.whole._metadata.items() if name != "chunk_bytes"}
        return hashlib.sha256(json_bytes(metadata)).hexdigest()

    @functools.cached_property
    def header_json(self) -> bytes:
        """The part of a header that all snapshots with this layout share: from the comma before it to the end."""
        metadata = json_bytes({"layout_sha256": self.sha256, **self._metadata})
        entries = (
            entry_json(name, tensor_entry(dtype, shape, begin, end)) for name, dtype, shape, begin, end in self.entries
        )
        return b"".join((b",", metadata[1:], *entries, b"}"))

    @functools.cached_property
    def num_values(self) -> int:
        """Upper bound of the number of JSON values in ``header_json``."""
        return self.header_json.count(b",")

    @functools.cached_property
    def _profiles_end(self) -> int:
        return self.average_elements * DTYPE_BYTES[self.checkpoint_dtype] * len(self.gammas)

    @functools.cached_property
    def _metadata(self) -> dict[str, str]:
        records: list[tuple[Any, ...]] = [(r.keys, r.dtype, r.role, r.persistent, r.shape) for r in self.records]
        if self.is_sharded:
            records = [(*values, record.part) for values, record in zip(records, self.records, strict=True)]
        return {
            "gammas": json_text(self.gammas),
            "sigma_rels": json_text(self.sigma_rels),
            "checkpoint_dtype": self.checkpoint_dtype,
            "chunk_bytes": repr(self.chunk_bytes),
            "tensors": json_text(records),
        }


def tensor_entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """Return the entry of a tensor in a safetensors header, with its offsets in bytes from the start of the data."""
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]}


def entry_json(name: str, entry: dict[str, Any]) -> bytes:
    """Return the JSON of one tensor's name and entry in a safetensors header, from the comma before it on.

    Headers are encoded entry by entry, because thousands of dicts at once would take much memory.
    """
    return b",%b:%b" % (json_bytes(name), json_bytes(entry))


def is_tuple_of(values: object, kind: type) -> bool:
    """Return whether a value is a tuple whose items are all exactly of one type.

    Subclasses do not count: ``True`` in a hostile header must not pass as the integer 1.
    """
    return type(values) is tuple and all(type(value) is kind for value in values)


def _copied_dtype(record: TensorRecord) -> str:
    # Complex numbers are pairs here too: older safetensors packages have no complex type.
    return "F32" if record.dtype == "C64" else record.dtype


def _copied_item_bytes(record: TensorRecord) -> int:
    return DTYPE_BYTES[_copied_dtype(record)]


def _back_to_back(sizes: Iterable[int], begin: int = 0) -> tuple[Span, ...]:
    spans = []
    for size in sizes:
        spans.append(Span(begin, begin + size))
        begin += size
    return tuple(spans)
