from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

from nitrous_ema.averaging.load_average import load_average
from nitrous_ema.averaging.model.tracking import track
from nitrous_ema.errors import (
    NitrousError,
    SnapshotDamaged,
    SnapshotMismatch,
    SnapshotNotFound,
)
from nitrous_ema.posthoc import solve_weights
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis import float_conversion as numbers
from nitrous_ema.synthesis import streaming
from nitrous_ema.synthesis.in_memory import synthesize
from nitrous_ema.synthesis.outputs.reader import read_average, read_header
from nitrous_ema.synthesis.outputs.writer import write_outputs, write_shard
from nitrous_ema.synthesis.plan import plan_from_store
from nitrous_ema.synthesis.streaming import TILE_ELEMENTS, engine_sizes, stream
from tests.support.outputs import load_output
from tests.support.snapshot_folders import (
    TORCH_TYPES,
    layout_of,
    record,
    run_id,
    snapshot_file,
    write_run,
    write_snapshot,
)

LENGTHS = (0.05, 0.07, 0.12)
STEPS = range(100, 1100, 100)
MIB = 1 << 20


def plain_layout(elements=TILE_ELEMENTS * 2 + 77, **more):
    return layout_of([record("weight", (elements,))], **more)


def weighted_sums(root: Path, gamma_r, t_r) -> dict[str, np.ndarray]:
    """What the averages are by definition, from the files' own headers and the safetensors package: [outputs, ...]."""
    columns = []
    for path in sorted(root.glob("step-*/rank-*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            for profile, gamma in enumerate(json.loads(metadata["gammas"])):
                columns.append((float(metadata["t"]), gamma, path, profile))
    t_i, gamma_i = np.array([each[0] for each in columns]), np.array([each[1] for each in columns])
    weights = solve_weights(t_i, gamma_i, np.full(len(gamma_r), float(t_r)), np.array(gamma_r))
    sums: dict[str, np.ndarray] = {}
    for (_, _, path, profile), row in zip(columns, weights, strict=True):
        for key, tensor in safetensors.torch.load_file(path).items():
            if key.startswith(f"ema{profile}."):
                term = np.multiply.outer(row, tensor.double().numpy())
                sums[key.partition(".")[2]] = sums.get(key.partition(".")[2], 0.0) + term
    return sums


def written(root: Path, out: Path, lengths=LENGTHS, suffix=".safetensors", **options):
    """Outputs from all columns, unless a tolerance is given."""
    out.mkdir(exist_ok=True)
    options.setdefault("tolerance", 0)
    memory = options.pop("memory_bytes", 64 * MIB)
    dtype = options.pop("dtype", None)
    files = options.pop("files", None)
    plan = plan_from_store(root, sigma_rels=lengths, **options)
    paths = [out / f"{length}{suffix}" for length in lengths]
    write_outputs(plan, paths, memory_bytes=memory, dtype=dtype, files=files)
    return paths


# Numbers


@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16"])
def test_rounding_is_that_of_torch(code):
    torch_type = TORCH_TYPES[code]
    rng = np.random.default_rng(0)
    values = rng.standard_normal(100_000) * 10.0 ** rng.integers(-12, 4, 100_000)
    ties = (1 + np.arange(512) / 256.0) * 2.0 ** rng.integers(-20, 10, 512)  # halfway between bfloat16 numbers, and not
    values = np.concatenate([values, ties, -ties, [0.0, -0.0, np.inf, -np.inf, 1e-300, 6e-8, 65504.0]])
    ours = torch.from_numpy(numbers.narrow(values, code).view(np.uint8)).view(torch_type)
    assert torch.equal(ours, torch.from_numpy(values).to(torch_type))


def test_every_bfloat16_number_survives_reading_and_writing():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(bits.size)
    numbers.widen(bits.view(np.uint8), "BF16", values)
    assert np.array_equal(values, torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).double(), equal_nan=True)
    back = np.empty_like(values)
    numbers.widen(numbers.narrow(values, "BF16").view(np.uint8), "BF16", back)
    assert np.array_equal(values, back, equal_nan=True)


def test_nan_of_any_bits_stays_nan():
    bits = np.array([0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x7FF8000000000000, 0x7FF0000000000001], dtype=np.uint64)
    for code in numbers.FLOAT_TYPES:
        values = np.empty(4)
        numbers.widen(numbers.narrow(bits.view("f8"), code).view(np.uint8), code, values)
        assert np.isnan(values).all()


# Averages


@pytest.mark.parametrize("checkpoint_dtype", ["F64", "F32", "F16", "BF16"])
def test_averages_are_the_weighted_sums_of_what_the_files_hold(tmp_path, checkpoint_dtype):
    layout = layout_of(
        [record("a", (301, 123)), record("empty", (0, 3)), record("b", ()), record("z", (5,), "C64")],
        checkpoint_dtype=checkpoint_dtype,
    )
    write_run(tmp_path, layout, STEPS)
    result = synthesize(tmp_path, sigma_rels=LENGTHS, dtype=np.float64, tolerance=0)
    expected = weighted_sums(tmp_path, result.plan.gammas, 1000)
    for output in range(len(LENGTHS)):
        tensors = result.averaged(output)
        np.testing.assert_allclose(tensors["a"], expected["a"][output], rtol=0, atol=1e-12)
        np.testing.assert_allclose(tensors["b"], expected["b"][output], rtol=0, atol=1e-12)
        np.testing.assert_allclose(tensors["z"].view(np.float64).reshape(5, 2), expected["z"][output], atol=1e-12)


def test_average_has_the_profile_that_was_asked_for(tmp_path):
    """One-hot weights: the parameter at step s is the s-th unit vector, so an average is its own profile."""
    total = 2000
    layout = layout_of([record("p", (total,))], checkpoint_dtype="F64")

    def profile(gamma, t):
        edges = np.minimum(np.arange(total + 1), t) / t
        return np.diff(edges ** (gamma + 1))

    write_run(
        tmp_path, layout, range(100, total + 1, 100), averages=lambda t: [profile(gamma, t) for gamma in layout.gammas]
    )
    result = synthesize(tmp_path, sigma_rels=(0.06, 0.09, 0.15), dtype=np.float64)
    for gamma, error, flat in zip(result.plan.gammas, result.plan.report.profile_error, result.flats, strict=True):
        asked = profile(gamma, total)
        assert np.linalg.norm(flat - asked) <= 1.02 * error * np.linalg.norm(asked)
        assert flat.sum() == pytest.approx(1.0, abs=1e-9)


def test_snapshots_after_the_target_have_no_part(tmp_path):
    write_run(tmp_path, plain_layout(), STEPS)
    middle = synthesize(tmp_path, sigma_rels=LENGTHS, step=500, tolerance=0)
    only_past = tmp_path / "past"
    write_run(only_past, plain_layout(), range(100, 600, 100))
    assert np.array_equal(middle.flats, synthesize(only_past, sigma_rels=LENGTHS, tolerance=0).flats)
    assert {column.step for column in middle.plan.columns} == {100, 200, 300, 400, 500}


def test_a_tracked_length_is_read_from_one_column(tmp_path):
    write_run(tmp_path, plain_layout(), STEPS)
    result = synthesize(tmp_path, sigma_rels=[0.10])
    stored = safetensors.numpy.load_file(snapshot_file(tmp_path, 1000))["ema1.weight"]
    assert np.array_equal(result.flats[0], stored)
    assert [(column.step, column.gamma) for column in result.plan.columns] == [(1000, result.plan.gammas[0])]


def test_time_is_what_the_mathematics_uses_and_step_what_selects(tmp_path):
    layout, run = plain_layout(), run_id()
    rng = np.random.default_rng(1)
    for step, t in [(1, 256), (2, 1024), (3, 1280)]:
        write_snapshot(tmp_path, layout, step, rng.standard_normal((2, layout.average_elements)), run=run, t=t)
    result = synthesize(tmp_path, sigma_rels=[0.08], step=3, dtype=np.float64)
    expected = weighted_sums(tmp_path, result.plan.gammas, 1280)["weight"][0]
    np.testing.assert_allclose(result.flats[0], expected, atol=1e-12)


# Snapshots that do not belong together


def test_step_without_a_snapshot_names_the_nearest(tmp_path):
    write_run(tmp_path, plain_layout(8), STEPS)
    with pytest.raises(SnapshotNotFound) as e:
        synthesize(tmp_path, sigma_rels=LENGTHS, step=333)
    assert list(e.value.nearest) == [300, 400]


@pytest.mark.parametrize("lengths", [{}, {"gammas": [5.0], "sigma_rels": [0.1]}, {"sigma_rels": []}])
def test_lengths_are_given_one_way(tmp_path, lengths):
    with pytest.raises(ValueError, match=r"exactly one of gammas and sigma_rels|no length"):
        plan_from_store(tmp_path, **lengths)


def test_length_outside_its_domain_is_refused_before_the_folder_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"sigma_rels has 0\.3"):
        plan_from_store(tmp_path / "nowhere", sigma_rels=[0.3])


