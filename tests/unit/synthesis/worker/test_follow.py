from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from nitrous_ema.errors import SnapshotDamaged, SnapshotNotFound
from nitrous_ema.snapshots.filesystem import FileSystem
from nitrous_ema.snapshots.names import one_pass_file_name
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.worker.follow import RunFollower
from nitrous_ema.synthesis.worker.inputs import RequestedAverages, StoredSnapshots
from nitrous_ema.synthesis.worker.launch import launch
from tests.support.snapshot_folders import damage, layout_of, record, run_id, snapshot_file, write_run

ROOT = Path(__file__).resolve().parents[4]
LAYOUT = layout_of([record("w", (20,))])
TIMEOUT = 60


def this_process():
    me = psutil.Process()
    return {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}


@dataclass
class Training:
    """A training process, played by a list: one event in the folder at each wait between two polls."""

    root: Path
    run: str = field(default_factory=lambda: run_id(1))
    events: list = field(default_factory=list)
    done: list = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self):
        self.root.mkdir(exist_ok=True)

    def commit(self, *steps, run=None, **stamp):
        write_run(self.root, LAYOUT, steps, run=run or self.run, trainer=this_process(), **stamp)

    def close(self, run=None):
        SnapshotStore(self.root).close_run(run or self.run)

    def wait(self, seconds):
        self.now += seconds
        if not self.events:
            pytest.fail("the follower waits although no event remains")
        self.events.pop(0)()

    def follow(self, steps=None, *, synthesize=None, run=None, exclude=(), **more):
        requested = RequestedAverages(sigma_rels=[0.07], gammas=None, exclude=exclude, tolerance=0)
        follower = RunFollower(
            snapshots=StoredSnapshots(self.root, requested, run),
            steps=steps,
            synthesize=synthesize or (lambda target: self.done.append(target.step)),
            wait=self.wait,
            clock=lambda: self.now,
            **more,
        )
        follower.follow()
        return follower


@pytest.fixture
def training(tmp_path):
    return Training(tmp_path / "snapshots")


def test_averages_follow_each_commit_until_the_run_is_closed(training, capsys):
    training.commit(100, 200)
    training.events = [lambda: training.commit(300), lambda: None, lambda: training.commit(400, 500), training.close]
    training.follow()
    assert training.done == [200, 300, 400, 500]
    assert f"stopped following: run {training.run} is closed" in capsys.readouterr().err


def test_follower_goes_on_where_the_file_system_fails_for_a_moment(training, monkeypatch):
    training.commit(100, 200)
    training.events = [lambda: training.commit(300), training.close]
    listed, calls, waits = FileSystem.list, itertools.count(), []

    def stale_every_other_time(self, path):
        if next(calls) % 2 == 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return listed(self, path)

    monkeypatch.setattr(FileSystem, "list", stale_every_other_time)
    monkeypatch.setattr(FileSystem, "wait", lambda self, seconds: waits.append(seconds))
    training.follow()
    assert training.done == [200, 300]
    assert set(waits) == {0.1}


def test_file_in_one_pass_is_followed_when_it_has_its_last_byte(training):
    training.commit(100)
    (usual,) = SnapshotStore(training.root).get().paths
    path = usual.with_name(one_pass_file_name(0, 1, 7))
    whole = usual.read_bytes()
    usual.unlink()
    path.write_bytes(whole[:-1])
    training.events = [lambda: None, lambda: path.write_bytes(whole), training.close]
    training.follow()
    assert training.done == [100]


@pytest.mark.parametrize(("steps", "done"), [(None, [200, 300]), ("all", [100, 200, 300]), ([100, 300], [100, 300])])
def test_steps_select_which_existing_snapshots_are_done(training, steps, done):
    training.commit(100, 200)
    training.events = [lambda: training.commit(300), training.close]
    training.follow(steps)
    assert training.done == done


