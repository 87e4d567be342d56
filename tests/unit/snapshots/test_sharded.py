"""Snapshots of several ranks: read as one, whatever their parts; contradictions and damage are errors."""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nitrous_ema.errors import SnapshotDamaged, SnapshotMismatch
from nitrous_ema.snapshots.boxes import Box, whole_box
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.pieces import source_paths
from nitrous_ema.snapshots.readable_snapshot import stored_snapshot_view
from nitrous_ema.snapshots.reading import OpenFiles, element_bytes
from nitrous_ema.snapshots.sharded import ShardedSnapshotView
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis import synthesize
from tests.support.snapshot_folders import (
    layout_of,
    random_averages,
    record,
    run_id,
    stored,
    write_run,
    write_sharded,
    write_snapshot,
)

RUN = run_id()


def rows(shape: tuple[int, ...], parts: int, dim: int = 0) -> list[Box]:
    """Divide a tensor along one dimension as numpy's ``array_split`` does, so that parts differ in size."""
    found = []
    for part in np.array_split(np.arange(shape[dim]), parts):
        offset, sizes = [0] * len(shape), list(shape)
        offset[dim], sizes[dim] = int(part[0]) if len(part) else shape[dim], len(part)
        found.append(Box(tuple(offset), tuple(sizes)))
    return found


def grid(shape: tuple[int, ...], rows_: int, columns: int) -> list[Box]:
    """Divide a tensor along its first and its last dimension."""
    return [
        Box((*upper.offset[:-1], side.offset[-1]), (*upper.shape[:-1], side.shape[-1]))
        for upper in rows(shape, rows_)
        for side in rows(shape, columns, len(shape) - 1)
    ]


LAYOUT = layout_of(
    [
        record("first", (7, 5)),
        record("index", (3, 4), "I64", "copied"),
        record("norm", (6,)),
        record("mask", (5,), "BOOL", "copied"),
        record("deep", (4, 3, 2, 5)),
        record("complex", (4, 3), "C64"),
        record("scalar", ()),
        record("empty", (0, 3)),
        record("skipped", (9,), role="skipped"),
    ],
    chunk_bytes=64,
)
COPIED = {"index": np.arange(12, dtype=np.int64).tobytes(), "mask": bytes([1, 0, 1, 1, 0])}
FOUR = {
    "first": rows((7, 5), 4),
    "index": rows((3, 4), 4, 1),
    "deep": grid((4, 3, 2, 5), 2, 2),
    "complex": rows((4, 3), 4, 1),
    "mask": rows((5,), 4),
}


def read_all(source) -> bytes:
    out = bytearray(source.num_bytes)
    with OpenFiles(source_paths(source)) as files:
        reader = source.reader(files)
        reader.read_into(memoryview(out))
        reader.finish()
    return bytes(out)


@pytest.mark.parametrize("boxes", [FOUR, {name: [*cut, *cut] for name, cut in FOUR.items()}], ids=["4", "replicated"])
@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
def test_parts_are_read_as_the_whole(tmp_path, boxes, dtype):
    layout = replace(LAYOUT, checkpoint_dtype=dtype)
    averages = random_averages(layout)(5)
    write_sharded(tmp_path, layout, 5, averages, COPIED, boxes=boxes, run=RUN)
    snapshot = SnapshotStore(tmp_path).get()
    view = stored_snapshot_view(snapshot)
    assert [read_all(each) for each in view.averages] == [stored(each, dtype) for each in averages]
    copied = read_all(view.copied)
    assert {name: copied[begin:end] for name, (begin, end) in view.copied_spans.items()} == COPIED
    assert (view.records, snapshot.layout.sha256) == (layout.records, layout.sha256)
    assert SnapshotStore(tmp_path).verify() == []


