"""Every line of the library that keeps work on an accelerator in order, to be left out one at a time.

`tests/test_on_laggy.py` shows that each is noticed by some schedule, `campaign.py` on how many.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from tests.support.laggy.cases import HALF, HELD, MANUAL, ONCE

LANES, STAGING, WRITER = (f"nitrous_ema.async_.{name}" for name in ("lanes", "staging", "background_writer"))
DEFERRED, OFFLOAD, DISPATCH, READBACK, COPIES, GUARD = (
    f"nitrous_ema.averaging.execution.{name}"
    for name in ("deferred_updates", "offload", "dispatch", "device_to_host", "caller_copies", "write_guard")
)
ENGINE = "nitrous_ema.averaging.engine"
REUSED = {**MANUAL, "writes": "optimizer between copies"}
"""Scratch is written at every step, and averaged from just before."""


@dataclass(frozen=True)
class Line:
    """A guarded line, and a scenario that needs it."""

    guards: str
    """The invariant, as the module's docstring numbers it."""
    module: str
    function: str
    edits: tuple[tuple[str, str], ...]
    """What is replaced by what; each found exactly once."""
    case: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``loops.train``."""
    is_rare: bool = False
    """Hardly any schedule shows it; a test of the module by itself does."""


LINES: dict[str, Line] = {
    "update does not wait for the trainer": Line(
        "L1", LANES, "AcceleratorLane.enqueue_write", (("self._update_stream.wait_event(self._ready)", "pass"),)
    ),
    "update overwrites what is being read": Line(
        "L5",
        LANES,
        "AcceleratorLane.enqueue_write",
        (("self._update_stream.wait_event(self._ready)", "pass"),),
        {"then": "ema_model"},
    ),
    "optimizer does not wait": Line(
        "L2", LANES, "AcceleratorLane.order_writer", (("caller.wait_event(self._read)", "pass"),)
    ),
    "parameters said to be read before they are": Line(
        "L2",
        LANES,
        "AcceleratorLane.enqueue_write",
        (
            (
                "            with _entered",
                "            self._read.record(self._update_stream)\n            with _entered",
            ),
            (
                "            if reads_parameters:\n                self._read.record(self._update_stream)",
                "            if reads_parameters:\n                pass",
            ),
        ),
    ),
    "optimizer waits for averaging from scratch": Line(
        "L2",
        LANES,
        "AcceleratorLane.enqueue_write",
        (("if reads_parameters:", "if True:"),),
        {**HELD, **MANUAL, "then": "checkpoint", "max_pending": 6},
    ),
    "snapshot copied before the update": Line(
        "L3", LANES, "AcceleratorLane.enqueue_read", (("self._copy_stream.wait_event(self._done)", "pass"),)
    ),
    "snapshot copied before the averages were loaded": Line(
        "L3",
        LANES,
        "AcceleratorLane.enqueue_read",
        (("self._copy_stream.wait_event(self._ready)", "pass"),),
        {**MANUAL, "then": "load other values"},
    ),
    "averages read before the update": Line(
        "L5",
        LANES,
        "AcceleratorLane.order_reader",
        (("_current_stream(self._device).wait_event(self._done)", "pass"),),
        {"then": "ema_model"},
    ),
    "kept parameters averaged before they are kept": Line(
        "L6",
        LANES,
        "AcceleratorLane.stash",
        (("self._update_stream.wait_event(self._kept)", "pass"),),
        {**MANUAL, "writes": "two streams between copies"},
    ),
    "parameters written while another stream keeps them": Line(
        "L6",
        LANES,
        "AcceleratorLane.order_writer",
        (("caller.wait_event(self._kept)", "pass"),),
        {**HELD, "writes": "two streams"},
    ),
    "averages written while they are copied": Line(
        "L4",
        WRITER,
        "BackgroundSnapshotSink.copies_in_flight",
        (('return None if device.type == "cpu" else', "return None if True else"),),
    ),
    "another memory order than the file's forgotten": Line(
        "L4",
        DISPATCH,
        "_is_permuted",
        (("return not tensor.is_row_major", "return False"),),
        {"kind": "transposed", "checkpoint_every_num_steps": 1},
    ),
    "batch averaged before its copies are over": Line(
        "N1",
        DEFERRED,
        "DeferredUpdates._average_what_is_free",
        (("key in blocked or not _are_over(copies, late.placed.spans[batch])", "key in blocked"),),
    ),
    "updates of a batch change places": Line(
        "N2",
        DEFERRED,
        "DeferredUpdates._average_what_is_free",
        (("for late in self._late:", "for late in self._late[::-1]:"),),
        {**HELD, **ONCE},
    ),
    "update overtakes another whose copies end in between": Line(
        "N2",
        DEFERRED,
        "DeferredUpdates._average_what_is_free",
        (("key in blocked or not", "not"),),
        {**HELD, **ONCE},
        is_rare=True,
    ),
    "parameters not kept before they are written": Line(
        "N3", DISPATCH, "UpdateDispatcher.order_writers", (("follower.stash_live()", "pass"),)
    ),
    "optimizer waits behind a forced wait": Line(
        "N4",
        DEFERRED,
        "DeferredUpdates._average_what_is_free",
        (("if self._forced is not None and not self._forced.is_reached():", "if False:"),),
        HALF,
    ),
    "forced wait without an end": Line("N4", DEFERRED, "_run_after_copies", (("    done.record()", "    pass"),), HALF),
    "averages asked for while updates are late": Line(
        "N4",
        DEFERRED,
        "DeferredUpdates.flush",
        (("self._force(self._copies())", "pass"),),
        {**HELD, "then": "state_dict"},
    ),
    "snapshot taken while updates are late": Line(
        "N4",
        ENGINE,
        "AveragingEngine._checkpoint",
        (('self._attempt(self._dispatch.flush_deferred, "checkpoint()")', "pass"),),
        HELD,
    ),
    "scratch written while it is read": Line(
        "N5", DEFERRED, "StashPool.take", (("if block.read.is_reached()", "if True"),), REUSED
    ),
    "scratch not marked as read": Line(
        "N5", DEFERRED, "_run_stashed", (("        block.read.record()\n", ""),), REUSED
    ),
    "nothing done where scratch is used up": Line(
        "N6", DEFERRED, "DeferredUpdates.stash_live", (("self._force(copies)", "pass"),), {**HELD, "scratch": 0}
    ),
    "forced averaging does not wait for the copies": Line(
        "P5", STAGING, "StagingCopies.wait_on_device", (("mark.wait_on_device()", "pass"),), {"scratch": 0}
    ),
    "copies said to be over when they are queued": Line(
        "P5", STAGING, "StagingCopies.are_over", (("self._marks[last - 1].is_reached()", "True"),)
    ),
    "pages read before they are copied": Line("P2", WRITER, "_pages", (("copies.wait(index)", "pass"),)),
    "scratch of a cast written while it is copied": Line(
        "C3",
        READBACK,
        "ChunkCopier._copy_run",
        (
            (
                "            _gather(run, scratch)\n",
                "            from tests.support.laggy.without import elsewhere\n"
                "            elsewhere(lambda: _gather(run, scratch))\n",
            ),
        ),
        {"checkpoint_dtype": "bfloat16"},
    ),
    "replaced storage not held": Line(
        "D1",
        DISPATCH,
        "UpdateDispatcher.queue",
        (("name: tensor.detach() for", "name: tensor for"),),
        {"writes": "replaced storages", "kind": "transposed"},
    ),
    "replaced storage given back before it was read": Line(
        "D1",
        DISPATCH,
        "UpdateDispatcher.queue",
        (("self.order_writers()  # D1", "pass"),),
        {"writes": "replaced storages"},
    ),
    "caller's copies written while they are read": Line(
        "A3",
        COPIES,
        "CallerSideCopies.take",
        (("            order_writers()  #", "            pass  #"),),
        {"read": "copied", "writes": "unfenced"},
    ),
    "optimizer is not ordered": Line("G1", GUARD, "WriteGuard.fence", (("self._order_writer()", "pass"),)),
    "first writer is not ordered": Line(
        "G3", GUARD, "WriteGuard.after_update", (("self._order_writer()", "pass"),), {"writes": "unseen once"}
    ),
    "host averages before the copy has come": Line(
        "O1", OFFLOAD, "_average", (("mark.wait()", "pass"),), {"offload": "host"}
    ),
    "set given back before it was averaged": Line(
        "O2",
        OFFLOAD,
        "_average",
        (("    give_back()\n", "    pass\n"), ("    for kept, mark in", "    give_back()\n    for kept, mark in")),
        {"offload": "host"},
    ),
    "optimizer does not wait for the copies out": Line(
        "O3",
        OFFLOAD,
        "Offload.advance",
        (("sources, held), abandon=give_back)", "sources, held), abandon=give_back, reads_parameters=False)"),),
        {"offload": "host"},
    ),
    "trainer goes on before copied parameters are out": Line(
        "O3",
        DISPATCH,
        "UpdateDispatcher.queue",
        (("            self.order_writers()  # what was not", "            pass  # what was not"),),
        {"offload": "host", "read": "copied", "writes": "unfenced"},
    ),
}


def of(name: str) -> tuple[Any, str, Callable[..., Any], str]:
    """Where a line is: its function's owner and name, the function, and its source without the line.

    Raises:
        ValueError: The line is not there, or twice: the table is out of date.
    """
    line = LINES[name]
    owner: Any = importlib.import_module(line.module)
    *path, attribute = line.function.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = inspect.unwrap(getattr(owner, attribute))
    source = inspect.getsource(function)
    for old, new in line.edits:
        if source.count(old) != 1:
            raise ValueError(f"{line.module}:{line.function} has {old!r} {source.count(old)} times")
        source = source.replace(old, new)
    return owner, attribute, function, textwrap.dedent(source)


@contextmanager
def without(name: str | None) -> Iterator[None]:
    """Leaves one line out; None: none."""
    if name is None:
        yield
        return
    owner, attribute, function, source = of(name)
    made: dict[str, Any] = {}
    exec(
        compile(f"from __future__ import annotations\n{source}", f"<without {name}>", "exec"),
        function.__globals__,
        made,
    )
    with mock.patch.object(owner, attribute, made[attribute]):
        yield


def elsewhere(work: Callable[[], None]) -> None:
    """On another stream, which does not wait for what was queued here before."""
    before = torch.accelerator.current_stream()
    after = torch.Stream(device=before.device)
    torch.accelerator.set_stream(after)
    work()
    torch.accelerator.set_stream(before)
    before.wait_stream(after)
