"""Snapshot folders of nitrous-ema 0.0.1 and ema-pytorch, read only: one file ``{profile}.{step}.pt`` per average.

Such a file says neither which profile it holds nor the model's types, and its step counter may have been rounded to
float16. So the user names the profiles, the step is taken from the file's name, and tensors have the types they were
stored in. ema-pytorch casts counters of batches with all else: from 2048 on a float16 is no exact number of them,
beyond 65504 it is infinite. Here they are integers again, with the step of the file's name where theirs was lost.

Files are loaded with ``weights_only=True`` and mapped, not read: their bytes come when synthesis asks for them. A
tensor's bytes are compared with the checksum that torch wrote right before synthesis gets the first of them: then they
come from the disk once.

Longer than the house's 300 lines because what such a file may hold, and how it is read, belong on one page.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import zipfile
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nitrous_ema._base.dtypes import AVERAGE_DTYPES, CODES, DTYPE_BYTES
from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotNotFound
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.snapshots.filesystem import open_regular
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.layout import TensorRecord
from nitrous_ema.snapshots.names import parse_folder_name, parse_old_file_name
from nitrous_ema.snapshots.torch_archive import Checksums, check_part, check_places, load_torch_file, plain_tensor

if TYPE_CHECKING:
    import torch

_PREFIX = "ema_model."
_RUN = "legacy"
_HELD_OF_TENSOR_BYTES = 3 << 10  # measured: 2.8 kB


class LegacyFolder:
    """A folder of ``{profile}.{step}.pt`` files, whose profiles the user names.

    Args:
        root: The folder.
        sigma_rels: The tracked profiles in the order in which the trainer was given them, or
        gammas: the same as exponents. Exactly one of the two.

    Raises:
        ValueError: Both or neither of sigma_rels and gammas, or files of more or fewer profiles than are named.
        SnapshotNotFound: No such folder, or it has no such files.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        sigma_rels: Sequence[float] | None = None,
        gammas: Sequence[float] | None = None,
    ) -> None:
        if (sigma_rels is None) == (gammas is None):
            raise ValueError("sigma_rels and gammas: exactly one of them names the tracked profiles.")
        self.root = Path(root)
        self.gammas = tuple(float(each) for each in gammas or ()) or tuple(
            float(sigma_rel_to_gamma(each)) for each in sigma_rels or ()
        )
        self._paths = self._find()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with files, whole or not, ascending."""
        return tuple(sorted(self._paths))

    def snapshots(self, *, exclude: Collection[int] = ()) -> list[LegacySnapshot]:
        """All steps, ascending, but those to leave out."""
        return [self._snapshot(step) for step in self.steps if step not in exclude]

    @cached_property
    def run(self) -> str:
        """Name of the training: another one for other files, and where other profiles are named.

        What is made of a folder is recognized by it later. The files of the first whole step stand for all.
        """
        for step in self.steps:
            snapshot = LegacySnapshot(step, self._paths[step], self.gammas, _RUN)
            with suppress(OSError, ValueError, zipfile.BadZipFile):
                named = f"{snapshot.fingerprint()} {self.gammas!r}"
                return f"{_RUN}-{hashlib.sha256(named.encode()).hexdigest()[:8]}"
        return _RUN

    def _snapshot(self, step: int) -> LegacySnapshot:
        return LegacySnapshot(step, self._paths[step], self.gammas, self.run)

    def get(self, step: int | None = None, *, exclude: Collection[int] = ()) -> LegacySnapshot:
        """The snapshot of one step, the last one by default.

        Raises:
            SnapshotNotFound: There is none; names the nearest steps.
        """
        snapshots = self.snapshots(exclude=exclude)
        found = [snapshot for snapshot in snapshots if step in (None, snapshot.step)]
        if found:
            return found[-1]
        nearest = sorted(sorted((each.step for each in snapshots), key=lambda each: abs(each - (step or 0)))[:2])
        raise SnapshotNotFound(
            f"{self.root} has no files of step {step}; nearest steps: {', '.join(map(str, nearest)) or 'none'}.",
            path=self.root,
            nearest=tuple(nearest),
        )

    def _find(self) -> dict[int, dict[int, Path]]:
        """Files by step and profile."""
        paths = files_by_step(self.root)
        if not paths:
            is_ours = any(parse_folder_name(name) for name in os.listdir(self.root))
            remedy = "; its snapshots are of this version and know their profiles: leave these out" if is_ours else ""
            raise SnapshotNotFound(
                f"{self.root} has no files named {{i}}.{{step}}.pt{remedy}.", path=self.root, nearest=()
            )
        highest = max(max(profiles) for profiles in paths.values())
        if highest + 1 != len(self.gammas):
            raise ValueError(
                f"{self.root} has files of {highest + 1} profiles, but {len(self.gammas)} are named; "
                "name all that were tracked, in their order."
            )
        return paths


def files_by_step(root: str | os.PathLike[str]) -> dict[int, dict[int, Path]]:
    """The files of such a folder by step and profile; empty if it has none.

    Raises:
        SnapshotNotFound: No such folder.
        SnapshotError: It cannot be listed.
    """
    folder = Path(root)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SnapshotNotFound(f"{folder}: no such folder.", path=folder, nearest=()) from error
    except OSError as error:
        raise SnapshotError(f"{folder} cannot be listed: {error}", path=folder) from error
    paths: dict[int, dict[int, Path]] = {}
    for name in names:
        if (found := parse_old_file_name(name)) is not None:
            profile, step = found
            paths.setdefault(step, {})[profile] = folder / name
    return paths


class LegacySnapshot:
    """The averages of one step, with the attributes that synthesis needs of a snapshot."""

    t_first = None

    def __init__(self, step: int, paths: Mapping[int, Path], gammas: Sequence[float], run: str) -> None:
        self.run = run
        self.lineage: Lineage = ((run, None),)
        self.step = step
        self.t: float = step
        self._paths = [paths[profile] for profile in sorted(paths)]
        self.gammas = tuple(gammas[profile] for profile in sorted(paths))

    @property
    def path(self) -> Path:
        """Its first file."""
        return self._paths[0]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files, one per profile."""
        return tuple(self._paths)

    def fingerprint(self) -> str:
        """Of its files: names, sizes and checksums of their parts. No numbers are read.

        Raises:
            OSError: A file cannot be opened.
            zipfile.BadZipFile: One is no archive.
            ValueError: One is no regular file.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                for part in archive.infolist():
                    digest.update(f"{part.filename}\n{part.file_size}\n{part.CRC}\n".encode())
        return digest.hexdigest()[:32]

    def check(self) -> None:
        """Open all of its files and compare their tensors, as reading them does later. Reads no numbers.

        Raises:
            SnapshotDamaged: One is not what was saved, or they differ in their tensors.
        """
        for source in self.averages:
            _loaded(source)

    @cached_property
    def records(self) -> tuple[TensorRecord, ...]:
        """The tensors of its first file, in the types in which they are stored."""
        try:
            return tuple(_record(name, tensor) for name, tensor in _load(self.path).tensors.items())
        except ValueError as error:
            raise _damaged(self.path, str(error)) from error

    @cached_property
    def average_spans(self) -> tuple[tuple[int, int], ...]:
        """Per averaged tensor its (begin, end) in the flat average, in elements."""
        return tuple(_spans([each.stored_elements for each in self.records if each.role == "averaged"]))

    @cached_property
    def averages(self) -> tuple[LegacySource, ...]:
        """One source per profile."""
        averaged = tuple(each for each in self.records if each.role == "averaged")
        return tuple(LegacySource(path, averaged, _common_type(averaged)) for path in self._paths)

    @cached_property
    def copied(self) -> LegacySource | None:
        """Integer tensors, as bytes; the trainer never updated them."""
        records = self._copied_records
        return LegacySource(self.path, records, "U8") if records else None

    @cached_property
    def copied_spans(self) -> dict[str, tuple[int, int]]:
        """Where each of these lies in ``copied``."""
        sizes = [math.prod(each.shape) * DTYPE_BYTES[each.dtype] for each in self._copied_records]
        return {each.name: span for each, span in zip(self._copied_records, _spans(sizes), strict=True)}

    @property
    def _copied_records(self) -> tuple[TensorRecord, ...]:
        copied = (each for each in self.records if each.role == "copied")
        return tuple(sorted(copied, key=lambda each: -DTYPE_BYTES[each.dtype]))


@dataclass(frozen=True, slots=True)
class LegacySource:
    """Some tensors of one file, back to back, in one type."""

    path: Path
    records: tuple[TensorRecord, ...]
    dtype: str
    """Type of the numbers handed out; "U8" hands out the bytes as they are stored."""

    @property
    def num_bytes(self) -> int:
        """Length of what is handed out."""
        if self.dtype == "U8":
            return sum(math.prod(each.shape) * DTYPE_BYTES[each.dtype] for each in self.records)
        return sum(each.stored_elements for each in self.records) * DTYPE_BYTES[self.dtype]

    @property
    def chunk_bytes(self) -> int:
        """A tensor is checked as a whole before its first byte is handed out."""
        return 1

    @property
    def held_bytes(self) -> int:
        """Mapped tensors as torch's objects."""
        return _HELD_OF_TENSOR_BYTES * len(self.records)

    def reader(self, files: object) -> _Reader:
        """A reader at the first byte; it maps the file itself."""
        return _Reader(self)