def test_any_range_of_any_sharding_is_right(tmp_path):
    rng = random.Random(1)
    for case in range(40):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 4)))
        boxes = [whole_box(shape)]
        for _ in range(rng.randint(1, 5)):
            boxes += rows_of(boxes.pop(rng.randrange(len(boxes))), rng)
        layout = layout_of([record("a", (3,)), record("w", shape), record("b", (2,))], (0.1,), chunk_bytes=16)
        averages = random_averages(layout, case)(1)
        root = tmp_path / str(case)
        write_sharded(root, layout, 1, averages, boxes={"w": boxes}, run=RUN)
        source = stored_snapshot_view(SnapshotStore(root).get()).averages[0]
        expected = stored(averages[0], "F32")
        with OpenFiles(source_paths(source)) as files:
            for _ in range(20):
                reader = source.reader(files)
                begin, end = sorted(rng.choices(range(0, len(expected) + 1, element_bytes(source)), k=2))
                out = bytearray(end - begin)
                reader.read_at(begin, memoryview(out))
                reader.finish()
                assert bytes(out) == expected[begin:end]


def rows_of(box: Box, rng: random.Random) -> list[Box]:
    dim = rng.randrange(len(box.shape))
    found = []
    for part in rows(box.shape, 2, dim):
        found.append(Box(tuple(a + b for a, b in zip(box.offset, part.offset, strict=True)), part.shape))
    return found


def test_no_bit_of_an_output_depends_on_the_number_of_files(tmp_path):
    layout = layout_of([record("w", (64, 48)), record("b", (100,))], chunk_bytes=1 << 10)
    averages, steps, lengths = random_averages(layout), (100, 200, 400), (0.07, 0.12)
    write_run(tmp_path / "1", layout, steps, averages=averages, run=RUN)
    expected = [each.tobytes() for each in synthesize(tmp_path / "1", sigma_rels=lengths).flats]
    cuts = {
        "2": {"w": rows((64, 48), 2), "b": rows((100,), 2)},
        "3": {"w": rows((64, 48), 3, 1), "b": rows((100,), 3)},
        "4": {"w": grid((64, 48), 2, 2), "b": rows((100,), 4)},
        "8": {"w": grid((64, 48), 4, 2)},
    }
    for name, boxes in cuts.items():
        for step in steps:
            write_sharded(tmp_path / name, layout, step, averages(step), boxes=boxes, run=RUN)
        assert [each.tobytes() for each in synthesize(tmp_path / name, sigma_rels=lengths).flats] == expected


def test_run_that_changed_its_number_of_ranks_is_one_history(tmp_path):
    layout = layout_of([record("w", (8, 6))])
    averages = random_averages(layout)
    write_snapshot(tmp_path, layout, 100, averages(100), run=RUN)
    for step, parts in ((200, 2), (300, 3), (400, 4)):
        write_sharded(tmp_path, layout, step, averages(step), boxes={"w": rows((8, 6), parts)}, run=RUN)
    write_run(tmp_path / "whole", layout, (100, 200, 300, 400), averages=averages, run=RUN)
    found, expected = (synthesize(root, sigma_rels=(0.07,)).flats[0] for root in (tmp_path, tmp_path / "whole"))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("cut", "what"),
    [
        (
            [Box((0, 0), (3, 5)), Box((4, 0), (3, 5))],
            r"'first' of shape \(7, 5\) whole: element \(3, 0\) is in none of",
        ),
        ([Box((0, 0), (4, 5)), Box((3, 0), (4, 5))], r"'first' of shape \(7, 5\) whole: element \(3, 0\) is in 2 of"),
    ],
)
def test_parts_that_leave_a_hole_or_overlap_are_an_error_naming_tensor_element_and_files(tmp_path, cut, what):
    write_sharded(tmp_path, LAYOUT, 5, random_averages(LAYOUT)(5), COPIED, boxes={"first": cut}, run=RUN)
    expected = rf"{what} .*rank 0 has .*rank 1 has .*exclude=\[5\]"
    with pytest.raises(SnapshotMismatch, match=expected):
        synthesize(tmp_path, sigma_rels=(0.07,))
    (failure,) = SnapshotStore(tmp_path).verify()
    assert re.search(expected, failure.message)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("t", {"t": 7}), ("t_first", {"t_first": 2}), ("lineage", {"lineage": ((run_id(1), 2), (RUN, None))})],
)
def test_ranks_that_disagree_are_an_error_when_the_averages_are_read(tmp_path, name, fields):
    boxes = {"first": rows((7, 5), 2)}
    write_sharded(tmp_path, LAYOUT, 5, random_averages(LAYOUT)(5), COPIED, boxes=boxes, run=RUN, stamps=[{}, fields])
    snapshot = SnapshotStore(tmp_path).get()
    with pytest.raises(SnapshotMismatch, match=rf"the files of ranks 0 and 1 differ in {name}: .*exclude=\[5\]"):
        _ = stored_snapshot_view(snapshot).averages
    (failure,) = SnapshotStore(tmp_path).verify()
    assert f"differ in {name}" in failure.message


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_damage_beside_a_replica_that_is_not_read_is_noticed(tmp_path):
    """A chunk of rank 1 holds its part of ``first`` and a replica of ``norm``. Only the part is read."""
    layout = layout_of([record("norm", (6,)), record("first", (8,))], (0.1,), chunk_bytes=64)
    paths = write_sharded(tmp_path, layout, 5, random_averages(layout)(5), boxes={"first": rows((8,), 2)}, run=RUN)
    begin = SnapshotStore(tmp_path).get().data_begin
    flip(paths[1], begin + 5)  # in the replica
    with pytest.raises(SnapshotDamaged, match=r"rank-00001-of-00002.*checksum mismatch"):
        synthesize(tmp_path, sigma_rels=(0.1,))


