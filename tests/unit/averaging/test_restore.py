"""``restore()``: averages from the snapshot folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import nitrous_ema.averaging.restore
from nitrous_ema import AsyncPostHocEMA, NitrousError, NitrousWarning, PostHocEMA, SnapshotStore
from nitrous_ema.async_.lanes import ThreadLane
from nitrous_ema.errors import ClosedError, SnapshotDamaged, SnapshotMismatch, SnapshotNotFound
from tests.support.fakes import (
    TIMEOUT_SECONDS,
    assert_same_bits,
    averages_of,
    use_lane,
)
from tests.support.memory_orders import Orders
from tests.support.models import Net, Tied, Vector, set_weights
from tests.support.restored_runs import CLASSES, file_of, saved, train

# The runs that are compared often go on in one folder.
pytestmark = pytest.mark.filterwarnings("ignore:.*has written a snapshot of step")


class Mixed(nn.Module):
    """Copied tensors of several sizes, one that is not saved, and averages of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.wide = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        self.pairs = nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))
        self.register_buffer("flag", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("count", torch.zeros(5, dtype=torch.int16))
        self.register_buffer("cache", torch.zeros(9), persistent=False)


MODELS = {
    "plain": Net,
    "bfloat16": lambda: Net().bfloat16(),
    "channels_last": lambda: Net().to(memory_format=torch.channels_last),
    "tied": Tied,
    "orders": Orders,
    "mixed": Mixed,
}


def everything(ema: PostHocEMA) -> dict[str, torch.Tensor]:
    """Averages and copied tensors, also those that a state_dict() leaves out."""
    kept = dict(averages_of(ema))
    kept |= {f"copied {tracked.name}": value.clone() for tracked, value in ema._engine.flat_buffers.copies()}
    return kept


def counters(ema: PostHocEMA) -> dict[str, object]:
    return {key: value for key, value in ema._engine.schedule.state().items() if key != "updates"}


# ---- going on as if nothing had happened


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", MODELS)
def test_restored_run_goes_on_to_the_bit(kind, cls, make):
    exact = {"checkpoint_dtype": torch.float64} if kind in ("mixed", "orders") else {}
    whole = make(MODELS[kind](), cls, checkpoint_every_num_steps=7, update_every=3, **exact)
    train(whole, range(1, 12))
    whole.flush(TIMEOUT_SECONDS)
    model = MODELS[kind]()
    set_weights(model, 7)  # the weights of that step, from the user's own checkpoint
    again = make(model, cls, checkpoint_every_num_steps=7, update_every=3, **exact)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert again.restore() == 7
    assert_same_bits(model.state_dict(), before)
    train(again, range(8, 12))
    assert_same_bits(everything(again), everything(whole))
    train(whole, range(12, 25))
    train(again, range(12, 25))
    assert_same_bits(everything(again), everything(whole))
    assert counters(again) == counters(whole)


def test_copied_tensors_behind_padding_come_back(make):
    options = {"sigma_rels": (0.1,), "checkpoint_every_num_steps": 3}
    first, again = make(Net(), **options), make(Net(), **options)
    assert first._engine.flat_buffers.layout.padding_bytes == 4
    train(first, range(1, 4))
    again.restore()
    assert_same_bits(everything(again), everything(first))


@pytest.mark.parametrize("at", [1, 6, 7])
@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize(
    ("correction", "t_delta"), [("exact", 1), ("exact", 32), ("exact", 0.37), (True, 1), (False, 1), (True, 1.0)]
)
@pytest.mark.filterwarnings("ignore:step_size_correction=False")
def test_clock_goes_on_wherever_the_snapshot_fell(correction, t_delta, update_every, at, make):
    options = {"update_every": update_every, "step_size_correction": correction}
    whole, again = make(Vector(3), **options), make(Vector(3), **options)
    train(whole, range(1, at + 1), t_delta)
    whole.checkpoint()
    assert again.restore() == at
    assert counters(again) == counters(whole)
    assert again.initted
    for ema in (whole, again):
        train(ema, range(at + 1, at + 9), t_delta)
        ema.checkpoint()
    assert_same_bits(everything(again), everything(whole))
    assert counters(again) == counters(whole)
    assert [(s.step, s.t, s.stamp.t_first) for s in again.snapshots.snapshots(again.run)] == [
        (s.step, s.t, s.stamp.t_first) for s in whole.snapshots.snapshots(whole.run)
    ]


@pytest.mark.parametrize("cls", CLASSES)
def test_restored_object_is_what_a_loaded_state_would_make_it(cls, make):
    first = make(Net(), cls, checkpoint_every_num_steps=4)
    train(first, range(1, 5), 8)
    state = saved(first)
    train(first, range(5, 11), 8)
    first.flush(TIMEOUT_SECONDS)
    loaded, restored = make(Net(), cls), make(Net(), cls)
    loaded.load_state_dict(state)
    assert restored.restore(step=4) == 4
    assert_same_bits(averages_of(restored), averages_of(loaded))
    assert counters(restored) == counters(loaded)
    assert restored._engine.run_lineage.ancestors == loaded._engine.run_lineage.ancestors == ((first.run, 4),)


def test_frozen_averages_stay_frozen(make):
    first = make(Net(), frozen=True)
    train(first, range(1, 6))
    first.checkpoint()
    again = make(Net(), frozen=True)
    again.restore()
    train(again, range(6, 9))
    assert_same_bits(everything(again), everything(first))
    assert (again.step, again.t) == (8, 1)


# ---- which snapshot, and what becomes of the history


def test_later_snapshots_are_an_abandoned_future(make):
    first = make(Net(), checkpoint_every_num_steps=2)
    train(first, range(1, 9))
    again = make(Net(), checkpoint_every_num_steps=3)
    again.restore(step=4)
    train(again, range(5, 10))
    assert [(s.step, s.run) for s in again.snapshots.snapshots()] == [
        *((step, first.run) for step in (2, 4)),
        *((step, again.run) for step in (6, 9)),
    ]


@pytest.mark.parametrize("cls", CLASSES)
def test_going_back_to_ones_own_snapshot_begins_a_new_run(cls, make):
    ema = make(Net(), cls, checkpoint_every_num_steps=2)
    train(ema, range(1, 9))
    own = ema.run
    assert ema.restore() == 8  # what is on its way is waited for
    assert ema.run != own
    train(ema, range(9, 11))
    last = ema.run
    assert ema.restore(step=6) == 6
    assert ema.run not in (own, last)
    assert ema._engine.run_lineage.ancestors == ((own, 6),)
    train(ema, range(7, 9))
    ema.flush(TIMEOUT_SECONDS)
    assert [(s.step, s.run) for s in ema.snapshots.snapshots()] == [(2, own), (4, own), (6, own), (8, ema.run)]


@pytest.mark.filterwarnings("ignore:This run")
def test_own_snapshots_come_before_those_of_the_newest_run(make):
    older, newer = make(Net()), make(Net())
    for ema, last in ((older, 3), (newer, 5)):
        train(ema, range(1, last + 1))
        ema.checkpoint()
    assert make(Net()).restore() == 5
    assert older.restore() == 3
    assert make(Net()).restore(run=newer.run) == 5


@pytest.mark.filterwarnings("ignore:This run")
def test_run_that_continues_a_newer_one_is_found_by_readers(make):
    older, newer = make(Net()), make(Net())
    train(newer, range(1, 4))
    newer.checkpoint()
    older.restore()
    train(older, range(4, 6))
    older.checkpoint()
    assert [s.step for s in SnapshotStore(older.snapshots.root).snapshots()] == [3, 5]


@pytest.mark.parametrize("asked", [{}, {"step": 3}, {"run": "20260101T000000.000000-00000000"}])
def test_nothing_to_restore_is_an_error_that_changes_nothing(asked, make):
    ema = make(Net())
    train(ema, range(1, 3))
    before, clock, run = everything(ema), counters(ema), ema.run
    with pytest.raises(SnapshotNotFound):
        ema.restore(**asked)
    assert_same_bits(everything(ema), before)
    assert (counters(ema), ema.run) == (clock, run)
    with pytest.raises(TypeError, match=r"step is '3'; expected"):
        ema.restore(step="3")


# ---- what is refused

UNFIT = {
    "shape": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 1)), {}, r"'0.weight': found shape \(3, 3\), exp"),
    "missing": (lambda: nn.Sequential(*three(), nn.Linear(3, 2)), {}, r"'2.weight': missing in the snapshot; '2.bias'"),
    "unexpected": (lambda: three()[:1], {}, r"'1.weight': unexpected"),
    "role": (lambda: three(), {"ignore_names": ["0.bias"]}, r"'0.bias': found averaged, expected skipped"),
    "copied": (lambda: three(), {"param_or_buffer_names_no_ema": ["1.bias"]}, r"'1.bias': found averaged, expected co"),
    "profiles": (lambda: three(), {"sigma_rels": (0.07,)}, r"sigma_rels=\(0.05, 0.1\).*tracks sigma_rels=\(0.07\)"),
}