class _Reader:
    def __init__(self, source: LegacySource) -> None:
        self._source = source
        self._position = 0  # of read_into()
        self._lock = threading.Lock()
        self._flats: Iterator[torch.Tensor] | None = None  # mapped at the first read; guarded by _lock, as the next two
        self._begins: list[int] = []  # of the tensors that were checked, in numbers; only ever appended to
        self._checked: list[torch.Tensor] = []

    def read_into(self, out: memoryview) -> None:
        self.read_at(self._position, out)
        self._position += len(out)

    def read_at(self, begin: int, out: memoryview) -> None:
        import torch

        name = next(name for name, code in CODES.items() if code == self._source.dtype)
        left = torch.frombuffer(out, dtype=getattr(torch, name))
        position = begin // left.element_size()
        index = self._check_until(position, position + len(left))
        while left.numel():
            inside = position - self._begins[index]
            piece = self._checked[index][inside : inside + len(left)]
            left[: len(piece)].copy_(piece)
            left, position, index = left[len(piece) :], position + len(piece), index + 1

    def _check_until(self, begin: int, end: int) -> int:
        """Check all tensors before a position; returns the one that holds another position."""
        with self._lock:
            if self._flats is None:
                self._flats = _flats(self._source)
            while not self._begins or self._begins[-1] + len(self._checked[-1]) < end:
                flat = next(self._flats)
                self._begins.append(self._begins[-1] + len(self._checked[-1]) if self._begins else 0)
                self._checked.append(flat)
            return bisect_right(self._begins, begin) - 1


