"""The same bits in the background as at once, however late the lane and the writers are."""

from __future__ import annotations

import pytest
import torch

from nitrous_ema import AsyncPostHocEMA, PostHocEMA
from nitrous_ema.async_.lanes import ThreadLane
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    Gate,
    LateLane,
    StalledFiles,
    assert_same_bits,
    averages_of,
    backward,
    make_batches,
    make_model,
    small_pieces,
    snapshot_bytes,
    use_files,
    use_lane,
)

STEPS = 11
KINDS = ["plain", "batch norm", "bfloat16", "tied", "transposed", "forced norm"]


def train(cls, folder, kind="plain", *, steps=STEPS, each_step=None, **options):
    """A training loop as users write it; returns the averages."""
    options = {"sigma_rels": (0.05, 0.15), "checkpoint_every_num_steps": 4, "update_every": 1, **options}
    with small_pieces():
        model = make_model(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
        ema = cls(model, checkpoint_folder=folder, **options)
        for batch in make_batches(steps, model):
            backward(model, batch)
            optimizer.step()
            ema.update()
            if each_step is not None:
                each_step(ema)
        ema.checkpoint()
        averages = averages_of(ema)
        ema.close(TIMEOUT_SECONDS)
        return averages


def late_lane(monkeypatch):
    use_lane(monkeypatch, LateLane())


def late_snapshot_copies(monkeypatch):
    use_lane(monkeypatch, LateCopies())


class LateCopies(ThreadLane):
    """A lane that copies a snapshot only when a caller waits for the lane; earlier averaging runs at once."""

    def __init__(self):
        self.gate = Gate()
        super().__init__()

    def enqueue_read(self, work, abandon):
        self.gate.shut()
        super().enqueue_read(lambda: (self.gate.pass_through(), work()), abandon)

    def order_writer(self):
        self.gate.open()
        super().order_writer()

    def order_reader(self):
        self.gate.open()
        super().order_reader()

    def drain(self, timeout_seconds=None):
        self.gate.open()
        super().drain(timeout_seconds)


def late_writers(monkeypatch):
    files = StalledFiles()
    drain = ThreadLane.drain
    monkeypatch.setattr(ThreadLane, "drain", lambda self, timeout=None: (files.gate.open(), drain(self, timeout)))
    use_files(monkeypatch, files)


LATE = {
    "as it comes": lambda monkeypatch: None,
    "lane does nothing until it is waited for": late_lane,
    "snapshots are staged last of all": late_snapshot_copies,
    "snapshots are written last of all": late_writers,
}
# The writers are held up until the thread is drained, which never happens where there is no thread.
CASES_OF_LATE = [
    pytest.param(name, marks=pytest.mark.thread_lane) if late is late_writers else name for name, late in LATE.items()
]


@pytest.mark.parametrize("late", CASES_OF_LATE)
@pytest.mark.parametrize("read", ["guarded", "copied", "auto"])
@pytest.mark.parametrize("update_every", [1, 3])
def test_same_bits_as_at_once_however_late(tmp_path, monkeypatch, late, read, update_every):
    expected = train(PostHocEMA, tmp_path / "sync", update_every=update_every)
    LATE[late](monkeypatch)
    options = {"update_every": update_every, "read": read, "max_pending": 8}
    obtained = train(AsyncPostHocEMA, tmp_path / "async", **options)
    assert_same_bits(obtained, expected)
    assert snapshot_bytes(tmp_path / "async") == snapshot_bytes(tmp_path / "sync")
    assert list(snapshot_bytes(tmp_path / "sync")) == [4, 8, 11]


@pytest.mark.parametrize("late", ["as it comes", "lane does nothing until it is waited for"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_same_bits_for_every_kind_of_model(tmp_path, monkeypatch, late, kind):
    expected = train(PostHocEMA, tmp_path / "sync", kind)
    LATE[late](monkeypatch)
    read = "copied" if kind == "forced norm" else "guarded"
    obtained = train(AsyncPostHocEMA, tmp_path / "async", kind, read=read, max_pending=8)
    assert_same_bits(obtained, expected)
    assert snapshot_bytes(tmp_path / "async") == snapshot_bytes(tmp_path / "sync")


@pytest.mark.filterwarnings("ignore:step_size_correction=False")
@pytest.mark.parametrize("correction", ["exact", True, False])
def test_same_bits_for_every_correction(tmp_path, monkeypatch, correction):
    options = {"step_size_correction": correction, "update_every": 3}
    expected = train(PostHocEMA, tmp_path / "sync", **options)
    late_lane(monkeypatch)
    obtained = train(AsyncPostHocEMA, tmp_path / "async", max_pending=8, **options)
    assert_same_bits(obtained, expected)
    assert snapshot_bytes(tmp_path / "async") == snapshot_bytes(tmp_path / "sync")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_snapshots_of_another_type_have_the_same_bytes(tmp_path, monkeypatch, dtype):
    train(PostHocEMA, tmp_path / "sync", "batch norm", checkpoint_dtype=dtype)
    late_lane(monkeypatch)
    train(AsyncPostHocEMA, tmp_path / "async", "batch norm", checkpoint_dtype=dtype, max_pending=8)
    assert snapshot_bytes(tmp_path / "async") == snapshot_bytes(tmp_path / "sync")


def test_a_snapshot_followed_at_once_by_an_update_has_the_averages_of_its_step(tmp_path, monkeypatch):
    def checkpoint(ema):
        ema.checkpoint()

    train(PostHocEMA, tmp_path / "sync", each_step=checkpoint)
    late_lane(monkeypatch)
    train(AsyncPostHocEMA, tmp_path / "async", each_step=checkpoint, max_pending=STEPS)
    obtained = snapshot_bytes(tmp_path / "async")
    assert list(obtained) == list(range(1, STEPS + 1))
    assert obtained == snapshot_bytes(tmp_path / "sync")


def test_batch_norm_statistics_are_those_of_the_step(tmp_path, monkeypatch):
    """Forward changes them before the lane reads them; each snapshot must have the statistics of its step."""
    model = make_model("batch norm")
    use_lane(monkeypatch, LateLane())
    ema = AsyncPostHocEMA(
        model, checkpoint_folder=tmp_path, checkpoint_every_num_steps=1, sigma_rels=(0.15,), max_pending=8,
        param_or_buffer_names_no_ema=lambda name: "running" in name or "num_batches" in name,
    )  # fmt: skip
    means = {}
    for step, batch in enumerate(make_batches(5, model), start=1):
        model(batch)
        ema.fence()  # only now the lane does what the last update() has queued
        ema.update()
        means[step] = model[1].running_mean.clone()
    ema.flush(TIMEOUT_SECONDS)
    from safetensors.torch import load_file

    for step, mean in means.items():
        (file,) = tmp_path.glob(f"step-{step:012d}-*/*.safetensors")
        assert torch.equal(load_file(file)["model.1.running_mean"], mean)
        assert load_file(file)["model.1.num_batches_tracked"] == step
    ema.close(TIMEOUT_SECONDS)


def test_state_dict_waits_for_the_lane(tmp_path, monkeypatch):
    expected, obtained = [], []
    train(PostHocEMA, tmp_path / "sync", each_step=lambda ema: expected.append(averages_of(ema)))
    late_lane(monkeypatch)
    options = {"each_step": lambda ema: obtained.append(averages_of(ema)), "max_pending": 8}
    train(AsyncPostHocEMA, tmp_path / "async", **options)
    for ours, theirs in zip(obtained, expected, strict=True):
        assert_same_bits(ours, theirs)


def test_averaged_model_is_forwarded_after_the_lane(tmp_path, monkeypatch):
    batch = torch.randn(3, 16)

    def outputs_of(cls, folder, **options):
        seen, shown = [], []

        def forward(ema):
            if not shown:
                shown.append(ema.ema_models[1].ema_model)  # kept by the user
            seen.append(shown[0](batch).detach().clone())

        train(cls, folder, each_step=forward, **options)
        return seen

    expected = outputs_of(PostHocEMA, tmp_path / "sync")
    late_lane(monkeypatch)
    obtained = outputs_of(AsyncPostHocEMA, tmp_path / "async", max_pending=8)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(obtained, expected, strict=True))


def test_average_parameters_are_those_of_all_updates_so_far(tmp_path, monkeypatch):
    def weights_of(cls, folder, **options):
        seen = []

        def look(ema):
            before = [parameter.clone() for parameter in ema.model.parameters()]
            with ema.average_parameters(1):
                seen.extend(parameter.detach().clone() for parameter in ema.model.parameters())
            assert all(torch.equal(a, b) for a, b in zip(before, ema.model.parameters(), strict=True))

        averages = train(cls, folder, each_step=look, **options)
        return seen, averages

    expected, averages = weights_of(PostHocEMA, tmp_path / "sync")
    late_lane(monkeypatch)
    obtained, ours = weights_of(AsyncPostHocEMA, tmp_path / "async", max_pending=8)
    assert all(torch.equal(a, b) for a, b in zip(obtained, expected, strict=True))
    assert_same_bits(ours, averages)


def test_loading_a_state_while_work_is_pending(tmp_path, monkeypatch):
    saved = {}

    def jump_back(ema):
        if ema.step == 3:
            saved.update({k: v.clone() if torch.is_tensor(v) else v for k, v in ema.state_dict().items()})
        if ema.step == 6 and saved:
            ema.load_state_dict(dict(saved))
            saved.clear()

    expected = train(PostHocEMA, tmp_path / "sync", each_step=jump_back, checkpoint_every_num_steps=2)
    late_lane(monkeypatch)
    options = {"each_step": jump_back, "checkpoint_every_num_steps": 2, "max_pending": 12}
    assert_same_bits(train(AsyncPostHocEMA, tmp_path / "async", **options), expected)
    assert snapshot_bytes(tmp_path / "async") == snapshot_bytes(tmp_path / "sync")


def test_time_in_images_gives_the_same_bits(tmp_path, monkeypatch):
    def run(cls, folder, **options):
        model = make_model()
        ema = cls(model, checkpoint_folder=folder, update_every=2, checkpoint_every_num_steps=3, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number, batch in enumerate(make_batches(7, model)):
            backward(model, batch)
            optimizer.step()
            ema.update(t_delta=256 + number)
        averages = averages_of(ema)
        ema.close(TIMEOUT_SECONDS)
        return averages

    expected = run(PostHocEMA, tmp_path / "sync")
    late_lane(monkeypatch)
    assert_same_bits(run(AsyncPostHocEMA, tmp_path / "async", max_pending=8), expected)
    assert snapshot_bytes(tmp_path / "async") == snapshot_bytes(tmp_path / "sync")
