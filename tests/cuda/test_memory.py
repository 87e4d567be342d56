"""Memory has the size that the docs state, to the byte, on the device and on the host, and does not grow.

Not run on a device yet. What may fail on a first run though the library is right: byte counts assume that torch's
allocators round device memory up to 512 bytes and pinned memory to powers of two, and that no library of CUDA's
allocates between two counts (cuBLAS makes its workspace at the first product of a stream).
"""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.accounts import WIDTH, Counted, count, device_bytes, host_bytes

pytestmark = pytest.mark.cuda

ELEMENTS = 2 * WIDTH * WIDTH + WIDTH
PROFILES = 2
AVERAGES_BYTES = 4 * PROFILES * ELEMENTS
TABLES_BYTES = 16384
"""The fused step's tables of addresses and blocks, the counter of the kernel between two chunks, and rounding."""


@pytest.fixture(autouse=True)
def nothing_from_before():
    gc.collect()
    torch.cuda.synchronize()


def count_on_device(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Counted:
    gc.collect()  # memory of another EMA in the same test is not freed while this one is counted
    peak = partial(device_bytes, "peak")
    return count("cuda", folder, device_bytes, peak, torch.cuda.reset_peak_memory_stats, dtype, **options)


def test_device_holds_four_bytes_per_element_and_profile(tmp_path):
    counted = count_on_device(tmp_path)
    assert AVERAGES_BYTES <= counted.averages <= AVERAGES_BYTES + TABLES_BYTES


def test_averages_of_bfloat16_are_as_large_and_need_one_batch_of_scratch_at_most(tmp_path):
    counted = count_on_device(tmp_path, torch.bfloat16)
    assert AVERAGES_BYTES <= counted.after_warm_up <= AVERAGES_BYTES + 4 * ELEMENTS + TABLES_BYTES


def test_nothing_grows_over_fifty_steps_with_snapshots(tmp_path):
    counted = count_on_device(tmp_path)
    assert counted.after_many_steps == counted.after_warm_up


def test_updates_and_snapshots_make_no_temporaries_of_the_models_size(tmp_path):
    assert count_on_device(tmp_path, scratch=0).peak < ELEMENTS


def test_cast_snapshot_takes_one_staging_chunk(tmp_path):
    plain = count_on_device(tmp_path / "plain")
    cast = count_on_device(tmp_path / "cast", checkpoint_dtype=torch.float16)
    chunk_bytes = 2 * ELEMENTS  # all of a profile is one chunk here
    assert cast.after_warm_up - plain.after_warm_up == chunk_bytes


@pytest.mark.parametrize("max_pending", [1, 3])
def test_host_holds_exactly_the_slots(tmp_path, max_pending):
    if not hasattr(torch.cuda, "host_memory_stats"):
        pytest.skip(f"torch {torch.__version__} does not count pinned memory")
    counted = count("cuda", tmp_path, host_bytes, int, bool, torch.float32, max_pending=max_pending)
    slots_bytes = max_pending * AVERAGES_BYTES  # a snapshot has the averages' bytes
    assert slots_bytes <= counted.averages <= slots_bytes + TABLES_BYTES
    assert counted.after_many_steps <= counted.after_warm_up + TABLES_BYTES
