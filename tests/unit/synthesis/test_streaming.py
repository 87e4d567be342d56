from __future__ import annotations

import json
import math
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from nitrous_ema.errors import SnapshotDamaged
from nitrous_ema.snapshots import reading as sources
from nitrous_ema.snapshots.header import _decode_layout
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis import streaming
from nitrous_ema.synthesis.blas_threads import _library
from nitrous_ema.synthesis.in_memory import synthesize_plan
from nitrous_ema.synthesis.outputs.reuse import expected_outputs
from nitrous_ema.synthesis.outputs.writer import write_outputs
from nitrous_ema.synthesis.plan import plan_from_store
from nitrous_ema.synthesis.streaming import GROUP_OUTPUTS, TILE_ELEMENTS, engine_sizes, passes, stream
from tests.support.snapshot_folders import layout_of, record, run_id, snapshot_file, write_run

LENGTHS = (0.05, 0.07, 0.12)
STEPS = range(100, 1100, 100)
MIB = 1 << 20


def plan_of(root: Path, elements: int = TILE_ELEMENTS * 2 + 77, steps=STEPS, **more):
    write_run(root, layout_of([record("weight", (elements,))], **more), steps)
    return plan_from_store(root, sigma_rels=LENGTHS, tolerance=0)


def columns_of(plan) -> np.ndarray:
    """What the plan's columns hold, read by the safetensors package: [columns, elements], long double."""
    rows = []
    for column in plan.columns:
        with safetensors.safe_open(column.source.path, "pt") as file:
            gammas = json.loads(file.metadata()["gammas"])
            name = f"ema{gammas.index(column.gamma)}.weight"
            rows.append(file.get_tensor(name).double().numpy().astype(np.longdouble))
    return np.stack(rows)


