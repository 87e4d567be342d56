"""Read snapshot folders of nitrous-ema 0.0.1 and ema-pytorch: one file ``{profile}.{step}.pt`` per average.

Such a file records neither its profile nor the model's types, and its step counter may have been rounded to float16. So
the user passes the profiles, the step is parsed from the file name, and tensors have the types in which they are
stored. ema-pytorch casts counters of batches with all other tensors: from 2048 on float16 does not hold every integer,
and beyond 65504 it is infinite. Such counters become integers again here; a counter whose value was lost gets the step
of the file name.

Files are loaded with ``weights_only=True`` and mapped: their bytes are read when synthesis requests them. Right
before synthesis gets the first bytes of a tensor, the whole tensor is compared with the checksum that torch wrote. So
its bytes come from the disk once.

Longer than 300 lines because the contents of such a file and their validation belong on one page.
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

from nitrous_ema._base.arguments import choose_step, pluralize
from nitrous_ema._base.dtypes import CODES, DTYPE_BYTES, STORED_DTYPES
from nitrous_ema._base.paths import local_path
from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotNotFound
from nitrous_ema.profile import checked_lengths, sigma_rel_to_gamma
from nitrous_ema.snapshots.bounded_json import brief
from nitrous_ema.snapshots.disk_space import explained
from nitrous_ema.snapshots.filesystem import FileSystem, open_regular
from nitrous_ema.snapshots.header import Lineage
from nitrous_ema.snapshots.layout import TensorRecord
from nitrous_ema.snapshots.names import exclusion_hint, parse_folder_name, parse_legacy_file_name
from nitrous_ema.snapshots.torch_archive import (
    Checksums,
    load_torch_file,
    locate_storages,
    open_archive,
    plain_tensor,
    verify_storage,
)
from nitrous_ema.snapshots.wrong_folder import right_folder

if TYPE_CHECKING:
    import torch

_PREFIX = "ema_model."  # of the averaged model's tensors; the others are counters, or the model that was trained
_RUN = "legacy"
_HELD_OF_TENSOR_BYTES = 3 << 10  # measured: 2.8 kB


class LegacyFolder:
    """A folder of ``{profile}.{step}.pt`` files, whose profiles the user passes.

    Args:
        root: The folder.
        sigma_rels: Lengths of the tracked profiles, in the order in which the trainer tracked them, or
        gammas: their exponents. Exactly one of the two.

    Raises:
        ValueError: Both or neither of sigma_rels and gammas, or files of more or fewer profiles than were passed.
        SnapshotNotFound: The folder does not exist, or has no such files.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        sigma_rels: Sequence[float] | None = None,
        gammas: Sequence[float] | None = None,
    ) -> None:
        if (sigma_rels is None) == (gammas is None):
            raise ValueError(
                "pass exactly one of sigma_rels and gammas, the tracked profiles; got "
                f"{'neither' if gammas is None else 'both'} of them."
            )
        self.root = local_path("root", root)
        checked_lengths("sigma_rels", list(sigma_rels or ()))
        self.gammas = tuple(float(each) for each in gammas or ()) or tuple(
            float(sigma_rel_to_gamma(each)) for each in sigma_rels or ()
        )
        self._paths = self._find()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with files, damaged or not, ascending."""
        return tuple(sorted(self._paths))

    def snapshots(self, *, exclude: Collection[int] = ()) -> list[LegacySnapshot]:
        """Return the snapshots of all steps, ascending, without the steps in ``exclude``."""
        return [self._snapshot(step) for step in self.steps if step not in exclude]

    @cached_property
    def run(self) -> str:
        """Name of the training, which depends on the files and on the profiles.

        Outputs record this name, by which they are reused later. The fingerprint of the first intact step stands for
        all files.
        """
        for step in self.steps:
            snapshot = LegacySnapshot(step, self._paths[step], self.gammas, _RUN)
            with suppress(OSError, ValueError, zipfile.BadZipFile):
                source = f"{snapshot.fingerprint()} {self.gammas!r}"
                return f"{_RUN}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        return _RUN

    def _snapshot(self, step: int) -> LegacySnapshot:
        return LegacySnapshot(step, self._paths[step], self.gammas, self.run)

    def get(self, step: int | str | None = None, *, exclude: Collection[int] = ()) -> LegacySnapshot:
        """Return the snapshot of one step, by default of the last one; for ``"nearest:1234"`` that nearest to 1234.

        Raises:
            SnapshotNotFound: The step has no files, or is excluded; the message has the nearest steps.
        """
        steps = [each for each in self.steps if each not in exclude]
        if (chosen := choose_step(step, steps)) is not None:
            return self._snapshot(chosen)
        number = step if isinstance(step, int) else 0
        nearest = sorted(sorted(steps, key=lambda each: abs(each - number))[:2])
        raise SnapshotNotFound(
            f"{self.root} has no files of step {step}; nearest steps: {', '.join(map(str, nearest)) or 'none'}.",
            path=self.root,
            nearest=tuple(nearest),
        )

    def _find(self) -> dict[int, dict[int, Path]]:
        """Return the files by step and profile, after checking the number of profiles."""
        paths = files_by_step(self.root)
        if not paths:
            is_ours = any(parse_folder_name(name) for name in FileSystem().list(self.root))
            remedy = (
                " Its snapshots are in the current format, which records the profiles: omit --tracked-sigma-rel and "
                "--tracked-gamma (in Python, use SnapshotStore)."
            )
            hint = remedy if is_ours else f" {right_folder(FileSystem(), self.root) or 'Check the path.'}"
            raise SnapshotNotFound(
                f"{self.root} has no files named {{i}}.{{step}}.pt.{hint}",
                path=self.root,
                nearest=(),
            )
        # A file name has only the profile's position in the list, so an incomplete list could assign wrong profiles.
        highest = max(max(profiles) for profiles in paths.values())
        if highest + 1 != len(self.gammas):
            raise ValueError(
                f"{self.root} has files of {pluralize(highest + 1, 'profile')}, but {len(self.gammas)} "
                f"{'was' if len(self.gammas) == 1 else 'were'} passed. "
                "Pass every tracked profile, in the order of tracking."
            )
        return paths


def files_by_step(root: str | os.PathLike[str]) -> dict[int, dict[int, Path]]:
    """Return the ``{profile}.{step}.pt`` files of a folder by step and profile; empty for a folder without any.

    Raises:
        SnapshotNotFound: The folder does not exist.
        SnapshotError: The folder cannot be listed.
    """
    folder = Path(root)
    try:
        names = FileSystem().list(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SnapshotNotFound(f"{folder}: no such folder. Check the path.", path=folder, nearest=()) from error
    except OSError as error:
        raise SnapshotError(f"{folder} cannot be listed: {explained(error, folder)}", path=folder) from error
    paths: dict[int, dict[int, Path]] = {}
    for name in names:
        if (found := parse_legacy_file_name(name)) is not None:
            profile, step = found
            paths.setdefault(step, {})[profile] = folder / name
    return paths


class LegacySnapshot:
    """The averages of one step, as a ``SnapshotView``. Files are opened when an attribute needs them."""

    t_first = None  # not recorded in these files

    def __init__(self, step: int, paths: Mapping[int, Path], gammas: Sequence[float], run: str) -> None:
        self.run = run
        self.lineage: Lineage = ((run, None),)
        self.step = step
        self.t: float = step
        self._paths = [paths[profile] for profile in sorted(paths)]
        self.gammas = tuple(gammas[profile] for profile in sorted(paths))
        self.nonfinite = (None,) * len(self.gammas)  # not recorded in these files

    @property
    def path(self) -> Path:
        """First file of the snapshot."""
        return self._paths[0]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files of the snapshot, one per profile."""
        return tuple(self._paths)

    def fingerprint(self) -> str:
        """Return a digest of the names, sizes and checksums of all archive members. No numbers are read.

        Raises:
            OSError: A file cannot be opened.
            zipfile.BadZipFile: A file is not an archive.
            ValueError: A path is not a regular file.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            with open_regular(path) as file, open_archive(file) as archive:
                for member in archive.infolist():
                    digest.update(f"{member.filename}\n{member.file_size}\n{member.CRC}\n".encode())
        return digest.hexdigest()[:32]

    def check(self) -> None:
        """Open all files and compare their tensors by name, shape and type, as reading does later. Reads no numbers.

        Raises:
            SnapshotDamaged: A file is invalid, or its tensors differ from the first file's.
        """
        for source in self.averages:
            _load_for(source)

    @cached_property
    def records(self) -> tuple[TensorRecord, ...]:
        """The tensors of the first file, in the types in which they are stored."""
        try:
            return tuple(_record(name, tensor) for name, tensor in _load(self.path).tensors.items())
        except ValueError as error:
            raise _damaged(self.path, str(error)) from error

    @cached_property
    def average_spans(self) -> tuple[tuple[int, int], ...]:
        """For each averaged tensor: its (begin, end) in the flat average, in elements."""
        return tuple(_spans([each.stored_elements for each in self.records if each.role == "averaged"]))

    @cached_property
    def averages(self) -> tuple[LegacySource, ...]:
        """One source per profile."""
        averaged = tuple(each for each in self.records if each.role == "averaged")
        return tuple(LegacySource(path, averaged, _common_type(averaged)) for path in self._paths)

    @cached_property
    def copied(self) -> LegacySource | None:
        """Integer tensors, as bytes (neither library updates them); None for a model without any."""
        records = self._copied_records
        return LegacySource(self.path, records, "U8") if records else None

    @cached_property
    def copied_spans(self) -> dict[str, tuple[int, int]]:
        """For each copied tensor, by name: its (begin, end) in ``copied``, in bytes."""
        sizes = [math.prod(each.shape) * DTYPE_BYTES[each.dtype] for each in self._copied_records]
        return {each.name: span for each, span in zip(self._copied_records, _spans(sizes), strict=True)}

    @property
    def _copied_records(self) -> tuple[TensorRecord, ...]:
        # The order of Layout.copied: an import copies these bytes into that section as they are.
        copied = (each for each in self.records if each.role == "copied")
        return tuple(sorted(copied, key=lambda each: -DTYPE_BYTES[each.dtype]))


@dataclass(frozen=True, slots=True)
class LegacySource:
    """Tensors of one file, back to back, in one type: a ``Source``."""

    path: Path
    """The file."""
    records: tuple[TensorRecord, ...]
    """The tensors, in the order in which they are read."""
    dtype: str
    """Type to which the numbers are converted; with "U8" the stored bytes are returned."""

    @property
    def num_bytes(self) -> int:
        """Length after conversion."""
        if self.dtype == "U8":
            return sum(math.prod(each.shape) * DTYPE_BYTES[each.dtype] for each in self.records)
        return sum(each.stored_elements for each in self.records) * DTYPE_BYTES[self.dtype]

    @property
    def chunk_bytes(self) -> int:
        """1: the reader verifies a whole tensor before it returns the first of its bytes."""
        return 1

    @property
    def held_bytes(self) -> int:
        """Upper bound of the memory for torch's objects of mapped tensors."""
        return _HELD_OF_TENSOR_BYTES * len(self.records)

    def reader(self, files: object) -> _LegacyReader:
        """Return a reader at the first byte. The reader maps the file itself and does not use ``files``."""
        return _LegacyReader(self)


