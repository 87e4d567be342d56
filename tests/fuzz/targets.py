"""The readers under test, each with valid files and with the definition of a wrong answer.

A reader may refuse a hostile file with an error of the package that names the file. If it accepts the file, its numbers
must equal those of an independent reading. Every other outcome is a Finding.

Longer than 300 lines because the files of each reader and its wrong answers belong on one page.
"""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nitrous_ema._base.torch_dtypes import TORCH_CODES
from nitrous_ema.errors import NitrousError
from nitrous_ema.snapshots.header import Stamp, encode_header
from nitrous_ema.snapshots.names import folder_name, rank_file_name
from tests.crash.subject import PACKAGE, Edits, load_modules
from tests.fuzz import independent, mutate
from tests.support.snapshot_folders import layout_of, record, stored

STEP = 1000
PARENT, RUN = "20251231T000000.000000-0123abcd", "20260101T000000.000000-00000000"
MODULES = tuple(
    f"snapshots/{name}"
    for name in ("bounded_json", "names", "layout", "header", "validation", "store", "torch_archive")
)
READERS = ("snapshots/legacy/folder", "synthesis/outputs/reader", "averaging/load_average")
TRACED = frozenset(str(PACKAGE / f"{name}.py") for name in (*MODULES, *READERS))


class Finding(AssertionError):
    """A reader gave a wrong answer."""