def test_following_ends_with_the_last_listed_step(training):
    training.commit(100)
    training.events = [lambda: training.commit(200), lambda: training.commit(300)]
    training.follow([100, 300])
    assert training.done == [100, 300]


def test_listed_step_without_a_snapshot_is_an_error(training):
    training.commit(100)
    training.events = [training.close]
    with pytest.raises(SnapshotNotFound, match=r"no snapshot of step 150, 300 was found; run .* is closed"):
        training.follow([100, 150, 300])
    assert training.done == [100]


def test_snapshot_committed_and_run_closed_while_another_is_synthesized(training):
    def synthesize(target):
        training.done.append(target.step)
        if target.step == 100:
            training.commit(200)
            training.close()

    training.commit(100)
    training.follow(synthesize=synthesize)
    assert training.done == [100, 200]


def test_snapshot_committed_during_a_poll_is_synthesized_at_the_next(training, monkeypatch):
    """The file is committed after the names and the history were listed."""
    training.commit(100)
    listed = SnapshotStore.snapshots

    def late(self, *arguments, **options):
        found = listed(self, *arguments, **options)
        if not training.done:
            training.commit(200)
        return found

    def close():
        assert training.done == [100, 200]  # without any further change of the folder
        training.close()

    monkeypatch.setattr(SnapshotStore, "snapshots", late)
    training.events = [close]
    training.follow()
    assert not training.events


def test_nothing_is_opened_while_nothing_changes(training, monkeypatch):
    training.commit(100)
    calls = []
    listed = SnapshotStore.snapshots
    monkeypatch.setattr(SnapshotStore, "snapshots", lambda *a, **k: calls.append(1) or listed(*a, **k))
    training.events = [lambda: None] * 5 + [training.close]
    training.follow()
    assert len(calls) <= 3  # at the start, and for the closing mark


def test_follower_waits_for_the_first_snapshot_and_for_the_folder(training):
    training.root.rmdir()
    training.events = [lambda: None, lambda: training.commit(100), training.close]
    training.follow()
    assert training.done == [100]


def test_following_ends_with_the_trainer(training, capsys):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        trainer = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": psutil.Process(process.pid).create_time(),
        }
        write_run(training.root, LAYOUT, [100], run=training.run, trainer=trainer)
        training.events = [lambda: None, lambda: process.communicate(b"\n", timeout=TIMEOUT)]
        training.follow()
    assert training.done == [100]
    assert f"the trainer (process {trainer['pid']} of this machine) has ended" in capsys.readouterr().err


def test_idle_time_ends_it_where_the_trainer_is_on_another_host(training, capsys):
    write_run(training.root, LAYOUT, [100], run=training.run, trainer={"host": "far", "pid": 1, "started": 1.0})
    training.events = [lambda: None] * 20
    training.follow(idle_seconds=10)
    assert training.done == [100]
    assert training.now == 10
    assert "no new snapshot for 10 seconds (--idle)" in capsys.readouterr().err


def test_idle_time_before_the_first_snapshot_is_an_error(training):
    training.events = [lambda: None] * 20
    with pytest.raises(SnapshotNotFound, match="no snapshot was found; no new snapshot for 10 seconds"):
        training.follow(idle_seconds=10)


def test_run_that_continues_is_followed_and_an_unrelated_one_is_not(training, capsys):
    other, next_run = run_id(2), run_id(3)
    training.commit(100, 200)
    training.events = [
        lambda: training.commit(50, run=other),
        lambda: training.commit(150, 300, run=next_run, lineage=[(training.run, 100), (next_run, None)]),
        lambda: training.close(training.run),
        lambda: training.commit(400, run=next_run, lineage=[(training.run, 100), (next_run, None)]),
        lambda: training.close(next_run),
    ]
    training.follow()
    assert training.done == [200, 150, 300, 400]
    err = capsys.readouterr().err
    assert f"run {next_run} continues run {training.run}" in err
    assert err.count(f"run {other} does not continue run {training.run}") == 1