class _LegacyReader:
    def __init__(self, source: LegacySource) -> None:
        self._source = source
        self._position = 0  # of read_into()
        self._lock = threading.Lock()
        self._tensors: Iterator[torch.Tensor] | None = None  # mapped at the first read; guarded by _lock
        # Appended to under _lock and never changed otherwise, so that read_at() may index verified tensors without it.
        self._begins: list[int] = []  # of the verified tensors, in elements
        self._verified: list[torch.Tensor] = []

    def read_into(self, out: memoryview) -> None:
        self.read_at(self._position, out)
        self._position += len(out)

    def read_at(self, begin: int, out: memoryview) -> None:
        import torch

        name = next(name for name, code in CODES.items() if code == self._source.dtype)
        remaining = torch.frombuffer(out, dtype=getattr(torch, name))
        position = begin // remaining.element_size()
        index = self._verify_until(position, position + len(remaining))
        while remaining.numel():
            inside = position - self._begins[index]
            piece = self._verified[index][inside : inside + len(remaining)]
            remaining[: len(piece)].copy_(piece)  # converts to the type of the source
            remaining, position, index = remaining[len(piece) :], position + len(piece), index + 1

    def finish(self) -> None:
        """Do nothing: a tensor is verified before any of its numbers is returned."""

    def _verify_until(self, begin: int, end: int) -> int:
        """Verify all tensors before element ``end``, and return the index of the tensor with element ``begin``."""
        with self._lock:
            if self._tensors is None:
                self._tensors = _flat_tensors(self._source)
            while not self._begins or self._begins[-1] + len(self._verified[-1]) < end:
                flat = next(self._tensors)
                self._begins.append(self._begins[-1] + len(self._verified[-1]) if self._begins else 0)
                self._verified.append(flat)
            return bisect_right(self._begins, begin) - 1


