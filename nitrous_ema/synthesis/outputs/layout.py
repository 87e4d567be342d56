"""The layout of an output file: its tensors, their order and places, the header and its metadata.

Offsets count from the first byte of the tensors. So they are the same for all averages of a plan, and one layout serves
all of them; only the metadata in the headers differ.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema._version import __version__
from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.bounded_json import json_bytes
from nitrous_ema.snapshots.layout import TensorRecord, entry_json, tensor_entry
from nitrous_ema.synthesis.float_conversion import FLOAT_TYPES
from nitrous_ema.synthesis.plan import Plan

_DATA_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class OutputEntry:
    """One tensor in an output file."""

    key: str
    """Its name in the file; tied tensors are stored under each of their keys."""
    record: TensorRecord
    """The tensor of the target snapshot."""
    dtype: str
    """Its type, as a safetensors code."""
    begin: int
    """First byte, counted from the first byte of the tensors."""
    end: int
    """Byte after the last."""

    @property
    def header_entry(self) -> dict[str, Any]:
        """The entry of this tensor in the header.

        Complex numbers are pairs of float32 numbers there, because safetensors before 0.7 reads no complex type.
        """
        if self.dtype == "C64":
            return tensor_entry("F32", (*self.record.shape, 2), self.begin, self.end)
        return tensor_entry(self.dtype, self.record.shape, self.begin, self.end)


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of the source that the output holds in one piece."""

    begin: int
    """First element of the flat average, or first byte of the copied section."""
    end: int
    """The element or byte after the last."""
    stored: str
    """Type in the source; float64 for averages."""
    dtype: str
    """Type in the output."""
    offset: int
    """First byte in the output, counted from the first byte of the tensors."""

    @property
    def end_offset(self) -> int:
        """Byte in the output after the last, for a range of the flat average."""
        return self.offset + (self.end - self.begin) * DTYPE_BYTES[self.dtype]


class OutputLayout:
    """The tensors of an output file; the same for every average of a plan.

    Args:
        plan: The averages.
        dtype: Type of the real floating tensors, as a safetensors code; None for each tensor's own type in the model.
        tied_once: Store tied tensors under their first key only (``.pt`` files store the sharing itself).
        names: Canonical names of the tensors to store; None stores all.

    Raises:
        NitrousError: A tensor has a type that averages cannot be rounded to.
    """

    def __init__(
        self, plan: Plan, dtype: str | None, *, tied_once: bool = False, names: Collection[str] | None = None
    ) -> None:
        self.entries = _entries(plan, dtype, tied_once=tied_once, names=names)
        self.data_bytes = max((entry.end for entry in self.entries), default=0)
        self.copied = _copied_segments(plan, self.entries)
        self._averaged = sorted(_averaged_segments(plan, self.entries), key=lambda segment: segment.begin)
        self._begins = [segment.begin for segment in self._averaged]
        # Segments of tied tensors overlap, so ends are not ascending. The running maximum shows where a search
        # backwards can stop: no earlier segment ends after it.
        self._ends = list(accumulate((segment.end for segment in self._averaged), max))
        self.elements = (self._begins[0], self._ends[-1]) if self._averaged else (0, 0)

    def averaged(self, begin_element: int, end_element: int) -> Iterator[tuple[Segment, int, int]]:
        """Divide a range of the flat average among the segments of the file.

        Args:
            begin_element: First element of the range.
            end_element: Element after the last.

        Yields:
            A segment, and the first element and the element after the last that lie in both it and the range.
        """
        for index in reversed(range(bisect_left(self._begins, end_element))):
            if self._ends[index] <= begin_element:
                return
            segment = self._averaged[index]
            begin, end = max(segment.begin, begin_element), min(segment.end, end_element)
            if begin < end:
                yield segment, begin, end

    def header(self, metadata: dict[str, str]) -> bytes:
        """Return the bytes of a file that come before its tensors: length, header and padding."""
        text = json_bytes({"__metadata__": metadata})[:-1] + self._entries_json + b"}"
        text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT_BYTES)
        return len(text).to_bytes(8, "little") + text

    def matches_header(self, header: dict[str, Any]) -> bool:
        """Return whether a header that was read has exactly these tensors, at the same places."""
        return len(header) == len(self.entries) + 1 and all(
            header.get(entry.key) == entry.header_entry for entry in self.entries
        )

    @cached_property
    def _entries_json(self) -> bytes:
        """The tensors in a header, without its metadata. Cached, because thousands of tensors take megabytes."""
        return b"".join(entry_json(entry.key, entry.header_entry) for entry in self.entries)


