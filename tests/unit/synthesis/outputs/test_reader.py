from __future__ import annotations

import json
import math

import numpy as np
import pytest
import safetensors.numpy
import torch

from nitrous_ema._base import torch_dtypes
from nitrous_ema.errors import SnapshotDamaged, SnapshotError
from nitrous_ema.snapshots.bounded_json import MAX_HEADER_BYTES
from nitrous_ema.synthesis.outputs.reader import read_average, read_header


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32)}, file, metadata={"author": "they"})
    return file


def test_header_that_the_package_writes_is_read(path):
    header, begin, end = read_header(path)
    assert header["__metadata__"] == {"author": "they"}
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert (end, end - begin) == (path.stat().st_size, 24)


@pytest.mark.parametrize("size", [0, 1, 10**4, MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_impossible_header_size_is_refused_before_reading(path, size):
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=f"invalid header size: {size} bytes in a file of"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\x09" + bytes(7) + b"not JSON!"])
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"invalid header size|Expecting value"):
        read_header(path)


def test_path_that_is_not_a_file_is_refused_without_waiting(tmp_path):
    with pytest.raises(ValueError, match="regular"):
        read_header(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "nothing")


def raw(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no such type")
def test_scales_are_read_in_their_own_type(path):
    header = {"s": {"dtype": "F8_E8M0", "shape": [3], "data_offsets": [0, 3]}}
    path.write_bytes(raw(header, bytes([126, 127, 129])))
    scales = read_average(path)["s"]
    assert scales.dtype == torch.float8_e8m0fnu
    assert scales.float().tolist() == [0.5, 1.0, 4.0]  # 2 ** (byte - 127)


def test_type_that_this_torch_lacks_is_named(path, monkeypatch):
    path.write_bytes(raw({"s": {"dtype": "F8_E8M0", "shape": [3], "data_offsets": [0, 3]}}, bytes(3)))
    known = {code: dtype for code, dtype in torch_dtypes.READABLE_DTYPES.items() if code != "F8_E8M0"}
    monkeypatch.setattr(torch_dtypes, "READABLE_DTYPES", known)
    with pytest.raises(SnapshotError, match=r"'s' is F8_E8M0, a type that torch .* lacks\. Upgrade torch\."):
        read_average(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "names"),
    [
        ("F32", [2, 3], '["a"]'),
        ("F16", [2, 2], '["a"]'),
        ("F32", [], '["a"]'),
        ("F32", [2, 2], "a"),
        ("F32", [2], "[1]"),
    ],
)
def test_complex_tensors_that_are_not_pairs_are_damage(path, dtype, shape, names):
    size = math.prod(shape) * (2 if dtype == "F16" else 4)
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    path.write_bytes(raw({"__metadata__": {"complex": names}, "a": entry}, bytes(size)))
    with pytest.raises(SnapshotDamaged, match=r"complex"):
        read_average(path)