def three() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


@pytest.mark.parametrize("case", UNFIT)
def test_snapshot_that_does_not_fit_is_refused_untouched(case, make):
    model, options, words = UNFIT[case]
    first = make(three())
    train(first, range(1, 4))
    first.checkpoint()
    ema = make(model(), **options)
    before, run = everything(ema), ema.run
    with pytest.raises(SnapshotMismatch, match=words) as refused:
        ema.restore()
    assert refused.value.path == file_of(first, 3)
    assert_same_bits(everything(ema), before)
    assert (ema.step, ema.run, ema.initted) == (0, run, False)


@pytest.mark.parametrize(("was", "now"), [(torch.float64, torch.float32), (torch.complex64, torch.float32)])
def test_averages_are_never_cast_down(was, now, make):
    first = make(Vector(4, was), checkpoint_dtype=torch.float64)
    first.update()
    first.checkpoint()
    with pytest.raises(SnapshotMismatch, match=r"'weight': found (F64|C64), expected F32"):
        make(Vector(4, now)).restore()


def test_order_of_the_tensors_may_change(make):
    class Two(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.BatchNorm1d(3 + ord(name)))

    first = make(Two("a", "b", "c"))
    train(first, range(1, 4))
    first.checkpoint()
    again = make(Two("c", "a", "b"))
    again.restore()
    assert_same_bits(everything(again), {key: everything(first)[key] for key in everything(again)})


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["header", "first average", "last average", "copied"])
@pytest.mark.parametrize("cls", CLASSES)
def test_damage_is_found_before_anything_is_touched(cls, where, make):
    first = make(Net(), checkpoint_every_num_steps=2)
    train(first, range(1, 5))
    layout = first._engine.flat_buffers.layout
    begin = first.snapshots.get().data_begin
    position = {"header": 20, "first average": begin, "last average": begin + layout.sections[1].end - 1, "copied": -1}
    flip(file_of(first, 4), position[where])
    ema = make(Net(), cls)
    before = everything(ema)
    with pytest.raises(SnapshotDamaged, match=r"restore\(\): .*step-000000000004.*restore\(step=...\)"):
        ema.restore()
    assert_same_bits(everything(ema), before)
    assert ema.step == 0
    assert ema.restore(step=2) == 2


