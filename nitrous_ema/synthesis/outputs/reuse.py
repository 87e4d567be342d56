"""Which outputs are there already: whole, of the same recipe, with the same tensors.

An output gets its name when it is durable, so a file with the right header and the right size is whole. Its header says
what it was made of; the numbers that follow from that (errors, amplification) are not compared: another machine's solve
may differ in their last digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitrous_ema.snapshots.filesystem import open_regular
from nitrous_ema.synthesis.outputs.layout import OutputLayout, metadata_of
from nitrous_ema.synthesis.outputs.reader import read_header
from nitrous_ema.synthesis.outputs.shards import index_path, index_text, part_names, part_path
from nitrous_ema.synthesis.plan import Plan

_FOLLOWS_FROM_THE_RECIPE = ("library_version", "profile_error", "weight_l1", "weight_l2", "rounding", "lower_bound")


@dataclass(frozen=True, slots=True)
class ExpectedOutput:
    """One file that a plan gives."""

    path: Path
    """Where it belongs; the name of its part, if it is one."""
    num_bytes: int
    """Its size; of a ``.pt`` file that of its numbers, which is hardly less."""
    is_there: bool
    """Whether such a file exists, and its index if this is the part that writes it. Never so for ``.pt`` files, which
    do not say what they are made of."""


def expected_outputs(
    plan: Plan,
    paths: Sequence[Path],
    *,
    dtype: str | None = None,
    accumulate: str = "float64",
    part: int = 0,
    parts: int = 1,
    in_parts: bool = False,
) -> list[ExpectedOutput]:
    """The files that ``write_outputs``, or ``write_shard``, will write for a plan. Reads headers, writes nothing.

    Args:
        plan: The averages.
        paths: One per output, as given to the writer.
        dtype: As given to the writer; so are ``accumulate``, ``part`` and ``parts``.
        accumulate: Type of products and sums.
        part: Which part.
        parts: Of how many.
        in_parts: Whether ``write_shard`` will write them.

    Raises:
        NitrousError: A tensor has a type that averages cannot be rounded to.
    """
    names = part_names(plan, dtype, parts) if in_parts else None
    contents = {
        suffix: OutputLayout(plan, dtype, tied_once=suffix == ".pt", names=names[part] if names else None)
        for suffix in {path.suffix for path in paths}
    }
    expected: list[ExpectedOutput] = []
    for index, path in enumerate(paths):
        file = part_path(path, part, parts) if names else path
        content, metadata = contents[path.suffix], metadata_of(plan, index, accumulate)
        if path.suffix == ".pt":
            expected.append(ExpectedOutput(file, content.data_bytes, False))
            continue
        is_there = _is_whole(file, content, metadata)
        if is_there and names and part == 0:
            is_there = _holds(index_path(path), index_text(plan, dtype, names, path).encode())
        expected.append(ExpectedOutput(file, len(content.header(metadata)) + content.data_bytes, is_there))
    return expected


def _is_whole(path: Path, contents: OutputLayout, metadata: dict[str, str]) -> bool:
    """Whether a file has this recipe and these tensors, and their bytes."""
    try:
        found, data_begin, file_bytes = read_header(path)
    except (OSError, ValueError):
        return False
    if type(found) is not dict or type(found.get("__metadata__")) is not dict:
        return False
    is_made_so = _recipe(found["__metadata__"]) == _recipe(metadata)
    return file_bytes - data_begin == contents.data_bytes and is_made_so and contents.are_named_by(found)


def _recipe(metadata: dict[str, Any]) -> dict[str, Any]:
    """What metadata say of how an average is made."""
    return {key: value for key, value in metadata.items() if key not in _FOLLOWS_FROM_THE_RECIPE}


def _holds(path: Path, content: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(content) + 1) == content
    except (OSError, ValueError):
        return False
