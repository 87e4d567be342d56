"""Validation of torch files. Hostile files are in tests/fuzz/test_hostile_outputs.py."""

from __future__ import annotations

import os
import zipfile
import zlib

import pytest
import torch

from nitrous_ema.snapshots.torch_archive import (
    load_torch_file,
    locate_storages,
    plain_tensor,
    verify_archive,
    verify_storage,
)


@pytest.fixture
def path(tmp_path):
    torch.save({"a": torch.arange(1000.0), "b": torch.arange(1000.0, 2000.0)}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def repacked(path, edit):
    """Rewrite an archive with the bytes of one member changed and all checksums matching."""
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    edit(parts)
    with zipfile.ZipFile(path, "w") as new:
        for name, part in parts.items():
            new.writestr(name, part)


def test_file_of_torch_is_loaded_and_verified(path):
    tensors = load_torch_file(path)
    verify_archive(path)
    locate_storages(path, tensors.values())
    assert torch.equal(plain_tensor(tensors["b"], file_bytes=path.stat().st_size), torch.arange(1000.0, 2000.0))


def test_changed_number_is_found(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(500.0, 600.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    tensors = load_torch_file(path)
    with pytest.raises(ValueError, match="CRC-32"):
        verify_archive(path)
    checksums = locate_storages(path, tensors.values())
    verify_storage(tensors["b"], checksums)
    with pytest.raises(ValueError, match="checksum mismatch: found"):
        verify_storage(tensors["a"], checksums)


def test_member_of_a_tensor_is_found_among_others_of_its_size(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"others": [torch.full((4096,), float(each)) for each in range(9)], "a": torch.ones(4096)}, path)
    tensor = load_torch_file(path)["a"]
    checksums = locate_storages(path, [tensor])
    assert checksums == {tensor.data_ptr(): {zlib.crc32(tensor.numpy().data)}}
    verify_storage(tensor, checksums)


def test_shortened_member_is_not_continued_from_the_next(path):
    repacked(path, lambda parts: parts.update({"x/data/0": parts["x/data/0"][:-4]}))
    tensors = load_torch_file(path)
    verify_archive(path)
    assert tensors["a"][-1] != 999  # torch returns it nevertheless
    with pytest.raises(ValueError, match="sizes of its tensors are not the sizes of its archive members"):
        locate_storages(path, tensors.values())


def test_tied_tensors_and_views_share_one_member(tmp_path):
    whole = torch.arange(10.0)
    torch.save({"a": whole, "b": whole[2:4], "none": torch.empty(0)}, tmp_path / "x.pt")
    locate_storages(tmp_path / "x.pt", load_torch_file(tmp_path / "x.pt").values())


def test_file_with_any_name_is_accepted(tmp_path):
    path = tmp_path / "gewichte für später \u00b7 \u6a21.pt"
    torch.save({"a": torch.ones(4096)}, path)
    tensors = load_torch_file(path)
    verify_storage(tensors["a"], locate_storages(path, tensors.values()))


@pytest.mark.parametrize("at", [0, 31])
def test_member_that_is_not_at_its_listed_position_is_found(path, at):
    tensors, content = load_torch_file(path), bytearray(path.read_bytes())
    content[content.index(b"x/data/1") - 30 + at] ^= 1  # its signature, or its name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x/data/1' is not at its listed position"):
        locate_storages(path, tensors.values())


def test_encrypted_member_is_refused(path):
    content = bytearray(path.read_bytes())
    content[content.rindex(b"x/data/1") - 46 + 8] |= 1  # its flags in the directory at the end
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x/data/1' is encrypted"):
        load_torch_file(path)


def test_lazily_conjugated_numbers_are_computed(tmp_path):
    torch.save({"a": torch.tensor([1 + 2j]).conj()}, tmp_path / "x.pt")
    plain = plain_tensor(load_torch_file(tmp_path / "x.pt")["a"], file_bytes=10**4)
    assert torch.equal(torch.view_as_real(plain), torch.tensor([[1.0, -2.0]]))


def test_directory_that_claims_more_memory_than_a_header_is_not_read(path):
    """A sparse file may have room for any directory that its last bytes claim."""
    claimed, end = 200_000_000, bytearray(path.read_bytes()[-22:])
    end[12:16] = claimed.to_bytes(4, "little")  # the size of the directory
    with path.open("r+b") as file:
        file.truncate(claimed + 10**6)
        file.seek(0, os.SEEK_END)
        file.write(end)
    with pytest.raises(ValueError, match=f"claims {claimed} bytes"):
        load_torch_file(path)


def test_pickle_larger_than_a_header_is_not_read(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/large", b"")
        archive.getinfo("x/large").file_size = archive.getinfo("x/large").compress_size = 200_000_000
        archive.fp.truncate(archive.fp.tell() + 200_000_000)
    with pytest.raises(ValueError, match="'x/large' claims 200000000 bytes"):
        load_torch_file(path)