@pytest.mark.parametrize("cls", CLASSES)
def test_damage_between_the_reads_refuses_the_averages(cls, make, monkeypatch):
    first = make(Net(), checkpoint_every_num_steps=2)
    train(first, range(1, 5))
    check = nitrous_ema.averaging.restore._Section.check

    def check_then_flip(part, files):
        check(part, files)
        if part.dtype == torch.uint8:  # the last one
            flip(file_of(first, 4), -1)

    ema = make(Net(), cls)
    with monkeypatch.context() as patch:
        patch.setattr(nitrous_ema.averaging.restore._Section, "check", check_then_flip)
        with pytest.raises(SnapshotDamaged):
            ema.restore()
    for call in (ema.update, ema.checkpoint, ema.state_dict):
        with pytest.raises(NitrousError, match=r"restore\(\) failed .*is damaged.*\(restore\)"):
            call()
    assert ema.restore(step=2) == 2
    ema.update()


def test_restore_heals_a_failed_lane(make, monkeypatch):
    lane = ThreadLane()
    use_lane(monkeypatch, lane)
    ema = make(Net(), AsyncPostHocEMA, checkpoint_every_num_steps=2)
    train(ema, range(1, 3))
    expected = everything(ema)
    lane.enqueue_write(lambda: 1 / 0)
    ema.update()
    lane.drain(TIMEOUT_SECONDS)
    with pytest.raises(NitrousError, match=r"averaging failed \(division by zero\).*or restore a snapshot \(restore\)"):
        ema.update()
    assert ema.restore() == 2
    assert_same_bits(everything(ema), expected)
    train(ema, range(3, 5))
    assert ema.step == 4


def test_restore_is_refused_when_closed_or_swapped(make):
    ema = make(Net())
    ema.update()
    ema.checkpoint()
    with (
        ema.average_parameters(),
        pytest.raises(NitrousError, match=r"restore\(\): the model currently holds averaged weights"),
    ):
        ema.restore()
    assert ema.restore() == 1
    ema.close()
    with pytest.raises(ClosedError, match=r"restore\(\): the EMA was closed"):
        ema.restore()


# ---- what rounding costs


@pytest.mark.parametrize(
    ("model", "stored", "words"),
    [
        (torch.float32, torch.float16, "were float32 but are stored as float16.*up to 4.9e-04"),
        (torch.bfloat16, torch.bfloat16, "were float32 but are stored as bfloat16.*up to 3.9e-03"),
        (torch.float64, torch.float32, "were float64 but are stored as float32.*up to 6.0e-08"),
    ],
)
def test_rounded_averages_come_back_with_one_warning(model, stored, words, make):
    first = make(Vector(50, model), checkpoint_dtype=stored)
    train(first, range(1, 6))
    first.checkpoint()
    again = make(Vector(50, model), checkpoint_dtype=stored)
    with pytest.warns(NitrousWarning, match=words) as caught:
        again.restore()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    found, expected = averages_of(again), averages_of(first)
    assert_same_bits(found, {key: value.to(stored).to(value.dtype) for key, value in expected.items()})


@pytest.mark.parametrize(
    ("model", "stored"),
    [(torch.float32, torch.float64), (torch.float64, torch.float64), (torch.float16, torch.float32)],
)
def test_averages_that_fit_their_file_come_back_to_the_bit(model, stored, make):
    first = make(Vector(50, model), checkpoint_dtype=stored)
    train(first, range(1, 6))
    first.checkpoint()
    again = make(Vector(50, model))
    again.restore()
    assert_same_bits(averages_of(again), averages_of(first))