class _Loaded(NamedTuple):
    """The averaged model's tensors by the model's own names, mapped, and what their parts should have as checksums."""

    tensors: dict[str, torch.Tensor]
    checksums: Checksums
    repaired: frozenset[str]
    """Tensors that are not the file's own: already checked."""


def _loaded(source: LegacySource) -> _Loaded:
    """Its file, which must hold the source's tensors."""
    loaded = _load(source.path)
    for record in source.records:
        tensor = loaded.tensors.get(record.name)
        if tensor is None or tuple(tensor.shape) != record.shape or _code(tensor) != record.dtype:
            raise _damaged(source.path, f"{brief(repr(record.name))} is not as in the other files of its step")
    return loaded


def _flats(source: LegacySource) -> Iterator[torch.Tensor]:
    """The tensors of a source as one-dimensional ones, in the source's type or in one that converts to it."""
    import torch

    tensors, checksums, repaired = _loaded(source)
    checked: set[int] = set()  # tensors may share their part
    for record in source.records:
        tensor = tensors[record.name]
        if record.name not in repaired and (begin := tensor.untyped_storage().data_ptr()) not in checked:
            checked.add(begin)
            try:
                check_part(tensor, checksums)
            except ValueError as error:
                raise _damaged(source.path, f"{brief(repr(record.name))}: {error}") from error
        plain = plain_tensor(tensor, file_bytes=tensor.numel() * tensor.element_size())
        if source.dtype == "U8":
            yield plain.reshape(-1).view(torch.uint8)
        else:
            yield (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1)


