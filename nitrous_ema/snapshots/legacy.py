"""Snapshot folders of nitrous-ema 0.0.1 and ema-pytorch, read only: one file ``{profile}.{step}.pt`` per average.

Such a file says neither which profile it holds nor the model's types, and its step counter may have been rounded to
float16. So the user names the profiles, the step is taken from the file's name, and tensors have the types they were
stored in. Files are loaded with ``weights_only=True`` and mapped, not read: their bytes come when synthesis asks for
them. They have no checksums.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitrous_ema.errors import SnapshotDamaged, SnapshotNotFound
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.snapshots.format import DTYPE_BYTES, Lineage, TensorRecord

if TYPE_CHECKING:
    import torch

_FILE = re.compile(r"([0-9]+)\.([0-9]+)\.pt")
_PREFIX = "ema_model."
_REAL = ("F64", "F32", "F16", "BF16")
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class LegacyFolder:
    """A folder of ``{profile}.{step}.pt`` files, whose profiles the user names.

    Args:
        root: The folder.
        sigma_rels: The tracked profiles in the order in which the trainer was given them, or
        gammas: the same as exponents. Exactly one of the two.

    Raises:
        ValueError: Both or neither of sigma_rels and gammas, or files of more profiles than are named.
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

    def snapshots(self, *, exclude: Collection[int] = ()) -> list[LegacySnapshot]:
        """All steps, ascending, but those to leave out."""
        return [
            LegacySnapshot(step, self._paths[step], self.gammas) for step in sorted(self._paths) if step not in exclude
        ]

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
        try:
            names = os.listdir(self.root)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SnapshotNotFound(f"{self.root}: no such folder.", path=self.root, nearest=()) from error
        paths: dict[int, dict[int, Path]] = {}
        for name in names:
            if (found := _FILE.fullmatch(name)) is not None and int(found[2]) > 0:
                paths.setdefault(int(found[2]), {})[int(found[1])] = self.root / name
        if not paths:
            raise SnapshotNotFound(f"{self.root} has no files named {{i}}.{{step}}.pt.", path=self.root, nearest=())
        highest = max(max(profiles) for profiles in paths.values())
        if highest >= len(self.gammas):
            raise ValueError(
                f"{self.root} has files of {highest + 1} profiles, but {len(self.gammas)} are named; "
                "name all that were tracked, in their order."
            )
        return paths


class LegacySnapshot:
    """The averages of one step, with the attributes that synthesis needs of a snapshot."""

    t_first = None
    run = "legacy"
    lineage: Lineage = (("legacy", None),)

    def __init__(self, step: int, paths: Mapping[int, Path], gammas: Sequence[float]) -> None:
        self.step = step
        self.t = float(step)
        self._paths = [paths[profile] for profile in sorted(paths)]
        self.gammas = tuple(gammas[profile] for profile in sorted(paths))

    @property
    def path(self) -> Path:
        """Its first file."""
        return self._paths[0]

    @cached_property
    def records(self) -> tuple[TensorRecord, ...]:
        """The tensors of its first file, in the types in which they are stored."""
        return tuple(
            TensorRecord(
                name=name,
                keys=(name,),
                dtype=_code(tensor),
                shape=tuple(tensor.shape),
                role="averaged" if _is_averaged(_code(tensor)) else "copied",
            )
            for name, tensor in _load(self.path).items()
        )

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

    def reader(self, files: object) -> _Reader:
        """A reader at the first byte; it maps the file itself."""
        return _Reader(self)


class _Reader:
    def __init__(self, source: LegacySource) -> None:
        self._source = source
        self._flats: list[torch.Tensor] | None = None  # mapped at the first read
        self._position = 0  # in the first of them

    def read_into(self, out: memoryview) -> None:
        import torch

        if self._flats is None:
            self._flats = _flats(self._source)
        name = next(name for name, code in _CODES.items() if code == self._source.dtype)
        left = torch.frombuffer(out, dtype=getattr(torch, name))
        while left.numel():
            flat = self._flats[0][self._position :]
            count = min(len(flat), len(left))
            left[:count].copy_(flat[:count])
            left, self._position = left[count:], self._position + count
            if count == len(flat):
                del self._flats[0]
                self._position = 0


def _flats(source: LegacySource) -> list[torch.Tensor]:
    """The tensors of a source as one-dimensional ones, in the source's type or in one that converts to it."""
    import torch

    tensors = _load(source.path)
    flats = []
    for record in source.records:
        tensor = tensors.get(record.name)
        if tensor is None or tuple(tensor.shape) != record.shape or _code(tensor) != record.dtype:
            raise _damaged(source.path, f"{record.name!r} is not as in the other files of its step")
        if source.dtype == "U8":
            flats.append(tensor.reshape(-1).view(torch.uint8))
        else:
            flats.append((torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1))
    return flats


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The averaged model's tensors by the model's own names, mapped."""
    import torch

    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise _damaged(path, f"torch cannot load it ({str(error).splitlines()[0]})") from error
    tensors = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        # Everything else is a counter, or the model that was trained.
        if key.startswith(_PREFIX) and isinstance(value, torch.Tensor):
            tensors[key.removeprefix(_PREFIX)] = value
    if not any(_is_averaged(_code(tensor)) for tensor in tensors.values()):
        raise _damaged(path, f"no floating tensor in it has a name that starts with {_PREFIX!r}")
    return tensors


def _damaged(path: Path, found: str) -> SnapshotDamaged:
    step = int(path.name.split(".")[1])
    return SnapshotDamaged(
        f"{path}: {found}. Leave this snapshot out with exclude=[{step}] (on the command line: --exclude {step}).",
        path=path,
        step=step,
        chunk=None,
    )


def _code(tensor: torch.Tensor) -> str:
    return _CODES[str(tensor.dtype).removeprefix("torch.")]


def _is_averaged(code: str) -> bool:
    return code in _REAL or code == "C64"


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
