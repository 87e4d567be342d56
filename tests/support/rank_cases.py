"""What each rank does in the tests of ``averaging/model/ranks.py``. Every function takes the rank first."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nitrous_ema import AsyncPostHocEMA, NitrousError, PostHocEMA
from nitrous_ema.averaging.model import ranks as ranks_module
from tests.support.snapshot_folders import layout_of, record, write_snapshot

CLASSES = {"PostHocEMA": PostHocEMA, "AsyncPostHocEMA": AsyncPostHocEMA}
DATA = 8


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(DATA, 16), nn.BatchNorm1d(16), nn.Linear(16, DATA))


def step(model: nn.Module, number: int, rank: int) -> None:
    """One step of SGD on data of this rank."""
    inputs = torch.randn(16, DATA, generator=torch.Generator().manual_seed(1000 * number + rank))
    loss = (model(inputs) - inputs).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def averages(ema: PostHocEMA) -> list[list[np.ndarray]]:
    return [
        [value.detach().numpy().copy() for value in each.ema_model.state_dict().values() if value.is_floating_point()]
        for each in ema.ema_models
    ]


def make(name: str, model: nn.Module, folder: Any, **options: Any) -> PostHocEMA:
    options = {"checkpoint_every_num_steps": 2, "update_every": 1, **options}
    return CLASSES[name](model, checkpoint_folder=folder, **options)


def train_ddp(rank: int, name: str, folder: Path, is_wrapped: bool) -> dict[str, Any]:
    """Averages on every rank of DDP, of the wrapped model or of the model inside."""
    ddp = DistributedDataParallel(net())
    ema = make(name, ddp if is_wrapped else ddp.module, folder)
    for number in range(1, 7):
        step(ddp, number, rank)
        ema.update()
    ema.close()
    parameters = [[value for value in each if value.ndim == 2] for each in averages(ema)]
    return {"run": ema.run, "averages": parameters, "snapshots": ema.stats().snapshots}


def first_rank_alone(rank: int, name: str, folder: Path) -> int | None:
    if rank > 0:
        return None
    ema = make(name, net(), folder)
    for number in range(1, 5):
        step(net(), number, rank)
        ema.update()
    ema.close()
    return ema.stats().snapshots


def second_rank_alone(rank: int, name: str, folder: Path) -> tuple[str, int] | None:
    if rank != 1:
        return None
    ema = make(name, net(), folder)
    for _ in range(3):
        ema.update()
    try:
        ema.update()
    except NitrousError as error:
        return str(error), ema.step
    return None


def folder_each(rank: int, name: str, folder: Path, process_group: Any) -> str:
    """Each rank trains a model of its own and writes to a folder of its own."""
    ema = make(name, net(rank), folder / str(rank), process_group=process_group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for _ in range(4):
                ema.update()
        except NitrousError as error:
            return str(error)
    ema.close()
    return ""


def different_weights(rank: int, name: str, folder: Path) -> list[str]:
    """Each rank holds another half of one model."""
    ema = make(name, net(rank), folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ema.update()
    ema.close()
    return [str(each.message) for each in caught]


def marked_as_shards(rank: int, folder: Path, mark: str, value: bool, process_group: Any) -> str:
    model = net()
    setattr(model[2].weight, mark, value)
    try:
        make("PostHocEMA", model, folder / f"{mark}-{rank}", process_group=process_group).close()
    except NitrousError as error:
        return str(error)
    return ""


def other_arguments(rank: int, folder: Path, options: dict[str, list[Any]]) -> str:
    mine = {name: values[rank] for name, values in options.items()}
    dist.barrier()
    if rank == 1:
        dist.barrier()
    message = ""
    try:
        make("PostHocEMA", net(), folder, **mine).close()
    except NitrousError as error:
        message = str(error)
    if rank == 0:
        dist.barrier()
    return message


def resume(rank: int, name: str, folder: Path, how: str) -> list[tuple[str, tuple[Any, ...]]]:
    """Train, load a state or restore on every rank, train on; twice. Returns each run with its lineage."""
    found = []
    state = None
    for _ in range(3):
        model = net()
        ema = make(name, model, folder)
        if how == "load" and state is not None:
            ema.load_state_dict(state)
        elif how == "restore" and found:
            ema.restore()
        dist.barrier()
        for number in range(1, 4):
            if rank == 1:
                dist.barrier()  # the writer is always ahead
            step(model, number, 0)
            ema.update()
            ema.flush()
            if rank == 0:
                dist.barrier()
        if state is None:
            state = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in ema.state_dict().items()
            }
        if how == "load":
            ema.load_state_dict(state)  # back to step 3, after snapshots were written
            ema.update()
        found.append((ema.run, ema.state_dict()["ema_models.0._extra_state"]["lineage"]))
        ema.close()
        dist.barrier()
    return found


def restore_at_different_times(rank: int, folder: Path) -> int:
    """A snapshot is written between the restore of rank 0 and that of the others."""
    ema = make("PostHocEMA", nn.Linear(2, 2, bias=False), folder)
    layout = layout_of([record("weight", (2, 2))])
    run = "20260101T000000.000000-00000001"
    if rank == 0:
        for number in (2, 4):
            write_snapshot(folder, layout, number, [torch.zeros(4).numpy()] * 2, run=run)
    dist.barrier()
    restored = ema.restore() if rank == 0 else None
    if rank == 0:
        write_snapshot(folder, layout, 6, [torch.zeros(4).numpy()] * 2, run=run)
    dist.barrier()
    restored = ema.restore() if restored is None else restored
    ema.close()
    return restored


def in_a_group(rank: int, name: str, folder: Path, members: list[int]) -> str | None:
    group = dist.new_group(members)  # called by all ranks
    if rank not in members:
        try:
            make(name, net(), folder, process_group=group)
        except (NitrousError, TypeError) as error:
            return type(error).__name__
        return None
    ema = make(name, net(), folder, process_group=group)
    for _ in range(2):
        ema.update()
    ema.close()
    return f"{ema.run} {ema.stats().snapshots}"


@contextmanager
def started_by_torchrun(start: str) -> Iterator[None]:
    """Be a process that torchrun has started again: with the same store and no memory."""
    numbers = dict(ranks_module._numbers)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = start
    try:
        ranks_module._numbers.clear()
        yield
    finally:
        ranks_module._numbers.update(numbers)
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


def start_again(rank: int, folder: Path, start: str) -> str:
    with started_by_torchrun(start):
        ema = make("PostHocEMA", net(), folder)
    dist.barrier()
    for _ in range(2):
        ema.update()
    run = ema.run
    ema.close()
    dist.barrier()
    return run


def start_again_with_old_keys(rank: int, folder: Path) -> str:
    if rank == 0:
        try:
            with started_by_torchrun("1"):
                make("PostHocEMA", net(), folder)
        except NitrousError as error:
            return str(error)
    return ""


def collectives(rank: int, name: str, folder: Path) -> tuple[int, int]:
    """Return how many collectives an EMA issued, on any thread, and how many a barrier is."""
    dist.barrier()
    group = dist.group.WORLD
    before = group._get_sequence_number_for_group()
    model = net()
    ema = make(name, model, folder)
    for number in range(1, 6):
        step(model, number, 0)
        ema.update()
    ema.checkpoint()
    ema.fence()
    ema.stats()
    state = ema.state_dict()
    with ema.average_parameters(0):
        pass
    ema.flush()
    ema.load_state_dict(state)
    ema.close()
    middle = group._get_sequence_number_for_group()
    dist.barrier()
    return middle - before, group._get_sequence_number_for_group() - middle
