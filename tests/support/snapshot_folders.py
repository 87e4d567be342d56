"""Snapshot folders made of given numbers, for tests of their readers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import torch

from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.snapshots.boxes import Box
from nitrous_ema.snapshots.header import Stamp
from nitrous_ema.snapshots.layout import Layout, TensorRecord
from nitrous_ema.snapshots.names import new_run_id
from nitrous_ema.snapshots.snapshot import Snapshot
from nitrous_ema.snapshots.store import SnapshotStore

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)


def run_id(number: int = 0) -> str:
    """Return a run id; run ids sort by number."""
    return new_run_id(EPOCH + timedelta(hours=number))


def record(name: str, shape: Sequence[int], dtype: str = "F32", role: str = "averaged", **more) -> TensorRecord:
    keys = (name, *more.pop("tied", ()))
    return TensorRecord(name=name, keys=keys, dtype=dtype, shape=tuple(shape), role=role, **more)


def layout_of(
    records: Sequence[TensorRecord],
    sigma_rels: Sequence[float] = (0.05, 0.10),
    checkpoint_dtype: str = "F32",
    chunk_bytes: int = 1 << 16,
) -> Layout:
    gammas = tuple(float(sigma_rel_to_gamma(each)) for each in sigma_rels)
    return Layout(
        records=tuple(records),
        gammas=gammas,
        sigma_rels=tuple(sigma_rels),
        checkpoint_dtype=checkpoint_dtype,
        chunk_bytes=chunk_bytes,
    )


def stored(values: np.ndarray, dtype: str) -> bytes:
    """Return the bytes of numbers as torch rounds and stores them."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(TORCH_TYPES[dtype]).view(torch.uint8).numpy().tobytes()


def write_snapshot(
    root: Path,
    layout: Layout,
    step: int,
    averages: Sequence[np.ndarray],
    copied: Mapping[str, bytes] | None = None,
    *,
    run: str,
    t: float | None = None,
    lineage: Sequence[tuple[str, int | None]] | None = None,
    trainer: Mapping[str, str | int | float] | None = None,
    t_first: float = 1,
) -> Snapshot:
    sections = [stored(average, layout.checkpoint_dtype) for average in averages]
    if layout.copied:
        sections.append(bytes(layout.padding_bytes) + b"".join(copied[each.name] for each in layout.copied))
    data = memoryview(b"".join(sections))
    stamp = Stamp(
        step=step,
        t=step if t is None else t,
        t_first=t_first,
        run=run,
        lineage=tuple(lineage or ((run, None),)),
        trainer=dict(trainer or {}),
    )
    root.mkdir(exist_ok=True)
    return SnapshotStore(root).write(layout, stamp, lambda: [data[begin:end] for begin, end in layout.chunks])


def write_sharded(
    root: Path,
    layout: Layout,
    step: int,
    averages: Sequence[np.ndarray],
    copied: Mapping[str, bytes] | None = None,
    *,
    boxes: Mapping[str, Sequence[Box]],
    run: str,
    stamps: Sequence[Mapping[str, object]] | None = None,
    **fields: object,
) -> list[Path]:
    """Write a snapshot of which each rank has a part: the numbers of ``write_snapshot``, cut out with numpy.

    Args:
        boxes: For each tensor the box of each rank; a tensor that is not named is whole in every file.
        stamps: Fields in which the ranks' stamps differ.
        fields: Fields of all stamps.
    """
    world_size = len(next(iter(boxes.values())))
    paths = []
    for rank in range(world_size):
        cuts = {name: of_ranks[rank] for name, of_ranks in boxes.items()}
        records = [
            replace(each, part=None if cut.shape == each.shape else cut.shape)
            for each in layout.records
            for cut in [cuts.get(each.name, Box((0,) * len(each.shape), each.shape))]
        ]
        own = replace(layout, records=tuple(records))
        offsets = tuple(cuts[each.name].offset for each in records if each.part is not None)
        stamp = {
            "step": step,
            "t": step,
            "t_first": 1,
            "run": run,
            "lineage": ((run, None),),
            "rank": rank,
            "world_size": world_size,
            "offsets": offsets or None,
            **fields,
            **(stamps[rank] if stamps else {}),
        }
        sections = []
        for average in averages:
            parts = [
                _cut(average[begin:end].reshape(each.stored_shape), cuts.get(each.name))
                for each, (begin, end) in zip(layout.averaged, layout.average_spans, strict=True)
            ]
            sections.append(b"".join(stored(part, layout.checkpoint_dtype) for part in parts))
        if layout.copied:
            whole = {
                each.name: np.frombuffer(copied[each.name], np.uint8).reshape(*each.stored_shape, -1)
                for each in layout.copied
            }
            parts = [_cut(whole[each.name], cuts.get(each.name)).tobytes() for each in own.copied]
            sections.append(bytes(own.padding_bytes) + b"".join(parts))
        data = memoryview(b"".join(sections))
        root.mkdir(exist_ok=True)
        chunks = [data[begin:end] for begin, end in own.chunks]
        paths.append(SnapshotStore(root).write(own, Stamp(**stamp), lambda chunks=chunks: chunks).path)
    return paths


def _cut(whole: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return whole
    return whole[tuple(slice(begin, begin + size) for begin, size in zip(*box, strict=True))]


def random_averages(layout: Layout, seed: int = 0) -> Callable[[int], list[np.ndarray]]:
    """Return a function that makes standard normal numbers, the same for a step each time."""

    def averages(step: int) -> list[np.ndarray]:
        rng = np.random.default_rng((seed, step))
        return [rng.standard_normal(layout.average_elements) for _ in layout.gammas]

    return averages


def write_run(
    root: Path,
    layout: Layout,
    steps: Sequence[int],
    *,
    copied: Callable[[int], Mapping[str, bytes]] | None = None,
    averages: Callable[[int], Sequence[np.ndarray]] | None = None,
    run: str | None = None,
    **stamp,
) -> str:
    run = run or run_id()
    averages = averages or random_averages(layout)
    for step in steps:
        write_snapshot(root, layout, step, averages(step), copied(step) if copied else None, run=run, **stamp)
    return run


def snapshot_file(root: Path, step: int) -> Path:
    (found,) = root.glob(f"step-{step:012d}-*/rank-*.safetensors")
    return found


def forge(file: Path, field: str, value: str, *, before: str) -> None:
    """Add a field to the header of a file, before a field that it has, as a newer version might; and sign it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip(b" ")
    at = text.index(f',"{before}":'.encode())
    text = text[:at] + f",{json.dumps(field)}:{json.dumps(value)}".encode() + text[at:]
    assert len(text) <= length, "the padding has no space for the field"
    blob = content[:8] + text.ljust(length)
    place = blob.index(b'"header_crc32":"') + 16
    unsigned = blob[:place] + b"00000000" + blob[place + 8 :]
    file.write_bytes(blob[:place] + b"%08x" % zlib.crc32(unsigned) + blob[place + 8 :] + content[8 + length :])


def need(file: Path, **features: str) -> None:
    """Make a file require features that this version does not know, each with the version that has it."""
    forge(file, "requires", json.dumps(features, separators=(",", ":")), before="library_version")


def damage(file: Path, *, at: float) -> None:
    """Flip a bit at a fraction of the file."""
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    file.write_bytes(content)