def _entries(plan: Plan, dtype: str | None, *, tied_once: bool, names: Collection[str] | None) -> list[OutputEntry]:
    """Return the tensors of an output in the order of their bytes: large elements first, which aligns all of them.

    Further keys of tied tensors come last among the tensors of their element size. So the other tensors stay in the
    order of the flat average, and their segments can be joined.
    """
    named = [
        (key, record, output_dtype(record, dtype))
        for record in plan.target.records
        if record.role != "skipped" and record.persistent and (names is None or record.name in names)
        for key in (record.keys[:1] if tied_once else record.keys)
    ]
    named.sort(key=lambda each: (-DTYPE_BYTES[each[2]], each[0] != each[1].name))
    entries, begin = [], 0
    for key, record, code in named:
        end = begin + math.prod(record.shape) * DTYPE_BYTES[code]
        entries.append(OutputEntry(key, record, code, begin, end))
        begin = end
    return entries


def output_dtype(record: TensorRecord, dtype: str | None) -> str:
    """Return the type of a tensor in an output: the requested one for real floating numbers, else its own."""
    is_real = record.dtype in FLOAT_TYPES or (record.role == "averaged" and record.dtype != "C64")
    return dtype if dtype is not None and is_real else record.dtype


def _averaged_segments(plan: Plan, entries: Sequence[OutputEntry]) -> list[Segment]:
    averaged = (record for record in plan.target.records if record.role == "averaged")
    spans = {record.name: span for record, span in zip(averaged, plan.target.average_spans, strict=True)}
    segments: list[Segment] = []
    for entry in entries:
        if entry.record.role != "averaged":
            continue
        code = "F32" if entry.dtype == "C64" else entry.dtype
        if code not in FLOAT_TYPES:
            raise NitrousError(
                f"{entry.key!r} has type {code} in the model; averages cannot be rounded to this type. "
                "Choose a type for the output, for example --dtype bfloat16."
            )
        begin, end = spans[entry.record.name]
        new = Segment(begin, end, "F64", code, entry.begin)
        last = segments[-1] if segments else None
        # Neighbors in the source and in the file become one segment: one write instead of one for each tensor.
        if last is not None and (last.end, last.dtype, last.end_offset) == (begin, code, new.offset):
            segments[-1] = replace(last, end=end)
        else:
            segments.append(new)
    return segments


def _copied_segments(plan: Plan, entries: Sequence[OutputEntry]) -> list[Segment]:
    return [
        Segment(*plan.target.copied_spans[entry.record.name], entry.record.dtype, entry.dtype, entry.begin)
        for entry in entries
        if entry.record.role == "copied"
    ]


def metadata_of(plan: Plan, index: int, accumulate: str) -> dict[str, str]:
    """Return the metadata of one output: its recipe and accuracy. Values are strings; numbers as repr, lists as JSON.

    Args:
        plan: The averages.
        index: Which output of the plan.
        accumulate: Type of products and sums.
    """
    target, report = plan.target, plan.report
    stored = [record for record in target.records if record.role != "skipped" and record.persistent]
    complex_keys = [key for record in stored if record.dtype == "C64" for key in record.keys]
    return {
        "format": "pt",  # transformers refuses files without this entry
        "library_version": __version__,
        "run": target.run,
        "step": repr(target.step),
        "t": repr(target.t),
        "sigma_rel": repr(plan.sigma_rels[index]),
        "gamma": repr(plan.gammas[index]),
        "profile_error": repr(float(report.profile_error[index])),
        "weight_l1": repr(float(report.weight_l1[index])),
        "weight_l2": repr(float(report.weight_l2[index])),
        "rounding": repr(float(report.rounding[index])),
        "columns": repr(len(plan.columns)),
        "steps_read": json.dumps(plan.steps),
        "lower_bound": repr(plan.lower_bound),
        "tolerance": repr(plan.tolerance),
        "accumulate": accumulate,
        "excluded": json.dumps(plan.excluded),
        "lineage": json.dumps(target.lineage),
        "skipped": json.dumps(list(_names(plan, "skipped"))),
        "copied": json.dumps(list(_names(plan, "copied"))),
        **({"complex": json.dumps(complex_keys)} if complex_keys else {}),
    }


def _names(plan: Plan, role: str) -> Iterator[str]:
    """Yield the ``state_dict`` keys of the tensors with this role."""
    for record in plan.target.records:
        if record.role == role and record.persistent:
            yield from record.keys
