from __future__ import annotations

import json

import numpy as np
import pytest

from nitrous_ema.synthesis.outputs.layout import OutputLayout
from nitrous_ema.synthesis.plan import plan_from_store
from tests.support.snapshot_folders import layout_of, record, write_run


@pytest.fixture
def contents(tmp_path):
    """Tensors of three widths, one of which is under three keys."""
    sizes = [7, 100, 3, 40, 64, 1, 90, 20]
    types = ["F32", "BF16", "F32", "F64"] * 2
    records = [
        record(f"t{place}", (size,), dtype, tied=[f"u{place}", f"v{place}"] * (place == 4))
        for place, (size, dtype) in enumerate(zip(sizes, types, strict=True))
    ]
    write_run(tmp_path, layout_of(records), [100])
    return OutputLayout(plan_from_store(tmp_path, sigma_rels=[0.05]), None)


@pytest.mark.parametrize("step", [1, 13, 64, 1000])
def test_every_number_has_its_place_in_every_key(contents, step):
    """However the flat average is cut, each byte of the file is written once."""
    total = contents.elements[1]
    width = {"F32": 4, "BF16": 2, "F64": 8}
    written = np.zeros(contents.entries[-1].end, dtype=int)
    for first in range(0, total, step):
        for segment, begin, end in contents.averaged(first, min(first + step, total)):
            assert first <= begin < end <= first + step
            offset = segment.offset + (begin - segment.begin) * width[segment.dtype]
            written[offset : offset + (end - begin) * width[segment.dtype]] += 1
    assert (written == 1).all()


def test_wide_numbers_come_first_and_further_keys_last(contents):
    assert [entry.key for entry in contents.entries] == ["t3", "t7", "t0", "t2", "t4", "t6", "u4", "v4", "t1", "t5"]
    assert [entry.begin for entry in contents.entries[1:]] == [entry.end for entry in contents.entries[:-1]]


def test_header_names_every_tensor_and_is_aligned(contents):
    metadata = {"a": "é", "format": "pt"}
    header = contents.header(metadata)
    assert len(header) % 64 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    found = json.loads(header[8:])
    assert found.pop("__metadata__") == metadata
    assert list(found) == [entry.key for entry in contents.entries]
    assert found["u4"] == found["t4"] | {"data_offsets": found["u4"]["data_offsets"]}
    assert contents.data_bytes == max(each["data_offsets"][1] for each in found.values())


def test_other_tensors_are_not_taken_for_these(contents):
    header = json.loads(contents.header({})[8:])
    assert contents.matches_header(header)
    assert not contents.matches_header({**header, "more": header["t0"]})
    assert not contents.matches_header({name: each for name, each in header.items() if name != "t0"})
    for changed in ({"dtype": "F16"}, {"shape": [7, 1]}, {"data_offsets": [0, 28]}):
        assert not contents.matches_header({**header, "t0": {**header["t0"], **changed}})
