"""File names of outputs: by step and length in a folder, or by a template such as ``{run}/step-{step}.safetensors``.

Braces hold the name of a field, with an optional format (``{step:09d}``). Doubled braces stand for themselves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Protocol

from nitrous_ema._base.paths import local_path

FIELDS = ("run", "step", "t", "sigma_rel", "gamma")
_SUFFIXES = {"safetensors": ".safetensors", "pt": ".pt"}
_DOUBLED = str.maketrans({"{": "{{", "}": "}}"})


class TargetSnapshot(Protocol):
    """The properties of a target snapshot that can be part of a name."""

    @property
    def step(self) -> int:
        """Number of update() calls before the snapshot."""

    @property
    def t(self) -> float:
        """Training time at the snapshot."""

    @property
    def run(self) -> str:
        """Run that wrote the snapshot."""


@dataclass(frozen=True, slots=True)
class OutputNames:
    """The name of every output, from ``--out`` and ``--format``.

    Args:
        out: A folder, or a template.
        format: File format, "safetensors" or "pt"; None follows the suffix of the template, else safetensors.

    Raises:
        ValueError: ``out`` is empty or looks like one file, the template has an unknown field or an invalid format, or
            its suffix contradicts ``format``.
    """

    out: str
    format: str | None = None

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError(
                "--out is empty; expected a folder ('.' for the working directory) or a template of file names."
            )
        object.__setattr__(self, "out", os.fspath(local_path("--out", self.out)))
        from nitrous_ema.snapshots.filesystem import is_folder  # here, because it loads numpy

        fields = self.fields
        stem, suffix = os.path.splitext(self.out)
        if not fields and suffix in _SUFFIXES.values() and not is_folder(Path(self.out)):
            raise ValueError(
                f"--out {self.out!r} looks like a single file; expected a folder, or a name with a field that differs "
                f"between outputs, such as '{stem}-{{sigma_rel}}{suffix}'."
            )
        if unknown := [field for field in fields if field not in FIELDS]:
            known = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(
                f"--out {self.out!r}: unknown field {{{unknown[0]}}}; expected one of {known}. "
                "Write {{ and }} for braces that belong to a name."
            )
        if fields and suffix not in ([_SUFFIXES[self.format]] if self.format else _SUFFIXES.values()):
            expected = _SUFFIXES[self.format] if self.format else " or ".join(_SUFFIXES.values())
            raise ValueError(f"--out {self.out!r}: the file name is expected to end in {expected}.")
        # Values of each field's type: an invalid format is reported before any snapshot is read.
        self._fill(dict.fromkeys(FIELDS, 0) | {"run": ""})

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the template; empty for a folder."""
        try:
            return tuple(name for _, name, _, _ in Formatter().parse(self.out) if name is not None)
        except ValueError as error:
            raise ValueError(
                f"--out {self.out!r}: {error}. Write {{{{ and }}}} for braces that belong to a name."
            ) from None

    def of(self, target: TargetSnapshot, lengths: Sequence[tuple[float, float]]) -> list[Path]:
        """Return the paths of the averages that end at one snapshot, in the order of the lengths.

        Args:
            target: The target snapshot.
            lengths: sigma_rel and gamma of each average.
        """
        if self.fields:
            known = {"run": target.run, "step": target.step, "t": target.t}
            return [Path(self._fill({**known, "sigma_rel": each[0], "gamma": each[1]})) for each in lengths]
        from nitrous_ema.synthesis.outputs.writer import output_name  # loads numpy, which must wait for thread limits

        folder, suffix = Path(self._fill({})), _SUFFIXES[self.format or "safetensors"]
        return [folder / output_name(target.step, sigma_rel, suffix) for sigma_rel, _ in lengths]

    def of_all(self, targets: Sequence[TargetSnapshot], lengths: Sequence[tuple[float, float]]) -> list[list[Path]]:
        """Return the paths of the averages of several snapshots, one list per snapshot.

        Raises:
            ValueError: The template gives two averages the same name.
        """
        paths = [self.of(target, lengths) for target in targets]
        owners: dict[Path, str] = {}
        for target, of_target in zip(targets, paths, strict=True):
            for path, (sigma_rel, _) in zip(of_target, lengths, strict=True):
                owner = f"sigma_rel {sigma_rel!r} at step {target.step}"
                if owners.setdefault(path, owner) != owner:
                    raise ValueError(
                        f"--out {self.out!r} gives {owners[path]} and {owner} the same name, {path}. Add "
                        "{sigma_rel} or {gamma} to the template, and {step} if averages end at several steps."
                    )
        return paths

    def _fill(self, values: dict[str, object]) -> str:
        try:
            return self.out.format_map(values)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"--out {self.out!r}: {error}; expected a format that fits the field.") from None


def absolute(out: str | os.PathLike[str]) -> str:
    """Return a folder or template that means the same in any working directory.

    Braces of the working directory are doubled, so that they do not become fields. An empty name stays empty, and
    ``OutputNames`` refuses it.
    """
    name = os.fspath(local_path("out", out)) if os.fspath(out) else ""
    return name if not name or os.path.isabs(name) else os.path.join(os.getcwd().translate(_DOUBLED), name)