class _Loaded(NamedTuple):
    """The averaged model in one file."""

    tensors: dict[str, torch.Tensor]
    """Mapped tensors by the model's own names."""
    checksums: Checksums
    """Expected checksums of their storages."""
    repaired: frozenset[str]
    """Names of tensors that replace the file's own tensors, which were verified already."""


def _load_for(source: LegacySource) -> _Loaded:
    """Load the file of a source, and check that it holds the source's tensors."""
    loaded = _load(source.path)
    for record in source.records:
        tensor = loaded.tensors.get(record.name)
        if tensor is None or tuple(tensor.shape) != record.shape or _dtype_code(tensor) != record.dtype:
            raise _damaged(
                source.path,
                f"{brief(repr(record.name))} is missing, or differs in shape or type from the first file of this step",
            )
    return loaded


def _flat_tensors(source: LegacySource) -> Iterator[torch.Tensor]:
    """Yield the tensors of a source, flat and verified, in the source's type or in a type that converts to it."""
    import torch

    tensors, checksums, repaired = _load_for(source)
    verified: set[int] = set()  # addresses of storages; tied tensors share one
    for record in source.records:
        tensor = tensors[record.name]
        if record.name not in repaired and (begin := tensor.untyped_storage().data_ptr()) not in verified:
            verified.add(begin)
            try:
                verify_storage(tensor, checksums)
            except ValueError as error:
                raise _damaged(source.path, f"{brief(repr(record.name))}: {error}") from error
        # Only to resolve lazy conjugation: _load() has compared the size with the file's.
        plain = plain_tensor(tensor, file_bytes=tensor.numel() * tensor.element_size())
        if source.dtype == "U8":
            yield plain.reshape(-1).view(torch.uint8)
        else:
            yield (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1)


