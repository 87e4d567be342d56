from __future__ import annotations

import pytest

from nitrous_ema.synthesis.worker.partition import WHOLE, WorkPartition, parse_part, part_of_process

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("text", "part"), [("1/1", WHOLE), ("2/4", WorkPartition(1, 4, 1)), ("4/4", WorkPartition(3, 4, 1))]
)
def test_parts_are_counted_from_1_as_files_are(text, part):
    assert parse_part(text) == part


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "a/b", "-1/4", "1/0"])
def test_text_that_is_not_a_part_is_refused(text):
    with pytest.raises(ValueError, match="is not a part"):
        parse_part(text)


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, WHOLE),
        ({"RANK": "3", "WORLD_SIZE": "4"}, WHOLE),  # of a container, for example; torchrun sets its id as well
        ({**TORCHRUN, "RANK": "3"}, WHOLE),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, WHOLE),
        ({**TORCHRUN, "RANK": "3", "WORLD_SIZE": "4"}, WorkPartition(3, 4, 1)),
        ({**TORCHRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, WorkPartition(3, 4, 2)),
    ],
)
def test_process_of_torchrun_knows_its_part(environment, part):
    assert part_of_process(environment) == part


@pytest.mark.parametrize(("rank", "world_size", "local"), [("4", "4", "1"), ("x", "4", "1"), ("0", "4", "0")])
def test_invalid_environment_is_refused_with_the_remedy(rank, world_size, local):
    with pytest.raises(ValueError, match="--part 1/1"):
        part_of_process({**TORCHRUN, "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": local})