def test_different_tensors_in_one_history_are_not_summed(tmp_path):
    run = run_id()
    write_run(tmp_path, layout_of([record("w", (8,))]), [100], run=run)
    write_run(tmp_path, layout_of([record("w", (4, 2))]), [200, 300], run=run)
    plan = synthesize(tmp_path, sigma_rels=LENGTHS, tolerance=0).plan
    assert plan.steps == (200, 300)
    words = "step 100, 'w' is (8,) instead of (4, 2)."
    assert any(words in note for note in plan.report.warnings)


def test_different_stored_types_in_one_history_are_summed(tmp_path):
    run = run_id()
    for steps, dtype in [([100, 200], "F16"), ([300], "F64"), ([400], "BF16")]:
        write_run(tmp_path, layout_of([record("w", (70,))], checkpoint_dtype=dtype), steps, run=run)
    result = synthesize(tmp_path, sigma_rels=[0.08], dtype=np.float64)
    expected = weighted_sums(tmp_path, result.plan.gammas, 400)["w"][0]
    np.testing.assert_allclose(result.flats[0], expected, atol=1e-13)


# Damage


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def test_damaged_chunk_stops_everything_and_leaves_nothing(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    layout = plain_layout(chunk_bytes=1 << 14)
    write_run(root, layout, STEPS)
    path = snapshot_file(root, 400)
    data_begin = SnapshotStore(root).get(400).data_begin
    begin, _ = layout.chunks[len(layout.chunks) // 2 + 2]
    flip_byte(path, data_begin + begin + 5)
    with pytest.raises(SnapshotDamaged, match="--exclude 400") as e:
        written(root, out)
    assert (e.value.path, e.value.step, e.value.chunk) == (path, 400, len(layout.chunks) // 2 + 2)
    assert list(out.iterdir()) == []
    result = synthesize(root, sigma_rels=LENGTHS, exclude=[400], tolerance=0)
    assert 400 not in {column.step for column in result.plan.columns}
    assert result.plan.excluded == (400,)


def test_damaged_copied_tensors_are_found(tmp_path):
    layout = layout_of([record("w", (8,)), record("n", (), "I64", "copied")])
    write_run(tmp_path, layout, [100], copied=lambda step: {"n": bytes(8)})
    flip_byte(snapshot_file(tmp_path, 100), -1)
    with pytest.raises(SnapshotDamaged) as e:
        written(tmp_path, tmp_path / "out")
    assert e.value.chunk == len(layout.chunks) - 1


def test_file_that_shrinks_while_it_is_read_is_damage(tmp_path):
    write_run(tmp_path, plain_layout(), STEPS)
    plan = plan_from_store(tmp_path, sigma_rels=LENGTHS)
    path = snapshot_file(tmp_path, 1000)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SnapshotDamaged, match="ends at byte"):
        stream(plan, lambda *_: None)


def test_excluded_target_is_refused(tmp_path):
    write_run(tmp_path, plain_layout(8), STEPS)
    with pytest.raises(ValueError, match="is the target step and is excluded"):
        plan_from_store(tmp_path, sigma_rels=LENGTHS, step=500, exclude=[500])


# Files


class Network(nn.Module):
    """Tied weights, a non-persistent buffer, an integer buffer, bfloat16 and float32 side by side."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(6.0), persistent=False)
        self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


def network_folder(root: Path) -> None:
    torch.manual_seed(0)
    model = Network()
    model.norm.num_batches_tracked += 7
    layout = layout_of([each.record for each in track(model)])
    tensors = {each.name: each.live() for each in track(model)}
    copied = {each.name: tensors[each.name].detach().contiguous().view(-1).view(torch.uint8) for each in layout.copied}
    raw = {name: tensor.numpy().tobytes() for name, tensor in copied.items()}
    write_run(root, layout, STEPS, copied=lambda step: raw)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_model_takes_the_output_strictly(tmp_path, suffix):
    network_folder(tmp_path)
    (path,) = written(tmp_path, tmp_path / "out", [0.08], suffix)
    state = load_output(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    model = Network()
    assert {key: each.dtype for key, each in state.items()} == {k: v.dtype for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    assert model.norm.num_batches_tracked == 7
    expected = weighted_sums(tmp_path, plan_from_store(tmp_path, sigma_rels=[0.08]).gammas, 1000)
    embed = torch.from_numpy(expected["embed.weight"][0]).float().bfloat16()
    assert torch.equal(model.embed.weight, embed)
    assert model.head.weight is model.embed.weight
    phase = torch.view_as_complex(torch.from_numpy(expected["phase"][0])).to(torch.complex64)
    torch.testing.assert_close(model.phase.detach(), phase)


OF_SAFETENSORS_0_4 = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"}


def test_complex_tensors_are_pairs_that_any_safetensors_reads(tmp_path):
    copied = np.array([1 + 2j, 3 - 4j], np.complex64)
    layout = layout_of([record("z", (5, 2), "C64", tied=["y"]), record("c", (2,), "C64", "copied"), record("w", (3,))])
    write_run(tmp_path, layout, STEPS, copied=lambda step: {"c": copied.tobytes()})
    (path,) = written(tmp_path, tmp_path / "out", [0.08])
    header = read_header(path)[0]
    assert json.loads(header.pop("__metadata__")["complex"]) == ["z", "y", "c"]
    assert {each["dtype"] for each in header.values()} <= OF_SAFETENSORS_0_4
    assert {key: each["shape"] for key, each in header.items()} == {
        "z": [5, 2, 2],
        "y": [5, 2, 2],
        "c": [2, 2],
        "w": [3],
    }
    found = read_average(path)
    assert {key: (each.dtype, tuple(each.shape)) for key, each in found.items()} == {
        "z": (torch.complex64, (5, 2)), "y": (torch.complex64, (5, 2)), "c": (torch.complex64, (2,)),
        "w": (torch.float32, (3,)),
    }  # fmt: skip
    assert found["c"].numpy().tolist() == copied.tolist()
    expected = synthesize(tmp_path, sigma_rels=[0.08], tolerance=0).averaged(0)["z"]
    np.testing.assert_array_equal(found["z"].numpy(), expected)


def test_complex_tensors_of_earlier_outputs_are_read(tmp_path):
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    safetensors.torch.save_file({"z": numbers}, tmp_path / "x.safetensors")  # as C64
    assert read_header(tmp_path / "x.safetensors")[0]["z"]["dtype"] == "C64"
    assert torch.equal(read_average(tmp_path / "x.safetensors")["z"], numbers)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_larger_than_a_block_hold_the_averages(tmp_path, suffix):
    """Types change in the middle of tiles, tensors lie across them, one of them has two keys."""
    sizes = {"a": ("F32", 9000), "b": ("BF16", 40_001), "c": ("F32", 30_000), "d": ("F64", 33), "e": ("F32", 20_000)}
    records = [record(name, (size,), dtype, tied=["b2"] * (name == "b")) for name, (dtype, size) in sizes.items()]
    write_run(tmp_path, layout_of(records), STEPS)
    paths = written(tmp_path, tmp_path / "out", (0.07, 0.09), suffix, memory_bytes=16 * MIB)
    expected = synthesize(tmp_path, sigma_rels=(0.07, 0.09), dtype=np.float64, tolerance=0)
    for output, path in enumerate(paths):
        state = safetensors.torch.load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert set(state) == {*sizes, "b2"}
        assert torch.equal(state["b"], state["b2"])
        for name, array in expected.averaged(output).items():
            assert torch.equal(state[name], torch.from_numpy(array).to(TORCH_TYPES[sizes[name][0]]))


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors have a limit on Unix only")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_many_tensors_need_few_descriptors(tmp_path, suffix):
    import resource

    write_run(tmp_path, layout_of([record(f"w{number}", (3,)) for number in range(300)]), range(10, 60, 10))
    plan, path = plan_from_store(tmp_path, sigma_rels=[0.08], tolerance=0), tmp_path / f"average{suffix}"
    limits, in_use = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 100, limits[1]))
    try:
        write_outputs(plan, [path])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(read_average(path)) == 300


def test_dtype_changes_real_floating_tensors_only(tmp_path):
    records = [
        record("w", (40,)),
        record("z", (3,), "C64"),
        record("fixed", (5,), "F32", "copied"),
        record("count", (2,), "I64", "copied"),
    ]
    fixed = np.linspace(-3, 3, 5, dtype="f4")
    copied = {"fixed": fixed.tobytes(), "count": np.array([3, -4]).tobytes()}
    write_run(tmp_path, layout_of(records), STEPS, copied=lambda step: copied)
    (path,) = written(tmp_path, tmp_path / "out", [0.08], dtype="BF16")
    state = load_output(path)
    assert {key: each.dtype for key, each in state.items()} == {
        "w": torch.bfloat16, "z": torch.complex64, "fixed": torch.bfloat16, "count": torch.int64
    }  # fmt: skip
    assert torch.equal(state["fixed"], torch.from_numpy(fixed).bfloat16())
    assert state["count"].tolist() == [3, -4]


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_copied_numbers_come_whole_across_pieces(tmp_path, dtype, monkeypatch):
    """float64 numbers that start at an odd multiple of 4 bytes, converted piece by piece."""
    monkeypatch.setattr(streaming, "_COPY_BYTES", 64)
    values = np.linspace(0, 1, 101)
    layout = layout_of([record("w", (3,)), record("fixed", (101,), "F64", "copied")], sigma_rels=(0.05,))
    assert layout.padding_bytes == 4
    write_run(tmp_path, layout, [100], copied=lambda step: {"fixed": values.tobytes()})
    (path,) = written(tmp_path, tmp_path / "out", [0.05], dtype=dtype)
    assert np.array_equal(safetensors.numpy.load_file(path)["fixed"], values.astype({"F16": "f2", "F32": "f4"}[dtype]))


def test_value_too_large_for_the_type_is_refused(tmp_path):
    write_run(tmp_path, plain_layout(8), [100], averages=lambda step: [np.full(8, 1e5)] * 2)
    with pytest.raises(
        NitrousError, match=r"the value 100000.0 is too large for F16. Choose a type with a larger range"
    ):
        written(tmp_path, tmp_path / "out", [0.05], dtype="F16")


def test_skipped_tensors_are_named_and_absent(tmp_path):
    layout = layout_of([record("w", (8,)), record("frozen", (5,), role="skipped")])
    write_run(tmp_path, layout, STEPS)
    (path,) = written(tmp_path, tmp_path / "out", [0.08])
    with safetensors.safe_open(path, "np") as file:
        assert list(file.keys()) == ["w"]
        assert file.metadata()["skipped"] == '["frozen"]'


def test_metadata_has_the_recipe_of_an_output(tmp_path):
    run = write_run(tmp_path, plain_layout(8), STEPS)
    (path,) = written(tmp_path, tmp_path / "out", [0.08], exclude=[300], step=900)
    plan = plan_from_store(tmp_path, sigma_rels=[0.08], exclude=[300], step=900, tolerance=0)
    with safetensors.safe_open(path, "np") as file:
        found = file.metadata()
    assert (found["run"], found["step"], found["t"], found["sigma_rel"]) == (run, "900", "900", "0.08")
    assert float(found["gamma"]) == plan.gammas[0]
    assert float(found["profile_error"]) == plan.report.profile_error[0]
    assert found["columns"] == "16"
    assert json.loads(found["steps_read"]) == [100, 200, 400, 500, 600, 700, 800, 900]
    assert found["excluded"] == "[300]"
    assert (found["tolerance"], found["lower_bound"]) == ("0.0", "8")
    assert float(found["rounding"]) == plan.report.rounding[0]


class FullDisk(FileSystem):
    """Takes a number of bytes, then has no space."""

    def __init__(self, space: int) -> None:
        self.space = space

    def write_at(self, descriptor, buffer, offset):
        if self.space <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = super().write_at(descriptor, memoryview(buffer)[: max(1, self.space)], offset)
        self.space -= count
        return count


@pytest.mark.parametrize("space", [0, 10, 5000])
def test_full_disk_is_reported_and_the_old_file_stays(tmp_path, space):
    write_run(tmp_path, plain_layout(2000), STEPS)
    out = tmp_path / "out"
    out.mkdir()
    (out / "0.08.safetensors").write_text("old")
    with pytest.raises(OSError, match=r"No space left on device.*0\.08\.safetensors"):
        written(tmp_path, out, [0.08], files=FullDisk(space))
    assert [each.name for each in out.iterdir()] == ["0.08.safetensors"]
    assert (out / "0.08.safetensors").read_text() == "old"


class SmallDisk(FileSystem):
    """Has no space for a file of that size; nothing may be written before that is reported."""

    def preallocate(self, descriptor, size_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_at(self, descriptor, buffer, offset):
        raise AssertionError("written to a full disk")


def test_disk_that_is_too_small_is_reported_before_anything_is_computed(tmp_path):
    write_run(tmp_path, plain_layout(2000), STEPS)
    with pytest.raises(OSError, match=r"No space left on device.*0\.08\.safetensors"):
        written(tmp_path, tmp_path / "out", [0.08], files=SmallDisk())
    assert list((tmp_path / "out").iterdir()) == []


class Pacer(FileSystem):
    """Records the hints to begin writing; accepts the first few of them."""

    def __init__(self, takes: int) -> None:
        self.parts = []
        self.takes = takes

    def preallocate(self, descriptor, size_bytes):
        raise OSError(errno.ENOTSUP, "not here")

    def start_writeback(self, descriptor, offset, size_bytes):
        self.parts.append((offset, size_bytes))
        if len(self.parts) > self.takes:
            raise OSError(errno.ENOSYS, "not here")


@pytest.mark.parametrize(("takes", "parts"), [(9, [(0, 40_000), (40_000, 40_000)]), (0, [(0, 40_000)])])
def test_disk_begins_to_write_while_the_average_is_computed(tmp_path, monkeypatch, takes, parts):
    monkeypatch.setattr("nitrous_ema.synthesis.outputs.writer._WRITEBACK_BYTES", 40_000)
    monkeypatch.setattr("nitrous_ema.synthesis.streaming.TILE_ELEMENTS", 8192)
    write_run(tmp_path, plain_layout(25_000), STEPS)
    files = Pacer(takes)
    (path,) = written(tmp_path, tmp_path / "out", [0.08], files=files)
    assert files.parts == parts
    expected = synthesize(tmp_path, sigma_rels=[0.08], tolerance=0).flats[0]
    np.testing.assert_allclose(safetensors.numpy.load_file(path)["weight"], expected, rtol=1e-6, atol=1e-7)


class Recorder(FileSystem):
    def __init__(self) -> None:
        self.calls = []

    def fsync(self, descriptor):
        self.calls.append("fsync")
        super().fsync(descriptor)

    def rename(self, source, target):
        self.calls.append(f"rename to {target.name}")
        super().rename(source, target)

    def fsync_folder(self, path):
        self.calls.append("fsync folder")
        super().fsync_folder(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_output_is_durable_before_it_has_its_name(tmp_path, suffix):
    write_run(tmp_path, plain_layout(8), STEPS)
    files = Recorder()
    written(tmp_path, tmp_path / "out", [0.08], suffix, files=files)
    assert files.calls == ["fsync", f"rename to 0.08{suffix}", "fsync folder"]
    assert [each.name for each in (tmp_path / "out").iterdir()] == [f"0.08{suffix}"]


class Replaced(FileSystem):
    """Somebody else puts a link to a file of the user's in the place of a temporary one."""

    def __init__(self, secret):
        self.secret = secret

    def open_read(self, path):
        path.unlink()
        path.symlink_to(self.secret)
        return super().open_read(path)


def test_no_other_file_gets_into_an_output(tmp_path):
    write_run(tmp_path, plain_layout(8), STEPS)
    (tmp_path / "secret").write_bytes(bytes(100_000))
    with pytest.raises(OSError, match="another file has taken the name"):
        written(tmp_path, tmp_path / "out", [0.08], ".pt", files=Replaced(tmp_path / "secret"))
    assert list((tmp_path / "out").iterdir()) == []


class NoFolderFsync(FileSystem):
    def fsync_folder(self, path):
        raise OSError(errno.EINVAL, "Invalid argument")


def test_outputs_are_written_where_folders_have_no_fsync(tmp_path):
    write_run(tmp_path, plain_layout(8), STEPS)
    (path,) = written(tmp_path, tmp_path / "out", [0.08], files=NoFolderFsync())
    assert path.exists()
    split = tmp_path / "out" / "split.safetensors"
    write_shard(plan_from_store(tmp_path, sigma_rels=[0.08]), [split], part=0, parts=1, files=NoFolderFsync())
    assert split.with_name(f"{split.name}.index.json").exists()


class Opened(FileSystem):
    """Notes how many files are open at once."""

    def __init__(self, noted: list[int]) -> None:
        self.noted = noted
        self.now = 0
        self.lock = threading.Lock()  # several threads open and close

    def count(self, change):
        with self.lock:
            self.now += change
            self.noted.append(self.now)

    def open_exclusive(self, path):
        self.count(1)
        return super().open_exclusive(path)

    def close(self, descriptor):
        self.count(-1)
        super().close(descriptor)


def test_many_outputs_take_the_passes_that_the_memory_demands_and_have_the_same_bits(tmp_path):
    write_run(tmp_path, plain_layout(50), STEPS)
    lengths = [float(each) for each in np.linspace(0.05, 0.2, 70)]
    one, several = (tmp_path / each for each in ("one", "several"))
    plan = plan_from_store(tmp_path, sigma_rels=lengths, tolerance=0)
    little = engine_sizes(plan.only(range(32)), 1 << 30, threads=1).memory_bytes
    opened = []
    written(tmp_path, one, lengths, files=Opened(opened), memory_bytes=1 << 30)
    assert max(opened) == 70
    opened.clear()
    written(tmp_path, several, lengths, files=Opened(opened), memory_bytes=little)
    assert max(opened) == 32
    for path in one.iterdir():
        assert path.read_bytes() == (several / path.name).read_bytes()


# Loading


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_wrapped_model_of_another_type_is_loaded_in_place(tmp_path, suffix):
    network_folder(tmp_path)
    (path,) = written(tmp_path, tmp_path / "out", [0.08], suffix, dtype="F32")
    model = Network()
    weight = model.embed.weight
    load_average(nn.DataParallel(model), path)
    expected = weighted_sums(tmp_path, plan_from_store(tmp_path, sigma_rels=[0.08]).gammas, 1000)
    assert torch.equal(weight, torch.from_numpy(expected["embed.weight"][0]).float().bfloat16())
    assert model.head.weight is model.embed.weight is weight
    assert weight.requires_grad


def test_output_that_does_not_fit_touches_nothing(tmp_path):
    write_run(tmp_path, layout_of([record("weight", (3, 2)), record("more", (2,))]), STEPS)
    (path,) = written(tmp_path, tmp_path / "out", [0.08])
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(SnapshotMismatch, match=r"missing in the file: 'bias'; missing in the model: 'more'"):
        load_average(model, path)
    assert torch.equal(model.weight, before)
    assert load_average(model, path, strict=False)["step"] == "1000"
    assert not torch.equal(model.weight, before)
    with pytest.raises(SnapshotMismatch, match=r"'weight' is \(3, 2\) in the file and \(2, 3\) in the model"):
        load_average(nn.Linear(3, 2), path, strict=False)


def test_skipped_tensors_keep_what_the_model_has(tmp_path):
    layout = layout_of([record("weight", (3, 2)), record("bias", (3,), role="skipped")])
    write_run(tmp_path, layout, STEPS)
    (path,) = written(tmp_path, tmp_path / "out", [0.08])
    model = nn.Linear(2, 3)
    bias = model.bias.clone()
    load_average(model, path)
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x0a\0\0\0\0\0\0\0" + b'{"a": {}} ']
)
def test_file_that_is_not_an_average_is_named(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(SnapshotDamaged, match="not a synthesized average, or damaged: "):
        load_average(nn.Linear(2, 3), path)


def test_truncated_average_is_refused(tmp_path):
    write_run(tmp_path, layout_of([record("weight", (3, 2)), record("bias", (3,))]), STEPS)
    (path,) = written(tmp_path, tmp_path / "out", [0.08])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SnapshotDamaged):
        load_average(nn.Linear(2, 3), path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_missing_average_is_not_found(tmp_path, suffix):
    with pytest.raises(SnapshotNotFound):
        load_average(nn.Linear(2, 3), tmp_path / f"x{suffix}")
