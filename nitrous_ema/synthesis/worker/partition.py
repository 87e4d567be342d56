"""Which part of every output this process writes, where several processes share the work.

The processes do not communicate: the parts follow from the plan and the number of processes. torchrun passes each
process its rank in the environment; other launchers pass ``--part``. ``RANK`` and ``WORLD_SIZE`` alone do not count:
clusters set them in every container of a job, also where one process is to write whole files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkPartition:
    """The part of one process among several."""

    index: int
    """Which part, counted from 0."""
    parts: int
    """Number of parts, and of processes."""
    on_this_machine: int
    """Number of processes that share this machine's cores."""


WHOLE = WorkPartition(0, 1, 1)
"""The partition of a process that works alone: it writes whole files."""


def parse_part(text: str) -> WorkPartition:
    """Parse ``2/4``: the second of four parts, counted from 1 as in the names of the files.

    Raises:
        ValueError: The text does not name such a part.
    """
    found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"{text!r} is not a part; expected for example 2/4, from 1/4 to 4/4")
    return WorkPartition(int(found[1]) - 1, int(found[2]), 1)


def part_of_process(environment: Mapping[str, str]) -> WorkPartition:
    """Return the part that torchrun's environment variables assign to this process; ``WHOLE`` without torchrun.

    Args:
        environment: Environment variables. ``TORCHELASTIC_RUN_ID``, which torchrun alone sets, makes ``RANK``,
            ``WORLD_SIZE`` and ``LOCAL_WORLD_SIZE`` count.

    Raises:
        ValueError: The variables are not numbers that torchrun sets.

    Source:
        torch.distributed.run, "Environment Variables".
    """
    if not {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= set(environment):
        return WHOLE
    words = [environment[name] for name in ("RANK", "WORLD_SIZE")] + [environment.get("LOCAL_WORLD_SIZE", "1")]
    if not all(re.fullmatch("[0-9]{1,5}", word) for word in words):
        raise _invalid_environment(words)
    rank, world_size, local_world_size = map(int, words)
    if not (rank < world_size and local_world_size >= 1):
        raise _invalid_environment(words)
    return WorkPartition(rank, world_size, local_world_size) if world_size > 1 else WHOLE


def _invalid_environment(words: list[str]) -> ValueError:
    return ValueError(
        "RANK={}, WORLD_SIZE={}, LOCAL_WORLD_SIZE={} in the environment are not numbers as torchrun sets them. "
        "Unset these variables, or pass --part 1/1 to write whole files.".format(*words)
    )
