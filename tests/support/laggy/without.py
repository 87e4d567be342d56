"""Every line of the library that orders work on an accelerator, to be left out one at a time.

`tests/ordering/test_on_laggy.py` shows that some schedule detects each missing line; `campaign.py` counts how many do.
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

from tests.support.laggy.cases import HALF, HELD, MANUAL, ONCE, SKIPPED

LANES, STAGING, WRITER = (f"nitrous_ema.async_.{name}" for name in ("lanes", "staging", "background_writer"))
DEFERRED, OFFLOAD, DISPATCH, READBACK, COPIES, GUARD = (
    f"nitrous_ema.averaging.execution.{name}"
    for name in ("deferred_updates", "offload", "dispatch", "device_to_host", "caller_copies", "write_guard")
)
ENGINE = "nitrous_ema.averaging.engine"
OVERRIDES = "nitrous_ema.averaging.module_overrides"
REUSED = {**MANUAL, "writes": "optimizer between copies"}
"""The stash is written at every step, and averaged from just before."""


@dataclass(frozen=True)
class Line:
    """A line that orders work, and a scenario that needs it."""

    guards: str
    """The invariant, as the module's docstring numbers it."""
    module: str
    function: str
    edits: tuple[tuple[str, str], ...]
    """Replacements (old, new) in the function's source; each old text must occur exactly once."""
    case: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``loops.train``."""
    is_rare: bool = False
    """Hardly any schedule shows that it is missing; a test of the module by itself does."""


LINES: dict[str, Line] = {
    "update does not wait for the trainer": Line(
        "LANE-1", LANES, "AcceleratorLane.enqueue_write", (("self._update_stream.wait_event(self._ready)", "pass"),)
    ),
    "update overwrites what is being read": Line(
        "LANE-5",
        LANES,
        "AcceleratorLane.enqueue_write",
        (("self._update_stream.wait_event(self._ready)", "pass"),),
        {"then": "ema_model"},
    ),
    "optimizer does not wait": Line(
        "LANE-2", LANES, "AcceleratorLane.order_writer", (("caller.wait_event(self._read)", "pass"),)
    ),
    "parameters count as read before they are": Line(
        "LANE-2",
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
    "optimizer waits for averaging from the stash": Line(
        "LANE-2",
        LANES,
        "AcceleratorLane.enqueue_write",
        (("if reads_parameters:", "if True:"),),
        {**HELD, **MANUAL, "then": "checkpoint", "max_pending": 6},
    ),
    "deferred update does not wait for the trainer": Line(
        "LANE-1",
        LANES,
        "AcceleratorLane.order_deferred",
        (("self._update_stream.wait_event(self._deferred)", "pass"),),
        {"hold": [[1, 3], []], "then": "late state_dict elsewhere"},
    ),
    "parameters stashed before they are written": Line(
        "LANE-1",
        LANES,
        "AcceleratorLane.stash",
        (("caller.wait_event(self._deferred)", "pass"),),
        {**HELD, **MANUAL, "then": "checkpoint elsewhere", "max_pending": 6},
    ),
    "averages overwritten while another stream reads them": Line(
        "LANE-5",
        LANES,
        "AcceleratorLane.enqueue_write",
        (("*self._readers", ""),),
        {"then": "state_dict elsewhere"},
    ),
    "snapshot copied before the update": Line(
        "LANE-3", LANES, "AcceleratorLane.enqueue_read", (("self._copy_stream.wait_event(self._done)", "pass"),)
    ),
    "snapshot copied before the averages were loaded": Line(
        "LANE-3",
        LANES,
        "AcceleratorLane.enqueue_read",
        (("self._copy_stream.wait_event(self._ready)", "pass"),),
        {**MANUAL, "then": "load other values"},
    ),
    "averages read before the update": Line(
        "LANE-5",
        LANES,
        "AcceleratorLane.order_reader",
        (("caller.wait_event(self._done)", "pass"),),
        {"then": "ema_model"},
    ),
    "forward of a held module before the update": Line(
        "LANE-5",
        OVERRIDES,
        "ModuleOverrides._before_forward",
        (("owner.prepare_forward(module)", "pass"),),
        {"then": "cast ema_model"},
    ),
    "compiled forward before the update": Line(
        "LANE-5",
        OVERRIDES,
        "ModuleOverrides.prepare_compiled",
        (("owner.prepare_forward(self._module)", "pass"),),
        {"then": "compiled ema_model"},
    ),
    "stashed parameters averaged before they are stashed": Line(
        "LANE-6",
        LANES,
        "AcceleratorLane.stash",
        (("self._update_stream.wait_event(self._stashed)", "pass"),),
        {**MANUAL, "writes": "two streams between copies"},
    ),
    "parameters written while another stream stashes them": Line(
        "LANE-6",
        LANES,
        "AcceleratorLane.order_writer",
        (("caller.wait_event(self._stashed)", "pass"),),
        {**HELD, "writes": "two streams"},
    ),
    "averages written while they are copied": Line(
        "LANE-4",
        WRITER,
        "BackgroundSnapshotSink.readbacks_in_flight",
        (('return None if device.type == "cpu" else', "return None if True else"),),
    ),
    "another memory order than the file's is ignored": Line(
        "LANE-4",
        DISPATCH,
        "_is_permuted",
        (("return not tensor.is_row_major", "return False"),),
        {"kind": "transposed", "checkpoint_every_num_steps": 1},
    ),
    "batch averaged before its readbacks have finished": Line(
        "DEFER-1",
        DEFERRED,
        "DeferredUpdates._enqueue_unblocked",
        (("key in blocked or not _have_finished(readbacks, deferred.placed.spans[batch])", "key in blocked"),),
    ),
    "updates of a batch run in the wrong order": Line(
        "DEFER-2",
        DEFERRED,
        "DeferredUpdates._enqueue_unblocked",
        (("for deferred in self._deferred:", "for deferred in self._deferred[::-1]:"),),
        {**HELD, **ONCE},
    ),
    "update overtakes another whose readbacks finish in between": Line(
        "DEFER-2",
        DEFERRED,
        "DeferredUpdates._enqueue_unblocked",
        (("key in blocked or not", "not"),),
        {**HELD, **ONCE},
        is_rare=True,
    ),
    "parameters not stashed before they are written": Line(
        "DEFER-3", DISPATCH, "UpdateDispatcher.order_writers", (("deferred.stash_live()", "pass"),)
    ),
    "optimizer waits behind a forced wait": Line(
        "DEFER-4",
        DEFERRED,
        "DeferredUpdates._enqueue_unblocked",
        (("if self._is_forced():", "if False:"),),
        HALF,
    ),
    "forced wait without an end": Line(
        "DEFER-4",
        DEFERRED,
        "DeferredUpdates._average_after_readbacks",
        (("        done.record()", "        pass"),),
        HALF,
    ),
    "averages read while updates are deferred": Line(
        "DEFER-4",
        DEFERRED,
        "DeferredUpdates.flush",
        (("self._force(self._readbacks_in_flight())", "pass"),),
        {**HELD, "then": "state_dict"},
    ),
    "snapshot taken while updates are deferred": Line(
        "DEFER-4",
        ENGINE,
        "AveragingEngine._checkpoint",
        (('self._attempt(self._dispatch.flush_deferred, "checkpoint()")', "pass"),),
        HELD,
    ),
    "stash written while it is read": Line(
        "DEFER-5", DEFERRED, "StashPool.take", (("if block.read.is_reached()", "if True"),), REUSED
    ),
    "stash not marked as read": Line(
        "DEFER-5", DEFERRED, "_run_stashed", (("        block.read.record()\n", ""),), REUSED
    ),
    "flag computed behind a forced wait": Line(
        "SKIP-2",
        DEFERRED,
        "DeferredUpdates.enqueue_check",
        (("self._flag_pool.take(1, may_wait=False) if self._is_forced() else None", "None"),),
        {**HALF, **SKIPPED, "bad": [4]},
    ),
    "flag not computed before the batches": Line(
        "SKIP-1",
        DEFERRED,
        "DeferredUpdates.enqueue_check",
        (("self._lane.enqueue_write(partial(check, flag, tensors, num_skipped))", "pass"),),
        SKIPPED,
    ),
    "trainer goes on where the stash is used up": Line(
        "DEFER-6", DEFERRED, "DeferredUpdates.stash_live", (("self._force(readbacks)", "pass"),), {**HELD, "scratch": 0}
    ),
    "forced averaging does not wait for the readbacks": Line(
        "STAGE-5",
        STAGING,
        "StagingCopies.wait_on_device",
        (("self._marks[last - 1].wait_on_device()", "pass"),),
        {"scratch": 0},
    ),
    "readbacks count as finished when they are queued": Line(
        "STAGE-5", STAGING, "StagingCopies.have_finished", (("self._marks[last - 1].is_reached()", "True"),)
    ),
    "pages read before they are copied": Line("STAGE-2", WRITER, "_pages", (("copies.wait_for_page(number)", "pass"),)),
    "staging chunk written while it is copied": Line(
        "READBACK-3",
        READBACK,
        "ChunkCopier._copy_run",
        (
            (
                "            _gather(run, chunk)\n",
                "            from tests.support.laggy.without import elsewhere\n"
                "            elsewhere(lambda: _gather(run, chunk))\n",
            ),
        ),
        {"checkpoint_dtype": "bfloat16"},
    ),
    "replaced storage not held": Line(
        "DISPATCH-1",
        DISPATCH,
        "UpdateDispatcher.queue",
        (("name: tensor.detach() for", "name: tensor for"),),
        {"writes": "replaced storages", "kind": "transposed"},
    ),
    "replaced storage released before it was read": Line(
        "DISPATCH-1",
        DISPATCH,
        "UpdateDispatcher.queue",
        (("self.order_writers()  # DISPATCH-1", "pass"),),
        {"writes": "replaced storages"},
    ),
    "caller's copies written while they are read": Line(
        "ENGINE-3",
        COPIES,
        "CallerSideCopies.take",
        (("            order_writers()  #", "            pass  #"),),
        {"read": "copied", "writes": "unfenced"},
    ),
    "optimizer is not ordered": Line("GUARD-1", GUARD, "WriteGuard.fence", (("self._order_writer()", "pass"),)),
    "first writer is not ordered": Line(
        "GUARD-3", GUARD, "WriteGuard.after_update", (("self._order_writer()", "pass"),), {"writes": "unseen once"}
    ),
    "host averages before the copy has arrived": Line(
        "OFFLOAD-1", OFFLOAD, "_average", (("mark.wait_on_host()", "pass"),), {"offload": "host"}
    ),
    "buffer set released before it was averaged": Line(
        "OFFLOAD-2",
        OFFLOAD,
        "_average",
        (
            ("    release()\n", "    pass\n"),
            ("    for stashed, mark in", "    release()\n    for stashed, mark in"),
        ),
        {"offload": "host"},
    ),
    "optimizer does not wait for the copies to the host": Line(
        "OFFLOAD-3",
        OFFLOAD,
        "Offload.enqueue_update",
        (("buffers, flag), abandon=release)", "buffers, flag), abandon=release, reads_parameters=False)"),),
        {"offload": "host"},
    ),
    "trainer goes on before parameters are on the host": Line(
        "OFFLOAD-3",
        DISPATCH,
        "UpdateDispatcher.queue",
        (("            self.order_writers()  # after the copies", "            pass  # after the copies"),),
        {"offload": "host", "read": "copied", "writes": "unfenced"},
    ),
}


def of(name: str) -> tuple[Any, str, Callable[..., Any], str]:
    """Return the owner and name of a line's function, the function, and its source without the line.

    Raises:
        ValueError: The line occurs not once: the table is out of date.
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
    """Leave one line out for a block; None leaves out no line."""
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
    """Run work on another stream, which does not wait for what was queued here before."""
    before = torch.accelerator.current_stream()
    after = torch.Stream(device=before.device)
    torch.accelerator.set_stream(after)
    work()
    torch.accelerator.set_stream(before)
    before.wait_stream(after)
