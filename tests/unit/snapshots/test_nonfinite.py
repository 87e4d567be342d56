"""Values that are not finite are counted in a snapshot's bytes. Oracle: ``torch.isfinite`` of the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nitrous_ema.errors import NonFiniteError
from nitrous_ema.snapshots.header import NonFinite
from nitrous_ema.snapshots.nonfinite import NonFiniteCounter, has_nan, nonfinite_error, nonfinite_text
from nitrous_ema.snapshots.store import SnapshotStore
from tests.support.snapshot_folders import TORCH_TYPES, layout_of, record, run_id, write_snapshot

DTYPES = [*TORCH_TYPES]
RECORDS = [record("a", (3, 50)), record("empty", (0,)), record("skipped", (4,), "F32", "skipped"),
           record("z", (70, 10), "C64"), record("b", (1001,))]  # fmt: skip


def numbers(dtype: torch.dtype, size: int) -> torch.Tensor:
    """Finite numbers of every magnitude that a type has."""
    generator = torch.Generator().manual_seed(0)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(kind)
    values = torch.randint(info.min, info.max, (size,), generator=generator, dtype=kind).view(dtype)
    edges = [torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).smallest_normal / 2, 0.0, -0.0]
    values[:: size // 5][:5] = torch.tensor(edges, dtype=dtype)
    return torch.where(values.isfinite(), values, torch.ones((), dtype=dtype))


def buffers(layout, sections: list[torch.Tensor]) -> list[bytes]:
    data = b"".join(section.view(torch.uint8).numpy().tobytes() for section in sections)
    assert len(data) == layout.data_bytes
    return [data[begin:end] for begin, end in layout.chunks]


def counted(layout, sections: list[torch.Tensor]):
    counter = NonFiniteCounter(layout)
    for (begin, _), buffer in zip(layout.chunks, buffers(layout, sections), strict=True):
        counter.add(begin, memoryview(buffer))
    return counter


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_of_every_magnitude_are_finite(dtype):
    layout = layout_of(RECORDS, checkpoint_dtype=dtype, chunk_bytes=256)
    sections = [numbers(TORCH_TYPES[dtype], layout.average_elements) for _ in range(2)]
    assert counted(layout, sections).result() == (None, None)


@pytest.mark.parametrize("chunk_bytes", [256, 1 << 24])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_and_first_tensor_are_those_of_isfinite(dtype, bad, chunk_bytes):
    layout = layout_of(RECORDS, checkpoint_dtype=dtype, chunk_bytes=chunk_bytes)
    sections = [numbers(TORCH_TYPES[dtype], layout.average_elements) for _ in range(2)]
    for places in ([0], [149], [150], [150 + 1400], [layout.average_elements - 1], [1600, 700, 3], range(200, 2000)):
        values = sections[1].clone()
        values[list(places)] = bad
        counter = counted(layout, [sections[0], values])
        first = next(
            index
            for index, each in enumerate(RECORDS)
            if each.role == "averaged"
            for span in [layout.average_spans[layout.averaged.index(each)]]
            if not values[span.begin : span.end].isfinite().all()
        )
        assert counter.result() == (None, NonFinite(int((~values.isfinite()).sum()), first))
        assert counter.has_nan == bool(values.isnan().any())


def test_large_averages_are_looked_at_to_their_end():
    layout = layout_of([record("w", (300_000,))], sigma_rels=(0.05,), chunk_bytes=1 << 22)
    values = torch.zeros(300_000)
    values[[70_000, 299_999]] = torch.tensor([np.nan, np.inf])
    assert counted(layout, [values]).result() == (NonFinite(2, 0),)


def test_copied_tensors_may_hold_infinity(tmp_path):
    layout = layout_of([record("w", (4,)), record("mask", (4,), "F32", "copied")])
    mask = np.full(4, -np.inf, np.float32).tobytes()
    snapshot = write_snapshot(tmp_path, layout, 7, [np.ones(4)] * 2, {"mask": mask}, run=run_id())
    assert snapshot.headers[0].nonfinite == (None, None)
    assert snapshot.is_finite


def test_header_on_disk_records_the_values(tmp_path):
    layout = layout_of([record("v", (4,)), record("w", (4,))])
    write_snapshot(tmp_path, layout, 7, [np.ones(8), np.r_[np.ones(6), np.nan, np.inf]], run=run_id())
    snapshot = SnapshotStore(tmp_path).get()
    assert snapshot.headers[0].nonfinite == (None, NonFinite(2, 1))
    assert not snapshot.is_finite
    assert nonfinite_text(snapshot) == "sigma_rel 0.1: 2 values, the first in 'w'"


@pytest.mark.parametrize(
    ("stored", "model", "bad", "remedy"),
    [
        ("F16", "F32", np.inf, r"The largest number of float16 is 65504\. .*torch\.bfloat16 or torch\.float32"),
        ("F16", "F32", np.nan, "Restore a snapshot of an earlier step"),
        ("F32", "F64", np.inf, r"The largest number of float32 is 3\.4028e\+38\. .*torch\.float64"),
        ("F32", "F32", np.inf, "Restore a snapshot of an earlier step"),
        ("BF16", "F32", np.inf, "Restore a snapshot of an earlier step"),
        ("F64", "F64", np.inf, "Restore a snapshot of an earlier step"),
    ],
)
def test_message_names_the_cause_and_a_remedy(stored, model, bad, remedy, tmp_path):
    layout = layout_of([record("w", (4,), model)], checkpoint_dtype=stored, chunk_bytes=16)
    averages = [np.r_[1.0, 2.0, bad, 3.0]] * 2
    snapshot = write_snapshot(tmp_path, layout, 7, averages, run=run_id())
    chunks = buffers(layout, [torch.from_numpy(average).to(TORCH_TYPES[stored]) for average in averages])
    error = nonfinite_error(snapshot, has_nan=has_nan(layout, lambda: chunks))
    assert isinstance(error, NonFiniteError)
    assert (error.step, error.name, error.path) == (7, "w", snapshot.paths[0])
    with pytest.raises(NonFiniteError, match=f"at step 7 .*1 value, the first in 'w'.*{remedy}"):
        raise error


@pytest.mark.parametrize("part_bytes", [1, 3, 5, 4])
def test_numbers_may_be_cut_into_parts(part_bytes):
    layout = layout_of([record("v", (5,)), record("w", (4,))], chunk_bytes=16)
    sections = [torch.arange(9.0), torch.tensor([0.0, 1, 2, 3, 4, torch.nan, 5, torch.inf, 6])]
    counter, begin = NonFiniteCounter(layout), 0
    for buffer in buffers(layout, sections):
        for start in range(0, len(buffer), part_bytes):
            counter.add(begin + start, memoryview(buffer)[start : start + part_bytes])
        begin += len(buffer)
    assert counter.result() == (None, NonFinite(2, 1))
