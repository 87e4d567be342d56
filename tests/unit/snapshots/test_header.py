"""The bytes of snapshot files. Oracles: the safetensors package, numpy and torch; headers forged byte by byte."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrous_ema._base.dtypes import DTYPE_BYTES
from nitrous_ema.errors import SnapshotDamaged, SnapshotUnsupported
from nitrous_ema.snapshots import header as header_module
from nitrous_ema.snapshots.header import NonFinite, Stamp, decode_header, encode_header, header_bytes, header_end
from nitrous_ema.snapshots.layout import Span
from nitrous_ema.snapshots.names import folder_name, rank_file_name
from tests.support.snapshot_layouts import MIXED, layout_of, layouts, record

RUN = "20261122T101530.123456-1a2b3c4d"
OLDER = "20261101T000000.000000-00000000"
PATH = Path("/snapshots") / folder_name(1000, RUN) / rank_file_name(0, 1)


def stamp(**more):
    return Stamp(
        **{
            "step": 1000,
            "t": 1000,
            "t_first": 1,
            "run": RUN,
            "lineage": ((OLDER, 500), (RUN, None)),
            "trainer": {"host": "h", "pid": 3, "started": 1.5},
            "created_ns": 1_700_000_000_000_000_000,
            "library_version": "1.0.0",
        }
        | more
    )


def file_of(layout, stamped, fill=None):
    """Return a whole snapshot file, with pseudorandom data, and the data."""
    data = np.random.default_rng(0).integers(0, 256, layout.data_bytes, np.uint8) if fill is None else fill
    crc32 = [zlib.crc32(data[begin:end]) for begin, end in layout.chunks]
    return encode_header(layout, stamped, crc32) + data.tobytes(), data


def decode(blob, file_bytes=None):
    return decode_header(blob, path=PATH, file_bytes=len(blob) if file_bytes is None else file_bytes)


def parts(blob):
    """Return the JSON of a header, without its padding."""
    return blob[8 : 8 + int.from_bytes(blob[:8], "little")].rstrip(b" ")


def with_field(text, field, *, before):
    """Return the JSON of a header with one more field in its metadata, before the first place of some bytes."""
    at = text.index(before)
    return text[:at] + b"," + field + text[at:]


def sign(text, size=None):
    """Return a header with any JSON text and the matching checksum."""
    size = size or -(-(8 + len(text)) // 4096) * 4096
    blob = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
    at = blob.index(b'"header_crc32":"') + 16
    blob = blob[:at] + b"00000000" + blob[at + 8 :]
    return blob[:at] + b"%08x" % zlib.crc32(blob) + blob[at + 8 :]


# What other readers see


def test_safetensors_reads_every_kind_of_tensor(tmp_path):
    layout = layout_of(*MIXED, chunk_bytes=64)
    content, data = file_of(layout, stamp())
    (tmp_path / "file").write_bytes(content)
    tensors = safetensors.torch.load_file(tmp_path / "file")
    assert set(tensors) == {
        *(f"ema{i}.{name}" for i in (0, 1) for name in ("a.weight", "tied", "complex", "none", "scalar")),
        *(f"model.{n}" for n in ("num_batches", "mask", "half", "ünï.__metadata__", "phase", "no numbers")),
        *(["padding"] if layout.padding_bytes else []),
    }
    floats = data[: layout.sections[0].end].view(np.float32)
    assert tensors["ema0.a.weight"].numpy().tobytes() == floats[:15].tobytes()
    assert tensors["ema0.complex"].shape == (2, 3, 2)
    assert tensors["ema0.complex"].numpy().tobytes() == floats[17:29].tobytes()
    assert tensors["ema0.none"].shape == (0, 4)
    assert tensors["ema0.scalar"].shape == ()
    assert tensors["model.half"].dtype == torch.bfloat16
    assert tensors["model.ünï.__metadata__"].dtype == torch.float64
    assert tensors["model.phase"].shape == (2, 2)
    for entry in layout.entries:
        stored = tensors[entry.name].contiguous().view(-1).view(torch.uint8).numpy()
        assert stored.tobytes() == data[entry.begin : entry.end].tobytes(), entry.name


def test_safetensors_reads_the_facts(tmp_path):
    layout = layout_of(*MIXED)
    (tmp_path / "file").write_bytes(file_of(layout, stamp(t=12.5))[0])
    with safetensors.safe_open(tmp_path / "file", "numpy") as file:
        facts = file.metadata()
    names = "format_version library_version step t gammas sigma_rels rank world_size run lineage t_first trainer "
    names += "checkpoint_dtype layout_sha256 tensors chunk_bytes crc32 header_crc32 created_ns"
    assert " ".join(sorted(facts)) == " ".join(sorted(names.split(" ")))
    assert (facts["step"], facts["t"], facts["run"]) == ("1000", "12.5", RUN)
    assert json.loads(facts["lineage"]) == [[OLDER, 500], [RUN, None]]
    assert json.loads(facts["gammas"]) == [6.0, 7.0]
    assert json.loads(facts["tensors"])[1] == [["tied", "also.tied"], "F32", "averaged", True, [2]]


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
def test_averages_are_stored_in_the_requested_type(tmp_path, dtype):
    layout = layout_of(record(shape=(5,)), record("n", "F64", (2,), "copied"), checkpoint_dtype=dtype)
    content, data = file_of(layout, stamp())
    (tmp_path / "file").write_bytes(content)
    average = safetensors.torch.load_file(tmp_path / "file")["ema1.a"]
    expected = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    assert average.dtype == expected
    assert (
        average.view(torch.uint8).numpy().tobytes()
        == data[5 * DTYPE_BYTES[dtype] :][: 5 * DTYPE_BYTES[dtype]].tobytes()
    )


def test_misaligned_section_of_copied_tensors_is_padded(tmp_path):
    layout = layout_of(record(shape=(1,)), record("n", "F64", (2,), "copied"), profiles=1)
    assert layout.sections == (Span(0, 4), Span(4, 24))
    assert layout.copied_spans == (Span(8, 24),)
    (tmp_path / "file").write_bytes(file_of(layout, stamp())[0])
    assert safetensors.torch.load_file(tmp_path / "file")["padding"].shape == (4,)


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_file_of_any_layout_is_valid_safetensors_and_decodes_to_itself(layout):
    content, data = file_of(layout, stamp())
    tensors = dict(safetensors.deserialize(content))
    assert {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in tensors.items()} == {
        e.name: (e.dtype, e.shape, data[e.begin : e.end].tobytes()) for e in layout.entries
    }
    header = decode(content)
    assert (header.layout, header.stamp) == (layout, stamp())
    assert header.data_begin + layout.data_bytes == header.file_bytes == len(content)
    assert header.data_begin % 4096 == 0


# Encoding and decoding


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stamp(step=0), "step is 0"),
        (lambda: stamp(t=float("nan")), "t is nan"),
        (lambda: stamp(t_first=1001), "t_first is 1001"),
        (lambda: stamp(rank=1), "rank is 1 of 1"),
        (lambda: stamp(run="run", lineage=(("run", None),)), "expected a run id from new_run_id"),
        (lambda: stamp(lineage=((RUN, 5),)), "ending with"),
        (lambda: stamp(lineage=()), "ending with"),
        (lambda: stamp(lineage=((RUN, 5), (RUN, None))), "a different run id in each"),
        (lambda: stamp(lineage=((OLDER, 0), (RUN, None))), "expected positive steps"),
        (lambda: stamp(trainer={"host": [1]}), "trainer is"),
    ],
)
def test_impossible_stamp_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_header_size_is_known_before_its_numbers_are():
    layout = layout_of(*MIXED, chunk_bytes=16)
    size = header_bytes(layout, stamp())
    tiny = stamp(step=1, t=1, created_ns=0)
    huge = stamp(
        step=10**18 - 1,
        t=-(-(2**63) // 1) - 1,
        t_first=2.2250738585072014e-308,
        rank=10**9 - 2,
        world_size=10**9 - 1,
        created_ns=2**63 - 1,
    )
    assert len(encode_header(layout, tiny, [0] * len(layout.chunks))) == size
    assert len(encode_header(layout, huge, [2**32 - 1] * len(layout.chunks))) == size
    widest = NonFinite(2**63 - 1, 2**32 - 1)
    assert len(encode_header(layout, huge, [2**32 - 1] * len(layout.chunks), [widest] * len(layout.gammas))) == size


def test_header_of_version_1_has_exactly_these_bytes():
    """Files of this version must stay readable: a change that breaks this test needs a new format version."""
    layout = layout_of(*MIXED, chunk_bytes=64)
    blob = encode_header(layout, stamp(), range(len(layout.chunks)))
    assert parts(blob).startswith(b'{"__metadata__":{"header_crc32":"')
    assert len(blob) == 4096
    assert hashlib.sha256(blob).hexdigest() == "010aa6da7074138c24a5281f7abac6bdd60ef9354ccc4490ad4a3cc173e69af1"


def test_digest_of_the_layout_is_that_of_the_documented_fields():
    facts = json.loads(parts(WHOLE))["__metadata__"]
    digested = {name: facts[name] for name in ("gammas", "sigma_rels", "checkpoint_dtype", "tensors")}
    text = json.dumps(digested, separators=(",", ":"), ensure_ascii=False)
    assert facts["layout_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_large_header_stays_compact():
    layout = layout_of(*(record(f"blocks.{i}.attn.qkv.weight", shape=(64, 64)) for i in range(2000)))
    assert header_bytes(layout, stamp()) < 600_000


def test_header_beyond_what_readers_accept_is_refused_before_writing(monkeypatch):
    monkeypatch.setattr(header_module, "MAX_HEADER_VALUES", 50)
    with pytest.raises(ValueError, match="Track fewer tensors"):
        header_bytes(layout_of(*MIXED), stamp())


def test_checksums_must_be_one_per_chunk():
    with pytest.raises(ValueError, match="0 checksums; the layout has 2 chunks"):
        encode_header(layout_of(record()), stamp(), [])


WHOLE = file_of(layout_of(*MIXED, chunk_bytes=64), stamp())[0]
DATA_BEGIN = header_bytes(layout_of(*MIXED, chunk_bytes=64), stamp())


@given(st.integers(0, DATA_BEGIN * 8 - 1))
@settings(max_examples=300, deadline=None)
def test_flipped_bit_anywhere_in_a_header_is_damage(bit):
    blob = bytearray(WHOLE)
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SnapshotDamaged, match="rank-00000-of-00001") as caught:
        decode(bytes(blob))
    assert (caught.value.path, caught.value.step, caught.value.chunk) == (PATH, 1000, None)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 50, 4095, DATA_BEGIN - 1, DATA_BEGIN, len(WHOLE) - 1, len(WHOLE) + 1])
def test_file_of_another_length_is_damage(kept):
    with pytest.raises(SnapshotDamaged, match="is damaged"):
        decode((WHOLE + b"\0")[:kept])


@pytest.mark.parametrize("length", [0, 1, 4088 - 1, 4088 + 8, 2**32 - 8, 100_007_936 - 8, 2**63, 2**64 - 8])
def test_impossible_header_length_is_refused_before_the_header_is_read(length):
    with pytest.raises(SnapshotDamaged, match="invalid header: its length is"):
        header_end(length.to_bytes(8, "little"), path=PATH, file_bytes=10**9)


def forged_texts():
    """Header texts that are each wrong in one respect, by name; their checksum is made to match."""
    text = parts(WHOLE)
    once = b'"ema0.tied":{"dtype":"F32","shape":[2],"data_offsets":[60,68]}'
    assert once in text
    first_crc32 = text[text.index(b'"crc32":"[') :].partition(b",")[0] + b","
    tensors = text[text.index(b'"tensors":') : text.index(b'"},"ema0') + 1]
    yield "garbage", b'{"__metadata__":{"header_crc32":"00000000"' + b"\xff" * 50
    yield "no metadata", b'{"x":1,"header_crc32":"00000000"}'
    yield "not an object", b'["header_crc32":"00000000"]'
    yield "no version", text.replace(b'"format_version":"1",', b"")
    yield "no layout", text.replace(b'"layout_sha256"', b'"layout_sha257"')
    yield "other digest", text.replace(b'"layout_sha256":"', b'"layout_sha256":"0')
    yield "overlap", text.replace(once, once.replace(b"60,68", b"56,64"))
    yield "hole", text.replace(once, once.replace(b"60,68", b"61,69"))
    yield "boolean offset", text.replace(once, once.replace(b"60,68", b"60,true"))
    yield "entry twice", text.replace(once, once + b"," + once)
    yield "entry missing", text.replace(b"," + once, b"")
    yield "foreign entry", text.replace(once, once + b',"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}')
    yield "other name", text.replace(b'"ema0.tied"', b'"ema0.wild"')
    yield "other dtype", text.replace(once, once.replace(b"F32", b"I32"))
    yield "metadata twice", text[:-1] + b',"__metadata__":{}}'
    yield "fact twice", text.replace(b'"step":"1000"', b'"step":"1000","step":"1000"')
    yield "foreign fact", text.replace(b'"step":"1000"', b'"step":"1000","note":"x"')
    yield "requires misplaced", with_field(text, b'"requires":"{\\"columns\\":\\"1.2\\"}"', before=b',"step"')
    for requires in (b'"{}"', b'"[]"', b'"x"', b'"{\\"columns\\":12}"', b'"\\ud800"'):
        yield f"requires {requires!r}", with_field(text, b'"requires":' + requires, before=b',"library_version"')
    yield "optional field that is no text", with_field(text, b'"note":1', before=b',"crc32"')
    yield "optional fields out of order", with_field(text, b'"zoo":"","note":""', before=b',"crc32"')
    yield "optional field twice", with_field(text, b'"note":"","note":""', before=b',"crc32"')
    yield "optional field before the trainer", with_field(text, b'"note":""', before=b',"trainer"')
    for nonfinite in (b"null", b"[null]", b"[null,1]", b"[null,[0,0]]", b"[null,[1,-1]]", b"[null,[1,0,0]]", b"[null,"):
        yield f"nonfinite {nonfinite!r}", with_field(text, b'"nonfinite":"' + nonfinite + b'"', before=b',"crc32"')
    for pair in (b"[100000,0]", b"[1,7]", b"[1,100]", b"[true,0]", b"[1.0,0]"):
        yield f"nonfinite {pair!r}", with_field(text, b'"nonfinite":"[null,' + pair + b']"', before=b',"crc32"')
    yield "fact missing", text.replace(b'"step":"1000",', b"")
    yield "trailing", text + b"{}"
    yield "spaces inside", text.replace(b'"step":', b'"step" :')
    for found, put in (
        (b'"step":"1000"', [b'"step":1000', b'"step":"1e3"', b'"step":"-1"', b'"step":"01000"', b'"step":" 1000"']),
        (
            b'"step":"1000"',
            [b'"step":"' + b"9" * 10_000 + b'"', b'"step":null', b'"step":Infinity', b'"step":[]', b'"step":{}'],
        ),
        (b'"t":"1000"', [b'"t":"NaN"', b'"t":"Infinity"', b'"t":"1e999"', b'"t":"[1]"', b'"t":"true"', b'"t":"1e3"']),
        (b'"rank":"0"', [b'"rank":"1"', b'"rank":"x"']),
        (b'"world_size":"1"', [b'"world_size":"0"', b'"world_size":"99999999999999"']),
        (b'"chunk_bytes":"64"', [b'"chunk_bytes":"0"', b'"chunk_bytes":"1"', b'"chunk_bytes":"96"']),
        (b'"checkpoint_dtype":"F32"', [b'"checkpoint_dtype":"F16"', b'"checkpoint_dtype":["F32"]']),
        (b'"gammas":"[6.0,7.0]"', [b'"gammas":"[6.0]"', b'"gammas":"[6,7]"', b'"gammas":"{}"', b'"gammas":"["']),
        (b'"gammas":"[6.0,7.0]"', [b'"gammas":"' + b"[" * 100_000 + b'"', b'"gammas":"[NaN,7.0]"', b'"gammas":"5"']),
        (b'"run":"20261122', [b'"run":"../../../etc', b'"run":"20261123', b'"run":7,"x":"']),
        (b'[\\"' + RUN.encode(), [b'[5,[\\"' + RUN.encode(), b'[\\"x']),
        (tensors, [b'"tensors":"[]"', b'"tensors":"[[]]"', b'"tensors":"[5]"', b'"tensors":"{}"', b'"tensors":""']),
        (tensors, [b'"tensors":"[[[],\\"F32\\",\\"averaged\\",true,[1]]]"', b'"tensors":"[[5,5,5,5,5]]"']),
        (tensors, [b'"tensors":"[[{},\\"F32\\",\\"averaged\\",true,[1]]]"', b'"tensors":"' + b"[" * 100_000 + b'"']),
        (tensors, [b'"tensors":"[[[\\"a\\"],\\"F32\\",\\"averaged\\",true,[4611686018427387904,1000000]]]"']),
        (
            first_crc32,
            [b'"crc32":"[' + value + b"," for value in (b"true", b"1.0", b"-1", b"4294967296", b"null", b"[]")],
        ),
        (first_crc32, [b'"crc32":"[', first_crc32 + b"0,"]),
        (b'"trainer":"{', [b'"trainer":"[', b'"trainer":"{\\"x\\":[],', b'"trainer":"{\\"x\\":NaN,']),
        (b'"library_version":"1.0.0"', [b'"library_version":1', b'"library_version":"\\ud800"']),
    ):
        assert found in text, found
        for number, replacement in enumerate(put):
            if replacement != found:
                yield f"{found[:20]!r} {number}", text.replace(found, replacement, 1)


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in forged_texts()])
def test_forged_header_is_damage_and_nothing_else(text):
    blob = sign(text, max(4096, -(-(8 + len(text)) // 4096) * 4096))
    with pytest.raises(SnapshotDamaged, match=r"is damaged: invalid header: .{10}"):
        decode(blob + WHOLE[DATA_BEGIN:])


# Files of newer versions


@pytest.mark.parametrize("size", [DATA_BEGIN, DATA_BEGIN + 4096])
def test_unknown_optional_field_is_ignored(size):
    field = b'"change":"[0.5,null]","zoo":"{\\"x\\":1}"'
    forged = sign(with_field(parts(WHOLE), field, before=b',"crc32"'), size)
    header, plain = decode(forged + WHOLE[DATA_BEGIN:]), decode(WHOLE)
    assert header.stamp == dataclasses.replace(plain.stamp, unknown={"change": "[0.5,null]", "zoo": '{"x":1}'})
    assert (header.layout, header.crc32, header.nonfinite) == (plain.layout, plain.crc32, None)
    assert header.data_begin == size


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        (b'"{\\"columns\\":\\"1.2\\"}"', "needs `columns`, from nitrous_ema 1.2 on; this is nitrous_ema"),
        (b'"{\\"a\\":\\"2.0\\",\\"b\\":\\"3\\"}"', "needs `a`, from nitrous_ema 2.0 on and `b`, from nitrous_ema 3 on"),
    ],
)
def test_feature_of_a_newer_version_is_refused_by_name(requires, message):
    text = with_field(parts(WHOLE), b'"requires":' + requires, before=b',"library_version"')
    # A feature may change anything after it: here the records have an item that this version does not know.
    text = text.replace(b",true,[", b",true,null,[")
    with pytest.raises(SnapshotUnsupported, match=message) as caught:
        decode(sign(text) + WHOLE[DATA_BEGIN:])
    assert (caught.value.path, caught.value.step) == (PATH, 1000)
    assert caught.value.requires == tuple(json.loads(json.loads(requires)))
    assert "damaged" not in str(caught.value)
    assert str(caught.value).endswith("exclude=[1000] (on the command line: --exclude 1000 of synthesize or prune).")


def test_newer_format_version_is_refused_by_name():
    text = parts(WHOLE).replace(b'"format_version":"1"', b'"format_version":"2"')
    with pytest.raises(SnapshotUnsupported, match="needs format version 2; this is nitrous_ema") as caught:
        decode(sign(text) + WHOLE[DATA_BEGIN:])
    assert caught.value.requires == ("format version 2",)


def test_flipped_bit_in_a_header_of_a_newer_version_is_damage():
    """The checksum is verified before the version: damage must not look like a newer file."""
    text = parts(WHOLE).replace(b'"format_version":"1"', b'"format_version":"2"')
    blob = bytearray(sign(text) + WHOLE[DATA_BEGIN:])
    blob[300] ^= 1
    with pytest.raises(SnapshotDamaged, match="checksum mismatch"):
        decode(bytes(blob))


# Values that are not finite


def test_record_of_nonfinite_values_is_encoded_and_decoded():
    layout = layout_of(*MIXED, chunk_bytes=64)
    averaged = [index for index, each in enumerate(layout.records) if each.role == "averaged"]
    data = np.zeros(layout.data_bytes, np.uint8)
    crc32 = [zlib.crc32(data[begin:end]) for begin, end in layout.chunks]
    for nonfinite in [
        (None, None),
        (None, NonFinite(layout.average_elements, averaged[-1])),
        (NonFinite(1, averaged[0]),) * 2,
    ]:
        blob = encode_header(layout, stamp(), crc32, nonfinite)
        assert len(blob) == header_bytes(layout, stamp())
        assert decode(blob + data.tobytes()).nonfinite == nonfinite
    assert decode(encode_header(layout, stamp(), crc32) + data.tobytes()).nonfinite is None


def test_header_with_more_padding_than_the_writer_adds_is_damage():
    with pytest.raises(SnapshotDamaged, match="it has 8192 bytes, expected 4096 for its layout"):
        decode(sign(parts(WHOLE), 8192) + WHOLE[DATA_BEGIN:])


@given(st.integers(1, len(parts(WHOLE))), st.integers(0, 60), st.binary(max_size=20))
@settings(max_examples=300, deadline=None)
def test_header_with_any_piece_replaced_and_signed_again_is_damage(begin, length, piece):
    text = parts(WHOLE)
    begin = min(len(text) - 1, begin + 50)
    forged = text[:begin] + piece + text[begin + length :]
    if forged.rstrip(b" ") == text:
        return
    with pytest.raises(SnapshotDamaged):
        decode(sign(forged, 4096 * 2) + WHOLE[DATA_BEGIN:])


@pytest.mark.parametrize("where", ["stamp", "layout"])
def test_header_with_too_many_values_costs_little_memory(where):
    values = b'"x":[' + b"[]," * 3_000_000 + b"[]]"
    first, second = (values, b'"y":0') if where == "stamp" else (b'"y":0', values)
    bomb = b'{"__metadata__":{"header_crc32":"00000000","format_version":"1",' + first
    blob = sign(bomb + b',"layout_sha256":"",' + second + b"}}")
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotDamaged, match="invalid header: "):
            decode(blob)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(blob)
    finally:
        tracemalloc.stop()


def test_layout_is_decoded_once_for_all_snapshots_of_a_run():
    layout = layout_of(*MIXED, chunk_bytes=32)
    first, second = (decode(file_of(layout, stamp(step=step, t=step))[0]) for step in (1, 2))
    assert first.layout is second.layout
    assert (first.stamp.step, second.stamp.step) == (1, 2)


# Parts of tensors


def part_layout(part=(2, 3), **more):
    return layout_of(dataclasses.replace(record(shape=(4, 3)), part=part), record("b", shape=(2,)), **more)


def test_header_of_a_part_has_exactly_these_fields():
    """A sixth item in each record, the offsets, and the feature that an older library refuses by name."""
    layout = part_layout()
    text = parts(encode_header(layout, stamp(offsets=((2, 0),)), [0] * len(layout.chunks)))
    facts = json.loads(text)["__metadata__"]
    assert json.loads(facts["tensors"]) == [
        [["a"], "F32", "averaged", True, [4, 3], [2, 3]],
        [["b"], "F32", "averaged", True, [2], None],
    ]
    assert (facts["offsets"], facts["requires"]) == ("[[2,0]]", '{"boxes":"1.0.0"}')
    names = list(facts)
    assert names[:3] == ["header_crc32", "format_version", "requires"]
    assert names[names.index("trainer") + 1 :][:2] == ["offsets", "crc32"]
    assert json.loads(text)["ema0.a"]["shape"] == [2, 3]
    whole = layout_of(record(shape=(4, 3)), record("b", shape=(2,)))
    assert (layout.sha256, layout.whole) == (whole.sha256, whole), "the digest is that of the whole tensors"
    assert "requires" not in json.loads(parts(encode_header(whole, stamp(), [0] * len(whole.chunks))))["__metadata__"]


def test_parts_are_decoded_as_they_were_encoded():
    layout = part_layout()
    stamped = stamp(offsets=((1, 0),), rank=1, world_size=3)
    content, _ = file_of(layout, stamped)
    path = PATH.with_name(rank_file_name(1, 3))
    found = decode_header(content, path=path, file_bytes=len(content))
    assert (found.layout, found.stamp) == (layout, stamped)


@pytest.mark.parametrize("part", [(4, 3), (5, 3), (2,), (-1, 3), (True, 3), [2, 3]])
def test_impossible_part_is_refused(part):
    with pytest.raises(ValueError, match="part of 'a' is"):
        part_layout(part)


@pytest.mark.parametrize("offsets", [None, (), ((0, 0), (0, 0)), ((3, 0),), ((-1, 0),), ((0,),), ((0, 1),)])
def test_offsets_that_no_part_has_are_refused(offsets):
    layout = part_layout()
    with pytest.raises(ValueError, match=r"offsets; expected one for each of 1|the part of 'a' begins at"):
        encode_header(layout, stamp(offsets=offsets), [0] * len(layout.chunks))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"offsets":"[[2,0]]"', b'"offsets":"[[3,0]]"'),
        (b'"offsets":"[[2,0]]"', b'"offsets":"[[2,0],[0]]"'),
        (b'"offsets":"[[2,0]]"', b'"offsets":"[[2,false]]"'),
        (b'"offsets":"[[2,0]]"', b'"offsets":"7"'),
        (b'"offsets":"[[2,0]]",', b""),
        (b',"requires":"{\\"boxes\\":\\"1.0.0\\"}"', b""),
        (b',"requires":"{\\"boxes\\":\\"1.0.0\\"}"', b',"requires":"{\\"boxes\\":\\"1.0.1\\"}"'),
        (b"[4,3],[2,3]]", b"[4,3],[4,3]]"),
        (b"[4,3],[2,3]]", b"[4,3],[2,9]]"),
        (b"[4,3],[2,3]]", b"[4,3]]"),
        (b"[2],null]", b"[2]]"),
    ],
)
def test_forged_parts_are_damage(old, new):
    layout = part_layout()
    content, _ = file_of(layout, stamp(offsets=((2, 0),)))
    text = parts(content)
    assert old in text
    begin = int.from_bytes(content[:8], "little") + 8
    with pytest.raises(SnapshotDamaged):
        decode(sign(text.replace(old, new), begin) + content[begin:])