def test_requested_run_is_followed_to_its_end(training):
    next_run = run_id(3)
    training.commit(100)
    training.events = [
        lambda: training.commit(150, run=next_run, lineage=[(training.run, 100), (next_run, None)]),
        training.close,
    ]
    training.follow(run=training.run)
    assert training.done == [100]


def test_snapshot_dropped_while_it_is_read_is_tried_again_then_skipped(training):
    attempts = []

    def synthesize(target):
        attempts.append(target.step)
        if target.step == 100:
            if len(attempts) == 2:
                snapshot_file(training.root, 100).unlink()
            raise SnapshotNotFound("gone.", path=training.root, nearest=())

    training.commit(100, 200)
    training.events = [training.close]
    training.follow("all", synthesize=synthesize)
    assert attempts == [100, 100, 200]


def test_repeated_failure_to_read_a_snapshot_is_an_error(training):
    def synthesize(target):
        raise SnapshotNotFound("gone.", path=training.root, nearest=())

    training.commit(100)
    with pytest.raises(SnapshotNotFound, match="gone"):
        training.follow(synthesize=synthesize)


def test_damaged_snapshot_ends_it_and_can_be_excluded(training):
    training.commit(100, 200)
    damage(snapshot_file(training.root, 100), at=0.05)
    with pytest.raises(SnapshotDamaged):
        training.follow("all")
    training.events = [training.close]
    training.follow("all", exclude=[100])
    assert training.done == [200]


# The processes

TRAINER = """
import sys
import torch
from nitrous_ema import AsyncPostHocEMA

model = torch.nn.Linear(30, 20)
ema = AsyncPostHocEMA(model, checkpoint_every_num_steps="manual", checkpoint_folder=sys.argv[1])
for word in sys.stdin:
    for _ in range(10):
        with torch.no_grad():
            model.weight.add_(0.1)
        ema.fence()
        ema.update()
    ema.checkpoint()
    ema.flush(60)
    print("committed", flush=True)
    if word.strip() == "die":
        import os
        os._exit(1)
ema.close()
"""


@pytest.fixture
def trainer(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", TRAINER, tmp_path / "snapshots"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        process.kill()


def train(process, word="go"):
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "committed\n"


@pytest.mark.parametrize("end", ["close", "die"])
def test_training_is_followed_by_a_process_until_its_end(trainer, tmp_path, end):
    train(trainer)
    job = launch(tmp_path / "snapshots", sigma_rels=[0.07, 0.1], out=tmp_path / "out", follow=True, look_every=0.05)
    outputs = job.outputs(timeout=TIMEOUT)
    assert [next(outputs).step, next(outputs).step] == [10, 10]
    train(trainer)
    assert [next(outputs).step, next(outputs).step] == [20, 20]
    assert not job.done()
    train(trainer, "die" if end == "die" else "go")
    trainer.stdin.close()
    assert [each.step for each in outputs] == [30, 30]
    assert [(each.step, each.state) for each in job.result(TIMEOUT)] == [
        (s, "written") for s in (10, 10, 20, 20, 30, 30)
    ]
    again = launch(
        tmp_path / "snapshots", sigma_rels=[0.07, 0.1], out=tmp_path / "out", steps="all", follow=True, look_every=0.05
    )
    trainer.wait(TIMEOUT)
    assert {each.state for each in again.result(TIMEOUT)} == {"kept"}


def test_following_process_ends_at_sigterm_with_nothing_half_written(tmp_path):
    write_run(tmp_path / "snapshots", LAYOUT, [100, 200], trainer=this_process())
    command = [sys.executable, "-m", "nitrous_ema.async_.synthesize_worker", tmp_path / "snapshots", "--follow"]
    with subprocess.Popen(
        [*command, "--sigma-rel=0.08", f"--out={tmp_path / 'out'}"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert '"step": 200' in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, stdout) == (130, "")
    assert textwrap.shorten(stderr, 10_000).endswith("were not written.")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["step-200-sigma-0.08.safetensors"]
