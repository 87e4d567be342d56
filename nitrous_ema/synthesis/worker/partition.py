"""Which part of the work is this process's, where several share it.

They need not talk to each other: what is whose follows from the plan and their number. torchrun tells every process its
number by the environment; ``--part`` does where something else starts them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkPartition:
    """One process among some."""

    index: int
    """Counted from 0."""
    parts: int
    """How many there are."""
    on_this_machine: int
    """How many of them share this machine's cores."""


WHOLE = WorkPartition(0, 1, 1)


def parse_part(text: str) -> WorkPartition:
    """Read ``2/4``: the second of four, as in the names of files.

    Raises:
        ValueError: Not such a part.
    """
    found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"{text!r} is no part; expected one such as 2/4, from 1/4 to 4/4")
    return WorkPartition(int(found[1]) - 1, int(found[2]), 1)


def part_of_process(environment: Mapping[str, str]) -> WorkPartition:
    """What torchrun says; the whole work where it says nothing.

    Raises:
        ValueError: Its variables have no meaning.

    Source:
        torch.distributed.run, "Environment Variables".
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return WHOLE
    words = [environment[name] for name in ("RANK", "WORLD_SIZE")] + [environment.get("LOCAL_WORLD_SIZE", "1")]
    if not all(re.fullmatch("[0-9]{1,5}", word) for word in words):
        raise _meaningless(words)
    rank, world_size, local = map(int, words)
    if not (rank < world_size and local >= 1):
        raise _meaningless(words)
    return WorkPartition(rank, world_size, local) if world_size > 1 else WHOLE


def _meaningless(words: list[str]) -> ValueError:
    return ValueError(
        "RANK={}, WORLD_SIZE={}, LOCAL_WORLD_SIZE={} in the environment: expected the numbers that torchrun sets. "
        "Unset them, or say --part 1/1 to write whole files.".format(*words)
    )
