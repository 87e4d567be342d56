"""Synthesized averages as files, under the keys of the model's ``state_dict()``, and back into a model.

A file comes to exist whole or not at all: it is written under a temporary name that starts with a dot, in the folder of
its final name, made durable and renamed. It is filled at offsets while the average streams by, so its size does not
matter.

Longer than the house's 300 lines because where a tensor lies in a file and how it gets there belong on one page.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.files import FileSystem
from nitrous_ema.snapshots.format import DTYPE_BYTES, TensorRecord, library_version
from nitrous_ema.synthesis.numbers import FLOAT_TYPES, narrow, widen
from nitrous_ema.synthesis.plan import Plan
from nitrous_ema.synthesis.streaming import DEFAULT_MEMORY_BYTES, Progress, block_size, stream, stream_copied

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SUFFIXES = (".safetensors", ".pt")
OUTPUTS_PER_PASS = 128  # each has an open file; more of them take another pass over the snapshots
_DATA_ALIGNMENT_BYTES = 64


def output_name(step: int, sigma_rel: float, suffix: str = ".safetensors") -> str:
    """File name of the average of one length at one step."""
    return f"step-{step}-sigma-{sigma_rel!r}{suffix}"


def write_outputs(
    plan: Plan,
    paths: Sequence[Path],
    *,
    dtype: str | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress | None = None,
    committed: Callable[[int, Path], None] | None = None,
    files: FileSystem | None = None,
) -> None:
    """Synthesize the averages of a plan into one file each.

    ``.safetensors`` and ``.pt`` (a dict of tensors, for ``torch.load(weights_only=True)``) hold what the unwrapped
    model's ``load_state_dict(strict=True)`` takes: tied tensors under all their keys, no non-persistent buffers, copied
    tensors as the target's snapshot has them. Skipped tensors are in no snapshot, so they are absent; the metadata of a
    ``.safetensors`` file names them.

    Args:
        plan: The averages.
        paths: One per output. The suffix decides the format. A file of that name is replaced, atomically.
        dtype: Type of the floating tensors, as a safetensors code ("F32", "BF16", "F16", "F64"); by default each has
            the model's own. Complex and integer tensors always have the model's own.
        memory_bytes: Memory to stay within.
        progress: Told of the bytes read.
        committed: Called with the index of each output and its path once it is durable.
        files: The file system to write to.

    Raises:
        ValueError: Wrong number of paths, unknown suffix or dtype, or a budget that is too small.
        SnapshotDamaged: A chunk's checksum is wrong. No output of that pass is left behind.
        NitrousError: A value does not fit into the type.
        OSError: The folder cannot be written to.
    """
    check_outputs(plan, paths, dtype=dtype, memory_bytes=memory_bytes)
    files = files or FileSystem()
    for first in range(0, len(paths), OUTPUTS_PER_PASS):
        indices = range(first, min(first + OUTPUTS_PER_PASS, len(paths)))
        outputs: list[_Output] = []
        try:
            for index in indices:
                outputs.append(_Output(plan, index, paths[index], dtype, files))
                outputs[-1].open()
            _fill(_part(plan, indices), outputs, memory_bytes, progress)
            for index, output in zip(indices, outputs, strict=True):
                output.commit()
                if committed is not None:
                    committed(index, output.path)
        finally:
            for output in outputs:
                output.discard()


def _fill(plan: Plan, outputs: Sequence[_Output], memory_bytes: int, progress: Progress | None) -> None:
    """Read the snapshots once, into all of these outputs."""

    def take_copied(begin_byte: int, piece: memoryview) -> None:
        for output in outputs:
            output.take_copied(begin_byte, piece)

    stream(plan, [output.take for output in outputs], memory_bytes=memory_bytes, progress=progress)
    stream_copied(plan, take_copied)


def _part(plan: Plan, indices: range) -> Plan:
    """The same plan for some of its outputs."""
    return replace(
        plan,
        sigma_rels=plan.sigma_rels[indices.start : indices.stop],
        gammas=plan.gammas[indices.start : indices.stop],
        weights=np.ascontiguousarray(plan.weights[:, indices.start : indices.stop]),
    )


def check_outputs(plan: Plan, paths: Sequence[Path], *, dtype: str | None, memory_bytes: int) -> None:
    """Refuse what write_outputs() could not do, before anything is touched.

    Raises:
        ValueError: As write_outputs().
    """
    if len(paths) != len(plan.gammas):
        raise ValueError(f"paths: {len(paths)} for {len(plan.gammas)} averages; one per average is expected.")
    if len(set(paths)) != len(paths):
        raise ValueError("paths: two averages would be written to one file; give each its own name.")
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: unknown kind of file; expected a name that ends in {' or '.join(SUFFIXES)}.")
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise ValueError(f"dtype: {dtype!r} is not a floating type; expected one of {', '.join(FLOAT_TYPES)}.")
    block_size(plan, memory_bytes)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in an output file."""

    key: str
    record: TensorRecord
    dtype: str
    begin: int
    """Offset in the file's data, in bytes."""
    end: int


