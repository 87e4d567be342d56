"""What outputs are called: in a folder by step and length, or by a template such as ``{run}/step-{step}.safetensors``.

Braces hold the name of a field, with a format if wanted (``{step:09d}``); doubled, they stand for themselves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Protocol

FIELDS = ("run", "step", "t", "sigma_rel", "gamma")
_SUFFIXES = {"safetensors": ".safetensors", "pt": ".pt"}
_DOUBLED = str.maketrans({"{": "{{", "}": "}}"})


class TargetSnapshot(Protocol):
    """What names are made of: a snapshot."""

    @property
    def step(self) -> int:
        """Number of update() calls."""

    @property
    def t(self) -> float:
        """Training time."""

    @property
    def run(self) -> str:
        """Run that wrote it."""


@dataclass(frozen=True, slots=True)
class OutputNames:
    """The name of every output.

    Args:
        out: A folder, or a template.
        format: Kind of file, "safetensors" or "pt"; by default as the template's name ends, else safetensors.

    Raises:
        ValueError: Nothing, a field that does not exist, or a template that does not end as the format says.
    """

    out: str
    format: str | None = None

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError(
                "--out is empty; expected a folder or a template of names ('.' for the working directory)."
            )
        fields = self.fields
        if not fields and os.path.splitext(self.out)[1] in _SUFFIXES.values() and not os.path.isdir(self.out):
            raise ValueError(
                f"--out {self.out!r} looks like one file; expected a folder, or a name with a field for what there may "
                f"be several of, as in '{os.path.splitext(self.out)[0]}-{{sigma_rel}}{os.path.splitext(self.out)[1]}'."
            )
        if unknown := [field for field in fields if field not in FIELDS]:
            there = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(
                f"--out {self.out!r}: unknown field {{{unknown[0]}}}; there are {there}. "
                "Write {{ and }} for braces that belong to a name."
            )
        suffix = os.path.splitext(self.out)[1]
        if fields and suffix not in ([_SUFFIXES[self.format]] if self.format else _SUFFIXES.values()):
            expected = _SUFFIXES[self.format] if self.format else " or ".join(_SUFFIXES.values())
            raise ValueError(f"--out {self.out!r}: the name of a file is expected to end in {expected}.")
        self._filled(dict.fromkeys(FIELDS, 0) | {"run": ""})  # a format that does not fit is told now

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the template; none if it is a folder."""
        try:
            return tuple(name for _, name, _, _ in Formatter().parse(self.out) if name is not None)
        except ValueError as error:
            raise ValueError(
                f"--out {self.out!r}: {error}. Write {{{{ and }}}} for braces that belong to a name."
            ) from None

    def of(self, target: TargetSnapshot, lengths: Sequence[tuple[float, float]]) -> list[Path]:
        """Paths of the averages that end at one snapshot.

        Args:
            target: The snapshot.
            lengths: Of each average its sigma_rel and its gamma.
        """
        if self.fields:
            known = {"run": target.run, "step": target.step, "t": target.t}
            return [Path(self._filled({**known, "sigma_rel": each[0], "gamma": each[1]})) for each in lengths]
        from nitrous_ema.synthesis.outputs.writer import output_name

        folder, suffix = Path(self._filled({})), _SUFFIXES[self.format or "safetensors"]
        return [folder / output_name(target.step, sigma_rel, suffix) for sigma_rel, _ in lengths]

    def of_all(self, targets: Sequence[TargetSnapshot], lengths: Sequence[tuple[float, float]]) -> list[list[Path]]:
        """The same for several snapshots.

        Raises:
            ValueError: Two averages would have one name.
        """
        paths = [self.of(target, lengths) for target in targets]
        owners: dict[Path, str] = {}
        for target, of_target in zip(targets, paths, strict=True):
            for path, (sigma_rel, _) in zip(of_target, lengths, strict=True):
                owner = f"sigma_rel {sigma_rel!r} at step {target.step}"
                if owners.setdefault(path, owner) != owner:
                    raise ValueError(
                        f"--out {self.out!r} gives {owners[path]} and {owner} one name, {path}; expected a name for "
                        "each: use {sigma_rel} or {gamma}, and {step} where there are several."
                    )
        return paths

    def _filled(self, values: dict[str, object]) -> str:
        try:
            return self.out.format_map(values)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"--out {self.out!r}: {error}; expected a format that fits the field.") from None


def absolute(out: str | os.PathLike[str]) -> str:
    """A folder or template that means the same in any working directory; what is empty stays so, to be refused."""
    given = os.fspath(out)
    return given if not given or os.path.isabs(given) else os.path.join(os.getcwd().translate(_DOUBLED), given)