class Target(ABC):
    """A reader, and a folder of its own for the files that it reads."""

    name: str

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Return valid files."""

    @abstractmethod
    def execute(self, content: bytes) -> str:
        """Read a file with these bytes; return "taken", or the message of the refusal. Raises Finding."""

    @abstractmethod
    def mutate(self, rng: random.Random, content: bytes, other: bytes) -> bytes:
        """Return a mutation of ``content``."""

    def sealed(self, content: bytes) -> bytes:
        """Return the same file with its checksums made to match, if it has any."""
        return content


class SnapshotTarget(Target):
    """A snapshot file in its folder, read by every method of the store, and its numbers, read as by synthesis."""

    name = "snapshot"

    def __init__(self, folder: Path, edits: Edits | None = None) -> None:
        modules = load_modules("synthesis.plan", edits or {})
        self.store_module, self.stored = modules["snapshots.store"], modules["snapshots.readable_snapshot"]
        self.open_files = modules["snapshots.reading"].OpenFiles
        self.root = folder / "snapshots"
        self.path = self.root / folder_name(STEP, RUN) / rank_file_name(0, 1)
        self.path.parent.mkdir(parents=True)

    def seeds(self) -> list[bytes]:
        return [snapshot_bytes(layout) for layout in layouts()]

    def execute(self, content: bytes) -> str:
        put(self.path, content)
        store = self.store_module.SnapshotStore(self.root)
        refusals = [
            refusal
            for call in (store.runs, store.snapshots, lambda: store.get(STEP), store.incomplete)
            if (refusal := refused(call, self.path)) is not None
        ]
        problems = store.verify()
        if any(self.path != problem.path or str(self.path) not in problem.message for problem in problems):
            raise Finding(f"verify() does not name the file: {problems}")
        if refusals:
            if not problems:
                raise Finding(f"verify() has no failure for a file that is refused: {refusals[0]}")
            return refusals[0]
        (snapshot,) = store.snapshots()
        found: dict[str, bytes] = {}
        refusal = refused(lambda: found.update(self.numbers(snapshot)), self.path)
        if (refusal is None) == bool(problems):
            raise Finding(f"verify() returns {problems}, but reading the numbers gives {refusal}")
        if refusal is None:
            self._compare(snapshot, found, independent.read_snapshot(content))
        return refusal or "taken"

    def numbers(self, snapshot: Any) -> dict[str, bytes]:
        """Return the bytes of all tensors of a snapshot, read and verified as by synthesis."""
        view = self.stored.stored_snapshot_view(snapshot)
        with self.open_files([self.path]) as files:
            flats = []
            for source in (*view.averages, *([view.copied] if view.copied else [])):
                flats.append(bytearray(source.num_bytes))
                source.reader(files).read_into(memoryview(flats[-1]))
        averaged = [each.name for each in view.records if each.role == "averaged"]
        width = snapshot.layout.chunk_bytes and {"F64": 8, "F32": 4}.get(snapshot.layout.checkpoint_dtype, 2)
        found = {
            f"ema{profile}.{name}": bytes(flat[begin * width : end * width])
            for profile, flat in enumerate(flats[: len(view.gammas)])
            for name, (begin, end) in zip(averaged, view.average_spans, strict=True)
        }
        return found | {f"model.{name}": bytes(flats[-1][slice(*span)]) for name, span in view.copied_spans.items()}

    def _compare(self, snapshot: Any, found: dict[str, bytes], reading: independent.Reading | None) -> None:
        if reading is None:
            raise Finding("a file is accepted that an independent reading refuses")
        expected = {name: data for name, (_, _, data) in reading.tensors.items() if name != "padding"}
        facts = {"step": repr(snapshot.step), "t": repr(snapshot.t), "run": snapshot.run}
        if found != expected or facts != {name: reading.facts[name] for name in facts}:
            raise Finding(f"wrong numbers: {facts}, {sorted(found)} for {sorted(expected)}")

    def mutate(self, rng: random.Random, content: bytes, other: bytes) -> bytes:
        if rng.random() < 0.5:
            content = mutate.header(rng, content, alignment=4096)
        else:
            content = mutate.some_bytes(rng, content, other)
        return self.sealed(content) if rng.random() < 0.6 else content

    def sealed(self, content: bytes) -> bytes:
        return mutate.sealed(content)


class AverageTarget(Target):
    """A synthesized average, read by ``load_average``."""

    def __init__(self, folder: Path, edits: Edits | None = None, suffix: str = ".safetensors") -> None:
        self.load = load_modules("averaging.load_average", edits or {})["averaging.load_average"].load_tensors
        self.name, self.path = f"average{suffix}", folder / f"average{suffix}"

    def seeds(self) -> list[bytes]:
        files = []
        for state in (model_state(), {"alone": torch.arange(3.0, dtype=torch.bfloat16)}):
            if self.path.suffix == ".pt":
                torch.save(state, self.path)
                files.append(self.path.read_bytes())
            else:
                files.append(average_bytes(state))
        return files

    def execute(self, content: bytes) -> str:
        put(self.path, content)
        outcomes = []
        for strict in (True, False):
            tensors = {key: torch.zeros_like(each) for key, each in model_state().items()}
            refusal = refused(
                lambda tensors=tensors, strict=strict: self.load(tensors, self.path, strict=strict), self.path
            )
            if refusal is None:
                self._compare(tensors, content)
            elif any(each.view(-1).view(torch.uint8).any() for each in tensors.values()):
                raise Finding(f"the model was partly loaded before {refusal}")
            outcomes.append(refusal or "taken")
        return outcomes[0]

    def _compare(self, tensors: dict[str, torch.Tensor], content: bytes) -> None:
        if self.path.suffix == ".pt":
            expected = independent.read_torch(content)
        else:
            reading = independent.read_safetensors(content)
            expected = None if reading is None else as_torch(reading.tensors)
        if expected is None:
            raise Finding("a file is accepted that an independent reading refuses")
        for key, tensor in tensors.items():
            right = expected[key].to(tensor.dtype) if key in expected else torch.zeros_like(tensor)
            if raw(tensor) != raw(right):
                raise Finding(f"wrong numbers in {key!r}: {tensor} for {right}")

    def mutate(self, rng: random.Random, content: bytes, other: bytes) -> bytes:
        if rng.random() < 0.5:
            return mutate.header(rng, content) if self.path.suffix != ".pt" else mutate.archive(rng, content)
        return mutate.some_bytes(rng, content, other)


class LegacyTarget(Target):
    """A file of nitrous-ema 0.0.1 or ema-pytorch."""

    name = "legacy"

    def __init__(self, folder: Path, edits: Edits | None = None) -> None:
        self.folder = load_modules("snapshots.legacy.folder", edits or {})["snapshots.legacy.folder"].LegacyFolder
        self.path = folder / f"0.{STEP}.pt"

    def seeds(self) -> list[bytes]:
        files = []
        for dtype in (torch.float32, torch.float16):
            state = {f"ema_model.{key}": each for key, each in model_state().items()}
            state["ema_model.norm"] = torch.arange(5).to(dtype)
            torch.save({**state, "step": torch.tensor(3)}, self.path)
            files.append(self.path.read_bytes())
        return files

    def execute(self, content: bytes) -> str:
        put(self.path, content)
        found: list[tuple[Any, bytes]] = []
        refusal = refused(lambda: found.extend(self._read()), self.path)
        if refusal is None:
            expected = independent.read_torch(content)
            if expected is None:
                raise Finding("a file is accepted that torch refuses")
            lost = [each.name for records, _ in found for each in records if f"ema_model.{each.name}" not in expected]
            if lost:
                raise Finding(f"numbers with a wrong checksum are accepted: {lost}")
            for records, data in found:
                if (
                    b"".join(raw(_as(expected[f"ema_model.{each.name}"], records), truth=False) for each in records)
                    != data
                ):
                    raise Finding("wrong numbers")
        return refusal or "taken"

    def _read(self) -> list[tuple[Any, bytes]]:
        snapshot = self.folder(self.path.parent, gammas=[6.0]).get(STEP)
        found = []
        for source in (*snapshot.averages, *([snapshot.copied] if snapshot.copied else [])):
            if source.num_bytes > 10**6:
                raise Finding(f"{source.num_bytes} bytes are read from a small file")
            data = bytearray(source.num_bytes)
            if data:
                source.reader(None).read_into(memoryview(data))
            found.append((source.records, bytes(data)))
        return found

    def mutate(self, rng: random.Random, content: bytes, other: bytes) -> bytes:
        return (mutate.archive if rng.random() < 0.6 else mutate.some_bytes)(rng, content, other)


def put(path: Path, content: bytes) -> None:
    """Write these bytes to a new file: after truncating an existing file, ext4 would wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def refused(call: Callable[[], object], path: Path) -> str | None:
    """Return class and message of the error with which a reader refuses a file; None if it accepts the file."""
    try:
        call()
    except NitrousError as error:
        if not (str(path) in str(error) or str(path.parent) in str(error)) or len(str(error)) > 4000:
            raise Finding(f"the message is too long or does not name the file: {str(error)[:200]}") from error
        return f"{type(error).__name__}: {error}"
    except Finding:
        raise
    except Exception as error:
        raise Finding(f"{type(error).__name__} instead of an error of the package: {str(error)[:200]}") from error
    return None


