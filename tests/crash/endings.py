"""Processes that end, or fork, in every way there is: ``python -m tests.crash.endings FOLDER``.

One process imports torch and forks the others, each of which comes to a real end of its interpreter. On a disk that
hangs, writes wait for the end of stdin: the process that started this one decides when stdin ends, or never. Prints one
JSON object: for each way to end, the exit status and the text on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import nitrous_ema.async_.ema
import nitrous_ema.averaging.ema
from nitrous_ema import AsyncPostHocEMA, SnapshotStore
from nitrous_ema.async_.lanes import ThreadLane
from nitrous_ema.snapshots.filesystem import FileSystem

nitrous_ema.async_.ema._FEW_ELEMENTS = -1  # toys are averaged by the thread, too
TIMEOUT_SECONDS = 60


class HangingFiles(FileSystem):
    """Background writes wait until stdin has ended."""

    def __init__(self) -> None:
        self.entered = threading.Event()

    def write_at(self, descriptor: int, buffer: object, offset: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            os.read(0, 1)
        return super().write_at(descriptor, buffer, offset)


class Training:
    """A model in training, with a snapshot after each step."""

    def __init__(self, root: Path, *, hangs: bool = False, **options: object) -> None:
        self.files = HangingFiles()
        if hangs:
            nitrous_ema.averaging.ema.SnapshotStore = partial(SnapshotStore, files=self.files)
        self.model = torch.nn.Linear(30, 20)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        options = {"max_pending": 8, "wait_timeout": TIMEOUT_SECONDS, **options}
        self.ema = AsyncPostHocEMA(self.model, checkpoint_every_num_steps=1, checkpoint_folder=root, **options)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.model(torch.ones(2, 30)).sum().backward()
            self.optimizer.step()
            self.ema.update()


def report(word: str) -> None:
    os.write(1, f"{word}\n".encode())


def training_raises(root: Path) -> None:
    training = Training(root)
    training.steps(6)
    raise KeyError("training failed")


def training_raises_while_the_ema_is_in_the_traceback(root: Path) -> None:
    training = Training(root)
    training.steps(6)
    training.ema.update("text")


def sys_exit_with_the_ema_in_a_cycle(root: Path) -> None:
    training = Training(root)
    training.ema._cycle = training.ema
    training.steps(6)
    sys.exit(3)


def os_exit(root: Path) -> None:
    training = Training(root)
    training.steps(3)
    training.ema.flush(TIMEOUT_SECONDS)
    training.steps(3)
    os._exit(5)


def training_in_a_thread_that_outlives_main(root: Path) -> None:
    main_has_ended = threading.Event()

    def train() -> None:
        training = Training(root)
        training.steps(3)
        threading.main_thread().join(TIMEOUT_SECONDS)
        training.steps(3)
        main_has_ended.set()
        sys.exit(9)  # ends this thread; the process has another exit status

    threading.Thread(target=train).start()


def exit_while_a_write_hangs(root: Path) -> None:
    training = Training(root, hangs=True, num_writers=1)
    training.steps(6)
    assert training.files.entered.wait(TIMEOUT_SECONDS)
    report("go on")  # stdin ends some time after this; the interpreter waits for the write before it ends


def exit_while_the_disk_hangs_for_good(root: Path) -> None:
    training = Training(root, hangs=True, wait_timeout=0.5)
    training.steps(6)
    training.ema._cycle = training.ema  # a cycle keeps the EMA alive until the interpreter ends


def exception_while_the_disk_hangs_for_good(root: Path) -> None:
    training = Training(root, hangs=True, wait_timeout=0.5)
    training.steps(6)
    raise KeyError("training failed")


class Interrupted(ThreadLane):
    """Raises SIGINT at a call of the training thread, before the lane has handled the call, or after."""

    def __init__(self, call: str, number: int, *, after: bool) -> None:
        super().__init__()
        self._left = number
        method = getattr(self, call)

        def interrupted(*arguments: object) -> object:
            result = method(*arguments) if after else None
            self._left -= 1
            if self._left == 0:
                signal.raise_signal(signal.SIGINT)
            return result if after else method(*arguments)

        setattr(self, call, interrupted)


def interrupted(call: str, number: int, after: bool, root: Path) -> None:
    lane = Interrupted(call, number, after=after)
    nitrous_ema.async_.ema.make_lane = lambda device: lane
    training = Training(root, hangs=True)  # each snapshot has a slot of its own, with its own marks
    try:
        training.steps(6)
    except KeyboardInterrupt:
        report("go on")
        raise


def interrupt_while_waiting_for_a_slot(root: Path) -> None:
    training = Training(root, hangs=True, max_pending=1, on_full="wait")

    def interrupt() -> None:
        training.files.entered.wait(TIMEOUT_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        training.steps(6)
    except KeyboardInterrupt:
        report("go on")
        raise


def forks_while_a_write_hangs(root: Path) -> None:
    training = Training(root, hangs=True)
    training.steps(3)
    assert training.files.entered.wait(TIMEOUT_SECONDS)
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT_SECONDS)
        ema = training.ema
        training.steps(1)  # does nothing to the averages
        assert (ema.step, ema.checkpoint(), ema.stats().pending) == (3, False, 0)
        ema.flush()
        ema.load_state_dict(ema.state_dict())
        ema.close()
        sys.exit(7)  # with everything that runs at exit
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    loader = DataLoader(Batches(training), num_workers=2, multiprocessing_context="fork", timeout=TIMEOUT_SECONDS)
    assert [int(step) for step in loader] == [3] * 4
    report("go on")
    training.steps(3)
    training.ema.close(TIMEOUT_SECONDS)


class Batches(Dataset):
    """A data set whose workers have the EMA, and use it by mistake."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self._training.steps(1)
        return self._training.ema.step


