"""Training runs that are killed at any moment, and checks of their folder then: ``python -m tests.crash.kills``.

One process imports torch and forks a run at a time. Half of the runs are killed at a random moment, half at a random
file system call of their own. Each goes on from a state that an earlier run saved, or from the folder, or forgets to
resume. The weights of a step are known beforehand, so each snapshot must have the bits of a run that was not killed.
Acknowledged snapshots must be there unless ``keep=`` has dropped them; pinned ones must be there in any case.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import nitrous_ema.async_.ema
import nitrous_ema.averaging.ema
from nitrous_ema import AsyncPostHocEMA, KeepGeometric, PostHocEMA, SnapshotStore
from nitrous_ema.snapshots.filesystem import FileSystem
from tests.crash.journal import folder, record_hiding

nitrous_ema.async_.ema._FEW_ELEMENTS = -1  # toys are averaged by the thread, too
TIMEOUT_SECONDS = 120
MOST_STEPS = 60
EVERY_STEPS = 3
KILLS_PER_FOLDER = 20
MOST_RUNS_PER_KILL = 10


class Deadly(FileSystem):
    """Kills its process at one of its calls, before or after it."""

    def __init__(self, at_call: int, before: bool) -> None:
        self._left, self._before = at_call, before
        for name in vars(FileSystem):
            if not name.startswith("_"):
                setattr(self, name, functools.partial(self._call, getattr(super(), name)))

    def _call(self, method: Callable[..., object], *arguments: object) -> object:
        self._left -= 1
        if self._left == 0 and self._before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*arguments)
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


@dataclass
class Campaign:
    """The facts about one folder, as its runs reported them."""

    root: Path
    expected: dict[int, bytes]
    """Data of the snapshot of each step."""
    promised: set[tuple[str, int]] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    """Folders that ``keep=`` has dropped, or was about to."""
    pinned: set[str] = field(default_factory=set)
    history: dict[str, dict[str, int | None]] = field(default_factory=dict)
    """For each run: the runs that it continues and itself, with the step at which each was left."""

    def began(self, run: str, ancestor: str, step: int) -> None:
        """Record that a run goes on from a state of ``ancestor`` at this step, or starts without a state."""
        past = self.history.get(ancestor, {})
        self.history[run] = {name: min(left or step, step) for name, left in past.items()} | {run: None}


def train(root: Path, report: Callable[[str], None], chance: random.Random, resume: Path) -> None:
    """Train until the process is killed or all steps are done; ``report`` what is durable."""
    model = torch.nn.Linear(20, 10)
    keep = chance.choice(("all", "all", 4, KeepGeometric(1.3)))
    ema = AsyncPostHocEMA(model, checkpoint_every_num_steps=EVERY_STEPS, checkpoint_folder=root, keep=keep)
    ancestor, how = "", chance.random()
    if resume.exists() and how < 0.5:
        saved = torch.load(resume)
        ema.load_state_dict(saved["ema"])
        ancestor = saved["run"]
    elif how < 0.7 and SnapshotStore(root).runs():
        ema.restore()
        ancestor = ema.snapshots.get(ema.step).run
    else:
        warnings.filterwarnings("ignore", "This run.* begins anew")  # it forgets to resume on purpose
    report(f"began {ema.run},{ancestor},{ema.step}")
    for step in range(ema.step + 1, MOST_STEPS + 1):
        one_step(ema, model, step)
        if chance.random() < 0.2:
            ema.flush(TIMEOUT_SECONDS)
            report(f"durable {step // EVERY_STEPS * EVERY_STEPS}")
            if step % EVERY_STEPS == 0 and chance.random() < 0.2:
                ema.pin()
                report(f"pinned {folder(step, ema.run)}")
        if chance.random() < 0.05:
            torch.save({"ema": ema.state_dict(), "run": ema.run}, resume.with_suffix(".new"))
            os.replace(resume.with_suffix(".new"), resume)
    ema.close(TIMEOUT_SECONDS)
    report(f"durable {MOST_STEPS}")


def one_step(ema: PostHocEMA, model: torch.nn.Module, step: int) -> None:
    ema.fence()
    parameters = list(model.parameters())
    parts = weights_of_step(step).split([parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))
    ema.update()


def weights_of_step(step: int) -> torch.Tensor:
    """Return the model's weights after a step, as one vector."""
    return torch.randn(20 * 10 + 10, generator=torch.Generator().manual_seed(step))


def run_undisturbed(root: Path, most_steps: int = MOST_STEPS, every_steps: int = EVERY_STEPS) -> dict[int, bytes]:
    """Return the data of the snapshot of each step of a run that is not killed, by the synchronous class."""

    def reference() -> None:
        model = torch.nn.Linear(20, 10)
        ema = PostHocEMA(model, checkpoint_every_num_steps=every_steps, checkpoint_folder=root, update_every=1)
        for step in range(1, most_steps + 1):
            one_step(ema, model, step)
        ema.close()

    if wait(fork(reference)) != 0:
        raise RuntimeError("the undisturbed run failed")
    return {snapshot.step: data_of(snapshot) for snapshot in SnapshotStore(root).snapshots()}


