"""The ranks of ``torch.distributed`` that hold one model: which of them writes snapshots, and under which run.

Every rank averages its own copy of the model, and the first rank of the group writes. So no rank needs another one:
nothing here is a collective, and no call waits for another rank. What must be equal on all ranks (the id of the run,
the snapshot that ``restore()`` reads) is decided by the first rank that asks for it, through the store that
``init_process_group`` made: one ``compare_set``, in the caller's thread.

RANKS-1  A rank that is alone in constructing an EMA waits for    test_first_rank_alone_writes_and_waits_for_nobody
    no other one.
RANKS-2  All ranks have the same run, also after a state was      test_ranks_that_load_a_state_agree_on_the_new_run
    loaded.
RANKS-3  Averages that no rank writes are an error at the second  test_averages_that_no_rank_writes_are_an_error
    snapshot: by then the rank that writes has an EMA as well.
RANKS-4  Keys of an earlier start of the job are never read.      test_keys_of_an_earlier_start_are_not_read
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from nitrous_ema.averaging.model.tracking import wrappers
from nitrous_ema.errors import NitrousError, UntrackableModelError, warn

_log = logging.getLogger(__name__)

_COMPARED_TENSORS, _COMPARED_VALUES = 64, 4
_numbers: dict[str, int] = {}  # EMAs of this process by the beginning of their keys


@dataclass(eq=False)
class Ranks:
    """The ranks that hold one model, as seen by one of them. Without ``torch.distributed`` this process is alone."""

    rank: int = 0
    """Global rank of this process."""
    members: tuple[int, ...] = (0,)
    """Global ranks that hold the model; the first one writes."""
    folder: Path = Path()
    """The snapshot folder."""
    is_late: bool = False
    """Whether torch.distributed was not initialized when the EMA was constructed, although it may be later."""
    _store: Any = None
    _key: str = ""
    _questions: dict[str, int] = field(default_factory=dict)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the snapshots."""
        return self.rank == self.members[0]

    def first(self, topic: str, value: str) -> str:
        """Return the value of the first rank that asked this question, which may be this rank's own.

        Args:
            topic: What is decided. The n-th question of a rank about a topic is the same as the n-th of the others.
            value: The answer if this rank is the first.
        """
        if self._store is None:
            return value
        number = self._questions[topic] = self._questions.get(topic, 0) + 1
        answer: bytes = self._store.compare_set(f"{self._key}/{topic}/{number}", "", value)
        return answer.decode()

    def announce_writer(self) -> None:
        """Record in the store that this rank, which writes, has an EMA."""
        if self._store is not None:
            self._store.set(f"{self._key}/writer", "1")

    def check_writer(self) -> None:
        """Raise an error if the rank that is to write the snapshots has no EMA for them.

        Raises:
            NitrousError: It has not constructed one.
        """
        if self._store is not None and not self._store.check([f"{self._key}/writer"]):
            raise NitrousError(
                f"Rank {self.rank} has averages for {self.folder}, but rank {self.members[0]}, which is to write them, "
                "has constructed no EMA for this folder. Nothing was written. Construct the EMA on every rank or on "
                f"rank {self.members[0]} alone; or, where each rank has a model and a folder of its own, pass "
                "process_group='self'."
            )

    def check_initialized(self) -> None:
        """Raise an error if torch.distributed was initialized after the EMA was constructed.

        Raises:
            NitrousError: It was, and there are several processes.
        """
        if self.is_late and _world_size() > 1:
            raise NitrousError(
                "torch.distributed was initialized after the EMA was constructed, so every process would write "
                "snapshots of its own. Construct the EMA after init_process_group(); or pass process_group='self' if "
                "each process trains a model of its own."
            )

    def compare_weights(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Compare a few values of a few parameters with those of the first rank that gets here; warn of a difference.

        Costs one copy of some hundred numbers to the host. Call it once, after the first optimizer step.

        Args:
            parameters: Names and tensors of averaged parameters, equally on all ranks.
        """
        if self._store is None:
            return
        mine = {name: _sample(tensor) for name, tensor in _evenly(parameters, _COMPARED_TENSORS)}
        other, theirs = json.loads(self.first("weights", json.dumps([self.rank, mine])))
        different = [name for name, values in mine.items() if theirs.get(name) != values]
        if different:
            warn(
                f"Rank {self.rank} and rank {other} train different weights: {different[0]!r}"
                f"{f' and {len(different) - 1} more' if len(different) > 1 else ''}. Snapshots have the averages of "
                f"rank {self.members[0]} alone. If each rank holds a part of the model, averages of whole tensors "
                "cannot be made from it; if each rank trains a model of its own, pass process_group='self' and a "
                "folder each."
            )


ALONE = Ranks()


def find_ranks(model: Module, process_group: Any, folder: Path) -> Ranks:
    """Return the ranks that hold a model.

    Args:
        model: The model, wrapped or not.
        process_group: The group of ranks that hold it; ``"self"`` for this rank alone; None for the group of a
            ``DistributedDataParallel`` around the model, else all ranks.
        folder: The snapshot folder.

    Raises:
        TypeError: ``process_group`` is anything else.
        NitrousError: This rank is not in the group.
        UntrackableModelError: A parameter is marked as a shard of a tensor, as Megatron's are.
    """
    if isinstance(process_group, str) and process_group == "self":
        return Ranks()
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(f"process_group is {process_group!r}; expected a process group, 'self', or None.")
    if _world_size() == 1:
        return Ranks(is_late=not (dist.is_available() and dist.is_initialized()))
    if process_group is None:
        ddp = [each for each in wrappers(model) if isinstance(each, DistributedDataParallel)]
        process_group = ddp[0].process_group if ddp else dist.group.WORLD
    rank, members = dist.get_rank(), tuple(dist.get_process_group_ranks(process_group))
    if rank not in members:
        raise NitrousError(
            f"process_group has the ranks {list(members)}, but this is rank {rank}. Pass a group that this rank is in."
        )
    if len(members) == 1:
        return Ranks(rank, members, folder)
    _refuse_shards(model)
    return Ranks(rank, members, folder, _store=_default_store(), _key=_new_key(members, folder))


def join(ranks: Ranks, run: str, settings: Mapping[str, Any]) -> str:
    """Return the id of the run that all ranks write under.

    Args:
        ranks: The ranks.
        run: The id if this rank is the first.
        settings: What must be equal on all ranks, in values that JSON can hold.

    Raises:
        NitrousError: Another rank has other settings.
    """
    mine = json.dumps([ranks.rank, run, settings])
    other, agreed, theirs = json.loads(ranks.first("run", mine))
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise NitrousError(
                f"Rank {ranks.rank} and rank {other} have constructed different EMAs for {ranks.folder}: {name} "
                "differs. Ranks that hold one model need the same tensors and arguments. Parts of a model on different "
                "ranks (as in pipeline parallelism) need a checkpoint_folder and a process_group each."
            )
    if ranks.is_writer:
        ranks.announce_writer()
    else:
        _log.info("rank %d averages; rank %d writes the snapshots", ranks.rank, ranks.members[0])
    return str(agreed)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _default_store() -> Any:
    # Private, and the same in torch 2.6 to 2.13: only collectives are public, and these wait for all ranks.
    return dist.distributed_c10d._get_default_store()


def _new_key(members: Sequence[int], folder: Path) -> str:
    """Return the beginning of the keys of one EMA in the store, equal on all ranks."""
    # Keys outlive a restart by torchrun, which keeps the store: its count is part of them (RANKS-4).
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    what = hashlib.sha256(f"{list(members)} {folder.absolute()}".encode(errors="surrogateescape")).hexdigest()[:16]
    beginning = f"nitrous_ema/{start}/{what}"
    _numbers[beginning] = _numbers.get(beginning, 0) + 1
    return f"{beginning}/{_numbers[beginning]}"


def _refuse_shards(model: Module) -> None:
    for name, parameter in model.named_parameters():
        # Megatron's marks: a part of a tensor, and a parameter that differs between ranks (an expert).
        if getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "allreduce", True) is False:
            raise UntrackableModelError(
                f"{name!r} is one rank's part of a tensor (tensor_model_parallel, or allreduce=False), and its rank "
                "does not know the whole. Give each rank an EMA of its own with process_group='self' and a "
                "checkpoint_folder of its own.",
                name=name,
            )


def _evenly(items: Sequence[tuple[str, Tensor]], most: int) -> Iterator[tuple[str, Tensor]]:
    count = min(len(items), most)
    for place in range(count):
        yield items[place * (len(items) - 1) // max(1, count - 1)]


def _sample(tensor: Tensor) -> str:
    """Return a few values of a tensor, the first and the last among them, as text that is equal for equal bits."""
    if not tensor.numel():
        return ""
    places = torch.linspace(0, tensor.numel() - 1, min(tensor.numel(), _COMPARED_VALUES)).long()
    # By coordinates: a flat view of a tensor that is not contiguous would be a copy.
    values = tensor.detach()[torch.unravel_index(places, tensor.shape)]
    return values.to("cpu", torch.float64).numpy().tobytes().hex()
