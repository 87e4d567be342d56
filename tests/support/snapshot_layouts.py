"""Records and layouts for tests of the snapshot format: examples, and strategies that draw any layout."""

from __future__ import annotations

from hypothesis import strategies as st

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.snapshots.layout import Layout, TensorRecord


def record(name="a", dtype="F32", shape=(3, 5), role="averaged", **more):
    return TensorRecord(**{"name": name, "keys": (name,), "dtype": dtype, "shape": shape, "role": role, **more})


def layout_of(*records, profiles=2, **more):
    sigma_rels = tuple(0.05 + 0.01 * i for i in range(profiles))
    return Layout(records=records, gammas=tuple(6.0 + i for i in range(profiles)), sigma_rels=sigma_rels, **more)


MIXED = (
    record("a.weight", "BF16", (3, 5)),
    record("tied", keys=("tied", "also.tied"), shape=(2,)),
    record("complex", "C64", (2, 3)),
    record("none", shape=(0, 4)),
    record("scalar", shape=()),
    record("num_batches", "I64", (), "copied"),
    record("mask", "BOOL", (3,), "copied"),
    record("half", "BF16", (3,), "copied", persistent=False),
    record("ünï.__metadata__", "F64", (3,), "copied"),
    record("phase", "C64", (2,), "copied"),
    record("no numbers", "I32", (0,), "copied"),
    record("left.out", "C128", (7,), "skipped"),
)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
stored = st.one_of(
    st.tuples(st.sampled_from(("F32", "BF16", "F64", "C64")), shapes, st.just("averaged")),
    st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes, st.just("copied")),
    st.tuples(st.just("anything"), shapes, st.just("skipped")),
)
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)


@st.composite
def layouts(draw):
    described = draw(st.lists(stored, max_size=6))
    keys = draw(st.lists(names, min_size=len(described), max_size=len(described), unique=True))
    records = [record(key, *facts, persistent=draw(st.booleans())) for key, facts in zip(keys, described, strict=True)]
    dtype = draw(st.sampled_from(("F32", "F64", "F16", "BF16")))
    chunk_bytes = 2 ** draw(st.integers(4, 10))
    return layout_of(*records, profiles=draw(st.integers(1, 3)), checkpoint_dtype=dtype, chunk_bytes=chunk_bytes)
