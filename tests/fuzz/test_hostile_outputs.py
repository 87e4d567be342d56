"""Hostile files of synthesized averages, and of nitrous-ema 0.0.1 and ema-pytorch."""

from __future__ import annotations

import os
import random
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nitrous_ema.averaging.load_average import load_tensors
from nitrous_ema.errors import SnapshotDamaged, SnapshotError, SnapshotNotFound
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from tests.fuzz import mutate
from tests.fuzz.targets import STEP, TARGETS, model_state

NAMES = ("average.safetensors", "average.pt", "legacy")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return {name: TARGETS[name](tmp_path_factory.mktemp("hostile")) for name in NAMES}


def as_safetensors(text, data=bytes(16)):
    return len(text).to_bytes(8, "little") + text + data


RIGHT = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.mark.parametrize("name", NAMES)
def test_valid_files_are_accepted(targets, name):
    assert targets[name].execute(targets[name].seeds()[0]) == "taken"


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_file_is_refused_or_equals_an_independent_reading(targets, name, seed):
    rng, (one, other) = random.Random(seed), targets[name].seeds()
    targets[name].execute(targets[name].mutate(rng, one, other))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(as_safetensors(RIGHT.replace(b"[0,16]", b"[0.9,16.9]")), id="fractions"),
        pytest.param(as_safetensors(RIGHT.replace(b"[0,16]", b'["0","16"]')), id="texts"),
        pytest.param(as_safetensors(RIGHT.replace(b"[0,16]", b"[false,16]")), id="booleans"),
        pytest.param(as_safetensors(RIGHT.replace(b"[0,16]", b"[0,1e400]")), id="beyond floats"),
        pytest.param(as_safetensors(RIGHT.replace(b"[0,16]", b"[-16,0]")), id="before the file"),
        pytest.param(as_safetensors(RIGHT.replace(b"[0,16]", b"[4,20]"), bytes(20)), id="hole"),
        pytest.param(as_safetensors(RIGHT, bytes(20)), id="more than the tensors"),
        pytest.param(as_safetensors(RIGHT[:-1] + b"," + RIGHT[1:]), id="twice"),
        pytest.param(as_safetensors(RIGHT[:-1] + b"," + RIGHT[1:].replace(b'"a"', b'"b"')), id="overlap"),
        pytest.param(as_safetensors(b'{"__metadata__":{"skipped":"["},' + RIGHT[1:]), id="skipped is not JSON"),
        pytest.param(as_safetensors(b'{"__metadata__":{"skipped":"[{}]"},' + RIGHT[1:]), id="skipped holds no names"),
        pytest.param(as_safetensors(b'{"__metadata__":{"skipped":"' + b"[" * 10**5 + b'"},' + RIGHT[1:]), id="deep"),
        pytest.param(as_safetensors(b'{"__metadata__":{"k":3},' + RIGHT[1:]), id="metadata"),
        pytest.param(as_safetensors(RIGHT.decode().encode("utf-16")), id="another encoding"),
        pytest.param(as_safetensors(b"[" * 10**5), id="nothing but depth"),
        pytest.param(as_safetensors(b"9" * 10**6), id="nothing but digits"),
        pytest.param(as_safetensors(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"), id="many values"),
    ],
)
def test_false_header_of_an_average_is_damage_and_loads_nothing(tmp_path, content):
    path, model = tmp_path / "x.safetensors", {"a": torch.full((4,), 7.0)}
    path.write_bytes(content)
    with pytest.raises(SnapshotDamaged, match=r"x\.safetensors: not a synthesized average"):
        load_tensors(model, path)
    assert model["a"].eq(7).all()


