"""Hostile snapshot files: each kind by name, and random mutations, compared with an independent reading."""

from __future__ import annotations

import json
import os
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nitrous_ema.errors import NitrousError, SnapshotDamaged, SnapshotError
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.in_memory import synthesize
from tests.fuzz import independent, mutate
from tests.fuzz.targets import STEP, SnapshotTarget

MANY = settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return SnapshotTarget(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def seeds(target):
    return target.seeds()


def with_header(content, edit):
    """Return a file with its header edited; length, padding and checksums match."""
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    text = edit(tree)
    text = mutate.json_bytes(tree) if text is None else text
    text = text.ljust(max(length, -(-(8 + len(text)) // 4096) * 4096 - 8))
    return mutate.sealed(len(text).to_bytes(8, "little") + text + content[8 + length :])


def fact(name, value):
    return lambda tree: tree["__metadata__"].__setitem__(name, value)


def test_valid_files_are_accepted(target, seeds):
    assert {target.execute(content) for content in seeds} == {"taken"}


@given(seed=st.integers(0, 2**32), which=st.integers(0, 2))
@MANY
def test_mutated_file_is_refused_or_equals_an_independent_reading(target, seeds, seed, which):
    rng = random.Random(seed)
    target.execute(target.mutate(rng, seeds[which], seeds[which - 1]))


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 2))
@MANY
def test_flipped_bit_anywhere_is_damage(target, seeds, position, bit, which):
    content = bytearray(seeds[which])
    content[int(position * len(content))] ^= 1 << bit
    assert target.execute(bytes(content)) != "taken" or independent.read_snapshot(bytes(content))


@given(kept=st.floats(0, 1, exclude_max=True), which=st.integers(0, 2))
@MANY
def test_truncated_file_is_damage(target, seeds, kept, which):
    assert target.execute(seeds[which][: int(kept * len(seeds[which]))]).startswith("SnapshotDamaged")


@pytest.mark.parametrize("length", mutate.LENGTHS)
def test_wrong_length_of_the_header_is_damage(target, seeds, length):
    content = length.to_bytes(8, "little") + seeds[0][8:]
    if content != seeds[0]:
        assert target.execute(content).startswith("SnapshotDamaged")


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda t: t["ema0.z"].update(data_offsets=[0, 16]), id="overlapping offsets"),
        pytest.param(lambda t: t["ema0.z"].update(data_offsets=[2**62, 2**62 + 16]), id="offsets beyond the file"),
        pytest.param(lambda t: t["ema0.z"].update(data_offsets=[-16, 0]), id="offsets before the file"),
        pytest.param(lambda t: t["ema0.z"].update(dtype="I32"), id="another dtype"),
        pytest.param(lambda t: t["ema0.z"].update(shape=[4]), id="another shape"),
        pytest.param(fact("checkpoint_dtype", "F16"), id="another dtype of all"),
        pytest.param(
            lambda t: mutate.json_bytes(t)[:-1] + b',"ema0.z":' + mutate.json_bytes(t["ema0.z"]) + b"}", id="twice"
        ),
        pytest.param(lambda t: t.update({"../../x": t.pop("ema0.z")}), id="name with separators"),
        pytest.param(fact("run", "../../../../etc/20260101T000000.000000-00000000"), id="run with separators"),
        pytest.param(fact("step", "9" * 100_000), id="number of many digits"),
        pytest.param(fact("t", "1e400"), id="number beyond floats"),
        pytest.param(fact("t", "NaN"), id="not a number"),
        pytest.param(fact("gammas", "[1e308,1e308]"), id="gammas that overflow"),
        pytest.param(fact("gammas", "[-7.0,5.0]"), id="gammas that no profile has"),
        pytest.param(fact("tensors", "[" * 50_000), id="deep nesting"),
        pytest.param(fact("trainer", '{"a":' * 50_000), id="deep nesting of objects"),
        pytest.param(fact("run", "x" * 10**6), id="long text"),
        pytest.param(fact("library_version", "\ud800"), id="lone surrogate"),
        pytest.param(fact("trainer", '{"a\\u0000b":NaN}'), id="NUL"),
    ],
)
def test_false_header_with_matching_checksums_is_damage(target, seeds, edit):
    message = target.execute(with_header(seeds[0], edit))
    assert message.startswith("SnapshotDamaged")
    assert len(message) < 2000


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param("[" + "[]\\u002c" * 300_000 + "[]]", id="escaped commas"),
        pytest.param("[" + "[]," * 300_000 + "[]]", id="many lists"),
        pytest.param("[" * 1_000_000, id="depth"),
        pytest.param("9" * 2_000_000, id="digits"),
    ],
)
def test_memory_for_a_hostile_header_is_a_small_multiple_of_it(target, seeds, bomb):
    def edit(tree):
        tree["__metadata__"]["tensors"] = "BOMB"
        return mutate.json_bytes(tree).replace(b"BOMB", bomb.encode())

    content = with_header(seeds[0], edit)
    target.path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotDamaged):
            SnapshotStore(target.root).get(STEP)
        assert tracemalloc.get_traced_memory()[1] < 32 * len(content)
    finally:
        tracemalloc.stop()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_synthesis_from_a_mutated_file_is_correct_or_refused(target, seeds, seed):
    content = target.mutate(random.Random(seed), seeds[0], seeds[1])
    target.path.write_bytes(content)
    try:
        found = synthesize(target.root, gammas=[6.0], dtype=np.float64)
    except NitrousError as error:
        assert str(target.path) in str(error) or str(target.path.parent) in str(error)  # noqa: PT017
        return
    reading = independent.read_snapshot(content)
    names = [each.name for each in found.plan.target.records if each.role == "averaged"]
    columns = [
        np.concatenate(
            [
                np.frombuffer(reading.tensors[f"ema{k}.{name}"][2], _NUMPY[reading.facts["checkpoint_dtype"]])
                for name in names
            ]
        )
        for k in range(len(json.loads(reading.facts["gammas"])))
    ]
    chosen = [columns[json.loads(reading.facts["gammas"]).index(column.gamma)] for column in found.plan.columns]
    with np.errstate(all="ignore"):
        right = sum(w * column.astype(np.float64) for w, column in zip(found.plan.weights[:, 0], chosen, strict=True))
    np.testing.assert_allclose(found.flats[0], right, rtol=1e-9, atol=1e-9)


_NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}


@pytest.mark.parametrize("kind", ["itself", "nowhere", "a folder", "/dev/zero", "pipe", "outside"])
@pytest.mark.parametrize("which", ["file", "folder"])
def test_link_instead_of_a_file_or_folder_is_refused_or_holds_the_numbers(target, seeds, tmp_path, kind, which):
    (tmp_path / "snapshots").mkdir()
    folder = tmp_path / "snapshots" / target.path.parent.name
    path = folder / target.path.name
    outside = tmp_path / "outside" / folder.name
    outside.mkdir(parents=True)
    (outside / path.name).write_bytes(seeds[0])
    link = path if which == "file" else folder
    link.parent.mkdir(exist_ok=True)
    right = outside / path.name if which == "file" else outside
    if kind == "pipe":
        os.mkfifo(link)
    else:
        link.symlink_to({"itself": link, "nowhere": "nowhere", "a folder": tmp_path, "outside": right}.get(kind, kind))
    store = SnapshotStore(tmp_path / "snapshots")
    if kind == "outside":
        assert [each.step for each in store.snapshots()] == [STEP]
        assert not store.verify()
    elif which == "folder":
        assert store.snapshots() == store.verify() == []
        assert [each.path for each in store.incomplete()] == [folder]
    else:
        with pytest.raises(SnapshotError, match=path.name):
            store.snapshots()
        assert [each.path for each in store.verify()] == [path]
