"""Divide an average into parts, for several processes that each write one file of it.

Parts end where tensors end, in the order of the flat average, and have about the same size. So each process reads
hardly more than its part of the snapshots. All functions here depend on the plan and the number of parts alone, so the
processes agree without communicating.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.synthesis.outputs.layout import OutputLayout
from nitrous_ema.synthesis.plan import Plan

INDEX_SUFFIX = ".safetensors.index.json"


def part_names(plan: Plan, dtype: str | None, parts: int) -> list[frozenset[str]]:
    """Return the canonical names of the tensors of each part.

    A tensor belongs to the part that contains its middle. If a tensor is longer than a part, some parts are empty.

    Args:
        plan: The averages.
        dtype: Type of the real floating tensors; None for each tensor's own type in the model.
        parts: Number of parts.
    """
    sizes: dict[str, int] = {}
    for entry in OutputLayout(plan, dtype).entries:
        size = math.prod(entry.record.shape) * DTYPE_BYTES[entry.dtype]
        sizes[entry.record.name] = sizes.get(entry.record.name, 0) + size
    roles = ("averaged", "copied")
    order = [each.name for role in roles for each in plan.target.records if each.role == role and each.name in sizes]
    names: list[list[str]] = [[] for _ in range(parts)]
    total, begin = max(sum(sizes.values()), 1), 0
    for name in order:
        middle = 2 * begin + sizes[name]  # doubled, and so is total below: whole numbers have no rounding
        names[min(middle * parts // (2 * total), parts - 1)].append(name)
        begin += sizes[name]
    return [frozenset(each) for each in names]


def part_path(path: Path, part: int, parts: int) -> Path:
    """Return the path of one part of ``<stem>.safetensors``; ``part`` counts from 0."""
    return path.with_name(f"{path.name.removesuffix('.safetensors')}-{part + 1:05d}-of-{parts:05d}.safetensors")


def index_path(path: Path) -> Path:
    """Return the path of the index, which names the file of each tensor of ``<stem>.safetensors``."""
    return path.with_name(path.name.removesuffix(".safetensors") + INDEX_SUFFIX)


def index_text(plan: Plan, dtype: str | None, names: Sequence[frozenset[str]], path: Path) -> str:
    """Return the content of the index, as transformers and diffusers read it.

    Args:
        plan: The averages.
        dtype: Type of the real floating tensors; None for each tensor's own type in the model.
        names: The tensors of each part, from ``part_names``.
        path: ``<stem>.safetensors``.

    Source:
        huggingface_hub, serialization/_base.py: ``weight_map`` and ``metadata.total_size``, in bytes.
    """
    part_of = {name: part for part, each in enumerate(names) for name in each}
    entries = OutputLayout(plan, dtype).entries
    weight_map = {
        entry.key: part_path(path, part_of[entry.record.name], len(names)).name
        for entry in sorted(entries, key=lambda entry: entry.key)
    }
    total_size = sum(entry.end - entry.begin for entry in entries)
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2) + "\n"