def mixed_folder(root: Path, elements: int) -> None:
    """A history whose snapshots are stored in every type; 40 columns are two groups."""
    run, codes = run_id(), ("F64", "F32", "F16", "BF16")
    for step in range(10, 210, 10):
        layout = layout_of([record("weight", (elements,))], checkpoint_dtype=codes[step // 10 % 4])
        write_run(root, layout, [step], run=run)


# Numbers


@pytest.mark.parametrize("checkpoint_dtype", ["F64", "F32", "F16", "BF16", "mixed"])
@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_sums_are_as_exact_as_their_type(tmp_path, checkpoint_dtype, accumulate):
    """Oracle: the same sums in long double. Bound: n roundings of the sum of magnitudes (Higham 2002, 3.5)."""
    if checkpoint_dtype == "mixed":
        mixed_folder(tmp_path, TILE_ELEMENTS + 5)
        plan = plan_from_store(tmp_path, sigma_rels=LENGTHS, tolerance=0)
    else:
        plan = plan_of(tmp_path, TILE_ELEMENTS + 5, checkpoint_dtype=checkpoint_dtype)
    found = synthesize_plan(plan, dtype=np.float64, accumulate=accumulate).flats
    stored, weights = columns_of(plan), plan.weights.astype(np.longdouble).T
    exact, magnitudes = weights @ stored, np.abs(weights) @ np.abs(stored)
    bound = (len(plan.columns) + 2) * np.finfo(accumulate).eps * magnitudes
    assert np.all(np.abs(np.stack(found) - exact) <= bound)
    assert np.any(np.stack(found) != 0)


def test_float64_sums_are_within_a_rounding_of_the_exact_sum(tmp_path):
    plan = plan_of(tmp_path, 50, checkpoint_dtype="BF16")
    stored = columns_of(plan).astype(np.float64)
    for flat, weights in zip(synthesize_plan(plan, dtype=np.float64).flats, plan.weights.T, strict=True):
        for index in range(50):
            terms = weights * stored[:, index]  # products are rounded once; their sum here is not
            assert abs(flat[index] - math.fsum(terms)) <= 40 * 2**-53 * math.fsum(np.abs(terms))


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_no_bit_depends_on_threads_memory_or_open_files(tmp_path, monkeypatch, accumulate):
    mixed_folder(tmp_path, TILE_ELEMENTS * 11 + 3)
    plan = plan_from_store(tmp_path, sigma_rels=LENGTHS, tolerance=0)
    expected = synthesize_plan(plan, dtype=np.float64, accumulate=accumulate, threads=1).flats
    sizes = set()
    for threads in (1, 2, 3):
        for memory_bytes in (24 * MIB, 40 * MIB, 1 << 30):
            chosen = engine_sizes(plan, memory_bytes, threads=threads, accumulate=accumulate)
            sizes.add((chosen.threads, chosen.block_elements))
            with monkeypatch.context() as patch:
                if memory_bytes > 40 * MIB:
                    patch.setattr(sources, "_MAX_OPEN_FILES", 3)  # as where there are more files than may be open
                found = synthesize_plan(
                    plan, dtype=np.float64, accumulate=accumulate, threads=threads, memory_bytes=memory_bytes
                )
            assert np.array_equal(np.stack(found.flats).view(np.int64), np.stack(expected).view(np.int64))
    assert len({threads for threads, _ in sizes}) == 3
    assert len({block for _, block in sizes}) >= 3


def least_bytes(plan, accumulate="float64"):
    """The bytes that the refusal of a budget asks for."""
    with pytest.raises(ValueError, match="at least") as refused:
        engine_sizes(plan, 1, accumulate=accumulate)
    return int(str(refused.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_no_bit_depends_on_how_many_outputs_are_made_at_once(tmp_path, accumulate):
    write_run(tmp_path, layout_of([record("weight", (TILE_ELEMENTS + 7,))]), range(10, 450, 10))  # 88 columns
    plan = plan_from_store(tmp_path, sigma_rels=np.linspace(0.05, 0.2, 2 * GROUP_OUTPUTS + 5), tolerance=0)
    together = synthesize_plan(plan, dtype=np.float64, accumulate=accumulate).flats
    for at_once, sizes in ((32, [32, 32, 5]), (64, [64, 5])):
        found = passes(plan, least_bytes(plan.only(range(at_once)), accumulate), accumulate=accumulate)
        assert [len(each) for each in found] == sizes
        apart = [synthesize_plan(plan.only(each), dtype=np.float64, accumulate=accumulate).flats for each in found]
        assert np.array_equal(np.concatenate(apart).view(np.int64), np.stack(together).view(np.int64))


def test_passes_keep_few_files_open_and_are_all_within_the_budget(tmp_path):
    write_run(tmp_path, layout_of([record("weight", (50,))]), range(10, 110, 10))
    plan = plan_from_store(tmp_path, sigma_rels=np.linspace(0.05, 0.2, 300), tolerance=0)
    assert [len(each) for each in passes(plan, 1 << 30)] == [128, 128, 44]
    for memory_bytes in (64 * MIB, 100 * MIB):
        for outputs in passes(plan, memory_bytes):
            assert engine_sizes(plan.only(outputs), memory_bytes).memory_bytes <= memory_bytes


def test_part_of_the_elements_has_the_bits_of_the_whole(tmp_path):
    elements = TILE_ELEMENTS * 9 + 1
    plan = plan_of(tmp_path, elements, chunk_bytes=1 << 17)
    whole, seen = np.stack(synthesize_plan(plan, dtype=np.float64).flats), []
    for begin, end in [(0, elements), (1, 2), (TILE_ELEMENTS * 3 - 1, TILE_ELEMENTS * 5 + 1), (elements - 1, elements)]:
        part = np.full_like(whole, np.nan)

        def take(first, block, part=part):
            part[:, first : first + block.shape[1]] = block

        stream(plan, take, elements=(begin, end), progress=lambda done, total: seen.append((done, total)))
        assert np.array_equal(part[:, begin:end], whole[:, begin:end])
        outside = np.r_[
            0 : begin // TILE_ELEMENTS * TILE_ELEMENTS,
            min(-(-end // TILE_ELEMENTS) * TILE_ELEMENTS, elements) : elements,
        ]
        assert np.isnan(part[:, outside]).all()
        assert seen[-1][0] == seen[-1][1] <= plan.bytes_to_read
    assert seen[-1][1] < plan.bytes_to_read / 4


def test_empty_range_reads_nothing(tmp_path):
    plan = plan_of(tmp_path)
    snapshot_file(tmp_path, 1000).write_bytes(b"")
    stream(plan, lambda *_: pytest.fail("called"), elements=(5, 5))


@pytest.mark.parametrize("where", [0.01, 0.5, 0.99])
def test_part_verifies_whole_chunks(tmp_path, where):
    """One chunk holds everything, and a flipped bit far from the wanted elements is still found."""
    plan = plan_of(tmp_path, TILE_ELEMENTS * 6, chunk_bytes=1 << 24)
    path = snapshot_file(tmp_path, 300)
    content = bytearray(path.read_bytes())
    begin = SnapshotStore(tmp_path).get(300).data_begin
    content[begin + int(where * TILE_ELEMENTS * 6 * 4)] ^= 1
    path.write_bytes(content)
    with pytest.raises(SnapshotDamaged):
        stream(plan, lambda *_: None, elements=(TILE_ELEMENTS * 2, TILE_ELEMENTS * 2 + 1))


@pytest.mark.parametrize("sums", [np.float32, np.float64])
def test_halves_of_every_bit_pattern_are_converted(sums):
    from nitrous_ema.synthesis.float_conversion import widen

    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.float16).copy()).double().numpy().astype(sums)
    finite = np.isfinite(expected)
    for chosen in (np.ones(bits.shape, bool), finite):  # NaN and infinities take another way
        out = np.empty(chosen.sum(), sums)
        widen(bits[chosen].view(np.uint8), "F16", out)
        assert np.array_equal(out, expected[chosen], equal_nan=True)
        assert np.array_equal(np.signbit(out), np.signbit(expected[chosen]))


@pytest.mark.parametrize("sums", [np.float32, np.float64])
def test_smallest_halves_survive_where_the_process_flushes_such_numbers(sums):
    from nitrous_ema.synthesis.float_conversion import widen

    bits = np.arange(1, 1 << 10, dtype=np.uint16)  # all below 2**-14
    out = np.zeros(bits.shape, sums)
    try:
        if not torch.set_flush_denormal(True):  # of this thread
            pytest.skip("this processor does not flush")
        widen(bits.view(np.uint8), "F16", out)
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(out, bits * sums(2.0**-24))


# Threads


def test_consumers_get_every_tile_once(tmp_path):
    plan, lock, seen = plan_of(tmp_path, TILE_ELEMENTS * 13 + 1), threading.Lock(), []

    def take(begin, block):
        with lock:
            seen.append((begin, block.shape, threading.current_thread() is threading.main_thread()))

    stream(plan, take, threads=3)
    assert not any(is_main for _, _, is_main in seen)
    tiles = [(n * TILE_ELEMENTS, (3, TILE_ELEMENTS)) for n in range(13)] + [(13 * TILE_ELEMENTS, (3, 1))]
    assert sorted(each[:2] for each in seen) == tiles
    seen.clear()
    stream(plan, take, threads=3, on_calling_thread=True)
    assert seen == [(*tile, True) for tile in tiles]


def test_progress_grows_to_all_bytes_on_the_calling_thread(tmp_path):
    plan, seen = plan_of(tmp_path, TILE_ELEMENTS * 13), []

    def record(done, total):
        assert threading.current_thread() is threading.main_thread()
        seen.append((done, total))

    stream(plan, lambda *_: None, progress=record, threads=2)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (plan.bytes_to_read, plan.bytes_to_read)


def test_error_of_a_consumer_ends_all_threads(tmp_path):
    plan = plan_of(tmp_path, TILE_ELEMENTS * 13)

    def fail(begin, block):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stream(plan, fail, threads=2)
    assert not [each for each in threading.enumerate() if each.name.startswith("synthesis")]


@pytest.mark.parametrize(("name", "value"), [("threads", 0), ("accumulate", "float16")])
def test_wrong_option_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}: '?{value}'?; expected"):
        stream(plan_of(tmp_path), lambda *_: None, **{name: value})


# Checksums


def test_checksum_is_put_together_in_any_order():
    from zlib import crc32

    from nitrous_ema.snapshots.reading import _ChunkChecksum, combine_crc32

    rng = np.random.default_rng(0)
    for _ in range(50):
        pieces = [rng.bytes(int(size)) for size in rng.integers(0, 3000, 5)]
        assert combine_crc32(crc32(pieces[0]), crc32(pieces[1]), len(pieces[1])) == crc32(pieces[0] + pieces[1])
        pieces = [piece for piece in pieces if piece]
        begins = np.cumsum([0, *map(len, pieces)])
        running = _ChunkChecksum()
        for place in rng.permutation(len(pieces)):
            running.add(int(begins[place]), len(pieces[place]), crc32(pieces[place]))
        assert (running.crc, running.num_bytes, running.early) == (crc32(b"".join(pieces)), begins[-1], {})


# Memory


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
@pytest.mark.parametrize("lengths", [3, 40])
def test_memory_stays_within_the_budget(tmp_path, accumulate, lengths):
    write_run(tmp_path, layout_of([record("weight", (1 << 19,))], checkpoint_dtype="F16"), range(10, 210, 10))
    plan = plan_from_store(tmp_path, sigma_rels=np.linspace(0.05, 0.15, lengths), tolerance=0)
    paths = [tmp_path / f"{each}.safetensors" for each in range(lengths)]
    budget = (32 if lengths == 3 else 80) * MIB
    assert engine_sizes(plan, budget, threads=2, accumulate=accumulate).threads == 2
    tracemalloc.start()
    try:
        write_outputs(plan, paths, memory_bytes=budget, threads=2, accumulate=accumulate)
        assert budget / 4 < tracemalloc.get_traced_memory()[1] < budget
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("letters", "profiles"), [(12, 1), (12, 4), (70, 2)])
def test_memory_for_the_names_of_many_tensors_is_counted(tmp_path, letters, profiles):
    """From the first look at the folder on."""
    records = [record(f"{place:0{letters}}", (3,)) for place in range(2000)]
    write_run(tmp_path, layout_of(records, sigma_rels=(0.05, 0.1, 0.15, 0.2)[:profiles]), range(100, 600, 100))
    paths = [tmp_path / f"{length}.safetensors" for length in LENGTHS]
    _decode_layout.cache_clear()
    tracemalloc.start()
    try:
        plan = plan_from_store(tmp_path, sigma_rels=LENGTHS, tolerance=0)
        expected_outputs(plan, paths)
        listed = tracemalloc.get_traced_memory()[1]
        write_outputs(plan, paths, threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    few = replace(plan, target=replace(plan.target, records=plan.target.records[:1]))
    names = least_bytes(plan) - least_bytes(few)
    assert names / 2 < listed < names
    assert peak < engine_sizes(plan, 1 << 30, threads=1).memory_bytes


def test_budget_that_is_too_small_is_refused_with_the_bytes_needed(tmp_path):
    plan = plan_of(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"memory budget too small: 3 outputs from 20 columns \(1 tensor\) need at least \d+ bytes "
        r"\(\d+ MiB\), got 1000 bytes",
    ):
        stream(plan, lambda *_: None, memory_bytes=1000)
    needed = least_bytes(plan)
    sizes = engine_sizes(plan, needed)
    assert (sizes.threads, sizes.block_elements, sizes.memory_bytes) == (1, TILE_ELEMENTS, needed)
    with pytest.raises(ValueError, match="memory budget too small"):
        engine_sizes(plan, needed - 1)


def test_more_threads_before_longer_blocks(tmp_path):
    plan = plan_of(tmp_path, TILE_ELEMENTS * 64)
    least = engine_sizes(plan, 16 * MIB).memory_bytes
    sizes = engine_sizes(plan, 4 * least, threads=4)
    assert sizes.threads >= 3
    assert sizes.memory_bytes <= 4 * least
    assert engine_sizes(plan, 1 << 40, threads=4).block_elements == streaming._MAX_BLOCK_ELEMENTS


def test_products_use_one_thread_while_the_engine_runs(tmp_path):
    read, write = _library()
    before, seen = read(), []
    write(2)
    try:
        stream(plan_of(tmp_path), lambda *_: seen.append(read()))
        assert set(seen) == {1}
        assert read() in (1, 2)  # 1 where nothing is known of the library
    finally:
        write(before)
