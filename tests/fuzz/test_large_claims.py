"""Files that claim to be large: the cost of reading is bounded by their real size, not by the claimed size."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from nitrous_ema.averaging.load_average import load_tensors
from nitrous_ema.errors import SnapshotDamaged, SnapshotMismatch
from nitrous_ema.snapshots.header import Stamp, encode_header
from nitrous_ema.snapshots.names import folder_name, rank_file_name
from nitrous_ema.snapshots.store import SnapshotStore
from tests.fuzz import independent
from tests.fuzz.engine import Coverage
from tests.fuzz.targets import RUN, STEP, TRACED, AverageTarget, SnapshotTarget, snapshot_bytes
from tests.support.snapshot_folders import layout_of, record

ROOT = Path(__file__).resolve().parents[2]


def average_of(num_tensors):
    """Return a valid file with this number of tensors of one byte."""
    entries = b",".join(
        b'"%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(num_tensors)
    )
    return (len(entries) + 2).to_bytes(8, "little") + b"{" + entries + b"}" + bytes(num_tensors)


def snapshot_of(num_tensors):
    """Return a header with a matching checksum that lists this number of tensors, without their bytes."""
    content = snapshot_bytes(layout_of([record("a", (1,))]))
    text = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip(b" ")
    text = text[:-1] + b"".join(b',"%d":{"dtype":"U8","shape":[],"data_offsets":[0,1]}' % i for i in range(num_tensors))
    text = (text + b"}").ljust(-(-(9 + len(text)) // 4096) * 4096 - 8)
    blob = len(text).to_bytes(8, "little") + text
    at = blob.index(b'"header_crc32":"') + 16
    return blob[:at] + independent.header_crc32(blob).encode() + blob[at + 8 :]


def test_work_grows_as_the_number_of_tensors(tmp_path):
    def lines(num_tensors):
        target = SnapshotTarget(tmp_path / f"snapshot-{num_tensors}")
        target.path.write_bytes(snapshot_bytes(layout_of([record(f"t{i}", (1,)) for i in range(num_tensors)])))
        average = AverageTarget(tmp_path)
        average.path.write_bytes(average_of(num_tensors))
        with Coverage(TRACED, 10**9) as snapshot:
            assert len(target.store_module.SnapshotStore(target.root).get(STEP).layout.records) == num_tensors
        with Coverage(TRACED, 10**9) as loaded:
            average.load({"7": torch.ones((), dtype=torch.uint8)}, average.path, strict=False)
        return snapshot.lines, loaded.lines

    for few, many in zip(lines(200), lines(800), strict=True):
        assert 3 * few < many < 4.1 * few


def test_average_of_a_hundred_thousand_tensors_is_loaded(tmp_path):
    path, tensor = tmp_path / "x.safetensors", torch.ones((), dtype=torch.uint8)
    path.write_bytes(average_of(10**5))
    load_tensors({"7": tensor}, path, strict=False)
    assert tensor == 0


def test_message_about_many_tensors_with_long_names_is_short(tmp_path):
    path, content = tmp_path / "x.safetensors", average_of(1000)
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].replace(b':{"', b"x" * 1000 + b'":{"').replace(b'"x', b"x")
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(SnapshotMismatch, match="and 995 more") as refused:
        load_tensors({"7": torch.ones((), dtype=torch.uint8)}, path)
    assert len(str(refused.value)) < 1000


def test_million_tensors_are_refused_before_they_are_parsed(tmp_path):
    snapshot, average = tmp_path / folder_name(STEP, RUN) / rank_file_name(0, 1), tmp_path / "x.safetensors"
    snapshot.parent.mkdir()
    snapshot.write_bytes(snapshot_of(10**6))
    average.write_bytes(average_of(10**6))
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotDamaged, match="more than 2000000 values"):
            SnapshotStore(tmp_path).get(STEP)
        with pytest.raises(SnapshotDamaged, match="more than 2000000 values"):
            load_tensors({"7": torch.ones(())}, average)
        assert tracemalloc.get_traced_memory()[1] < 6 * snapshot.stat().st_size
    finally:
        tracemalloc.stop()


READER = """
import resource, sys, torch
from pathlib import Path
from nitrous_ema.averaging.load_average import load_tensors
from nitrous_ema.snapshots.legacy.folder import LegacyFolder
from nitrous_ema.snapshots.store import SnapshotStore
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (512 << 20),) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        if path.name.startswith("snapshots"):
            SnapshotStore(path).get()
        elif path.name.startswith("legacy"):
            LegacyFolder(path, gammas=[6.0]).get().records
        else:
            load_tensors({"a": torch.ones(4)}, path)
        print(path.name, "taken")
    except BaseException as error:
        print(path.name, type(error).__name__)
"""
TERABYTE = 1 << 40


def put_sparse(path, begin, num_bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(begin)
    try:
        os.truncate(path, num_bytes)
    except OSError:
        pytest.skip("the file system has no files with holes of this size")


def torch_file(tensor):
    file = io.BytesIO()
    torch.save({"a": tensor, "ema_model.a": tensor}, file)
    return file.getvalue()


def expanding():
    file = io.BytesIO(torch_file(torch.zeros(4)))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/bomb", bytes(1 << 28))
    return file.getvalue()


def put_claims(folder):
    """Write files that claim more bytes than they have, and sparse files that have them as holes."""

    def entry(shape, end):
        text = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (shape, end)
        return len(text).to_bytes(8, "little") + text

    layout = layout_of([record("a", (TERABYTE // 4,))], (0.1,), chunk_bytes=1 << 30)
    stamp = Stamp(step=STEP, t=1, t_first=1, run=RUN, lineage=((RUN, None),), created_ns=1)
    right = encode_header(layout, stamp, [0] * len(layout.chunks))
    name = f"{folder_name(STEP, RUN)}/{rank_file_name(0, 1)}"
    (folder / "claimed.safetensors").write_bytes(entry(TERABYTE // 4, TERABYTE) + bytes(16))
    put_sparse(folder / "sparse.safetensors", entry(TERABYTE // 4, TERABYTE), TERABYTE + len(entry(2**38, TERABYTE)))
    put_sparse(folder / "header.safetensors", (99_999_744).to_bytes(8, "little"), TERABYTE)
    put_sparse(folder / "snapshots-sparse" / name, right, len(right) + TERABYTE)
    put_sparse(folder / "snapshots-short" / name, right, len(right) + 100)
    for kind, content in (("wide", torch_file(torch.zeros(1).expand(TERABYTE))), ("expanding", expanding())):
        (folder / f"{kind}.pt").write_bytes(content)
        (folder / f"legacy-{kind}").mkdir()
        (folder / f"legacy-{kind}" / "0.1.pt").write_bytes(content)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of the address space is not enforced")
def test_no_claim_takes_memory_that_the_file_does_not_have(tmp_path):
    put_claims(tmp_path)
    places = sorted(str(each) for each in tmp_path.iterdir())
    child = subprocess.run(
        [sys.executable, "-c", READER, *places],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = dict(line.split() for line in child.stdout.splitlines())
    right_answers = {"snapshots-sparse": "taken", "sparse.safetensors": "SnapshotMismatch"}
    assert found == {Path(each).name: right_answers.get(Path(each).name, "SnapshotDamaged") for each in places}