def spawns_while_a_write_hangs(root: Path) -> None:
    training = Training(root, hangs=True)
    training.steps(3)
    assert training.files.entered.wait(TIMEOUT_SECONDS)
    spawn = multiprocessing.get_context("spawn")
    with pytest.raises(TypeError, match="cannot be pickled"):
        spawn.Process(target=print, args=(training.ema,)).start()
    child = spawn.Process(target=int)
    child.start()
    child.join(TIMEOUT_SECONDS)
    assert child.exitcode == 0, child.exitcode
    report("go on")
    training.steps(3)


ENDINGS: dict[str, Callable[[Path], None]] = {
    work.__name__.replace("_", " "): work
    for work in (
        training_raises,
        training_raises_while_the_ema_is_in_the_traceback,
        sys_exit_with_the_ema_in_a_cycle,
        os_exit,
        training_in_a_thread_that_outlives_main,
        exit_while_a_write_hangs,
        exit_while_the_disk_hangs_for_good,
        exception_while_the_disk_hangs_for_good,
        interrupt_while_waiting_for_a_slot,
        forks_while_a_write_hangs,
        spawns_while_a_write_hangs,
    )
}
ENDINGS |= {
    f"interrupt {'after' if after else 'before'} the lane's {call}": partial(interrupted, call, number, after)
    for call, number in (
        ("enqueue_write", 5),
        ("enqueue_read", 4),
        ("mark", 4),
    )  # the first enqueue_write() is that of the construction
    for after in (False, True)
}


def end(work: Callable[[Path], None], folder: Path) -> tuple[int, str] | None:
    """Return exit status and stderr of a process that does the work; None in that process, which leaves main() next."""
    errors = folder.with_suffix(".stderr")
    (stdin_read, stdin), (stdout, stdout_write) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        stderr = os.open(errors, os.O_CREAT | os.O_WRONLY)
        for number, descriptor in enumerate((stdin_read, stdout_write, stderr)):
            os.dup2(descriptor, number)
        for descriptor in (stdin_read, stdin, stdout, stdout_write, stderr):
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job inherits as ignored
        faulthandler.register(signal.SIGALRM, chain=True)  # not its timer, whose thread is missed in a fork
        signal.alarm(3 * TIMEOUT_SECONDS)
        work(folder)
        return None
    os.close(stdin_read)
    os.close(stdout_write)
    output = b""
    while piece := os.read(stdout, 100):
        output += piece
        if b"go on\n" in output:
            os.close(stdin)
            stdin, output = -1, b""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for descriptor in {stdout, stdin} - {-1}:
        os.close(descriptor)
    return status, errors.read_text()


def main(root: Path) -> int:
    torch.set_num_threads(1)
    torch.compiler.disable(lambda: None)  # imports for seconds when first used
    ends = {}
    for number, (name, work) in enumerate(ENDINGS.items()):
        ended = end(work, root / f"folder-{number}")
        if ended is None:
            return 0
        ends[name] = {"folder": f"folder-{number}", "status": ended[0], "stderr": ended[1]}
    print(json.dumps(ends))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
