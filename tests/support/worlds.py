"""Processes of one torch.distributed group (gloo), which run functions of a test one after the other.

Starting them takes seconds, so a module's tests share one world of each size. A function that raises on a rank fails
the test with that rank's traceback; a rank that gives no answer in time ends the world.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ANSWER_SECONDS = 120.0


class World:
    """Args: size: Number of processes. folder: An empty folder for the group's store."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "store"), there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, *arguments)`` on every rank; return the results by rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(ANSWER_SECONDS):
                self.end()
                raise TimeoutError(f"rank {rank} gave no answer in {ANSWER_SECONDS} seconds")
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (is_right, text) in enumerate(answers) if not is_right]
        assert not failed, "\n".join(failed)
        return [result for _, result in answers]

    def end(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join(60)


@contextmanager
def world(size: int, folder: Path) -> Iterator[World]:
    started = World(size, folder)
    try:
        yield started
    finally:
        started.end()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(rank, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