@dataclass(frozen=True, slots=True)
class _Segment:
    """A stretch of the source that lies in the output as one piece."""

    begin: int
    """In elements of the flat average, or in bytes of the copied section."""
    end: int
    stored: str
    """Type in the source; float64 for averages."""
    dtype: str
    """Type in the output."""
    offset: int
    """In the output file, in bytes."""

    @property
    def end_offset(self) -> int:
        """Where an average's stretch ends in the output file."""
        return self.offset + (self.end - self.begin) * DTYPE_BYTES[self.dtype]


class _Output:
    """One file under its temporary name, until commit() or discard()."""

    def __init__(self, plan: Plan, index: int, path: Path, dtype: str | None, files: FileSystem) -> None:
        self.path = path
        self._files = files
        self._is_torch = path.suffix == ".pt"
        self._entries = _entries(plan, dtype, tied_once=self._is_torch)
        self._header = _header(self._entries, _metadata(plan, index))
        self._averaged = _averaged_segments(plan, self._entries, len(self._header))
        self._copied = _copied_segments(plan, self._entries, len(self._header))
        self._temporaries: list[Path] = []
        self._descriptor: int | None = None

    def open(self) -> None:
        """Create the temporary file. Whatever comes after this, discard() removes it."""
        self._descriptor = self._create()
        self._write(self._header, 0)

    def take(self, begin_element: int, block: NDArray[np.float64], /) -> None:
        """Write a block of the flat average."""
        end_element = begin_element + len(block)
        for segment in self._averaged:
            begin, end = max(segment.begin, begin_element), min(segment.end, end_element)
            if begin < end:
                values = block[begin - begin_element : end - begin_element]
                offset = segment.offset + (begin - segment.begin) * DTYPE_BYTES[segment.dtype]
                self._write(self._narrow(values, segment.dtype), offset)

    def take_copied(self, begin_byte: int, piece: memoryview) -> None:
        """Write a piece of the copied tensors."""
        for segment in self._copied:
            begin, end = max(segment.begin, begin_byte), min(segment.end, begin_byte + len(piece))
            if begin >= end:
                continue
            stored = piece[begin - begin_byte : end - begin_byte]
            if segment.stored == segment.dtype:
                self._write(stored, segment.offset + begin - segment.begin)
                continue
            width = DTYPE_BYTES[segment.stored]
            values = np.empty(len(stored) // width, dtype=np.float64)
            widen(np.frombuffer(stored, dtype=np.uint8), segment.stored, values)
            offset = segment.offset + (begin - segment.begin) // width * DTYPE_BYTES[segment.dtype]
            self._write(self._narrow(values, segment.dtype), offset)

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        if self._is_torch:
            self._become_torch_file()
        descriptor = self._open_descriptor()
        self._files.fsync(descriptor)
        self._descriptor = None
        self._files.close(descriptor)
        self._files.rename(self._temporaries[-1], self.path)
        self._temporaries.pop()
        self._files.fsync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was not committed. Does nothing after commit()."""
        if self._descriptor is not None:
            with suppress(OSError):
                self._files.close(self._descriptor)
            self._descriptor = None
        while self._temporaries:
            with suppress(OSError):
                self._files.unlink(self._temporaries.pop())

    def _create(self) -> int:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        self._temporaries.append(temporary)  # before it exists: an interrupt may come in between
        return self._files.open_exclusive(temporary)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise RuntimeError(
                f"{self.path}: used after it was closed; this is a bug of nitrous_ema, please report it."
            )
        return self._descriptor

    def _write(self, piece: ReadableBuffer, offset: int) -> None:
        left, descriptor = memoryview(piece).cast("B"), self._open_descriptor()
        try:
            while left:
                count = self._files.write_at(descriptor, left, offset)
                left, offset = left[count:], offset + count
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error

    def _narrow(self, values: NDArray[np.float64], dtype: str) -> memoryview:
        try:
            return narrow(values, dtype).view(np.uint8).data
        except FloatingPointError as error:
            raise NitrousError(
                f"{self.path}: a value of {float(np.nanmax(np.abs(values)))} is too large for {dtype}; "
                "choose a wider type for this output (--dtype bfloat16 or float32)."
            ) from error

    def _become_torch_file(self) -> None:
        """Replace the temporary file by one of torch's, tensor by tensor: neither is ever whole in memory."""
        import torch

        from nitrous_ema.tracked import TORCH_DTYPES

        plain = self._temporaries[-1]
        tensors: dict[str, torch.Tensor] = {}
        for entry in self._entries:
            tensor = torch.empty(entry.record.shape, dtype=TORCH_DTYPES[entry.dtype], device="cpu")
            if entry.begin < entry.end:
                mapped = np.memmap(plain, np.uint8, "c", len(self._header) + entry.begin, (entry.end - entry.begin,))
                tensor = torch.from_numpy(mapped).view(TORCH_DTYPES[entry.dtype]).reshape(entry.record.shape)
            tensors.update(dict.fromkeys(entry.record.keys, tensor))
        descriptor, self._descriptor = self._open_descriptor(), None
        self._files.close(descriptor)
        self._descriptor = self._create()
        with os.fdopen(os.dup(self._descriptor), "wb") as file:
            torch.save(tensors, file)
        self._files.unlink(self._temporaries.pop(0))


def _entries(plan: Plan, dtype: str | None, *, tied_once: bool) -> list[_Entry]:
    """The tensors of an output in the order of their bytes: large elements first, which aligns all of them.

    Further keys of tied tensors come last, so that the others keep the order of the flat average.
    """
    named = [
        (key, record, dtype if dtype is not None and _is_real(record) else record.dtype)
        for record in plan.target.records
        if record.role != "skipped" and record.persistent
        for key in (record.keys[:1] if tied_once else record.keys)
    ]
    named.sort(key=lambda each: (-DTYPE_BYTES[each[2]], each[0] != each[1].name))
    entries, begin = [], 0
    for key, record, code in named:
        end = begin + math.prod(record.shape) * DTYPE_BYTES[code]
        entries.append(_Entry(key, record, code, begin, end))
        begin = end
    return entries


def _is_real(record: TensorRecord) -> bool:
    """Whether a tensor's floating numbers can be rounded to another type."""
    return record.dtype in FLOAT_TYPES or (record.role == "averaged" and record.dtype != "C64")


def _averaged_segments(plan: Plan, entries: Sequence[_Entry], data_begin: int) -> list[_Segment]:
    averaged = (record for record in plan.target.records if record.role == "averaged")
    spans = {record.name: span for record, span in zip(averaged, plan.target.average_spans, strict=True)}
    segments: list[_Segment] = []
    for entry in entries:
        if entry.record.role != "averaged":
            continue
        code = "F32" if entry.dtype == "C64" else entry.dtype
        if code not in FLOAT_TYPES:
            raise NitrousError(
                f"{entry.key!r} has type {code} in the model, which averages cannot be rounded to; "
                "choose the type of the output (--dtype bfloat16)."
            )
        begin, end = spans[entry.record.name]
        new = _Segment(begin, end, "F64", code, data_begin + entry.begin)
        last = segments[-1] if segments else None
        if last is not None and (last.end, last.dtype, last.end_offset) == (begin, code, new.offset):
            segments[-1] = replace(last, end=end)
        else:
            segments.append(new)
    return segments


def _copied_segments(plan: Plan, entries: Sequence[_Entry], data_begin: int) -> list[_Segment]:
    return [
        _Segment(
            *plan.target.copied_spans[entry.record.name], entry.record.dtype, entry.dtype, data_begin + entry.begin
        )
        for entry in entries
        if entry.record.role == "copied"
    ]


def _header(entries: Sequence[_Entry], metadata: dict[str, str]) -> bytes:
    described: dict[str, object] = {"__metadata__": metadata}
    for entry in entries:
        offsets = [entry.begin, entry.end]
        described[entry.key] = {"dtype": entry.dtype, "shape": entry.record.shape, "data_offsets": offsets}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _metadata(plan: Plan, index: int) -> dict[str, str]:
    """What an output is made of. Values are strings, numbers as repr, lists as JSON."""
    target, report = plan.target, plan.report
    return {
        "format": "pt",  # transformers refuses files that do not say so
        "library_version": library_version(),
        "run": target.run,
        "step": repr(target.step),
        "t": repr(target.t),
        "sigma_rel": repr(plan.sigma_rels[index]),
        "gamma": repr(plan.gammas[index]),
        "profile_error": repr(float(report.profile_error[index])),
        "weight_l1": repr(float(report.weight_l1[index])),
        "weight_l2": repr(float(report.weight_l2[index])),
        "columns": repr(len(plan.columns)),
        "steps_read": json.dumps(sorted({column.step for column in plan.columns})),
        "excluded": json.dumps(plan.excluded),
        "lineage": json.dumps(target.lineage),
        "skipped": json.dumps(list(_names(plan, "skipped"))),
        "copied": json.dumps(list(_names(plan, "copied"))),
    }


def _names(plan: Plan, role: str) -> Iterator[str]:
    """Keys that the model's state_dict has, of the tensors with this role."""
    for record in plan.target.records:
        if record.role == role and record.persistent:
            yield from record.keys