def _load(path: Path) -> _Loaded:
    """What such a file holds."""
    import torch

    try:
        file_bytes, state = path.stat().st_size, load_torch_file(path)
    except (ValueError, FileNotFoundError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error}", path=path) from error
    tensors, mapped = {}, []
    for key, value in state.items() if isinstance(state, dict) else ():
        if not isinstance(value, torch.Tensor):
            continue
        mapped.append(value)
        try:
            plain_tensor(value, file_bytes=file_bytes)
        except ValueError as error:
            raise _damaged(path, f"{brief(repr(key))}: {error}") from error
        # Everything else is a counter, or the model that was trained.
        if isinstance(key, str) and key.startswith(_PREFIX):
            tensors[key.removeprefix(_PREFIX)] = value
            if str(value.dtype).removeprefix("torch.") not in CODES:
                raise _damaged(path, f"{brief(repr(key))} has the type {value.dtype}, which cannot be read here")
    try:
        checksums = check_places(path, mapped)
    except (ValueError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if not any(_is_averaged(_code(tensor)) for tensor in tensors.values()):
        raise _damaged(path, f"no floating tensor in it has a name that starts with {_PREFIX!r}")
    try:
        repaired = _repaired_counters(tensors, checksums, _step_of(path))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return _Loaded({**tensors, **repaired}, checksums, frozenset(repaired))


def _repaired_counters(tensors: Mapping[str, torch.Tensor], checksums: Checksums, step: int) -> dict[str, torch.Tensor]:
    """Counters of batches that were cast to a floating type, as integers: what they held if that is certain.

    Neither library updates them, so they say how many batches the model had seen when its EMA was made: mostly none.
    """
    import torch

    repaired = {}
    for name, tensor in tensors.items():
        module, _, attribute = name.rpartition("num_batches_tracked")
        is_counter = attribute == "" and tensor.dim() == 0 and f"{module}running_mean" in tensors
        if is_counter and tensor.is_floating_point():
            check_part(tensor, checksums)
            held, limit = float(tensor), 2 / torch.finfo(tensor.dtype).eps
            is_exact = 0 <= held < limit and held == int(held)
            repaired[name] = torch.tensor(int(held) if is_exact else step, dtype=torch.int64)
    return repaired


def _record(name: str, tensor: torch.Tensor) -> TensorRecord:
    return TensorRecord(
        name=name,
        keys=(name,),
        dtype=_code(tensor),
        shape=tuple(tensor.shape),
        role="averaged" if _is_averaged(_code(tensor)) else "copied",
    )


def _damaged(path: Path, found: str) -> SnapshotDamaged:
    step = _step_of(path)
    return SnapshotDamaged(
        f"{path}: {found}. Leave this snapshot out with exclude=[{step}] (on the command line: --exclude {step}).",
        path=path,
        step=step,
        chunk=None,
    )


def _step_of(path: Path) -> int:
    return int(path.name.split(".")[1])


def _code(tensor: torch.Tensor) -> str:
    return CODES[str(tensor.dtype).removeprefix("torch.")]


def _is_averaged(code: str) -> bool:
    return code in AVERAGE_DTYPES or code == "C64"


def _common_type(records: Sequence[TensorRecord]) -> str:
    """A type that holds the numbers of all these tensors exactly."""
    found = {"F32" if each.dtype == "C64" else each.dtype for each in records}
    return found.pop() if len(found) == 1 else "F64" if "F64" in found else "F32"


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    spans, begin = [], 0
    for size in sizes:
        spans.append((begin, begin + size))
        begin += size
    return spans
