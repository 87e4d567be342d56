"""Parts of tensors: their boxes against ``torch.chunk``, and whether parts make a tensor whole."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from nitrous_ema.snapshots.boxes import Box, box_of, chunk, tiling, whole_box


class Strided(Shard):
    """The placement that FSDP2 gives to a dimension which tensor parallelism has divided already."""

    split_factor = 2


@pytest.mark.parametrize("size", [0, 1, 3, 7, 8, 13])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6])
def test_chunk_is_that_of_torch(size, parts):
    expected = [each.tolist() for each in torch.arange(size).chunk(parts)] if size else []
    found = [list(range(begin, begin + n)) for begin, n in (chunk(0, size, parts, index) for index in range(parts))]
    assert [each for each in found if each] == [each for each in expected if each]


def test_box_of_a_shard_along_each_mesh_dimension():
    mesh = (2, 3)
    for row, column in itertools.product(range(2), range(3)):
        # Shard(0) over both dimensions of the mesh: torch.chunk of a torch.chunk, from left to right.
        rows = torch.arange(7).chunk(2)[row].chunk(3)
        expected = rows[column].tolist() if column < len(rows) else []
        box = box_of((7, 5), (Shard(0), Shard(0)), mesh, (row, column))
        assert list(range(box.offset[0], box.offset[0] + box.shape[0])) == expected
        assert (box.offset[1], box.shape[1]) == (0, 5)


def test_strided_shard_divides_what_the_other_dimensions_left():
    for row, column in itertools.product(range(3), range(2)):
        # 7 rows on 3 x 2: tensor parallelism first (columns of the mesh: 4 + 3), then FSDP over the three rows.
        parts = torch.arange(7).chunk(2)[column].chunk(3)
        expected = parts[row].tolist() if row < len(parts) else []
        box = box_of((7, 5), (Strided(0), Shard(0)), (3, 2), (row, column))
        assert list(range(box.offset[0], box.offset[0] + box.shape[0])) == expected


def test_replicas_have_the_whole_tensor_and_partial_sums_are_refused():
    assert box_of((4, 6), (Replicate(), Shard(1)), (2, 2), (1, 1)) == Box((0, 3), (4, 3))
    with pytest.raises(ValueError, match="neither a replica nor a part"):
        box_of((4,), (torch.distributed.tensor.Partial(),), (2,), (0,))


def test_random_tilings_are_whole_and_a_hole_or_an_overlap_is_found():
    rng = random.Random(0)
    for _ in range(500):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 4)))
        boxes = [whole_box(shape)]
        for _ in range(rng.randint(0, 5)):  # cut one of the boxes in two
            victim = boxes.pop(rng.randrange(len(boxes)))
            dim = rng.randrange(len(shape))
            size = victim.shape[dim]
            at = rng.randint(0, size)
            for begin, length in ((0, at), (at, size - at)):
                offset, sizes = list(victim.offset), list(victim.shape)
                offset[dim] += begin
                sizes[dim] = length
                boxes.append(Box(tuple(offset), tuple(sizes)))
        replicas = boxes + [boxes[rng.randrange(len(boxes))] for _ in range(2)]
        used = tiling(shape, replicas)
        counts = np.zeros(shape, int)
        for index in used:
            counts[replicas[index].slices_in(whole_box(shape))] += 1
        assert (counts == 1).all()
        assert all(index < len(boxes) for index in used), "the first of equal parts counts"
        filled = [box for box in boxes if all(box.shape)]
        missing = rng.choice(filled)
        with pytest.raises(ValueError, match="is in none of the" if len(filled) > 1 else "none"):
            tiling(shape, [box for box in filled if box != missing])
        if len(filled) > 1:
            with pytest.raises(ValueError, match="is in 2 of the"):
                tiling(shape, [*filled, whole_box(shape)])


def test_part_outside_and_parts_that_no_sharding_makes_are_refused():
    with pytest.raises(ValueError, match=r"offset \(3,\) and shape \(2,\) is outside of \(4,\)"):
        tiling((4,), [Box((3,), (2,))])
    scattered = [Box((i, i, i), (1, 1, 1)) for i in range(1, 200, 2)]
    with pytest.raises(ValueError, match="as no sharding does"):
        tiling((200, 200, 200), scattered)


def test_tensor_without_elements_and_scalar_are_whole():
    assert tiling((0, 5), [Box((0, 0), (0, 5))]) == []
    assert tiling((), [Box((), ()), Box((), ())]) == [0]
