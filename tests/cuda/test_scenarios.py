"""The scenarios of the laggy device on a real device: the same bits in the background as inline, with any late party.

Not run on a device yet. What may fail on a first run though the library is right: a line that is left out is noticed
only where stale memory has other bytes. A slot's pinned pages are filled between two snapshots, but memory of torch's
pinned allocator that another test has freed may hold the right bytes by chance.

The reference is ``PostHocEMA`` on the same device, whose kernels may round differently from the CPU's. Each late party
opens one or more of the races wide, with a kernel that does nothing for a while:

hazard                                        late party             scenario
1  parameters are read after they were        caller                 all
   written
2  the optimizer writes after that read       updates, streams       all
3  averages are written after the copy that   copies, chunks         all, long_copy
   reads them
4  pages are read after they were copied      copies, chunks         all, long_copy
5  a slot is filled again after its file is   disk                   slow_disk
   written
6  copies of buffers and parameters are       updates                "copied", "batch norm"
   written after the last ones were read
7  averages are read after they were          updates, readers       "ema_model", "average_parameters", "state_dict"
   written, and written after that read

``test_race_is_lost_without_its_line`` shows that the races are open.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from nitrous_ema.averaging.kernels.foreach_step import ForeachStep
from tests.support.laggy import loops
from tests.support.laggy.cases import IN_DEPTH, SCENARIOS
from tests.support.laggy.loops import train
from tests.support.laggy.without import LINES, without
from tests.support.late import WHO, late
from tests.support.scenarios import replay, same_stream_after
from tests.support.slow_snapshots import long_copy, slow_disk

pytestmark = pytest.mark.cuda

ON_CUDA = [
    name
    for name, case in SCENARIOS.items()
    # Scenarios that hold copies, and scenarios that average with the host's kernels, have no reference here.
    if case.get("then") != "skipped checkpoint" and "offload" not in case
]


def in_small_batches() -> AbstractContextManager[Any]:
    """Average by foreach, whose batches ``small_pieces`` makes small; a fused batch is never smaller than a block."""
    return mock.patch("nitrous_ema.averaging.execution.dispatch.step_for", ForeachStep)


def run(scenario: Callable[..., dict[str, Any]], **case: Any) -> dict[str, Any]:
    """Run a scenario on the device, without warnings: some scenarios write weights unseen on purpose."""
    with same_stream_after("cuda"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scenario("cuda", **case)


def different(scenario: Callable[..., dict[str, Any]], **case: Any) -> list[str]:
    """Return the names of results that differ between the background and inline."""
    return compare(run(scenario, background=True, **case), run(scenario, background=False, **case))


def compare(obtained: dict[str, Any], right: dict[str, Any]) -> list[str]:
    assert obtained.keys() == right.keys()
    return [key for key in right if not same(obtained[key], right[key])]


def same(obtained: Any, right: Any) -> bool:
    if isinstance(right, torch.Tensor):
        return obtained.dtype == right.dtype and torch.equal(obtained, right)
    return bool(obtained == right)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", ON_CUDA)
def test_results_are_the_same_with_any_late_party(name, who):
    case = {"max_pending": 4, **SCENARIOS[name]}
    if case.get("two_devices") and torch.cuda.device_count() < 2:
        pytest.skip("this machine has one device")
    with late(who):
        assert different(train, **case) == []


@pytest.mark.parametrize("options", [{"capturable": True}, {"capturable": True, "foreach": True}, {"fused": True}])
def test_adamw_of_every_kind_waits_until_its_weights_were_read(options):
    def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.1, **options)

    with mock.patch.object(loops, "make_optimizer", adamw), late("updates"):
        assert different(train, max_pending=4) == []


@pytest.mark.parametrize("who", WHO)
def test_replayed_steps_are_averaged(who):
    assert different(replay, who=who) == []


@pytest.mark.parametrize("who", WHO)
def test_long_copies_give_the_same_bits(who):
    assert different(long_copy, who=who) == []


def test_training_ends_while_a_readback_sleeps():
    assert different(long_copy, who="copies, for long", outlives=True) == []


def test_slot_is_not_filled_again_before_its_file_is_written():
    assert different(slow_disk) == []


OPENED_BY = {
    "update does not wait for the trainer": "caller",
    "optimizer does not wait": "updates",
    "parameters count as read before they are": "streams",
    "averages written while they are copied": "copies",
    "another memory order than the file's is ignored": "chunks",
    "pages read before they are copied": "copies",
    "snapshot copied before the update": "updates",
    "caller's copies written while they are read": "updates",
    "averages read before the update": "updates",
    "update overwrites what is being read": "readers",
}


NEEDS_BATCHES = {"another memory order than the file's is ignored"}
"""A toy model is one batch of the fused step, which waits for all readbacks of a snapshot in any case."""


@pytest.mark.parametrize("line", OPENED_BY)
def test_race_is_lost_without_its_line(line):
    case = {"max_pending": 4, **LINES[line].case}
    with in_small_batches() if line in NEEDS_BATCHES else nullcontext():
        right = run(train, background=False, **case)
        with without(line), late(OPENED_BY[line]):
            assert compare(run(train, background=True, **case), right)


@pytest.mark.parametrize("who", ["copies", "chunks"])
@pytest.mark.parametrize("name", [name for name in ON_CUDA if name in IN_DEPTH])
def test_results_are_the_same_batch_by_batch(name, who):
    case = {"max_pending": 4, **SCENARIOS[name]}
    if case.get("two_devices") and torch.cuda.device_count() < 2:
        pytest.skip("this machine has one device")
    with in_small_batches(), late(who):
        assert different(train, **case) == []
