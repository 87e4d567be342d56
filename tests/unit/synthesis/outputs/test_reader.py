from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

from nitrous_ema.snapshots.bounded_json import MAX_HEADER_BYTES
from nitrous_ema.synthesis.outputs.reader import read_header


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
