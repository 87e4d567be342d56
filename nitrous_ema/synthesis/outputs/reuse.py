"""Decide which outputs can be reused: files that exist, are whole, and have the same recipe and the same tensors.

An output gets its name only when it is durable, so a file with the right header and the right size is whole. The
*recipe* is the metadata in its header that determines the average: run, step, length, snapshots read, tolerance and so
on. Numbers that follow from the recipe (errors, amplification) are not compared, because the solve on another machine
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

_DERIVED_FROM_RECIPE = ("library_version", "profile_error", "weight_l1", "weight_l2", "rounding", "lower_bound")


@dataclass(frozen=True, slots=True)
class ExpectedOutput:
    """One file that the writer will write for a plan."""

    path: Path
    """The file; the file of one part if the average is written in parts."""
    num_bytes: int
    """Size of the file; for a ``.pt`` file the size of its numbers, which is slightly less."""
    is_reusable: bool
    """Whether this file exists already, with its index if this is the part that writes the index. Always False for
    ``.pt`` files, which do not record their recipe."""


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
    """Return the files that ``write_outputs`` or ``write_shard`` will write for a plan. Reads headers, writes nothing.

    Args:
        plan: The averages.
        paths: One per output, as passed to the writer.
        dtype: As passed to the writer, like ``accumulate``, ``part`` and ``parts``.
        accumulate: Type of products and sums.
        part: Index of the part, counted from 0.
        parts: Number of parts.
        in_parts: Whether ``write_shard`` will write the files.

    Raises:
        NitrousError: A tensor has a type that averages cannot be rounded to.
    """
    names = part_names(plan, dtype, parts) if in_parts else None
    layouts = {
        suffix: OutputLayout(plan, dtype, tied_once=suffix == ".pt", names=names[part] if names else None)
        for suffix in {path.suffix for path in paths}
    }
    expected: list[ExpectedOutput] = []
    for index, path in enumerate(paths):
        file = part_path(path, part, parts) if names else path
        layout, metadata = layouts[path.suffix], metadata_of(plan, index, accumulate)
        if path.suffix == ".pt":
            expected.append(ExpectedOutput(file, layout.data_bytes, False))
            continue
        is_reusable = _matches(file, layout, metadata)
        # Part 0 writes the index as well, so without its index the part has to be written again.
        if is_reusable and names and part == 0:
            is_reusable = _has_content(index_path(path), index_text(plan, dtype, names, path).encode())
        expected.append(ExpectedOutput(file, len(layout.header(metadata)) + layout.data_bytes, is_reusable))
    return expected


def _matches(path: Path, layout: OutputLayout, metadata: dict[str, str]) -> bool:
    """Return whether a file has this recipe, these tensors, and as many bytes as they need."""
    try:
        found, data_begin, file_bytes = read_header(path)
    except (OSError, ValueError):
        return False
    if type(found) is not dict or type(found.get("__metadata__")) is not dict:
        return False
    has_recipe = _recipe(found["__metadata__"]) == _recipe(metadata)
    return file_bytes - data_begin == layout.data_bytes and has_recipe and layout.matches_header(found)


def _recipe(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key not in _DERIVED_FROM_RECIPE}


def _has_content(path: Path, content: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(content) + 1) == content  # one byte more, so that a longer file differs
    except (OSError, ValueError):
        return False