def _load(path: Path) -> _Loaded:
    """Load and check one file."""
    import torch

    try:
        file_bytes, state = FileSystem().status(path).st_size, load_torch_file(path)
    except (ValueError, FileNotFoundError) as error:  # the folder listed this file, so a missing file is damage
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {explained(error, path)}", path=path) from error
    tensors, mapped = {}, []
    for key, value in state.items() if isinstance(state, dict) else ():
        if not isinstance(value, torch.Tensor):
            continue
        mapped.append(value)
        try:
            plain_tensor(value, file_bytes=file_bytes)
        except ValueError as error:
            raise _damaged(path, f"{brief(repr(key))}: {error}") from error
        if isinstance(key, str) and key.startswith(_PREFIX):
            tensors[key.removeprefix(_PREFIX)] = value
            if str(value.dtype).removeprefix("torch.") not in CODES:
                raise _damaged(path, f"{brief(repr(key))} has dtype {value.dtype}, which is not supported")
    # All tensors of the file, not only the averaged ones: the more storages, the fewer addresses of the mapping fit.
    try:
        checksums = locate_storages(path, mapped)
    except (ValueError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if not any(_is_averaged(_dtype_code(tensor)) for tensor in tensors.values()):
        raise _damaged(path, f"it has no floating-point tensor whose name starts with {_PREFIX!r}")
    try:
        repaired = _repaired_counters(tensors, checksums, _step_of(path))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return _Loaded({**tensors, **repaired}, checksums, frozenset(repaired))


def _repaired_counters(tensors: Mapping[str, torch.Tensor], checksums: Checksums, step: int) -> dict[str, torch.Tensor]:
    """Return, as integers, the batch counters that were cast to a floating-point type.

    A counter keeps its value if the type holds it exactly, and gets ``step`` otherwise. Neither library updates these
    counters: they hold the number of batches that the model had seen when its EMA was created, mostly 0.
    """
    import torch

    repaired = {}
    for name, tensor in tensors.items():
        module, _, attribute = name.rpartition("num_batches_tracked")
        # A scalar beside running_mean is the counter of a batch norm; any other floating-point tensor is averaged.
        is_counter = attribute == "" and tensor.dim() == 0 and f"{module}running_mean" in tensors
        if is_counter and tensor.is_floating_point():
            verify_storage(tensor, checksums)
            # Below 2 / eps (2048 for float16) every integer is exact; 2048 itself may be a rounded 2049.
            held, limit = float(tensor), 2 / torch.finfo(tensor.dtype).eps
            is_exact = 0 <= held < limit and held == int(held)
            repaired[name] = torch.tensor(int(held) if is_exact else step, dtype=torch.int64)
    return repaired


def _record(name: str, tensor: torch.Tensor) -> TensorRecord:
    return TensorRecord(
        name=name,
        keys=(name,),
        dtype=_dtype_code(tensor),
        shape=tuple(tensor.shape),
        role="averaged" if _is_averaged(_dtype_code(tensor)) else "copied",
    )


def _damaged(path: Path, reason: str) -> SnapshotDamaged:
    step = _step_of(path)
    return SnapshotDamaged(f"{path}: {reason}. {exclusion_hint(step)}", path=path, step=step, chunk=None)


def _step_of(path: Path) -> int:
    return int(path.name.split(".")[1])


def _dtype_code(tensor: torch.Tensor) -> str:
    return CODES[str(tensor.dtype).removeprefix("torch.")]


def _is_averaged(code: str) -> bool:
    return code in STORED_DTYPES or code == "C64"


def _common_type(records: Sequence[TensorRecord]) -> str:
    """Return a type that holds the numbers of all these tensors exactly."""
    found = {"F32" if each.dtype == "C64" else each.dtype for each in records}
    return found.pop() if len(found) == 1 else "F64" if "F64" in found else "F32"


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    spans, begin = [], 0
    for size in sizes:
        spans.append((begin, begin + size))
        begin += size
    return spans
