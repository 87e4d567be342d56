"""The processes that take part in a soak (``tests.crash.soak``): writer, pruner, reader, synthesizer.

All of them record in one journal what they do, or are about to do. The weights of each step are known beforehand, so
everything that is read is compared with an evaluation of the definition that shares no code with the package.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

import nitrous_ema.averaging.ema
from nitrous_ema import AsyncPostHocEMA, KeepBytes, KeepCount, KeepGeometric, SnapshotStore
from nitrous_ema.async_ import synthesize_worker
from nitrous_ema.errors import SnapshotError, SnapshotNotFound, WorkerError
from nitrous_ema.posthoc import retain
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.synthesis import synthesize
from tests.crash.journal import Journal, folder
from tests.crash.kills import TIMEOUT_SECONDS, Deadly, data_of, expect, one_step, weights_of_step

MOST_STEPS = 90
LENGTHS = (0.06, 0.08, 0.1, 0.14)
KEEPS = (
    lambda: "all",
    lambda: KeepCount(5),
    lambda: KeepGeometric(1.2),
    lambda: KeepBytes(40_000),  # of snapshots of 5 776 bytes: 6 at once
)

Report = Callable[[str], None]


# The numbers


@dataclass(frozen=True)
class Truth:
    """The right averages, by definition, in float64."""

    expected: dict[int, bytes]
    """Data of the snapshot of each step, of an undisturbed run."""
    weights: np.ndarray = field(
        default_factory=lambda: np.stack([weights_of_step(step).double().numpy() for step in range(1, MOST_STEPS + 1)])
    )

    def average(self, step: int, gamma: float) -> np.ndarray:
        shares = np.diff((np.arange(step + 1) / step) ** (gamma + 1))
        return shares @ self.weights[:step]

    def check_snapshots(self) -> None:
        """Check the averages of the undisturbed run itself."""
        for step, data in self.expected.items():
            numbers = np.frombuffer(data, np.float32).reshape(2, -1)
            for found, sigma_rel in zip(numbers, (0.05, 0.10), strict=True):
                wanted = self.average(step, float(sigma_rel_to_gamma(sigma_rel)))
                expect(np.abs(found - wanted).max() < 1e-5, f"an undisturbed run has other averages at step {step}")

    def check(self, found: np.ndarray, step: int, sigma_rel: float, profile_error: float, weight_l1: float) -> None:
        """Check that a synthesized average is as accurate as its plan predicts.

        The weights of each step are independent normal numbers. So the error's length is the profile's error times the
        length of the profile, up to a few percent; float32 rounding adds to it.
        """
        gamma = float(sigma_rel_to_gamma(sigma_rel))
        profile = (gamma + 1) / np.sqrt((2 * gamma + 1) * step)
        wrong = np.linalg.norm(found - self.average(step, gamma)) / np.sqrt(found.size)
        allowed = 1.4 * profile_error * profile + 1e-6 * (1 + weight_l1)
        expect(bool(wrong <= allowed), f"average {sigma_rel} of step {step}: error {wrong}, expected at most {allowed}")


# Writing


def write_some(root: Path, journal: Journal, chance: random.Random, stopped: object, report: Report) -> None:
    """A short run that is not disturbed, so that readers have snapshots to read."""
    model = torch.nn.Linear(20, 10)
    with AsyncPostHocEMA(model, checkpoint_every_num_steps=1, checkpoint_folder=root) as ema:
        for step in range(1, 6):
            one_step(ema, model, step)
    journal.note(f"began {ema.run} 0 1")
    journal.note(f"durable {ema.run} 5")


def write(root: Path, journal: Journal, chance: random.Random, stopped: object, report: Report) -> None:
    """One life of a training run: it resumes or not, goes on for a while, and is closed, left or killed."""
    warnings.filterwarnings("ignore", message="This run.* begins anew")
    if chance.random() < 0.3:
        files = Deadly(chance.randrange(30, 900), before=chance.random() < 0.5)
        nitrous_ema.averaging.ema.SnapshotStore = functools.partial(SnapshotStore, files=files)
    model = torch.nn.Linear(20, 10)
    every = chance.choice((1, 2))
    ema = AsyncPostHocEMA(
        model, checkpoint_every_num_steps=every, checkpoint_folder=root, keep=chance.choice(KEEPS)(), max_pending=3
    )
    resume = root.with_suffix(".state")
    _resume(ema, journal, chance, resume)
    journal.note(f"began {ema.run} {ema.step} {every}")
    begun_at, last = ema.step, chance.choice((MOST_STEPS, chance.randrange(20, MOST_STEPS)))
    for step in range(ema.step + 1, last + 1):
        one_step(ema, model, step)
        report("step")
        if chance.random() < 0.1:
            _acknowledge(ema, journal, pin=chance.random() < 0.2 and step - begun_at > every)
        if chance.random() < 0.05:
            new = resume.with_suffix(f".new-{os.getpid()}")  # two writers may live at once
            torch.save(ema.state_dict(), new)
            os.replace(new, resume)
    if chance.random() < 0.2:
        os._exit(0)
    ema.close(TIMEOUT_SECONDS)
    journal.note(f"durable {ema.run} {ema.step}")


def _resume(ema: AsyncPostHocEMA, journal: Journal, chance: random.Random, state: Path) -> None:
    how = chance.choice(("restore", "load", "start afresh"))
    if how == "load" and state.exists():
        ema.load_state_dict(torch.load(state))
    elif how == "restore":
        runs = ema.snapshots.runs()
        run = chance.choice([None, *runs[-3:]])
        with allow_missing_snapshots(ema.snapshots.root, journal, run):
            # With no run named, the newest may be another one by the time it is restored.
            steps = [snapshot.step for snapshot in ema.snapshots.snapshots(run)] if run else []
            ema.restore(chance.choice([None, *steps]), run)


def _acknowledge(ema: AsyncPostHocEMA, journal: Journal, *, pin: bool) -> None:
    if pin:
        ema.pin()
    ema.flush(TIMEOUT_SECONDS)
    journal.note(f"durable {ema.run} {ema.step}")
    if pin:
        own = max(step for step, run in ema.snapshots.pins() if run == ema.run)
        journal.note(f"pinned {folder(own, ema.run)}")


# Pruning


def prune(root: Path, journal: Journal, chance: random.Random, stopped: Callable[[], bool], report: Report) -> None:
    """Thin histories by library and by command, pin and unpin, until ``stopped()``."""
    store = SnapshotStore(root)
    while not stopped():
        run = chance.choice([None, None, *store.runs()])
        action = chance.choice((_thin, _thin, _pin, _unpin, _command))
        with allow_missing_snapshots(root, journal, run):
            action(store, journal, chance, run)
        report("round")


def _thin(store: SnapshotStore, journal: Journal, chance: random.Random, run: str | None) -> None:
    pins, snapshots = store.pins(), store.examine(run).snapshots
    pinned = [place for place, each in enumerate(snapshots) if (each.step, each.run) in pins]
    keep = max(chance.randrange(3, 12), len(pinned) + 1)
    retention = retain(
        [each.t for each in snapshots], snapshots[-1].layout.gammas, keep=min(keep, len(snapshots)), pinned=pinned
    )
    try:
        store.hide([snapshots[place] for place in retention.dropped])
    except SnapshotError as error:  # another process has pinned one since
        expect("pin" in str(error) and store.pins() > pins, f"hide() raises {error!r}")
    if chance.random() < 0.7:
        store.remove_hidden(older_than_seconds=chance.choice((0.0, 0.05)))


def _pin(store: SnapshotStore, journal: Journal, chance: random.Random, run: str | None) -> None:
    snapshot = chance.choice(store.examine(run).snapshots)
    store.pin(snapshot.step, snapshot.run)
    journal.note(f"pinned {folder(snapshot.step, snapshot.run)}")


def _unpin(store: SnapshotStore, journal: Journal, chance: random.Random, run: str | None) -> None:
    noted = journal.read().pinned  # a pin that its owner has not noted yet is still being set
    pins = sorted(pin for pin in store.pins() if folder(*pin) in noted)
    for step, owner in chance.sample(pins, k=len(pins) // 2):
        journal.note(f"unpinning {folder(step, owner)}")
        store.unpin(step, owner)


def _command(store: SnapshotStore, journal: Journal, chance: random.Random, run: str | None) -> None:
    """The command, in a process of its own."""
    arguments = ["prune", str(store.root), *(["--run", run] if run else [])]
    arguments += chance.choice((["--keep", "8"], ["--budget", "60kB"], ["--error", "0.01"], ["--keep", "4", "--json"]))
    command = [sys.executable, "-m", "tests.crash.journal", str(journal.path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if done.returncode == 3:
        raise SnapshotNotFound(done.stderr, path=store.root, nearest=())
    too_many_pins = done.returncode == 2 and "pinned" in done.stderr
    expect(done.returncode == 0 or too_many_pins, f"{arguments} ended with {done.returncode}: {done.stderr}")


# Reading


@contextlib.contextmanager
def allow_missing_snapshots(root: Path, journal: Journal, run: str | None) -> Iterator[None]:
    """Accept an error that names a snapshot which a process has hidden and which is gone, or a run that lost some."""
    try:
        yield
    except (SnapshotNotFound, WorkerError, FileNotFoundError) as error:
        hidden = journal.read().hidden
        named = set(re.findall(r"step-\d{12}-[\w.-]+[\w]", str(error)))
        # A read of a file by its path fails once the file is hidden; the package's fail only once it is removed.
        is_gone = _is_hidden if isinstance(error, FileNotFoundError) else _is_removed
        if named and named <= hidden and all(is_gone(root, name) for name in named):
            return
        if run is not None and not named and any(name.endswith(f"-{run}") for name in hidden):
            return
        raise


def _is_hidden(root: Path, name: str) -> bool:
    return not (root / name).exists()


def _is_removed(root: Path, name: str) -> bool:
    return not any(any((root / place).glob("rank-*")) for place in (name, f".trash-{name}"))


def read(
    root: Path, journal: Journal, chance: random.Random, stopped: Callable[[], bool], report: Report, truth: Truth
) -> None:
    """List and read in every way there is, until ``stopped()``."""
    store, newest = SnapshotStore(root), ("", 0)
    while not stopped():
        pinned = set(journal.read().pinned)
        snapshot = store.get()
        expect((snapshot.run, snapshot.step) >= newest, f"newest was {newest}, is {(snapshot.run, snapshot.step)}")
        newest = snapshot.run, snapshot.step
        run = chance.choice([None, *store.runs()])
        with allow_missing_snapshots(root, journal, run):
            _check_listing(store, journal, truth, run)
        with allow_missing_snapshots(root, journal, run):
            examined = store.examine(run)
            expect(not examined.damaged, f"damaged: {examined.damaged}")
        problems = store.verify()
        expect(problems == [], f"verify() returns {problems}")
        store.incomplete()
        # A snapshot that was pinned while it was being hidden comes back when hidden snapshots are removed. It may be
        # renamed between two looks at the folder, but not each time.
        gone = {name for name in pinned if not any(list(root.glob(f"*{name}*/rank-*")) for look in range(5))}
        expect(not gone & journal.read().pinned, f"pinned and gone: {gone}")
        with allow_missing_snapshots(root, journal, run):
            _check_average(store, chance, run, truth)
        report("round")


def _check_listing(store: SnapshotStore, journal: Journal, truth: Truth, run: str | None) -> None:
    snapshots = store.snapshots(run)
    steps = [snapshot.step for snapshot in snapshots]
    expect(bool(steps) and steps == sorted(set(steps)), f"steps of {run}: {steps}")
    for snapshot in snapshots:
        with allow_missing_snapshots(store.root, journal, run):
            expect(data_of(snapshot) == truth.expected[snapshot.step], f"{snapshot.paths[0]} has other bits")


def _check_average(store: SnapshotStore, chance: random.Random, run: str | None, truth: Truth) -> None:
    lengths = chance.sample(LENGTHS, 2)
    made = synthesize(store, sigma_rels=lengths, run=run, dtype=np.float64)
    for index, length in enumerate(lengths):
        report = made.plan.report
        error, l1 = float(report.profile_error[index]), float(report.weight_l1[index])
        truth.check(made.flats[index], made.plan.target.step, length, error, l1)


def synthesize_by_worker(
    root: Path, journal: Journal, chance: random.Random, stopped: Callable[[], bool], report: Report, truth: Truth
) -> None:
    """Start one worker after the other, until ``stopped()``."""
    while not stopped():
        run = chance.choice([None, *SnapshotStore(root).runs()])
        with tempfile.TemporaryDirectory() as out, allow_missing_snapshots(root, journal, run):
            job = synthesize_worker.launch(root, out=out, sigma_rels=LENGTHS, run=run, dtype="float32")
            for output in job.result(TIMEOUT_SECONDS):
                found = safetensors.numpy.load_file(output.path)
                numbers = np.concatenate([found["weight"].ravel(), found["bias"]])
                truth.check(numbers, output.step, output.sigma_rel, output.profile_error, output.weight_l1)
        report("round")
