"""The readers under test, each with files that it takes and with what counts as a wrong answer.

A hostile file may be refused, with an error of the package that names it, or taken: then its numbers must be those that
an independent reading finds. Anything else is a Finding.

Longer than the house's 300 lines: what each reader takes, and what counts as wrong there, is one page.
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
    """A reader, and files for it in a folder of its own."""

    name: str

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Files that are right."""

    @abstractmethod
    def execute(self, content: bytes) -> str:
        """Read a file made of these bytes; "taken", or the refusal. Raises Finding."""

    @abstractmethod
    def mutate(self, rng: random.Random, content: bytes, other: bytes) -> bytes:
        """Something like ``content``."""

    def sealed(self, content: bytes) -> bytes:
        """The same with its checksums made right, where there are any."""
        return content


class SnapshotTarget(Target):
    """A snapshot file in its folder, by every call of the store that reads, and its numbers as synthesis reads them."""

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
                raise Finding(f"verify() says nothing of a file that is refused: {refusals[0]}")
            return refusals[0]
        (snapshot,) = store.snapshots()
        found: dict[str, bytes] = {}
        refusal = refused(lambda: found.update(self.numbers(snapshot)), self.path)
        if (refusal is None) == bool(problems):
            raise Finding(f"verify() says {problems}, reading the numbers {refusal}")
        if refusal is None:
            self._compare(snapshot, found, independent.read_snapshot(content))
        return refusal or "taken"

    def numbers(self, snapshot: Any) -> dict[str, bytes]:
        """All tensors of a snapshot, read and checked as synthesis does it."""
        moment = self.stored.stored_snapshot_view(snapshot)
        with self.open_files([self.path]) as files:
            flats = []
            for source in (*moment.averages, *([moment.copied] if moment.copied else [])):
                flats.append(bytearray(source.num_bytes))
                source.reader(files).read_into(memoryview(flats[-1]))
        averaged = [each.name for each in moment.records if each.role == "averaged"]
        width = snapshot.layout.chunk_bytes and {"F64": 8, "F32": 4}.get(snapshot.layout.checkpoint_dtype, 2)
        found = {
            f"ema{profile}.{name}": bytes(flat[begin * width : end * width])
            for profile, flat in enumerate(flats[: len(moment.gammas)])
            for name, (begin, end) in zip(averaged, moment.average_spans, strict=True)
        }
        return found | {f"model.{name}": bytes(flats[-1][slice(*span)]) for name, span in moment.copied_spans.items()}

    def _compare(self, snapshot: Any, found: dict[str, bytes], reading: independent.Reading | None) -> None:
        if reading is None:
            raise Finding("a file is taken that is none by an independent reading")
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
    """What a worker wrote, by ``load_average``."""

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
                raise Finding(f"half of a model was loaded before {refusal}")
            outcomes.append(refusal or "taken")
        return outcomes[0]

    def _compare(self, tensors: dict[str, torch.Tensor], content: bytes) -> None:
        if self.path.suffix == ".pt":
            expected = independent.read_torch(content)
        else:
            reading = independent.read_safetensors(content)
            expected = None if reading is None else as_torch(reading.tensors)
        if expected is None:
            raise Finding("a file is taken that is none by an independent reading")
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
                raise Finding("a file is taken that torch refuses")
            lost = [each.name for records, _ in found for each in records if f"ema_model.{each.name}" not in expected]
            if lost:
                raise Finding(f"numbers are taken whose checksum is wrong: {lost}")
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
    """Make a new file of these bytes: where an old one is emptied and filled again, ext4 waits for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def refused(call: Callable[[], object], path: Path) -> str | None:
    """What a reader says to a file that it does not take; None if it takes it."""
    try:
        call()
    except NitrousError as error:
        if not (str(path) in str(error) or str(path.parent) in str(error)) or len(str(error)) > 4000:
            raise Finding(f"the message does not name the file, or is no message: {str(error)[:200]}") from error
        return f"{type(error).__name__}: {error}"
    except Finding:
        raise
    except Exception as error:
        raise Finding(f"{type(error).__name__} instead of an error of the package: {str(error)[:200]}") from error
    return None


def layouts() -> list[Any]:
    """Small ones with every role, every width of number, tied and complex tensors, padding, nothing at all."""
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
    """A snapshot file, the same every time."""
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
    """A file of an average, the same every time; the safetensors package writes metadata in any order."""
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
    """Fresh tensors, of several types, without a zero."""
    return {
        "weight": torch.arange(1.0, 601.0).view(20, 30),
        "half": torch.arange(1.0, 4.0, dtype=torch.float16),
        "phase": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64),
        "count": torch.tensor(5),
        "mask": torch.tensor([True, True]),
    }


def as_torch(tensors: independent.Tensors) -> dict[str, torch.Tensor]:
    """Bytes as tensors."""
    from nitrous_ema._base.torch_dtypes import TORCH_DTYPES

    return {
        name: torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[code]).reshape(shape)
        if data
        else torch.empty(shape, dtype=TORCH_DTYPES[code])
        for name, (code, shape, data) in tensors.items()
        if code in TORCH_DTYPES
    }


def raw(tensor: torch.Tensor, *, truth: bool = True) -> bytes:
    """The bytes of a tensor's numbers; with ``truth`` whatever is not 0 is true."""
    if truth and tensor.dtype == torch.bool:
        tensor = tensor.contiguous().view(torch.uint8) != 0
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _as(tensor: torch.Tensor, records: Sequence[Any]) -> torch.Tensor:
    """A tensor in the type in which a source hands out all of its own."""
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