def kill_one(campaign: Campaign, chance: random.Random) -> bool:
    """Start a run, kill it, check what it left. False if the run had come to its end before."""
    seed, own_call = chance.random(), chance.randrange(1, 60) if chance.random() < 0.5 else None
    lines, write_end = os.pipe()
    resume = campaign.root.with_suffix(".state")

    def run() -> None:
        if own_call is not None:
            files = Deadly(own_call + 12, before=seed < 0.5)
            nitrous_ema.averaging.ema.SnapshotStore = functools.partial(SnapshotStore, files=files)
        report = lambda line: os.write(write_end, f"{line}\n".encode())  # noqa: E731
        with record_hiding(report):
            train(campaign.root, report, random.Random(seed), resume)

    child = fork(run)
    os.close(write_end)
    run_id, patience = "", chance.randrange(1, 12)
    try:
        for number, line in enumerate(lines_of(lines)):
            what, value = line.split(" ", 1)
            if what == "began":
                run_id, ancestor, step = value.split(",")
                campaign.began(run_id, ancestor, int(step))
            elif what == "hiding":
                campaign.hidden.add(value)
            elif what == "pinned":
                campaign.pinned.add(value)
            else:
                campaign.promised |= {(run_id, step) for step in _steps_since(campaign, run_id, int(value))}
            if own_call is None and number >= patience:
                select.select([lines], [], [], chance.random() * 0.004)  # a moment later, or at its next line
                os.kill(child, signal.SIGKILL)
                own_call = 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(lines)
        status = wait(child)
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with status {status}")
    check_folder(campaign, [run_id] if run_id else [])
    return status != 0


def _steps_since(campaign: Campaign, run: str, last: int) -> range:
    """Return the steps of which a run itself must have snapshots when it is at ``last``."""
    begun_at = max((left for left in campaign.history[run].values() if left is not None), default=0)
    return range((begun_at // EVERY_STEPS + 1) * EVERY_STEPS, last + 1, EVERY_STEPS)


def check_folder(campaign: Campaign, runs: Sequence[str]) -> None:
    """Check that everything that was promised is there, and that all that is there is right."""
    if not campaign.root.exists():
        return
    store = SnapshotStore(campaign.root)
    owners = store.runs()
    for run in runs:
        mine = {s for owner, s in campaign.promised if owner == run and folder(s, run) not in campaign.hidden}
        found = store.snapshots(run) if run in owners else []
        expect(mine <= {s.step for s in found if s.run == run}, f"{run}: promised {sorted(mine)}, found {found}")
        for snapshot in found:
            left_at = campaign.history[run].get(snapshot.run, 0)
            expect(left_at is None or snapshot.step <= left_at, f"{snapshot.paths[0]} is of an abandoned future")
            expect(data_of(snapshot) == campaign.expected[snapshot.step], f"{snapshot.paths[0]} has other bits")
    store.incomplete()
    lost = {name for name in campaign.pinned if not (campaign.root / name).is_dir()}
    expect(not lost, f"pinned and lost: {lost}")


def data_of(snapshot: object) -> bytes:
    return snapshot.paths[0].read_bytes()[snapshot.data_begin :]


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def lines_of(descriptor: int) -> Iterator[str]:
    """Yield whole lines that come through a pipe, until all its writers are gone."""
    rest = b""
    while True:
        if not select.select([descriptor], [], [], TIMEOUT_SECONDS)[0]:
            raise TimeoutError("a run writes nothing and does not end")
        piece = os.read(descriptor, 4096)
        if not piece:
            return
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode() for line in whole)


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    return child


def wait(child: int) -> int:
    """Return the exit status of a child that has ended or is about to: its last line has been read."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=400, help="runs to kill, not counting those that end before")
    parser.add_argument("--seed", type=int, default=None, help="of a campaign to repeat (moments of kills still vary)")
    options = parser.parse_args(argv)
    seed = random.randrange(10**9) if options.seed is None else options.seed
    chance = random.Random(seed)
    torch.set_num_threads(1)
    torch.compiler.disable(lambda: None)  # imports for seconds when first used: here, once, and not in every run
    killed = started = orphans = incomplete = promised = dropped = listed = 0
    with tempfile.TemporaryDirectory() as parent:
        expected = run_undisturbed(Path(parent) / "undisturbed")
        while killed < options.kills:
            campaign = Campaign(Path(parent) / f"folder-{started}", expected)
            most = min(options.kills, killed + KILLS_PER_FOLDER)
            while killed < most and started < MOST_RUNS_PER_KILL * options.kills:
                killed += kill_one(campaign, chance)
                started += 1
            store = SnapshotStore(campaign.root)
            check_folder(campaign, store.runs())
            expect(store.verify() == [], f"verify() returns {store.verify()}")
            orphans += sum(path.name.startswith(".rank-") for path in campaign.root.glob("step-*/.*"))
            incomplete += len(store.incomplete())
            promised += len(campaign.promised)
            dropped += len(campaign.hidden & {folder(step, run) for run, step in campaign.promised})
            listed += len(list(campaign.root.glob("step-*/rank-*")))
            expect(killed >= most, f"only {killed} of {started} runs could be killed before they ended, seed {seed}")
    print(
        f"{killed} of {started} runs killed, seed {seed}: {listed} snapshots, all whole; "
        f"{promised} acknowledged, none lost, {dropped} of these dropped by keep=; "
        f"{incomplete} unfinished ones passed over, {orphans} temporary files left"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
