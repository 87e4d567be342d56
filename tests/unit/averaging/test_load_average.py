"""Load averages into models of every wrapping. Damaged files are in test_synthesis.py and tests/fuzz."""

from __future__ import annotations

import re
import threading

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema.async_ import synthesize_worker
from nitrous_ema.averaging.load_average import load_average
from nitrous_ema.errors import SnapshotDamaged, SnapshotMismatch, SnapshotNotFound
from nitrous_ema.synthesis.outputs.reader import read_average
from nitrous_ema.synthesis.outputs.writer import write_outputs, write_shard
from nitrous_ema.synthesis.plan import plan_from_store
from tests.support.fakes import TIMEOUT_SECONDS, Gate
from tests.support.old_folders import write_nitrous_001
from tests.support.outputs import load_output


class Model(nn.Module):
    """Tied weights, a counter, a complex parameter, a submodule with a wrapper's name, a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.module = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Snapshots of a training, and its average of one length as a state_dict."""
    torch.manual_seed(0)
    root, model = tmp_path_factory.mktemp("trained"), Model()
    ema = PostHocEMA(model, checkpoint_folder=root / "s", checkpoint_every_num_steps=10, update_every=1)
    for step in range(40):
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn(tensor.shape))
            model.norm.num_batches_tracked.fill_(step + 1)
        ema.update()
    plan = plan_from_store(root / "s", sigma_rels=[0.07])
    write_outputs(plan, [root / "average.safetensors"])
    write_outputs(plan, [root / "average.pt"])
    for part in range(3):
        write_shard(plan, [root / "parts.safetensors"], part=part, parts=3)
    return root


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


