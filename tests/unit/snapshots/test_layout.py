"""Positions of tensors in a snapshot file, and records and layouts that are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.snapshots.layout import Layout
from tests.support.snapshot_layouts import MIXED, layout_of, layouts, record


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_entries_and_chunks_cover_the_data_without_gaps_and_aligned(layout):
    position = 0
    for entry in layout.entries:
        assert entry.begin == position
        assert entry.begin % DTYPE_BYTES[entry.dtype] == 0
        position += int(np.prod(entry.shape)) * DTYPE_BYTES[entry.dtype]
        assert entry.end == position
    assert layout.data_bytes == position
    assert [end for _, end in layout.chunks[:-1]] == [begin for begin, _ in layout.chunks[1:]]
    covered = [position for span in layout.chunks for position in (span.begin, span.end)]
    assert (covered[0], covered[-1]) == (0, position) if covered else position == 0
    for section in layout.sections:  # each is divided anew
        own = [span for span in layout.chunks if section.begin <= span.begin < section.end]
        assert all(end - begin == layout.chunk_bytes for begin, end in own[:-1])
        assert (own[0].begin, own[-1].end) == section if own else section.begin == section.end


def test_profile_sections_hold_averaged_tensors_in_file_order():
    layout = layout_of(*MIXED)
    assert [r.name for r in layout.averaged] == ["a.weight", "tied", "complex", "none", "scalar"]
    assert layout.average_spans == ((0, 15), (15, 17), (17, 29), (29, 29), (29, 30))
    assert layout.average_elements == 30
    assert layout.sections[:2] == ((0, 120), (120, 240))


def test_digest_differs_between_layouts_and_depends_on_nothing_else():
    layout = layout_of(*MIXED)
    others = [
        layout_of(*MIXED[::-1]),
        layout_of(*MIXED, profiles=1),
        layout_of(*MIXED, checkpoint_dtype="F64"),
        layout_of(*MIXED[1:], dataclasses.replace(MIXED[0], persistent=False)),
    ]
    assert layout.sha256 == layout_of(*MIXED).sha256 == layout_of(*MIXED, chunk_bytes=2**20).sha256
    assert len({layout.sha256, *(other.sha256 for other in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: record(dtype="F33"), "expected one of"),
        (lambda: record(dtype="I64"), "only floating-point tensors are averaged"),
        (lambda: record(keys=("b", "a")), "expected its keys, starting with its name"),
        (lambda: record(shape=(-1,)), "expected up to 64 sizes"),
        (lambda: record(shape=(1,) * 65), "expected up to 64 sizes"),
        (lambda: record(shape=(True,)), "expected up to 64 sizes"),
        (lambda: record(role="lost"), "has role 'lost'"),
        (lambda: record("\ud800"), "not valid Unicode"),
        (lambda: layout_of(record(), record()), "is a key of two tensors"),
        (lambda: layout_of(record(), record("b", keys=("b", "a"))), "'a' is a key of two tensors"),
        (lambda: layout_of(record(), checkpoint_dtype="I8"), "averages are stored as one of"),
        (lambda: layout_of(record(), chunk_bytes=100), "expected a power of two"),
        (lambda: layout_of(record(), profiles=0), "expected one of each per profile"),
        (lambda: Layout(records=(), gammas=(1,), sigma_rels=(0.1,)), "gammas is"),
        (lambda: Layout(records=(), gammas=(float("inf"),), sigma_rels=(0.1,)), "finite"),
        (lambda: layout_of(record(shape=(2**40,))), "more than 131072 chunks"),
    ],
)
def test_impossible_record_or_layout_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