@pytest.mark.parametrize("dtype", ["I32", "U32", "F8_E8M0"])
def test_whole_numbers_are_not_loaded_as_weights(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    width = 1 if dtype == "F8_E8M0" else 4
    path.write_bytes(
        as_safetensors(RIGHT.replace(b"F32", dtype.encode()).replace(b"16]", b"%d]" % (4 * width)), bytes(4 * width))
    )
    with pytest.raises(SnapshotError, match="'a' is"):
        load_tensors({"a": torch.full((4,), 7.0)}, path)


ODD = {
    "sparse": lambda: torch.arange(4.0).to_sparse(),
    "without numbers": lambda: torch.empty(4, device="meta"),
    "larger than its file": lambda: torch.zeros(1).expand(2**40),
    "double complex": lambda: torch.zeros(4, dtype=torch.complex128),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensor_that_is_not_dense_is_damage(tmp_path, odd):
    model = {"a": torch.full((4,), 7.0)}
    torch.save({"a": ODD[odd]()}, tmp_path / "x.pt")
    with pytest.raises(SnapshotDamaged, match=r"x\.pt: "):
        load_tensors(model, tmp_path / "x.pt")
    torch.save({"ema_model.a": ODD[odd]()}, tmp_path / f"0.{STEP}.pt")
    with pytest.raises(SnapshotDamaged, match=rf"0\.{STEP}\.pt: "):
        _ = LegacyFolder(tmp_path, gammas=[6.0]).get().records


@pytest.mark.parametrize("key", ["ema_model.", "ema_model.\ud800", 7])
def test_invalid_tensor_name_is_damage_or_ignored(tmp_path, key):
    torch.save({"ema_model.a": torch.zeros(2), key: torch.zeros(2)}, tmp_path / "0.1.pt")
    snapshot = LegacyFolder(tmp_path, gammas=[6.0]).get()
    if key == 7:
        assert [each.name for each in snapshot.records] == ["a"]
    else:
        with pytest.raises(SnapshotDamaged, match=r"0\.1\.pt: "):
            _ = snapshot.records


def test_second_name_of_the_same_profile_and_step_is_ignored(tmp_path):
    torch.save({"ema_model.a": torch.zeros(2)}, tmp_path / "0.1.pt")
    torch.save({"ema_model.a": torch.ones(2)}, tmp_path / "00.1.pt")
    torch.save({"ema_model.a": torch.ones(2)}, tmp_path / "0.01.pt")
    assert [each.path.name for each in LegacyFolder(tmp_path, gammas=[6.0]).snapshots()] == ["0.1.pt"]


@pytest.mark.parametrize("kind", ["compressed", "twice", "overlap"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archive_that_expands_is_damage(tmp_path, kind):
    path = tmp_path / "0.1.pt"
    torch.save({"ema_model.a": torch.zeros(1 << 16)}, path)
    with zipfile.ZipFile(path) as old:
        parts = [(name, old.read(name)) for name in old.namelist()]
    method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as new:
        for name, part in parts + parts[:1] * (kind == "twice"):
            new.writestr(name, part)
        if kind == "overlap":
            new.filelist[1].header_offset = new.filelist[0].header_offset
    with pytest.raises(SnapshotDamaged, match=r"0\.1\.pt: it is not an archive written by torch"):
        _ = LegacyFolder(tmp_path, gammas=[6.0]).get().records


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", ["itself", "nowhere", "folder", "/dev/zero", "pipe", "below a file"])
def test_path_that_is_not_a_regular_file_is_refused(tmp_path, suffix, kind):
    path = tmp_path / f"0.1{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "below a file":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / path.name
    else:
        path.symlink_to(path if kind == "itself" else kind)
    expected = SnapshotNotFound if kind in ("nowhere", "below a file") else SnapshotError
    with pytest.raises(expected, match=path.name):
        load_tensors(model_state(), path)
    if suffix == ".pt" and kind != "below a file":
        with pytest.raises(SnapshotError, match=path.name):
            _ = LegacyFolder(tmp_path, gammas=[6.0]).get().records


@given(st.text() | st.sampled_from(mutate.HOSTILE_TEXTS))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_json_of_a_text_is_parsed_to_the_same_text(text):
    from nitrous_ema.snapshots.bounded_json import parse_json

    assert parse_json(mutate.json.dumps(text), max_values=10**6) == text