def test_verify_compares_replicas(tmp_path):
    layout = layout_of([record("norm", (6,)), record("first", (8,))], (0.1, 0.2), chunk_bytes=64)
    averages = random_averages(layout)(5)
    boxes = {"first": rows((8,), 2)}
    write_sharded(tmp_path / "a", layout, 5, averages, boxes=boxes, run=RUN)
    other = [each.copy() for each in averages]
    other[1][2] += 1.0  # of norm, in the second profile
    paths = write_sharded(tmp_path / "b", layout, 5, other, boxes=boxes, run=RUN)
    target = next((tmp_path / "a").glob("step-*")) / paths[1].name
    target.unlink()
    os.link(paths[1], target)
    (failure,) = SnapshotStore(tmp_path / "a").verify()
    assert failure.path == target
    assert "profile 1 of 'norm' differ from those in the file of rank 0" in failure.message


class Counting(FileSystem):
    def __init__(self) -> None:
        super().__init__()
        self.opened = 0

    def open_read(self, path):
        self.opened += 1
        return super().open_read(path)


def test_listing_opens_one_file_for_each_snapshot(tmp_path):
    layout, num_ranks = layout_of([record("w", (64, 2))]), 64
    (first, *_) = write_sharded(
        tmp_path, layout, 1, random_averages(layout)(1), boxes={"w": rows((64, 2), num_ranks)}, run=RUN
    )
    for step in range(2, 21):
        write_sharded(tmp_path, layout, step, random_averages(layout)(step), boxes={"w": rows((64, 2), 2)}, run=RUN)
    files = Counting()
    store = SnapshotStore(tmp_path, files=files)
    listed = store.snapshots()
    assert [each.step for each in listed] == list(range(1, 21))
    assert files.opened <= len(listed) + 1  # the newest snapshot's header is read once more, for the lineage
    assert len(listed[0].paths) == num_ranks
    assert listed[0].bytes >= sum(path.stat().st_size for path in first.parent.iterdir())


def test_headers_of_other_ranks_are_read_once_the_averages_are(tmp_path):
    write_sharded(tmp_path, LAYOUT, 5, random_averages(LAYOUT)(5), COPIED, boxes=FOUR, run=RUN)
    files = Counting()
    view = ShardedSnapshotView(SnapshotStore(tmp_path).get(), files=files)
    assert (view.gammas, view.t, files.opened) == (LAYOUT.gammas, 5, 0)
    assert len(view.averages) == 2
    assert files.opened == 3
