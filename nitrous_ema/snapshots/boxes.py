"""Boxes: the parts of a tensor that ranks hold, and whether they make the tensor whole.

A rank's part of a tensor is a contiguous box: in each dimension a begin and a size. Nothing here knows of torch, so
readers of snapshots use it without torch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_CELLS_PER_BOX, _FEW_CELLS = 64, 4096


class Box(NamedTuple):
    """A part of a tensor."""

    offset: tuple[int, ...]
    """Index of the first element, one for each dimension."""
    shape: tuple[int, ...]
    """Sizes, one for each dimension; a size of 0 is an empty part."""

    def intersection(self, other: Box) -> Box | None:
        """Return the part that two boxes of one tensor share; None if they share no element."""
        begins = tuple(map(max, self.offset, other.offset))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        shape = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return Box(begins, shape) if all(size > 0 for size in shape) else None

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Return the index of this box in an array that holds an outer box."""
        return tuple(
            slice(begin - first, begin - first + size) for begin, size, first in zip(*self, outer.offset, strict=True)
        )


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box that is a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def chunk(begin: int, size: int, parts: int, index: int) -> tuple[int, int]:
    """Return begin and size of one of the parts into which ``torch.chunk`` divides a range; the last may be empty."""
    step = -(-size // parts)
    first = min(index * step, size)
    return begin + first, min(step, size - first)


def box_of(shape: Sequence[int], placements: Sequence[Any], mesh_shape: Sequence[int], at: Sequence[int]) -> Box:
    """Return the box of a DTensor that one rank holds.

    Placements are recognized by their public attributes, whose classes differ between releases of torch. Dimensions of
    the mesh divide the tensor from left to right; strided shards divide last, because they were made last, by FSDP over
    a dimension that tensor parallelism had divided already. The caller compares the result with the local tensor.

    Args:
        shape: Shape of the whole tensor.
        placements: One for each dimension of the mesh.
        mesh_shape: Sizes of the mesh.
        at: This rank's coordinate in the mesh.

    Raises:
        ValueError: A placement is neither a replica nor a part (partial sums).
    """
    begins, sizes = [0] * len(shape), list(shape)
    order = sorted(range(len(placements)), key=lambda axis: getattr(placements[axis], "split_factor", 1) > 1)
    for axis in order:
        placement = placements[axis]
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise ValueError(f"has the placement {placement}, which is neither a replica nor a part of the tensor")
        begins[dim], sizes[dim] = chunk(begins[dim], sizes[dim], mesh_shape[axis], at[axis])
    return Box(tuple(begins), tuple(sizes))


def tiling(shape: Sequence[int], boxes: Sequence[Box]) -> list[int]:
    """Return the indices of the boxes that together are a whole tensor: of equal boxes the first, no empty ones.

    Args:
        shape: Shape of the whole tensor.
        boxes: Parts, of which several may be equal (replicas).

    Raises:
        ValueError: A box lies outside of the tensor, or the distinct boxes leave an element out or overlap; names the
            element.
    """
    first: dict[Box, int] = {}
    for index, box in enumerate(boxes):
        if not all(0 <= begin <= begin + size <= whole for begin, size, whole in zip(*box, shape, strict=True)):
            raise ValueError(f"a part with offset {box.offset} and shape {box.shape} is outside of {tuple(shape)}")
        if math.prod(box.shape):
            first.setdefault(box, index)
    if not math.prod(shape):
        return []
    # The boundaries of all boxes divide the tensor into cells, each of which must belong to one box. Boundaries of one
    # sharding are few; those of forged headers may be so many that the cells do not fit into memory.
    cuts = [
        sorted({0, whole, *(box.offset[dim] for box in first), *(box.offset[dim] + box.shape[dim] for box in first)})
        for dim, whole in enumerate(shape)
    ]
    cells = [len(cut) - 1 for cut in cuts]
    if math.prod(cells) > _CELLS_PER_BOX * len(first) + _FEW_CELLS:
        raise ValueError(f"{len(first)} parts divide {tuple(shape)} into {math.prod(cells)} cells, as no sharding does")
    counts = np.zeros(cells, dtype=np.int64)
    for box in first:
        counts[
            tuple(
                slice(bisect_left(cut, begin), bisect_left(cut, begin + size))
                for cut, begin, size in zip(cuts, *box, strict=True)
            )
        ] += 1
    wrong = np.argwhere(counts != 1)
    if len(wrong):
        cell = tuple(map(int, wrong[0]))
        element = tuple(cut[place] for cut, place in zip(cuts, cell, strict=True))
        found = int(counts[cell])
        raise ValueError(
            f"element {element} is in {'none' if found == 0 else found} of the {len(first)} different parts; expected 1"
        )
    return list(first.values())