def layouts() -> list[Any]:
    """Return small layouts: every role and width of numbers, tied, complex and empty tensors, padding."""
    mixed = [
        record("a.weight", (30, 5), tied=("b.weight",)),
        record("z", (2,), "C64"),
        record("count", (), "I64", "copied"),
        record("mask", (3,), "BOOL", "copied"),
        record("lost", (4,), "int4", "skipped"),
        record("buffer", (2, 0), "BF16", persistent=False),
    ]
    return [
        layout_of(mixed, chunk_bytes=64),
        layout_of([record("a", (9,), "F16")], (0.1,), "BF16", 16),
        layout_of([record("n", (3,), "U8", "copied"), record("a", (1,), "F64")], chunk_bytes=16),
    ]


def snapshot_bytes(layout: Any) -> bytes:
    """Return a snapshot file, with the same bytes every time."""
    averages = [np.arange(layout.average_elements) + profile for profile in range(len(layout.gammas))]
    copied = [bytes(range(1, 1 + each.stored_elements * 8))[: _size(each)] for each in layout.copied]
    data = b"".join(
        [stored(each, layout.checkpoint_dtype) for each in averages] + [bytes(layout.padding_bytes)] + copied
    )
    stamp = Stamp(
        step=STEP,
        t=2.5,
        t_first=1,
        run=RUN,
        lineage=((PARENT, 500), (RUN, None)),
        trainer={"host": "h", "pid": 7, "started": 1.5},
        created_ns=10**18,
        library_version="1",
    )
    return encode_header(layout, stamp, [zlib.crc32(data[begin:end]) for begin, end in layout.chunks]) + data


def average_bytes(state: dict[str, torch.Tensor]) -> bytes:
    """Return a file of an average, with the same bytes every time, unlike the metadata of the safetensors package."""
    header: dict[str, Any] = {"__metadata__": {"step": "7", "skipped": '["x"]'}}
    data = b""
    for key, tensor in sorted(state.items(), key=lambda item: -item[1].element_size()):
        offsets = [len(data), len(data) + tensor.nbytes]
        header[key] = {"dtype": TORCH_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw(tensor, truth=False)
    text = mutate.json_bytes(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def model_state() -> dict[str, torch.Tensor]:
    """Return new tensors of several types, without zeros."""
    return {
        "weight": torch.arange(1.0, 601.0).view(20, 30),
        "half": torch.arange(1.0, 4.0, dtype=torch.float16),
        "phase": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64),
        "count": torch.tensor(5),
        "mask": torch.tensor([True, True]),
    }


def as_torch(tensors: independent.Tensors) -> dict[str, torch.Tensor]:
    """Convert bytes to tensors."""
    from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

    return {
        name: torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[code]).reshape(shape)
        if data
        else torch.empty(shape, dtype=TORCH_DTYPES[code])
        for name, (code, shape, data) in tensors.items()
        if code in TORCH_DTYPES
    }


def raw(tensor: torch.Tensor, *, truth: bool = True) -> bytes:
    """Return the bytes of a tensor's numbers; with ``truth`` every nonzero byte of a bool counts as true."""
    if truth and tensor.dtype == torch.bool:
        tensor = tensor.contiguous().view(torch.uint8) != 0
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _as(tensor: torch.Tensor, records: Sequence[Any]) -> torch.Tensor:
    """Convert a tensor to the common type of a source's tensors."""
    if not tensor.dtype.is_floating_point and not tensor.is_complex():
        return tensor
    codes = {"F32" if each.dtype == "C64" else each.dtype for each in records}
    common = (
        torch.float64
        if "F64" in codes
        else {"F16": torch.float16, "BF16": torch.bfloat16}.get(*codes, torch.float32)
        if len(codes) == 1
        else torch.float32
    )
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(common)


def _size(record: Any) -> int:
    return record.stored_elements * {"I64": 8, "BOOL": 1, "U8": 1}[record.dtype]


TARGETS: dict[str, Callable[..., Target]] = {
    "snapshot": SnapshotTarget,
    "average.safetensors": AverageTarget,
    "average.pt": lambda folder, edits=None: AverageTarget(folder, edits, ".pt"),
    "legacy": LegacyTarget,
}