FILES = ("average.safetensors", "average.pt", "parts.safetensors.index.json")
WRAPPERS = {
    "none": lambda model: model,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "ddp": lambda model: nn.parallel.DistributedDataParallel(model),
    "ddp of compile": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
    "compile of ddp": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("file", FILES)
def test_model_takes_an_average_however_it_is_wrapped(trained, wrap, file):
    expected = load_output(trained / "average.safetensors")
    model = Model()
    model.module = checkpoint_wrapper(model.module)  # a wrapper inside, and in a submodule that is called like one
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    load_average(WRAPPERS[wrap](model), trained / file)
    found = {name.replace("_checkpoint_wrapped_module.", ""): each for name, each in model.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert model.head.weight is model.embed.weight
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before
    assert model.norm.num_batches_tracked == 40
    assert torch.equal(model.scratch, torch.ones(2))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_average_is_cast_to_the_types_that_the_model_has(trained, file, dtype):
    expected = load_output(trained / "average.safetensors")
    model = Model()
    model.module.to(dtype)
    load_average(model, trained / file)
    assert model.module.weight.dtype == dtype
    assert torch.equal(model.module.weight, expected["module.weight"].to(dtype))
    assert torch.equal(model.embed.weight, expected["embed.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_number_too_large_for_the_model_is_refused(tmp_path, suffix):
    path, model = tmp_path / f"a{suffix}", nn.Linear(2, 1, dtype=torch.float16)
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    before = model.weight.clone()
    save({"weight": torch.tensor([[1.0, 65520.0]]), "bias": torch.ones(1)}, path)
    with pytest.raises(
        SnapshotMismatch, match=r"'weight' has numbers in the file that are too large for torch.float16"
    ):
        load_average(model, path)
    assert torch.equal(model.weight, before)
    save({"weight": torch.tensor([[-float("inf"), 65519.0]]), "bias": torch.ones(1)}, path)
    load_average(model, path)
    assert model.weight.tolist() == [[-float("inf"), 65504.0]]


def test_parts_of_different_types_are_refused(trained, tmp_path):
    plan = plan_from_store(trained / "s", sigma_rels=[0.07])
    for part in range(3):
        write_shard(plan, [tmp_path / "a.safetensors"], part=part, parts=3, dtype="F64" if part == 0 else None)
    with pytest.raises(
        SnapshotDamaged, match=r"tensors of \d+ bytes, and the files contain \d+: .* different values of --dtype"
    ):
        load_average(Model(), tmp_path / "a.safetensors.index.json")
    write_shard(plan, [tmp_path / "a.safetensors"], part=0, parts=3)
    load_average(Model(), tmp_path / "a.safetensors.index.json")


def test_missing_file_of_an_average_in_parts_is_reported_with_its_index(trained):
    with pytest.raises(SnapshotNotFound, match=r"written in parts: load .*parts\.safetensors\.index\.json"):
        load_average(Model(), trained / "parts.safetensors")


def test_loaded_parameters_stay_leaves_that_require_gradients(trained):
    model = Model()
    load_average(model, trained / "average.safetensors")
    assert all(each.requires_grad and each.is_leaf for each in model.parameters())


def _wider(model):
    model.phase = nn.Parameter(torch.zeros(4, dtype=torch.complex64))


def _real(model):
    model.phase = nn.Parameter(torch.zeros(3))


def _more(model):
    model.extra = nn.Linear(1, 1)


def _on_meta(model):
    model.module.to("meta")


def _sharded(model):
    class Sharded(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("touched")

    model._parameters["phase"] = torch.Tensor._make_subclass(Sharded, model.phase.data)


def _less(model):
    del model.phase


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wider, "'phase' is (3,) in the file and (4,) in the model"),
        (_real, "'phase' is C64 in the file and torch.float32 in the model"),
        (_more, "missing in the file: 'extra.weight', 'extra.bias'"),
        (_less, "missing in the model: 'phase'"),
        (_on_meta, "'module.weight' of the model is on the meta device and holds no values"),
        (_sharded, "'phase' of the model is a Sharded, not a plain tensor"),
    ],
)
def test_refused_average_changes_nothing_and_names_the_remedy(trained, file, change, message):
    model = Model()
    change(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    plain = {name: each for name, each in tensors.items() if not each.is_meta and type(each).__name__ != "Sharded"}
    before = {name: each.detach().clone() for name, each in plain.items()}
    with pytest.raises(SnapshotMismatch, match=re.escape(message)) as refused:
        load_average(model, trained / file)
    assert str(trained / file) in str(refused.value)
    assert "Nothing was loaded. Load it into the architecture that was trained" in str(refused.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.items())


def test_wrong_model_and_wrong_path_are_named(trained):
    with pytest.raises(TypeError, match=r"model is 'net'; expected a torch.nn.Module"):
        load_average("net", trained / "average.safetensors")
    with pytest.raises(SnapshotNotFound, match=r"is a folder; expected the file of one average"):
        load_average(Model(), trained)


def test_model_made_in_inference_mode_takes_an_average(trained):
    expected = load_output(trained / "average.safetensors")
    with torch.inference_mode():
        frozen = Model()
    load_average(frozen, trained / "average.safetensors")
    assert torch.equal(frozen.module.weight, expected["module.weight"])


def test_expanded_tensor_takes_its_average(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.full((1,), 3.0).expand(5))
    ema = PostHocEMA(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps=1, update_every=1)
    ema.update()
    write_outputs(plan_from_store(tmp_path, sigma_rels=[0.05]), [tmp_path / "average.safetensors"])
    model.scale[:1].zero_()
    load_average(model, tmp_path / "average.safetensors")
    assert torch.equal(model.scale, torch.full((5,), 3.0))


def test_average_is_loaded_after_an_ema_has_read_the_model(trained, tmp_path):
    model, gate = Model(), Gate()
    with AsyncPostHocEMA(model, checkpoint_folder=tmp_path, checkpoint_every_num_steps="manual") as ema:
        ema.update()
        (lane,) = ema._engine._dispatch.lanes()
        before, read = model.module.weight.detach().clone(), []
        ema.flush()
        lane.enqueue_write(lambda: (gate.pass_through(), read.append(model.module.weight.detach().clone())))
        gate.wait_entered()
        waiting = threading.Thread(target=load_average, args=(model, trained / "average.safetensors"))
        order_writer = lane.order_writer
        lane.order_writer = lambda: (gate.open(), order_writer())  # a loader that does not wait writes too early
        waiting.start()
        waiting.join(TIMEOUT_SECONDS)
        gate.open()
        ema.flush()
    assert torch.equal(read[0], before)


def test_without_strict_the_tensors_of_both_are_loaded(trained):
    model, expected = Model(), read_average(trained / "average.safetensors")
    _more(model)
    del model.phase
    assert load_average(model, trained / "average.safetensors", strict=False)["step"] == "40"
    assert torch.equal(model.embed.weight, expected["embed.weight"])


# ---- names that wrappers left in a file


def written(path, tensors):
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_in_a_file_are_understood(tmp_path, prefix):
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    path = written(tmp_path / "a.safetensors", {prefix + name: each for name, each in source.state_dict().items()})
    load_average(model, path)
    assert torch.equal(model.weight, source.weight)
    load_average(torch.compile(nn.DataParallel(nn.Linear(3, 2)), backend="eager"), path)


def test_average_of_an_old_folder_of_a_wrapped_model_loads_into_the_plain_one(tmp_path):
    write_nitrous_001(tmp_path / "old", [100, 200], nn.DataParallel(nn.Linear(3, 2)))
    arguments = [tmp_path / "old", "--tracked-sigma-rel", "0.05,0.1", "--sigma-rel", "0.05", "--out", tmp_path / "out"]
    assert synthesize_worker.main([str(each) for each in arguments]) == 0
    (path,) = (tmp_path / "out").iterdir()
    model = nn.Linear(3, 2)
    load_average(model, path)
    expected = torch.load(tmp_path / "old" / "0.200.pt", weights_only=True)["ema_model.module.weight"]
    assert torch.equal(model.weight, expected)


def test_ambiguous_names_are_refused(tmp_path):
    both = nn.ModuleDict({"module": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    names = {"module.weight": torch.ones(2, 2), "weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    path = written(tmp_path / "a.safetensors", names)
    with pytest.raises(SnapshotMismatch, match="missing in the file"):
        load_average(both, path)
    with pytest.raises(SnapshotMismatch, match=r"missing in the model: 'module\.weight'"):
        load_average(nn.Linear(2, 2), path)


def test_submodule_with_a_wrappers_name_is_not_confused(trained):
    model, expected = Model(), read_average(trained / "average.safetensors")
    load_average(model, trained / "average.safetensors")
    assert torch.equal(model.module.weight, expected["module.weight"])


# ---- whole numbers stored as floating ones


@pytest.mark.parametrize(
    ("dtype", "values", "stored"),
    [
        (torch.int64, [0, 5, -2047], torch.float16),
        (torch.int32, [0, 255, -255], torch.bfloat16),
        (torch.uint8, [0, 5, 255], torch.float32),
        (torch.bool, [True, False, True], torch.float16),
    ],
)
def test_whole_numbers_that_no_rounding_can_have_changed_are_taken_back(tmp_path, dtype, values, stored):
    model = nn.Linear(2, 2)
    model.register_buffer("places", torch.zeros(3, dtype=dtype))
    there = {**nn.Linear(2, 2).state_dict(), "places": torch.tensor(values).to(stored)}
    load_average(model, written(tmp_path / "a.safetensors", there))
    assert model.places.tolist() == values
    assert model.places.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "values", "stored"),
    [
        (torch.int64, [0, 1, 2048], torch.float16),  # was it 2049?
        (torch.int64, [0, 1, 256], torch.bfloat16),
        (torch.int64, [0, 1, 0.5], torch.float16),
        (torch.int64, [0, 1, float("inf")], torch.float16),
        (torch.int64, [0, 1, float("nan")], torch.float32),
        (torch.uint8, [0, 1, -1], torch.float16),
        (torch.int8, [0, 1, 130], torch.float16),
        (torch.bool, [0, 1, 2], torch.float16),
    ],
)
def test_whole_numbers_that_may_have_been_rounded_are_refused(tmp_path, dtype, values, stored):
    model = nn.Linear(2, 2)
    model.register_buffer("places", torch.zeros(3, dtype=dtype))
    there = {**nn.Linear(2, 2).state_dict(), "places": torch.tensor(values).to(stored)}
    with pytest.raises(SnapshotMismatch, match=r"'places' is .* in the file and torch\."):
        load_average(model, written(tmp_path / "a.safetensors", there))


def test_floating_weights_take_no_whole_numbers(tmp_path):
    path = written(tmp_path / "a.safetensors", {"weight": torch.ones(2, 2, dtype=torch.int64), "bias": torch.ones(2)})
    with pytest.raises(SnapshotMismatch, match="'weight' is I64 in the file"):
        load_average(nn.Linear(2, 2), path)


@pytest.mark.parametrize("file", ["average.safetensors", "average.pt"])
@pytest.mark.parametrize("kept", [100, -1])
def test_cut_copy_of_an_average_is_named_as_such(trained, tmp_path, file, kept):
    path = tmp_path / file
    path.write_bytes((trained / file).read_bytes()[:kept])
    with pytest.raises(SnapshotDamaged, match=r"Incomplete copy\? Copy it again\."):
        load_average(Model(), path)
