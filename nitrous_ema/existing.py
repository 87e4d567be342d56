"""Which outputs are there already: whole, of the same recipe, with the same tensors.

An output gets its name when it is durable, so a file with the right header and the right size is whole. Its header says
what it was made of; the numbers that follow from that (errors, amplification) are not compared: another machine's solve
may differ in their last digit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitrous_ema.output_contents import Contents, metadata_of
from nitrous_ema.shards import index_path, index_text, part_names, part_path
from nitrous_ema.snapshots.bounded_json import parse_json
from nitrous_ema.snapshots.format import MAX_HEADER_VALUES
from nitrous_ema.snapshots.torch_files import open_regular
from nitrous_ema.synthesis.plan import Plan

_FOLLOWS_FROM_THE_RECIPE = ("library_version", "profile_error", "weight_l1", "weight_l2", "rounding", "lower_bound")


@dataclass(frozen=True, slots=True)
class Expected:
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
) -> list[Expected]:
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
        suffix: Contents(plan, dtype, tied_once=suffix == ".pt", names=names[part] if names else None)
        for suffix in {path.suffix for path in paths}
    }
    expected: list[Expected] = []
    for index, path in enumerate(paths):
        file = part_path(path, part, parts) if names else path
        header = contents[path.suffix].header(metadata_of(plan, index, accumulate))
        data_bytes = max((entry.end for entry in contents[path.suffix].entries), default=0)
        if path.suffix == ".pt":
            expected.append(Expected(file, data_bytes, False))
            continue
        is_there = _is_whole(file, header, data_bytes)
        if is_there and names and part == 0:
            is_there = _holds(index_path(path), index_text(plan, dtype, names, path).encode())
        expected.append(Expected(file, len(header) + data_bytes, is_there))
    return expected


def _is_whole(path: Path, header: bytes, data_bytes: int) -> bool:
    """Whether a file has the recipe and the tensors of this header, and their bytes."""
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if os.fstat(file.fileno()).st_size != 8 + size + data_bytes:
                return False
            found = parse_json(file.read(size), max_values=MAX_HEADER_VALUES)
    except (OSError, ValueError):
        return False
    return bool(_recipe(found) == _recipe(parse_json(header[8:], max_values=MAX_HEADER_VALUES)))


def _recipe(header: Any) -> Any:
    """What a header says of the tensors and of what they are made of."""
    if type(header) is not dict or type(header.get("__metadata__")) is not dict:
        return None
    metadata = {key: value for key, value in header["__metadata__"].items() if key not in _FOLLOWS_FROM_THE_RECIPE}
    return {**header, "__metadata__": metadata}


def _holds(path: Path, content: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(content) + 1) == content
    except (OSError, ValueError):
        return False
